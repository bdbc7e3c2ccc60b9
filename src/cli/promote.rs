//! `handmill promote` and `handmill rollback`: which version of an adapter is in use.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use handmill::error::quote;
use handmill::quant::Format;
use handmill::registry::entries::Entry;
use handmill::registry::gate::{self, Aliases, Metric, Task, Terms};
use handmill::registry::{names, Kind, Registry};
use serde_json::{json, Value};

use super::recipe::Quant;
use super::registry::open;
use super::stages::{halted, Stages};
use super::{print_json, resolve, stop_on_interrupt, ChecksFailed, Common, Usage};

/// Make a candidate the champion, if it is better where it must be and no worse where it must not be
///
/// Candidate and champion answer the same held-out set and read the same texts. The 95% interval of the gain must lie
/// above --min-gain, and that of the rise of the loss on each text below --max-forgetting: what is uncertain speaks
/// against the candidate. Without a champion the base model alone is measured against. The figures are kept as
/// NAME-evaluation, the alias moves in the same transaction. Exit code 1 where the candidate is refused. With --json:
/// decision (promoted, refused), reasons, task: {metric, n, candidate, champion, gain, p, ..}, retention: [{text,
/// candidate_nll, champion_nll, base_nll, delta, kept, ..}], evaluation, champion, and the keys of the candidate's
/// entry.
#[derive(Args)]
pub struct Promote {
    /// The adapter's name
    name: String,
    /// The version or alias that is to become the champion
    #[arg(long, value_name = "V|ALIAS", default_value = "candidate")]
    candidate: String,
    /// The alias that moves
    #[arg(long, value_name = "ALIAS", default_value = "champion")]
    champion: String,
    /// The model [default: the base that the registry knows of the candidate]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    gate: GateFlags,
    /// Quantize the layers' weights first, as the adapters were trained over them
    #[arg(long, value_enum, default_value = "none")]
    quant: Quant,
    #[command(flatten)]
    common: Common,
}

/// What a candidate must pass.
#[derive(Args)]
pub struct GateFlags {
    #[command(flatten)]
    task: TaskFlags,
    /// What is measured on the task: nll is of the expected answer and generates nothing
    /// [default: f1; of --eval-data nll]
    #[arg(long, value_enum)]
    metric: Option<MetricWord>,
    /// Texts that have nothing to do with the task [default: one that is bundled]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    retention: Vec<PathBuf>,
    /// What the interval of the gain must lie above
    #[arg(long, value_name = "GAIN", default_value_t = 0.0, allow_negative_numbers = true)]
    min_gain: f64,
    /// What the interval of the rise of the loss on each text must lie below, in nats a token
    #[arg(long, value_name = "NATS", default_value_t = 0.05, allow_negative_numbers = true)]
    max_forgetting: f64,
    /// Said before every question whose row has no instruction
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    /// Tokens of a reply at most
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Seeds the draws of the intervals, and what else is drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Round what meets the weights to bf16 where that is faster
    #[arg(long)]
    bf16: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct TaskFlags {
    /// Held-out questions with answers, as compare takes them
    #[arg(long, value_name = "FILE.jsonl")]
    questions: Option<PathBuf>,
    /// Held-out rows, as finetune takes them, instead
    #[arg(long, value_name = "FILE.jsonl")]
    eval_data: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum MetricWord {
    Nll,
    #[value(name = "exact_match", alias = "exact-match")]
    ExactMatch,
    F1,
}

impl GateFlags {
    /// The questions, where the task is of questions.
    pub fn questions(&self) -> Result<Option<PathBuf>> {
        self.task.questions.as_ref().map(|path| resolve(Kind::Dataset, path)).transpose()
    }

    /// What the flags ask for.
    pub fn terms(&self, model: PathBuf, quant: Option<Format>) -> Result<Terms> {
        let usage = |what: &str| Err(Usage(what.into()).into());
        if !self.min_gain.is_finite() || !self.max_forgetting.is_finite() {
            return usage("--min-gain and --max-forgetting are numbers");
        }
        let task = match (self.questions()?, &self.task.eval_data) {
            (Some(path), _) => Task::Questions(path),
            (None, Some(path)) => Task::Rows(resolve(Kind::Dataset, path)?),
            (None, None) => return usage("give --questions or --eval-data"),
        };
        let metric = match (&task, self.metric) {
            (_, Some(MetricWord::Nll)) | (Task::Rows(_), None) => Metric::Nll,
            (Task::Rows(_), Some(_)) => return usage("of --eval-data the loss is measured: --metric nll"),
            (_, Some(MetricWord::ExactMatch)) => Metric::ExactMatch,
            (_, Some(MetricWord::F1) | None) => Metric::F1,
        };
        let retention: Result<Vec<PathBuf>> = self.retention.iter().map(|path| resolve(Kind::Dataset, path)).collect();
        Ok(Terms {
            model,
            task,
            metric,
            retention: retention?,
            min_gain: self.min_gain,
            max_forgetting: self.max_forgetting,
            instruction: self.instruction.clone(),
            max_tokens: self.max_tokens as usize,
            quant,
            bf16: self.bf16,
            seed: self.seed,
        })
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

/// The model that an adapter was trained over, where the registry has it.
fn base_of(registry: &Registry, entry: &Entry) -> Result<PathBuf> {
    for parent in entry.parents.iter().filter(|parent| parent.role == "base") {
        let known = registry.by_hash(&parent.sha256)?;
        if let Some(model) = known.iter().find(|known| known.kind == Kind::Model) {
            return Ok(registry.path(model)?);
        }
    }
    Err(Usage(format!("the registry has no base of {}: give --model", entry.reference())).into())
}

impl Promote {
    pub fn run(&self) -> Result<()> {
        let registry = open()?;
        names::check_alias(&self.champion).map_err(|error| Usage(error.to_string()))?;
        let candidate = registry.get(&format!("{}@{}", self.name, self.candidate), Some(Kind::Adapter));
        let candidate = candidate.with_context(|| format!("--candidate {}", self.candidate))?;
        let model = match &self.model {
            Some(path) => resolve(Kind::Model, path)?,
            None => base_of(&registry, &candidate)?,
        };
        let terms = self.gate.terms(model, self.quant.format())?;
        let device = self.common.open_device()?;
        let stop = stop_on_interrupt()?;
        let mut stages = Stages::default();
        let aliases = Aliases { against: &self.champion, passes_to: &self.champion };
        let done = gate::promote(&registry, &candidate, aliases, &terms, device, &mut |progress| {
            stages.show(progress);
            !stop.load(Ordering::SeqCst)
        });
        stages.finish();
        let done = done.map_err(|halt| halted(halt, "stopped; what is done is kept: the same command goes on"))?;
        let candidate = registry.get(&candidate.reference(), None)?;
        let decision = gate::decision(&done.verdict, aliases);
        if self.common.json {
            let mut object = candidate.json();
            let report = json!({ "decision": decision, "reasons": done.verdict.reasons, "task": done.verdict.task,
                "retention": done.verdict.retention, "evaluation": done.evaluation.reference(),
                "champion": done.champion });
            merge(&mut object, report);
            print_json(&object)?;
        } else {
            tell(&candidate, decision, &done.verdict.reasons, done.champion, Some(&done.evaluation.reference()))?;
        }
        match done.verdict.passed {
            true => Ok(()),
            false => Err(ChecksFailed.into()),
        }
    }
}

/// Puts one object's keys into another.
pub fn merge(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

/// What became of a candidate, for people.
pub fn tell(
    candidate: &Entry,
    decision: &str,
    reasons: &[String],
    champion: Option<i64>,
    evaluation: Option<&str>,
) -> Result<()> {
    let mut out = io::stdout();
    let against = champion.map_or("the base model alone".into(), |version| format!("{}@{version}", candidate.name));
    writeln!(out, "{} against {against}, with 95 % intervals: {decision}", candidate.reference())?;
    for reason in reasons {
        writeln!(out, "  {reason}")?;
    }
    if let Some(evaluation) = evaluation {
        writeln!(out, "kept as {evaluation}")?;
    }
    if decision == "refused" {
        writeln!(out, "no alias has moved")?;
    }
    for alias in &candidate.aliases {
        writeln!(out, "{}@{alias} is version {}", candidate.name, candidate.version)?;
    }
    Ok(())
}

/// Put the champion alias back to the version it was before
///
/// Said again, to the one before that. An alias that was taken away comes back. With --json the entry that is now in
/// use, and from, the version that was, or null.
#[derive(Args)]
pub struct Rollback {
    /// The adapter's name
    name: String,
    /// The alias that moves
    #[arg(long, value_name = "ALIAS", default_value = "champion")]
    champion: String,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

impl Rollback {
    pub fn run(&self) -> Result<()> {
        names::check_name(&self.name).map_err(|error| Usage(error.to_string()))?;
        let (from, entry) = open()?.rollback(&self.name, &self.champion)?;
        if self.json {
            let mut object = entry.json();
            object["from"] = from.into();
            return print_json(&object);
        }
        let (alias, version) = (quote(&self.champion), entry.version);
        let after = from.map_or("it was taken away".into(), |from| from.to_string());
        Ok(writeln!(io::stdout(), "{}@{alias} is version {version} again, after {after}", entry.name)?)
    }
}
