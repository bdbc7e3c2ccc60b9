//! `rope_backward`: the gradient of [`rope`](super::rope), which is the rotation by minus the angle

use super::simd;
use crate::op::*;
use crate::ops::rope::{frequencies, table, Scaling};
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;

/// Rotation of every head of every row back by the row's position.
pub static ROPE_BACKWARD: OpSpec = OpSpec {
    name: "rope_backward",
    format: "f32",
    formula:
        "dx[i] = dy[i]·cos_i + dy[i+D/2]·sin_i; dx[i+D/2] = dy[i+D/2]·cos_i − dy[i]·sin_i, i < D/2, in each head of \
              dy[M,H*D]",
    dims: &["M", "H", "D", "C"],
    scalars: &[],
    args: &[
        input("dy", ArgType::Act, &["M", "H*D"], Fill::Normal),
        input("position", ArgType::Is(Dtype::U32), &["M"], Fill::Below("C")),
        input(
            "table",
            ArgType::Is(Dtype::F32),
            &["C", "D"],
            Fill::With(|d, _| {
                HostTensor::from_f32(&[d["C"], d["D"]], &table(d["C"], &frequencies(d["D"], 10_000.0, Scaling::None)))
            }),
        ),
        output("dx", ArgType::Act, &["M", "H*D"]),
    ],
    oracle,
    cost: |d| {
        let elements = d["M"] * d["H"] * d["D"];
        let table = d["M"].min(d["C"]) * d["D"];
        Cost { flops: 3 * elements as u64, bytes: (8 * elements + 4 * d["M"] + 4 * table) as u64 }
    },
    tolerance: Tolerance {
        roundings: |_| 2.01,
        nmse: 1e-13,
        why: "two products and their sum: each term is rounded twice, (1 + u)² − 1 = 2 u and a little",
    },
    cases: &[
        case(&[1, 1, 2, 1], "the smallest"),
        case(&[7, 3, 66, 33], "half a head of 33: tails of a warp and of a vec4"),
        case(&[65, 7, 18, 257], "odd numbers of rows, heads and pairs"),
        case(&[257, 1, 32, 65], "more rows than positions"),
        case(&[256, 9, 64, 2048], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[rust("rope_backward_f32_rows", rows, always)];

const PTX: &[Kernel] = &[ptx!("rope_backward_f32_warp", four_heads_a_block, always)];

/// A block of 128 threads holds four warps, each warp a head of a row.
fn four_heads_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["H"].div_ceil(4) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[wgsl!("rope_backward_f32_flat", |d| flat(d["M"] * d["H"] * d["D"] / 2), always)];

/// The definition, by indices.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (h, dim) = (d["H"], d["D"]);
    let (dy, position, table) = (args[0].to_f64(), args[1].u32(), args[2].to_f64());
    let mut expected = Expected { value: vec![0.0; dy.len()], magnitude: vec![0.0; dy.len()] };
    for (row, &p) in position.iter().enumerate() {
        for head in 0..h {
            for i in 0..dim / 2 {
                let at = p as usize * dim + i;
                let (cos, sin) = (table[at], table[at + dim / 2]);
                let first = (row * h + head) * dim + i;
                let second = first + dim / 2;
                expected.value[first] = dy[first] * cos + dy[second] * sin;
                expected.value[second] = dy[second] * cos - dy[first] * sin;
                expected.magnitude[first] = (dy[first] * cos).abs() + (dy[second] * sin).abs();
                expected.magnitude[second] = (dy[second] * cos).abs() + (dy[first] * sin).abs();
            }
        }
    }
    vec![expected]
}

/// CPU: rows in parallel, each reading its row of the table once for all heads.
fn rows(d: &Dims, args: &mut [Slice<'_>]) {
    let (h, dim) = (d["H"], d["D"]);
    let [dy, position, table, dx] = args else { unreachable!("four arguments") };
    let (dy, position, table) = (dy.f32(), position.u32(), table.f32());

    let one_row = |(dx, (dy, p)): (&mut [f32], (&[f32], &u32))| {
        let (cos, sin) = table[*p as usize * dim..][..dim].split_at(dim / 2);
        for (dx, dy) in dx.chunks_exact_mut(dim).zip(dy.chunks_exact(dim)) {
            let (dx0, dx1) = dx.split_at_mut(dim / 2);
            let (dy0, dy1) = dy.split_at(dim / 2);
            for ((((dx, a), b), cos), sin) in dx0.iter_mut().zip(dy0).zip(dy1).zip(cos).zip(sin) {
                *dx = a * cos + b * sin;
            }
            for ((((dx, a), b), cos), sin) in dx1.iter_mut().zip(dy0).zip(dy1).zip(cos).zip(sin) {
                *dx = b * cos - a * sin;
            }
        }
    };
    let grain = simd::grain(0.2 * (h * dim) as f64);
    let inputs = dy.par_chunks(h * dim).zip(position);
    dx.f32_mut().par_chunks_mut(h * dim).zip(inputs).with_min_len(grain).for_each(one_row);
}
