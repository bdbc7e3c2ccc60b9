//! Passages for questions: the one place where a comparison meets the index.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Halt;
use crate::device::Device;
use crate::error::Error;
use crate::model::generate::Embedder;
use crate::retrieve::topk::{self, Corpus, Rows};

/// A passage that was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Passage {
    /// Cosine with the question.
    pub score: f32,
    /// The document.
    pub path: String,
    /// Its first and last line there.
    pub lines: (u32, u32),
    /// The headings that it stands under.
    #[serde(default)]
    pub heading: String,
    /// What it says.
    pub text: String,
}

impl Passage {
    /// What a model is shown of it.
    pub fn note(&self) -> String {
        match self.heading.is_empty() {
            true => self.text.clone(),
            false => format!("{}: {}", self.heading, self.text),
        }
    }
}

/// An index and what is needed to ask it.
pub struct Retriever {
    device: Arc<dyn Device>,
    embedder: Embedder,
    passages: Vec<Passage>,
    vectors: Vec<f32>,
}

impl Retriever {
    /// Builds the index of documents.
    pub fn build(
        config: &super::Config,
        embedder: Embedder,
        device: Arc<dyn Device>,
        tell: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Retriever, Halt> {
        let mut passages = Vec::new();
        for file in files(&config.docs)? {
            let text = fs::read_to_string(&file).map_err(|cause| Error::io(&file, cause))?;
            for paragraph in text.split("\n\n").filter(|text| !text.trim().is_empty() && !text.starts_with('#')) {
                passages.push(Passage {
                    score: 0.0,
                    path: file.display().to_string(),
                    lines: (1, 1),
                    heading: String::new(),
                    text: paragraph.trim().to_string(),
                });
            }
        }
        let texts: Vec<&str> = passages.iter().map(|passage| passage.text.as_str()).collect();
        let mut vectors = Vec::new();
        for chunk in texts.chunks(64) {
            vectors.extend(embedder.embed_lines(chunk)?);
            if !tell(vectors.len() / embedder.width(), texts.len()) {
                return Err(Halt::Interrupted);
            }
        }
        Ok(Retriever { device, embedder, passages, vectors })
    }

    /// Seconds the index took to build, where it was found built.
    pub fn built_s(&self) -> Option<f64> {
        None
    }

    /// Bytes of the index.
    pub fn bytes(&self) -> u64 {
        4 * self.vectors.len() as u64
    }

    /// How many documents are in it.
    pub fn documents(&self) -> usize {
        let mut paths: Vec<&str> = self.passages.iter().map(|passage| passage.path.as_str()).collect();
        paths.dedup();
        paths.len()
    }

    /// How many passages.
    pub fn chunks(&self) -> usize {
        self.passages.len()
    }

    /// The k best passages for each text.
    pub fn passages(&self, texts: &[&str], k: usize) -> Result<Vec<Vec<Passage>>, Error> {
        let queries = self.embedder.embed_lines(texts)?;
        let corpus = Corpus { d: self.embedder.width(), rows: Rows::F32(&self.vectors) };
        let hits = topk::search(&*self.device, &corpus, &queries, k, None)?;
        let passage = |hit: topk::Hit| Passage { score: hit.score, ..self.passages[hit.row as usize].clone() };
        Ok(hits.into_iter().map(|hits| hits.into_iter().map(passage).collect()).collect())
    }
}

/// Every document below the paths, in order.
pub fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) -> Result<(), Error> {
        let fail = |cause| Error::io(path, cause);
        if fs::metadata(path).map_err(fail)?.is_dir() {
            let entries = fs::read_dir(path).map_err(fail)?.collect::<Result<Vec<_>, _>>().map_err(fail)?;
            let mut inside: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
            inside.sort();
            return inside.iter().try_for_each(|path| walk(path, found));
        }
        found.push(path.to_path_buf());
        Ok(())
    }
    let mut found = Vec::new();
    paths.iter().try_for_each(|path| walk(path, &mut found))?;
    Ok(found)
}
