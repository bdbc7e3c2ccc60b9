//! Models: memory-mapped files, tokenizer, decoder and embedder.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod gguf;
pub mod hf;
pub mod sampler;
pub mod tokenizer;
