//! `handmill search --index`: passages for a question.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use handmill::error::quote;
use handmill::registry::Kind;
use handmill::retrieve::index::{Index, Passage, PathFilter};
use serde_json::{json, Value};

use crate::cli::{open_embedder, print_json, resolve, Common, Usage};

/// Flags of a search by text.
#[derive(Args)]
pub struct Text {
    /// The index, a directory of `handmill index build`
    #[arg(long, value_name = "IDX", requires = "model", requires = "query", conflicts_with = "corpus")]
    index: Option<PathBuf>,
    /// The embedding model that the index was built with, a Hugging Face directory
    #[arg(long, value_name = "EMB", requires = "index")]
    model: Option<PathBuf>,
    /// The question
    #[arg(long, value_name = "TEXT", requires = "index")]
    query: Option<String>,
    /// Only documents of this path or folder, or whose path matches this glob
    #[arg(long, value_name = "PATTERN", requires = "index")]
    path: Option<String>,
}

impl Text {
    /// True when the flags ask for this kind of search.
    pub fn asked(&self) -> bool {
        self.index.is_some()
    }

    pub fn run(&self, k: usize, common: &Common) -> Result<()> {
        let (Some(index), Some(model), Some(query)) = (&self.index, &self.model, &self.query) else {
            return Err(Usage("give --index, --model and --query".into()).into());
        };
        if query.trim().is_empty() {
            return Err(Usage("--query is empty: give a question".into()).into());
        }
        let filter = self.path.as_deref().map(PathFilter::new).transpose()?;
        let device = common.open_device()?;
        let embedder = open_embedder(model, &device)?;
        let index = Index::open(&resolve(Kind::Index, index)?, &embedder)?;
        let start = Instant::now();
        let found = index.search(&*device, &embedder, &[query], k, filter.as_ref())?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let passages = &found[0];
        if common.json {
            let device = device.id();
            return print_json(&json!({"hits": hits(passages), "query": query, "ms": ms, "device": device}));
        }
        let mut out = io::stdout();
        for (rank, passage) in (1..).zip(passages) {
            writeln!(out, "{}", citation(rank, passage))?;
            if !passage.heading.is_empty() {
                writeln!(out, "    {}", quote(&passage.heading))?;
            }
            for line in passage.text.lines().filter(|line| !line.trim().is_empty()) {
                writeln!(out, "    {}", shown(line))?;
            }
            writeln!(out)?;
        }
        if passages.is_empty() {
            super::super::note("nothing found: the index, or what --path leaves of it, is empty");
        }
        Ok(())
    }
}

/// Passages as JSON, best first.
pub fn hits(passages: &[Passage]) -> Value {
    let hit = |(rank, p): (usize, &Passage)| {
        let (lines, text) = ([p.lines.0, p.lines.1], &p.text);
        json!({"rank": rank, "score": p.score, "path": p.path, "lines": lines, "heading": p.heading, "text": text})
    };
    (1..).zip(passages).map(hit).collect()
}

/// `[n] path:lines score`.
pub fn citation(rank: usize, passage: &Passage) -> String {
    let (first, last) = passage.lines;
    let lines = if first == last { first.to_string() } else { format!("{first}-{last}") };
    format!("[{rank}] {}:{lines} {:.3}", quote(&passage.path), passage.score)
}

/// A line of a document for a terminal: control characters cannot steer it.
fn shown(line: &str) -> String {
    line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}
