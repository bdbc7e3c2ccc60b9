//! `swiglu`: y = gate · sigmoid(gate) · up, the gated feed-forward's middle              Shazeer 2020, arXiv 2002.05202

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use crate::verify::normal;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// SiLU of one projection times another.
pub static SWIGLU: OpSpec = OpSpec {
    name: "swiglu",
    format: "f32",
    formula: "y[M,F] = gate[M,F] / (1 + exp(−gate[M,F])) · up[M,F]",
    dims: &["M", "F"],
    scalars: &[],
    args: &[
        input("gate", ArgType::Act, &["M", "F"], Fill::With(gates_near_and_far)),
        input("up", ArgType::Act, &["M", "F"], Fill::Normal),
        output("y", ArgType::Act, &["M", "F"]),
    ],
    oracle,
    // An exp counts as one operation.
    cost: |d| Cost { flops: (5 * d["M"] * d["F"]) as u64, bytes: (12 * d["M"] * d["F"]) as u64 },
    tolerance: Tolerance {
        roundings: |_| 6.0,
        nmse: 1e-12,
        why: "exp errs by 1.1 ulp (2.2 u), and where it is made of 2^x by |gate| roundings more, of which y keeps the \
              share 1 − sigmoid; the sum, the quotient and the product round once each. Results under 1e-30 |up| may \
              be flushed to zero",
    },
    cases: &[
        case(&[1, 1], "the smallest"),
        case(&[1, 8], "whole vectors and nothing else"),
        case(&[3, 6], "two elements past whole vectors"),
        case(&[7, 33], "both odd: tails of a warp and of a vec4"),
        case(&[65, 257], "more than one chunk, the last one short"),
        case(&[128, 1536], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    Kernel {
        stem: "swiglu_f32_chunks",
        source: Source::Rust(|d, args| in_chunks(d, args, swiglu::<{ simd::FMA }>)),
        act: Dtype::F32,
        launch: no_grid,
        supports: always,
    },
    #[cfg(target_arch = "x86_64")]
    Kernel {
        stem: "swiglu_f32_chunks_avx2",
        source: Source::Rust(|d, args| in_chunks(d, args, swiglu_avx2)),
        act: Dtype::F32,
        launch: no_grid,
        supports: |_, caps| caps.simd >= Simd::Avx2,
    },
];

const PTX: &[Kernel] = &[ptx!("swiglu_f32_vec4", four_elements_a_thread, always)];

/// A block of 256 threads takes 1024 elements.
fn four_elements_a_thread(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["F"]).div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[
    wgsl!("swiglu_f32_flat" + "exact", |d| flat(d["M"] * d["F"]), always),
    wgsl!("swiglu_f32_vec4" + "exact4", |d| flat((d["M"] * d["F"]).div_ceil(4)), |d, _| (d["M"] * d["F"])
        .is_multiple_of(4)),
];

/// Normal of standard deviation 1, 5 and 40 in turn, no farther than 100 from zero: sigmoid's slope and both its ends.
fn gates_near_and_far(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let shape = [d["M"], d["F"]];
    let gate = |i: usize| (normal(rng) * [1.0, 5.0, 40.0][i % 3]).clamp(-100.0, 100.0) as f32;
    HostTensor::from_f32(&shape, &(0..shape[0] * shape[1]).map(gate).collect::<Vec<_>>())
}

/// The definition in f64, where exp(100) is far from the end of the range.
fn oracle(_: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (gate, up) = (args[0].to_f64(), args[1].to_f64());
    let mut expected = Expected { value: Vec::new(), magnitude: Vec::new() };
    for (g, u) in gate.iter().zip(&up) {
        let sigmoid = 1.0 / (1.0 + (-g).exp());
        let y = g * sigmoid * u;
        expected.value.push(y);
        expected.magnitude.push(y.abs() * (1.0 + g.abs() * (1.0 - sigmoid)) + 1e-30 * u.abs());
    }
    vec![expected]
}

/// CPU: runs of elements in parallel.
fn in_chunks(_: &Dims, args: &mut [Slice<'_>], body: fn(&[f32], &[f32], &mut [f32])) {
    const CHUNK: usize = 2048;
    let [gate, up, y] = args else { unreachable!("three arguments") };
    let inputs = gate.f32().par_chunks(CHUNK).zip(up.f32().par_chunks(CHUNK));
    let grain = simd::grain(0.5 * CHUNK as f64);
    let work = y.f32_mut().par_chunks_mut(CHUNK).zip(inputs).with_min_len(grain);
    work.for_each(|(y, (gate, up))| body(gate, up, y));
}

/// One run. Where exp(−gate) overflows the quotient is −0, its limit.
#[inline(always)]
fn swiglu<const FMA: bool>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = g / (1.0 + simd::exp::<FMA>(-g)) * u;
    }
}

/// One run with AVX2. AVX-512 is no faster by much: memory is near.
#[cfg(target_arch = "x86_64")]
fn swiglu_avx2(gate: &[f32], up: &[f32], y: &mut [f32]) {
    #[target_feature(enable = "avx2,fma")]
    fn body(gate: &[f32], up: &[f32], y: &mut [f32]) {
        swiglu::<true>(gate, up, y);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(gate, up, y) }
}
