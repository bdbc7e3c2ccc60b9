//! Served answers to a candidate, once: capture, validate, fine-tune, gate, alias. What is done is kept under the
//! hashes of what it was made from, so a run that was cut off goes on where it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::entries::{Entry, New, Source};
use super::gate::{self, Aliases, Terms};
use super::{from_log, names, Kind, Registry};
use crate::compare::questions;
use crate::compare::stages;
use crate::compare::training::{self, Trained};
use crate::compare::{mix, Config, Halt, Progress, Recipe, Watch};
use crate::device::Device;
use crate::error::Error;
use crate::model::adapter::{hex, model_sha256, sha256};
use crate::model::checkpoint::Checkpoint;
use crate::model::generate::LanguageModel;
use crate::model::weights::LoadOptions;
use crate::train::run;

/// The adapter's directory in OUT.
const ADAPTER: &str = "adapter";
/// The rows' file in OUT.
const DATA: &str = "data.jsonl";

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Cycle {
    /// The adapter's name; its rows are `NAME-data`, its evaluations `NAME-evaluation`.
    pub name: String,
    /// Logs of the server.
    pub logs: Vec<PathBuf>,
    /// Rows that are trained on beside those of the logs, as `finetune` takes them.
    pub data: Vec<PathBuf>,
    /// How rows are chosen.
    pub options: from_log::Options,
    /// Fewer rows than this are not trained on.
    pub least_rows: usize,
    /// How the adapter is trained.
    pub recipe: Recipe,
    /// What it must pass, and the model.
    pub terms: Terms,
    /// The alias it is measured against, and the one it gets.
    pub against: String,
    /// See `against`.
    pub passes_to: String,
    /// Where everything goes.
    pub out: PathBuf,
}

/// What it came to.
pub struct Done {
    /// What was read and left out.
    pub manifest: Map<String, Value>,
    /// The rows.
    pub data: Entry,
    /// Training.
    pub trained: Trained,
    /// The adapter, with its aliases.
    pub adapter: Entry,
    /// Its way through the gate.
    pub judged: Judged,
}

/// What the gate said.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Judged {
    /// `promoted`, `passed` or `refused`.
    pub decision: String,
    /// Why.
    pub reasons: Vec<String>,
    /// Figures of the task.
    pub task: Value,
    /// Figures of each text.
    pub retention: Value,
    /// The version it was measured against.
    pub champion: Option<i64>,
    /// The evaluation's entry.
    pub evaluation: Option<String>,
}

/// Runs a cycle, or what is left to do of it.
pub fn run(registry: &Registry, cycle: &Cycle, device: Arc<dyn Device>, watch: Watch) -> Result<Done, Halt> {
    names::check_name(&format!("{}-evaluation", cycle.name))?;
    let _lock = run::lock(&cycle.out)?;
    let state = cycle.out.join("state");
    fs::create_dir_all(&state).map_err(|cause| Error::io(&state, cause))?;
    if let gate::Task::Questions(path) = &cycle.terms.task {
        let held = questions::read_questions(path)?;
        for rows in &cycle.data {
            if let Some(line) = from_log::leaks(rows, &held)?.first() {
                let what = format!("asks #{line} of the held-out questions: take it out, or the gate proves nothing");
                return Err(Error::file(rows, what).into());
            }
        }
    }
    watch(&Progress { stage: "capturing", done: 0, total: 0, what: "reading the logs".into() });
    let manifest = capture(cycle)?;
    let rows = manifest.get("rows").and_then(Value::as_u64).unwrap_or(0) as usize;
    if rows < cycle.least_rows {
        let what = format!(
            "the logs hold {rows} rows to train on, and --least-rows asks for {}; {}",
            cycle.least_rows,
            from_log::left_out(&manifest)
        );
        return Err(Error::Request(what).into());
    }
    let own = format!("{}-data", cycle.name);
    let path = cycle.out.join(DATA);
    let mut new = New::of(&own, Kind::Dataset, Source::Path(&path));
    new.metadata = manifest.clone();
    for source in manifest.get("logs").and_then(Value::as_array).into_iter().flatten() {
        new.parents.extend(source["sha256"].as_str().map(|hash| ("log".to_string(), hash.to_string())));
    }
    let (data, _) = registry.add(&new)?;

    let base = model_sha256(&Checkpoint::open(&cycle.terms.model)?)?;
    let trained = train(cycle, &base, &data, device.clone(), &mut *watch)?;
    let adapter = cycle.out.join(ADAPTER);
    let mut new = New::of(&cycle.name, Kind::Adapter, Source::Path(&adapter));
    new.parents.push(("data".into(), data.identity.clone()));
    for path in &cycle.data {
        new.parents.push(("data".into(), stages::file_sha256(path)?));
    }
    let (adapter, _) = registry.add(&new)?;
    let judged = judge(registry, cycle, &base, &adapter, device, watch)?;
    let adapter = registry.get(&adapter.reference(), Some(Kind::Adapter))?;
    Ok(Done { manifest, data, trained, adapter, judged })
}

/// The rows of the logs, in OUT.
fn capture(cycle: &Cycle) -> Result<Map<String, Value>, Halt> {
    let options = &cycle.options;
    let hash = |path: &PathBuf| stages::file_sha256(path);
    let key = stages::key(&json!({
        "logs": cycle.logs.iter().map(hash).collect::<Result<Vec<_>, _>>()?,
        "questions": options.questions.as_ref().map(hash).transpose()?,
        "redact": options.redact.iter().map(|pattern| pattern.as_str()).collect::<Vec<_>>(),
        "rest": [json!(options.holdout), json!(options.seed), json!(options.min_rating), json!(options.near)],
        "version": env!("CARGO_PKG_VERSION"),
    }));
    let out = cycle.out.join(DATA);
    if let Some(found) = stages::load::<Map<String, Value>>(&cycle.out, "capture", &key) {
        let now = fs::read(&out).map(|bytes| hex(&sha256(&bytes))).ok();
        if found.get("sha256").and_then(Value::as_str) == now.as_deref() {
            return Ok(found);
        }
    }
    let made = from_log::make(&cycle.logs, options)?;
    made.save(&out)?;
    Ok(stages::save(&cycle.out, "capture", &key, &made.manifest)?)
}

/// The adapter, in OUT.
fn train(cycle: &Cycle, base: &str, data: &Entry, device: Arc<dyn Device>, watch: Watch) -> Result<Trained, Halt> {
    let (terms, recipe) = (&cycle.terms, &cycle.recipe);
    let mut lines = read_lines(&cycle.out.join(DATA))?;
    let mut hashes = vec![data.identity.clone()];
    for path in &cycle.data {
        lines.extend(read_lines(path)?);
        hashes.push(stages::file_sha256(path)?);
    }
    let key = stages::key(&json!({ "base": base, "quant": terms.quant.map(|format| format.name()), "bf16": terms.bf16,
        "device": device.id(), "data": hashes, "recipe": recipe, "seed": terms.seed,
        "version": env!("CARGO_PKG_VERSION") }));
    let config = config(cycle);
    if let Some(found) = training::found(&config, ADAPTER, &key) {
        return Ok(found);
    }
    watch(&Progress { stage: "loading", done: 0, total: 0, what: terms.model.display().to_string() });
    let options = LoadOptions { quant: terms.quant, bf16: terms.bf16, ..LoadOptions::default() };
    let model = LanguageModel::open(&terms.model, device, &options)?;
    let order = mix::order(lines.len(), recipe.steps * recipe.rows, terms.seed);
    let rows: String = order.iter().map(|&row| format!("{}\n", lines[row])).collect();
    let total = recipe.steps;
    let (_, trained) = training::train(&config, model, base, &rows, ADAPTER, &key, &mut |done, loss| {
        watch(&Progress { stage: "training", done, total, what: format!("steps, loss {loss:.3}") })
    })?;
    Ok(trained)
}

fn read_lines(path: &Path) -> Result<Vec<String>, Error> {
    let text = fs::read(path).map_err(|cause| Error::io(path, cause))?;
    let text = String::from_utf8(text);
    let text = text.map_err(|_| Error::file(path, "is not UTF-8: convert it, such as with iconv"))?;
    let lines = text.trim_start_matches('\u{feff}').lines().filter(|line| !line.trim().is_empty());
    Ok(lines.map(str::to_string).collect())
}

/// What training takes of a comparison's settings: where, what model, which recipe and seed.
fn config(cycle: &Cycle) -> Config {
    Config {
        model: cycle.terms.model.clone(),
        embed_model: PathBuf::new(),
        train: cycle.out.join(DATA),
        docs: Vec::new(),
        questions: PathBuf::new(),
        dev: None,
        out: cycle.out.clone(),
        instruction: None,
        format: None,
        format_regex: None,
        passages: 0,
        max_tokens: cycle.terms.max_tokens,
        shots: 0,
        dev_questions: 0,
        limit: None,
        context_share: 0.0,
        separate: false,
        recipe: cycle.recipe.clone(),
        quant: cycle.terms.quant,
        bf16: cycle.terms.bf16,
        retention: None,
        max_forgetting: None,
        seed: cycle.terms.seed,
    }
}

/// Sends the adapter through the gate, where the same has not been done already.
fn judge(
    registry: &Registry,
    cycle: &Cycle,
    base: &str,
    adapter: &Entry,
    device: Arc<dyn Device>,
    watch: Watch,
) -> Result<Judged, Halt> {
    let (terms, name) = (&cycle.terms, &cycle.name);
    let champion = registry.points_at(name, &cycle.against)?;
    let champion = champion.map(|version| registry.get(&format!("{name}@{version}"), None)).transpose()?;
    let aliases = Aliases { against: &cycle.against, passes_to: &cycle.passes_to };
    if champion.as_ref().is_some_and(|champion| champion.identity == adapter.identity) {
        return Ok(Judged {
            decision: "promoted".into(),
            reasons: vec![format!("it is {name}@{} already", aliases.against)],
            task: Value::Null,
            retention: json!([]),
            champion: Some(adapter.version),
            evaluation: None,
        });
    }
    let (gate::Task::Questions(file) | gate::Task::Rows(file)) = &terms.task;
    let texts = terms.retention.iter().map(|path| stages::file_sha256(path)).collect::<Result<Vec<_>, _>>()?;
    let key = stages::key(&json!({ "base": base, "adapter": adapter.identity,
        "champion": champion.map(|champion| champion.identity), "task": stages::file_sha256(file)?, "texts": texts,
        "metric": terms.metric.name(), "terms": [json!(terms.min_gain), json!(terms.max_forgetting),
        json!(terms.instruction), json!(terms.max_tokens), json!(terms.bf16), json!(terms.seed)],
        "quant": terms.quant.map(|format| format.name()), "device": device.id(), "passes_to": cycle.passes_to,
        "version": env!("CARGO_PKG_VERSION") }));
    if let Some(found) = stages::load(&cycle.out, "gate", &key) {
        return Ok(found);
    }
    let promoted = gate::promote(registry, adapter, aliases, terms, device, watch)?;
    let judged = Judged {
        decision: gate::decision(&promoted.verdict, aliases).into(),
        reasons: promoted.verdict.reasons,
        task: promoted.verdict.task,
        retention: promoted.verdict.retention,
        champion: promoted.champion,
        evaluation: Some(promoted.evaluation.reference()),
    };
    Ok(stages::save(&cycle.out, "gate", &key, &judged)?)
}
