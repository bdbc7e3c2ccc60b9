//! What lies behind a warp's requests, as far as counts can tell it: which sectors the first-level cache of a block
//! has, and which were touched at all.

/// Sectors of 32 bytes in a line of the first-level cache, which has a tag a line and takes its sectors one by one.
const SECTORS_A_LINE: u32 = 4;
/// Bytes of a line.
pub(crate) const LINE_BYTES: u32 = 32 * SECTORS_A_LINE;
/// No line.
const NONE: u32 = u32::MAX;

/// Lines of global memory, the least recently used of which makes room: fully associative, so that a miss is for want
/// of room and not for where an address happens to lie.
pub(crate) struct Cache {
    lines: Vec<Line>,
    /// First line of each bucket.
    buckets: Vec<u32>,
    most: usize,
    newest: u32,
    oldest: u32,
}

struct Line {
    /// Buffer and number of the line in it.
    key: u64,
    /// The sectors that are there, a bit each.
    sectors: u8,
    newer: u32,
    older: u32,
    /// The next line of the bucket.
    next: u32,
}

impl Cache {
    pub fn new(bytes: u32) -> Cache {
        let most = (bytes / LINE_BYTES) as usize;
        let buckets = vec![NONE; (2 * most).next_power_of_two()];
        Cache { lines: Vec::with_capacity(most), buckets, most, newest: NONE, oldest: NONE }
    }

    pub fn clear(&mut self) {
        self.lines.clear();
        self.buckets.fill(NONE);
        (self.newest, self.oldest) = (NONE, NONE);
    }

    /// Whether a sector of a buffer is there; from now on it is.
    pub fn hit(&mut self, buffer: usize, sector: u32) -> bool {
        if self.most == 0 {
            return false;
        }
        let key = (buffer as u64) << 32 | u64::from(sector / SECTORS_A_LINE);
        let bit = 1 << (sector % SECTORS_A_LINE);
        let bucket = self.bucket(key);
        let mut at = self.buckets[bucket];
        while at != NONE && self.lines[at as usize].key != key {
            at = self.lines[at as usize].next;
        }
        if at == NONE {
            at = self.place();
            self.lines[at as usize] = Line { key, sectors: 0, newer: NONE, older: NONE, next: self.buckets[bucket] };
            self.buckets[bucket] = at;
        } else if at != self.newest {
            self.unlink(at);
        }
        if at != self.newest {
            let before = std::mem::replace(&mut self.newest, at);
            (self.lines[at as usize].older, self.lines[at as usize].newer) = (before, NONE);
            match before {
                NONE => self.oldest = at,
                _ => self.lines[before as usize].newer = at,
            }
        }
        let sectors = &mut self.lines[at as usize].sectors;
        let there = *sectors & bit != 0;
        *sectors |= bit;
        there
    }

    /// A line's place: a new one, or that of the oldest, which leaves.
    fn place(&mut self) -> u32 {
        if self.lines.len() < self.most {
            self.lines.push(Line { key: 0, sectors: 0, newer: NONE, older: NONE, next: NONE });
            return self.lines.len() as u32 - 1;
        }
        let at = self.oldest;
        self.unlink(at);
        let Line { key, next, .. } = self.lines[at as usize];
        let bucket = self.bucket(key);
        if self.buckets[bucket] == at {
            self.buckets[bucket] = next;
        } else {
            let mut before = self.buckets[bucket];
            while self.lines[before as usize].next != at {
                before = self.lines[before as usize].next;
            }
            self.lines[before as usize].next = next;
        }
        at
    }

    /// Takes a line out of the order of use.
    fn unlink(&mut self, at: u32) {
        let Line { newer, older, .. } = self.lines[at as usize];
        match newer {
            NONE => self.newest = older,
            _ => self.lines[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            _ => self.lines[older as usize].newer = newer,
        }
    }

    fn bucket(&self, key: u64) -> usize {
        // Fibonacci hashing: neighbours are apart.
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (self.buckets.len() - 1)
    }
}

/// Whether a load looks into the first-level cache; stores and atomics go past it, as do loads that say so.
pub(crate) fn looks_into(name: &str) -> bool {
    const PAST: [&str; 6] = ["cg", "cv", "volatile", "relaxed", "acquire", "mmio"];
    let loads = name.starts_with("ld.") || name.starts_with("cp.async.ca");
    loads && !name.split('.').any(|word| PAST.contains(&word))
}

/// Sectors of one buffer, a bit each.
#[derive(Default)]
pub(crate) struct Sectors(Vec<u64>);

impl Sectors {
    /// Marks a sector of a buffer of `bytes`.
    pub fn mark(&mut self, sector: u32, bytes: u64) {
        if self.0.is_empty() {
            self.0 = vec![0; bytes.div_ceil(32 * 64) as usize];
        }
        self.0[sector as usize / 64] |= 1 << (sector % 64);
    }

    pub fn merge(&mut self, other: Sectors) {
        if self.0.is_empty() {
            self.0 = other.0;
        } else {
            self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a |= b);
        }
    }

    /// Bytes of the sectors that are marked.
    pub fn bytes(&self) -> u64 {
        32 * self.0.iter().map(|word| u64::from(word.count_ones())).sum::<u64>()
    }
}

/// The caches of a worker's block under way, and what its blocks have touched.
pub(crate) struct Caches {
    pub l1: Cache,
    /// By instruction: whether it looks into the first-level cache.
    pub looks: Vec<bool>,
    /// By buffer: sectors loaded, and sectors stored.
    pub touched: Vec<[Sectors; 2]>,
}

impl Caches {
    /// `names` are the instructions' mnemonics; none where nothing is counted.
    pub fn new(l1_bytes: u32, names: &[String], buffers: usize) -> Caches {
        let touched = (0..buffers).map(|_| Default::default()).collect();
        Caches { l1: Cache::new(l1_bytes), looks: names.iter().map(|name| looks_into(name)).collect(), touched }
    }

    /// One sector of a request; whether it goes on to the second-level cache.
    pub fn access(&mut self, pc: usize, buffer: usize, bytes: u64, sector: u32, store: bool) -> bool {
        self.touched[buffer][usize::from(store)].mark(sector, bytes);
        store || !self.looks[pc] || !self.l1.hit(buffer, sector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_cache_loses_the_line_that_was_used_longest_ago() {
        // Two lines of four sectors.
        let mut cache = Cache::new(2 * LINE_BYTES);
        assert!(!cache.hit(0, 0) && cache.hit(0, 0));
        assert!(!cache.hit(0, 1), "another sector of the line");
        assert!(!cache.hit(1, 0), "the same line of another buffer");
        assert!(cache.hit(0, 1));
        assert!(!cache.hit(0, 4), "the third line");
        assert!(cache.hit(0, 0) && cache.hit(0, 4) && !cache.hit(1, 0));
        assert!(cache.hit(0, 4) && !cache.hit(0, 1), "the first line has left, with both sectors");
        cache.clear();
        assert!(!cache.hit(0, 4));
    }

    #[test]
    fn it_agrees_with_a_list_in_order_of_use() {
        let (most, mut state) = (7, 1u64);
        let mut cache = Cache::new(most as u32 * LINE_BYTES);
        let mut list: Vec<(u64, u8)> = Vec::new();
        for _ in 0..20_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (buffer, sector) = ((state >> 40) % 2, (state >> 50) as u32 % 24);
            let (key, bit) = (buffer << 32 | u64::from(sector / 4), 1u8 << (sector % 4));
            let found = list.iter().position(|line| line.0 == key);
            let mut line = found.map_or((key, 0), |i| list.remove(i));
            let there = line.1 & bit != 0;
            line.1 |= bit;
            list.insert(0, line);
            list.truncate(most);
            assert_eq!(cache.hit(buffer as usize, sector), there);
        }
    }

    #[test]
    fn a_cache_of_nothing_holds_nothing() {
        let mut cache = Cache::new(0);
        assert!(!cache.hit(0, 0) && !cache.hit(0, 0));
    }

    #[test]
    fn loads_say_which_caches_they_use() {
        for name in ["ld.global.f32", "ld.global.nc.v4.u32", "cp.async.ca.shared.global"] {
            assert!(looks_into(name), "{name}");
        }
        let past = ["ld.global.cg.u32", "ld.volatile.global.u32", "ld.relaxed.gpu.global.u32", "st.global.f32"];
        for name in past.into_iter().chain(["cp.async.cg.shared.global", "atom.global.add.u32"]) {
            assert!(!looks_into(name), "{name}");
        }
    }
}
