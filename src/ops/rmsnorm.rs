//! `rmsnorm`: `y[M,K] = x[M,K] · gain[K] / sqrt(mean over K of x² + eps)`      Zhang & Sennrich 2019, arXiv 1910.07467

use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;

/// Root-mean-square norm of rows; `eps` from the model.
pub static RMSNORM: OpSpec = OpSpec {
    name: "rmsnorm",
    format: "f32",
    formula: "y[M,K] = x[M,K] · gain[K] / sqrt(mean over K of x² + eps)",
    dims: &["M", "K"],
    scalars: &["eps"],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::Normal),
        input("gain", ArgType::Is(Dtype::F32), &["K"], Fill::Normal),
        output("y", ArgType::Act, &["M", "K"]),
    ],
    oracle,
    cost: |d| Cost { flops: (4 * d["M"] * d["K"]) as u64, bytes: (8 * d["M"] * d["K"] + 4 * d["K"]) as u64 },
    tolerance: Tolerance {
        roundings: |d| (d["K"] as f64).sqrt() + 4.0,
        nmse: 1e-12,
        why: "all K squares are positive, so their sum loses no digits to cancellation; the roundings of K additions, \
              independent of each other, grow with sqrt(K), and four more follow",
    },
    cases: &[
        case_with(&[1, 1], &[1e-5], "the smallest"),
        case_with(&[7, 33], &[1e-6], "both odd: tails of a warp and of a vec4"),
        case_with(&[65, 257], &[1e-5], "more rows than a block, one past a power of two"),
        case_with(&[128, 576], &[1e-5], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[Kernel {
    stem: "rmsnorm_f32_rows",
    source: Source::Rust(rows),
    act: Dtype::F32,
    launch: no_grid,
    supports: always,
}];

const PTX: &[Kernel] = &[ptx!("rmsnorm_f32_warp", four_rows_a_block, always)];

/// A block of 128 threads holds four warps, each warp one row.
fn four_rows_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"].div_ceil(4) as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[
    wgsl!("rmsnorm_f32_workgroup" + "exact", |d| one_row_a_group(d, 64), always),
    wgsl!("rmsnorm_f32_vec4" + "exact", |d| one_row_a_group(d, 32), |d, _| d["K"].is_multiple_of(4)),
];

/// A word of workgroup memory an invocation.
fn one_row_a_group(d: &Dims, width: u32) -> Launch {
    Launch { grid: [d["M"] as u32, 1, 1], block: [width, 1, 1], shared_bytes: 4 * width }
}

/// The pseudo-code made runnable: sums in f64, one row after another.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (k, eps) = (d["K"], d.scalar("eps") as f64);
    let (x, gain) = (args[0].to_f64(), args[1].to_f64());

    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks(k) {
        let mean_square = row.iter().map(|v| v * v).sum::<f64>() / k as f64;
        let scale = 1.0 / (mean_square + eps).sqrt();
        y.extend(row.iter().zip(&gain).map(|(v, g)| v * scale * g));
    }
    vec![Expected::relative(y)]
}

/// CPU: rows in parallel; sixteen running sums, so that the additions of a row form vectors in a fixed order.
fn rows(d: &Dims, args: &mut [Slice<'_>]) {
    const LANES: usize = 16;
    let (k, eps) = (d["K"], d.scalar("eps"));
    let [x, gain, y] = args else { unreachable!("three arguments") };
    let (x, gain) = (x.f32(), gain.f32());

    let one_row = |(x, y): (&[f32], &mut [f32])| {
        let mut sums = [0.0f32; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (sum, v) in sums.iter_mut().zip(chunk) {
                *sum += v * v;
            }
        }
        for (sum, v) in sums.iter_mut().zip(tail) {
            *sum += v * v;
        }
        let scale = 1.0 / (sums.iter().sum::<f32>() / k as f32 + eps).sqrt();
        for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
            *y = x * scale * g;
        }
    };
    // Below this much work, waking a thread costs more than it saves.
    let grain = (1 << 14) / k + 1;
    y.f32_mut().par_chunks_mut(k).zip(x.par_chunks(k)).map(|(y, x)| (x, y)).with_min_len(grain).for_each(one_row);
}
