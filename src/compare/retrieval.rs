//! Passages for questions: the one place where a comparison meets the index.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{stages, Config, Halt};
use crate::device::Device;
use crate::error::Error;
use crate::model::generate::Embedder;
use crate::retrieve::files;
use crate::retrieve::index::{self, Index, Options, Passage};

/// The index's folder below the directory.
pub const FOLDER: &str = "index";

/// How the index was built.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Built {
    /// Seconds it took, those of runs that were cut off among them.
    pub seconds: f64,
    /// Its bytes.
    pub bytes: u64,
    /// Documents in it.
    pub documents: usize,
    /// Passages in it.
    pub chunks: usize,
    /// Some of it was there before: the seconds are those of the rest.
    pub partly: bool,
    /// Files that were left out, and why.
    pub skipped: Vec<String>,
}

/// An index and what is needed to ask it.
pub struct Retriever {
    device: Arc<dyn Device>,
    embedder: Embedder,
    index: Index,
    /// How it was built.
    pub built: Built,
}

/// The SHA-256 of every document, with its path, a line each. Errors: a path that is not there, no document.
pub fn fingerprint(config: &Config) -> Result<String, Error> {
    let found = files::scan(&config.docs)?;
    if found.sources.is_empty() {
        let path = config.docs.first().map_or(Path::new(""), |path| path);
        return Err(Error::file(path, "holds no document that can be indexed: name text, Markdown, HTML or PDF files"));
    }
    let mut text = String::new();
    for source in &found.sources {
        let hash = stages::file_sha256(&source.file).unwrap_or_else(|error| error.to_string());
        text += &format!("{hash}  {}\n", source.path);
    }
    Ok(text)
}

impl Retriever {
    /// Opens the index of the documents; it is built, or brought up to date, unless `key` says that it was.
    pub fn open(
        config: &Config,
        embedder: Embedder,
        device: Arc<dyn Device>,
        key: &str,
        tell: &mut dyn FnMut(usize, usize, usize) -> bool,
    ) -> Result<Retriever, Halt> {
        let dir = config.out.join(FOLDER);
        if let Some(built) = stages::load::<Built>(&config.out, "index", key) {
            if let Ok(index) = Index::open(&dir, &embedder) {
                return Ok(Retriever { index: index.keep_on(&device), device, embedder, built });
            }
        }
        // Seconds and passages of runs that were cut off.
        let (spent, made): (f64, usize) = stages::load(&config.out, "index-part", key).unwrap_or_default();
        let start = Instant::now();
        let report = index::build(&dir, &config.docs, &embedder, &Options::default(), &mut |progress| {
            let so_far = (spent + start.elapsed().as_secs_f64(), made + progress.chunks);
            if let Err(error) = stages::save(&config.out, "index-part", key, &so_far) {
                log::warn!("{error}");
            }
            tell(progress.bytes as usize, progress.total as usize, progress.chunks)
        })?;
        let seconds = spent + start.elapsed().as_secs_f64();
        if report.interrupted {
            return Err(Halt::Interrupted);
        }
        let index = Index::open(&dir, &embedder)?.keep_on(&device);
        let info = index.info()?;
        let built = Built {
            seconds,
            bytes: info.bytes,
            documents: info.documents,
            chunks: info.chunks,
            partly: made + report.chunks < info.chunks,
            skipped: files::tell(&report.skipped, 3),
        };
        if built.chunks == 0 {
            return Err(Error::file(&dir, "no passage came of the documents: are they empty?").into());
        }
        let built = stages::save(&config.out, "index", key, &built)?;
        Ok(Retriever { device, embedder, index, built })
    }

    /// The k best passages for each text.
    pub fn passages(&self, texts: &[&str], k: usize) -> Result<Vec<Vec<Passage>>, Error> {
        self.index.search(&*self.device, &self.embedder, texts, k, None)
    }
}
