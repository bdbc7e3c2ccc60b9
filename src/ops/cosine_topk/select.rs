//! Lists of the K best: the order, and a list that rows are put in one after another.

use super::NO_ROW;

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

    /// No row with a score below it can still enter.
    #[inline]
    pub fn threshold(&self) -> f32 {
        self.last.score
    }

    /// Puts a row in; returns true when the threshold may have risen.
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

    /// Writes the list, sorted, and what fills the places left; the next list begins.
    pub fn finish(&mut self, ids: &mut [u32], scores: &mut [f32]) {
        self.rows.sort_unstable_by(Scored::order);
        let all = self.rows.iter().copied().chain(std::iter::repeat(Scored::NONE));
        for ((id, score), row) in ids.iter_mut().zip(scores).zip(all) {
            (*id, *score) = (row.id, row.score);
        }
    }
}
