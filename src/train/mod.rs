//! Fine-tuning: data, and what becomes of it.
//!
//! From the file up: [`data`] (lines to rows), [`prepared`] (rows as a mapped file, their order).

pub mod data;
pub mod prepared;
