//! Many clients, many adapters, one model in memory.

pub mod drift;
pub mod engine;
pub mod intervals;
pub mod job;
