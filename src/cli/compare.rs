//! `handmill compare`: fine-tune, retrieve, or both?

mod show;

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::Result;
use clap::Args;
use handmill::compare::stages::file_sha256;
use handmill::compare::{self, report, Config};
use handmill::registry::entries::Source;
use handmill::registry::record::Product;
use handmill::registry::Kind;
use serde_json::Value;

use super::recipe::{Quant, RecipeFlags};
use super::register::model_hash;
use super::registry::directory;
use super::stages::{halted, Stages};
use super::{
    note, print_json, resolve, stop_on_interrupt, ChecksFailed, Common, ModelFlag, Precision, RegisterFlag, Usage,
};

/// Fine-tune, retrieve, or both? Measured on your model, data and questions
///
/// Trains a LoRA adapter on --train, indexes --docs, and puts the held-out --questions to four arms: base, lora, rag,
/// lora_rag. Prints what it advises and a table with 95% intervals; OUT/report.html has the rest, OUT/compare.json the
/// numbers. Everything is kept in OUT: a run that was stopped, by Ctrl-C or a kill, goes on where it was, and a second
/// one does again only what has changed.
///
/// Questions, one JSON object a line: {"question","answer"} and, where wanted, "aliases": [..] other answers that
/// count; "kind", reported apart; "instruction", said before the question; "format", the reply's form over the row's
/// fields, such as "{answer} [{topic}]"; "context", shown in every arm in place of passages; "group", questions that
/// are not independent. Training rows may have the same keys, or be any row that finetune takes.
///
/// Base and RAG are asked with the best of some prompts, without and with examples, chosen on --dev or on training
/// rows kept apart. One adapter, trained with passages in part of its rows, serves lora and lora_rag.
///
/// With --json: recommendation, choice, reasons, would_change, warnings, arms: {base, lora, rag, lora_rag:
/// {exact_match, f1, answer_nll, tokens_per_s, prompt_tokens, peak_bytes, ..}}, pairs, retrieval, forgetting: {text,
/// base_nll, lora_nll, delta, ..}, train_s, index_s, costs, losses, provenance. Exit code 1 where --max-forgetting is
/// exceeded.
#[derive(Args)]
pub struct Compare {
    #[command(flatten)]
    model: ModelFlag,
    /// The embedder: a Hugging Face directory
    #[arg(long, value_name = "DIR")]
    embed_model: PathBuf,
    /// Training rows, JSON Lines
    #[arg(long, value_name = "FILE.jsonl")]
    train: PathBuf,
    /// Documents, and folders of them
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    docs: Vec<PathBuf>,
    /// Held-out questions, JSON Lines
    #[arg(long, value_name = "FILE.jsonl")]
    questions: PathBuf,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Questions to choose prompts on, JSON Lines [default: training rows kept apart]
    #[arg(long, value_name = "FILE.jsonl")]
    dev: Option<PathBuf>,
    /// So many of them at most; 0: base and RAG are asked without examples
    #[arg(long, value_name = "N", default_value_t = 16)]
    dev_questions: usize,
    /// Examples in the few-shot prompt; 0 tries none
    #[arg(long, value_name = "N", default_value_t = 4)]
    shots: usize,
    /// At most so many questions, evenly over their kinds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Said before every question whose row has no instruction
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    /// The replies' form over fields of the row, such as '{answer} [{topic}]'; goes before the rows' own
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,
    /// The replies' form as a regular expression over the whole reply; a group named answer is the answer
    #[arg(long, value_name = "REGEX")]
    format_regex: Option<String>,
    /// Passages shown with a question
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    passages: u32,
    /// Tokens of a reply at most
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Share of the training rows that retrieved passages are put to
    #[arg(long, value_name = "SHARE", default_value_t = 0.75)]
    context_share: f64,
    /// Train two adapters: lora's on bare rows, lora_rag's on rows with passages
    #[arg(long)]
    two_adapters: bool,
    #[command(flatten)]
    recipe: RecipeFlags,
    /// Quantize the layers' weights first, for every arm (QLoRA)
    #[arg(long, value_enum, default_value = "none")]
    quant: Quant,
    /// A text that has nothing to do with the task, to measure forgetting on [default: one that is bundled]
    #[arg(long, value_name = "FILE")]
    retention: Option<PathBuf>,
    /// The most its loss may rise, in nats a token; beyond it the exit code is 1
    #[arg(long, value_name = "NATS", allow_negative_numbers = true)]
    max_forgetting: Option<f64>,
    /// Seeds the adapter, the order of rows and every draw
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    register: RegisterFlag,
    #[command(flatten)]
    precision: Precision,
    #[command(flatten)]
    common: Common,
}

impl Compare {
    pub fn run(&self) -> Result<()> {
        self.register.check(&[("", Kind::Adapter), ("-evaluation", Kind::Evaluation)])?;
        let config = self.config()?;
        let device = self.common.open_device()?;
        let stop = stop_on_interrupt()?;
        let mut stages = Stages::default();
        let done = compare::work::run(&config, device, &mut |progress| {
            stages.show(progress);
            !stop.load(Ordering::SeqCst)
        });
        stages.finish();
        let kept = format!("stopped; what is done is kept in {}: the same command goes on", config.out.display());
        let outcome = done.map_err(|halt| halted(halt, &kept))?;
        report::write(&config.out, &outcome)?;
        self.record(&config, &outcome.json())?;
        match self.common.json {
            true => print_json(&outcome.json())?,
            false => show::table(&config.out, &outcome)?,
        }
        match outcome.kept() {
            true => Ok(()),
            false => {
                let (delta, limit) = (outcome.forgetting.delta.mean, self.max_forgetting.unwrap_or_default());
                note(&format!("forgetting: {delta:+.3} nats a token on the unrelated text; {limit} are allowed"));
                Err(ChecksFailed.into())
            }
        }
    }

    fn record(&self, config: &Config, report: &Value) -> Result<()> {
        if directory().is_none() {
            return Ok(());
        }
        let mut parents = model_hash(&config.model)?;
        parents.push(("data".into(), file_sha256(&config.train)?));
        let questions = ("questions".to_string(), file_sha256(&config.questions)?);
        let (adapter, figures) = (config.out.join("adapter"), format!("{report:#}\n"));
        let weights = ("adapter".to_string(), file_sha256(&adapter.join("adapter_model.safetensors"))?);
        let made = |end: &str, kind, source, parents: &[(String, String)]| {
            self.register.name(end).map(|name| Product { name, kind, source, parents: parents.to_vec() })
        };
        let evaluation = Source::Bytes("compare.json", figures.as_bytes());
        let products = vec![
            made("", Kind::Adapter, Source::Path(&adapter), &[]),
            made("-evaluation", Kind::Evaluation, evaluation, &[weights, questions]),
        ];
        self.register.leave("compare", report, &parents, products)
    }

    fn config(&self) -> Result<Config> {
        let usage = |what: &str| Err(Usage(what.into()).into());
        if !(0.0..=1.0).contains(&self.context_share) {
            return usage("--context-share is a share from 0 to 1");
        }
        if self.max_forgetting.is_some_and(|limit| limit.is_nan()) {
            return usage("--max-forgetting is a number of nats");
        }
        if self.format.is_some() && self.format_regex.is_some() {
            // The template may stand beside it: it says what is expected, the expression what is accepted.
            note("--format says what is expected, --format-regex what is accepted");
        }
        if self.out.is_file() {
            return usage("--out is a file: name a directory");
        }
        Ok(Config {
            model: self.model.path()?,
            embed_model: resolve(Kind::Model, &self.embed_model)?,
            train: resolve(Kind::Dataset, &self.train)?,
            docs: self.docs.clone(),
            questions: resolve(Kind::Dataset, &self.questions)?,
            dev: self.dev.as_ref().map(|path| resolve(Kind::Dataset, path)).transpose()?,
            out: self.out.clone(),
            instruction: self.instruction.clone(),
            format: self.format.clone(),
            format_regex: self.format_regex.clone(),
            passages: self.passages as usize,
            max_tokens: self.max_tokens as usize,
            shots: self.shots,
            dev_questions: self.dev_questions,
            limit: self.limit.map(|limit| limit as usize),
            context_share: self.context_share,
            separate: self.two_adapters,
            recipe: self.recipe.recipe()?,
            quant: self.quant.format(),
            bf16: self.precision.bf16,
            retention: self.retention.clone(),
            max_forgetting: self.max_forgetting,
            seed: self.seed,
        })
    }
}
