//! Models: memory-mapped files, tokenizer, decoder and embedder.
//!
//! From the file up: [`checkpoint`] (config and tensors), [`weights`] (tensors on a device), [`llama`] and [`bert`]
//! (the passes), [`session`] (what a text in progress keeps), [`generate`] (with tokenizer and sampler: the whole).
//! [`mod@write`] is the way back.

pub mod adapter;
pub mod batch;
pub mod bert;
pub mod bnb4;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod generate;
pub mod gguf;
pub mod hf;
pub(crate) mod layout;
pub mod linear;
pub mod llama;
pub mod merge;
pub mod sampler;
pub mod session;
pub mod stack;
pub mod stop;
pub mod tokenizer;
pub mod weights;
pub mod write;
mod write_gguf;
mod write_hf;
mod write_vocab;
