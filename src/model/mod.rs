//! Models: memory-mapped files, tokenizer, decoder and embedder.

pub mod bnb4;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod gguf;
pub mod hf;
pub(crate) mod layout;
pub mod sampler;
pub mod tokenizer;
