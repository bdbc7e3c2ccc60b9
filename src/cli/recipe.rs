//! How an adapter is trained, and over which weights: flags that `finetune`, `compare`, `promote` and `cycle` share.

use anyhow::Result;
use clap::{Args, ValueEnum};
use handmill::compare::Recipe;
use handmill::quant::Format;
use handmill::train::optimizer::Schedule;

use super::Usage;

/// How the adapter is trained.
#[derive(Args)]
pub struct RecipeFlags {
    /// Training steps
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Rows of a step
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Largest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 5e-4)]
    lr: f64,
    /// How it changes after the warm-up: constant, linear, cosine
    #[arg(long, value_name = "NAME", default_value = "linear")]
    schedule: Schedule,
    /// Steps it rises for [default: a tenth of all]
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,
    /// AdamW's decay of the weights
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    weight_decay: f64,
    /// Largest norm of the gradient; 0 for none
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    grad_clip: f64,
    /// The adapter's rank
    #[arg(long, value_name = "R", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    r: u32,
    /// Its strength: it is scaled by alpha/r
    #[arg(long, value_name = "ALPHA", default_value_t = 16.0)]
    alpha: f64,
    /// Tokens of a training row; longer ones are cut
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..))]
    max_len: u32,
    /// Memory for activations kept from the forward to the backward pass
    #[arg(long, value_name = "MIB", default_value_t = 288)]
    keep_activations: usize,
}

impl RecipeFlags {
    /// What the flags ask for.
    pub fn recipe(&self) -> Result<Recipe> {
        let usage = |what: &str| Err(Usage(what.into()).into());
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return usage("--lr is a number above 0");
        }
        if !(0.0..1.0).contains(&self.weight_decay) {
            return usage("--weight-decay is a share of at least 0 and below 1");
        }
        if !(self.grad_clip.is_finite() && self.grad_clip >= 0.0) {
            return usage("--grad-clip is a norm, or 0 for none");
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return usage("--alpha is a number above 0");
        }
        let steps = self.steps as usize;
        Ok(Recipe {
            r: self.r as usize,
            alpha: self.alpha,
            steps,
            rows: self.batch as usize,
            lr: self.lr,
            schedule: self.schedule,
            warmup: self.warmup.unwrap_or(steps.div_ceil(10)),
            weight_decay: self.weight_decay,
            grad_clip: self.grad_clip,
            max_len: self.max_len as usize,
            keep_activations: self.keep_activations << 20,
        })
    }
}

/// In how many bits the base's layers are.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Quant {
    None,
    Q8,
    Q4,
    Nf4,
    Nf4dq,
}

impl Quant {
    /// The format of the layers' weights.
    pub fn format(self) -> Option<Format> {
        match self {
            Quant::None => None,
            Quant::Q8 => Some(Format::Q8 { group: 32, wide: false, affine: false }),
            Quant::Q4 => Some(Format::Q4 { group: 32, wide: false }),
            Quant::Nf4 => Some(Format::Nf4),
            Quant::Nf4dq => Some(Format::Nf4Dq),
        }
    }
}
