//! `rmsnorm_backward`: the gradient of [`rmsnorm`](super::rmsnorm) with respect to its input; the gain is frozen
//!
//! With r = 1/sqrt(mean of x² + eps), dx_k = r·gain_k·dy_k − r³·x_k · mean over j of (dy_j·gain_j·x_j) (+ dx_k). `ACC`
//! = 1 adds to dx, which then may hold the gradient of the residual connection; with 0 its old value is never read.

use super::simd;
use super::vector::{for_simd, Body, Vector, LANES};
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;

/// Gradient of the root-mean-square norm of rows.
pub static RMSNORM_BACKWARD: OpSpec = OpSpec {
    name: "rmsnorm_backward",
    format: "f32",
    formula: "dx = r·gain·dy − r³·x·mean over K of (dy·gain·x) (+ dx where ACC is 1), \
              r = 1/sqrt(mean over K of x² + eps)",
    dims: &["M", "K", "ACC"],
    scalars: &["eps"],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::Normal),
        input("gain", ArgType::Is(Dtype::F32), &["K"], Fill::Normal),
        input("dy", ArgType::Act, &["M", "K"], Fill::Normal),
        inout("dx", ArgType::Is(Dtype::F32), &["M", "K"], Fill::Sum),
    ],
    oracle,
    cost: |d| {
        let (m, k) = (d["M"], d["K"]);
        Cost { flops: (10 * m * k) as u64, bytes: (4 * ((3 + d["ACC"]) * m * k + k)) as u64 }
    },
    tolerance: Tolerance {
        roundings: |d| (d["K"] as f64).sqrt() + 8.0,
        nmse: 1e-11,
        why: "two sums over K, whose roundings, independent of each other, grow with sqrt(K), the second relative to \
              the sum of |dy·gain·x|; r's error counts once in the first term and three times half in the second, and \
              eight products, sums and a root round once each",
    },
    // M, K, ACC
    cases: &[
        case_with(&[1, 1, 0], &[0.5], "the smallest; of one element the norm leaves only what eps lets through"),
        case_with(&[7, 33, 1], &[1e-6], "both odd, added to dx"),
        case_with(&[65, 257, 0], &[1e-5], "more rows than a block, one past a power of two"),
        case_with(&[257, 7, 1], &[1e-5], "rows shorter than a vector"),
        case_with(&[256, 576, 1], &[1e-5], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    rust("rmsnorm_backward_f32_rows", |d, args| rows(d, args, Simd::Portable), always),
    rust("rmsnorm_backward_f32_rows_avx2", |d, args| rows(d, args, Simd::Avx2), has_avx2),
    rust("rmsnorm_backward_f32_rows_avx512", |d, args| rows(d, args, Simd::Avx512), has_avx512),
];

const PTX: &[Kernel] = &[ptx!("rmsnorm_backward_f32_warp", four_rows_a_block, always)];

/// A block of 128 threads holds four warps, each warp one row.
fn four_rows_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"].div_ceil(4) as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[wgsl!("rmsnorm_backward_f32_workgroup" + "exact", one_row_a_group, always)];

/// Two words of workgroup memory an invocation.
fn one_row_a_group(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, 1, 1], block: [64, 1, 1], shared_bytes: 512 }
}

/// The definition in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (k, eps) = (d["K"], d.scalar("eps") as f64);
    let [x, gain, dy, before] = [0, 1, 2, 3].map(|i| args[i].to_f64());
    let mut expected = Expected::relative(if d["ACC"] == 1 { before } else { vec![0.0; x.len()] });
    for (row, (x, dy)) in x.chunks(k).zip(dy.chunks(k)).enumerate() {
        let mean_square = x.iter().map(|v| v * v).sum::<f64>() / k as f64;
        let r = 1.0 / (mean_square + eps).sqrt();
        let terms = || x.iter().zip(dy).zip(&gain).map(|((x, dy), gain)| dy * gain * x);
        let (mean, size) = (terms().sum::<f64>() / k as f64, terms().map(f64::abs).sum::<f64>() / k as f64);
        for j in 0..k {
            let first = r * gain[j] * dy[j];
            expected.value[row * k + j] += first - r.powi(3) * x[j] * mean;
            expected.magnitude[row * k + j] += first.abs() + r.powi(3) * x[j].abs() * (size + mean.abs());
        }
    }
    vec![expected]
}

/// CPU: rows in parallel.
fn rows(d: &Dims, args: &mut [Slice<'_>], simd: Simd) {
    let (k, eps, add) = (d["K"], d.scalar("eps"), d["ACC"] == 1);
    let [x, gain, dy, dx] = args else { unreachable!("four arguments") };
    let (x, gain, dy) = (x.f32(), gain.f32(), dy.f32());
    let grain = simd::grain(0.3 * k as f64);
    let inputs = x.par_chunks(grain * k).zip(dy.par_chunks(grain * k));
    dx.f32_mut().par_chunks_mut(grain * k).zip(inputs).for_each(|(dx, (x, dy))| {
        for_simd(simd, Rows { x, gain, dy, dx, eps, add });
    });
}

/// The rows of one task.
struct Rows<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
    eps: f32,
    add: bool,
}

impl Body for Rows<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let k = self.gain.len();
        let vectors = k / LANES * LANES;
        let rows = self.x.chunks_exact(k).zip(self.dy.chunks_exact(k)).zip(self.dx.chunks_exact_mut(k));
        for ((x, dy), dx) in rows {
            // Both sums over the row, then the rest of it: what does not fill a vector.
            let (mut squares, mut products) = (V::splat(0.0), V::splat(0.0));
            for i in (0..vectors).step_by(LANES) {
                let x = V::load(&x[i..]);
                squares = x.mul_add(x, squares);
                products = V::load(&dy[i..]).mul(V::load(&self.gain[i..])).mul_add(x, products);
            }
            let (mut square, mut product) = (squares.sum(), products.sum());
            for i in vectors..k {
                square += x[i] * x[i];
                product += dy[i] * self.gain[i] * x[i];
            }
            let r = 1.0 / (square / k as f32 + self.eps).sqrt();
            let back = -(r * r * r) * (product / k as f32);

            let (r_lanes, back_lanes) = (V::splat(r), V::splat(back));
            for i in (0..vectors).step_by(LANES) {
                let first = V::load(&dy[i..]).mul(V::load(&self.gain[i..])).mul(r_lanes);
                let before = if self.add { V::load(&dx[i..]) } else { V::splat(0.0) };
                V::load(&x[i..]).mul_add(back_lanes, first).add(before).store(&mut dx[i..]);
            }
            for i in vectors..k {
                let before = if self.add { dx[i] } else { 0.0 };
                dx[i] = r * (dy[i] * self.gain[i]) + back * x[i] + before;
            }
        }
    }
}
