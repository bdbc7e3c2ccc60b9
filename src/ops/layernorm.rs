//! `layernorm`: y = (x − mean x) / sqrt(var x + eps) · gain + bias, row by row         Ba et al. 2016, arXiv 1607.06450

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use crate::verify::normal;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Norm of rows to mean 0 and variance 1, then gain and bias; `eps` from the model.
pub static LAYERNORM: OpSpec = OpSpec {
    name: "layernorm",
    format: "f32",
    formula: "y[M,K] = (x[M,K] − mean) / sqrt(mean over K of (x − mean)² + eps) · gain[K] + bias[K]",
    dims: &["M", "K"],
    scalars: &["eps"],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::With(rows_off_zero)),
        input("gain", ArgType::Is(Dtype::F32), &["K"], Fill::Normal),
        input("bias", ArgType::Is(Dtype::F32), &["K"], Fill::Normal),
        output("y", ArgType::Act, &["M", "K"]),
    ],
    oracle,
    cost: |d| Cost { flops: (7 * d["M"] * d["K"]) as u64, bytes: (8 * d["M"] * d["K"] + 8 * d["K"]) as u64 },
    tolerance: Tolerance {
        roundings: |d| 1.5 * (d["K"] as f64).sqrt() + 8.0,
        nmse: 1e-11,
        why:
            "the mean's K additions, independent of each other, err by sqrt(K) roundings of mean |x|; the variance is \
              a sum of K squares, all positive, and errs by sqrt(K) of its own size, of which the root keeps half; \
              eight more follow. Rows far from zero lose digits with the mean, hence ten times rmsnorm's mean square \
              error",
    },
    cases: &[
        case_with(&[1, 1], &[1e-5], "the smallest: no variance, so y is the bias"),
        case_with(&[7, 33], &[1e-12], "both odd: tails of a warp and of a vec4"),
        case_with(&[65, 257], &[1e-5], "more rows than a block, one past a power of two"),
        case_with(&[128, 384], &[1e-12], "MiniLM"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[Kernel {
    stem: "layernorm_f32_rows",
    source: Source::Rust(rows),
    act: Dtype::F32,
    launch: no_grid,
    supports: always,
}];

const PTX: &[Kernel] = &[];

const WGSL: &[Kernel] = &[
    wgsl!("layernorm_f32_workgroup" + "exact", |d| one_row_a_group(d, 64), always),
    wgsl!("layernorm_f32_vec4" + "exact", |d| one_row_a_group(d, 32), |d, _| d["K"].is_multiple_of(4)),
];

/// A word of workgroup memory an invocation.
fn one_row_a_group(d: &Dims, width: u32) -> Launch {
    Launch { grid: [d["M"] as u32, 1, 1], block: [width, 1, 1], shared_bytes: 4 * width }
}

/// Standard normal, every second row eight standard deviations off zero.
fn rows_off_zero(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let (m, k) = (d["M"], d["K"]);
    let x: Vec<f32> = (0..m * k).map(|i| (normal(rng) + 8.0 * (i / k % 2) as f64) as f32).collect();
    HostTensor::from_f32(&[m, k], &x)
}

/// Two passes in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (k, eps) = (d["K"], d.scalar("eps") as f64);
    let (x, gain, bias) = (args[0].to_f64(), args[1].to_f64(), args[2].to_f64());

    let mut expected = Expected { value: Vec::with_capacity(x.len()), magnitude: Vec::with_capacity(x.len()) };
    for row in x.chunks(k) {
        let mean = row.iter().sum::<f64>() / k as f64;
        let mean_size = row.iter().map(|v| v.abs()).sum::<f64>() / k as f64;
        let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / k as f64;
        let scale = 1.0 / (variance + eps).sqrt();
        for ((v, g), b) in row.iter().zip(&gain).zip(&bias) {
            expected.value.push((v - mean) * scale * g + b);
            expected.magnitude.push((v.abs() + mean_size) * scale * g.abs() + b.abs());
        }
    }
    vec![expected]
}

/// CPU: rows in parallel, each in three passes over a row that stays in L1.
fn rows(d: &Dims, args: &mut [Slice<'_>]) {
    let (k, eps) = (d["K"], d.scalar("eps"));
    let [x, gain, bias, y] = args else { unreachable!("four arguments") };
    let (x, gain, bias) = (x.f32(), gain.f32(), bias.f32());

    let one_row = |(y, x): (&mut [f32], &[f32])| {
        let mean = simd::sum(x, |v| v) / k as f32;
        let variance = simd::sum(x, |v| (v - mean) * (v - mean)) / k as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        for (((y, x), g), b) in y.iter_mut().zip(x).zip(gain).zip(bias) {
            *y = (x - mean) * scale * g + b;
        }
    };
    let grain = simd::grain(0.4 * k as f64);
    y.f32_mut().par_chunks_mut(k).zip(x.par_chunks(k)).with_min_len(grain).for_each(one_row);
}
