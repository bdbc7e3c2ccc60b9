//! What a device can do at most, measured: bytes copied, products computed, and what a launch costs that does nothing.
//! Beside it the datasheet's figures of cards that are known.

use std::ops::Range;
use std::time::Instant;

use rayon::prelude::*;

use super::measure::{self, Timing};
use super::tiles;
use crate::device::{Buffer, Device, Result};
use crate::op::{ArgType, Cost, DeviceKind, OpSpec, Simd};
use crate::ops::{self, OPS};
use crate::tensor::Dtype;
use crate::verify;

/// How long a measurement takes, in seconds.
const LONG_ENOUGH: f64 = 0.3;
/// Least bytes of a buffer that is copied, and most.
const COPY_BYTES: usize = 128 << 20;
const COPY_MOST: usize = 512 << 20;
/// Bytes that a thread moves in a sample: what takes some tenths of a millisecond.
const OF_THREAD: usize = 8 << 20;
/// Blocks that read a card's memory at once: enough for every processor to have several.
const READERS: usize = 4096;
/// A sample of tiles' products is some tenths of a millisecond.
const TURNS: u64 = 1 << 13;
/// M, N and K of the product that is timed, and of the larger one where that is too little work; on a CPU also of a
/// smaller one, which other work on the machine interrupts less.
const SMALL_CUBE: usize = 512;
const CUBE: usize = 1024;
const LARGE_CUBE: usize = 4096;
const TOO_SHORT: f64 = 2e-3;
/// Formats of weights whose products are tried for the roofline: the fastest counts.
pub const FORMATS: [&str; 3] = ["f32", "bf16", "q4"];

/// A card as its maker describes it: GB/s of memory, TFLOP/s of bf16 products with sums in f32, without sparsity, and
/// of plain f32.
pub struct Card {
    /// Words that its name holds.
    words: &'static [&'static str],
    /// Bytes a second, in 10^9.
    pub gb_per_s: f64,
    /// Operations a second, in 10^12.
    pub bf16: f64,
    /// The same without tensor cores.
    pub f32: f64,
    /// Where this is written.
    pub source: &'static str,
}

const fn card(words: &'static [&'static str], figures: [f64; 3], source: &'static str) -> Card {
    Card { words, gb_per_s: figures[0], bf16: figures[1], f32: figures[2], source }
}

/// The first whose words all stand in a name is it.
const CARDS: [Card; 14] = [
    card(&["H100", "NVL"], [3900.0, 835.0, 60.0], "NVIDIA H100 datasheet"),
    card(&["H100", "PCIe"], [2000.0, 756.0, 51.0], "NVIDIA H100 datasheet, first edition"),
    card(&["H100"], [3350.0, 989.0, 67.0], "NVIDIA H100 datasheet, SXM"),
    card(&["H200", "NVL"], [4800.0, 835.0, 60.0], "NVIDIA H200 datasheet"),
    card(&["H200"], [4800.0, 989.0, 67.0], "NVIDIA H200 datasheet, SXM"),
    card(&["A100", "SXM", "80GB"], [2039.0, 312.0, 19.5], "NVIDIA A100 datasheet"),
    card(&["A100", "80GB"], [1935.0, 312.0, 19.5], "NVIDIA A100 datasheet, PCIe"),
    card(&["A100"], [1555.0, 312.0, 19.5], "NVIDIA A100 datasheet, 40 GB"),
    card(&["A10G"], [600.0, 70.0, 31.5], "NVIDIA A10G datasheet"),
    card(&["A10"], [600.0, 125.0, 31.2], "NVIDIA A10 datasheet"),
    card(&["L40S"], [864.0, 362.0, 91.6], "NVIDIA L40S datasheet"),
    card(&["L4"], [300.0, 121.0, 30.3], "NVIDIA L4 datasheet"),
    card(&["RTX 4090"], [1008.0, 165.2, 82.6], "NVIDIA Ada GPU architecture white paper"),
    card(&["RTX 3090"], [936.0, 71.0, 35.6], "NVIDIA GA102 white paper"),
];

/// The datasheet's figures of a card, by what its driver calls it.
pub fn datasheet(name: &str) -> Option<&'static Card> {
    let words: Vec<&str> = name.split([' ', '-', ',']).collect();
    let has = |wanted: &str| match wanted.contains(' ') {
        true => name.contains(wanted),
        false => words.contains(&wanted) || wanted == "SXM" && name.contains("SXM"),
    };
    CARDS.iter().find(|card| card.words.iter().all(|word| has(word)))
}

/// The measured limits of a device, each the best of its samples: other work on the machine only lowers them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Roof {
    /// Bytes a second of what is fastest: a copy, reading alone, or an update in place.
    pub bytes_per_s: Option<f64>,
    /// For each type of factors, the operations a second of the fastest product, and what computed it.
    pub flops_per_s: Vec<(Dtype, f64, &'static str)>,
}

impl Roof {
    /// The least time that a cost can take with factors of type `factors`, in seconds, and whether memory decides it.
    /// Where no product of that type was timed nothing is known of arithmetic, and memory alone counts: another type's
    /// products limit nothing.
    pub fn least(&self, cost: Cost, factors: Dtype) -> Option<(f64, bool)> {
        let memory = cost.bytes as f64 / self.bytes_per_s?;
        let of_type = self.flops_per_s.iter().find(|(dtype, ..)| *dtype == factors);
        let compute = of_type.map_or(0.0, |(_, flops, _)| cost.flops as f64 / flops);
        Some((memory.max(compute), memory >= compute))
    }

    /// The same by the datasheet: tensor cores for narrow factors, plain arithmetic for f32, memory alone for codes.
    pub fn least_by(card: &Card, cost: Cost, factors: Dtype) -> f64 {
        let flops = match factors {
            Dtype::F32 => card.f32,
            Dtype::BF16 => card.bf16,
            _ => f64::INFINITY,
        };
        (cost.bytes as f64 / card.gb_per_s / 1e9).max(cost.flops as f64 / flops / 1e12)
    }
}

/// The type of what a kernel multiplies, as limits know it: codes by codes, f16 as fast as bf16.
pub fn factors(spec: &OpSpec, act: Dtype) -> Dtype {
    match spec.args[0].dtype {
        ArgType::Is(Dtype::I8) => Dtype::I8,
        _ if act == Dtype::F16 => Dtype::BF16,
        _ => act,
    }
}

/// Samples of `work`'s own seconds for a third of a second, after one to warm up.
fn samples(work: &mut dyn FnMut() -> Result<f64>) -> Result<Timing> {
    work()?;
    let (start, mut samples) = (Instant::now(), Vec::new());
    while samples.is_empty() || start.elapsed().as_secs_f64() < LONG_ENOUGH {
        samples.push(work()?);
    }
    Ok(Timing::of(samples, 1))
}

/// How fast memory is moved.
pub struct Moved {
    /// Of a sample.
    pub timing: Timing,
    /// What a sample reads and writes.
    pub bytes: f64,
    /// The memory that samples go through, one after the other: more than the caches hold.
    pub through: usize,
}

impl Moved {
    /// Bytes a second in the best sample.
    pub fn speed(&self) -> f64 {
        self.bytes / self.timing.least
    }
}

/// A copy: by the device's own, or on the CPU by all threads, as kernels do.
pub fn copy(device: &dyn Device) -> Result<Moved> {
    let bytes = copy_bytes(device);
    if device.caps().kind == DeviceKind::Cpu {
        let (from, mut to) = (vec![1u64; bytes / 8], vec![2u64; bytes / 8]);
        return parts(bytes, 2, &mut |range, of_thread| {
            let (from, to) = (from[range.clone()].par_chunks(of_thread), to[range].par_chunks_mut(of_thread));
            to.zip(from).for_each(|(to, from)| to.copy_from_slice(from));
        });
    }
    let (from, to) = (device.alloc(bytes)?, device.alloc(bytes)?);
    let timing = samples(&mut || device.time(&mut || device.copy(&from, 0, &to, 0, bytes)))?;
    Ok(Moved { timing, bytes: 2.0 * bytes as f64, through: bytes })
}

/// Bytes of each of the two buffers of a copy: together they are more than the caches hold.
fn copy_bytes(device: &dyn Device) -> usize {
    let cache = cache_bytes(device).unwrap_or(0);
    cache.clamp(COPY_BYTES, COPY_MOST).min(room(device) / 4).next_multiple_of(8)
}

/// Samples of `work` on the words of one part of `bytes` bytes after the other, `times` of what it is moved each time.
/// It is also given the words that a thread takes. Parts are short: other work on the machine interrupts few of them.
fn parts(bytes: usize, times: usize, work: &mut dyn FnMut(Range<usize>, usize)) -> Result<Moved> {
    let (words, threads) = (bytes / 8, rayon::current_num_threads());
    let part = (threads * OF_THREAD / 8).min(words);
    let mut next = 0;
    let timing = samples(&mut || {
        let range = next..next + part;
        next = if range.end + part > words { 0 } else { range.end };
        let start = Instant::now();
        work(range, part.div_ceil(threads));
        Ok(start.elapsed().as_secs_f64())
    })?;
    Ok(Moved { timing, bytes: (times * part * 8) as f64, through: bytes })
}

/// Reading: on the CPU a sum by all threads, elsewhere `squared_norm`. None where no kernel of that runs.
pub fn read(device: &dyn Device) -> Result<Option<Moved>> {
    let bytes = 2 * copy_bytes(device);
    if device.caps().kind == DeviceKind::Cpu {
        let words = vec![1u64; bytes / 8];
        let sum = |part: &[u64]| part.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word));
        return Ok(Some(parts(bytes, 1, &mut |range, of_thread| {
            std::hint::black_box(words[range].par_chunks(of_thread).map(sum).sum::<u64>());
        })?));
    }
    let spec = ops::find("squared_norm", "f32");
    let count = bytes.min(device.caps().max_binding) / 4;
    let dims = spec.dims(&[count, READERS], &[]);
    let Some(kernel) = spec.choose(&dims, Dtype::F32, device.caps()) else { return Ok(None) };
    let (x, part) = (device.alloc(4 * count)?, device.alloc(4 * READERS)?);
    device.write(&x, 0, bytemuck::cast_slice(&vec![1.0f32; count]))?;
    let timing = samples(&mut || device.time(&mut || device.launch(spec, kernel, &[&x, &part], &dims)))?;
    Ok(Some(Moved { timing, bytes: (spec.cost)(&dims).bytes as f64, through: 4 * count }))
}

/// Reading and writing in place: on the CPU, by all threads, where a copy may also read what it writes. None elsewhere.
pub fn update(device: &dyn Device) -> Result<Option<Moved>> {
    if device.caps().kind != DeviceKind::Cpu {
        return Ok(None);
    }
    let bytes = 2 * copy_bytes(device);
    let mut words = vec![1u64; bytes / 8];
    let add = |part: &mut [u64]| part.iter_mut().for_each(|word| *word = word.wrapping_add(1));
    let moved = parts(bytes, 2, &mut |range, of_thread| words[range].par_chunks_mut(of_thread).for_each(add))?;
    Ok(Some(moved))
}

/// The time of products of AMX tiles with factors of a type, and their operations. None where there are none.
pub fn tiles(device: &dyn Device, factors: Dtype) -> Result<Option<(Timing, f64)>> {
    if device.caps().kind != DeviceKind::Cpu || device.caps().simd != Simd::Amx {
        return Ok(None);
    }
    let Some(operations) = tiles::products(factors, 1) else { return Ok(None) };
    let timing = samples(&mut || {
        let start = Instant::now();
        tiles::products(factors, TURNS);
        Ok(start.elapsed().as_secs_f64())
    })?;
    Ok(Some((timing, (operations * TURNS) as f64)))
}

/// The fastest product with activations of a type and weights of some formats: its kernel, time and operations. None
/// where no kernel runs.
pub fn matmul(device: &dyn Device, act: Dtype, formats: &[&str]) -> Result<Option<(&'static str, Timing, f64)>> {
    let cpu = device.caps().kind == DeviceKind::Cpu;
    let products = OPS.iter().filter(|op| op.name == "qmatmul" && formats.contains(&op.format));
    let mut best: Option<(&'static str, Timing, f64)> = None;
    for op in products {
        for size in if cpu { [SMALL_CUBE, CUBE] } else { [CUBE, LARGE_CUBE] } {
            let Some(found) = cube(device, op, act, size)? else { break };
            let enough = !cpu && found.1.median >= TOO_SHORT;
            let rate = |(_, timing, flops): &(&str, Timing, f64)| flops / timing.least;
            if best.as_ref().is_none_or(|best| rate(&found) > rate(best)) {
                best = Some(found);
            }
            if enough {
                break;
            }
        }
    }
    Ok(best)
}

fn cube(device: &dyn Device, op: &OpSpec, act: Dtype, size: usize) -> Result<Option<(&'static str, Timing, f64)>> {
    // Every dim is the edge of the cube but those that say where and what to add: no offset, no bias, no adapter.
    let value = |dim: &&str| match *dim {
        "M" | "N" | "K" | "LDY" => size,
        "G" => 32,
        _ => 0,
    };
    let dims = op.dims(&op.dims.iter().map(value).collect::<Vec<_>>(), &vec![0.0; op.scalars.len()]);
    let Some(kernel) = op.choose(&dims, act, device.caps()) else { return Ok(None) };
    let inputs = super::inputs::Inputs::new(op, &dims, act);
    let upload = |i| {
        let bytes = inputs.bytes(op, i);
        let buffer = device.alloc(bytes.len())?;
        device.write(&buffer, 0, &bytes)?;
        Ok(buffer)
    };
    let buffers = (0..op.args.len()).map(upload).collect::<Result<Vec<Buffer>>>()?;
    let args: Vec<_> = buffers.iter().collect();
    let timing = samples(&mut || device.time(&mut || device.launch(op, kernel, &args, &dims)))?;
    Ok(Some((kernel.stem, timing, (op.cost)(&dims).flops as f64)))
}

/// What a launch costs that has next to nothing to do: `add` of one element, one after the other.
pub fn launch(device: &dyn Device, budget: f64) -> Result<Option<(&'static str, Timing)>> {
    let Some(op) = OPS.iter().find(|op| op.name == "add") else { return Ok(None) };
    let dims = op.dims(&[1, 1], &[]);
    let Some(kernel) = op.choose(&dims, Dtype::F32, device.caps()) else { return Ok(None) };
    let tensors = verify::fill(op, &dims, kernel.act, 1);
    let buffers = tensors.iter().map(|tensor| {
        let buffer = device.alloc(tensor.bytes.len())?;
        device.write(&buffer, 0, tensor.bytes.as_slice())?;
        Ok(buffer)
    });
    let buffers = buffers.collect::<Result<Vec<Buffer>>>()?;
    let args: Vec<_> = buffers.iter().collect();
    let mut go = || device.launch(op, kernel, &args, &dims);
    go()?;
    let once = device.time(&mut go)?;
    Ok(Some((kernel.stem, measure::time(device, once, budget, &mut go)?)))
}

/// The best rates for `doctor`: GB/s of a copy, and GFLOP/s of the fastest product of f32 by f32.
pub fn peaks(device: &dyn Device) -> Result<(f64, Option<f64>)> {
    let copied = copy(device)?;
    let product = matmul(device, Dtype::F32, &["f32"])?;
    Ok((copied.speed() / 1e9, product.map(|(_, timing, flops)| flops / timing.least / 1e9)))
}

/// The last-level cache in bytes, where the system or the driver tells it.
pub fn cache_bytes(device: &dyn Device) -> Option<usize> {
    match device.caps().kind {
        DeviceKind::Cpu => {
            let folders = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
            let size = |entry: std::io::Result<std::fs::DirEntry>| {
                let text = std::fs::read_to_string(entry.ok()?.path().join("size")).ok()?;
                let (digits, unit) = text.trim().split_at(text.trim().find(|c: char| !c.is_ascii_digit())?);
                let unit = match unit {
                    "K" => 1 << 10,
                    "M" => 1 << 20,
                    "G" => 1 << 30,
                    _ => return None,
                };
                digits.parse::<usize>().ok()?.checked_mul(unit)
            };
            folders.filter_map(size).max()
        }
        DeviceKind::Cuda => {
            use cudarc::driver::{result, sys::CUdevice_attribute_enum as Attribute};
            let ordinal = device.id().split_once(':').and_then(|(_, n)| n.parse().ok()).unwrap_or(0);
            let card = result::device::get(ordinal).ok()?;
            // SAFETY: the driver is loaded, for `device` is open, and it just named the card.
            let bytes = unsafe { result::device::get_attribute(card, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE) };
            bytes.ok().and_then(|bytes| usize::try_from(bytes).ok()).filter(|&bytes| bytes > 0)
        }
        _ => None,
    }
}

/// Bytes that measurements may take of a device's memory.
pub fn room(device: &dyn Device) -> usize {
    const UNKNOWN: usize = 1 << 30;
    const MOST: usize = 8 << 30;
    match device.caps().kind {
        DeviceKind::Cpu => {
            let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
            let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
            let kib: Option<usize> = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
            kib.map_or(UNKNOWN, |kib| (kib.saturating_mul(1024) / 4).min(MOST))
        }
        DeviceKind::Cuda => (device.caps().max_binding / 4).min(MOST),
        _ => UNKNOWN,
    }
}

/// The driver's version, where there is a driver that tells it.
pub fn driver(device: &dyn Device) -> Option<String> {
    let description = device.description();
    match device.caps().kind {
        DeviceKind::Cuda => {
            let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
            let number = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
            let found = text.lines().next().and_then(|line| line.split_whitespace().find(number));
            let said = || Some(description.rsplit_once(", driver for ")?.1.to_string());
            found.map(str::to_string).or_else(said)
        }
        // name, interface, driver
        DeviceKind::Wgpu => description.splitn(3, ", ").nth(2).map(str::to_string),
        _ => None,
    }
}

/// A number from 0 on: processes that want to run, averaged over a minute; none where the system does not tell.
pub fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_their_names() {
        let bandwidth = |name: &str| datasheet(name).map(|card| card.gb_per_s);
        assert_eq!(bandwidth("NVIDIA H100 80GB HBM3"), Some(3350.0));
        assert_eq!(bandwidth("NVIDIA H100 PCIe"), Some(2000.0));
        assert_eq!(bandwidth("NVIDIA H200"), Some(4800.0));
        assert_eq!(bandwidth("NVIDIA A100-SXM4-80GB"), Some(2039.0));
        assert_eq!(bandwidth("NVIDIA A100-SXM4-40GB"), Some(1555.0));
        assert_eq!(bandwidth("NVIDIA A100 80GB PCIe"), Some(1935.0));
        assert_eq!(bandwidth("NVIDIA L4"), Some(300.0));
        assert_eq!(bandwidth("NVIDIA L40S"), Some(864.0));
        assert_eq!(bandwidth("NVIDIA GeForce RTX 4090"), Some(1008.0));
        assert_eq!(bandwidth("Intel(R) Xeon(R) Processor"), None);
    }

    #[test]
    fn the_slower_of_memory_and_arithmetic_is_the_least_time() {
        let roof = Roof { bytes_per_s: Some(1e9), flops_per_s: vec![(Dtype::F32, 1e10, "x")] };
        assert_eq!(roof.least(Cost { flops: 1, bytes: 2_000_000_000 }, Dtype::F32), Some((2.0, true)));
        assert_eq!(roof.least(Cost { flops: 40_000_000_000, bytes: 1 }, Dtype::F32), Some((4.0, false)));
        let of_others = roof.least(Cost { flops: 20_000_000_000, bytes: 1_000_000_000 }, Dtype::BF16);
        assert_eq!(of_others, Some((1.0, true)), "products of this type were not timed, and may be faster than f32's");
        assert_eq!(Roof::default().least(Cost { flops: 1, bytes: 1 }, Dtype::F32), None);
    }
}
