//! Lists of the K best: the order, and lists that rows are put in one after another.

use super::NO_ROW;
use crate::ops::vector::LANES;

/// A row and its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Its product with the query.
    pub score: f32,
    /// The row.
    pub id: u32,
}

impl Scored {
    /// What stands in a place that no row fills.
    pub const NONE: Scored = Scored { score: f32::NEG_INFINITY, id: NO_ROW };

    /// The order of lists: the larger score first, of equal scores the smaller id.
    #[inline]
    pub fn before(&self, other: &Scored) -> bool {
        self.score > other.score || (self.score == other.score && self.id < other.id)
    }

    /// The same as an `Ordering`, for scores that are numbers.
    #[inline]
    pub fn order(&self, other: &Scored) -> std::cmp::Ordering {
        other.score.partial_cmp(&self.score).unwrap_or(std::cmp::Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// The K best of the rows put in, without order: twice K places fill up, then the worse half goes. Each row costs a
/// comparison with the threshold, each that passes it a few more on average.
pub struct Best {
    k: usize,
    rows: Vec<Scored>,
    /// What a row must come before: at first the floor.
    last: Scored,
}

impl Best {
    /// No rows yet; those that do not reach `floor` will not be taken.
    pub fn new(k: usize, floor: f32) -> Best {
        Best { k, rows: Vec::with_capacity(Best::room(k)), last: Scored { score: floor, id: NO_ROW } }
    }

    /// Places: enough that halving them is rare, few enough to stay in a cache.
    fn room(k: usize) -> usize {
        2 * k + 32
    }

    /// The least score that a row of a larger id than all before can enter with: where many rows tie, only the first do.
    #[inline]
    pub fn enter(&self) -> f32 {
        if self.last.id == NO_ROW {
            self.last.score
        } else {
            self.last.score.next_up()
        }
    }

    /// Puts a row in if it is among the best so far; returns true when [`Best::enter`] may have risen.
    #[inline]
    pub fn put(&mut self, row: Scored) -> bool {
        if !row.before(&self.last) {
            return false;
        }
        self.rows.push(row);
        let full = self.rows.len() == Best::room(self.k);
        if full {
            self.halve();
        }
        full
    }

    #[cold]
    fn halve(&mut self) {
        let (_, last, _) = self.rows.select_nth_unstable_by(self.k - 1, Scored::order);
        self.last = *last;
        self.rows.truncate(self.k);
    }

    /// The list: at most K rows, the best first.
    pub fn into_sorted(mut self) -> Vec<Scored> {
        if self.rows.len() > self.k {
            self.halve();
        }
        self.rows.sort_unstable_by(Scored::order);
        self.rows
    }

    /// Writes the list and what fills the places left.
    pub fn finish(self, ids: &mut [u32], scores: &mut [f32]) {
        let all = self.into_sorted().into_iter().chain(std::iter::repeat(Scored::NONE));
        for ((id, score), row) in ids.iter_mut().zip(scores).zip(all) {
            (*id, *score) = (row.id, row.score);
        }
    }
}

/// The lists of many queries over ascending rows, and one vector of thresholds for each [`LANES`] of them: a comparison
/// passes over as many scores.
pub struct Lists<'a> {
    /// [`Best::enter`] of each query; where there is none, infinity.
    enter: Vec<f32>,
    best: Vec<Best>,
    filter: &'a [u32],
    base: usize,
}

impl Lists<'_> {
    /// Empty lists of `k` places, a query each floor. Queries are counted up to `lanes`.
    pub fn new<'a>(k: usize, floor: &[f32], lanes: usize, filter: &'a [u32], base: usize) -> Lists<'a> {
        let mut enter = floor.to_vec();
        enter.resize(lanes, f32::INFINITY);
        Lists { enter, best: floor.iter().map(|floor| Best::new(k, *floor)).collect(), filter, base }
    }

    /// What scores of the queries from `query` on must be at least to matter.
    #[inline]
    pub fn enter(&self, query: usize) -> &[f32; LANES] {
        self.enter[query..].first_chunk().expect("queries are counted up to whole vectors")
    }

    /// True when the filter leaves none of these rows.
    pub fn skips(&self, rows: std::ops::Range<usize>) -> bool {
        !self.filter.is_empty() && rows.into_iter().all(|row| !self.passes(row))
    }

    #[inline]
    fn passes(&self, row: usize) -> bool {
        self.filter.is_empty() || self.filter[row / 32] >> (row % 32) & 1 == 1
    }

    /// Puts in the scores of `row` with the queries from `query` on whose bit of `which` is set.
    #[inline(never)]
    pub fn put(&mut self, row: usize, query: usize, scores: &[f32; LANES], mut which: u16) {
        if !self.passes(row) {
            return;
        }
        while which != 0 {
            let lane = which.trailing_zeros() as usize;
            which &= which - 1;
            let best = &mut self.best[query + lane];
            if best.put(Scored { score: scores[lane], id: (self.base + row) as u32 }) {
                self.enter[query + lane] = best.enter();
            }
        }
    }

    /// The queries' lists, in order.
    pub fn into_best(self) -> Vec<Best> {
        self.best
    }
}
