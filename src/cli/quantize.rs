//! `handmill quantize`: a model in fewer bits, for this and other tools.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::write::{self, Quantized, Target, TensorReport};
use handmill::registry::entries::Source;
use handmill::registry::record::Product;
use handmill::registry::Kind;
use serde_json::json;

use super::register::model_hash;
use super::{human_bytes, note, print_json, progress, Common, ModelFlag, RegisterFlag, Usage};

/// Write a model in 8 or 4 bits, read it back, and report the error of every tensor
///
/// q8 and q4 write OUT/model.gguf (Q8_0 and Q4_1; embedding and head Q8_0) for llama.cpp; nf4 writes a Hugging Face
/// directory that transformers loads with bitsandbytes. With --json: bytes_before, bytes_after, path, and tensors:
/// [{name, format, shape, nmse, max_abs}], nmse being the sum of squared errors over the sum of squares.
#[derive(Args)]
pub struct Quantize {
    #[command(flatten)]
    model: ModelFlag,
    /// What the matrices of the layers become
    #[arg(long, value_enum)]
    format: Word,
    /// Store the scales of nf4 in 8 bits too
    #[arg(long)]
    double_quant: bool,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    register: RegisterFlag,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, ValueEnum)]
enum Word {
    Q8,
    Q4,
    Nf4,
}

impl Quantize {
    pub fn run(&self) -> Result<()> {
        let target = match (self.format, self.double_quant) {
            (Word::Q8, false) => Target::Q8,
            (Word::Q4, false) => Target::Q4,
            (Word::Nf4, false) => Target::Nf4,
            (Word::Nf4, true) => Target::Nf4Dq,
            _ => return Err(Usage("--double-quant goes with --format nf4".into()).into()),
        };
        self.register.check(&[("", Kind::Model)])?;
        // Encoding runs on the host; a device that is not there is an error here as everywhere.
        self.common.open_device()?;
        let path = self.model.path()?;
        let checkpoint = Checkpoint::open(&path)?;
        let bar = progress(0, "values");
        let quantized = write::quantize(&checkpoint, target, &self.out, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        let report = json!({
            "bytes_before": quantized.bytes_before,
            "bytes_after": quantized.bytes_after,
            "path": quantized.path.display().to_string(),
            "tensors": quantized.tensors.iter().map(tensor_json).collect::<Vec<_>>(),
        });
        let parents: Vec<_> = model_hash(&path)?.into_iter().map(|(_, hash)| ("original".to_string(), hash)).collect();
        let (kind, source) = (Kind::Model, Source::Path(&quantized.path));
        let product = |name| Product { name, kind, source, parents: Vec::new() };
        self.register.leave("quantize", &report, &parents, vec![self.register.name("").map(product)])?;
        match self.common.json {
            true => print_json(&report),
            false => print(&quantized),
        }
    }
}

fn tensor_json(tensor: &TensorReport) -> serde_json::Value {
    let TensorReport { name, shape, format, nmse, max_abs } = tensor;
    json!({ "name": name, "format": format.name(), "shape": shape, "nmse": nmse, "max_abs": max_abs })
}

/// A line for each kind of tensor: the layers' alike in one.
fn print(quantized: &Quantized) -> Result<()> {
    let mut kinds: Vec<&str> = Vec::new();
    let mut rows: BTreeMap<&str, Vec<&TensorReport>> = BTreeMap::new();
    for tensor in &quantized.tensors {
        let kind = kind(&tensor.name);
        let row = rows.entry(kind).or_default();
        if row.is_empty() {
            kinds.push(kind);
        }
        row.push(tensor);
    }
    let mut out = io::stdout();
    writeln!(
        out,
        "{:<26} {:>5}  {:<6} {:>10} {:>10} {:>10}",
        "tensor", "count", "format", "mean nmse", "worst", "max abs"
    )?;
    for kind in kinds {
        let row = &rows[kind];
        let worst = |value: fn(&TensorReport) -> f64| row.iter().map(|t| value(t)).fold(0.0, f64::max);
        let mean = row.iter().map(|t| t.nmse).sum::<f64>() / row.len() as f64;
        let (nmse, max_abs) = (worst(|t| t.nmse), worst(|t| t.max_abs));
        let format = row[0].format.name();
        let number = |value: f64| if value == 0.0 { "exact".to_string() } else { format!("{value:.2e}") };
        let (mean, nmse, max_abs) = (number(mean), number(nmse), number(max_abs));
        writeln!(out, "{kind:<26} {:>5}  {format:<6} {mean:>10} {nmse:>10} {max_abs:>10}", row.len())?;
    }
    let (before, after) = (quantized.bytes_before, quantized.bytes_after);
    let share = 100.0 * after as f64 / before as f64;
    let (before, after) = (human_bytes(before), human_bytes(after));
    writeln!(out, "\n{}: {after}, {share:.0}% of {before}", quantized.path.display())?;
    note("every tensor was read back and compared");
    Ok(())
}

/// A tensor's name without its layer and `.weight`.
fn kind(name: &str) -> &str {
    let inside = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')).map(|(_, part)| part);
    let name = inside.unwrap_or(name);
    name.strip_suffix(".weight").unwrap_or(name)
}
