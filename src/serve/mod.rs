//! Many clients, many adapters, one model in memory.

pub mod job;
