//! `cast`: y = x rounded to bf16, ties to even: what tensor-core kernels take as activations

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;

/// f32 to bf16.
pub static CAST: OpSpec = OpSpec {
    name: "cast",
    format: "bf16",
    formula: "y[M,K] = bf16(x[M,K])",
    dims: &["M", "K"],
    scalars: &[],
    args: &[
        input("x", ArgType::Is(Dtype::F32), &["M", "K"], Fill::Normal),
        output("y", ArgType::Is(Dtype::BF16), &["M", "K"]),
    ],
    oracle,
    cost: |d| Cost { flops: 0, bytes: (6 * d["M"] * d["K"]) as u64 },
    tolerance: Tolerance { roundings: |_| 0.0, nmse: 0.0, why: "one rounding, and which one is said: the same bits" },
    cases: &[
        case(&[1, 1], "the smallest"),
        case(&[7, 33], "both odd: a pair of elements lies across two rows, and one is left over"),
        case(&[65, 257], "more than one chunk, the last one short"),
        case(&[128, 576], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX],
};

const CPU: &[Kernel] = &[Kernel {
    stem: "cast_bf16_chunks",
    source: Source::Rust(chunks),
    act: Dtype::F32,
    launch: no_grid,
    supports: always,
}];

const PTX: &[Kernel] = &[ptx!("cast_bf16_pairs", pairs, always)];

/// A thread for every two elements.
fn pairs(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["K"]).div_ceil(512) as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

/// The definition, f32 being what x holds exactly.
fn oracle(_: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let round = |v: &f64| half::bf16::from_f32(*v as f32).to_f64();
    vec![Expected::relative(args[0].to_f64().iter().map(round).collect())]
}

/// CPU: runs of elements in parallel; memory is the limit.
fn chunks(_: &Dims, args: &mut [Slice<'_>]) {
    const CHUNK: usize = 4096;
    let [x, Slice::Out(y)] = args else { unreachable!("an input and an output") };
    let y: &mut [u16] = bytemuck::cast_slice_mut(y);
    let grain = simd::grain(0.15 * CHUNK as f64);
    y.par_chunks_mut(CHUNK).zip(x.f32().par_chunks(CHUNK)).with_min_len(grain).for_each(|(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y = half::bf16::from_f32(*x).to_bits();
        }
    });
}
