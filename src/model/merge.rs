//! An adapter added into its base model's weights: W' = W + s·B·A, written as a Hugging Face directory of plain values
//! and measured against the adapter beside the weights.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::adapter::{weight_name, Adapter, Module};
use super::checkpoint::Checkpoint;
use super::generate::LanguageModel;
use super::layout;
use super::llama::Want;
use super::weights::LoadOptions;
use super::write::{self, Item, Staging};
use super::write_hf;
use crate::device::Device;
use crate::error::Error;
use crate::quant::Format;

/// Two models' logits on the same tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Largest |difference| of two logits.
    pub max_logit_diff: f64,
    /// Mean over positions of KL(first ‖ second), in nats.
    pub kl_mean: f64,
    /// Share of positions where both name the same most probable token.
    pub same_top: f64,
    /// Positions compared.
    pub tokens: usize,
}

/// A merged model and how far it is from the adapter beside its base.
#[derive(Clone, Debug)]
pub struct Merged {
    /// Modules that were added.
    pub modules: usize,
    /// The written model against base and adapter.
    pub difference: Difference,
    /// The same once the written weights are quantized as the base's were: what is lost by merging into a quantized
    /// model. None where the base is not quantized.
    pub requantized: Option<(Format, Difference)>,
    /// Bytes of the written weights.
    pub bytes: u64,
}

/// Writes `checkpoint` with `adapter` added into the directory `out` as plain values of `format` (f32, f16 or bf16),
/// and compares logits on the first 256 tokens of `probe`. `on_progress` is told how many values of how many are
/// written. Errors: an adapter for another model, an `out` that holds other files or the base itself; `out` is then
/// as it was.
pub fn merge(
    device: &Arc<dyn Device>,
    model: &Path,
    adapter: &Adapter,
    format: Format,
    out: &Path,
    probe: &str,
    on_progress: &mut dyn FnMut(usize, usize),
) -> Result<Merged, Error> {
    let checkpoint = Checkpoint::open(model)?;
    adapter.check(&checkpoint.config)?;
    let items = plan(&checkpoint, format)?;
    let staging = Staging::create(&checkpoint, write_hf::FILES, out)?;
    let total = items.iter().map(|item| item.shape.iter().product::<usize>()).sum();
    let mut done = 0;

    let by_name: HashMap<String, &Module> =
        adapter.modules.iter().map(|module| (weight_name(module.layer, module.target), module)).collect();
    let (r, scale) = (adapter.config.r, adapter.config.scale());
    let change = |name: &str, row0: usize, values: &mut [f32]| match by_name.get(name) {
        None => false,
        Some(module) => {
            add(module, r, scale, row0, values);
            true
        }
    };
    write_hf::write_plain(&staging.path, &checkpoint, &items, &change, &mut |item| {
        done += item.shape.iter().product::<usize>();
        on_progress(done, total);
    })?;

    let (expected, ids) = {
        let mut base = LanguageModel::open(model, device.clone(), &LoadOptions::default())?;
        let mut ids = base.prompt_ids(probe)?;
        ids.truncate(base.llama.config.max_positions.min(256));
        base.llama.attach(adapter)?;
        (logits(&base, &ids)?, ids)
    };
    let open = |quant| LanguageModel::open(&staging.path, device.clone(), &LoadOptions { quant, ..Default::default() });
    let written = open(None)?;
    let vocab = written.llama.config.vocab;
    let difference = compare(&expected, &logits(&written, &ids)?, vocab);
    let bytes = Checkpoint::open(&staging.path)?.bytes();
    drop(written); // some systems do not rename a mapped file
    let stored = quantized(&checkpoint)?;
    let requantized = match stored {
        Some(format) => Some((format, compare(&expected, &logits(&open(Some(format))?, &ids)?, vocab))),
        None => None,
    };
    staging.commit()?;
    Ok(Merged { modules: adapter.modules.len(), difference, requantized, bytes })
}

/// Every tensor with what it becomes.
fn plan(checkpoint: &Checkpoint, format: Format) -> Result<Vec<Item>, Error> {
    if checkpoint.has("model.rope_freqs") {
        return Err(checkpoint.tensor("model.rope_freqs")?.wrong(write::NO_WORD_FOR_DIVISORS));
    }
    let mut items = Vec::new();
    layout::for_each(&checkpoint.config, &mut |name, shape| {
        let format = match shape.len() {
            2 => format,
            _ => write::plain_format(checkpoint.tensor(&name)?.encoding).unwrap_or(Format::F32),
        };
        items.push(Item { name, shape: shape.to_vec(), format });
        Ok(())
    })?;
    Ok(items)
}

/// The format of the base's first quantized projection as a model quantized on load would have it.
fn quantized(checkpoint: &Checkpoint) -> Result<Option<Format>, Error> {
    let source = write::source_format(checkpoint, &weight_name(0, "q_proj"))?;
    Ok(match source {
        Format::F32 | Format::F16 | Format::BF16 => None,
        format => Some(format),
    })
}

/// Adds s·B·A to rows `row0..` of W.
fn add(module: &Module, r: usize, scale: f32, row0: usize, values: &mut [f32]) {
    let k = module.k;
    values.par_chunks_mut(k).enumerate().for_each(|(row, values)| {
        let b = &module.b[(row0 + row) * r..][..r];
        for (b, a) in b.iter().zip(module.a.chunks(k)) {
            let factor = scale * b;
            values.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
        }
    });
}

fn logits(model: &LanguageModel, ids: &[u32]) -> Result<Vec<f32>, Error> {
    let mut all = Vec::new();
    let mut session = model.llama.session(ids.len())?;
    let mut each = |_: usize, rows: &[f32]| {
        all.extend_from_slice(rows);
        Ok(())
    };
    model.llama.forward(&mut session, ids, Want::All(&mut each))?;
    Ok(all)
}

/// How far `got` is from `expected`, f32[positions, vocab] both.
pub fn compare(expected: &[f32], got: &[f32], vocab: usize) -> Difference {
    let rows = expected.par_chunks(vocab).zip(got.par_chunks(vocab)).map(|(expected, got)| {
        let largest = |row: &[f32]| row.iter().fold(f32::NEG_INFINITY, |max, &l| max.max(l)) as f64;
        let log_total = |row: &[f32]| {
            let max = largest(row);
            max + row.iter().map(|&l| (l as f64 - max).exp()).sum::<f64>().ln()
        };
        let (p_total, q_total) = (log_total(expected), log_total(got));
        let top = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
        let (mut kl, mut max) = (0.0, 0f64);
        for (&p, &q) in expected.iter().zip(got) {
            let (log_p, log_q) = (p as f64 - p_total, q as f64 - q_total);
            kl += log_p.exp() * (log_p - log_q);
            max = max.max((p as f64 - q as f64).abs());
        }
        (max, kl, top(expected) == top(got))
    });
    let rows: Vec<_> = rows.collect();
    let tokens = rows.len();
    let count = tokens.max(1) as f64;
    Difference {
        max_logit_diff: rows.iter().fold(0.0, |max, row| max.max(row.0)),
        kl_mean: rows.iter().map(|row| row.1).sum::<f64>() / count,
        same_top: rows.iter().filter(|row| row.2).count() as f64 / count,
        tokens,
    }
}
