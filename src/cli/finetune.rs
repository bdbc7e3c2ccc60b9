//! `handmill finetune`: a LoRA adapter from examples.

mod show;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use handmill::device::profile::Profiled;
use handmill::device::Device;
use handmill::model::adapter::{self, Adapter, LoraConfig, TARGETS};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::LanguageModel;
use handmill::model::weights::LoadOptions;
use handmill::registry::entries::Source;
use handmill::registry::record::{self, Product};
use handmill::registry::Kind;
use handmill::train::begin::{begin, Tuning};
use handmill::train::checkpoint;
use handmill::train::data::{self, DataOptions, Encoder, OverLong};
use handmill::train::optimizer::Schedule;
use handmill::train::parameters;
use handmill::train::prepared::TokenSet;
use handmill::train::run::{self, Ending};
use handmill::train::step::Plan;
use serde_json::{json, Map, Value};

use self::show::{show_profile, Display};
use super::recipe::Quant;
use super::registry::directory;
use super::{
    note, read_text, resolve, spinner, stop_on_interrupt, BaseFlag, Common, Interrupted, ModelFlag, Precision,
    RegisterFlag, Usage,
};

/// Train a LoRA adapter on examples, over a model's weights as they are or quantized (QLoRA)
///
/// Data lines, each a JSON object: {"text"}, {"prompt","completion"}, {"messages":[{"role","content"}]},
/// {"instruction","input","output"} or {"input_ids","labels"}; loss on completions and assistants' turns. Every
/// faulty row is told before the first step. OUT becomes a PEFT directory with metrics.jsonl, loss.svg, run.json and
/// a checkpoint. With --json: out, status, steps, loss_first, loss_last, eval_loss_before, eval_loss_best, best_step,
/// seconds, peak_bytes, adapter_sha256; with --dry-run the plan instead. Ctrl-C saves and ends with exit code 130;
/// --resume goes on.
#[derive(Args)]
pub struct Finetune {
    #[command(flatten)]
    model: ModelFlag,
    /// Training examples, JSON Lines
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Start from this adapter, a PEFT directory; it brings r, alpha, rsLoRA and targets
    #[arg(long, value_name = "DIR")]
    adapter_init: Option<PathBuf>,
    #[command(flatten)]
    base: BaseFlag,
    /// Rank [default: 8]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=1024))]
    r: Option<u32>,
    /// Strength: the adapter is scaled by alpha/r [default: 16]
    #[arg(long, value_name = "ALPHA")]
    alpha: Option<f64>,
    /// Scale by alpha/sqrt(r) instead
    #[arg(long)]
    rslora: bool,
    /// Projections to train [default: all seven]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    targets: Option<Vec<String>>,
    /// Share of the adapter's inputs zeroed at random
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// Quantize the layers' weights first
    #[arg(long, value_enum, default_value = "none")]
    quant: Quant,
    /// Store the scales of nf4 in 8 bits too
    #[arg(long)]
    double_quant: bool,
    /// Steps [default: once through the data]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Largest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 1e-3)]
    lr: f64,
    /// How it changes after the warm-up: constant, linear, cosine
    #[arg(long, value_name = "NAME", default_value = "constant")]
    schedule: Schedule,
    /// Steps it rises for
    #[arg(long, value_name = "N", default_value_t = 0)]
    warmup: usize,
    /// AdamW's decay of the weights
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    weight_decay: f64,
    /// Largest norm of the gradient; 0 for none
    #[arg(long, value_name = "NORM", default_value_t = 0.0)]
    grad_clip: f64,
    /// Rows of a batch
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Batches of a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    accumulate: u32,
    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    max_len: u32,
    /// What becomes of longer rows
    #[arg(long, value_enum, default_value = "truncate")]
    over_long: OverLongFlag,
    /// Put short rows together into rows of up to max-len tokens; they do not see each other
    #[arg(long)]
    pack: bool,
    /// Take rows in order
    #[arg(long)]
    no_shuffle: bool,
    /// Seeds the adapter, the order of rows and dropout
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Held-out examples, JSON Lines: the result is the adapter with the least loss on them
    #[arg(long, value_name = "FILE.jsonl")]
    eval_data: Option<PathBuf>,
    /// Steps between evaluations [default: a fifth of all]
    #[arg(long, value_name = "N", requires = "eval_data", value_parser = clap::value_parser!(u32).range(1..))]
    eval_every: Option<u32>,
    /// End after so many evaluations without a lesser loss
    #[arg(long, value_name = "N", requires = "eval_data", value_parser = clap::value_parser!(u32).range(1..))]
    patience: Option<u32>,
    /// Train even where held-out rows are among the training rows
    #[arg(long, requires = "eval_data")]
    allow_leaks: bool,
    /// Steps between checkpoints
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    save_every: u32,
    /// Go on from the last checkpoint in OUT, if there is one
    #[arg(long, conflicts_with = "restart")]
    resume: bool,
    /// Start anew where OUT holds a run that did not come to its end
    #[arg(long)]
    restart: bool,
    /// Memory for activations kept from the forward to the backward pass; those of further layers are computed twice
    #[arg(long, value_name = "MIB", default_value_t = 288)]
    keep_activations: usize,
    /// Check everything, show the plan and the first example, and train nothing
    #[arg(long)]
    dry_run: bool,
    /// Show how long each kernel took
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    register: RegisterFlag,
    #[command(flatten)]
    precision: Precision,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, ValueEnum)]
enum OverLongFlag {
    Truncate,
    Refuse,
}

/// A run's inputs, all checked.
struct Job {
    model: LanguageModel,
    base_sha256: String,
    train: TokenSet,
    held_out: Option<TokenSet>,
    adapter: Adapter,
    plan: Plan,
    options: run::Options,
}

impl Finetune {
    pub fn run(&self) -> Result<()> {
        self.check_flags()?;
        self.register.check(&[("", Kind::Adapter)])?;
        let _lock = if self.dry_run { None } else { Some(run::lock(&self.out)?) };
        let device = self.common.open_device()?;
        let profiled = self.profile.then(|| Arc::new(Profiled::new(device.clone())));
        let device = profiled.clone().map_or(device, |profiled| profiled as Arc<dyn Device>);
        let job = self.prepare(&device)?;
        if self.dry_run {
            return self.show_plan(&job);
        }
        let found = if self.resume { checkpoint::find(&self.out)? } else { None };
        let replaced = match &found {
            Some(found) => {
                run::check_settings(&found.state.settings, &job.options.settings, &self.out).map(|()| false)?
            }
            None if self.resume => {
                note(&format!("{} holds no checkpoint: starting from the beginning", self.out.display()));
                run::clear(&self.out, true)?
            }
            None => run::clear(&self.out, self.restart)?,
        };
        if replaced {
            note(&format!("{} held a finished run: this one takes its place", self.out.display()));
        }
        let Job { model, train, held_out, adapter, plan, options, .. } = job;
        let tuning = Tuning {
            dropout: self.dropout,
            seed: self.seed,
            weight_decay: self.weight_decay,
            grad_clip: self.grad_clip,
        };
        let (mut trainer, state) = begin(model.llama, &adapter, found.as_ref(), &plan, tuning, &options.settings)?;
        if found.is_some() {
            note(&format!("going on after step {} of {}", state.step, options.steps));
        }
        if let Some(profiled) = &profiled {
            profiled.take(); // loading is not training
        }

        let stop = stop_on_interrupt()?;
        let begun = state.step;
        let mut display = Display::new(options.steps, state.step, held_out.as_ref().map_or(0, TokenSet::len));
        let outcome = run::run(&options, &mut trainer, &train, held_out.as_ref(), &self.out, state, &mut |event| {
            display.show(event);
            !stop.load(Ordering::SeqCst)
        })?;
        display.bar.finish_and_clear();
        if let Some(profiled) = &profiled {
            show_profile(profiled, outcome.steps - begun)?;
        }
        self.report(&outcome)?;
        match outcome.ending {
            Ending::Interrupted => Err(Interrupted.into()),
            _ => self.record(),
        }
    }

    /// Records the run, and the adapter where it is given a name, with what run.json says it was made from.
    fn record(&self) -> Result<()> {
        if directory().is_none() {
            return Ok(());
        }
        let report: Value = serde_json::from_str(&read_text(&self.out.join("run.json"))?)?;
        let keys = [("base_sha256", "base"), ("data_sha256", "data"), ("adapter_init_sha256", "init")];
        let parents = report.as_object().map(|report| record::parents(report, &keys)).unwrap_or_default();
        let (kind, source) = (Kind::Adapter, Source::Path(&self.out));
        let product = |name| Product { name, kind, source, parents: Vec::new() };
        self.register.leave("finetune", &report, &parents, vec![self.register.name("").map(product)])
    }

    /// The format's word: `--quant nf4 --double-quant` is `--quant nf4dq`.
    fn quant(&self) -> Quant {
        match (self.quant, self.double_quant) {
            (Quant::Nf4, true) => Quant::Nf4dq,
            (quant, _) => quant,
        }
    }

    fn check_flags(&self) -> Result<()> {
        let usage = |what: &str| Err(Usage(what.into()).into());
        if self.double_quant && self.quant() != Quant::Nf4dq {
            return usage("--double-quant goes with --quant nf4");
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return usage("--lr is a number above 0");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return usage("--dropout is a share of at least 0 and below 1");
        }
        if !(self.grad_clip.is_finite() && self.grad_clip >= 0.0) {
            return usage("--grad-clip is a norm, or 0 for none");
        }
        if !(0.0..1.0).contains(&self.weight_decay) {
            return usage("--weight-decay is a share of at least 0 and below 1");
        }
        if self.alpha.is_some_and(|alpha| !(alpha.is_finite() && alpha > 0.0)) {
            return usage("--alpha is a number above 0");
        }
        Ok(())
    }

    /// Opens and checks everything.
    fn prepare(&self, device: &Arc<dyn Device>) -> Result<Job> {
        let path = &self.model.path()?;
        let given = self.adapter_init.as_ref().map(|path| resolve(Kind::Adapter, path)).transpose()?;
        let init = given.as_ref().map(|path| Adapter::open(path)).transpose()?;
        if let (Some(place), Some(init)) = (&given, &init) {
            self.base.check(init, path).with_context(|| place.display().to_string())?;
        }
        let loading = spinner(format!("loading {}", path.display()));
        let base_sha256 = adapter::model_sha256(&Checkpoint::open(path)?)?;
        let options = LoadOptions { quant: self.quant().format(), bf16: self.precision.bf16, ..LoadOptions::default() };
        let model = LanguageModel::open(path, device.clone(), &options)
            .context("cannot open the model (a .gguf file or a Hugging Face directory)")?;
        loading.finish_and_clear();

        let preparing = spinner(format!("preparing {}", self.data.display()));
        let encoder = Encoder::new(&model)?;
        let max_len = (self.max_len as usize).min(model.llama.config.max_positions);
        let over_long = match self.over_long {
            OverLongFlag::Truncate => OverLong::Truncate,
            OverLongFlag::Refuse => OverLong::Refuse,
        };
        let options = DataOptions { max_len, over_long };
        let open = |data: &Path, name: &str| {
            let cache = (!self.dry_run).then(|| self.out.join(name));
            TokenSet::open(data, &encoder, &base_sha256, &options, cache.as_deref())
        };
        // The faults of both files at once.
        let data = resolve(Kind::Dataset, &self.data)?;
        let eval_data = self.eval_data.as_ref().map(|path| resolve(Kind::Dataset, path)).transpose()?;
        let train = open(&data, "train.tokens");
        let held_out = eval_data.as_ref().map(|data| open(data, "eval.tokens")).transpose();
        let (train, held_out) = match (train, held_out) {
            (Err(one), Err(other)) => anyhow::bail!("{one}\n{other}"),
            (train, held_out) => (train?, held_out?),
        };
        preparing.finish_and_clear();
        self.tell_notes(&self.data, &train);
        if let (Some(path), Some(set)) = (&self.eval_data, &held_out) {
            self.tell_notes(path, set);
            self.check_leaks(path, &train, set)?;
        }

        let adapter = self.adapter(&model, init)?;
        adapter.check(&model.llama.config)?;
        let rows = self.batch as usize * self.accumulate as usize;
        let groups = train.groups(self.pack, max_len);
        let tokens_of = |group: &Vec<u32>| group.iter().map(|&row| train.row(row as usize).0.len()).sum();
        let widest: usize = groups.iter().map(tokens_of).max().unwrap_or(0);
        let held = held_out.as_ref().map_or(0, |set| set.statistics().longest);
        let plan = Plan::new(
            &model.llama,
            adapter.config.r,
            adapter.parameters(),
            rows,
            widest.max(held),
            self.dropout > 0.0,
            self.keep_activations << 20,
        );
        let steps = self.steps.map_or(groups.len().div_ceil(rows), |steps| steps as usize);
        let settings = self.settings(&adapter, &base_sha256, &train, steps, max_len)?;
        let about = self.about(device, &model, &train, held_out.as_ref(), &plan, &adapter);
        let options = run::Options {
            steps,
            lr: self.lr,
            schedule: self.schedule,
            warmup: self.warmup,
            rows,
            pack: self.pack.then_some(max_len),
            shuffle: (!self.no_shuffle).then_some(self.seed),
            eval_every: self.eval_every.map_or(steps.div_ceil(5), |every| every as usize),
            patience: self.patience.map(|patience| patience as usize),
            save_every: self.save_every as usize,
            base_sha256: base_sha256.clone(),
            settings,
            about,
        };
        Ok(Job { model, base_sha256, train, held_out, adapter, plan, options })
    }

    /// The adapter to begin with: the one given, or a fresh one.
    fn adapter(&self, model: &LanguageModel, init: Option<Adapter>) -> Result<Adapter> {
        let all: Vec<String> = TARGETS.iter().map(|target| target.0.to_string()).collect();
        let words = self.targets.as_ref().unwrap_or(&all);
        let targets = adapter::parse_targets(&words.iter().map(|word| word.trim()).collect::<Vec<_>>())
            .map_err(|error| Usage(error.to_string()))?;
        if let Some(mut init) = init {
            let config = &init.config;
            let differs = self.r.is_some_and(|r| r as usize != config.r)
                || self.alpha.is_some_and(|alpha| alpha != config.alpha)
                || self.rslora && !config.rslora
                || self.targets.is_some() && targets != config.targets;
            if differs {
                let what = "--r, --alpha, --rslora and --targets come from --adapter-init's own config: leave them out";
                return Err(Usage(what.into()).into());
            }
            init.config.dropout = self.dropout;
            return Ok(init);
        }
        let name = self.model.path()?.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_os_string()));
        let config = LoraConfig {
            r: self.r.unwrap_or(8) as usize,
            alpha: self.alpha.unwrap_or(16.0),
            rslora: self.rslora,
            dropout: self.dropout,
            targets,
            base: name.map(|name| name.to_string_lossy().into_owned()),
        };
        Ok(parameters::fresh(&model.llama.config, config, self.seed))
    }

    /// Everything that the adapter's bytes depend on.
    fn settings(
        &self,
        adapter: &Adapter,
        base_sha256: &str,
        train: &TokenSet,
        steps: usize,
        max_len: usize,
    ) -> Result<Map<String, Value>> {
        let word = |flag: &dyn ValueName| flag.name();
        let double = self.quant() == Quant::Nf4dq;
        let init = self.adapter_init.as_ref().map(|_| adapter::hex(&adapter::sha256(&adapter.files()[0].1)));
        let settings = json!({
            "seed": self.seed,
            "base_sha256": base_sha256,
            "data_sha256": train.data_sha256,
            "prepared_sha256": train.sha256,
            "r": adapter.config.r,
            "alpha": adapter.config.alpha,
            "rslora": adapter.config.rslora,
            "targets": adapter.config.targets,
            "dropout": self.dropout,
            "adapter_init_sha256": init,
            "quant": word(&if double { Quant::Nf4 } else { self.quant }),
            "double_quant": double,
            "steps": steps,
            "lr": self.lr,
            "schedule": self.schedule.name(),
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
            "grad_clip": self.grad_clip,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "max_len": max_len,
            "pack": self.pack,
            "shuffle": !self.no_shuffle,
        });
        Ok(settings.as_object().cloned().unwrap_or_default())
    }

    /// What else run.json tells.
    fn about(
        &self,
        device: &Arc<dyn Device>,
        model: &LanguageModel,
        train: &TokenSet,
        held_out: Option<&TokenSet>,
        plan: &Plan,
        adapter: &Adapter,
    ) -> Map<String, Value> {
        let set = |path: &Path, set: &TokenSet| {
            let s = set.statistics();
            json!({ "file": path.display().to_string(), "sha256": set.data_sha256, "prepared_sha256": set.sha256,
                "rows": s.rows, "tokens": s.tokens, "predicted": s.predicted,
                "truncated": set.notes.truncated_count, "duplicates": set.notes.duplicate_count })
        };
        let about = json!({
            "flags": std::env::args().skip(1).collect::<Vec<_>>(),
            "model": self.model.model.display().to_string(),
            "data": set(&self.data, train),
            "eval_data": self.eval_data.as_ref().zip(held_out).map(|(path, held)| set(path, held)),
            "adapter_init": self.adapter_init.as_ref().map(|path| path.display().to_string()),
            "parameters": adapter.parameters(),
            "weights": model.llama.layers[0].q.matrix.format.name(),
            "pass_tokens": plan.pass_tokens,
            "kept_layers": plan.kept_layers,
            "device": { "id": device.id(), "description": device.description() },
            "versions": { "handmill": env!("CARGO_PKG_VERSION") },
        });
        about.as_object().cloned().unwrap_or_default()
    }

    fn check_leaks(&self, path: &Path, train: &TokenSet, held_out: &TokenSet) -> Result<()> {
        let leaks = data::leaks(train.iter(), held_out.iter());
        let shown = |pairs: &[(u32, u32)]| {
            let pairs = pairs.iter().take(10).map(|(held, row)| format!("#{held} (#{row} of the training data)"));
            pairs.collect::<Vec<_>>().join(", ")
        };
        if !leaks.prompts.is_empty() {
            let (count, shown) = (leaks.prompts.len(), shown(&leaks.prompts));
            note(&format!(
                "{}: rows that ask what a training row asks, for another answer: {count}, {shown}",
                path.display()
            ));
        }
        if !leaks.rows.is_empty() && !self.allow_leaks {
            anyhow::bail!(
                "{}: held-out rows that are among the training rows, so that their loss would tell nothing: {}, {}; \
                 take them out, or give --allow-leaks",
                path.display(),
                leaks.rows.len(),
                shown(&leaks.rows)
            );
        }
        Ok(())
    }
}

/// A flag's word.
trait ValueName {
    fn name(&self) -> String;
}

impl<T: ValueEnum> ValueName for T {
    fn name(&self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
    }
}
