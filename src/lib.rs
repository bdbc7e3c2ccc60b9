//! Handmill: hand-written GPU kernels for adapting language models, each beside a readable CPU reference,
//! and the memory-mapped runtime that drives them.
//!
//! Read in this order: [`op`] (what a contract is), one op such as [`ops::rmsnorm`], [`device`] (how it is launched),
//! [`verify`] (how it is checked), [`model`] (who calls it).

pub mod aside;
pub mod compare;
pub mod device;
pub mod error;
pub mod model;
pub mod npy;
pub mod op;
pub mod ops;
pub mod quant;
pub mod registry;
pub mod retrieve;
pub mod serve;
pub mod tensor;
pub mod train;
pub mod verify;

pub use error::Error;
