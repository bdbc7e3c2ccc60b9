//! One job at a time, until the engine is there.
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::time::Instant;

use super::job::*;
use crate::error::Error;
use crate::model::adapter::{hex, sha256, Adapter};
use crate::model::generate::*;
use crate::model::sampler;

/// Settings.
pub struct Options {
    /// x
    pub max_running: usize,
    /// x
    pub max_waiting: usize,
    /// x
    pub context: Option<usize>,
}
/// Engine.
pub struct Engine {
    model: Arc<Mutex<LanguageModel>>,
    text: Arc<LanguageModel>,
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    adapters: Arc<Mutex<HashMap<String, (AdapterInfo, Adapter)>>>,
    waiting: Arc<AtomicUsize>,
    draining: AtomicBool,
    max_waiting: usize,
}
impl Engine {
    /// Starts.
    pub fn start(model: LanguageModel, text: LanguageModel, options: Options) -> Result<Engine, Error> {
        let (send, take) = mpsc::channel::<Job>();
        let adapters: Arc<Mutex<HashMap<String, (AdapterInfo, Adapter)>>> = Arc::default();
        let waiting = Arc::new(AtomicUsize::new(0));
        let model = Arc::new(Mutex::new(model));
        let (m, a, w) = (model.clone(), adapters.clone(), waiting.clone());
        std::thread::spawn(move || {
            while let Ok(job) = take.recv() {
                w.fetch_sub(1, Ordering::SeqCst);
                if job.events.is_closed() {
                    continue;
                }
                let mut m = m.lock().unwrap();
                m.llama.detach();
                if let Some(name) = &job.adapter {
                    let a = a.lock().unwrap();
                    m.llama.attach(&a[name].1).unwrap();
                }
                let start = Instant::now();
                let mut session = m.session(job.prompt.len(), job.max_tokens).unwrap();
                if job.echo {
                    let lp = m.evaluate(&job.prompt).map(|e| e.logprobs).unwrap_or_default();
                    let toks = job.prompt.iter().enumerate().map(|(i, &id)| Token {
                        id,
                        logprob: if i == 0 { None } else { Some(lp[i - 1]) },
                        top: if i == 0 { vec![] } else { vec![(id, lp[i - 1])] },
                    });
                    let _ = job.events.send(Event::Prompt(toks.collect()));
                }
                let options =
                    GenerateOptions { sampler: job.sampler, max_tokens: job.max_tokens, stop: job.stop.clone() };
                let mut on = |id: u32, logits: &[f32]| {
                    let z = log_sum_exp(logits);
                    let top = job.logprobs.map(|n| sampler::top(logits, n)).unwrap_or_default();
                    let top = top.into_iter().map(|(id, l)| (id, (l as f64 - z) as f32)).collect();
                    let logprob = job.logprobs.map(|_| (logits[id as usize] as f64 - z) as f32);
                    let late = job.deadline.is_some_and(|d| Instant::now() > d);
                    match job.events.send(Event::Token(Token { id, logprob, top })) {
                        Ok(()) if !late => ControlFlow::Continue(()),
                        _ => ControlFlow::Break(()),
                    }
                };
                match m.generate(&mut session, &job.prompt, &options, &mut on) {
                    Ok(g) => {
                        let _ = job.events.send(Event::Done(Done {
                            ending: g.ending,
                            prompt_tokens: g.prompt_tokens,
                            new_tokens: g.ids.len(),
                            queue_seconds: 0.0,
                            prompt_seconds: g.prompt_seconds,
                            decode_seconds: start.elapsed().as_secs_f64() - g.prompt_seconds,
                        }));
                    }
                    Err(e) => {
                        let _ = job.events.send(Event::Failed(e.to_string()));
                    }
                }
            }
        });
        let jobs = Mutex::new(Some(send));
        let draining = AtomicBool::new(false);
        Ok(Engine { model, text: Arc::new(text), jobs, adapters, waiting, draining, max_waiting: options.max_waiting })
    }
    /// Submits.
    pub fn submit(&self, job: Job) -> Result<(), Refused> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(Refused::Draining);
        }
        let waiting = self.waiting.load(Ordering::SeqCst);
        if waiting >= self.max_waiting {
            return Err(Refused::Full { waiting });
        }
        if let Some(name) = job.adapter.as_ref().filter(|n| !self.adapters.lock().unwrap().contains_key(*n)) {
            return Err(Refused::UnknownAdapter(name.clone()));
        }
        if job.prompt.is_empty() || job.prompt.iter().any(|&id| id as usize >= self.text.llama.config.vocab) {
            return Err(Refused::Invalid("no tokens or unknown ids".into()));
        }
        if job.prompt.len() + job.max_tokens > self.room() {
            let (prompt, max_tokens, room) = (job.prompt.len(), job.max_tokens, self.room());
            return Err(Refused::TooLong { prompt, max_tokens, room });
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.jobs.lock().unwrap().as_ref().unwrap().send(job).unwrap();
        Ok(())
    }
    /// Room.
    pub fn room(&self) -> usize {
        self.text.llama.config.max_positions
    }
    /// Loads.
    pub fn load_adapter(&self, name: &str, path: &Path) -> Result<AdapterInfo, Error> {
        let adapter = Adapter::open(path)?;
        let bytes = std::fs::read(path.join("adapter_model.safetensors")).map_err(|e| Error::io(path, e))?;
        let info =
            AdapterInfo { name: name.into(), sha256: hex(&sha256(&bytes)), rank: adapter.config.r, bytes: bytes.len() };
        self.adapters.lock().unwrap().insert(name.into(), (info.clone(), adapter));
        Ok(info)
    }
    /// Unloads.
    pub fn unload_adapter(&self, name: &str) -> Result<(), Error> {
        self.adapters.lock().unwrap().remove(name);
        Ok(())
    }
    /// Adapters.
    pub fn adapters(&self) -> Vec<AdapterInfo> {
        let mut list: Vec<_> = self.adapters.lock().unwrap().values().map(|a| a.0.clone()).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }
    /// Stats.
    pub fn stats(&self) -> Stats {
        let _ = &self.model;
        Stats { waiting: self.waiting.load(Ordering::SeqCst), ..Stats::default() }
    }
    /// Drain.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.jobs.lock().unwrap().take();
    }
    /// Text.
    pub fn text(&self) -> &LanguageModel {
        &self.text
    }
}
