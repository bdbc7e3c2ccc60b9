//! Fine-tuning: data, and what becomes of it.
//!
//! From the file up: [`data`] (lines to rows), [`prepared`] (rows as a mapped file, their order), [`batch`] (rows side by
//! side), [`parameters`] (what is trained), [`backward`] (gradients).

pub mod backward;
pub mod batch;
pub mod data;
pub mod parameters;
pub mod prepared;
