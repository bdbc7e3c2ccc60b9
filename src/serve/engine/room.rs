//! Who has which rows of the cache: ranges, the first that fits.

use std::ops::Range;

/// The free ranges, in order and never side by side.
pub struct Room {
    free: Vec<Range<usize>>,
}

impl Room {
    /// All `rows` free.
    pub fn new(rows: usize) -> Room {
        Room { free: std::iter::once(0..rows).filter(|range| !range.is_empty()).collect() }
    }

    /// Takes `count` rows, if so many lie side by side.
    pub fn take(&mut self, count: usize) -> Option<Range<usize>> {
        let at = self.free.iter().position(|range| range.len() >= count)?;
        let start = self.free[at].start;
        self.free[at].start += count;
        if self.free[at].is_empty() {
            self.free.remove(at);
        }
        Some(start..start + count)
    }

    /// Gives back what [`Room::take`] gave.
    pub fn give_back(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let at = self.free.partition_point(|free| free.start < range.start);
        self.free.insert(at, range);
        for i in [at + 1, at] {
            if i > 0 && i < self.free.len() && self.free[i - 1].end == self.free[i].start {
                self.free[i - 1].end = self.free.remove(i).end;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_apart_and_come_together_again() {
        let mut room = Room::new(100);
        let mut held: Vec<Range<usize>> = Vec::new();
        for i in 0..1000usize {
            let count = 1 + i * 7 % 13;
            match room.take(count) {
                Some(range) => {
                    assert!(range.len() == count && range.end <= 100);
                    assert!(held.iter().all(|other| other.end <= range.start || range.end <= other.start));
                    held.push(range);
                }
                None => room.give_back(held.swap_remove(i % held.len())),
            }
        }
        held.into_iter().for_each(|range| room.give_back(range));
        assert!(room.free.len() == 1 && room.free[0] == (0..100), "{:?}", room.free);
    }
}
