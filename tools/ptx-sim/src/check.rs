//! What checked mode finds: findings, and the shadow of shared and global memory that races and unwritten bytes show
//! in.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::Place;

/// The classes of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// An access outside its buffer, shared memory or parameter.
    OutOfBounds,
    /// An address that is not a multiple of the access's size.
    Misaligned,
    /// A register read before it was written.
    UninitialisedRegister,
    /// Shared memory read before it was written.
    UninitialisedShared,
    /// Global memory read before it was written.
    UninitialisedGlobal,
    /// Shared memory touched by two threads, one writing, without a barrier between.
    SharedRace,
    /// Global memory touched by two blocks, one writing, without an order between.
    GlobalRace,
    /// A barrier or warp-wide instruction that not all of its threads reach together.
    Divergence,
    /// Data of a `cp.async` or a bulk copy touched before the wait.
    CopyInFlight,
    /// An mbarrier that was not made, has too many arrivals or bytes, or is touched as data.
    Mbarrier,
    /// Shared memory that threads wrote and the tensor cores or a bulk copy touch, without `fence.proxy.async`.
    Proxy,
    /// A register of a `wgmma` under way touched before `wgmma.wait_group`, or no `wgmma.fence` after a write of it.
    AsyncRegister,
    /// A matrix descriptor that no operand can have.
    Descriptor,
    /// Control runs past the kernel's last instruction.
    MissingReturn,
    /// More shared memory, registers or threads than the target has.
    Resources,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::OutOfBounds => "out of bounds",
            Kind::Misaligned => "misaligned",
            Kind::UninitialisedRegister => "uninitialised register",
            Kind::UninitialisedShared => "uninitialised shared memory",
            Kind::UninitialisedGlobal => "uninitialised global memory",
            Kind::SharedRace => "shared-memory race",
            Kind::GlobalRace => "global race between blocks",
            Kind::Divergence => "divergence",
            Kind::CopyInFlight => "copied data before the wait",
            Kind::Mbarrier => "mbarrier",
            Kind::Proxy => "no proxy fence",
            Kind::AsyncRegister => "wgmma register",
            Kind::Descriptor => "matrix descriptor",
            Kind::MissingReturn => "missing ret",
            Kind::Resources => "resources",
        })
    }
}

/// One class of fault at one line: its first place and how often it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The class.
    pub kind: Kind,
    /// Entry name.
    pub kernel: String,
    /// The first thread at fault, by block, warp and lane.
    pub place: Place,
    /// What it did.
    pub message: String,
    /// Threads and times that did the same at this line.
    pub count: u64,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {}: {} (x{})", self.kernel, self.place, self.kind, self.message, self.count)
    }
}

/// Findings of one worker, one for each class and line.
#[derive(Default)]
pub(crate) struct Findings {
    found: HashMap<(Kind, u32), (Place, String, u64)>,
}

impl Findings {
    pub fn add(&mut self, kind: Kind, place: Place, message: impl FnOnce() -> String) {
        let order = |p: &Place| (p.block[2], p.block[1], p.block[0], p.warp, p.lane);
        match self.found.get_mut(&(kind, place.line)) {
            Some(f) => {
                f.2 += 1;
                if order(&place) < order(&f.0) {
                    (f.0, f.1) = (place, message());
                }
            }
            None => {
                self.found.insert((kind, place.line), (place, message(), 1));
            }
        }
    }

    pub fn merge(&mut self, other: Findings) {
        for ((kind, _), (place, message, count)) in other.found {
            self.add(kind, place, || message);
            if let Some(f) = self.found.get_mut(&(kind, place.line)) {
                f.2 += count - 1;
            }
        }
    }

    /// By line, then class.
    pub fn into_list(self, kernel: &str) -> Vec<Finding> {
        let finding =
            |((kind, _), (place, message, count))| Finding { kind, kernel: kernel.into(), place, message, count };
        let mut list: Vec<Finding> = self.found.into_iter().map(finding).collect();
        list.sort_by_key(|f| (f.place.line, f.kind));
        list
    }
}

/// Stamps say who touched a grain of shared memory and when: `clock << 10 | warp << 5 | lane`. Clocks have 22 bits.
const LAST_CLOCK: u32 = (1 << 22) - 2;
/// The write stamp of a grain that a `cp.async` is under way to: later than any clock.
const IN_FLIGHT: u32 = u32::MAX;

/// How a thread touches shared memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Touch {
    Read,
    Write,
    Atomic,
    /// A `cp.async` begins to write.
    Issue,
}

/// Shared memory's shadow, with a vector clock for each warp: an access is ordered before another when a chain of
/// barriers leads from one to the other. Lanes of a warp are ordered by `bar.warp.sync` and barriers only.
pub(crate) struct SharedShadow {
    /// Last write of each grain.
    write: Vec<u32>,
    /// Two reads since then that are not ordered with each other.
    read: [Vec<u32>; 2],
    /// Whether the last write was atomic.
    atomic: Vec<bool>,
    any_atomic: bool,
    /// Whether the last write was a bulk copy's: no fence is needed before the tensor cores read it.
    bulk: Vec<bool>,
    any_bulk: bool,
    shift: u32,
    /// Stamps up to this clock belong to earlier blocks.
    base: u32,
    clock: [u32; 32],
    /// `known[w][u]`: accesses of warp u up to this clock are ordered before warp w's next.
    known: [[u32; 32]; 32],
    /// Least of `known[w]`: what is that old is ordered, whoever did it.
    floor: [u32; 32],
    /// Each warp's writes up to this clock have a proxy fence behind them.
    fenced: [u32; 32],
    /// `known` at each warp's last proxy fence.
    fence_known: [[u32; 32]; 32],
}

/// What a touch brought to light.
#[derive(Default)]
pub(crate) struct Touched {
    /// (warp, lane) of an unordered other, and whether it wrote.
    pub race: Option<(u32, u32, bool)>,
    pub unwritten: bool,
    pub in_flight: bool,
}

impl SharedShadow {
    pub fn new(bytes: u32, grain: u32) -> SharedShadow {
        let n = bytes.div_ceil(grain) as usize;
        SharedShadow {
            write: vec![0; n],
            read: [vec![0; n], vec![0; n]],
            atomic: vec![false; n],
            any_atomic: false,
            bulk: vec![false; n],
            any_bulk: false,
            shift: grain.trailing_zeros(),
            base: 0,
            clock: [1; 32],
            known: [[0; 32]; 32],
            floor: [0; 32],
            fenced: [0; 32],
            fence_known: [[0; 32]; 32],
        }
    }

    /// Forgets the previous block.
    pub fn begin_block(&mut self) {
        self.base = self.clock.iter().copied().max().unwrap_or(0);
        if self.base > LAST_CLOCK / 2 {
            self.base = 0;
            self.write.fill(0);
            self.read.iter_mut().for_each(|r| r.fill(0));
        } else {
            // Copies that the last block never waited for.
            self.write.iter_mut().filter(|w| **w == IN_FLIGHT).for_each(|w| *w = 0);
        }
        self.clock = [self.base + 1; 32];
        self.known = [[self.base; 32]; 32];
        self.floor = [self.base; 32];
        self.fenced = [self.base; 32];
        self.fence_known = [[self.base; 32]; 32];
        if std::mem::take(&mut self.any_bulk) {
            self.bulk.fill(false);
        }
    }

    /// A new clock for what the warp does next; its lanes are not ordered by it. The old one.
    fn next_clock(&mut self, warp: usize) -> u32 {
        let was = self.clock[warp];
        self.clock[warp] = (was + 1).min(LAST_CLOCK);
        was
    }

    /// `fence.proxy.async` by all running lanes of a warp, or by some.
    pub fn proxy_fence(&mut self, warp: usize, all: bool) {
        let was = self.next_clock(warp);
        if all {
            self.fenced[warp] = was;
        }
        self.fence_known[warp] = self.known[warp];
    }

    /// Whether a thread wrote part of this and no proxy fence lies between that and an asynchronous access by `warp`.
    pub fn unfenced(&self, offset: u32, bytes: u32, warp: usize) -> bool {
        let first = (offset >> self.shift) as usize;
        let last = ((offset + bytes - 1) >> self.shift) as usize;
        (first..=last).any(|i| {
            let (clock, writer) = (self.write[i] >> 10, (self.write[i] >> 5 & 31) as usize);
            let written = self.write[i] != IN_FLIGHT && clock > self.base && !self.bulk[i];
            written && clock > self.fenced[writer] && clock > self.fence_known[warp][writer]
        })
    }

    /// What the warp does now happens at this clock.
    pub fn clock_of(&self, warp: usize) -> u32 {
        self.clock[warp]
    }

    /// Whether the warp comes after what another did at a clock.
    pub fn knows(&self, warp: usize, other: usize, clock: u32) -> bool {
        clock <= self.known[warp][other]
    }

    /// A bulk copy is asked for: the clock that its bytes will have, which `told` is to bring to whoever waits.
    pub fn ask(&mut self, warp: usize, told: &mut [u32; 32]) -> u32 {
        let clock = self.next_clock(warp);
        told[warp] = told[warp].max(clock);
        clock
    }

    /// A bulk copy has arrived.
    pub fn land(&mut self, offset: u32, bytes: u32, by: (u32, u32, u32)) {
        let (clock, warp, lane) = by;
        self.deliver_as(offset, bytes, clock << 10 | warp << 5 | lane);
        let first = (offset >> self.shift) as usize;
        let last = ((offset + bytes - 1) >> self.shift) as usize;
        self.bulk[first..=last].fill(true);
        self.any_bulk = true;
    }

    /// What some lanes of a warp release: all that the warp's lanes know to be done.
    pub fn release(&self, warp: usize, told: &mut [u32; 32]) {
        for (t, k) in told.iter_mut().zip(&self.known[warp]) {
            *t = (*t).max(*k);
        }
    }

    fn tick(&mut self, warp: usize) {
        self.known[warp][warp] = self.clock[warp];
        self.clock[warp] = (self.clock[warp] + 1).min(LAST_CLOCK);
    }

    /// `bar.warp.sync`: this warp's lanes are ordered.
    pub fn warp_sync(&mut self, warp: usize) {
        self.tick(warp);
    }

    /// What a warp arriving at a barrier tells the others.
    pub fn arrive(&mut self, warp: usize, told: &mut [u32; 32]) {
        self.tick(warp);
        for (t, k) in told.iter_mut().zip(&self.known[warp]) {
            *t = (*t).max(*k);
        }
    }

    /// What a warp leaving a barrier has learnt. `warps`: how many the block has; nothing is to be known of others.
    pub fn leave(&mut self, warp: usize, told: &[u32; 32], warps: usize) {
        for (k, t) in self.known[warp].iter_mut().zip(told) {
            *k = (*k).max(*t);
        }
        self.floor[warp] = self.known[warp][..warps].iter().copied().min().unwrap_or(self.base);
    }

    /// All 32 lanes of a warp read a row of words from `offset` on. False: nothing recorded, the lanes must be looked
    /// at singly.
    #[inline(always)]
    pub fn read_row(&mut self, offset: u32, warp: u32) -> bool {
        let first = (offset >> 2) as usize;
        let (floor, base) = (self.floor[warp as usize], self.base);
        let stamp = self.clock[warp as usize] << 10 | warp << 5;
        let row = first..first + 32;
        let (true, Some(write), Some(read)) = (self.shift == 2, self.write.get(row.clone()), self.read[0].get_mut(row))
        else {
            return false;
        };
        let (mut odd, mut fresh) = (false, false);
        for l in 0..32 {
            let clock = write[l] >> 10;
            odd |= (clock > floor) | (clock <= base);
            let repeated = read[l] == (stamp | l as u32);
            odd |= !repeated & (read[l] >> 10 > floor);
            fresh |= !repeated;
        }
        if odd {
            return false;
        }
        if fresh {
            for l in 0..32 {
                read[l] = stamp | l as u32;
            }
        }
        true
    }

    /// As [`SharedShadow::read_row`], for writes.
    #[inline(always)]
    pub fn write_row(&mut self, offset: u32, warp: u32) -> bool {
        let first = (offset >> 2) as usize;
        let floor = self.floor[warp as usize];
        let stamp = self.clock[warp as usize] << 10 | warp << 5;
        let row = first..first + 32;
        if self.shift != 2 || self.any_atomic || self.any_bulk || row.end > self.write.len() {
            return false;
        }
        let [a, b] = &mut self.read;
        let (write, a, b) = (&mut self.write[row.clone()], &mut a[row.clone()], &mut b[row]);
        let mut odd = false;
        for l in 0..32 {
            let known = (write[l] >> 10 <= floor) | (write[l] == stamp | l as u32);
            let own = (a[l] >> 10 <= floor) | (a[l] == stamp | l as u32);
            odd |= !known | !own | (b[l] >> 10 > floor);
        }
        if odd {
            return false;
        }
        for l in 0..32 {
            write[l] = stamp | l as u32;
        }
        a.fill(0);
        b.fill(0);
        true
    }

    /// Checks and records one thread's access of `bytes` at `offset`. `changes` says whether a write alters any byte:
    /// two threads may write the same value.
    #[inline(always)]
    pub fn touch(&mut self, how: Touch, offset: u32, bytes: u32, warp: u32, lane: u32, changes: bool) -> Touched {
        let known = &self.known[warp as usize];
        let (floor, base) = (self.floor[warp as usize], self.base);
        let stamp = self.clock[warp as usize] << 10 | warp << 5 | lane;
        let ordered =
            |s: u32| s >> 10 <= floor || s >> 10 <= known[(s >> 5 & 31) as usize] || s & 0x3ff == stamp & 0x3ff;
        let who = |s: u32, wrote: bool| Some((s >> 5 & 31, s & 31, wrote));
        let mut touched = Touched::default();
        let first = (offset >> self.shift) as usize;
        let last = ((offset + bytes - 1) >> self.shift) as usize;
        let [read0, read1] = &mut self.read;
        let grains = self.write[first..=last].iter_mut().zip(&mut read0[first..=last]).zip(&mut read1[first..=last]);
        for (i, ((write, read0), read1)) in grains.enumerate() {
            let in_flight = *write == IN_FLIGHT;
            touched.in_flight |= in_flight;
            if how == Touch::Read {
                touched.unwritten |= *write >> 10 <= base;
                if !ordered(*write) && !in_flight {
                    touched.race = who(*write, true);
                }
                if *read0 != stamp {
                    *(if ordered(*read0) { read0 } else { read1 }) = stamp;
                }
                continue;
            }
            let cell = &mut self.atomic[first + i];
            if how == Touch::Atomic {
                touched.unwritten |= *write >> 10 <= base;
                self.any_atomic = true;
            }
            let both_atomic = how == Touch::Atomic && *cell;
            if !ordered(*write) && changes && !both_atomic && !in_flight {
                touched.race = who(*write, true);
            }
            for r in [*read0, *read1] {
                if !ordered(r) && changes {
                    touched.race = who(r, false);
                }
            }
            *cell = how == Touch::Atomic;
            self.bulk[first + i] = false;
            *write = if how == Touch::Issue { IN_FLIGHT } else { stamp };
            (*read0, *read1) = (0, 0);
        }
        touched
    }

    /// A `cp.async` has arrived: from now on its bytes are this thread's writes.
    pub fn deliver(&mut self, offset: u32, bytes: u32, warp: u32, lane: u32) {
        self.deliver_as(offset, bytes, self.clock[warp as usize] << 10 | warp << 5 | lane);
    }

    fn deliver_as(&mut self, offset: u32, bytes: u32, stamp: u32) {
        let first = (offset >> self.shift) as usize;
        let last = ((offset + bytes - 1) >> self.shift) as usize;
        for i in first..=last {
            if self.write[i] == IN_FLIGHT {
                self.write[i] = stamp;
                (self.read[0][i], self.read[1][i]) = (0, 0);
            }
        }
    }
}

/// Which blocks touched each grain of one buffer: `writer << 32 | reader`, each a block number + 1, or [`MANY`];
/// writers by atomics carry [`BY_ATOMIC`].
pub(crate) struct GlobalShadow {
    cells: Vec<AtomicU64>,
    shift: u32,
}

const MANY: u32 = 0x7fff_ffff;
const BY_ATOMIC: u32 = 0x8000_0000;

impl GlobalShadow {
    pub fn new(bytes: u64, grain: u32) -> GlobalShadow {
        let n = bytes.div_ceil(u64::from(grain)) as usize;
        GlobalShadow {
            cells: std::iter::repeat_with(|| AtomicU64::new(0)).take(n).collect(),
            shift: grain.trailing_zeros(),
        }
    }

    /// Records block `me` (from 1) at `offset`; another block that it conflicts with (0 when it is one of several).
    pub fn touch(&self, how: Touch, offset: u64, bytes: u32, me: u32) -> Option<u32> {
        let (first, last) = (offset >> self.shift, (offset + u64::from(bytes) - 1) >> self.shift);
        let mut conflict = None;
        for cell in &self.cells[first as usize..=last as usize] {
            let mut seen = cell.load(Relaxed);
            loop {
                let (writer, reader) = ((seen >> 32) as u32, seen as u32);
                let id = writer & !BY_ATOMIC;
                let foreign_writer = writer != 0 && id != me;
                let foreign_reader = reader != 0 && reader != me;
                let (clash, next_writer, next_reader) = match how {
                    Touch::Read => (foreign_writer, writer, if foreign_reader { MANY } else { me }),
                    Touch::Atomic => {
                        let plain_writer = foreign_writer && writer & BY_ATOMIC == 0;
                        let next = if foreign_writer { BY_ATOMIC | MANY } else { BY_ATOMIC | me };
                        (plain_writer || foreign_reader, if plain_writer { writer } else { next }, reader)
                    }
                    _ => (foreign_writer || foreign_reader, me, reader),
                };
                if clash {
                    let other = if foreign_writer { id } else { reader };
                    conflict = Some(if other == MANY { 0 } else { other });
                }
                let next = u64::from(next_writer) << 32 | u64::from(next_reader);
                if next == seen {
                    break;
                }
                match cell.compare_exchange_weak(seen, next, Relaxed, Relaxed) {
                    Ok(_) => break,
                    Err(now) => seen = now,
                }
            }
        }
        conflict
    }
}
