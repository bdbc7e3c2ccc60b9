//! Retrieval: exact cosine top-k over memory-mapped vectors, and what is built on it.

pub mod chunk;
pub mod document;
pub mod files;
pub mod index;
pub mod prompt;
pub mod topk;
