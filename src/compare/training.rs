//! The adapter: training rows written out, trained on as `finetune` does, taken up again where a run was cut off.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{json, Map};

use super::{stages, Config, Halt};
use crate::aside;
use crate::error::Error;
use crate::model::adapter::{hex, sha256, LoraConfig, TARGETS};
use crate::model::generate::LanguageModel;
use crate::train::begin::{begin, Tuning};
use crate::train::checkpoint;
use crate::train::data::{DataOptions, Encoder, OverLong};
use crate::train::metrics::{self, Line};
use crate::train::parameters;
use crate::train::prepared::TokenSet;
use crate::train::run::{self, Ending, Event};
use crate::train::step::Plan;

/// What training came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trained {
    /// Seconds.
    pub seconds: f64,
    /// Loss of each step.
    pub losses: Vec<f64>,
    /// Tokens read.
    pub tokens: usize,
    /// Numbers trained.
    pub parameters: usize,
    /// Bytes of the adapter's files.
    pub bytes: u64,
    /// SHA-256 of its weights.
    pub sha256: String,
    /// Rows that were cut to their limit.
    pub truncated: usize,
    /// The most memory resident meanwhile, in bytes.
    pub peak_bytes: Option<u64>,
}

/// The adapter in `name` below the directory, where it was trained from the same and is still what it was.
pub fn found(config: &Config, name: &str, key: &str) -> Option<Trained> {
    let trained: Trained = stages::load(&config.out, name, key)?;
    let weights = fs::read(config.out.join(name).join("adapter_model.safetensors")).ok()?;
    (hex(&sha256(&weights)) == trained.sha256).then_some(trained)
}

/// Trains an adapter into `name` below the directory on `rows`, lines that `finetune` takes, in their order. Gives the
/// model back. `tell` is told steps done and the loss.
pub fn train(
    config: &Config,
    model: LanguageModel,
    base_sha256: &str,
    rows: &str,
    name: &str,
    key: &str,
    tell: &mut dyn FnMut(usize, f64) -> bool,
) -> Result<(LanguageModel, Trained), Halt> {
    let (out, recipe) = (config.out.join(name), &config.recipe);
    let _lock = run::lock(&out)?;
    metrics::reset_peak();
    let data = config.out.join(format!("{name}.jsonl"));
    aside::write(&data, rows.as_bytes())?;
    let encoder = Encoder::new(&model)?;
    let options =
        DataOptions { max_len: recipe.max_len.min(model.llama.config.max_positions), over_long: OverLong::Truncate };
    let set = TokenSet::open(&data, &encoder, base_sha256, &options, Some(&out.join("train.tokens")))?;
    let lora = LoraConfig {
        r: recipe.r,
        alpha: recipe.alpha,
        rslora: false,
        dropout: 0.0,
        targets: TARGETS.iter().map(|target| target.0).collect(),
        base: config.model.file_name().map(|name| name.to_string_lossy().into_owned()),
    };
    let adapter = parameters::fresh(&model.llama.config, lora, config.seed);
    let longest = set.statistics().longest;
    let parameters = adapter.parameters();
    let plan = Plan::new(&model.llama, recipe.r, parameters, recipe.rows, longest, false, recipe.keep_activations);
    let mut settings = Map::new();
    settings.insert("compare_key".into(), key.into());
    let about = json!({ "seed": config.seed, "base_sha256": base_sha256, "data_sha256": set.data_sha256,
        "recipe": recipe, "device": model.llama.device.id(), "versions": { "handmill": env!("CARGO_PKG_VERSION") } });
    let options = run::Options {
        steps: recipe.steps,
        lr: recipe.lr,
        schedule: recipe.schedule,
        warmup: recipe.warmup,
        rows: recipe.rows,
        pack: None,
        shuffle: None,
        eval_every: recipe.steps,
        patience: None,
        save_every: 10,
        base_sha256: base_sha256.to_string(),
        settings,
        about: about.as_object().cloned().unwrap_or_default(),
    };
    let found = checkpoint::find(&out)?.filter(|found| found.state.settings == options.settings);
    if found.is_none() {
        run::clear(&out, true)?;
    }
    let tuning =
        Tuning { dropout: 0.0, seed: config.seed, weight_decay: recipe.weight_decay, grad_clip: recipe.grad_clip };
    let LanguageModel { llama, tokenizer, chat_template } = model;
    let (mut trainer, state) = begin(llama, &adapter, found.as_ref(), &plan, tuning, &options.settings)?;
    let done = run::run(&options, &mut trainer, &set, None, &out, state, &mut |event| match event {
        Event::Step(line) => tell(line.step, line.loss),
        _ => true,
    })?;
    if done.ending == Ending::Interrupted {
        return Err(Halt::Interrupted);
    }
    let mut llama = trainer.llama;
    llama.detach();
    let lines = lines(&out)?;
    let size = |name: &str| fs::metadata(out.join(name)).map_or(0, |meta| meta.len());
    let trained = Trained {
        seconds: done.seconds,
        tokens: lines.iter().map(|line| line.tokens).sum(),
        losses: lines.into_iter().map(|line| line.loss).collect(),
        parameters,
        bytes: size("adapter_model.safetensors") + size("adapter_config.json"),
        sha256: done.adapter_sha256,
        truncated: set.notes.truncated_count,
        peak_bytes: metrics::peak_bytes(),
    };
    let trained = stages::save(&config.out, name, key, &trained)?;
    Ok((LanguageModel { llama, tokenizer, chat_template }, trained))
}

fn lines(run: &Path) -> Result<Vec<Line>, Error> {
    let path = run.join(metrics::FILE);
    let text = fs::read_to_string(&path).map_err(|cause| Error::io(&path, cause))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}
