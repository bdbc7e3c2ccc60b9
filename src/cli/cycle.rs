//! `handmill cycle`: from served answers to a candidate.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::Result;
use clap::Args;
use handmill::registry::cycle::{self, Cycle as Work, Done};
use handmill::registry::{names, Kind};
use serde_json::{json, Value};

use super::data::ChoiceFlags;
use super::promote::{merge, tell, GateFlags};
use super::recipe::{Quant, RecipeFlags};
use super::registry::create;
use super::stages::{halted, Stages};
use super::{print_json, resolve, stop_on_interrupt, ChecksFailed, Common, ModelFlag, Usage};

/// Turn served answers into a candidate: rows, fine-tune, gate, alias
///
/// Reads the server's logs as `data from-log` does, trains an adapter, registers rows and adapter, and puts it through
/// the gate of `promote`. Where it passes it gets the alias candidate, or with --promote that of the champion; where
/// not, it stays without one and the exit code is 1. OUT keeps what is done: the same command goes on where it was cut
/// off, and does again only what has changed. With --json: decision (passed, promoted, refused), reasons, task,
/// retention, evaluation, data, train, and the keys of the adapter's entry.
#[derive(Args)]
pub struct Cycle {
    /// The adapter's name
    #[arg(long)]
    name: String,
    /// Logs of the server, JSON Lines
    #[arg(long, value_name = "LOG", required = true, num_args = 1..)]
    log: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelFlag,
    /// Rows to train on beside those of the logs, as finetune takes them
    #[arg(long, value_name = "FILE.jsonl", num_args = 1..)]
    data: Vec<PathBuf>,
    #[command(flatten)]
    gate: GateFlags,
    #[command(flatten)]
    choice: ChoiceFlags,
    /// Train on no fewer rows of the logs than these
    #[arg(long, value_name = "N", default_value_t = 1)]
    least_rows: usize,
    /// The alias that it is measured against
    #[arg(long, value_name = "ALIAS", default_value = "champion")]
    champion: String,
    /// The alias that it gets where it passes
    #[arg(long, value_name = "ALIAS", default_value = "candidate")]
    candidate: String,
    /// Where it passes, make it the champion
    #[arg(long)]
    promote: bool,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    recipe: RecipeFlags,
    /// Quantize the layers' weights first (QLoRA)
    #[arg(long, value_enum, default_value = "none")]
    quant: Quant,
    #[command(flatten)]
    common: Common,
}

impl Cycle {
    pub fn run(&self) -> Result<()> {
        for alias in [&self.champion, &self.candidate] {
            names::check_alias(alias).map_err(|error| Usage(error.to_string()))?;
        }
        names::check_name(&self.name).map_err(|error| Usage(error.to_string()))?;
        let (recipe, registry) = (self.recipe.recipe()?, create()?);
        let data: Result<Vec<PathBuf>> = self.data.iter().map(|path| resolve(Kind::Dataset, path)).collect();
        let work = Work {
            name: self.name.clone(),
            logs: self.log.clone(),
            data: data?,
            options: self.choice.options(self.gate.questions()?, 0.0, self.gate.seed())?,
            least_rows: self.least_rows.max(1),
            recipe,
            terms: self.gate.terms(self.model.path()?, self.quant.format())?,
            against: self.champion.clone(),
            passes_to: if self.promote { self.champion.clone() } else { self.candidate.clone() },
            out: self.out.clone(),
        };
        let device = self.common.open_device()?;
        let stop = stop_on_interrupt()?;
        let mut stages = Stages::default();
        let done = cycle::run(&registry, &work, device, &mut |progress| {
            stages.show(progress);
            !stop.load(Ordering::SeqCst)
        });
        stages.finish();
        let words = format!("stopped; what is done is kept in {}: the same command goes on", self.out.display());
        let done = done.map_err(|halt| halted(halt, &words))?;
        match self.common.json {
            true => print_json(&report(&done))?,
            false => show(&done)?,
        }
        match done.judged.decision.as_str() {
            "refused" => Err(ChecksFailed.into()),
            _ => Ok(()),
        }
    }
}

fn report(done: &Done) -> Value {
    let mut object = done.adapter.json();
    let mut data = done.data.json();
    merge(&mut data, json!(done.manifest));
    let trained = &done.trained;
    merge(
        &mut object,
        json!({
            "decision": done.judged.decision,
            "reasons": done.judged.reasons,
            "task": done.judged.task,
            "retention": done.judged.retention,
            "evaluation": done.judged.evaluation,
            "champion": done.judged.champion,
            "data": data,
            "train": { "seconds": trained.seconds, "steps": trained.losses.len(), "loss_first": trained.losses.first(),
                "loss_last": trained.losses.last(), "tokens": trained.tokens, "parameters": trained.parameters,
                "peak_bytes": trained.peak_bytes },
        }),
    );
    object
}

fn show(done: &Done) -> Result<()> {
    let mut out = io::stdout();
    let left = done.manifest.get("left_out").and_then(Value::as_object).into_iter().flatten();
    let left: Vec<String> = left.map(|(why, count)| format!("{why} {count}")).collect();
    let left = if left.is_empty() { "nothing".into() } else { left.join(", ") };
    writeln!(out, "{}: rows {}; left out: {left}", done.data.reference(), done.manifest["rows"])?;
    let (losses, seconds) = (&done.trained.losses, done.trained.seconds);
    let loss = |loss: Option<&f64>| loss.map_or("-".into(), |loss| format!("{loss:.3}"));
    let (first, last) = (loss(losses.first()), loss(losses.last()));
    writeln!(out, "{}: {} steps in {seconds:.1} s, loss {first} -> {last}", done.adapter.reference(), losses.len())?;
    let judged = &done.judged;
    tell(&done.adapter, &judged.decision, &judged.reasons, judged.champion, judged.evaluation.as_deref())
}
