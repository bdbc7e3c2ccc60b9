//! A corpus's rows on a device with memory of its own, slab by slab: as many slabs stay there as have room, the others
//! pass through two buffers in turn.
//!
//! ```text
//! for each slab i:  launch over it;  bring the next one that passes, beside the launch;  read what the launch found
//! ```
//!
//! A buffer is written again two passing slabs later: the launch that used it has been read by then.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::device::{self, Buffer, Device};
use crate::Error;

/// Most bytes of rows in a launch of a device with memory of its own.
const SLAB: usize = 256 << 20;
/// Slabs that a limit on memory is cut into at least: two that pass and two that stay.
const LEAST_SLABS: usize = 4;
/// Slabs given up where memory ran out while they were brought: two that pass, and one for what launches take.
const ROOM: usize = 3;
/// Rows begin at multiples of whole words of a filter.
const WORD: usize = 32;

/// Rows as a kernel takes them: the bytes of each of its arguments for some rows.
pub type RowArgs<'a> = dyn Fn(&Range<usize>) -> Vec<Cow<'a, [u8]>> + 'a;

/// Two buffers that slabs pass through, shared by whatever scans one corpus: one at a time.
#[derive(Clone, Default)]
pub struct Passing(Arc<Mutex<Option<[Buffer; 2]>>>);

/// The slabs of a corpus, in order, all rows.
pub struct Slabs {
    all: Vec<Slab>,
    /// Bytes of a row in all arguments.
    row_bytes: usize,
    /// Bytes of the largest slab, its arguments each at an aligned place.
    bytes: usize,
    passing: Passing,
}

struct Slab {
    rows: Range<usize>,
    /// The rows' arguments on the device.
    resident: Option<Vec<Buffer>>,
}

impl Slabs {
    /// These ranges, for launches that read rows where they lie.
    pub fn on_host(ranges: impl Iterator<Item = Range<usize>>) -> Slabs {
        let all = ranges.map(|rows| Slab { rows, resident: None }).collect();
        Slabs { all, row_bytes: 0, bytes: 0, passing: Passing::default() }
    }

    /// `n` rows cut for a device, `row_bytes` bytes of each in all arguments, none brought yet. No more than `limit` bytes
    /// of its memory will be taken for them; an error where that is too few.
    pub fn cut(
        device: &dyn Device,
        n: usize,
        row_bytes: usize,
        limit: usize,
        passing: Passing,
    ) -> Result<Slabs, Error> {
        let most = SLAB.min(device.caps().max_binding).min(limit / LEAST_SLABS) / row_bytes;
        let rows = (most / WORD * WORD).clamp(WORD, n.max(WORD));
        let all = (0..n).step_by(rows).map(|first| Slab { rows: first..n.min(first + rows), resident: None }).collect();
        // Arguments begin at aligned places: a code's scales after the codes.
        let bytes = (rows * row_bytes).next_multiple_of(4) + 2 * device.caps().view_alignment;
        if limit < n * row_bytes && limit < 2 * bytes {
            let what = format!("{limit} bytes of the device's memory are too few for rows: give {} or more", 2 * bytes);
            return Err(Error::Request(what));
        }
        Ok(Slabs { all, row_bytes, bytes, passing })
    }

    /// Brings as many as fit in `limit` bytes and in the device's memory; leaves room for what passes through.
    pub fn settle(&mut self, device: &dyn Device, limit: usize, args: &RowArgs<'_>) -> Result<(), Error> {
        let row_bytes = self.row_bytes;
        let bytes = |slab: &Slab| slab.rows.len() * row_bytes;
        let all: usize = self.all.iter().map(bytes).sum();
        let mut left = if all <= limit { limit } else { limit.saturating_sub(2 * self.bytes) };
        for i in 0..self.all.len() {
            let needed = bytes(&self.all[i]);
            if needed > left {
                break;
            }
            let upload = |bytes: Cow<'_, [u8]>| upload(device, &bytes);
            match args(&self.all[i].rows).into_iter().map(upload).collect() {
                Ok(buffers) => self.all[i].resident = Some(buffers),
                Err(device::Error::OutOfMemory { .. }) if i > 0 => {
                    self.all[i.saturating_sub(ROOM)..].iter_mut().for_each(|slab| slab.resident = None);
                    break;
                }
                Err(error) => return Err(error.into()),
            }
            left -= needed;
        }
        Ok(())
    }

    /// The rows of each slab.
    pub fn ranges(&self) -> impl Iterator<Item = &Range<usize>> {
        self.all.iter().map(|slab| &slab.rows)
    }

    /// All slabs in turn for one scan. Waits while another scan lets slabs of this corpus pass.
    pub fn stream<'a>(&'a self, device: &'a dyn Device, args: &'a RowArgs<'a>) -> Result<Stream<'a>, Error> {
        let mut passing = None;
        if self.bytes > 0 && self.all.iter().any(|slab| slab.resident.is_none()) {
            let mut held = self.passing.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if held.as_ref().is_none_or(|buffers| buffers[0].bytes() < self.bytes) {
                *held = None;
                *held = Some([device.alloc(self.bytes)?, device.alloc(self.bytes)?]);
                // From here on nothing queued uses them, so that the first copies run beside launches too.
                device.sync()?;
            }
            passing = Some(held);
        }
        Ok(Stream { slabs: &self.all, device, args, passing, brought: 0, turn: 0, views: Vec::new() })
    }
}

/// One scan's way through the slabs.
pub struct Stream<'a> {
    slabs: &'a [Slab],
    device: &'a dyn Device,
    args: &'a RowArgs<'a>,
    passing: Option<MutexGuard<'a, Option<[Buffer; 2]>>>,
    /// The first slab that was not looked at yet.
    brought: usize,
    /// The buffer for the next that passes.
    turn: usize,
    /// The arguments of passing slabs that were brought, by slab: of two at most.
    views: Vec<(usize, Vec<Buffer>)>,
}

impl Stream<'_> {
    /// The arguments of slab `i`: those before it are done with.
    pub fn buffers(&mut self, i: usize) -> Result<Vec<Buffer>, Error> {
        if let Some(buffers) = &self.slabs[i].resident {
            return Ok(buffers.clone());
        }
        self.views.retain(|(slab, _)| *slab >= i);
        if self.views.is_empty() {
            self.bring_from(i)?;
        }
        Ok(self.views[0].1.clone())
    }

    /// Once slab `i` is in work: brings the next that passes, unless it is there already.
    pub fn bring_after(&mut self, i: usize) -> Result<(), Error> {
        if self.views.iter().all(|(slab, _)| *slab <= i) {
            self.bring_from(i + 1)?;
        }
        Ok(())
    }

    /// Queues the copies of the first slab from `i` on that passes and was not brought.
    fn bring_from(&mut self, i: usize) -> Result<(), Error> {
        let Some(Some(buffers)) = self.passing.as_deref() else { return Ok(()) };
        let first = i.max(self.brought);
        let passes = |slab: &usize| self.slabs[*slab].resident.is_none();
        let Some(slab) = (first..self.slabs.len()).find(passes) else { return Ok(()) };
        let (unit, mut start) = (self.device.caps().view_alignment, 0);
        let mut views = Vec::new();
        for bytes in (self.args)(&self.slabs[slab].rows) {
            let view = buffers[self.turn].view(start, bytes.len());
            self.device.write_ahead(&view, 0, &bytes)?;
            start = (start + bytes.len()).next_multiple_of(unit);
            views.push(view);
        }
        (self.brought, self.turn) = (slab + 1, 1 - self.turn);
        self.views.push((slab, views));
        Ok(())
    }
}

/// A copy on the device.
pub fn upload(device: &dyn Device, bytes: &[u8]) -> device::Result<Buffer> {
    let buffer = device.alloc(bytes.len())?;
    device.write(&buffer, 0, bytes)?;
    Ok(buffer)
}
