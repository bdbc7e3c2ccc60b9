//! Passages for a question, from the indexes that a server holds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::device::Device;
use crate::error::Error;
use crate::model::generate::Embedder;
use crate::retrieve::index::{Index, Passage};

/// An embedding model and the indexes that it searches.
pub struct Retrieval {
    /// As embeddings are asked for.
    pub name: String,
    /// The embedding model.
    pub embedder: Embedder,
    /// Where it computes.
    pub device: Arc<dyn Device>,
    /// Indexes by name.
    pub indexes: BTreeMap<String, Index>,
    /// Passages for a question.
    pub k: usize,
    /// The least score of a passage worth giving.
    pub min_score: f32,
    /// One search or embedding at a time: the engine has the other cores.
    pub turn: Mutex<()>,
}

/// What was found for a question.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Passages worth giving, best first.
    pub passages: Vec<Passage>,
    /// The best score, worth giving or not; none of an empty index.
    pub best: Option<f32>,
    /// The question's unit vector.
    pub question: Vec<f32>,
}

impl Retrieval {
    /// The best passages for a question. It is embedded alone, so its vector does not depend on other requests.
    pub fn search(&self, index: &str, question: &str) -> Result<Found, Error> {
        let Some(index) = self.indexes.get(index) else {
            return Err(Error::Request(format!("there is no index {index:?}")));
        };
        let question = self.embed(question)?;
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut found = index.search_vectors(&*self.device, &question, self.k, None)?;
        let mut passages = if found.is_empty() { Vec::new() } else { found.remove(0) };
        let best = passages.first().map(|passage| passage.score);
        passages.retain(|passage| passage.score >= self.min_score);
        Ok(Found { passages, best, question })
    }

    /// The unit vector of a text, `f32[width]`, embedded alone.
    pub fn embed(&self, text: &str) -> Result<Vec<f32>, Error> {
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.embedder.embed_lines(&[text])
    }

    /// Tokens that the model reads of a text.
    pub fn tokens(&self, text: &str) -> Result<usize, Error> {
        Ok(self.embedder.tokenizer.encode_sentence(text, self.embedder.max_tokens)?.len())
    }
}
