//! Files to index: only what changed is read, cut and embedded, and what is done stays done.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::check_model;
use super::database::Meta;
use super::writer::{Ready, Step, Writer};
use crate::error::Error;
use crate::model::adapter::sha256;
use crate::model::generate::Embedder;
use crate::retrieve::chunk::{chunks, Chunking};
use crate::retrieve::document::{self, Document};
use crate::retrieve::files::{self, Found, Skipped, Source};

/// Passages embedded between two looks at whether to stop: enough to sort into batches of like lengths.
const GROUP: usize = 256;
/// Passages that become visible together at most, give or take a document.
pub const SAVE_EVERY: usize = 8192;
/// Seconds of work that a power cut may cost.
const COMMIT_SECONDS: u64 = 20;

/// How to build.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// How documents are cut; none for the index's own way, or the default for a new one.
    pub chunking: Option<Chunking>,
    /// Passages that become visible together; none for [`SAVE_EVERY`]. Each time makes a segment.
    pub save_every: Option<usize>,
}

/// How far a build is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of files that are done.
    pub bytes: u64,
    /// Bytes of files that changed.
    pub total: u64,
    /// Passages embedded.
    pub chunks: usize,
}

/// What a build did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Documents that were not there before.
    pub added: usize,
    /// Documents that were otherwise before.
    pub changed: usize,
    /// Documents that are as they were.
    pub unchanged: usize,
    /// Documents that are gone.
    pub removed: usize,
    /// Passages embedded.
    pub chunks: usize,
    /// Files and folders left out.
    pub skipped: Vec<Skipped>,
    /// Files of kinds that hold no text known here.
    pub other: usize,
    /// True when it was told to stop: what it says is done, the rest is not.
    pub interrupted: bool,
}

/// Makes the index of the files below `docs`, or brings one up to date: what is new or changed is embedded, documents
/// of files that are no longer there are removed. `progress` may return false to stop.
pub fn build(
    dir: &Path,
    docs: &[PathBuf],
    embedder: &Embedder,
    options: &Options,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Report, Error> {
    bring(dir, docs, embedder, options, true, progress)
}

/// Adds the files below `docs` to an index; other documents stay.
pub fn add(
    dir: &Path,
    docs: &[PathBuf],
    embedder: &Embedder,
    options: &Options,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Report, Error> {
    bring(dir, docs, embedder, options, false, progress)
}

fn bring(
    dir: &Path,
    docs: &[PathBuf],
    embedder: &Embedder,
    options: &Options,
    all: bool,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Report, Error> {
    let found = files::scan(docs)?;
    if found.sources.is_empty() && found.skipped.is_empty() {
        let names: Vec<String> = docs.iter().map(|path| path.display().to_string()).collect();
        let kinds = document::Kind::KNOWN.join(", ");
        let what = format!("{}: no file of a kind that can be read ({kinds})", names.join(", "));
        return Err(Error::Request(what));
    }
    let default = Chunking::default();
    let most = default.max_tokens.min(embedder.max_tokens);
    let chunking = options.chunking.unwrap_or(Chunking { max_tokens: most, join: default.join.min(most), ..default });
    chunking.check()?;
    if chunking.max_tokens > embedder.max_tokens {
        let (asked, most) = (chunking.max_tokens, embedder.max_tokens);
        return Err(Error::Request(format!("passages of {asked} tokens: this embedding model takes {most}")));
    }
    let meta = Meta { model_hash: embedder.model_hash()?.to_string(), d: embedder.width(), chunking };
    let writer = Writer::open(dir, all.then_some(&meta))?;
    check_model(dir, &writer.meta, embedder)?;
    if let Some(asked) = options.chunking.filter(|asked| *asked != writer.meta.chunking) {
        return Err(Error::file(dir, otherwise(&writer.meta.chunking, &asked)));
    }
    let mut run = Run {
        embedder,
        writer,
        report: Report { skipped: found.skipped.clone(), other: found.other, ..Report::default() },
        queue: VecDeque::new(),
        embedded: 0,
        save_every: options.save_every.unwrap_or(SAVE_EVERY).max(1),
        last_commit: Instant::now(),
        told: Progress::default(),
        progress,
    };
    run.all(&found)?;
    if all && !run.report.interrupted {
        run.drop_missing(&found)?;
    }
    run.writer.settle();
    if run.report.added + run.report.changed + run.report.unchanged == 0 && !run.report.interrupted {
        let why: Vec<String> = files::tell(&run.report.skipped, 5);
        return Err(Error::Request(format!("no file could be indexed; {}", why.join("; "))));
    }
    Ok(run.report)
}

fn otherwise(own: &Chunking, asked: &Chunking) -> String {
    let say = |c: &Chunking| format!("{} tokens, joined to {}, overlap {}", c.max_tokens, c.join, c.overlap);
    format!(
        "cuts documents otherwise ({}; asked for: {}): leave these flags out, or build another index",
        say(own),
        say(asked)
    )
}

struct Run<'a> {
    embedder: &'a Embedder,
    writer: Writer,
    report: Report,
    /// What is to become visible, in order; the passages of the first `embedded` steps' documents have vectors.
    queue: VecDeque<Queued>,
    embedded: usize,
    save_every: usize,
    last_commit: Instant,
    told: Progress,
    progress: &'a mut dyn FnMut(Progress) -> bool,
}

/// A step, and what it adds to the report once it is done.
struct Queued {
    step: Step,
    changed: bool,
    unchanged: usize,
    bytes: u64,
}

/// A document in the index.
struct Old {
    id: i64,
    hash: Vec<u8>,
}

impl Run<'_> {
    fn go_on(&mut self) -> bool {
        if !(self.progress)(self.told) {
            self.report.interrupted = true;
        }
        !self.report.interrupted
    }

    fn all(&mut self, found: &Found) -> Result<(), Error> {
        let changed = self.changed(found)?;
        self.told.total = changed.iter().map(|source| source.bytes).sum();
        let mut waiting = 0;
        for source in changed {
            if !self.go_on() {
                break;
            }
            waiting += self.read(source)?;
            if waiting >= GROUP.min(self.save_every) {
                self.embed()?;
                waiting = 0;
            }
        }
        if !self.report.interrupted {
            self.embed()?;
        }
        self.commit()
    }

    /// The files whose bytes are not those that were indexed.
    fn changed<'f>(&mut self, found: &'f Found) -> Result<Vec<&'f Source>, Error> {
        let (known, counts) = self.writer.database.with(|connection| {
            let mut query = connection.prepare("SELECT path, hash FROM sources")?;
            let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            let known: HashMap<String, Vec<u8>> = rows.collect::<Result<_, _>>()?;
            let mut query = connection.prepare("SELECT source, count(*) FROM documents GROUP BY source")?;
            let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            let counts: HashMap<String, i64> = rows.collect::<Result<_, _>>()?;
            Ok((known, counts))
        })?;
        let mut changed = Vec::new();
        for group in found.sources.chunks(64) {
            if !self.go_on() {
                break;
            }
            let hash =
                |source: &Source| known.contains_key(&source.path).then(|| files::read(source).map(|b| sha256(&b)));
            let hashes: Vec<_> = group.par_iter().map(hash).collect();
            for (source, hash) in group.iter().zip(hashes) {
                match hash {
                    Some(Ok(hash)) if known[&source.path] == hash => {
                        self.report.unchanged += counts.get(&source.path).map_or(0, |&count| count as usize);
                    }
                    _ => changed.push(source),
                }
            }
        }
        Ok(changed)
    }

    /// Queues what a file's documents ask for; gives the count of passages to embed.
    fn read(&mut self, source: &Source) -> Result<usize, Error> {
        let read = files::read(source).and_then(|bytes| {
            let hash = sha256(&bytes);
            Ok((document::documents(source, bytes)?, hash))
        });
        let (documents, hash) = match read {
            Ok(read) => read,
            Err(reason) => {
                self.report.skipped.push(Skipped { path: source.path.clone(), reason });
                self.told.bytes += source.bytes;
                return Ok(0);
            }
        };
        let mut before: HashMap<String, Old> = self.writer.database.with(|connection| {
            let mut query = connection.prepare("SELECT path, id, hash FROM documents WHERE source = ?1")?;
            let rows =
                query.query_map([&source.path], |row| Ok((row.get(0)?, Old { id: row.get(1)?, hash: row.get(2)? })))?;
            rows.collect()
        })?;
        let mut moved: Vec<(i64, u32)> = Vec::new();
        let mut fresh: Vec<(Document, bool)> = Vec::new();
        let mut unchanged = 0;
        for document in documents {
            match before.remove(&document.path) {
                Some(old) if old.hash == document.hash => {
                    moved.extend(document.line.map(|line| (old.id, line)));
                    unchanged += 1;
                }
                old => fresh.push((document, old.is_some())),
            }
        }
        let (tokenizer, chunking) = (&self.embedder.tokenizer, &self.writer.meta.chunking);
        let cut = |(document, _): &(Document, bool)| chunks(document, tokenizer, chunking);
        let cut = fresh.par_iter().map(cut).collect::<Result<Vec<_>, _>>()?;
        let mut rest = source.bytes;
        if fresh.len() == 1 && cut[0].is_empty() {
            self.report.skipped.push(Skipped { path: source.path.clone(), reason: "holds no text".into() });
        }
        let total: usize = cut.iter().map(Vec::len).sum();
        for ((document, changed), chunks) in fresh.into_iter().zip(cut) {
            let bytes = source.bytes * chunks.len() as u64 / total.max(1) as u64;
            rest -= bytes;
            let document = Document { blocks: Vec::new(), ..document };
            let step = Step::Put(Ready { document, source: source.path.clone(), chunks, vectors: Vec::new() });
            self.queue.push_back(Queued { step, changed, unchanged: 0, bytes });
        }
        let gone = before.into_values().map(|old| old.id).collect();
        let step = Step::Whole { source: source.path.clone(), hash, gone, moved };
        self.queue.push_back(Queued { step, changed: false, unchanged, bytes: rest });
        Ok(total)
    }

    /// Embeds the queue's passages, a group at a time, until told to stop.
    fn embed(&mut self) -> Result<(), Error> {
        while self.embedded < self.queue.len() {
            let (mut end, mut texts) = (self.embedded, Vec::new());
            while end < self.queue.len() && texts.len() < GROUP.min(self.save_every) {
                if let Step::Put(ready) = &self.queue[end].step {
                    texts.extend(ready.chunks.iter().map(|chunk| chunk.embedded()));
                }
                end += 1;
            }
            let (mut vectors, d) = (Vec::with_capacity(texts.len() * self.embedder.width()), self.embedder.width());
            for group in texts.chunks(GROUP) {
                vectors.extend(self.embedder.embed_lines(group)?);
                self.told.chunks += group.len();
                if !self.go_on() {
                    // A document that is not embedded whole is not done.
                    break;
                }
            }
            let mut rest = &vectors[..];
            while self.embedded < end {
                let queued = &mut self.queue[self.embedded];
                if let Step::Put(ready) = &mut queued.step {
                    let Some((own, after)) = rest.split_at_checked(ready.chunks.len() * d) else { return Ok(()) };
                    ready.vectors = own.to_vec();
                    rest = after;
                }
                self.told.bytes += queued.bytes;
                self.embedded += 1;
            }
            if self.report.interrupted {
                return Ok(());
            }
            let due = self.last_commit.elapsed() > Duration::from_secs(COMMIT_SECONDS);
            let held: usize = self.queue.iter().take(self.embedded).map(|queued| queued.step.chunks()).sum();
            if due || held >= self.save_every {
                self.commit()?;
            }
        }
        Ok(())
    }

    /// Makes what is embedded visible.
    fn commit(&mut self) -> Result<(), Error> {
        let done: Vec<Queued> = self.queue.drain(..self.embedded).collect();
        self.embedded = 0;
        self.last_commit = Instant::now();
        if done.is_empty() {
            return Ok(());
        }
        for queued in &done {
            self.report.chunks += queued.step.chunks();
            self.report.unchanged += queued.unchanged;
            match &queued.step {
                Step::Put(_) if queued.changed => self.report.changed += 1,
                Step::Put(_) => self.report.added += 1,
                Step::Whole { gone, .. } => self.report.removed += gone.len(),
            }
        }
        let steps: Vec<Step> = done.into_iter().map(|queued| queued.step).collect();
        self.writer.commit(&steps)
    }

    /// Removes the documents of files that are no longer there; what could not be looked at stays.
    fn drop_missing(&mut self, found: &Found) -> Result<(), Error> {
        let there: HashSet<&str> = found.sources.iter().map(|source| source.path.as_str()).collect();
        let unseen = |source: &str| {
            self.report.skipped.iter().any(|one| {
                let below = |rest: &str| rest.is_empty() || rest.starts_with('/') || one.path.is_empty();
                source.strip_prefix(one.path.as_str()).is_some_and(below)
            })
        };
        let removed = self.writer.remove_where(|_, source| !there.contains(source) && !unseen(source))?;
        self.report.removed += removed.documents;
        Ok(())
    }
}
