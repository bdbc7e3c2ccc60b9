//! Search over matrices of vectors: `--corpus`, `--queries`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use handmill::npy;
use handmill::retrieve::topk::{Codes, Effort, Exact, Hit, Rows, Searcher};
use handmill::retrieve::vectors::{Bad, Vectors};
use serde_json::json;
use std::io::Write;

use crate::cli::{human_bytes, note, print_json, spinner, Common, Usage};

/// Flags of a search over vectors.
#[derive(Args)]
pub struct VectorSearch {
    /// The rows to search: .npy, .fvecs or .safetensors
    #[arg(long, value_name = "FILE", requires = "queries")]
    corpus: Option<PathBuf>,
    /// The rows to find neighbours of: the same kinds of file
    #[arg(long, value_name = "FILE", requires = "corpus")]
    queries: Option<PathBuf>,
    /// The matrix of a .safetensors corpus that holds several
    #[arg(long, value_name = "NAME", requires = "corpus")]
    tensor: Option<String>,
    /// How to hold the corpus: f32, f16 (scores are those of the rounded rows), or i8 (codes beside the rows; the result
    /// is the same as without them) [default: the corpus's own type]
    #[arg(long, value_enum, requires = "corpus")]
    format: Option<Format>,
    /// Rows that count: a .npy of bool, an element a row
    #[arg(long, value_name = "MASK.npy", requires = "corpus")]
    filter: Option<PathBuf>,
    /// Leave out rows of the corpus that are zero or not finite instead of refusing the file
    #[arg(long, requires = "corpus")]
    drop_bad: bool,
    /// Queries searched for at a time
    #[arg(long, value_name = "N", default_value_t = 1024, requires = "corpus")]
    batch: usize,
    /// Memory of the device for rows of the corpus: those beyond it pass through at each search [default: what there is]
    #[arg(long, value_name = "MIB", requires = "corpus")]
    device_memory: Option<usize>,
    /// Search so many times and report the median time
    #[arg(long, value_name = "N", default_value_t = 1, requires = "corpus")]
    repeat: usize,
    /// Write the rows found: i64[queries, k], -1 where there are fewer
    #[arg(long, value_name = "IDS.npy", requires = "corpus")]
    out_ids: Option<PathBuf>,
    /// Write their scores: f32[queries, k], -inf where there are fewer
    #[arg(long, value_name = "SCORES.npy", requires = "corpus")]
    out_scores: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    F32,
    F16,
    I8,
}

impl VectorSearch {
    /// True when the flags ask for this kind of search.
    pub fn asked(&self) -> bool {
        self.corpus.is_some()
    }

    pub fn run(&self, k: usize, common: &Common) -> Result<()> {
        let (Some(corpus_path), Some(queries_path)) = (&self.corpus, &self.queries) else {
            return Err(Usage("give --corpus and --queries".into()).into());
        };
        if self.batch == 0 || self.repeat == 0 {
            return Err(Usage("--batch and --repeat begin at 1".into()).into());
        }
        let device = common.open_device()?;
        let reading = spinner(format!("reading {}", corpus_path.display()));
        let bad = if self.drop_bad { Bad::Drop } else { Bad::Refuse };
        let advice = "cannot take the corpus (--drop-bad leaves out rows that are zero or not finite)";
        let corpus = Vectors::open(corpus_path, self.tensor.as_deref(), bad).context(advice)?;
        let corpus = match self.format {
            None | Some(Format::I8) => corpus,
            Some(Format::F32) => corpus.into_f32(),
            Some(Format::F16) => corpus.into_f16(),
        };
        let queries = Vectors::open(queries_path, None, Bad::Refuse).context("cannot take the queries")?;
        if queries.d != corpus.d {
            let (ours, theirs) = (queries.d, corpus.d);
            return Err(Usage(format!("queries have {ours} elements, rows of the corpus {theirs}")).into());
        }
        let wanted = self.filter.as_ref().map(|path| read_mask(path, corpus.n)).transpose()?;
        let filter = corpus.filter(wanted.as_deref());
        let codes = matches!(self.format, Some(Format::I8)).then(|| Codes::quantize(corpus.d, corpus.exact()));
        let rows = codes.as_ref().map_or_else(|| corpus.corpus(), |codes| corpus.corpus_by(codes));
        let (format, bytes) = held(&rows.rows);
        let limit = self.device_memory.map_or(usize::MAX, |mib| mib.saturating_mul(1 << 20));
        let searcher = Searcher::within(&*device, rows, limit)?;
        reading.finish_and_clear();

        let elements = queries.to_f32();
        let batches: Vec<&[f32]> = elements.chunks(self.batch.saturating_mul(queries.d)).collect();
        let (mut hits, mut effort, mut times) = (Vec::new(), Effort::default(), Vec::new());
        for _ in 0..self.repeat {
            (hits, effort) = (Vec::with_capacity(queries.n), Effort::default());
            let start = Instant::now();
            for batch in &batches {
                let (found, took) = searcher.search(batch, k, filter.as_deref())?;
                hits.extend(found);
                effort.scored += took.scored;
                effort.widened += took.widened;
                effort.exhausted += took.exhausted;
            }
            times.push(start.elapsed().as_secs_f64() * 1e3 / batches.len().max(1) as f64);
        }
        times.sort_by(f64::total_cmp);
        let ms_per_batch = times[times.len() / 2];
        self.write(&hits, k)?;
        if common.json {
            return print_json(&json!({
                "n": corpus.n,
                "d": corpus.d,
                "queries": queries.n,
                "k": k,
                "ms_per_batch": ms_per_batch,
                "bytes": bytes,
                "device": device.id(),
                "format": format,
                "batch": self.batch.min(queries.n),
                "normalised": corpus.normalised,
                "dropped": corpus.bad.len(),
                "scored": effort.scored,
                "widened": effort.widened,
                "exhausted": effort.exhausted,
            }));
        }
        if self.out_ids.is_none() && self.out_scores.is_none() {
            let mut out = std::io::stdout().lock();
            writeln!(out, "query\trank\trow\tscore")?;
            for (query, hits) in hits.iter().enumerate() {
                for (rank, hit) in hits.iter().enumerate() {
                    writeln!(out, "{query}\t{}\t{}\t{:.6}", rank + 1, hit.row, hit.score)?;
                }
            }
        }
        let (n, d, size) = (corpus.n, corpus.d, human_bytes(bytes as u64));
        let (normalised, dropped) = (corpus.normalised, corpus.bad.len());
        note(&format!("{n} rows of {d} in {format}, {size}; {normalised} brought to unit norm, {dropped} left out"));
        let batch = self.batch.min(queries.n);
        note(&format!("{ms_per_batch:.3} ms a batch of {batch} queries on {}", device.description()));
        Ok(())
    }

    /// Writes the files asked for.
    fn write(&self, hits: &[Vec<Hit>], k: usize) -> Result<()> {
        let places = |hits: &Vec<Hit>| (0..k).map(|place| hits.get(place).copied()).collect::<Vec<_>>();
        let all: Vec<Option<Hit>> = hits.iter().flat_map(places).collect();
        if let Some(path) = &self.out_ids {
            let ids: Vec<i64> = all.iter().map(|hit| hit.map_or(-1, |hit| hit.row as i64)).collect();
            npy::write(path, &[hits.len(), k], &ids)?;
        }
        if let Some(path) = &self.out_scores {
            let scores: Vec<f32> = all.iter().map(|hit| hit.map_or(f32::NEG_INFINITY, |hit| hit.score)).collect();
            npy::write(path, &[hits.len(), k], &scores)?;
        }
        Ok(())
    }
}

/// The format of rows and the bytes that a search reads of them.
fn held(rows: &Rows<'_>) -> (&'static str, usize) {
    match rows {
        Rows::F32(rows) => ("f32", size_of_val(*rows)),
        Rows::F16(rows) => ("f16", size_of_val(*rows)),
        Rows::I8 { codes, exact } => {
            let bytes = codes.codes.len() + 4 * codes.scales.len();
            (if matches!(exact, Exact::F32(_)) { "i8 of f32" } else { "i8 of f16" }, bytes)
        }
    }
}

/// A bitset of the rows for which a mask of `n` elements is true.
fn read_mask(path: &Path, n: usize) -> Result<Vec<u32>> {
    let array = npy::Array::open::<u8>(path).context("cannot take the filter")?;
    if array.shape != [n] {
        let shape = &array.shape;
        return Err(Usage(format!("{}: a mask of shape {shape:?} for {n} rows", path.display())).into());
    }
    let mask: Vec<u8> = array.to_vec();
    let word = |mask: &[u8]| mask.iter().enumerate().fold(0, |word, (i, on)| word | u32::from(*on != 0) << i);
    Ok(mask.chunks(32).map(word).collect())
}
