//! Retrieval: exact cosine top-k over memory-mapped vectors, and what is built on it.

pub mod topk;
pub mod vectors;
