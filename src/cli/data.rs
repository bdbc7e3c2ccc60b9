//! `handmill data`: training rows from what was served.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use handmill::registry::entries::{New, Source};
use handmill::registry::from_log::{self, Options};
use handmill::registry::Kind;
use serde_json::json;

use super::registry::create;
use super::{print_json, resolve, RegisterFlag, Usage};

/// Make training data
#[derive(Args)]
pub struct Data {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    FromLog(FromLog),
}

/// Make training rows of the log that `handmill serve` writes
///
/// Corrections stand in place of answers; answers that were rated negative, cut off, given by a shadow, asked twice or
/// nearly so, and questions of the held-out set are left out, as is text that could pass for another's turn. OUT is a
/// file of {"messages"} rows for finetune; beside it NAME.manifest.json says what was left out and why, and with
/// --holdout NAME.held-out.jsonl has the rows kept apart: the same ones each time. With --json: the manifest's keys
/// rows, held_out, left_out: {reason: count}, corrected, redactions, logs, sha256 .., and out.
#[derive(Args)]
struct FromLog {
    /// Logs, JSON Lines
    #[arg(value_name = "LOG", required = true)]
    logs: Vec<PathBuf>,
    /// The file to write
    #[arg(long, value_name = "FILE.jsonl")]
    out: PathBuf,
    /// Held-out questions, none of which is to be trained on
    #[arg(long, value_name = "FILE.jsonl")]
    questions: Option<PathBuf>,
    #[command(flatten)]
    choice: ChoiceFlags,
    /// Share of the questions whose rows are kept apart for evaluation
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    holdout: f64,
    /// Chooses which
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    register: RegisterFlag,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Which rows are taken.
#[derive(Args)]
pub struct ChoiceFlags {
    /// Take out of every text what matches
    #[arg(long, value_name = "REGEX", num_args = 1..)]
    redact: Vec<String>,
    /// Take only rows rated so high, or corrected [default: unrated ones too]
    #[arg(long, value_name = "RATING", allow_negative_numbers = true)]
    min_rating: Option<f64>,
    /// How much of their pairs of words two questions share that ask the same; 1 for all
    #[arg(long, value_name = "SHARE", default_value_t = 0.8)]
    near: f64,
}

impl ChoiceFlags {
    /// What the flags ask for.
    pub fn options(&self, questions: Option<PathBuf>, holdout: f64, seed: u64) -> Result<Options> {
        if !((0.0..1.0).contains(&holdout) && self.near > 0.0 && self.near <= 1.0) {
            return Err(Usage("--holdout is a share below 1, --near one above 0".into()).into());
        }
        if self.min_rating.is_some_and(|rating| !rating.is_finite()) {
            return Err(Usage("--min-rating is a number".into()).into());
        }
        let redact = from_log::patterns(&self.redact).map_err(|error| Usage(error.to_string()))?;
        Ok(Options { questions, holdout, seed, redact, min_rating: self.min_rating, near: self.near })
    }
}

impl Data {
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Command::FromLog(command) => command.run(),
        }
    }
}

impl FromLog {
    fn run(&self) -> Result<()> {
        self.register.check(&[("", Kind::Dataset), ("-held-out", Kind::Dataset)])?;
        let questions = self.questions.as_ref().map(|path| resolve(Kind::Dataset, path)).transpose()?;
        let options = self.choice.options(questions, self.holdout, self.seed)?;
        let made = from_log::make(&self.logs, &options)?;
        let (held_out, manifest) = made.save(&self.out)?;
        let mut object = json!(made.manifest);
        object["out"] = self.out.display().to_string().into();
        object["manifest"] = manifest.display().to_string().into();
        let apart = made.held_out_count > 0;
        if let Some(name) = self.register.name("") {
            let registry = create()?;
            let mut new = New::of(&name, Kind::Dataset, Source::Path(&self.out));
            new.metadata = made.manifest.clone();
            let logs = made.manifest.get("logs").and_then(|logs| logs.as_array()).into_iter().flatten();
            let hashes = logs.filter_map(|log| log["sha256"].as_str());
            new.parents = hashes.map(|hash| ("log".to_string(), hash.to_string())).collect();
            let (entry, _) = registry.add(&new)?;
            if apart {
                let name = format!("{name}-held-out");
                let mut held = New::of(&name, Kind::Dataset, Source::Path(&held_out));
                held.parents = new.parents.clone();
                registry.add(&held)?;
            }
            super::promote::merge(&mut object, entry.json());
        }
        if self.json {
            return print_json(&object);
        }
        let mut out = io::stdout();
        writeln!(out, "{}: rows {}", self.out.display(), made.count)?;
        if apart {
            writeln!(out, "{}: rows {}", held_out.display(), made.held_out_count)?;
        }
        for (why, count) in object["left_out"].as_object().into_iter().flatten() {
            writeln!(out, "left out: {why}, {count}")?;
        }
        Ok(())
    }
}
