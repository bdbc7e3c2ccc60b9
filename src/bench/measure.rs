//! How a time is taken: buffers enough to outlast the cache, warm-up, samples by the device's clock, their median.

use crate::device::{Buffer, Device, Result};
use crate::op::DeviceKind;

/// Largest piece of memory that views are cut from, where the device binds as much.
const PIECE: usize = 256 << 20;
/// Most sets of buffers that are taken in turn; an adapter of wgpu keeps a binding for each.
const SETS: usize = 1 << 17;
const SETS_WGPU: usize = 512;
/// A sample lasts at least so long, in seconds: many steps of the clock it is read from.
const SAMPLE_CPU: f64 = 20e-6;
const SAMPLE_DEVICE: f64 = 100e-6;
/// Most samples of a row, and the fewest that say anything of their spread.
const MOST: usize = 501;
const FEWEST: usize = 3;
/// (p80 − p20) / median above which samples are taken again.
const NOISY: f64 = 0.1;

/// Memory that rows use one after the other.
pub struct Arena<'a> {
    device: &'a dyn Device,
    pieces: Vec<Buffer>,
    /// The piece and the byte of it that come next.
    next: (usize, usize),
    piece: usize,
}

impl<'a> Arena<'a> {
    /// An empty one.
    pub fn new(device: &'a dyn Device) -> Arena<'a> {
        let caps = device.caps();
        // Where kernels write one view and read another of one buffer, wgpu takes all of it for written.
        let piece = PIECE.min(caps.max_binding);
        Arena { device, pieces: Vec::new(), next: (0, 0), piece }
    }

    /// All memory is free again.
    pub fn reset(&mut self) {
        self.next = (0, 0);
        // What was made for one large argument goes.
        self.pieces.retain(|piece| piece.bytes() == self.piece);
    }

    /// A view of at least `bytes` bytes, a multiple of 4.
    pub fn take(&mut self, bytes: usize) -> Result<Buffer> {
        let rounded = bytes.next_multiple_of(4);
        if rounded > self.piece {
            return self.device.alloc(rounded);
        }
        if self.next.1 + rounded > self.piece {
            self.next = (self.next.0 + 1, 0);
        }
        if self.next.0 == self.pieces.len() {
            self.pieces.push(self.device.alloc(self.piece)?);
        }
        let view = self.pieces[self.next.0].view(self.next.1, rounded);
        self.next.1 += rounded.next_multiple_of(self.device.caps().view_alignment);
        if self.next.1 > self.piece {
            self.next = (self.next.0 + 1, 0);
        }
        Ok(view)
    }
}

/// How many sets of `set` bytes are taken in turn so that none is in a cache of `cache` bytes when it is met again, and
/// whether so many fit `room` bytes.
pub fn sets(kind: DeviceKind, set: usize, cache: usize, room: usize) -> (usize, bool) {
    let most = if kind == DeviceKind::Wgpu { SETS_WGPU } else { SETS };
    let wanted = (cache + cache / 4).div_ceil(set.max(1)) + 1;
    let taken = wanted.min(room / set.max(1)).clamp(1, most);
    (taken, taken > 1 && taken * set >= cache)
}

/// Times of a launch, in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// The median of the samples.
    pub median: f64,
    /// The least of them.
    pub least: f64,
    /// A fifth of them is below; none of fewer than three.
    pub p20: Option<f64>,
    /// A fifth of them is above.
    pub p80: Option<f64>,
    /// How many samples.
    pub n: usize,
    /// Launches in each.
    pub launches: usize,
    /// Samples spread more than 10 % of their median, twice.
    pub noisy: bool,
}

impl Timing {
    /// Of samples of `launches` launches each. Panics without samples.
    pub fn of(mut samples: Vec<f64>, launches: usize) -> Timing {
        samples.sort_by(f64::total_cmp);
        let n = samples.len();
        let spread = n >= FEWEST;
        let (p20, p80) = (quantile(&samples, 0.2), quantile(&samples, 0.8));
        let median = quantile(&samples, 0.5);
        let noisy = spread && (p80 - p20) / median > NOISY;
        let least = samples[0];
        Timing { median, least, p20: spread.then_some(p20), p80: spread.then_some(p80), n, launches, noisy }
    }
}

/// Between the two samples of a sorted list that are nearest to a share of it.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Times `launch`, which is warm; `once` is about what one takes, `budget` what all may take, in seconds. Samples that
/// spread much are taken once more, and the calmer ones count.
pub fn time(device: &dyn Device, once: f64, budget: f64, launch: &mut dyn FnMut() -> Result<()>) -> Result<Timing> {
    let least = if device.caps().kind == DeviceKind::Cpu { SAMPLE_CPU } else { SAMPLE_DEVICE };
    let launches = (least / once.max(1e-9)).ceil().clamp(1.0, 1000.0) as usize;
    let wanted = budget / (once * launches as f64).max(1e-9);
    let n = if wanted < 0.5 { 1 } else { (wanted as usize).clamp(FEWEST, MOST) };
    let mut series = || {
        let sample = |_| {
            let seconds = device.time(&mut || (0..launches).try_for_each(|_| launch()))?;
            Ok(seconds / launches as f64)
        };
        Ok(Timing::of((0..n).map(sample).collect::<Result<Vec<f64>>>()?, launches))
    };
    let first = series()?;
    if !first.noisy {
        return Ok(first);
    }
    let second: Timing = series()?;
    let spread = |timing: &Timing| match (timing.p20, timing.p80) {
        (Some(p20), Some(p80)) => (p80 - p20) / timing.median,
        _ => f64::INFINITY,
    };
    Ok(if spread(&second) < spread(&first) { second } else { first })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn quantiles_lie_between_samples() {
        let timing = Timing::of(vec![5.0, 1.0, 2.0, 4.0, 3.0, 6.0], 2);
        assert_eq!((timing.median, timing.p20, timing.p80), (3.5, Some(2.0), Some(5.0)));
        assert!(timing.noisy && timing.n == 6 && timing.launches == 2);
        let one = Timing::of(vec![1.0], 1);
        assert_eq!((one.p20, one.noisy), (None, false), "of one sample no spread is known");
    }

    #[test]
    fn sets_outlast_the_cache_where_there_is_room() {
        let (taken, cold) = sets(DeviceKind::Cpu, 1000, 100_000, 1 << 30);
        assert!(cold && taken * 1000 > 100_000, "{taken}");
        assert_eq!(sets(DeviceKind::Cpu, 1000, 100_000, 50_000), (50, false));
        let (taken, cold) = sets(DeviceKind::Cuda, 1 << 30, 50 << 20, 1 << 33);
        assert_eq!((taken, cold), (2, true), "the end of one set would still be there");
        assert_eq!(sets(DeviceKind::Cpu, 0, 0, 0), (1, false));
    }

    #[test]
    fn views_of_an_arena_do_not_meet() {
        let device = Cpu::new();
        let mut arena = Arena { piece: 1024, ..Arena::new(&device) };
        let views: Vec<Buffer> = [100, 0, 700, 500, 5000, 1024].map(|bytes| arena.take(bytes).unwrap()).into();
        for (i, a) in views.iter().enumerate() {
            assert!(views[i + 1..].iter().all(|b| !a.overlaps(b)), "{i}");
        }
        assert_eq!(views[0].bytes(), 100);
        arena.reset();
        assert_eq!(arena.pieces.len(), 3);
    }
}
