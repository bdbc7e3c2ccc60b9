//! Fine-tuning: data, and what becomes of it.
//!
//! From the file up: [`data`] (lines to rows), [`prepared`] (rows as a mapped file, their order), [`batch`] (rows
//! side by side), [`parameters`] (what is trained), [`backward`] (gradients), [`optimizer`] and [`step`] (what a step
//! is), [`checkpoint`], [`metrics`] and [`run`] (many of them).

pub mod backward;
pub mod batch;
pub mod begin;
pub mod checkpoint;
pub mod data;
pub mod metrics;
pub mod optimizer;
pub mod parameters;
pub mod prepared;
pub mod run;
pub mod step;
