//! OpenAI's HTTP interface over the engine, with citations, canaries, a log, metrics and one page.
//!
//! ```text
//! listen     connections, limits, the way down         paced     who reads nothing loses the connection
//! wire       requests, checked field by field          error     what is answered when they are not
//! prepare    names to adapters and passages, text to tokens
//! answer     one job followed to its end               complete  the two routes that answer with text
//! routes     everything else                           page      `GET /`
//! ```

pub mod answer;
pub mod complete;
pub mod error;
pub mod listen;
pub mod metrics;
pub mod paced;
pub mod page;
pub mod prepare;
pub mod routes;
pub mod wire;

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use self::metrics::Metrics;
use super::canary::{Canary, Observed};
use super::capture::Capture;
use super::engine::Engine;
use super::retrieval::Retrieval;

pub(crate) use super::random;

/// Answers whose ratings are still taken.
const REMEMBERED: usize = 65_536;

/// What a request may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a body.
    pub max_body: usize,
    /// From a request to the end of its answer.
    pub timeout: Duration,
    /// What a client may take for its request's head, for its body, or to read something of what is sent.
    pub client: Duration,
    /// New tokens of an answer whose request does not say how many.
    pub default_tokens: usize,
    /// Connections at once.
    pub connections: usize,
}

/// Everything that answers have in common.
pub struct Server {
    /// The engine.
    pub engine: Engine,
    /// The base model's name.
    pub base: String,
    /// Texts that the tokenizer takes for special tokens.
    pub special: Vec<String>,
    /// Indexes, where there are any.
    pub retrieval: Option<Arc<Retrieval>>,
    /// Aliases.
    pub canary: Canary,
    /// The log, where it is switched on.
    pub capture: Option<Capture>,
    /// Counts.
    pub metrics: Metrics,
    /// What a request may be.
    pub limits: Limits,
    /// SHA-256 of the tokens that open the server; none: it is open.
    pub tokens: Vec<[u8; 32]>,
    /// Where adapters may be loaded from on request; none: nowhere.
    pub adapter_root: Option<PathBuf>,
    /// Whether it listens to this machine alone.
    pub loopback: bool,
    /// Answers that may be rated.
    pub recent: Recent,
    /// When it began.
    pub began: Instant,
    /// No more work is taken.
    pub draining: AtomicBool,
    /// Requests being answered.
    pub active: Arc<AtomicUsize>,
    /// The question's distance from the reference.
    pub drift: Option<Arc<super::watch::Watch>>,
}

/// A request being answered, for as long as this is kept.
pub struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Server {
    /// Counts a request until it is answered.
    pub fn ticket(&self) -> Ticket {
        self.active.fetch_add(1, Ordering::SeqCst);
        Ticket(self.active.clone())
    }

    /// Counts an arm's answer, and says where it led to a rollback.
    pub fn observe(&self, alias: &str, arm: &str, seen: Observed) {
        let outcome = match (seen.shadow, seen.failed) {
            (false, false) => "ok",
            (false, true) => "failed",
            (true, false) => "shadow",
            (true, true) => "shadow_failed",
        };
        self.metrics.arm(alias, arm, outcome, seen.seconds);
        if let Some(event) = self.canary.record(alias, arm, seen) {
            self.metrics.rolled_back(&event);
        }
    }

    /// Writes a line of the log, if there is one.
    pub async fn log(&self, line: Value) -> Result<(), error::ApiError> {
        let Some(capture) = &self.capture else { return Ok(()) };
        let written = capture.write(line).await;
        self.metrics.captured(written.is_ok());
        // Not what the file's name is: that is the operator's.
        written.map_err(|_| error::ApiError::internal("the answer could not be recorded: see the server's log"))
    }

    /// Base model and adapters.
    pub fn models(&self) -> Vec<String> {
        let adapters = self.engine.adapters().into_iter().map(|adapter| adapter.name);
        std::iter::once(self.base.clone()).chain(adapters).collect()
    }
}

/// The arm of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arm {
    /// The alias that was asked.
    pub alias: String,
    /// The model that answered.
    pub model: String,
}

/// The last answers, by id, with the arm that gave each where there is one.
#[derive(Default)]
pub struct Recent(Mutex<Answers>);

/// Answers by id, each with its arm and its rating, and their ids in order.
type Answers = (HashMap<String, (Option<Arm>, Option<bool>)>, VecDeque<String>);

impl Recent {
    /// Remembers an answer.
    pub fn add(&self, id: &str, arm: Option<Arm>) {
        let (map, order) = &mut *self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if map.insert(id.to_string(), (arm, None)).is_none() {
            order.push_back(id.to_string());
        }
        while order.len() > REMEMBERED {
            order.pop_front().iter().for_each(|old| drop(map.remove(old)));
        }
    }

    /// The arm of an answer; none: there is no such answer.
    pub fn arm(&self, id: &str) -> Option<Option<Arm>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).0.get(id).map(|(arm, _)| arm.clone())
    }

    /// Keeps an answer's rating; gives the one it had.
    pub fn rate(&self, id: &str, good: bool) -> Option<bool> {
        let (map, _) = &mut *self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        map.get_mut(id).and_then(|(_, rating)| rating.replace(good))
    }
}

/// Bytes in base64, with its padding.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let bits = (0..3).fold(0u32, |bits, i| bits << 8 | u32::from(*part.get(i).unwrap_or(&0)));
        for i in 0..4 {
            match i <= part.len() {
                true => text.push(DIGITS[(bits >> (18 - 6 * i) & 63) as usize] as char),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (text, wanted) in cases {
            assert_eq!(base64(text.as_bytes()), wanted);
        }
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn only_the_last_answers_are_remembered() {
        let recent = Recent::default();
        let arm = Arm { alias: "a".into(), model: "m".into() };
        recent.add("first", Some(arm.clone()));
        assert_eq!(recent.arm("first"), Some(Some(arm)));
        assert_eq!((recent.rate("first", true), recent.rate("first", false)), (None, Some(true)));
        assert_eq!((recent.rate("first", true), recent.rate("gone", true)), (Some(false), None));
        (0..REMEMBERED).for_each(|i| recent.add(&i.to_string(), None));
        assert_eq!((recent.arm("first"), recent.arm("7")), (None, Some(None)));
    }
}
