//! The stages, one after the other: prepare, index, retrieve, choose prompts, answer, train, answer, forget, judge.
//! Each is kept under the hash of what it was made from ([`stages`]); models are opened only where something is to do.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::arms::{self, Answered, Arm, Prompt};
use super::inputs::{self, Inputs};
use super::outcome::{self, ArmOutcome, Forgetting, HitRate, Outcome, Style, Variant};
use super::prompt::Example;
use super::questions::{Question, TrainRow};
use super::recommend::Facts;
use super::retrieval::{Built, Retriever};
use super::stages::{self, Records};
use super::training::{self, Trained};
use super::{metrics, mix, stats, warnings, Config, Costs, Halt, Progress, Watch};
use crate::device::Device;
use crate::error::Error;
use crate::model::adapter::Adapter;
use crate::model::generate::{Embedder, LanguageModel};
use crate::model::weights::LoadOptions;
use crate::retrieve::index::Passage;
use crate::retrieve::prompt::special_tokens;
use crate::train::metrics::{peak_bytes, reset_peak};
use crate::train::run;

/// Tokens of the unrelated text that are read at most, in windows of so many.
pub(crate) const RETENTION_TOKENS: usize = 4096;
const WINDOW: usize = 512;
/// Tokens of a stretch of it: they are drawn together.
pub(crate) const STRETCH: usize = 32;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Retrieved {
    pub questions: Vec<Vec<Passage>>,
    pub dev: Vec<Vec<Passage>>,
    pub train: Vec<Vec<Passage>>,
    pub seconds: f64,
    pub built: Built,
}

/// What passages depend on, and beside it what training rows and examples do.
struct Keys {
    passages: String,
    rows: String,
}

#[derive(Serialize, Deserialize)]
struct Retention {
    base: Vec<f64>,
    adapted: Vec<Vec<f64>>,
}

struct Work<'a> {
    config: &'a Config,
    device: Arc<dyn Device>,
    watch: Watch<'a>,
    inputs: Inputs,
    /// The decoder, once something needs it.
    model: Option<LanguageModel>,
    /// Its special tokens.
    special: Vec<String>,
    /// The embedder and its index, once something needs them.
    retriever: Option<Retriever>,
}

/// Runs a comparison, or what is left to do of it.
pub fn run(config: &Config, device: Arc<dyn Device>, watch: Watch) -> Result<Outcome, Halt> {
    let _lock = run::lock(&config.out)?;
    let state = config.out.join("state");
    fs::create_dir_all(&state).map_err(|cause| Error::io(&state, cause))?;
    watch(&Progress { stage: "preparing", done: 0, total: 0, what: "reading and hashing files".into() });
    let inputs = inputs::prepare(config)?;
    let mut work = Work { config, device, watch, inputs, model: None, special: Vec::new(), retriever: None };
    work.all()
}

impl Work<'_> {
    fn tell(&mut self, stage: &str, done: usize, total: usize, what: &str) -> Result<(), Halt> {
        match (self.watch)(&Progress { stage, done, total, what: what.into() }) {
            true => Ok(()),
            false => Err(Halt::Interrupted),
        }
    }

    /// What every answer and adapter depends on.
    fn basis(&self) -> Value {
        let quant = self.config.quant.map(|format| format.name());
        json!({ "model": self.inputs.hashes["model"], "quant": quant, "bf16": self.config.bf16,
            "device": self.device.id(), "instruction": self.config.instruction, "format": self.config.format,
            "version": env!("CARGO_PKG_VERSION") })
    }

    fn all(&mut self) -> Result<Outcome, Halt> {
        let (keys, retrieved) = self.retrieve()?;
        let variants = self.choose(&keys, &retrieved)?;
        let mut arms: Vec<(Arm, Vec<Answered>, Option<u64>)> = Vec::new();
        for arm in [Arm::Base, Arm::Rag] {
            arms.push(self.arm(arm, self.style(arm, &variants), None, &keys, &retrieved)?);
        }
        let share = if self.config.separate { 1.0 } else { self.config.context_share };
        let both = self.train("adapter", share, &keys, &retrieved)?;
        let bare = match self.config.separate {
            true => Some(self.train("adapter-bare", 0.0, &keys, &retrieved)?),
            false => None,
        };
        for arm in [Arm::Lora, Arm::LoraRag] {
            let (name, trained) = match &bare {
                Some(bare) if arm == Arm::Lora => ("adapter-bare", bare),
                _ => ("adapter", &both),
            };
            arms.push(self.arm(arm, self.style(arm, &variants), Some((name, trained)), &keys, &retrieved)?);
        }
        arms.sort_by_key(|arm| arm.0 as usize);
        let forgetting = self.forgetting(&both, bare.as_ref())?;
        self.tell("judging", 0, 0, "intervals and tests")?;
        self.judge(retrieved, variants, arms, &both, bare.as_ref(), forgetting)
    }

    /// What an arm's prompt shows: what was chosen on development questions; else all passages and no example, as an
    /// adapter was trained.
    fn style(&self, arm: Arm, variants: &[Variant]) -> Style {
        let passages = if arm.retrieves() { self.config.passages } else { 0 };
        let chosen = variants.iter().find(|v| v.arm == arm && v.chosen);
        chosen.map_or(Style { shots: 0, passages }, |v| v.style)
    }

    /// Opens the index, built where it is not there.
    fn open_retriever(&mut self) -> Result<&Retriever, Halt> {
        if self.retriever.is_none() {
            let embedder = Embedder::open(&self.config.embed_model, self.device.clone(), &LoadOptions::default())?;
            let watch = &mut self.watch;
            let tell = &mut |done: usize, total: usize, chunks: usize| {
                watch(&Progress { stage: "indexing", done, total, what: format!("bytes, {chunks} passages") })
            };
            let hashes = &self.inputs.hashes;
            // Documents alone decide what the index holds.
            let key = stages::key(&json!({ "docs": hashes["docs"], "embed_model": hashes["embed_model"] }));
            self.retriever = Some(Retriever::open(self.config, embedder, self.device.clone(), &key, tell)?);
        }
        self.retriever.as_ref().ok_or(Halt::Interrupted)
    }

    /// Passages for questions, development questions and training rows.
    fn retrieve(&mut self) -> Result<(Keys, Retrieved), Halt> {
        let (hashes, config) = (&self.inputs.hashes, self.config);
        let passages = stages::key(&json!({ "docs": hashes["docs"], "embed_model": hashes["embed_model"],
            "k": config.passages, "device": self.device.id() }));
        let rows = stages::key(&json!({ "passages": passages, "train": hashes["train"],
            "dev": hashes["dev"], "dev_questions": config.dev_questions, "shots": config.shots,
            "rows": self.inputs.order.len(), "seed": config.seed }));
        let key = stages::key(&json!({ "rows": rows, "questions": hashes["questions"], "limit": config.limit }));
        let keys = Keys { passages, rows };
        if let Some(found) = stages::load(&self.config.out, "retrieved", &key) {
            return Ok((keys, found));
        }
        let k = config.passages;
        self.open_retriever()?;
        let retriever = self.retriever.as_ref().ok_or(Halt::Interrupted)?;
        let (inputs, watch) = (&self.inputs, &mut self.watch);
        let mut wanted = vec![false; inputs.train.len()];
        inputs.order.iter().chain(&inputs.shots).for_each(|&row| wanted[row] = true);
        let texts = |rows: &[&Question]| rows.iter().map(|q| q.question.clone()).collect::<Vec<_>>();
        let rows: Vec<usize> = (0..wanted.len()).filter(|&i| wanted[i]).collect();
        let total = inputs.questions.len() + inputs.dev.len() + rows.len();
        let mut done = 0;
        let mut tell = |count: usize| {
            done += count;
            match watch(&Progress { stage: "retrieving", done, total, what: "questions".into() }) {
                true => Ok(()),
                false => Err(Halt::Interrupted),
            }
        };
        let mut found = Retrieved { built: retriever.built.clone(), ..Retrieved::default() };
        let (mut seconds, mut asked) = (0.0, 0);
        for (rows, into) in [(&inputs.questions, &mut found.questions), (&inputs.dev, &mut found.dev)] {
            for row in rows {
                // One at a time, as they come when someone waits for an answer.
                let start = Instant::now();
                let passages = match row.context.is_empty() {
                    true => retriever.passages(&[&row.question], k)?.pop().unwrap_or_default(),
                    false => Vec::new(),
                };
                if row.context.is_empty() {
                    seconds += start.elapsed().as_secs_f64();
                    asked += 1;
                }
                into.push(passages);
                tell(1)?;
            }
        }
        found.seconds = seconds / f64::from(asked.max(1));
        found.train = vec![Vec::new(); wanted.len()];
        for chunk in rows.chunks(32) {
            let asked = chunk.iter().filter_map(|&i| match &inputs.train[i] {
                TrainRow::Asked(question) if question.context.is_empty() => Some((i, &**question)),
                _ => None,
            });
            let (places, of): (Vec<usize>, Vec<&Question>) = asked.unzip();
            let texts = texts(&of);
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            if !texts.is_empty() {
                for (place, passages) in places.into_iter().zip(retriever.passages(&texts, k)?) {
                    found.train[place] = passages;
                }
            }
            tell(chunk.len())?;
        }
        let found = stages::save(&self.config.out, "retrieved", &key, &found)?;
        Ok((keys, found))
    }

    /// Opens the decoder, without an adapter.
    fn open_model(&mut self) -> Result<(), Halt> {
        if self.model.is_none() {
            self.tell("loading", 0, 0, &self.config.model.display().to_string())?;
            let options = LoadOptions { quant: self.config.quant, bf16: self.config.bf16, ..LoadOptions::default() };
            let model = LanguageModel::open(&self.config.model, self.device.clone(), &options)?;
            self.special = special_tokens(&model.tokenizer);
            self.model = Some(model);
        }
        Ok(())
    }

    fn prompts(
        &self,
        arm: Arm,
        style: Style,
        questions: &[Question],
        found: &[Vec<Passage>],
        retrieved: &Retrieved,
    ) -> Result<Vec<Prompt>, Halt> {
        let Some(model) = &self.model else { return Ok(Vec::new()) };
        let (form, config) = (&self.inputs.form, self.config);
        let texts = |found: &[Passage]| found.iter().take(style.passages).map(Passage::note).collect::<Vec<String>>();
        let mut shown = Vec::new();
        for &row in self.inputs.shots.iter().take(style.shots) {
            if let TrainRow::Asked(question) = &self.inputs.train[row] {
                let notes = if arm.retrieves() { texts(&retrieved.train[row]) } else { Vec::new() };
                let reply = form.expected(question).map_err(Error::Request)?;
                shown.push((&**question, notes, reply));
            }
        }
        let examples: Vec<Example> =
            shown.iter().map(|(question, notes, reply)| Example { question, notes, reply }).collect();
        let mut prompts = Vec::with_capacity(questions.len());
        for (question, passages) in questions.iter().zip(found) {
            let notes = match (question.context.is_empty(), arm.retrieves()) {
                (false, _) => question.context.clone(),
                (true, true) => texts(passages),
                (true, false) => Vec::new(),
            };
            let expected = form.expected(question).map_err(Error::Request)?;
            let instruction = config.instruction.as_deref();
            let max_tokens = config.max_tokens;
            prompts.push(arms::prompt(
                model,
                &self.special,
                question,
                &expected,
                &examples,
                &notes,
                instruction,
                max_tokens,
            )?);
        }
        Ok(prompts)
    }

    /// Tries prompts on the development questions: without and with examples, and for rag with one passage and with all.
    fn choose(&mut self, keys: &Keys, retrieved: &Retrieved) -> Result<Vec<Variant>, Halt> {
        let dev = self.inputs.dev.clone();
        let few = self.inputs.shots.len();
        let mut variants: Vec<Variant> = Vec::new();
        if dev.is_empty() || few == 0 {
            return Ok(variants);
        }
        // A small model may be lost in many passages, and copy what examples say.
        let all = self.config.passages;
        let widths = |arm: Arm| match arm {
            Arm::Base => vec![0],
            _ if all == 1 => vec![1],
            _ => vec![1, all],
        };
        let (mut done, total) = (0, 2 * (1 + widths(Arm::Rag).len()) * dev.len());
        for arm in [Arm::Base, Arm::Rag] {
            let first = variants.len();
            let styles = widths(arm).into_iter().flat_map(|passages| [0, few].map(|shots| Style { shots, passages }));
            for style in styles {
                let Style { shots, passages } = style;
                let name = format!("dev-{}-{shots}-{passages}", arm.key());
                let key = json!({ "basis": self.basis(), "rows": keys.rows, "shots": shots, "shown": passages,
                    "max_tokens": self.config.max_tokens });
                let mut records = Records::<Answered>::open(&self.config.out, &name, &stages::key(&key))?;
                if records.done.len() < dev.len() {
                    self.open_model()?;
                    let prompts = self.prompts(arm, style, &dev, &retrieved.dev, retrieved)?;
                    let model = self.model.as_ref().ok_or(Halt::Interrupted)?;
                    let watch = &mut self.watch;
                    let what = format!("questions, {}", style.name(arm));
                    arms::answer(model, &prompts, self.config.max_tokens, &mut records, &mut |count| {
                        let done = done + count;
                        watch(&Progress { stage: "choosing prompts", done, total, what: what.clone() })
                    })?;
                }
                done += dev.len();
                let scores = outcome::scores(&dev, &records.done, &self.inputs.form);
                let mean = |of: fn(&outcome::Score) -> f64| scores.iter().map(of).sum::<f64>() / scores.len() as f64;
                variants.push(Variant {
                    arm,
                    style,
                    f1: mean(|s| s.f1),
                    strict: mean(|s| s.strict),
                    present: mean(|s| s.answer_present),
                    chosen: false,
                });
            }
            // F1 of the answer part: right answers in any form count, in form they count more. Ties: the earlier.
            let better = |best: usize, i: usize| if variants[i].f1 > variants[best].f1 { i } else { best };
            let best = (first..variants.len()).reduce(better);
            if let Some(best) = best {
                variants[best].chosen = true;
            }
        }
        Ok(variants)
    }

    /// An arm's answers, and the most memory resident while it gave them.
    fn arm(
        &mut self,
        arm: Arm,
        style: Style,
        adapter: Option<(&str, &Trained)>,
        keys: &Keys,
        retrieved: &Retrieved,
    ) -> Result<(Arm, Vec<Answered>, Option<u64>), Halt> {
        let hashes = &self.inputs.hashes;
        let key = stages::key(&json!({ "basis": self.basis(), "questions": hashes["questions"],
            "limit": self.config.limit, "seed": self.config.seed, "shots": style.shots, "shown": style.passages,
            "examples": if style.shots > 0 { json!(keys.rows) } else { Value::Null },
            "retrieved": if arm.retrieves() { json!(keys.passages) } else { Value::Null },
            "max_tokens": self.config.max_tokens, "adapter": adapter.map(|(_, trained)| &trained.sha256) }));
        let name = format!("answers-{}", arm.key());
        let mut records = Records::<Answered>::open(&self.config.out, &name, &key)?;
        let peak_name = format!("peak-{}", arm.key());
        let total = self.inputs.questions.len();
        if records.done.len() >= total {
            return Ok((arm, records.done, stages::load(&self.config.out, &peak_name, &key).flatten()));
        }
        self.open_model()?;
        // What an arm needs is there while its memory is measured, and nothing else.
        if arm.retrieves() {
            self.open_retriever()?;
        } else {
            self.retriever = None;
        }
        if let (Some((name, _)), Some(model)) = (adapter, &mut self.model) {
            model.llama.attach(&Adapter::open(&self.config.out.join(name))?)?;
        }
        reset_peak();
        let questions = &self.inputs.questions;
        let prompts = self.prompts(arm, style, questions, &retrieved.questions, retrieved)?;
        let (model, watch) = (self.model.as_ref().ok_or(Halt::Interrupted)?, &mut self.watch);
        let answered = arms::answer(model, &prompts, self.config.max_tokens, &mut records, &mut |done| {
            watch(&Progress { stage: "answering", done, total, what: format!("questions, {}", arm.name()) })
        });
        if let Some(model) = &mut self.model {
            model.llama.detach();
        }
        answered?;
        let peak = peak_bytes();
        stages::save(&self.config.out, &peak_name, &key, &peak)?;
        Ok((arm, records.done, peak))
    }

    /// The adapter in `name`, trained with passages in this share of its rows.
    fn train(&mut self, name: &str, share: f64, keys: &Keys, retrieved: &Retrieved) -> Result<Trained, Halt> {
        let config = self.config;
        let key = stages::key(&json!({ "basis": self.basis(), "train": self.inputs.hashes["train"],
            "rows": keys.rows, "share": share, "recipe": config.recipe, "seed": config.seed }));
        if let Some(found) = training::found(config, name, &key) {
            return Ok(found);
        }
        self.open_model()?;
        self.retriever = None;
        let Some(model) = self.model.take() else { return Err(Halt::Interrupted) };
        let inputs = &self.inputs;
        let how = mix::How {
            share,
            instruction: config.instruction.as_deref(),
            chat: model.chat_template.is_some(),
            special: &self.special,
            seed: config.seed,
        };
        let rows = mix::lines(&inputs.train, &inputs.order, &retrieved.train, &inputs.form, &how)?;
        let base = inputs.hashes["model"].as_str().unwrap_or_default().to_string();
        let (watch, total) = (&mut self.watch, config.recipe.steps);
        let tell = &mut |done: usize, loss: f64| {
            watch(&Progress { stage: "training", done, total, what: format!("steps, loss {loss:.3}") })
        };
        let (model, trained) = training::train(config, model, &base, &rows, name, &key, tell)?;
        self.model = Some(model);
        Ok(trained)
    }

    /// Losses on the unrelated text, of the base and of each adapter.
    fn forgetting(&mut self, both: &Trained, bare: Option<&Trained>) -> Result<Forgetting, Halt> {
        let adapters: Vec<(&str, &Trained)> =
            [Some(("adapter", both)), bare.map(|bare| ("adapter-bare", bare))].into_iter().flatten().collect();
        let hashes: Vec<&String> = adapters.iter().map(|(_, trained)| &trained.sha256).collect();
        let key = stages::key(&json!({ "basis": self.basis(), "adapters": hashes,
            "text": self.inputs.hashes["retention"] }));
        let found: Retention = match stages::load(&self.config.out, "retention", &key) {
            Some(found) => found,
            None => {
                self.open_model()?;
                let total = 1 + adapters.len();
                self.tell("forgetting", 0, total, "passes over the unrelated text")?;
                let path = self.config.retention.clone().unwrap_or_default();
                let Some(model) = &mut self.model else { return Err(Halt::Interrupted) };
                let mut ids = model.tokenizer.encode(&self.inputs.retention)?;
                ids.truncate(RETENTION_TOKENS);
                if ids.len() < 2 * STRETCH {
                    let what = format!("has {} tokens; at least {} are needed", ids.len(), 2 * STRETCH);
                    return Err(Error::file(&path, what).into());
                }
                let base = losses(model, &ids)?;
                let mut adapted = Vec::new();
                for (name, _) in &adapters {
                    model.llama.attach(&Adapter::open(&self.config.out.join(name))?)?;
                    let found = losses(model, &ids);
                    model.llama.detach();
                    adapted.push(found?);
                }
                stages::save(&self.config.out, "retention", &key, &Retention { base, adapted })?
            }
        };
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let worst = found.adapted.iter().max_by(|a, b| mean(a).total_cmp(&mean(b))).cloned().unwrap_or_default();
        let differences: Vec<f64> = worst.iter().zip(&found.base).map(|(a, b)| a - b).collect();
        let stretches: Vec<usize> = (0..differences.len()).map(|i| i / STRETCH).collect();
        let text = self.config.retention.as_ref().map_or("bundled".into(), |path| path.display().to_string());
        Ok(Forgetting {
            text,
            tokens: differences.len(),
            base_nll: mean(&found.base),
            lora_nll: mean(&worst),
            delta: stats::bootstrap(&differences, &stretches, self.config.seed),
        })
    }

    fn judge(
        &mut self,
        retrieved: Retrieved,
        variants: Vec<Variant>,
        arms: Vec<(Arm, Vec<Answered>, Option<u64>)>,
        both: &Trained,
        bare: Option<&Trained>,
        forgetting: Forgetting,
    ) -> Result<Outcome, Halt> {
        let (config, inputs) = (self.config, &self.inputs);
        let (questions, seed) = (&inputs.questions, config.seed);
        let groups = outcome::groups(questions);
        let mut kinds: Vec<String> = Vec::new();
        for question in questions {
            if !kinds.contains(&question.kind) {
                kinds.push(question.kind.clone());
            }
        }
        let arms: Vec<ArmOutcome> = (arms.into_iter())
            .map(|(arm, answers, peak_bytes)| {
                let scores = outcome::scores(questions, &answers, &inputs.form);
                let kind = |kind: &String| outcome::summary(&scores, &groups, |i| questions[i].kind == *kind, seed);
                ArmOutcome {
                    arm,
                    style: self.style(arm, &variants),
                    all: outcome::summary(&scores, &groups, |_| true, seed),
                    kinds: kinds.iter().map(kind).collect(),
                    answers,
                    scores,
                    peak_bytes,
                    retrieve_s: if arm.retrieves() { retrieved.seconds } else { 0.0 },
                }
            })
            .collect();
        let pairs = outcome::pairs(&arms, &groups, seed);
        let hits = hits(questions, &retrieved.questions, config.passages);
        let trained = [Some(both), bare].into_iter().flatten();
        let costs = Costs {
            train_s: trained.clone().map(|t| t.seconds).sum(),
            steps: config.recipe.steps,
            train_tokens: trained.clone().map(|t| t.tokens).sum(),
            train_peak_bytes: trained.clone().filter_map(|t| t.peak_bytes).max(),
            parameters: both.parameters,
            index_s: retrieved.built.seconds,
            documents: retrieved.built.documents,
            chunks: retrieved.built.chunks,
            retrieve_s: retrieved.seconds,
            model_bytes: bytes(&config.model),
            adapter_bytes: trained.clone().map(|t| t.bytes).sum(),
            index_bytes: retrieved.built.bytes,
            embedder_bytes: bytes(&config.embed_model),
        };
        let (warnings, leaked) =
            warnings::warnings(config, inputs, &retrieved, &arms, &pairs, &hits, &forgetting, both);
        let kept = config.max_forgetting.is_none_or(|limit| forgetting.delta.mean <= limit);
        let facts = Facts { arms: &arms, pairs: &pairs, hits, forgetting: &forgetting, kept, costs: &costs, leaked };
        let recommendation = facts.recommend();
        Ok(Outcome {
            provenance: warnings::provenance(config, inputs, &*self.device, both),
            questions: questions.clone(),
            passages: retrieved.questions,
            kinds,
            arms,
            pairs,
            variants,
            dev: inputs.dev.len(),
            hits,
            forgetting,
            max_forgetting: config.max_forgetting,
            costs,
            losses: both.losses.clone(),
            warnings,
            recommendation,
        })
    }
}

/// -log p of every token of a text but the first of each window.
pub(crate) fn losses(model: &LanguageModel, ids: &[u32]) -> Result<Vec<f64>, Error> {
    let window = WINDOW.min(model.llama.config.max_positions);
    let mut all = Vec::with_capacity(ids.len());
    for window in ids.chunks(window).filter(|window| window.len() > 1) {
        all.extend(model.evaluate(window)?.logprobs.into_iter().map(|logprob| -f64::from(logprob)));
    }
    Ok(all)
}

/// How often the passages hold the answer, among questions that retrieve.
fn hits(questions: &[Question], found: &[Vec<Passage>], k: usize) -> HitRate {
    let retrieved = questions.iter().zip(found).filter(|(question, _)| question.context.is_empty());
    let (mut n, mut first, mut any) = (0, 0.0, 0.0);
    for (question, passages) in retrieved {
        let answers = question.answers();
        let holds: Vec<f64> = passages.iter().map(|passage| metrics::present(&passage.text, &answers)).collect();
        n += 1;
        first += holds.first().copied().unwrap_or(0.0);
        any += holds.iter().copied().fold(0.0, f64::max);
    }
    let share = |sum: f64| sum / f64::from(n.max(1));
    HitRate { n: n as usize, k, at_1: share(first), at_k: share(any) }
}

/// Bytes of a file, or of the files in a directory.
fn bytes(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return fs::metadata(path).map_or(0, |meta| meta.len()) };
    entries.flatten().filter_map(|entry| fs::metadata(entry.path()).ok()).filter(|m| m.is_file()).map(|m| m.len()).sum()
}
