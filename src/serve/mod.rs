//! Many clients, many adapters, one model in memory.
//!
//! [`job`] is what is asked of the [`engine`]; [`http`] is what clients see. Between them: [`canary`] (which model answers an
//! alias), [`tally`] (how well), [`retrieval`] (passages), [`capture`] (the log), [`watch`] (drift).

pub mod canary;
pub mod capture;
pub mod drift;
pub mod engine;
pub mod http;
pub mod job;
pub mod retrieval;
pub mod tally;
pub mod watch;

use std::hash::{BuildHasher, Hasher, RandomState};

/// 64 bits that nobody can guess: SipHash, keyed by the operating system once, of a count.
pub fn random() -> u64 {
    static KEY: std::sync::OnceLock<RandomState> = std::sync::OnceLock::new();
    static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let mut hasher = KEY.get_or_init(RandomState::new).build_hasher();
    hasher.write_u64(COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    hasher.finish()
}
