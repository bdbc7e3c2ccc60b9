//! `handmill adapter`: what a LoRA adapter is, merged into its model, or as a file for llama.cpp.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use handmill::model::adapter::{self, Module};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::merge::{self, Difference};
use handmill::quant::Format;
use handmill::registry::Kind;
use serde_json::json;

use super::{human_bytes, note, print_json, progress, read_text, resolve, BaseFlag, Common, ModelFlag};

/// Show a LoRA adapter, merge it into its model, or write it for llama.cpp
#[derive(Args)]
pub struct Adapter {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Info(Info),
    Merge(Merge),
    Export(Export),
}

/// Show what an adapter holds
///
/// With --json: r, alpha, scale, rslora, dropout, targets, modules, layers, parameters, base, base_sha256, and norms:
/// for each projection the root mean square over layers of the Frobenius norm of scale·B·A.
#[derive(Args)]
struct Info {
    /// A PEFT directory
    adapter: PathBuf,
    /// Check that it fits this model
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    base: BaseFlag,
    #[command(flatten)]
    common: Common,
}

/// Write a model with an adapter added into its weights, and report how far its logits are from the adapter's
///
/// OUT becomes a Hugging Face directory of plain values. With --json: modules, bytes, path, max_logit_diff, kl_mean,
/// same_top, tokens; where the base is quantized also requantized: {format, max_logit_diff, kl_mean, same_top}, the
/// same measured after the written weights are quantized as the base's were.
#[derive(Args)]
struct Merge {
    #[command(flatten)]
    model: ModelFlag,
    /// A PEFT directory
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What matrices are written as
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Compare logits on the first 256 tokens of this file instead of a paragraph of its own
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    #[command(flatten)]
    base: BaseFlag,
    #[command(flatten)]
    common: Common,
}

/// Write an adapter as one GGUF file for llama.cpp
#[derive(Args)]
struct Export {
    #[command(flatten)]
    model: ModelFlag,
    /// A PEFT directory
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The file to write
    #[arg(long, value_name = "OUT.gguf")]
    out: PathBuf,
    #[command(flatten)]
    base: BaseFlag,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

/// What logits are compared on where no text is given.
const PROBE: &str = "A mill grinds grain between two stones. The lower one lies still, the upper one turns, and what \
    was poured into its eye leaves at the rim as flour. In 1785 Oliver Evans built a mill near Wilmington in which \
    elevators and conveyors moved the grain from floor to floor without a hand touching it; five men had needed a day \
    for what it did in an hour.\n\nQuestion: What turns?\nAnswer:";

impl Adapter {
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Command::Info(command) => command.run(),
            Command::Merge(command) => command.run(),
            Command::Export(command) => command.run(),
        }
    }
}

impl Info {
    fn run(&self) -> Result<()> {
        let adapter = adapter::Adapter::open(&resolve(Kind::Adapter, &self.adapter)?)?;
        if let Some(path) = &self.model {
            let path = &resolve(Kind::Model, path)?;
            let fits = adapter.check(&Checkpoint::open(path)?.config);
            fits.with_context(|| self.adapter.display().to_string())?;
            self.base.check(&adapter, path).with_context(|| self.adapter.display().to_string())?;
        }
        let config = &adapter.config;
        let scale = config.scale();
        let mut layers: Vec<usize> = adapter.modules.iter().map(|module| module.layer).collect();
        layers.dedup();
        let norms = config.targets.iter().map(|&target| {
            let squares: Vec<f64> = adapter.modules.iter().filter(|m| m.target == target).map(square_norm).collect();
            (target, f64::from(scale) * (squares.iter().sum::<f64>() / squares.len() as f64).sqrt())
        });
        let norms: Vec<(&str, f64)> = norms.collect();
        if self.common.json {
            let norms = norms.iter().map(|(target, norm)| (target.to_string(), json!(norm)));
            return print_json(&json!({
                "r": config.r,
                "alpha": config.alpha,
                "scale": scale,
                "rslora": config.rslora,
                "dropout": config.dropout,
                "targets": config.targets,
                "modules": adapter.modules.len(),
                "layers": layers.len(),
                "parameters": adapter.parameters(),
                "base": config.base,
                "base_sha256": adapter.base_sha256,
                "norms": norms.collect::<serde_json::Map<_, _>>(),
            }));
        }
        let mut out = io::stdout();
        let kind = if config.rslora { "rsLoRA" } else { "LoRA" };
        writeln!(out, "{kind}, r {}, alpha {}, scale {scale}", config.r, config.alpha)?;
        writeln!(
            out,
            "{} modules in {} layers, {} parameters; base {}",
            adapter.modules.len(),
            layers.len(),
            adapter.parameters(),
            config.base.as_deref().unwrap_or("not told"),
        )?;
        writeln!(out, "\n{:<10} {:>12}", "projection", "|scale·B·A|")?;
        for (target, norm) in norms {
            writeln!(out, "{target:<10} {norm:>12.4}")?;
        }
        Ok(())
    }
}

/// The square of the Frobenius norm of B·A: the trace of (A·Aᵀ)·(Bᵀ·B), r x r both.
fn square_norm(module: &Module) -> f64 {
    let r = module.a.len() / module.k;
    let a = |i: usize, j: usize| {
        let (a, b) = (&module.a[i * module.k..][..module.k], &module.a[j * module.k..][..module.k]);
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    let b = |i: usize, j: usize| module.b.chunks(r).map(|row| f64::from(row[i]) * f64::from(row[j])).sum::<f64>();
    (0..r).map(|i| (0..r).map(|j| a(i, j) * b(i, j)).sum::<f64>()).sum()
}

impl Merge {
    fn run(&self) -> Result<()> {
        let device = self.common.open_device()?;
        let adapter = adapter::Adapter::open(&resolve(Kind::Adapter, &self.adapter)?)?;
        let model = self.model.path()?;
        self.base.check(&adapter, &model).with_context(|| self.adapter.display().to_string())?;
        let probe = self.text.as_ref().map(|path| read_text(path)).transpose()?;
        let format = match self.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::Bf16 => Format::BF16,
        };
        let bar = progress(0, "values");
        let probe = probe.as_deref().unwrap_or(PROBE);
        let merged = merge::merge(&device, &model, &adapter, format, &self.out, probe, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        if self.common.json {
            let keys = |difference: &Difference| {
                json!({
                    "max_logit_diff": difference.max_logit_diff,
                    "kl_mean": difference.kl_mean,
                    "same_top": difference.same_top,
                    "tokens": difference.tokens,
                })
            };
            let mut object = keys(&merged.difference);
            object["modules"] = merged.modules.into();
            object["bytes"] = merged.bytes.into();
            object["path"] = self.out.display().to_string().into();
            if let Some((format, difference)) = &merged.requantized {
                object["requantized"] = keys(difference);
                object["requantized"]["format"] = format.name().into();
            }
            return print_json(&object);
        }
        let mut out = io::stdout();
        writeln!(out, "{:<24} {:>14} {:>12} {:>9}", "against the adapter", "max |logit|", "mean KL", "same top")?;
        let mut row = |what: &str, d: &Difference| {
            writeln!(out, "{what:<24} {:>14.3e} {:>12.3e} {:>8.1}%", d.max_logit_diff, d.kl_mean, 100.0 * d.same_top)
        };
        row("merged", &merged.difference)?;
        if let Some((format, difference)) = &merged.requantized {
            row(&format!("merged, {} again", format.name()), difference)?;
        }
        let bytes = human_bytes(merged.bytes);
        note(&format!("{}: {bytes}, {} modules added", self.out.display(), merged.modules));
        Ok(())
    }
}

impl Export {
    fn run(&self) -> Result<()> {
        let adapter = adapter::Adapter::open(&resolve(Kind::Adapter, &self.adapter)?)?;
        let model = self.model.path()?;
        self.base.check(&adapter, &model).with_context(|| self.adapter.display().to_string())?;
        let checkpoint = Checkpoint::open(&model)?;
        let written = adapter.save_gguf(&self.out, &checkpoint.config);
        written.with_context(|| self.adapter.display().to_string())?;
        match self.common.json {
            true => print_json(&json!({ "path": self.out.display().to_string(), "modules": adapter.modules.len() })),
            false => {
                note(&format!("{}: {} modules", self.out.display(), adapter.modules.len()));
                Ok(())
            }
        }
    }
}
