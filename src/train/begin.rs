//! A trainer from a model, an adapter and, where a run goes on, the checkpoint it stood at.

use serde_json::{Map, Value};

use super::backward::Passes;
use super::checkpoint::{Found, State};
use super::optimizer::Optimizer;
use super::parameters::Parameters;
use super::step::{Plan, Trainer};
use crate::error::Error;
use crate::model::adapter::Adapter;
use crate::model::llama::Llama;
use crate::ops::adamw::Settings;

/// What a trainer's steps depend on beside data and learning rate.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Share of the adapter's inputs zeroed.
    pub dropout: f64,
    /// Seeds their masks.
    pub seed: u64,
    /// AdamW's decay of the weights.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for none.
    pub grad_clip: f64,
}

/// Puts `adapter` beside the model's weights, or where a run goes on the adapter that was `found`, and readies passes
/// and optimizer. The state is the one found, with these settings.
pub fn begin(
    mut llama: Llama,
    adapter: &Adapter,
    found: Option<&Found>,
    plan: &Plan,
    tuning: Tuning,
    settings: &Map<String, Value>,
) -> Result<(Trainer, State), Error> {
    let device = llama.device.clone();
    let mut first = found.map_or(adapter, |found| &found.adapter).clone();
    first.config = adapter.config.clone();
    let parameters = Parameters::new(&mut llama, &first)?;
    let state = match found {
        None => State::new(settings.clone()),
        Some(found) => {
            found.restore(&*device, &parameters)?;
            let mut state = found.state.clone();
            state.settings = settings.clone();
            state
        }
    };
    let dropout = tuning.dropout > 0.0;
    let passes = Passes::new(&llama, &parameters, plan.pass_tokens, plan.longest, plan.kept_layers, dropout)?;
    let adamw =
        Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: tuning.weight_decay, max_norm: tuning.grad_clip };
    let trainer = Trainer {
        optimizer: Optimizer::new(device, adamw, parameters.len)?,
        llama,
        parameters,
        passes,
        dropout: tuning.dropout,
        seed: tuning.seed,
        pass_tokens: plan.pass_tokens,
    };
    Ok((trainer, state))
}
