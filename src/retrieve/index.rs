//! The index of documents: a directory that survives being killed at any moment, with one writer and many readers.
//!
//! ```text
//! index.sqlite                documents, passages, which segment and row each has, which rows are in use
//! segments/00000001.vectors   unit rows, f32[rows, d], written once and mapped
//! .lock                       held by the one writer
//! ```
//!
//! A segment is brought to the disk under its name before one transaction makes its passages visible; a segment that
//! no transaction speaks of is removed by the next writer. A reader keeps the state that it opened.

mod build;
mod database;
mod export;
mod segment;
mod writer;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};

pub use build::{add, build, Options, Progress, Report, SAVE_EVERY};
pub use database::Meta;
pub use export::{CHUNKS, VECTORS};
pub use writer::{compact, remove, Compacted, Removed};

use self::database::Database;
use self::segment::Segment;
use super::chunk::Chunking;
use super::topk::{self, Corpus, Rows};
use crate::device::Device;
use crate::error::{quote, Error};
use crate::model::adapter::{hex, sha256};
use crate::model::generate::Embedder;

/// Tries to open a state whose segments another process removes meanwhile.
const TRIES: usize = 5;

/// An index, opened for reading: one state of it, whatever is written meanwhile.
pub struct Index {
    /// Where it is.
    pub dir: PathBuf,
    /// What holds for all of it.
    pub meta: Meta,
    database: Mutex<Database>,
    segments: Vec<Part>,
}

/// A segment, which of its rows are in use, and what its rows' SHA-256 must be.
struct Part {
    segment: Segment,
    alive: Vec<u32>,
    sha256: String,
}

/// A passage that was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Passage {
    /// Its cosine with the question.
    pub score: f32,
    /// Its document.
    pub path: String,
    /// Its first and last line there, from 1.
    pub lines: (u32, u32),
    /// The headings that it stands under, ` > ` between them.
    pub heading: String,
    /// As it stands in the document.
    pub text: String,
}

impl Passage {
    /// Its headings and what it says.
    pub fn note(&self) -> String {
        match self.heading.is_empty() {
            true => self.text.clone(),
            false => format!("{}: {}", self.heading, self.text),
        }
    }
}

/// What an index holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Documents.
    pub documents: usize,
    /// Passages.
    pub chunks: usize,
    /// Numbers of a vector.
    pub d: usize,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Of the embedding model.
    pub model_hash: String,
    /// Segments.
    pub segments: usize,
    /// Rows of segments whose passages are gone: `index compact` drops them.
    pub dead_rows: usize,
    /// How documents are cut.
    pub chunking: Chunking,
}

/// Which documents count.
pub enum PathFilter {
    /// Those of this path, of this file, or below this folder.
    Prefix(String),
    /// Those whose whole path matches.
    Glob(GlobMatcher),
}

impl PathFilter {
    /// A pattern with any of `*?[{` is a glob, in which `*` stays within one name and `**` does not; all else is a
    /// path or the beginning of one.
    pub fn new(pattern: &str) -> Result<PathFilter, Error> {
        if !pattern.contains(['*', '?', '[', '{']) {
            let path = super::files::display(Path::new(pattern)).unwrap_or_default();
            return Ok(PathFilter::Prefix(path));
        }
        let glob = GlobBuilder::new(pattern).literal_separator(true).build();
        let glob = glob.map_err(|error| Error::Request(format!("{} is no pattern: {error}", quote(pattern))))?;
        Ok(PathFilter::Glob(glob.compile_matcher()))
    }

    /// Whether a document counts.
    pub fn allows(&self, path: &str) -> bool {
        match self {
            PathFilter::Prefix(prefix) => path.strip_prefix(prefix.as_str()).is_some_and(|rest| {
                rest.is_empty() || prefix.is_empty() || prefix.ends_with('/') || rest.starts_with(['/', '#'])
            }),
            PathFilter::Glob(glob) => glob.is_match(path),
        }
    }
}

impl Index {
    /// Opens an index for an embedding model. An error where it was built with another one, or is damaged.
    pub fn open(dir: &Path, embedder: &Embedder) -> Result<Index, Error> {
        let index = Index::open_any(dir)?;
        check_model(dir, &index.meta, embedder)?;
        Ok(index)
    }

    /// Opens an index for what needs no embedding model.
    pub fn open_any(dir: &Path) -> Result<Index, Error> {
        let mut tries = 0;
        loop {
            tries += 1;
            match Index::open_once(dir) {
                // Compaction may have removed a segment between the two looks.
                Err(Error::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound && tries < TRIES => {}
                Err(Error::Io { path, cause }) if cause.kind() == std::io::ErrorKind::NotFound => {
                    return Err(Error::file(&path, "is missing: the index is damaged, build it anew"));
                }
                result => return result,
            }
        }
    }

    fn open_once(dir: &Path) -> Result<Index, Error> {
        let database = Database::read(dir)?;
        let meta = database.meta()?;
        let mut segments = Vec::new();
        for known in database.segments()? {
            let segment = Segment::open(dir, known.id, known.rows, meta.d)?;
            segments.push(Part { segment, alive: known.alive, sha256: known.sha256 });
        }
        Ok(Index { dir: dir.to_path_buf(), meta, database: Mutex::new(database), segments })
    }

    /// What it holds.
    pub fn info(&self) -> Result<Info, Error> {
        let database = self.database();
        let chunks = database.count("SELECT count(*) FROM chunks")?;
        let rows: usize = self.segments.iter().map(|part| part.segment.rows).sum();
        let size = |name: String| std::fs::metadata(self.dir.join(name)).map_or(0, |meta| meta.len());
        let files = ["", "-wal", "-shm"].map(|end| size(format!("{}{end}", database::FILE)));
        Ok(Info {
            documents: database.count("SELECT count(*) FROM documents")?,
            chunks,
            d: self.meta.d,
            bytes: files.iter().sum::<u64>() + self.segments.iter().map(|part| part.segment.bytes()).sum::<u64>(),
            model_hash: self.meta.model_hash.clone(),
            segments: self.segments.len(),
            dead_rows: rows.saturating_sub(chunks),
            chunking: self.meta.chunking,
        })
    }

    /// The documents' paths, in order.
    pub fn documents(&self) -> Result<Vec<String>, Error> {
        self.database().with(|connection| {
            let mut query = connection.prepare("SELECT path FROM documents ORDER BY path")?;
            let paths = query.query_map([], |row| row.get(0))?;
            paths.collect()
        })
    }

    /// SHA-256 in hexadecimal of what the index holds: the model's hash, how documents are cut, and every document's
    /// path and hash. Compaction does not change it.
    pub fn fingerprint(&self) -> Result<String, Error> {
        let Meta { model_hash, d, chunking } = &self.meta;
        let mut text = format!("{model_hash} {d} {chunking:?}\n");
        self.database().with(|connection| {
            let mut query = connection.prepare("SELECT path, hex(hash) FROM documents ORDER BY path")?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                text += &format!("{}  {:?}\n", row.get::<_, String>(1)?, row.get::<_, String>(0)?);
            }
            Ok(())
        })?;
        Ok(hex(&sha256(text.as_bytes())))
    }

    /// Reads everything and checks it: the database's pages, every segment's bytes, and that each row in use has its
    /// passage.
    pub fn verify(&self) -> Result<(), Error> {
        let database = self.database();
        let said: String = database.with(|c| c.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)))?;
        if said != "ok" {
            return Err(database.wrong(quote(&said)));
        }
        let mut rows: HashMap<i64, HashSet<i64>> = HashMap::new();
        database.with(|connection| {
            let mut query = connection.prepare("SELECT segment, row FROM chunks")?;
            let mut found = query.query([])?;
            while let Some(row) = found.next()? {
                rows.entry(row.get(0)?).or_default().insert(row.get(1)?);
            }
            Ok(())
        })?;
        for part in &self.segments {
            part.segment.verify(&part.sha256)?;
            let passages = rows.remove(&part.segment.number).unwrap_or_default();
            let alive = |row: usize| part.alive[row / 32] >> (row % 32) & 1 == 1;
            if (0..part.segment.rows).any(|row| alive(row) != passages.contains(&(row as i64)))
                || passages.iter().any(|&row| row < 0 || row >= part.segment.rows as i64)
            {
                return Err(database.wrong(format!("segment {}: rows and passages differ", part.segment.number)));
            }
        }
        match rows.keys().next() {
            Some(number) => Err(database.wrong(format!("passages of segment {number}, which is not there"))),
            None => Ok(()),
        }
    }

    /// The k best passages for each question, best first; fewer where the filter leaves fewer.
    pub fn search<S: AsRef<str> + Sync>(
        &self,
        device: &dyn Device,
        embedder: &Embedder,
        questions: &[S],
        k: usize,
        filter: Option<&PathFilter>,
    ) -> Result<Vec<Vec<Passage>>, Error> {
        check_model(&self.dir, &self.meta, embedder)?;
        let queries = embedder.embed_lines(questions)?;
        self.search_vectors(device, &queries, k, filter)
    }

    /// The same for the questions' unit vectors, f32[questions, d].
    pub fn search_vectors(
        &self,
        device: &dyn Device,
        queries: &[f32],
        k: usize,
        filter: Option<&PathFilter>,
    ) -> Result<Vec<Vec<Passage>>, Error> {
        let d = self.meta.d;
        let allowed = filter.map(|filter| self.allowed(filter)).transpose()?;
        let mut best: Vec<Vec<(f32, usize, u32)>> = vec![Vec::new(); queries.len() / d];
        for (number, part) in self.segments.iter().enumerate() {
            let bits = allowed.as_ref().map_or(&part.alive, |allowed| &allowed[number]);
            if bits.iter().all(|&word| word == 0) {
                continue;
            }
            let corpus = Corpus { d, rows: Rows::F32(part.segment.vectors()) };
            let found = topk::search(device, &corpus, queries, k, Some(bits))?;
            for (best, hits) in best.iter_mut().zip(found) {
                if let Some(hit) = hits.iter().find(|hit| !hit.score.is_finite() || hit.score.abs() > 1.01) {
                    let what = format!("row {} is no unit vector: the index is damaged, build it anew", hit.row);
                    return Err(Error::file(&part.segment.path, what));
                }
                best.extend(hits.iter().map(|hit| (hit.score, number, hit.row)));
            }
        }
        let database = self.database();
        let passages = |mut hits: Vec<(f32, usize, u32)>| {
            hits.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
            hits.truncate(k);
            hits.into_iter().map(|(score, number, row)| self.passage(&database, score, number, row)).collect()
        };
        best.into_iter().map(passages).collect()
    }

    fn passage(&self, database: &Database, score: f32, number: usize, row: u32) -> Result<Passage, Error> {
        let segment = self.segments[number].segment.number;
        let found = database.with(|connection| {
            let mut query = connection.prepare(
                "SELECT path, first_line, last_line, heading, text FROM chunks JOIN documents ON document = id
                 WHERE segment = ?1 AND row = ?2",
            )?;
            let mut rows = query.query((segment, row))?;
            let Some(row) = rows.next()? else { return Ok(None) };
            let lines: (u32, u32) = (row.get(1)?, row.get(2)?);
            Ok(Some(Passage { score, path: row.get(0)?, lines, heading: row.get(3)?, text: row.get(4)? }))
        })?;
        found.ok_or_else(|| database.wrong(format!("row {row} of segment {segment} has no passage")))
    }

    /// The rows in use whose documents count, for each segment.
    fn allowed(&self, filter: &PathFilter) -> Result<Vec<Vec<u32>>, Error> {
        let mut bits: Vec<Vec<u32>> = self.segments.iter().map(|part| vec![0; part.alive.len()]).collect();
        let place: HashMap<i64, usize> = self.segments.iter().map(|part| part.segment.number).zip(0..).collect();
        let database = self.database();
        database.with(|connection| {
            let mut documents = HashSet::new();
            let mut query = connection.prepare("SELECT id, path FROM documents")?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                if filter.allows(row.get_ref(1)?.as_str()?) {
                    documents.insert(row.get::<_, i64>(0)?);
                }
            }
            let mut query = connection.prepare("SELECT segment, row, document FROM chunks")?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let (segment, at, document): (i64, u32, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
                let word = place.get(&segment).and_then(|&number| bits[number].get_mut(at as usize / 32));
                if let (Some(word), true) = (word, documents.contains(&document)) {
                    *word |= 1 << (at % 32);
                }
            }
            Ok(())
        })?;
        for (bits, part) in bits.iter_mut().zip(&self.segments) {
            bits.iter_mut().zip(&part.alive).for_each(|(bits, alive)| *bits &= alive);
        }
        Ok(bits)
    }

    fn database(&self) -> std::sync::MutexGuard<'_, Database> {
        // A reader that panicked changed nothing.
        self.database.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// An error unless an index was built with this embedding model.
fn check_model(dir: &Path, meta: &Meta, embedder: &Embedder) -> Result<(), Error> {
    let hash = embedder.model_hash()?;
    if meta.model_hash == hash && meta.d == embedder.width() {
        return Ok(());
    }
    let what = format!(
        "was built with another embedding model (sha256 {}.., this one has {}..): give that model, or build an index \
         with this one in another directory",
        quote(meta.model_hash.get(..12).unwrap_or_default()),
        &hash[..12]
    );
    Err(Error::file(dir, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_itself_a_file_or_a_folder() {
        let allows = |pattern: &str, path: &str| PathFilter::new(pattern).unwrap().allows(path);
        assert!(allows("docs", "docs/a.md") && allows("./docs/", "docs/a.md") && allows("docs/a.md", "docs/a.md"));
        assert!(allows("rows.jsonl", "rows.jsonl#7") && allows(".", "anything"));
        assert!(!allows("doc", "docs/a.md") && !allows("docs/a", "docs/a.md") && !allows("a.md", "docs/a.md"));
        assert!(allows("docs/*.md", "docs/a.md") && allows("**/*.md", "docs/b/a.md") && allows("**/a.*", "a.md"));
        assert!(!allows("docs/*.md", "docs/b/a.md") && !allows("*.md", "docs/a.md"));
        assert!(PathFilter::new("[").err().unwrap().to_string().contains("is no pattern"));
    }
}
