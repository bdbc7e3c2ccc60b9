//! The engine: one thread that owns the decoder and runs many texts through it at once, each with its own adapter.
//!
//! ```text
//! loop:
//!     do what was asked between passes: load an adapter, give back one that nobody uses any more
//!     let go of the jobs that nobody listens to and those whose time is up
//!     admit those that wait, first come first served, while rows of a pass and of the cache are free
//!     one pass: a token of every text that has its prompt read, and a chunk of the other prompts, shared evenly
//!     choose each text's next token and tell it
//! ```
//!
//! A job keeps the adapter it was submitted with, also where its name is given to another or taken away meanwhile: the
//! old one's memory is given back when its last job has ended. A fault of one job ends that one; a fault of the device
//! ends those in the pass, with a sentence, and the engine goes on.

mod room;
mod text;
mod worker;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::mpsc::{sync_channel, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::job::{AdapterInfo, Job, Refused, Stats};
use crate::error::Error;
use crate::model::adapter::{weights_sha256, Adapter};
use crate::model::generate::LanguageModel;
use crate::model::sampler::Sampler;
use crate::retrieve::prompt::Layout;
pub use text::TextSide;

/// How much an engine takes on.
#[derive(Clone, Debug)]
pub struct Options {
    /// Texts in a pass.
    pub max_running: usize,
    /// Jobs that may wait for their first pass.
    pub max_waiting: usize,
    /// Tokens that all running texts may have together, those still to come among them.
    pub cache_tokens: usize,
    /// Tokens a text may have; 0: as many as model and cache allow.
    pub context: usize,
    /// Prompt tokens that are read in one pass beside texts that continue; four times as many where none does.
    pub prefill_chunk: usize,
    /// SHA-256 of the model's files ([`crate::model::adapter::model_sha256`]): adapters that name another base are
    /// refused. None: any adapter of the model's sizes is taken.
    pub base_sha256: Option<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_running: 16,
            max_waiting: 256,
            cache_tokens: 8192,
            context: 0,
            prefill_chunk: 128,
            base_sha256: None,
        }
    }
}

/// A running engine. Clones are handles to the same one; it ends with the last of them, and with it what still runs.
#[derive(Clone)]
pub struct Engine {
    owner: Arc<Owner>,
}

/// Ends the thread when the last handle goes.
struct Owner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What handles and the thread share.
struct Shared {
    text: Arc<TextSide>,
    max_waiting: usize,
    base_sha256: Option<String>,
    device: String,
    desk: Mutex<Desk>,
    /// For the thread: there is something to do.
    work: Condvar,
    /// For those who wait for the end: something ended.
    ended: Condvar,
}

/// Where jobs and wishes are left for the thread.
#[derive(Default)]
struct Desk {
    waiting: VecDeque<Waiting>,
    loads: VecDeque<Load>,
    adapters: BTreeMap<String, Arc<Loaded>>,
    draining: bool,
    closed: bool,
    stats: Stats,
}

/// A job in the queue.
struct Waiting {
    job: Job,
    adapter: Option<Arc<Loaded>>,
    since: Instant,
}

/// An adapter to be brought to the device.
struct Load {
    adapter: Box<Adapter>,
    info: AdapterInfo,
    reply: SyncSender<Result<AdapterInfo, Error>>,
}

/// An adapter on the device, held by its name and by the jobs that use it.
struct Loaded {
    slot: usize,
    info: AdapterInfo,
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Every change is whole before anything can panic.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Takes the model to a thread of its own. Errors: options that mean nothing, memory for the cache.
    pub fn start(model: LanguageModel, options: Options) -> Result<Engine, Error> {
        let stop = model.stop_ids();
        let LanguageModel { mut llama, tokenizer, chat_template } = model;
        llama.detach();
        let Options { max_running, max_waiting, cache_tokens, prefill_chunk, base_sha256, .. } = options;
        if max_running == 0 || prefill_chunk == 0 || cache_tokens == 0 {
            let what = format!(
                "an engine for {max_running} texts, {cache_tokens} tokens and chunks of {prefill_chunk} was asked for; \
                 each must be 1 or more"
            );
            return Err(Error::Request(what));
        }
        let most = llama.config.max_positions.min(cache_tokens);
        let context = if options.context == 0 { most } else { options.context.min(most) };
        let rows = max_running + worker::ALONE * prefill_chunk;
        let batch = llama.batch(rows, cache_tokens, context)?;
        let vocab = llama.config.vocab;
        let shared = Arc::new(Shared {
            text: Arc::new(TextSide { tokenizer, chat_template, stop, vocab, context }),
            max_waiting,
            base_sha256,
            device: llama.device.description(),
            desk: Mutex::new(Desk { stats: Stats { cache_tokens, ..Stats::default() }, ..Desk::default() }),
            work: Condvar::new(),
            ended: Condvar::new(),
        });
        let worker = worker::Worker::new(shared.clone(), llama, batch, max_running, prefill_chunk);
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || worker.run());
        let thread = thread.map_err(|cause| Error::Request(format!("the engine's thread cannot start: {cause}")))?;
        Ok(Engine { owner: Arc::new(Owner { shared, thread: Some(thread) }) })
    }

    /// Leaves a job for the next pass that has room; never waits. What comes of it goes to the job's `events`.
    pub fn submit(&self, job: Job) -> Result<(), Refused> {
        let shared = &self.owner.shared;
        let text = &shared.text;
        if job.prompt.is_empty() {
            return Err(Refused::Invalid("the prompt has no tokens: give at least one".into()));
        }
        if let Some(id) = job.prompt.iter().find(|id| **id as usize >= text.vocab) {
            return Err(Refused::Invalid(format!("token id {id} is beyond the vocabulary of {} tokens", text.vocab)));
        }
        Sampler::new(job.sampler).map_err(|error| Refused::Invalid(error.to_string()))?;
        let room = text.context;
        if job.prompt.len().checked_add(job.max_tokens).is_none_or(|tokens| tokens > room) {
            return Err(Refused::TooLong { prompt: job.prompt.len(), max_tokens: job.max_tokens, room });
        }
        let mut desk = shared.desk();
        if desk.draining || desk.closed {
            return Err(Refused::Draining);
        }
        let adapter = match &job.adapter {
            None => None,
            Some(name) => match desk.adapters.get(name) {
                Some(loaded) => Some(loaded.clone()),
                None => return Err(Refused::UnknownAdapter(name.clone())),
            },
        };
        if desk.waiting.len() >= shared.max_waiting {
            return Err(Refused::Full { waiting: desk.waiting.len() });
        }
        desk.waiting.push_back(Waiting { job, adapter, since: Instant::now() });
        desk.stats.waiting = desk.waiting.len();
        drop(desk);
        shared.work.notify_one();
        Ok(())
    }

    /// Brings a PEFT directory to the device under a name, between two passes. A name that is taken goes to the new
    /// adapter; jobs submitted before keep the old one. Errors name the file or what does not fit the model.
    pub fn load_adapter(&self, name: &str, dir: &Path) -> Result<AdapterInfo, Error> {
        let shared = &self.owner.shared;
        let adapter = Adapter::open(dir)?;
        if let Some(base) = &shared.base_sha256 {
            adapter.check_base_sha256(base)?;
        }
        let bytes = 4 * adapter.parameters();
        let layout = Layout::of_adapter(dir)?;
        let info =
            AdapterInfo { name: name.into(), sha256: weights_sha256(dir)?, rank: adapter.config.r, bytes, layout };
        let (reply, answer) = sync_channel(1);
        let mut desk = shared.desk();
        if desk.closed {
            return Err(gone());
        }
        desk.loads.push_back(Load { adapter: Box::new(adapter), info, reply });
        drop(desk);
        shared.work.notify_one();
        answer.recv().map_err(|_| gone())?
    }

    /// Takes a name away: new jobs cannot use it. Those submitted before end with the adapter they have; after the last
    /// of them its memory is given back. An error where no adapter has the name.
    pub fn unload_adapter(&self, name: &str) -> Result<(), Error> {
        let mut desk = self.owner.shared.desk();
        let Some(loaded) = desk.adapters.remove(name) else {
            return Err(Error::Request(Refused::UnknownAdapter(name.into()).to_string()));
        };
        drop(loaded);
        drop(desk);
        self.owner.shared.work.notify_one();
        Ok(())
    }

    /// The adapters that jobs can name, by name.
    pub fn adapters(&self) -> Vec<AdapterInfo> {
        self.owner.shared.desk().adapters.values().map(|loaded| loaded.info.clone()).collect()
    }

    /// Where it stands.
    pub fn stats(&self) -> Stats {
        self.owner.shared.desk().stats
    }

    /// Takes no more jobs and waits until those taken have ended, at most `timeout`; false where some have not. They go
    /// on until then or until the last handle goes.
    pub fn drain(&self, timeout: Duration) -> bool {
        let shared = &self.owner.shared;
        let mut desk = shared.desk();
        desk.draining = true;
        let busy = |desk: &mut Desk| !desk.closed && desk.stats.running + desk.waiting.len() > 0;
        let waited = shared.ended.wait_timeout_while(desk, timeout, busy);
        let (desk, _) = waited.unwrap_or_else(PoisonError::into_inner);
        desk.stats.running + desk.waiting.len() == 0
    }

    /// Tokenizer, chat template, and what a text may be.
    pub fn text(&self) -> Arc<TextSide> {
        self.owner.shared.text.clone()
    }

    /// What the decoder runs on, for people.
    pub fn device(&self) -> &str {
        &self.owner.shared.device
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.desk().closed = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            // Its panics were told to those whose jobs they ended.
            let _ = thread.join();
        }
    }
}

fn gone() -> Error {
    Error::Request(Refused::Draining.to_string())
}
