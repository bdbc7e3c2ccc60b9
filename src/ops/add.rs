//! `add`: y = a + b, the residual connection

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;

/// Sum of two activations.
pub static ADD: OpSpec = OpSpec {
    name: "add",
    format: "f32",
    formula: "y[M,K] = a[M,K] + b[M,K]",
    dims: &["M", "K"],
    scalars: &[],
    args: &[
        input("a", ArgType::Act, &["M", "K"], Fill::Normal),
        input("b", ArgType::Act, &["M", "K"], Fill::Normal),
        output("y", ArgType::Act, &["M", "K"]),
    ],
    oracle,
    cost: |d| Cost { flops: (d["M"] * d["K"]) as u64, bytes: (12 * d["M"] * d["K"]) as u64 },
    tolerance: Tolerance { roundings: |_| 1.0, nmse: 1e-14, why: "one addition, rounded once" },
    cases: &[
        case(&[1, 1], "the smallest"),
        case(&[1, 8], "whole vectors and nothing else"),
        case(&[3, 6], "two elements past whole vectors"),
        case(&[7, 33], "both odd: tails of a warp and of a vec4"),
        case(&[65, 257], "more than one chunk, the last one short"),
        case(&[128, 576], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[Kernel {
    stem: "add_f32_chunks",
    source: Source::Rust(chunks),
    act: Dtype::F32,
    launch: no_grid,
    supports: always,
}];

const PTX: &[Kernel] = &[ptx!("add_f32_vec4", four_elements_a_thread, always)];

/// A block of 256 threads takes 1024 elements.
fn four_elements_a_thread(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["K"]).div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[
    wgsl!("add_f32_flat", |d| flat(d["M"] * d["K"]), always),
    wgsl!("add_f32_vec4", |d| flat((d["M"] * d["K"]).div_ceil(4)), |d, _| (d["M"] * d["K"]).is_multiple_of(4)),
];

/// The definition.
fn oracle(_: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (a, b) = (args[0].to_f64(), args[1].to_f64());
    vec![Expected::relative(a.iter().zip(&b).map(|(a, b)| a + b).collect())]
}

/// CPU: runs of elements in parallel; memory is the limit.
fn chunks(_: &Dims, args: &mut [Slice<'_>]) {
    const CHUNK: usize = 4096;
    let [a, b, y] = args else { unreachable!("three arguments") };
    let inputs = a.f32().par_chunks(CHUNK).zip(b.f32().par_chunks(CHUNK));
    let grain = simd::grain(0.15 * CHUNK as f64);
    y.f32_mut().par_chunks_mut(CHUNK).zip(inputs).with_min_len(grain).for_each(|(y, (a, b))| {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a + b;
        }
    });
}
