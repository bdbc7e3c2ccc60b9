//! How far the questions of late are from those that a model was trained on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{json, Value};

use super::drift::{drift, Drift, MOST};
use super::http::metrics::Metrics;

/// Questions between two looks, and before the first.
const EVERY: u64 = 32;
/// Random splits that a look is compared with.
const SPLITS: usize = 199;

/// Watches questions.
pub struct Watch {
    reference: Vec<f32>,
    d: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The last questions' vectors, at most [`MOST`].
    recent: VecDeque<Vec<f32>>,
    seen: u64,
    found: Option<Drift>,
}

impl Watch {
    /// Compares with the unit rows `reference` f32[N, d].
    pub fn new(reference: Vec<f32>, d: usize) -> Watch {
        Watch { reference, d, state: Mutex::default() }
    }

    /// Takes note of a question's unit vector; every so many, looks on a thread of its own.
    pub fn see(self: &Arc<Self>, question: &[f32]) {
        if question.len() != self.d {
            return;
        }
        let mut state = self.state();
        state.recent.push_back(question.to_vec());
        if state.recent.len() > MOST {
            state.recent.pop_front();
        }
        state.seen += 1;
        if state.seen.is_multiple_of(EVERY) {
            let (rows, seen): (Vec<f32>, u64) = (state.recent.iter().flatten().copied().collect(), state.seen);
            drop(state);
            let watch = self.clone();
            let look = move || {
                let found = drift(&watch.reference, &rows, watch.d, seen, SPLITS);
                watch.state().found = Some(found);
            };
            if let Err(error) = std::thread::Builder::new().name("drift".into()).spawn(look) {
                log::warn!("drift: {error}");
            }
        }
    }

    /// Sets the gauges.
    pub fn tell(&self, metrics: &Metrics) {
        let state = self.state();
        metrics.drift.with_label_values(&["questions"]).set(state.seen as f64);
        if let Some(found) = &state.found {
            metrics.drift.with_label_values(&["centroid_distance"]).set(found.centroid_distance);
            metrics.drift.with_label_values(&["mmd2"]).set(found.mmd2);
            metrics.drift.with_label_values(&["p_value"]).set(found.p_value);
        }
    }

    /// For people and scripts.
    pub fn status(&self) -> Value {
        let state = self.state();
        json!({"questions": state.seen, "every": EVERY, "found": state.found})
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
