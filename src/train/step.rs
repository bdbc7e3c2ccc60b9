//! One step: the gradients of some rows, averaged over every token they predict, and the change they make.

use super::backward::{self, Dropout, Passes};
use super::batch::Batch;
use super::optimizer::Optimizer;
use super::parameters::Parameters;
use super::prepared::{predicted, TokenSet};
use crate::error::Error;
use crate::model::llama::Llama;

/// Tokens of a pass where the longest row has fewer: short rows go through side by side.
pub const PASS_TOKENS: usize = 512;

/// A model that is being trained.
pub struct Trainer {
    /// The model, adapters beside its weights.
    pub llama: Llama,
    /// The adapters.
    pub parameters: Parameters,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Passes over the model.
    pub passes: Passes,
    /// Share of the adapters' inputs zeroed in training.
    pub dropout: f64,
    /// Seeds their masks.
    pub seed: u64,
    /// Tokens of a pass.
    pub pass_tokens: usize,
}

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Mean loss of the tokens predicted, in nats, before the change.
    pub loss: f64,
    /// Norm of its gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens predicted.
    pub predicted: usize,
    /// Tokens read.
    pub tokens: usize,
}

/// Rows of a set side by side, in order, each pass of at most `pass_tokens` tokens or one row.
pub fn passes(set: &TokenSet, rows: &[u32], pass_tokens: usize) -> Vec<Batch> {
    let mut batches = vec![Batch::default()];
    for &row in rows {
        let (ids, labels) = set.row(row as usize);
        let last = batches.last().expect("there is one from the start");
        if !last.is_empty() && last.len() + ids.len() > pass_tokens {
            batches.push(Batch::default());
        }
        batches.last_mut().expect("there is one from the start").push(ids, labels);
    }
    batches
}

impl Trainer {
    /// The gradients of the mean loss over every token that `rows` predict, left in the parameters' gradients; `step`
    /// counts from 0 and picks the masks of dropout.
    pub fn gradients(&mut self, set: &TokenSet, rows: &[u32], step: usize) -> Result<Step, Error> {
        let count: usize = rows.iter().map(|&row| predicted(set.row(row as usize).1)).sum();
        if count == 0 {
            return Err(Error::Request("the rows of this step predict nothing".into()));
        }
        let (mut loss, mut row0) = (0.0, 0);
        let batches = passes(set, rows, self.pass_tokens);
        for (i, batch) in batches.iter().enumerate() {
            let (seed, step) = ((self.seed ^ (self.seed >> 32)) as u32, step as u32);
            let dropout = (self.dropout > 0.0).then_some(Dropout { p: self.dropout, seed, step, row0 });
            let scale = (1.0 / count as f64) as f32;
            loss += self.passes.gradients(&self.llama, &self.parameters, batch, scale, dropout, i > 0)?;
            row0 += batch.len();
        }
        Ok(Step { loss: loss / count as f64, grad_norm: 0.0, predicted: count, tokens: row0 })
    }

    /// A whole step at this learning rate; `step` counts from 0.
    pub fn step(&mut self, set: &TokenSet, rows: &[u32], rate: f64, step: usize) -> Result<Step, Error> {
        let mut found = self.gradients(set, rows, step)?;
        found.grad_norm = self.optimizer.step(&self.parameters, rate, step as u64 + 1)?;
        if !(found.loss.is_finite() && found.grad_norm.is_finite()) {
            let what = format!(
                "step {}: the loss is {} and its gradient's norm {}: lower --lr, or clip with --grad-clip 1",
                step + 1,
                found.loss,
                found.grad_norm
            );
            return Err(Error::Request(what));
        }
        Ok(found)
    }

    /// Mean loss over every token that a set predicts, in nats. `on_progress` is told how many rows are done; false
    /// from it ends the pass, with `None`.
    pub fn evaluate(
        &mut self,
        set: &TokenSet,
        on_progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<f64>, Error> {
        let rows: Vec<u32> = (0..set.len() as u32).collect();
        let (mut loss, mut count, mut done) = (0.0, 0, 0);
        for batch in passes(set, &rows, self.pass_tokens) {
            loss += self.passes.evaluate(&self.llama, &batch)?;
            count += batch.predicted();
            done += batch.positions.iter().filter(|&&at| at == 0).count();
            if !on_progress(done) {
                return Ok(None);
            }
        }
        Ok(Some(loss / count as f64))
    }
}

/// How large passes are and what they keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tokens of a pass at most.
    pub pass_tokens: usize,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Layers whose activations are kept from forward to backward; the others are computed twice.
    pub kept_layers: usize,
    /// Bytes of a layer's activations.
    pub layer_bytes: usize,
    /// Bytes of every other buffer of a pass.
    pub pass_bytes: usize,
    /// Bytes of parameters, gradients and the optimizer's means.
    pub parameter_bytes: usize,
    /// Bytes of the model's weights on the device.
    pub weight_bytes: usize,
}

impl Plan {
    /// For steps of `rows` rows at most `longest` tokens long, over a model and `parameters` numbers to train;
    /// activations of as many layers kept as `keep_bytes` hold, but of one at least.
    pub fn new(
        llama: &Llama,
        rank: usize,
        parameters: usize,
        rows: usize,
        longest: usize,
        dropout: bool,
        keep_bytes: usize,
    ) -> Plan {
        let pass_tokens = rows.saturating_mul(longest).min(PASS_TOKENS.max(longest));
        let layer_bytes = backward::layer_bytes(&llama.config, rank, pass_tokens);
        let projections = llama.layers.iter().flat_map(|layer| layer.projections());
        let tied = llama.config.tie_embeddings;
        let outside = llama.embedding.matrix.bytes() + if tied { 0 } else { llama.head.matrix.bytes() };
        Plan {
            pass_tokens,
            longest,
            kept_layers: (keep_bytes / layer_bytes).clamp(1, llama.config.layers),
            layer_bytes,
            pass_bytes: backward::fixed_bytes(&llama.config, rank, pass_tokens, dropout),
            parameter_bytes: 16 * parameters,
            weight_bytes: outside + projections.map(|(_, linear)| linear.matrix.bytes()).sum::<usize>(),
        }
    }

    /// Everything.
    pub fn bytes(&self) -> usize {
        self.kept_layers * self.layer_bytes + self.pass_bytes + self.parameter_bytes + self.weight_bytes
    }
}
