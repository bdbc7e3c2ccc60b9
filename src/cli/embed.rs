//! `handmill embed`: lines of text to unit vectors.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use handmill::model::generate::Embedder;
use handmill::model::weights::LoadOptions;
use handmill::npy;
use serde_json::json;

use super::{not_over, note, peak_bytes, print_json, progress, read_text, spinner, Common, ModelFlag, Precision};

/// Lines embedded between two steps of the progress bar: enough to sort into batches of like lengths.
const GROUP: usize = 1024;

/// Embed each line of a file as a unit vector
///
/// Writes a NumPy array, f32[lines, width], one row a line; empty lines count. Lines longer than the model takes are
/// cut. With --json: n, d, out, lines_per_s, device, peak_bytes.
#[derive(Args)]
pub struct Embed {
    #[command(flatten)]
    model: ModelFlag,
    /// A text file, UTF-8, one text a line
    #[arg(long, value_name = "FILE")]
    lines: PathBuf,
    /// The .npy file to write
    #[arg(long, value_name = "OUT.npy")]
    out: PathBuf,
    #[command(flatten)]
    precision: Precision,
    #[command(flatten)]
    common: Common,
}

impl Embed {
    pub fn run(&self) -> Result<()> {
        not_over(&self.out, &self.lines)?;
        let text = read_text(&self.lines)?;
        let lines: Vec<&str> = text.lines().collect();
        let device = self.common.open_device()?;
        let path = self.model.path()?;
        let loading = spinner(format!("loading {}", path.display()));
        let embedder =
            Embedder::open(&path, device.clone(), &LoadOptions { bf16: self.precision.bf16, ..LoadOptions::default() })
                .context("cannot open the model (the Hugging Face directory of a BERT sentence embedder)")?;
        loading.finish_and_clear();

        let (n, d) = (lines.len(), embedder.width());
        let mut file = npy::Writer::<f32>::create(&self.out, &[n, d])?;
        let (bar, start) = (progress(n, "lines"), Instant::now());
        for (group, lines) in lines.chunks(GROUP).enumerate() {
            let first = group * GROUP + 1;
            let vectors = embedder.embed_lines(lines);
            let last = first + lines.len() - 1;
            file.write(&vectors.with_context(|| format!("{}: lines {first} to {last}", self.lines.display()))?)?;
            bar.inc(lines.len() as u64);
        }
        file.finish()?;
        bar.finish_and_clear();
        let lines_per_s = n as f64 / start.elapsed().as_secs_f64().max(1e-9);
        if self.common.json {
            return print_json(&json!({
                "n": n,
                "d": d,
                "out": self.out.display().to_string(),
                "lines_per_s": lines_per_s,
                "device": device.id(),
                "peak_bytes": peak_bytes(),
            }));
        }
        note(&format!("{}: f32[{n}, {d}], {lines_per_s:.1} lines/s on {}", self.out.display(), device.id()));
        Ok(())
    }
}
