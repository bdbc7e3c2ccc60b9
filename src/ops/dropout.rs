//! `dropout`: y = x · keep / (1 − p) (+ y), the mask a hash of where an element stands        Srivastava et al. 2014
//!
//! Whether element (m, k) is kept depends on nothing but (k, ROW0 + m, SEED, STREAM), so every device, order and cut
//! into chunks gives the same mask, and the backward pass makes it again: it is this op on the gradient, with the same
//! params. A caller gives each use, such as a projection in a step, a STREAM of its own.
//!
//! ```text
//! v = (k, ROW0 + m, SEED, STREAM) · 1664525 + 1013904223                            32-bit words that wrap around
//! twice:  v.x += v.y·v.w;  v.y += v.z·v.x;  v.z += v.x·v.y;  v.w += v.y·v.z;   between the two:  v ^= v >> 16
//! dropped = v.x < DROP
//! ```
//!
//! This is pcg4d (Jarzynski & Olano 2020, "Hash Functions for GPU Rendering", JCGT 9(3)): 32-bit products are all it
//! needs. [`threshold`] makes DROP and the scale from p. With `ACC` = 1 the result is added to y.

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;

/// Elements dropped at random, the rest scaled up.
pub static DROPOUT: OpSpec = OpSpec {
    name: "dropout",
    format: "f32",
    formula: "y[m,k] = hash(k, ROW0 + m, SEED, STREAM) < DROP ? 0 : scale · x[m,k] (+ y[m,k] where ACC is 1)",
    dims: &["M", "K", "ROW0", "SEED", "STREAM", "DROP", "ACC"],
    scalars: &["scale"],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::Normal),
        inout("y", ArgType::Is(Dtype::F32), &["M", "K"], Fill::Sum),
    ],
    oracle,
    // A hash counts as one operation.
    cost: |d| Cost { flops: (2 * d["M"] * d["K"]) as u64, bytes: ((8 + 4 * d["ACC"]) * d["M"] * d["K"]) as u64 },
    tolerance: Tolerance { roundings: |_| 2.01, nmse: 1e-13, why: "one product and one sum; the mask is exact" },
    // M, K, ROW0, SEED, STREAM, DROP, ACC
    cases: &[
        case_with(&[1, 1, 0, 0, 0, 0, 0], &[1.0], "the smallest: nothing is dropped"),
        case_with(&[7, 33, 5, 1, 2, 0x8000_0000, 1], &[2.0], "half is dropped, the rest added to y"),
        case_with(
            &[65, 257, 0xFFFF_FFF0, 0xFFFF_FFFF, 7, 0x1999_999A, 0],
            &[1.111_111_2],
            "a tenth; words wrap around",
        ),
        case_with(&[3, 65, 0, 42, 0, 0xFFFF_FFFF, 0], &[3.0], "nearly all is dropped"),
        case_with(&[256, 576, 0, 42, 13, 0x0CCC_CCCD, 0], &[1.052_631_6], "SmolLM2-135M, p = 0.05"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    rust("dropout_f32_rows", |d, args| rows(d, args, one_row), always),
    #[cfg(target_arch = "x86_64")]
    rust("dropout_f32_rows_avx2", |d, args| rows(d, args, one_row_avx2), has_avx2),
];

const PTX: &[Kernel] = &[ptx!("dropout_f32_warp", four_rows_a_block, always)];

/// A block of 128 threads holds four warps, each warp one row.
fn four_rows_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"].div_ceil(4) as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[wgsl!("dropout_f32_flat", |d| flat(d["M"] * d["K"]), always)];

/// The dim DROP and the scalar `scale` for a probability 0 ≤ p < 1 of dropping: ⌊p·2³²⌋, 1/(1 − p). Panics for others.
pub fn threshold(p: f64) -> (usize, f32) {
    assert!((0.0..1.0).contains(&p), "a probability of dropping is at least 0 and below 1, not {p}");
    ((p * (1u64 << 32) as f64) as usize, (1.0 / (1.0 - p)) as f32)
}

/// The first word of pcg4d.
#[inline(always)]
fn hash(column: u32, row: u32, seed: u32, stream: u32) -> u32 {
    let [mut x, mut y, mut z, mut w] =
        [column, row, seed, stream].map(|v| v.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    x = x.wrapping_add(y.wrapping_mul(w));
    y = y.wrapping_add(z.wrapping_mul(x));
    z = z.wrapping_add(x.wrapping_mul(y));
    w = w.wrapping_add(y.wrapping_mul(z));
    [x, y, w] = [x, y, w].map(|v| v ^ (v >> 16));
    x.wrapping_add(y.wrapping_mul(w))
}

/// The definition.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (k, scale) = (d["K"], d.scalar("scale") as f64);
    let (x, before) = (args[0].to_f64(), args[1].to_f64());
    let mut expected = Expected { value: Vec::new(), magnitude: Vec::new() };
    for (i, (x, before)) in x.iter().zip(before).enumerate() {
        let row = (d["ROW0"] as u32).wrapping_add((i / k) as u32);
        let kept = hash((i % k) as u32, row, d["SEED"] as u32, d["STREAM"] as u32) >= d["DROP"] as u32;
        let (term, before) = (if kept { scale * x } else { 0.0 }, if d["ACC"] == 1 { before } else { 0.0 });
        expected.value.push(term + before);
        expected.magnitude.push(term.abs() + before.abs());
    }
    vec![expected]
}

/// One row: its number, the words and what to add to.
type Row = fn(&Dims, u32, &[f32], &mut [f32]);

/// CPU: rows in parallel.
fn rows(d: &Dims, args: &mut [Slice<'_>], row: Row) {
    let k = d["K"];
    let [x, y] = args else { unreachable!("two arguments") };
    let grain = simd::grain(0.5 * k as f64);
    let work = y.f32_mut().par_chunks_mut(k).zip(x.f32().par_chunks(k)).enumerate().with_min_len(grain);
    work.for_each(|(m, (y, x))| row(d, (d["ROW0"] as u32).wrapping_add(m as u32), x, y));
}

#[inline(always)]
fn one_row(d: &Dims, row: u32, x: &[f32], y: &mut [f32]) {
    let (seed, stream, drop, scale) = (d["SEED"] as u32, d["STREAM"] as u32, d["DROP"] as u32, d.scalar("scale"));
    let term = |k: usize, x: f32| if hash(k as u32, row, seed, stream) < drop { 0.0 } else { scale * x };
    let elements = y.iter_mut().zip(x).enumerate();
    if d["ACC"] == 1 {
        elements.for_each(|(k, (y, x))| *y += term(k, *x));
    } else {
        elements.for_each(|(k, (y, x))| *y = term(k, *x));
    }
}

#[cfg(target_arch = "x86_64")]
fn one_row_avx2(d: &Dims, row: u32, x: &[f32], y: &mut [f32]) {
    #[target_feature(enable = "avx2,fma")]
    fn body(d: &Dims, row: u32, x: &[f32], y: &mut [f32]) {
        one_row(d, row, x, y);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(d, row, x, y) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_dropped_as_asked_for() {
        let n = 1 << 20;
        for p in [0.05, 0.5, 0.9] {
            let (drop, scale) = threshold(p);
            let kept = (0..n).filter(|i| hash(i % 1024, i / 1024, 7, 3) >= drop as u32).count();
            // Five standard deviations of a binomial distribution.
            let spread = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
            assert!((kept as f64 - n as f64 * (1.0 - p)).abs() < spread, "p {p}: {kept} of {n} kept");
            assert!((scale as f64 * (1.0 - p) - 1.0).abs() < 1e-7);
        }
    }

    #[test]
    fn neighbours_and_streams_are_independent() {
        // Of two independent masks of p = 1/2 half the elements agree.
        let n = 1u32 << 18;
        let kept = |i: u32, seed: u32, stream: u32| hash(i % 512, i / 512, seed, stream) >> 31;
        let agree = |other: &dyn Fn(u32) -> u32| (0..n).filter(|&i| kept(i, 1, 1) == other(i)).count() as f64;
        let spread = 5.0 * (n as f64 / 4.0).sqrt();
        let others: [&dyn Fn(u32) -> u32; 5] =
            [&|i| kept(i, 2, 1), &|i| kept(i, 1, 2), &|i| kept(i + 1, 1, 1), &|i| kept(i + 512, 1, 1), &|i| {
                kept(i, 1, 0)
            }];
        for (which, other) in others.iter().enumerate() {
            assert!((agree(other) - n as f64 / 2.0).abs() < spread, "mask {which}: {} of {n}", agree(other));
        }
    }
}
