//! Whether a candidate is better than the champion where it must be, and no worse where it must not be.
//!
//! ```text
//! task       each held-out question, or row, is put to both; gain_i = candidate_i - champion_i
//!            (of losses the negative); passed where the 95 % interval of the mean gain lies above min_gain
//! retention  texts that have nothing to do with the task are read by both; rise_t = candidate_t - champion_t, nats
//!            a token; passed where the interval of its mean, drawn by stretches, lies below max_forgetting
//! ```
//!
//! What is uncertain speaks against the candidate in both. Without a champion the base model alone is the champion.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{json, Map, Value};

use super::aliases::Promotion;
use super::entries::{Entry, New, Source};
use super::{from_log, Kind, Registry};
use crate::compare::arms::{self, Answered};
use crate::compare::form::Form;
use crate::compare::questions::{self, Question};
use crate::compare::stages::{self, Records};
use crate::compare::stats::{self, Interval};
use crate::compare::work::{losses, RETENTION_TOKENS, STRETCH};
use crate::compare::{outcome, Halt, Progress, Watch, RETENTION};
use crate::device::Device;
use crate::error::{quote, Error};
use crate::model::adapter::{hex, model_sha256, sha256, Adapter};
use crate::model::checkpoint::Checkpoint;
use crate::model::generate::LanguageModel;
use crate::model::weights::LoadOptions;
use crate::quant::Format;
use crate::retrieve::prompt::special_tokens;
use crate::train::data::{self, DataOptions, Encoder, OverLong, MASKED};
use crate::train::run;

/// Fewer independent questions prove nothing: five that all got better come about by chance one time in sixteen.
const LEAST: usize = 6;

/// What is measured on the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Loss of the expected answer, nats a token: cheap and fine, as nothing is generated.
    Nll,
    /// The reply is the answer.
    ExactMatch,
    /// Words that reply and answer share.
    F1,
}

impl Metric {
    /// Its word.
    pub fn name(self) -> &'static str {
        ["nll", "exact_match", "f1"][self as usize]
    }

    /// What a mean of it is made of: more is better.
    fn gain(self, candidate: f64, champion: f64) -> f64 {
        if self == Metric::Nll {
            champion - candidate
        } else {
            candidate - champion
        }
    }
}

/// The task's held-out set.
#[derive(Clone, Debug)]
pub enum Task {
    /// Questions with answers, as `compare` takes them.
    Questions(PathBuf),
    /// Rows that `finetune` takes.
    Rows(PathBuf),
}

/// What a candidate must pass.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The model that both run beside.
    pub model: PathBuf,
    /// The held-out set.
    pub task: Task,
    /// What is measured on it; of rows always the loss.
    pub metric: Metric,
    /// Texts that have nothing to do with the task; none: the one that is bundled.
    pub retention: Vec<PathBuf>,
    /// What the gain must be above.
    pub min_gain: f64,
    /// What the rise of the loss on each text must be below, nats a token.
    pub max_forgetting: f64,
    /// Said before every question whose row has no instruction.
    pub instruction: Option<String>,
    /// Tokens of a reply at most.
    pub max_tokens: usize,
    /// Quantize the layers' weights first, as the adapter was trained over them.
    pub quant: Option<Format>,
    /// Round what meets the weights to bf16 where that is faster.
    pub bf16: bool,
    /// Seeds the draws of the intervals.
    pub seed: u64,
}

/// What a candidate came to.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// It passed.
    pub passed: bool,
    /// Why, or why not.
    pub reasons: Vec<String>,
    /// Figures of the task.
    pub task: Value,
    /// Figures of each text.
    pub retention: Value,
}

/// An adapter that is asked; none: the base model alone.
struct Side {
    name: &'static str,
    adapter: Option<Adapter>,
    sha256: Option<String>,
}

struct Judge<'a> {
    terms: &'a Terms,
    work: &'a Path,
    watch: Watch<'a>,
    model: LanguageModel,
    /// What all figures depend on.
    basis: Value,
}

/// Which alias a candidate is measured against, and which one it gets where it passes.
#[derive(Clone, Copy, Debug)]
pub struct Aliases<'a> {
    /// Such as `champion`.
    pub against: &'a str,
    /// Such as `champion`, or `candidate` where a person decides.
    pub passes_to: &'a str,
}

/// What became of a candidate.
pub struct Promoted {
    /// The figures.
    pub verdict: Verdict,
    /// The version it was measured against; none: the base model.
    pub champion: Option<i64>,
    /// The evaluation's entry.
    pub evaluation: Entry,
}

/// Judges a candidate, keeps the evaluation, and where it passed moves the alias with it, in one transaction.
pub fn promote(
    registry: &Registry,
    candidate: &Entry,
    aliases: Aliases,
    terms: &Terms,
    device: Arc<dyn Device>,
    watch: Watch,
) -> Result<Promoted, Halt> {
    let name = &candidate.name;
    let champion = registry.points_at(name, aliases.against)?;
    let before = registry.points_at(name, aliases.passes_to)?;
    let champion =
        champion.map(|version| registry.get(&format!("{name}@{version}"), Some(Kind::Adapter))).transpose()?;
    if let Some(champion) = champion.as_ref().filter(|champion| champion.identity == candidate.identity) {
        let (one, other) = (candidate.reference(), champion.reference());
        let what = format!("{one} and {name}@{}, which is {other}, are the same adapter", aliases.against);
        return Err(Error::Request(what).into());
    }
    let (file, role) = match &terms.task {
        Task::Questions(path) => (path, "questions"),
        Task::Rows(path) => (path, "eval_data"),
    };
    let task_sha256 = stages::file_sha256(file)?;
    let base_sha256 = model_sha256(&Checkpoint::open(&terms.model)?)?;
    let texts = texts(&terms.retention)?;
    let basis = json!({ "model": base_sha256, "task": task_sha256, "metric": terms.metric.name(),
        "instruction": terms.instruction, "max_tokens": terms.max_tokens, "bf16": terms.bf16,
        "quant": terms.quant.map(|format| format.name()), "device": device.id(),
        "version": env!("CARGO_PKG_VERSION") });
    let pair = json!({ "basis": basis, "candidate": candidate.identity,
        "champion": champion.as_ref().map(|champion| &champion.identity) });
    let work = registry.dir.join("gate").join(&stages::key(&pair)[..16]);
    let _lock = run::lock(&work)?;
    let open = |entry: &Entry| Adapter::open(&registry.path(entry)?);
    let sides = [
        Side { name: "candidate", adapter: Some(open(candidate)?), sha256: Some(candidate.identity.clone()) },
        Side {
            name: "champion",
            adapter: champion.as_ref().map(open).transpose()?,
            sha256: champion.as_ref().map(|champion| champion.identity.clone()),
        },
    ];
    let mut verdict = judge(terms, &texts, basis, sides, &work, device, watch)?;
    if let Some(leak) = leak(registry, candidate, terms, &task_sha256)? {
        verdict.passed = false;
        verdict.reasons.push(leak);
    }
    let version = |entry: &Entry| json!({ "version": entry.version, "sha256": entry.sha256 });
    let decision = decision(&verdict, aliases);
    let report = json!({ "decision": decision, "reasons": verdict.reasons, "name": name,
        "candidate": version(candidate),
        "champion": champion.as_ref().map(version), "task": verdict.task, "retention": verdict.retention,
        "model_sha256": base_sha256, "task_sha256": task_sha256, "seed": terms.seed });
    let text = format!("{report:#}\n");
    let own = format!("{name}-evaluation");
    let mut new = New::of(&own, Kind::Evaluation, Source::Bytes("evaluation.json", text.as_bytes()));
    new.parents.push(("candidate".into(), candidate.identity.clone()));
    new.parents.extend(champion.as_ref().map(|champion| ("champion".into(), champion.identity.clone())));
    new.parents.extend([("base".into(), base_sha256), (role.into(), task_sha256)]);
    new.parents.extend(texts.iter().map(|(_, text)| ("retention".into(), hex(&sha256(text.as_bytes())))));
    new.metadata =
        Map::from_iter([("decision".to_string(), json!(decision)), ("reasons".into(), json!(verdict.reasons))]);
    let promotion = Promotion { alias: aliases.passes_to, before, after: candidate };
    let evaluation = registry.decide(&new, verdict.passed.then_some(promotion))?;
    if let Err(error) = fs::remove_dir_all(&work) {
        log::info!("{} stays for the next collection: {error}", work.display());
    }
    Ok(Promoted { verdict, champion: champion.map(|champion| champion.version), evaluation })
}

/// Says which held-out questions the candidate was trained on, as far as the registry knows its rows.
fn leak(registry: &Registry, candidate: &Entry, terms: &Terms, task: &str) -> Result<Option<String>, Error> {
    let held = match &terms.task {
        Task::Questions(path) => questions::read_questions(path)?,
        Task::Rows(_) => Vec::new(),
    };
    for parent in candidate.parents.iter().filter(|parent| parent.role == "data") {
        for rows in
            registry.by_hash(&parent.sha256)?.iter().filter(|rows| rows.kind == Kind::Dataset && !rows.directory)
        {
            // Rows of other forms are no questions that could be asked here.
            let Ok(lines) = from_log::leaks(&registry.path(rows)?, &held) else { continue };
            if let Some(line) = lines.first() {
                let (count, of, rows) = (lines.len(), held.len(), rows.reference());
                return Ok(Some(format!(
                    "{count} of {of} questions, #{line} first, are in {rows}, which it was trained on"
                )));
            }
        }
    }
    // Rows that the registry does not have are known by their hash alone.
    let same = candidate.parents.iter().any(|parent| parent.role == "data" && parent.sha256 == task);
    Ok(same.then(|| "the held-out set is the file that it was trained on".into()))
}

/// The word for what became of a candidate.
pub fn decision(verdict: &Verdict, aliases: Aliases) -> &'static str {
    match (verdict.passed, aliases.passes_to == aliases.against) {
        (true, true) => "promoted",
        (true, false) => "passed",
        (false, _) => "refused",
    }
}

/// The retention texts and their names.
fn texts(paths: &[PathBuf]) -> Result<Vec<(String, String)>, Error> {
    if paths.is_empty() {
        return Ok(vec![("bundled".into(), RETENTION.into())]);
    }
    let read = |path: &PathBuf| {
        let text = fs::read(path).map_err(|cause| Error::io(path, cause))?;
        let text = String::from_utf8(text);
        let text = text.map_err(|_| Error::file(path, "is not UTF-8: convert it, such as with iconv"))?;
        Ok((path.display().to_string(), text))
    };
    paths.iter().map(read).collect()
}

fn judge(
    terms: &Terms,
    texts: &[(String, String)],
    basis: Value,
    [candidate, champion]: [Side; 2],
    work: &Path,
    device: Arc<dyn Device>,
    watch: Watch,
) -> Result<Verdict, Halt> {
    let state = work.join("state");
    fs::create_dir_all(&state).map_err(|cause| Error::io(&state, cause))?;
    watch(&Progress { stage: "loading", done: 0, total: 0, what: terms.model.display().to_string() });
    let checkpoint = Checkpoint::open(&terms.model)?;
    for adapter in [&candidate, &champion].into_iter().filter_map(|side| side.adapter.as_ref()) {
        adapter.check_base(&checkpoint)?;
    }
    let options = LoadOptions { quant: terms.quant, bf16: terms.bf16, ..LoadOptions::default() };
    let model = LanguageModel::open(&terms.model, device, &options)?;
    // A text that is too short is told before any question is put.
    texts.iter().try_for_each(|(name, text)| retention_ids(&model, name, text).map(drop))?;
    let mut judge = Judge { terms, work, watch, model, basis };
    let (scores, groups) = judge.task(&candidate, &champion)?;
    let [ours, theirs] = scores;
    let gains: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| terms.metric.gain(*a, *b)).collect();
    let gain = stats::bootstrap(&gains, &groups, terms.seed);
    let p = stats::permutation(&gains, &groups, terms.seed);
    let metric = terms.metric.name();
    let mut distinct = groups.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let (mut passed, mut reasons) = (true, Vec::new());
    let mut say = |ok: bool, what: String| {
        passed &= ok;
        reasons.push(what);
    };
    let shown = |i: Interval| format!("{:+.4} [{:+.4}, {:+.4}]", i.mean, i.low, i.high);
    if distinct.len() < LEAST {
        say(
            false,
            format!("{} independent questions are too few to tell: at least {LEAST} are needed", distinct.len()),
        );
    }
    if gains.iter().any(|gain| !gain.is_finite()) {
        say(false, format!("{metric} is no number for some question: an adapter is broken"));
    }
    let better = gain.low > terms.min_gain;
    let (than, limit) = (if better { "lies above" } else { "does not lie above" }, terms.min_gain);
    let (what, n) = (if matches!(terms.task, Task::Rows(_)) { "rows" } else { "questions" }, gains.len());
    let sides = format!("{metric} over {n} {what} is {:.4}, the champion's {:.4}", mean(&ours), mean(&theirs));
    say(better, format!("{sides}: the gain, {}, {than} {limit}", shown(gain)));
    let task = json!({ "metric": metric, "n": gains.len(), "groups": distinct.len(), "candidate": mean(&ours),
        "champion": mean(&theirs), "gain": gain, "p": p, "min_gain": limit });
    let mut figures = Vec::new();
    for (i, (name, text)) in texts.iter().enumerate() {
        let base = Side { name: "base", adapter: None, sha256: None };
        let [ours, theirs, bare] = [&candidate, &champion, &base].map(|side| judge.retention(side, i, name, text));
        let (ours, theirs, bare) = (ours?, theirs?, bare?);
        let rises: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
        let stretches: Vec<usize> = (0..rises.len()).map(|i| i / STRETCH).collect();
        let delta = stats::bootstrap(&rises, &stretches, terms.seed);
        let kept = delta.high < terms.max_forgetting && rises.iter().all(|rise| rise.is_finite());
        let than = if kept { "lies below" } else { "does not lie below" };
        let limit = terms.max_forgetting;
        let text = if terms.retention.is_empty() { "the bundled text".into() } else { quote(name) };
        let sides =
            format!("the loss on {text} is {:.4} nats a token, the champion's {:.4}", mean(&ours), mean(&theirs));
        say(kept, format!("{sides}: the rise, {}, {than} {limit}", shown(delta)));
        figures.push(json!({ "text": name, "tokens": rises.len(), "candidate_nll": mean(&ours),
            "champion_nll": mean(&theirs), "base_nll": mean(&bare), "delta": delta, "max_forgetting": limit,
            "kept": kept }));
    }
    Ok(Verdict { passed, reasons, task, retention: figures.into() })
}

impl Judge<'_> {
    fn key(&self, side: &Side, what: &Value) -> String {
        stages::key(&json!({ "basis": self.basis, "adapter": side.sha256, "what": what }))
    }

    fn attach(&mut self, side: &Side) -> Result<(), Error> {
        match &side.adapter {
            Some(adapter) => self.model.llama.attach(adapter),
            None => {
                self.model.llama.detach();
                Ok(())
            }
        }
    }

    /// A number for each question of both sides, and the questions' groups.
    fn task(&mut self, candidate: &Side, champion: &Side) -> Result<([Vec<f64>; 2], Vec<usize>), Halt> {
        match &self.terms.task {
            Task::Questions(path) => {
                let (questions, form) = (questions::read_questions(path)?, Form::default());
                for row in &questions {
                    form.expected(row).map_err(|what| Error::file(path, format!("#{} {what}", row.line)))?;
                }
                let scores = [candidate, champion].map(|side| self.answers(side, &questions, &form));
                let [ours, theirs] = scores;
                Ok(([ours?, theirs?], outcome::groups(&questions)))
            }
            Task::Rows(path) => {
                let bytes = fs::read(path).map_err(|cause| Error::io(path, cause))?;
                let encoder = Encoder::new(&self.model)?;
                let max_len = self.model.llama.config.max_positions;
                let options = DataOptions { max_len, over_long: OverLong::Truncate };
                let (rows, _) = data::read(path, &bytes, &encoder, &options)?;
                let [ours, theirs] = [candidate, champion].map(|side| self.rows(side, &rows));
                Ok(([ours?, theirs?], (0..rows.len()).collect()))
            }
        }
    }

    fn answers(&mut self, side: &Side, questions: &[Question], form: &Form) -> Result<Vec<f64>, Halt> {
        self.attach(side)?;
        let key = self.key(side, &json!("answers"));
        let mut records = Records::<Answered>::open(self.work, &format!("answers-{}", side.name), &key)?;
        let special = special_tokens(&self.model.tokenizer);
        // Of the loss no word is asked, but a token must be read before the answer is scored.
        let max_tokens = if self.terms.metric == Metric::Nll { 1 } else { self.terms.max_tokens };
        let said = self.terms.instruction.as_deref();
        let prompts: Result<Vec<_>, Error> = (questions.iter())
            .map(|question| {
                let expected = form.expected(question).map_err(Error::Request)?;
                let notes = &question.context;
                arms::prompt(&self.model, &special, question, &expected, &[], notes, said, max_tokens)
            })
            .collect();
        let (total, watch, what) = (questions.len(), &mut self.watch, format!("questions, {}", side.name));
        arms::answer(&self.model, &prompts?, max_tokens, &mut records, &mut |done| {
            watch(&Progress { stage: "answering", done, total, what: what.clone() })
        })?;
        let scores = outcome::scores(questions, &records.done, form);
        let number = |score: &outcome::Score| match self.terms.metric {
            Metric::Nll => score.answer_nll,
            Metric::ExactMatch => score.exact_match,
            Metric::F1 => score.f1,
        };
        Ok(scores.iter().map(number).collect())
    }

    /// The mean loss of each row's predicted tokens.
    fn rows(&mut self, side: &Side, rows: &[data::Row]) -> Result<Vec<f64>, Halt> {
        self.attach(side)?;
        let key = self.key(side, &json!("rows"));
        let mut records = Records::<f64>::open(self.work, &format!("rows-{}", side.name), &key)?;
        for row in &rows[records.done.len().min(rows.len())..] {
            let logprobs = self.model.evaluate(&row.ids)?.logprobs;
            let predicted = logprobs.iter().zip(&row.labels[1..]).filter(|(_, label)| **label != MASKED);
            let losses: Vec<f64> = predicted.map(|(logprob, _)| -f64::from(*logprob)).collect();
            records.push(mean(&losses))?;
            let what = format!("rows, {}", side.name);
            if !(self.watch)(&Progress { stage: "answering", done: records.done.len(), total: rows.len(), what }) {
                return Err(Halt::Interrupted);
            }
        }
        Ok(records.done)
    }

    /// The loss of each token of a text.
    fn retention(&mut self, side: &Side, number: usize, name: &str, text: &str) -> Result<Vec<f64>, Halt> {
        let key = self.key(side, &json!(hex(&sha256(text.as_bytes()))));
        let stage = format!("retention-{number}-{}", side.name);
        if let Some(found) = stages::load(self.work, &stage, &key) {
            return Ok(found);
        }
        let what = format!("{}, {}", quote(name), side.name);
        if !(self.watch)(&Progress { stage: "reading", done: 0, total: 0, what }) {
            return Err(Halt::Interrupted);
        }
        self.attach(side)?;
        let ids = retention_ids(&self.model, name, text)?;
        Ok(stages::save(self.work, &stage, &key, &losses(&self.model, &ids)?)?)
    }
}

/// The tokens of a retention text that are read, which must be enough for an interval.
fn retention_ids(model: &LanguageModel, name: &str, text: &str) -> Result<Vec<u32>, Error> {
    let mut ids = model.tokenizer.encode(text)?;
    ids.truncate(RETENTION_TOKENS);
    if ids.len() < 2 * STRETCH {
        let what = format!("has {} tokens; at least {} are needed: name a longer text", ids.len(), 2 * STRETCH);
        return Err(Error::file(Path::new(name), what));
    }
    Ok(ids)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
