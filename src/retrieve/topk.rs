//! Exact search: of N unit rows the k nearest to each query by cosine, ties by the lower row.
//!
//! ```text
//! score[q,n] = fl32(Σ_d queries[q,d]·rows[n,d]), the products summed in f64 in the order of d
//! hits[q]    = the k largest by (score descending, n ascending), k cut to the rows that the filter leaves
//! ```
//!
//! One fixed order of sums makes the hits of a query the same bits for any batch, split, thread count and device.

use crate::device::Device;
use crate::Error;

/// The most hits that a search gives.
pub const MAX_K: usize = 2048;

/// Rows of unit norm, one vector each, and how they are stored.
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
    F16(&'a [half::f16]),
}

/// One row found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The row.
    pub row: u32,
    /// Its cosine with the query.
    pub score: f32,
}

impl Corpus<'_> {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        match self.rows {
            Rows::F32(rows) => rows.len() / self.d,
            Rows::F16(rows) => rows.len() / self.d,
        }
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The score of a row, as the whole search defines it.
    pub fn score(&self, query: &[f32], row: usize) -> f32 {
        let at = row * self.d..(row + 1) * self.d;
        let sum: f64 = match self.rows {
            Rows::F32(rows) => query.iter().zip(&rows[at]).map(|(q, x)| *q as f64 * *x as f64).sum(),
            Rows::F16(rows) => query.iter().zip(&rows[at]).map(|(q, x)| *q as f64 * x.to_f64()).sum(),
        };
        sum as f32
    }
}

/// The k best rows for each of the queries, `[Q,d]` of unit norm. `filter`, where given, is a bitset of N bits, row n in
/// bit n % 32 of word n / 32: only rows whose bit is set count.
pub fn search(
    _device: &dyn Device,
    corpus: &Corpus<'_>,
    queries: &[f32],
    k: usize,
    filter: Option<&[u32]>,
) -> Result<Vec<Vec<Hit>>, Error> {
    if k == 0 || k > MAX_K {
        return Err(Error::Request(format!("k is {k}: give 1 to {MAX_K}")));
    }
    let allowed = |row: usize| filter.is_none_or(|words| words[row / 32] >> (row % 32) & 1 == 1);
    let best = |query: &[f32]| {
        let of = |row| Hit { row: row as u32, score: corpus.score(query, row) };
        let mut hits: Vec<Hit> = (0..corpus.len()).filter(|&row| allowed(row)).map(of).collect();
        hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)));
        hits.truncate(k);
        hits
    };
    Ok(queries.chunks_exact(corpus.d).map(best).collect())
}
