//! Handmill: hand-written GPU kernels for adapting language models, each beside a readable CPU reference,
//! and the memory-mapped runtime that drives them.
//!
//! Read in this order: [`op`] (what a contract is), one op such as [`ops`]`::rmsnorm`, [`device`] (how it is launched),
//! [`model`] (who calls it).

pub mod error;
pub mod model;
pub mod quant;
pub mod tensor;

pub use error::Error;
