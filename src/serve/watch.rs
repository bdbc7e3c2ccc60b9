//! How far the questions of late are from those that a model was trained on.

use std::sync::Mutex;

use serde_json::{json, Value};

use super::http::metrics::Metrics;

/// Watches questions.
pub struct Watch {
    seen: Mutex<u64>,
}

impl Watch {
    /// Counts a question's vector.
    pub fn see(&self, question: &[f32], metrics: &Metrics) {
        let mut seen = self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *seen += u64::from(!question.is_empty());
        metrics.drift.with_label_values(&["questions"]).set(*seen as f64);
    }

    /// For people and scripts.
    pub fn status(&self) -> Value {
        json!({ "questions": *self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) })
    }
}
