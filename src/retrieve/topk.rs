//! Exact search: of N unit rows the k nearest to each query by cosine, ties by the lower row.
//!
//! ```text
//! score[q,n] = fl32(Σ_d queries[q,d]·rows[n,d]), the products summed in f64 in the order of d
//! hits[q]    = the k largest by (score descending, n ascending), k cut to the rows that the filter leaves
//! ```
//!
//! One fixed order of sums makes the hits of a query the same bits for any batch, split, thread count and device. A
//! kernel's scores are only near these, so it finds candidates, and a bound proves that none is missing:
//!
//! ```text
//! 1. scan     the rows with the kernel: the k + margin best by its scores a; no row left out has more than `outside`
//! 2. settle   |a − score| ≤ E for every row, E derived from how the kernel rounds (or the codes do): compute the score
//!             of the first k and of each further candidate with a + E ≥ the k-th of those
//! 3. prove    outside + E < the k-th score: no row left out can be among the k
//! 4. or widen scan anew for what reaches the k-th score − E; then with a kernel that rounds less; at last compute the
//!             score of every row
//! ```
//!
//! Rows are finite; one that holds NaN is never found.

mod codes;
mod scan;
mod slabs;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use half::f16;
use rayon::prelude::*;

use crate::device::Device;
use crate::ops::cosine_topk::select::{Best, Scored};
use crate::Error;

pub use codes::Codes;
use scan::{Candidates, Pass};

/// The most hits that a search gives.
pub const MAX_K: usize = 2048;
/// The largest norm that rows may have: one, but for the rounding of their elements.
pub const MAX_NORM: f64 = 1.01;
/// Rows whose scores a task computes where every row counts.
const RUN: usize = 1024;
/// Rows whose scores are summed side by side, each in its own order: an addition takes as long as several may.
const TOGETHER: usize = 8;

/// Rows of unit norm, one vector each, and how they are stored. No row's norm is beyond [`MAX_NORM`]: else hits may be
/// missing.
#[derive(Clone, Copy)]
pub struct Corpus<'a> {
    /// Elements of a row.
    pub d: usize,
    /// N·d elements, row-major.
    pub rows: Rows<'a>,
}

/// A corpus's elements.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// Rounded to half precision: the scores are those of the rounded rows.
    F16(&'a [f16]),
    /// Codes of 8 bits, which are searched first, beside the rows they stand for, whose scores the hits have: a quarter
    /// of the memory passes by, and the hits are the same.
    I8 {
        /// The codes, with how far from their rows they are.
        codes: &'a Codes<'a>,
        /// The rows.
        exact: Exact<'a>,
    },
}

/// Rows whose products are the scores.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub enum Exact<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// One row found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The row.
    pub row: u32,
    /// Its cosine with the query.
    pub score: f32,
}

/// What a search took beyond one scan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Scores computed in f64.
    pub scored: usize,
    /// Queries whose first scan did not prove its hits.
    pub widened: usize,
    /// Queries that no scan proved: every row's score was computed.
    pub exhausted: usize,
}

impl<'a> Corpus<'a> {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.exact().len() / self.d.max(1)
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The score of a row, as the whole search defines it.
    pub fn score(&self, query: &[f32], row: usize) -> f32 {
        self.scores(query, &[row as u32])[0].score
    }

    /// The scores of rows.
    fn scores(&self, query: &[f32], rows: &[u32]) -> Vec<Hit> {
        let at = |row: u32| row as usize * self.d..(row as usize + 1) * self.d;
        let of_some = |some: &[u32]| {
            // Where there are fewer, the first fills up.
            let row = |i: usize| at(*some.get(i).unwrap_or(&some[0]));
            let sums = match self.exact() {
                Exact::F32(rows) => sums(query, std::array::from_fn(|i| &rows[row(i)]), |v| v as f64),
                Exact::F16(rows) => sums(query, std::array::from_fn(|i| &rows[row(i)]), |v| v.to_f32() as f64),
            };
            // Of the two zeros the positive one: they tie.
            let hit = |(row, sum): (&u32, f64)| Hit { row: *row, score: sum as f32 + 0.0 };
            some.iter().zip(sums).map(hit).collect::<Vec<_>>()
        };
        rows.chunks(TOGETHER).flat_map(of_some).collect()
    }

    /// The rows that the scores are of.
    fn exact(&self) -> Exact<'a> {
        match self.rows {
            Rows::F32(rows) => Exact::F32(rows),
            Rows::F16(rows) => Exact::F16(rows),
            Rows::I8 { exact, .. } => exact,
        }
    }
}

impl Exact<'_> {
    fn len(&self) -> usize {
        match self {
            Exact::F32(rows) => rows.len(),
            Exact::F16(rows) => rows.len(),
        }
    }
}

/// The k best rows for each of the queries, `[Q,d]` of unit norm. `filter`, where given, is a bitset of N bits, row n in
/// bit n % 32 of word n / 32: only rows whose bit is set count.
pub fn search(
    device: &dyn Device,
    corpus: &Corpus<'_>,
    queries: &[f32],
    k: usize,
    filter: Option<&[u32]>,
) -> Result<Vec<Vec<Hit>>, Error> {
    Ok(Searcher::new(device, *corpus)?.search(queries, k, filter)?.0)
}

/// A corpus made ready on a device: for many searches.
pub struct Searcher<'a> {
    device: &'a dyn Device,
    corpus: Corpus<'a>,
    ready: Ready,
}

impl<'a> Searcher<'a> {
    /// Checks the corpus and brings as much of it to the device as fits there; the rest passes through at each search.
    pub fn new(device: &'a dyn Device, corpus: Corpus<'a>) -> Result<Searcher<'a>, Error> {
        Searcher::within(device, corpus, usize::MAX)
    }

    /// The same with at most `limit` bytes of the device's memory for rows, those that pass through among them: half as
    /// many more while a search by codes, all of which are there, must look at rows to prove its hits. Queries and lists
    /// of a launch come on top, some 200 MiB at most.
    pub fn within(device: &'a dyn Device, corpus: Corpus<'a>, limit: usize) -> Result<Searcher<'a>, Error> {
        Ok(Searcher { device, corpus, ready: Ready::new(device, &corpus, limit)? })
    }

    /// The k best rows for each query, as [`search`] has them, and what it took to prove them.
    pub fn search(&self, queries: &[f32], k: usize, filter: Option<&[u32]>) -> Result<(Vec<Vec<Hit>>, Effort), Error> {
        self.ready.search(self.device, &self.corpus, queries, k, filter)
    }
}

/// What a device holds of a corpus, for who keeps the device and the corpus elsewhere and gives them to each search again.
pub struct Ready {
    /// The fastest first.
    passes: Vec<Pass>,
    /// The corpus's rows and their elements.
    shape: (usize, usize),
}

impl Ready {
    /// As [`Searcher::within`].
    pub fn new(device: &dyn Device, corpus: &Corpus<'_>, limit: usize) -> Result<Ready, Error> {
        let (d, n, elements) = (corpus.d, corpus.len(), corpus.exact().len());
        if d == 0 || n * d != elements {
            return Err(Error::Request(format!("{elements} elements are no rows of {d}")));
        }
        if n >= u32::MAX as usize {
            return Err(Error::Request(format!("{n} rows are more than a search takes, {}", u32::MAX - 1)));
        }
        if let Rows::I8 { codes, .. } = corpus.rows {
            codes.check(d, n)?;
        }
        Ok(Ready { passes: Pass::of(device, corpus, limit)?, shape: (n, d) })
    }

    /// As [`Searcher::search`], with the device and the corpus that this was made of. Panics with a corpus of another
    /// shape; the hits of other rows are nobody's.
    pub fn search(
        &self,
        device: &dyn Device,
        corpus: &Corpus<'_>,
        queries: &[f32],
        k: usize,
        filter: Option<&[u32]>,
    ) -> Result<(Vec<Vec<Hit>>, Effort), Error> {
        let (n, d) = self.shape;
        assert_eq!((corpus.len(), corpus.d), (n, d), "the corpus's rows and their elements");
        if k == 0 || k > MAX_K {
            return Err(Error::Request(format!("k is {k}: give 1 to {MAX_K}")));
        }
        if !queries.len().is_multiple_of(d) {
            return Err(Error::Request(format!("{} elements are no queries of {d}", queries.len())));
        }
        if let Some(at) = queries.iter().position(|v| !v.is_finite()) {
            let (query, element) = (at / d, at % d);
            return Err(Error::Request(format!("query {query}: element {element} is {}: no number", queries[at])));
        }
        if let Some(words) = filter.map(<[u32]>::len).filter(|words| *words < n.div_ceil(32)) {
            return Err(Error::Request(format!("a filter of {words} words is too short for {n} rows")));
        }
        let queries: Vec<&[f32]> = queries.chunks_exact(d).collect();
        let mut found = vec![Settled::default(); queries.len()];
        let effort = [const { AtomicUsize::new(0) }; 3];
        let mut open: Vec<usize> = if n == 0 { Vec::new() } else { (0..queries.len()).collect() };
        for (number, (pass, wide)) in self.passes.iter().flat_map(|pass| [(pass, false), (pass, true)]).enumerate() {
            for group in open.chunks(scan::MAX_QUERIES) {
                let asked: Vec<&[f32]> = group.iter().map(|&q| queries[q]).collect();
                let least: Vec<Option<f32>> = group.iter().map(|&q| found[q].least).collect();
                let scans = pass.scan(device, corpus, &asked, k, wide, &least, filter)?;
                let settled = asked.par_iter().zip(&scans);
                let settled = settled.map(|(query, scan)| corpus.settle(query, k, scan, &effort[0]));
                for (&q, settled) in group.iter().zip(settled.collect::<Vec<_>>()) {
                    // What was reached once stays a bound.
                    let least = found[q].least.into_iter().chain(settled.least).reduce(f32::max);
                    found[q] = Settled { least, ..settled };
                }
            }
            open.retain(|&q| !found[q].proven);
            if number == 0 {
                effort[1].store(open.len(), Relaxed);
            }
        }
        if !open.is_empty() {
            effort[0].fetch_add(open.len() * n, Relaxed);
            effort[2].store(open.len(), Relaxed);
            let asked: Vec<&[f32]> = open.iter().map(|&q| queries[q]).collect();
            open.iter().zip(corpus.exhaust(&asked, k, filter)).for_each(|(&q, hits)| found[q].hits = hits);
        }
        let [scored, widened, exhausted] = effort.map(AtomicUsize::into_inner);
        Ok((found.into_iter().map(|settled| settled.hits).collect(), Effort { scored, widened, exhausted }))
    }
}

impl Corpus<'_> {
    /// The hits among a query's candidates, and whether they are all.
    fn settle(&self, query: &[f32], k: usize, scan: &Candidates, scored: &AtomicUsize) -> Settled {
        let scores = |rows: &[Scored]| self.scores(query, &rows.iter().map(|row| row.id).collect::<Vec<_>>());
        let (first, rest) = scan.rows.split_at(k.min(scan.rows.len()));
        let mut hits = scores(first);
        if hits.len() == k {
            let least = hits.iter().fold(f32::INFINITY, |least, hit| least.min(hit.score));
            hits.extend(scores(&rest[..rest.partition_point(|row| row.score as f64 + scan.error >= least as f64)]));
        }
        // A row of a larger norm than a corpus may have is further off.
        let near = |(row, hit): (&Scored, &Hit)| (row.score as f64 - hit.score as f64).abs() <= scan.error;
        let sound = scan.rows.iter().zip(&hits).all(near);
        scored.fetch_add(hits.len(), Relaxed);
        hits.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)));
        hits.truncate(k);
        let least = if hits.len() == k { hits.last().map(|hit| hit.score) } else { None };
        let beaten = least.is_some_and(|least| scan.outside as f64 + scan.error < least as f64);
        Settled { hits, least, proven: sound && (beaten || scan.outside == f32::NEG_INFINITY) }
    }

    /// The hits by the score of every row.
    fn exhaust(&self, queries: &[&[f32]], k: usize, filter: Option<&[u32]>) -> Vec<Vec<Hit>> {
        let n = self.len();
        let lists = || queries.iter().map(|_| Best::new(k, f32::NEG_INFINITY)).collect::<Vec<_>>();
        let runs = (0..n.div_ceil(RUN)).into_par_iter();
        let run = |mut lists: Vec<Best>, run: usize| {
            let mut rows = Vec::with_capacity(RUN);
            for row in run * RUN..n.min((run + 1) * RUN) {
                if filter.is_none_or(|words| words[row / 32] >> (row % 32) & 1 == 1) {
                    rows.push(row as u32);
                }
            }
            for (query, list) in queries.iter().zip(&mut lists) {
                for hit in self.scores(query, &rows) {
                    list.put(Scored { score: hit.score, id: hit.row });
                }
            }
            lists
        };
        let join = |mut a: Vec<Best>, b: Vec<Best>| {
            a.iter_mut().zip(b).for_each(|(a, b)| b.into_sorted().into_iter().for_each(|row| _ = a.put(row)));
            a
        };
        let lists = runs.fold(lists, run).reduce(lists, join);
        let hits = |list: Best| list.into_sorted().iter().map(|row| Hit { row: row.id, score: row.score }).collect();
        lists.into_iter().map(hits).collect()
    }
}

/// A query's hits so far.
#[derive(Clone, Default)]
struct Settled {
    hits: Vec<Hit>,
    /// The k-th score, of which the true one is no less.
    least: Option<f32>,
    proven: bool,
}

/// Products of a query with rows, summed in f64 in the order of their elements.
fn sums<T: Copy>(query: &[f32], rows: [&[T]; TOGETHER], value: impl Fn(T) -> f64) -> [f64; TOGETHER] {
    let rows = rows.map(|row| &row[..query.len()]);
    let mut sums = [0.0; TOGETHER];
    for (i, q) in query.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum += *q as f64 * value(row[i]);
        }
    }
    sums
}
