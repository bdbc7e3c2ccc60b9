//! `handmill eval`: how well a model predicts a text.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use handmill::aside;
use handmill::compare::stages::file_sha256;
use handmill::model::adapter::{hex, sha256};
use handmill::registry::entries::Source;
use handmill::registry::record::Product;
use handmill::registry::Kind;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{json, Value};

use super::register::model_hash;
use super::registry::directory;
use super::{
    not_over, note, open_model, peak_bytes, print_json, progress, read_text, AdapterFlag, Common, ModelFlag, Precision,
    RegisterFlag,
};

/// Measure a model's perplexity on a text
///
/// The text is taken byte for byte, without BOS; its first N tokens are predicted in one window. With --json: tokens,
/// mean_nll, perplexity, stderr_nll, tokens_per_s, text_tokens, device, peak_bytes.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    adapter: AdapterFlag,
    /// A text file, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of the window; as many as the text has and the model's context holds, if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: Option<u32>,
    /// Write the natural logarithm of each token's probability: key logprobs, f32[N-1]
    #[arg(long, value_name = "OUT.safetensors")]
    logprobs: Option<PathBuf>,
    #[command(flatten)]
    register: RegisterFlag,
    #[command(flatten)]
    precision: Precision,
    #[command(flatten)]
    common: Common,
}

impl Eval {
    pub fn run(&self) -> Result<()> {
        self.register.check(&[("", Kind::Evaluation)])?;
        self.logprobs.as_ref().map_or(Ok(()), |out| not_over(out, &self.text))?;
        let text = read_text(&self.text)?;
        let device = self.common.open_device()?;
        let model = open_model(&self.model.model, &self.adapter, &self.precision, &device)?;
        let mut ids = model.tokenizer.encode(&text)?;
        let (all, context) = (ids.len(), model.llama.config.max_positions);
        ids.truncate(self.max_tokens.map_or(context, |max| max as usize));
        if ids.len() < all {
            note(&format!("the first {} of the text's {all} tokens are read", ids.len()));
        }
        let bar = progress(ids.len(), "tokens");
        let evaluation = model
            .evaluate_with(&ids, &mut |done| bar.set_position(done as u64))
            .with_context(|| self.text.display().to_string())?;
        bar.finish_and_clear();
        if let Some(path) = &self.logprobs {
            write_logprobs(path, &evaluation.logprobs)?;
        }

        let count = evaluation.logprobs.len() as f64;
        let squares: f64 = evaluation.logprobs.iter().map(|&l| (l as f64 + evaluation.mean_nll).powi(2)).sum();
        // Of the mean over tokens as if they were independent.
        let stderr = (squares / (count - 1.0).max(1.0) / count).sqrt();
        let tokens_per_s = ids.len() as f64 / evaluation.seconds.max(1e-9);
        let report = json!({
            "tokens": ids.len(),
            "mean_nll": evaluation.mean_nll,
            "perplexity": evaluation.perplexity,
            "stderr_nll": stderr,
            "tokens_per_s": tokens_per_s,
            "text_tokens": all,
            "device": device.id(),
            "peak_bytes": peak_bytes(),
        });
        self.record(&report, text.as_bytes())?;
        if self.common.json {
            return print_json(&report);
        }
        let mut out = io::stdout();
        writeln!(out, "tokens      {}", ids.len())?;
        writeln!(out, "mean nll    {:.4} ± {stderr:.4}", evaluation.mean_nll)?;
        let spread = evaluation.perplexity * stderr;
        writeln!(out, "perplexity  {:.4} ± {spread:.4}", evaluation.perplexity)?;
        note(&format!("{tokens_per_s:.1} tokens/s on {}", device.id()));
        Ok(())
    }
}

impl Eval {
    fn record(&self, report: &Value, text: &[u8]) -> Result<()> {
        if directory().is_none() {
            return Ok(());
        }
        let mut parents = model_hash(&self.model.path()?)?;
        parents.push(("text".into(), hex(&sha256(text))));
        if let Some(adapter) = self.adapter.path()? {
            parents.push(("adapter".into(), file_sha256(&adapter.join("adapter_model.safetensors"))?));
        }
        let figures = format!("{report:#}\n");
        let source = Source::Bytes("evaluation.json", figures.as_bytes());
        let product = |name| Product { name, kind: Kind::Evaluation, source, parents: Vec::new() };
        self.register.leave("eval", report, &parents, vec![self.register.name("").map(product)])
    }
}

fn write_logprobs(path: &Path, logprobs: &[f32]) -> Result<()> {
    let view = TensorView::new(Dtype::F32, vec![logprobs.len()], bytemuck::cast_slice(logprobs))?;
    Ok(aside::write(path, &safetensors::serialize([("logprobs", view)], None)?)?)
}
