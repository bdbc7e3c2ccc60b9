//! NF4 as bitsandbytes stores it: blocks of 64 weights (row-major), 16 levels, `w = LEVELS[code] * absmax`.
//!
//! Encoding gives the bytes of bitsandbytes 0.50.2 on a CPU:
//!
//! ```text
//! absmax = max |w| of the block
//! v      = clamp(w * (1 / max(absmax, 1e-38)), -1, 1)          a block of zeros: v = 0, code 7
//! code   = how many of the 15 midpoints between levels lie below v      (a tie takes the lower level)
//! ```
//!
//! Double quantization stores absmax itself in 8 bits:
//!
//! ```text
//! offset     = mean of all absmax
//! a          = absmax - offset
//! absmax2    = max |a| of 256 blocks
//! v          = clamp(a * (1 / absmax2), -1, 1), moved to the nearest of 65,536 points evenly spread over -1..=1
//! absmax8    = how many of the 255 midpoints of code[256] lie below v; 0 where absmax2 is 0
//! ```
//!
//! The 65,536 points are how its CPU code looks a value up; its GPU code compares v itself, which differs for about
//! one value in 600 by one step. Both decode alike.
//!
//! The mean is the exact one rounded to f32. torch adds in f32, in an order that follows the vector width (for 1024
//! blocks: 4 sums of 16 lanes on AVX-512, of 8 on AVX2) and the number of threads, so its last bit is not a property
//! of the format; the two orders and the exact mean agree on the committed fixture, one running f32 sum does not.

use super::format::{NF4_BLOCK, NF4_NESTED_BLOCK};
use super::{check_finite, Result};
use crate::tensor::{Bytes, Dtype, HostTensor};
use rayon::prelude::*;

/// The 16 levels: quantiles of a normal distribution scaled to -1..=1, with an exact 0 (QLoRA, arXiv 2305.14314).
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The 8-bit dynamic map: 0, 1, and ± seven decades of midpoints 10^(i-6) * 0.1..1, the i-th in 2^i steps; ascending.
/// Built in f32 with the same roundings as bitsandbytes, whose table it equals bit for bit.
pub fn dynamic_map() -> [f32; 256] {
    let mut map = [0.0f32; 256];
    map[1] = 1.0;
    let mut filled = 2;
    for i in 0..7 {
        // Of n points from 0.1 to 1 the first half is counted from the left end and the rest from the right.
        let steps = 1usize << i;
        let step = (1.0 - 0.1f32) / steps as f32;
        let point = |k: usize| {
            if k < steps.div_ceil(2) {
                step.mul_add(k as f32, 0.1)
            } else {
                (-step).mul_add((steps - k) as f32, 1.0)
            }
        };
        let decade = 10f64.powi(i - 6) as f32;
        for k in 0..steps {
            let value = decade * ((point(k) + point(k + 1)) / 2.0);
            map[filled] = value;
            map[filled + 1] = -value;
            filled += 2;
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// What lies halfway between neighbours.
fn midpoints<const N: usize>(ascending: &[f32]) -> [f32; N] {
    std::array::from_fn(|i| (ascending[i] + ascending[i + 1]) / 2.0)
}

pub(super) fn encode(cols: usize, weights: &[f32], parts: &mut [HostTensor]) -> Result<()> {
    let [codes, absmax] = parts else { unreachable!("nf4 has two parts") };
    encode_blocks(cols, weights, &mut codes.bytes, bytemuck::cast_slice_mut(absmax.bytes.as_mut_slice()))
}

pub(super) fn encode_double(cols: usize, weights: &[f32], parts: &mut [HostTensor]) -> Result<()> {
    let [codes, absmax8, map, absmax2, offset] = parts else { unreachable!("nf4dq has five parts") };
    let mut absmax = vec![0.0f32; weights.len() / NF4_BLOCK];
    encode_blocks(cols, weights, &mut codes.bytes, &mut absmax)?;

    let code = dynamic_map();
    map.bytes.as_mut_slice().copy_from_slice(bytemuck::cast_slice(&code));
    let mean = (absmax.iter().map(|&a| a as f64).sum::<f64>() / absmax.len() as f64) as f32;
    offset.bytes.as_mut_slice().copy_from_slice(&mean.to_le_bytes());

    let middle = midpoints::<255>(&code);
    let absmax2: &mut [f32] = bytemuck::cast_slice_mut(absmax2.bytes.as_mut_slice());
    let blocks = absmax.chunks(NF4_NESTED_BLOCK).zip(absmax8.bytes.as_mut_slice().chunks_mut(NF4_NESTED_BLOCK));
    for ((absmax, codes), absmax2) in blocks.zip(absmax2) {
        *absmax2 = absmax.iter().fold(0.0f32, |max, a| max.max((a - mean).abs()));
        if *absmax2 == 0.0 {
            continue; // the parts start as zeros
        }
        let inverse = 1.0 / *absmax2;
        for (code, a) in codes.iter_mut().zip(absmax) {
            let v = on_grid(((a - mean) * inverse).clamp(-1.0, 1.0));
            *code = middle.partition_point(|&m| m < v) as u8;
        }
    }
    Ok(())
}

/// The nearest of 65,536 points from -1 to 1, with the roundings of bitsandbytes.
fn on_grid(v: f32) -> f32 {
    let index = ((v + 1.0) * 0.5).mul_add(65535.0, 0.5) as u16;
    2.0 * index as f32 / 65535.0 - 1.0
}

fn encode_blocks(cols: usize, weights: &[f32], codes: &mut Bytes, absmax: &mut [f32]) -> Result<()> {
    let middle = midpoints::<15>(&LEVELS);
    let codes = codes.as_mut_slice().par_chunks_mut(cols / 2);
    let absmax = absmax.par_chunks_mut(cols / NF4_BLOCK);
    let rows = codes.zip(absmax).zip(weights.par_chunks(cols)).enumerate();
    let error = rows.find_map_first(|(row, ((codes, absmax), weights))| {
        if let Err(error) = check_finite(weights, row) {
            return Some(error);
        }
        let blocks = weights.chunks_exact(NF4_BLOCK).zip(codes.chunks_exact_mut(NF4_BLOCK / 2));
        for ((weights, codes), absmax) in blocks.zip(absmax) {
            *absmax = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
            encode_block(weights, *absmax, &middle, codes);
        }
        None
    });
    error.map_or(Ok(()), Err)
}

fn encode_block(weights: &[f32], absmax: f32, middle: &[f32; 15], codes: &mut [u8]) {
    let inverse = 1.0 / absmax.max(1e-38);
    for (byte, pair) in codes.iter_mut().zip(weights.chunks_exact(2)) {
        *byte = nearest(pair[0] * inverse, middle) << 4 | nearest(pair[1] * inverse, middle);
    }
}

/// How many midpoints lie below `v`; clamping `v` to -1..=1 would not change it.
fn nearest(v: f32, middle: &[f32; 15]) -> u8 {
    middle.iter().map(|&m| (m < v) as u8).sum()
}

/// The absmax of blocks: stored, or rebuilt from 8 bits.
#[derive(Clone, Copy)]
enum Absmax<'a> {
    Plain(&'a [f32]),
    Double { codes: &'a [u8], map: &'a [f32], absmax2: &'a [f32], offset: f32 },
}

impl<'a> Absmax<'a> {
    fn of(parts: &'a [HostTensor]) -> Absmax<'a> {
        match parts[1].dtype {
            Dtype::F32 => Absmax::Plain(parts[1].f32()),
            _ => Absmax::Double {
                codes: parts[1].as_slice(),
                map: parts[2].f32(),
                absmax2: parts[3].f32(),
                offset: parts[4].f32()[0],
            },
        }
    }

    /// As f32, two roundings where it is rebuilt.
    fn get(self, block: usize) -> f32 {
        match self {
            Absmax::Plain(absmax) => absmax[block],
            Absmax::Double { codes, map, absmax2, offset } => {
                map[codes[block] as usize] * absmax2[block / NF4_NESTED_BLOCK] + offset
            }
        }
    }

    /// As a real, and the sum of the magnitudes of its terms.
    fn exact(self, block: usize) -> (f64, f64) {
        match self {
            Absmax::Plain(absmax) => (absmax[block] as f64, absmax[block].abs() as f64),
            Absmax::Double { codes, map, absmax2, offset } => {
                let product = map[codes[block] as usize] as f64 * absmax2[block / NF4_NESTED_BLOCK] as f64;
                (product + offset as f64, product.abs() + offset.abs() as f64)
            }
        }
    }
}

pub(super) fn decode_row(parts: &[HostTensor], row: usize, out: &mut [f32]) {
    let bytes = out.len() / 2;
    let codes = &parts[0].as_slice::<u8>()[row * bytes..(row + 1) * bytes];
    let absmax = Absmax::of(parts);
    let first = row * (out.len() / NF4_BLOCK);
    let blocks = codes.chunks_exact(NF4_BLOCK / 2).zip(out.chunks_exact_mut(NF4_BLOCK));
    for (block, (codes, out)) in blocks.enumerate() {
        let absmax = absmax.get(first + block);
        let levels = LEVELS.map(|level| level * absmax);
        for (out, &byte) in out.chunks_exact_mut(2).zip(codes) {
            out[0] = levels[byte as usize >> 4];
            out[1] = levels[byte as usize & 15];
        }
    }
}

pub(super) fn decode_with_magnitude(parts: &[HostTensor]) -> (Vec<f64>, Vec<f64>) {
    let codes = parts[0].as_slice::<u8>();
    let absmax = Absmax::of(parts);
    let (mut values, mut magnitudes) = (Vec::with_capacity(2 * codes.len()), Vec::with_capacity(2 * codes.len()));
    for (block, codes) in codes.chunks_exact(NF4_BLOCK / 2).enumerate() {
        let (absmax, magnitude) = absmax.exact(block);
        for &byte in codes {
            for code in [byte >> 4, byte & 15] {
                let level = LEVELS[code as usize] as f64;
                values.push(level * absmax);
                magnitudes.push(level.abs() * magnitude);
            }
        }
    }
    (values, magnitudes)
}
