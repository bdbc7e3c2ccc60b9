//! What is asked of the engine, and what it answers: tokens in, events out. Text, HTTP and names of routes are above.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::model::generate::Ending;
use crate::model::sampler::SamplerSettings;
use crate::retrieve::prompt::Layout;

/// A text to continue. It is given up as soon as nobody listens to `events` any more.
pub struct Job {
    /// The tokens to continue.
    pub prompt: Vec<u32>,
    /// The name of a loaded adapter; none: the base model.
    pub adapter: Option<String>,
    /// How each token is chosen; the seed counts.
    pub sampler: SamplerSettings,
    /// At most so many new tokens; 0: the prompt is only read, for its log-probabilities.
    pub max_tokens: usize,
    /// Tokens that end the text; they are not among the new ones.
    pub stop: Vec<u32>,
    /// Tells each new token's log-probability, and those of so many most probable ones.
    pub logprobs: Option<usize>,
    /// Tells the same of the prompt's tokens, before the first new one.
    pub echo: bool,
    /// Not to be worked on after this.
    pub deadline: Option<Instant>,
    /// Who listens. What waits there is bounded by `max_tokens`.
    pub events: UnboundedSender<Event>,
}

/// What happens to a job, in this order: `Prompt` where it was asked for, each `Token`, one of the last two.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt's tokens with their log-probabilities; the first token has none.
    Prompt(Vec<Token>),
    /// A new token.
    Token(Token),
    /// The end, as far as it came.
    Done(Done),
    /// It went wrong: what and what to do.
    Failed(String),
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability under the model, whatever the sampler makes of it; where asked for.
    pub logprob: Option<f32>,
    /// The most probable ids in its place, most probable first; where asked for.
    pub top: Vec<(u32, f32)>,
}

/// How a job ended and what it took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// Why there are no more tokens; [`Ending::Caller`] where its time was up.
    pub ending: Ending,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// New tokens.
    pub new_tokens: usize,
    /// Seconds it waited before its first pass.
    pub queue_seconds: f64,
    /// Seconds from then until the first new token.
    pub prompt_seconds: f64,
    /// Seconds from the first new token to the last.
    pub decode_seconds: f64,
}

/// Why a job was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// As many wait as may.
    #[error("{waiting} requests are waiting already: try again later")]
    Full {
        /// How many.
        waiting: usize,
    },
    /// The text cannot fit.
    #[error("the prompt has {prompt} tokens and {max_tokens} new ones were asked for; there is room for {room}")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// New tokens asked for.
        max_tokens: usize,
        /// Tokens a text may have.
        room: usize,
    },
    /// No such adapter.
    #[error("no adapter {0:?} is loaded")]
    UnknownAdapter(String),
    /// No tokens, ids beyond the vocabulary, sampler settings that mean nothing.
    #[error("{0}")]
    Invalid(String),
    /// The engine takes no more work.
    #[error("the server is going down")]
    Draining,
}

/// A loaded adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterInfo {
    /// As jobs name it.
    pub name: String,
    /// SHA-256 of its weights file, in hexadecimal.
    pub sha256: String,
    /// Rank.
    pub rank: usize,
    /// Bytes on the device.
    pub bytes: usize,
    /// The layout of the prompts it was trained on, where its directory says so.
    pub layout: Option<Layout>,
}

/// Where the engine stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Jobs in passes.
    pub running: usize,
    /// Jobs that wait.
    pub waiting: usize,
    /// Tokens in the caches.
    pub cached_tokens: usize,
    /// Tokens the caches have room for.
    pub cache_tokens: usize,
    /// Prompt tokens read since the start.
    pub prompt_tokens: u64,
    /// Tokens made since the start.
    pub new_tokens: u64,
    /// Passes since the start.
    pub passes: u64,
}
