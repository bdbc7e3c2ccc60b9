//! `handmill index`: documents to search in.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, Subcommand};
use handmill::error::quote;
use handmill::registry::entries::Source;
use handmill::registry::record::Product;
use handmill::registry::Kind;
use handmill::retrieve::chunk::Chunking;
use handmill::retrieve::files;
use handmill::retrieve::index::{self, Index as Opened, Options, Progress, Report, SAVE_EVERY};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{json, Value};

use super::register::model_hash;
use super::{
    human_bytes, note, open_embedder, peak_bytes, print_json, resolve, stop_on_interrupt, Common, Interrupted,
    RegisterFlag, Usage,
};

/// Files left out that are named one by one.
const TOLD: usize = 20;

/// Make and keep an index of documents, to search and ask
///
/// An index is a directory. It is written by one process at a time, read by any number, and whole at any moment: a
/// run that is cut off is finished by running it again.
#[derive(Args)]
pub struct Index {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Build(Build),
    Add(Add),
    Remove(Remove),
    Info(Info),
    Compact(Compact),
    Export(Export),
}

/// Index the files below folders, or bring their index up to date
///
/// Reads .txt .rst .md .html .pdf and .jsonl (rows with text, and title, path or id if they like). Only what changed
/// since the last run is embedded; documents that are no longer there leave the index (`index add` keeps them).
/// Hidden files and links are not followed. Documents are named as --docs is written: write it alike each time. Ctrl-C
/// keeps what is done. With --json: out, status, added, changed, unchanged, removed, chunks, skipped:
/// [{path, reason}], other_files, seconds, chunks_per_s, device, peak_bytes.
#[derive(Args)]
struct Build {
    #[command(flatten)]
    files: Files,
    /// The index, a directory
    #[arg(long, value_name = "IDX")]
    out: PathBuf,
    #[command(flatten)]
    register: RegisterFlag,
    #[command(flatten)]
    common: Common,
}

/// Add files to an index, or bring them up to date in it
///
/// As build, but documents that are not below these folders stay.
#[derive(Args)]
struct Add {
    #[command(flatten)]
    index: Which,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    common: Common,
}

/// Which index: by place or by name, as scripts like.
#[derive(Args)]
struct Which {
    /// The index
    #[arg(value_name = "IDX", required_unless_present = "index")]
    at: Option<PathBuf>,
    /// The same, by name
    #[arg(long, value_name = "IDX", conflicts_with = "at")]
    index: Option<PathBuf>,
}

impl Which {
    fn path(&self) -> Result<PathBuf> {
        resolve(Kind::Index, self.at.as_deref().or(self.index.as_deref()).expect("clap asks for one of them"))
    }
}

#[derive(Args)]
struct Files {
    /// The embedding model, a Hugging Face directory
    #[arg(long, value_name = "EMB")]
    model: PathBuf,
    /// Folders and files to index
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    docs: Vec<PathBuf>,
    /// Tokens of a passage at most [default: 256, or what the model takes]
    #[arg(long, value_name = "N")]
    chunk_tokens: Option<usize>,
    /// Put whole paragraphs together up to so many tokens [default: 32]
    #[arg(long, value_name = "N")]
    join: Option<usize>,
    /// Tokens that passages cut out of one long paragraph share [default: 32]
    #[arg(long, value_name = "N")]
    overlap: Option<usize>,
    /// Passages that a run that is killed may lose; twenty seconds' work at most
    #[arg(long, value_name = "N", default_value_t = SAVE_EVERY)]
    save_every: usize,
}

/// Remove documents from an index
///
/// Their passages are gone at once; `index compact` gives their room back. With --json: documents, chunks.
#[derive(Args)]
struct Remove {
    /// The index, where it is not the first word
    #[arg(long, value_name = "IDX")]
    index: Option<PathBuf>,
    /// The index, then paths as it has them, folders, or globs
    #[arg(value_name = "IDX> <PATTERN", required = true)]
    words: Vec<String>,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Show what an index holds
///
/// With --json: documents, chunks, d, bytes, model_hash, segments, dead_rows, chunking, and paths with --list.
#[derive(Args)]
struct Info {
    #[command(flatten)]
    index: Which,
    /// List the documents
    #[arg(long)]
    list: bool,
    /// Read everything and check it
    #[arg(long)]
    verify: bool,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Write an index's vectors anew, without those of documents that are gone
///
/// With --json: bytes_before, bytes_after, dead_rows.
#[derive(Args)]
struct Compact {
    #[command(flatten)]
    index: Which,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Write an index as files that other engines load
///
/// vectors.npy, f32[passages, d], unit rows; chunks.parquet, a row a vector: id, path, first_line, last_line, heading,
/// text, document_sha256. With --json: out, chunks, d.
#[derive(Args)]
struct Export {
    #[command(flatten)]
    index: Which,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

impl Index {
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Command::Build(build) => {
                build.register.check(&[("", Kind::Index)])?;
                let report = bring(&build.out, &build.files, &build.common, true)?;
                let model = model_hash(&resolve(Kind::Model, &build.files.model)?)?;
                let parents: Vec<_> = model.into_iter().map(|(_, hash)| ("embedder".to_string(), hash)).collect();
                let (kind, source) = (Kind::Index, Source::InPlace(&build.out));
                let product = |name| Product { name, kind, source, parents: Vec::new() };
                build.register.leave("index-build", &report, &parents, vec![build.register.name("").map(product)])
            }
            Command::Add(add) => bring(&add.index.path()?, &add.files, &add.common, false).map(|_| ()),
            Command::Remove(remove) => remove.run(),
            Command::Info(info) => info.run(),
            Command::Compact(compact) => compact.run(),
            Command::Export(export) => export.run(),
        }
    }
}

impl Files {
    /// What the flags ask for; what they leave open is the index's own, or the default.
    fn chunking(&self, dir: &Path, most: usize) -> Result<Option<Chunking>> {
        let Files { chunk_tokens, join, overlap, .. } = *self;
        if (chunk_tokens, join, overlap) == (None, None, None) {
            return Ok(None);
        }
        let default = Chunking::default();
        let max_tokens = chunk_tokens.unwrap_or(default.max_tokens.min(most));
        let new =
            Chunking { max_tokens, join: default.join.min(max_tokens), overlap: default.overlap.min(max_tokens / 4) };
        let base = if dir.join("index.sqlite").is_file() { Opened::open_any(dir)?.meta.chunking } else { new };
        let chunking = Chunking {
            max_tokens: chunk_tokens.unwrap_or(base.max_tokens),
            join: join.unwrap_or(base.join),
            overlap: overlap.unwrap_or(base.overlap),
        };
        chunking.check().map_err(|error| Usage(error.to_string()))?;
        Ok(Some(chunking))
    }
}

fn bring(dir: &Path, files: &Files, common: &Common, all: bool) -> Result<Value> {
    let device = common.open_device()?;
    let embedder = open_embedder(&files.model, &device)?;
    let chunking = files.chunking(dir, embedder.max_tokens)?;
    let options = Options { chunking, save_every: Some(files.save_every) };
    let stop = stop_on_interrupt()?;
    let (bar, start) = (bar(), Instant::now());
    let mut show = |progress: Progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.bytes);
        let rate = progress.chunks as f64 / start.elapsed().as_secs_f64().max(1e-9);
        bar.set_message(format!("{} passages, {rate:.0}/s", progress.chunks));
        !stop.load(Ordering::SeqCst)
    };
    let report = match all {
        true => index::build(dir, &files.docs, &embedder, &options, &mut show),
        false => index::add(dir, &files.docs, &embedder, &options, &mut show),
    };
    bar.finish_and_clear();
    let report = report?;
    let seconds = start.elapsed().as_secs_f64();
    let object = report_json(dir, &report, seconds, device.id());
    match common.json {
        true => print_json(&object)?,
        false => tell(dir, &report, seconds)?,
    }
    match report.interrupted {
        true => Err(Interrupted.into()),
        false => Ok(object),
    }
}

fn bar() -> ProgressBar {
    let template = "{bar:30} {bytes} of {total_bytes}, {msg}, {eta} left";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

fn report_json(dir: &Path, report: &Report, seconds: f64, device: &str) -> Value {
    let skipped = report.skipped.iter().map(|one| json!({"path": one.path, "reason": one.reason}));
    json!({
        "out": dir.display().to_string(),
        "status": if report.interrupted { "interrupted" } else { "done" },
        "added": report.added,
        "changed": report.changed,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "chunks": report.chunks,
        "skipped": skipped.collect::<Value>(),
        "other_files": report.other,
        "seconds": seconds,
        "chunks_per_s": report.chunks as f64 / seconds.max(1e-9),
        "device": device,
        "peak_bytes": peak_bytes(),
    })
}

fn tell(dir: &Path, report: &Report, seconds: f64) -> Result<()> {
    files::tell(&report.skipped, TOLD).iter().for_each(|line| note(line));
    if report.other > 0 {
        note(&format!("left out: files of other kinds, {}", report.other));
    }
    let Report { added, changed, unchanged, removed, chunks, .. } = report;
    writeln!(
        io::stdout(),
        "{}: documents {added} added, {changed} changed, {removed} removed, {unchanged} as they were",
        dir.display()
    )?;
    let rate = *chunks as f64 / seconds.max(1e-9);
    note(&format!("passages embedded: {chunks} in {seconds:.1} s, {rate:.1}/s"));
    if report.interrupted {
        note("interrupted: what is done is kept, run the command again to go on");
    }
    Ok(())
}

impl Remove {
    fn run(&self) -> Result<()> {
        let (dir, paths) = match (&self.index, self.words.split_first()) {
            (Some(dir), _) => (dir.clone(), &self.words[..]),
            (None, Some((dir, paths))) if !paths.is_empty() => (PathBuf::from(dir), paths),
            _ => return Err(Usage("name the index, then what to remove: paths, folders or globs".into()).into()),
        };
        let removed = index::remove(&resolve(Kind::Index, &dir)?, paths)?;
        if self.json {
            return print_json(&json!({"documents": removed.documents, "chunks": removed.chunks}));
        }
        writeln!(io::stdout(), "removed: documents {}, passages {}", removed.documents, removed.chunks)?;
        Ok(())
    }
}

impl Info {
    fn run(&self) -> Result<()> {
        let index = Opened::open_any(&self.index.path()?)?;
        if self.verify {
            index.verify()?;
        }
        let info = index.info()?;
        let paths = if self.list { index.documents()? } else { Vec::new() };
        if self.json {
            let mut object = json!({
                "documents": info.documents,
                "chunks": info.chunks,
                "d": info.d,
                "bytes": info.bytes,
                "model_hash": info.model_hash,
                "segments": info.segments,
                "dead_rows": info.dead_rows,
                "chunking": info.chunking,
            });
            if self.list {
                object["paths"] = json!(paths);
            }
            return print_json(&object);
        }
        let mut out = io::stdout();
        for path in &paths {
            writeln!(out, "{}", quote(path))?;
        }
        let chunking = info.chunking;
        writeln!(out, "documents   {}", info.documents)?;
        writeln!(out, "passages    {} of {} numbers each", info.chunks, info.d)?;
        writeln!(out, "size        {}", human_bytes(info.bytes))?;
        let packed = if info.dead_rows > 0 { ", which `handmill index compact` drops" } else { "" };
        writeln!(out, "segments    {}; rows no longer used: {}{packed}", info.segments, info.dead_rows)?;
        writeln!(
            out,
            "passages of {} tokens at most, paragraphs joined to {}, overlap {}",
            chunking.max_tokens, chunking.join, chunking.overlap
        )?;
        writeln!(out, "model       sha256 {}", info.model_hash)?;
        if self.verify {
            writeln!(out, "everything was read and is as it was written")?;
        }
        Ok(())
    }
}

impl Compact {
    fn run(&self) -> Result<()> {
        let done = index::compact(&self.index.path()?)?;
        let (before, after) = (done.bytes_before, done.bytes_after);
        if self.json {
            return print_json(&json!({"bytes_before": before, "bytes_after": after, "dead_rows": done.dead_rows}));
        }
        let (before, after) = (human_bytes(before), human_bytes(after));
        writeln!(io::stdout(), "{before} before, {after} now; rows dropped: {}", done.dead_rows)?;
        Ok(())
    }
}

impl Export {
    fn run(&self) -> Result<()> {
        let index = Opened::open_any(&self.index.path()?)?;
        let chunks = index.export(&self.out)?;
        if self.json {
            let out = self.out.display().to_string();
            return print_json(&json!({"out": out, "chunks": chunks, "d": index.meta.d}));
        }
        let out = self.out.display();
        writeln!(io::stdout(), "{out}: vectors.npy f32[{chunks}, {}], chunks.parquet", index.meta.d)?;
        Ok(())
    }
}
