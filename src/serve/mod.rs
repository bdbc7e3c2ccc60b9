//! Many clients, many adapters, one model in memory.

pub mod engine;
pub mod job;
