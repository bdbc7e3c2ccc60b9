//! `gather_rows`: `y[n] = x[index[n]]`, zero where `index[n]` names no row of x
//!
//! Both ways of leaving rows out: with the list of the rows to keep it packs them, and with the inverse list, row n's
//! place among the kept or M for none, it brings gradients back to their places, each written once, so in no order.

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Rows by index, zeros where there is none.
pub static GATHER_ROWS: OpSpec = OpSpec {
    name: "gather_rows",
    format: "f32",
    formula: "y[n,k] = index[n] < M ? x[index[n],k] : 0",
    dims: &["N", "K", "M"],
    scalars: &[],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::Normal),
        input("index", ArgType::Is(Dtype::U32), &["N"], Fill::With(indices)),
        output("y", ArgType::Act, &["N", "K"]),
    ],
    oracle,
    // A row asked for twice is read once.
    cost: |d| Cost { flops: 0, bytes: 4 * ((d["N"].min(d["M"]) + d["N"]) * d["K"] + d["N"]) as u64 },
    tolerance: Tolerance { roundings: |_| 0.0, nmse: 0.0, why: "values are copied" },
    // N, K, M
    cases: &[
        case(&[1, 1, 1], "the smallest"),
        case(&[7, 33, 3], "both odd, more rows than x has"),
        case(&[65, 257, 300], "fewer rows than x has"),
        case(&[257, 65, 1], "one row, again and again"),
        case(&[256, 576, 224], "SmolLM2-135M, some labels left out"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[rust("gather_rows_f32_rows", rows, always)];

const PTX: &[Kernel] = &[ptx!("gather_rows_f32_warp", four_rows_a_block, always)];

/// A block of 128 threads holds four warps, each warp one row.
fn four_rows_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["N"].div_ceil(4) as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[wgsl!("gather_rows_f32_flat", |d| flat(d["N"] * d["K"]), always)];

/// Indices up to M, which is none; the last one far beyond.
fn indices(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let mut index: Vec<u32> = (0..d["N"]).map(|_| rng.random_range(0..=d["M"] as u32)).collect();
    if let [_, .., last] = &mut index[..] {
        *last = u32::MAX;
    }
    HostTensor::from_u32(&[d["N"]], &index)
}

/// The definition.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (k, m) = (d["K"], d["M"]);
    let x = args[0].to_f64();
    let row = |i: &u32| if (*i as usize) < m { x[*i as usize * k..][..k].to_vec() } else { vec![0.0; k] };
    vec![Expected::relative(args[1].u32().iter().flat_map(row).collect())]
}

/// CPU: rows in parallel.
fn rows(d: &Dims, args: &mut [Slice<'_>]) {
    let (k, m) = (d["K"], d["M"]);
    let [x, index, y] = args else { unreachable!("three arguments") };
    let (x, index) = (x.f32(), index.u32());
    let work = y.f32_mut().par_chunks_mut(k).zip(index).with_min_len(simd::grain(0.1 * k as f64));
    work.for_each(|(y, &i)| match i as usize {
        i if i < m => y.copy_from_slice(&x[i * k..(i + 1) * k]),
        _ => y.fill(0.0),
    });
}
