//! The engine's thread.

use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use rayon::prelude::*;

use super::room::Room;
use super::{Loaded, Shared, Waiting};
use crate::error::Error;
use crate::model::batch::{Batch, Part};
use crate::model::generate::{log_sum_exp, Ending};
use crate::model::llama::Llama;
use crate::model::sampler::{self, Sampler};
use crate::serve::job::{Done, Event, Job, Token};

/// How many times `prefill_chunk` a pass reads where no text continues.
pub const ALONE: usize = 4;

pub struct Worker {
    shared: Arc<Shared>,
    llama: Llama,
    batch: Batch,
    room: Room,
    max_running: usize,
    prefill_chunk: usize,
    /// First come first.
    running: Vec<Running>,
    /// The adapter in each slot of the decoder.
    slots: Vec<Option<Arc<Loaded>>>,
}

/// A text in work.
struct Running {
    job: Job,
    adapter: Option<Arc<Loaded>>,
    sampler: Sampler,
    /// Its rows of the cache.
    rows: Range<usize>,
    /// Tokens in the cache.
    read: usize,
    /// The last one chosen, which the next pass reads.
    next: [u32; 1],
    new_tokens: usize,
    /// The prompt with its log-probabilities, as far as they are known.
    echo: Vec<Token>,
    /// What the last pass led to.
    chosen: Option<Result<Token, sampler::Error>>,
    since: Instant,
    begun: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, llama: Llama, batch: Batch, max_running: usize, prefill_chunk: usize) -> Worker {
        let room = Room::new(batch.cache_rows());
        Worker { shared, llama, batch, room, max_running, prefill_chunk, running: Vec::new(), slots: Vec::new() }
    }

    /// Until the last handle is gone.
    pub fn run(mut self) {
        // Launches begin at once from a thread of the pool; from another each would wake one and wait for it.
        let pool = rayon::ThreadPoolBuilder::new().use_current_thread().build();
        if let Err(error) = &pool {
            log::warn!("the engine's thread stays outside its pool: {error}");
        }
        while self.prepare() {
            self.pass();
        }
    }

    /// Everything between two passes; false at the end.
    fn prepare(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut desk = shared.desk();
        loop {
            if desk.closed {
                return false;
            }
            self.let_go();
            let now = Instant::now();
            desk.waiting.retain(|waiting| !waiting.is_over(now));
            while self.running.len() < self.max_running {
                let Some(rows) = desk.waiting.front().and_then(|waiting| self.room.take(waiting.rows())) else { break };
                if let Some(waiting) = desk.waiting.pop_front() {
                    self.admit(waiting, rows);
                }
            }
            if let Some(load) = desk.loads.pop_front() {
                drop(desk);
                let info = load.info;
                let done = self.load(&load.adapter);
                desk = shared.desk();
                let answer = done.map(|slot| {
                    let loaded = Arc::new(Loaded { slot, info: info.clone() });
                    self.slots[slot] = Some(loaded.clone());
                    desk.adapters.insert(info.name.clone(), loaded);
                    info
                });
                // Whoever asked may be gone; the adapter is there.
                let _ = load.reply.send(answer);
                continue;
            }
            let unused = self.unused();
            if !unused.is_empty() {
                drop(desk);
                unused.into_iter().for_each(|slot| self.unload(slot));
                desk = shared.desk();
                continue;
            }
            desk.stats.running = self.running.len();
            desk.stats.cached_tokens = self.running.iter().map(|running| running.read).sum();
            desk.stats.waiting = desk.waiting.len();
            shared.ended.notify_all();
            if !self.running.is_empty() {
                return true;
            }
            desk = shared.work.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Jobs that nobody listens to, and those whose time is up.
    fn let_go(&mut self) {
        let now = Instant::now();
        self.end_where(|running| {
            if running.job.events.is_closed() {
                return true;
            }
            let over = running.job.deadline.is_some_and(|deadline| deadline <= now);
            if over {
                running.end(Ending::Caller);
            }
            over
        });
    }

    /// Takes the jobs of which `over` says so out, and their rows back.
    fn end_where(&mut self, mut over: impl FnMut(&mut Running) -> bool) {
        let room = &mut self.room;
        self.running.retain_mut(|running| {
            let ended = over(running);
            if ended {
                room.give_back(running.rows.clone());
            }
            !ended
        });
    }

    fn admit(&mut self, waiting: Waiting, rows: Range<usize>) {
        let Waiting { job, adapter, since } = waiting;
        let sampler = match Sampler::new(job.sampler) {
            Ok(sampler) => sampler,
            Err(error) => {
                // Checked when it was submitted.
                let _ = job.events.send(Event::Failed(error.to_string()));
                return self.room.give_back(rows);
            }
        };
        let echo =
            if job.echo { vec![Token { id: job.prompt[0], logprob: None, top: Vec::new() }] } else { Vec::new() };
        self.running.push(Running {
            job,
            adapter,
            sampler,
            rows,
            read: 0,
            next: [0],
            new_tokens: 0,
            echo,
            chosen: None,
            since,
            begun: Instant::now(),
            first: None,
            last: None,
        });
    }

    /// Brings an adapter to the first free slot.
    fn load(&mut self, adapter: &crate::model::adapter::Adapter) -> Result<usize, Error> {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        self.slots.resize(self.slots.len().max(slot + 1), None);
        guarded(|| self.llama.stack(slot, adapter))?;
        Ok(slot)
    }

    /// Gives back the memory of the adapter in a slot. Where that fails it stays for the next that comes to the slot.
    fn unload(&mut self, slot: usize) {
        self.slots[slot] = None;
        if let Err(error) = guarded(|| self.llama.unstack(slot)) {
            log::warn!("an adapter that nobody uses keeps its memory until another takes its place: {error}");
        }
    }

    /// The slots of adapters that have neither a name nor a job: nobody can come by them any more.
    fn unused(&self) -> Vec<usize> {
        let unused = |slot: &Option<Arc<Loaded>>| slot.as_ref().is_some_and(|loaded| Arc::strong_count(loaded) == 1);
        (0..self.slots.len()).filter(|&i| unused(&self.slots[i])).collect()
    }

    /// One pass over the running texts.
    fn pass(&mut self) {
        let shares = self.shares();
        let Worker { running, llama, batch, .. } = self;
        // Those that continue come first.
        let mut order: Vec<usize> = (0..running.len()).filter(|&i| shares[i] > 0).collect();
        order.sort_by_key(|&i| running[i].is_reading());
        let texts: Vec<Vec<u32>> = order.iter().map(|&i| running[i].next_ids(shares[i]).to_vec()).collect();
        let mut parts = Vec::with_capacity(order.len());
        for (&i, ids) in order.iter().zip(&texts) {
            let text = &running[i];
            parts.push(Part {
                ids,
                begin: text.read,
                at: text.rows.start,
                adapter: text.adapter.as_ref().map(|adapter| adapter.slot),
                logits: text.wanted(shares[i]),
            });
        }
        let vocab = llama.config.vocab;
        let done = guarded(|| {
            llama.pass(batch, &parts, &mut |whose, logits| {
                // The rows of logits of each running text.
                let mut rows = vec![0..0; running.len()];
                for (row, (part, _)) in whose.iter().enumerate() {
                    let rows = &mut rows[order[*part]];
                    *rows = if rows.end == 0 { row..row + 1 } else { rows.start..row + 1 };
                }
                running.par_iter_mut().zip(rows).for_each(|(running, rows)| {
                    for row in rows {
                        running.take(running.read + whose[row].1, &logits[row * vocab..(row + 1) * vocab]);
                    }
                });
                Ok(())
            })
        });
        if let Err(error) = done {
            log::error!("a pass over {} texts failed: {error}", parts.len());
            let what = format!("the device failed while it worked on this: {error}; try again");
            return self.end_where(|running| {
                let _ = running.job.events.send(Event::Failed(what.clone()));
                true
            });
        }
        let mut prompt_tokens = 0;
        for &i in &order {
            if running[i].is_reading() {
                prompt_tokens += shares[i];
            }
            running[i].read += shares[i];
        }
        let mut new_tokens = 0;
        self.end_where(|running| {
            let before = running.new_tokens;
            let ended = running.go_on();
            new_tokens += running.new_tokens - before;
            ended
        });
        let mut desk = self.shared.desk();
        desk.stats.prompt_tokens += prompt_tokens as u64;
        desk.stats.new_tokens += new_tokens as u64;
        desk.stats.passes += 1;
    }

    /// How many tokens of each text the next pass takes: one where the prompt is read; the rest of the pass is shared
    /// evenly among prompts, what one does not need going to the others.
    fn shares(&self) -> Vec<usize> {
        let mut shares: Vec<usize> = self.running.iter().map(|running| !running.is_reading() as usize).collect();
        let mut left = self.prefill_chunk * if shares.contains(&1) { 1 } else { ALONE };
        let mut reading: Vec<usize> = (0..shares.len()).filter(|&i| shares[i] == 0).collect();
        reading.sort_by_key(|&i| self.running[i].unread());
        let count = reading.len();
        for (done, i) in reading.into_iter().enumerate() {
            // At least one each, so that none stands still.
            let share = (left / (count - done)).max(usize::from(left > 0));
            shares[i] = self.running[i].unread().min(share);
            left -= shares[i];
        }
        shares
    }
}

impl Drop for Worker {
    /// However the thread ends, nobody waits for it in vain.
    fn drop(&mut self) {
        for running in self.running.drain(..) {
            let _ = running.job.events.send(Event::Failed("the server went down before this was finished".into()));
        }
        let mut desk = self.shared.desk();
        desk.closed = true;
        desk.loads.clear();
        desk.adapters.clear();
        for waiting in desk.waiting.drain(..) {
            let _ = waiting.job.events.send(Event::Failed("the server went down before this began".into()));
        }
        (desk.stats.running, desk.stats.waiting, desk.stats.cached_tokens) = (0, 0, 0);
        self.shared.ended.notify_all();
    }
}

impl Waiting {
    /// Rows of the cache it needs: the last token is chosen, not read.
    fn rows(&self) -> usize {
        self.job.prompt.len() + self.job.max_tokens.saturating_sub(1)
    }

    /// True where nobody listens or its time is up, which is told.
    fn is_over(&self, now: Instant) -> bool {
        let over = self.job.deadline.is_some_and(|deadline| deadline <= now);
        if over {
            let _ = self.job.events.send(Event::Done(Done {
                ending: Ending::Caller,
                prompt_tokens: self.job.prompt.len(),
                new_tokens: 0,
                queue_seconds: now.duration_since(self.since).as_secs_f64(),
                prompt_seconds: 0.0,
                decode_seconds: 0.0,
            }));
        }
        over || self.job.events.is_closed()
    }
}

impl Running {
    fn unread(&self) -> usize {
        self.job.prompt.len().saturating_sub(self.read)
    }

    fn is_reading(&self) -> bool {
        self.unread() > 0
    }

    /// The next tokens to read, `count` of them.
    fn next_ids(&self, count: usize) -> &[u32] {
        if self.is_reading() {
            &self.job.prompt[self.read..self.read + count]
        } else {
            &self.next
        }
    }

    /// Of how many of the next `count` tokens logits are wanted.
    fn wanted(&self, count: usize) -> usize {
        let all = self.is_reading() && self.job.echo && self.job.logprobs.is_some();
        let last = self.read + count >= self.job.prompt.len() && self.job.max_tokens > 0;
        if all {
            count
        } else {
            usize::from(last)
        }
    }

    /// The logits after the text's token `at`.
    fn take(&mut self, at: usize, logits: &[f32]) {
        match self.job.prompt.get(at + 1) {
            Some(&id) => self.echo.push(self.token(id, logits)),
            None if self.job.max_tokens > 0 => {
                let id = self.sampler.sample(logits);
                self.chosen = Some(id.map(|id| self.token(id, logits)));
            }
            None => {}
        }
    }

    /// A token with what the job wants to know of it.
    fn token(&self, id: u32, logits: &[f32]) -> Token {
        let Some(count) = self.job.logprobs else { return Token { id, logprob: None, top: Vec::new() } };
        let sum = log_sum_exp(logits);
        let logprob = |logit: f32| (logit as f64 - sum) as f32;
        let top = if count > 0 { sampler::top(logits, count) } else { Vec::new() };
        let top = top.into_iter().map(|(id, logit)| (id, logprob(logit))).collect();
        Token { id, logprob: Some(logprob(logits[id as usize])), top }
    }

    /// Tells what the pass led to; true at the end.
    fn go_on(&mut self) -> bool {
        if self.is_reading() {
            return false;
        }
        if self.job.echo {
            self.job.echo = false;
            if self.job.logprobs.is_none() {
                self.echo = self.job.prompt.iter().map(|&id| Token { id, logprob: None, top: Vec::new() }).collect();
            }
            let _ = self.job.events.send(Event::Prompt(std::mem::take(&mut self.echo)));
        }
        if self.job.max_tokens == 0 {
            self.end(Ending::MaxTokens);
            return true;
        }
        let token = match self.chosen.take() {
            Some(Ok(token)) => token,
            Some(Err(error)) => {
                let _ = self.job.events.send(Event::Failed(error.to_string()));
                return true;
            }
            None => return false,
        };
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        if self.job.stop.contains(&token.id) {
            self.end(Ending::Stop(token.id));
            return true;
        }
        self.next = [token.id];
        self.new_tokens += 1;
        // Nobody there: the next look at the listeners ends it.
        let _ = self.job.events.send(Event::Token(token));
        let ended = self.new_tokens == self.job.max_tokens;
        if ended {
            self.end(Ending::MaxTokens);
        }
        ended
    }

    /// Tells the end.
    fn end(&self, ending: Ending) {
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let _ = self.job.events.send(Event::Done(Done {
            ending,
            prompt_tokens: self.job.prompt.len(),
            new_tokens: self.new_tokens,
            queue_seconds: between(Some(self.since), Some(self.begun)),
            prompt_seconds: between(Some(self.begun), self.first),
            decode_seconds: between(self.first, self.last),
        }));
    }
}

/// What `work` gives; a panic in it as an error.
fn guarded<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(Error::Request(format!("a fault in the program: {}", said.unwrap_or("no message"))))
    })
}
