//! The optimizer:
//!
//! - `squared_norm`: parts of Σ x², for clipping gradients by their global norm
//! - `adamw`: a step of AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), gradients clipped on the way
//!
//! ```text
//! squared_norm:  part[p] = Σ x[i]² over i in p·c .. min((p+1)·c, N), c = ⌈N/P⌉
//! adamw:         g = g · min(1, max_norm / (sqrt(Σ part) + 1e-6))        where P > 0; parts added in order
//!                m = (1 − rate1) · m + rate1 · g
//!                v = (1 − rate2) · v + rate2 · g²
//!                p = p − lr·decay · p − lr · (m / bias1) / (sqrt(v / bias2) + eps)
//! ```
//!
//! The norm is left in P parts, which every reader adds up in order: one launch without atomics, no second one for
//! their sum, and the same bits every time. Gradients of many tensors belong in one buffer; of several buffers each
//! writes parts of its own into one. [`Settings::scalars`] makes a step's scalars.

use super::simd;
use crate::op::*;
use crate::tensor::Dtype;
use crate::tensor::HostTensor;
use rayon::prelude::*;

/// Added to a norm before dividing by it.
const NORM_EPS: f64 = 1e-6;

/// Parts of the sum of squares.
pub static SQUARED_NORM: OpSpec = OpSpec {
    name: "squared_norm",
    format: "f32",
    formula: "part[p] = Σ x[i]² over i in p·c..min((p+1)·c, N), c = ceil(N/P)",
    dims: &["N", "P"],
    scalars: &[],
    args: &[input("x", ArgType::Is(Dtype::F32), &["N"], Fill::Normal), output("part", ArgType::Is(Dtype::F32), &["P"])],
    oracle: norm_oracle,
    cost: |d| Cost { flops: 2 * d["N"] as u64, bytes: 4 * (d["N"] + d["P"]) as u64 },
    tolerance: Tolerance {
        roundings: |d| (d["N"].div_ceil(d["P"]) as f64).sqrt() + 2.0,
        nmse: 1e-11,
        why: "all N/P squares are positive; the roundings of their additions, independent, grow with sqrt(N/P)",
    },
    cases: &[
        case(&[1, 1], "the smallest"),
        case(&[33, 7], "parts of five, the last of three"),
        case(&[7, 65], "more parts than elements: the rest are zero"),
        case(&[65_537, 64], "one past a power of two"),
        case(&[2_442_240, 64], "SmolLM2-135M's adapters of rank 8"),
    ],
    kernels: &[NORM_CPU, NORM_PTX, NORM_WGSL],
};

/// A step of AdamW.
pub static ADAMW: OpSpec = OpSpec {
    name: "adamw",
    format: "f32",
    formula: "g *= min(1, max_norm/(sqrt(Σ part) + 1e-6)) where P > 0; m = (1 − rate1)·m + rate1·g; \
              v = (1 − rate2)·v + rate2·g²; p −= lr·decay·p + lr·(m/bias1)/(sqrt(v/bias2) + eps)",
    dims: &["N", "P"],
    scalars: &["lr", "rate1", "rate2", "eps", "decay", "bias1", "bias2", "max_norm"],
    args: &[
        input("g", ArgType::Is(Dtype::F32), &["N"], Fill::Normal),
        input("part", ArgType::Is(Dtype::F32), &["P"], Fill::Uniform(0.0, 2.0)),
        inout("p", ArgType::Is(Dtype::F32), &["N"], Fill::Normal),
        inout("m", ArgType::Is(Dtype::F32), &["N"], Fill::Normal),
        inout("v", ArgType::Is(Dtype::F32), &["N"], Fill::Uniform(0.0, 1.0)),
    ],
    oracle,
    cost: |d| Cost { flops: 16 * d["N"] as u64, bytes: 4 * (7 * d["N"] + d["P"]) as u64 },
    tolerance: Tolerance {
        roundings: |d| (d["P"] as f64).sqrt() + 12.0,
        nmse: 1e-12,
        why: "P parts are added and their root divides: half of sqrt(P) roundings and three, twice that in g². m is \
              made of two products and a sum, relative to the sizes of its terms, v of two products and a sum of one \
              sign; the step divides by v's root, so half of v's error counts, and rounds seven times itself",
    },
    // N, P; lr, rate1, rate2, eps, decay, bias1, bias2, max_norm
    cases: &[
        case_with(&[1, 0], &[1e-3, 0.1, 1e-3, 1e-8, 0.01, 0.1, 1e-3, 0.0], "the smallest, the first step, unclipped"),
        case_with(&[33, 7], &[1e-3, 0.1, 1e-3, 1e-8, 0.0, 0.271, 2.997e-3, 1.0], "clipped, no decay"),
        case_with(&[257, 1], &[0.1, 0.1, 0.05, 1e-6, 0.5, 0.65, 0.4, 100.0], "a norm under the bound, large rates"),
        case_with(&[65, 65], &[1e-4, 1.0, 1.0, 1e-8, 0.1, 1.0, 1.0, 1e-3], "no memory of the past: the sign of g"),
        case_with(&[2_442_240, 64], &[1e-3, 0.1, 1e-3, 1e-8, 0.01, 0.878, 0.0198, 1.0], "SmolLM2-135M's adapters"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const NORM_CPU: &[Kernel] = &[rust("squared_norm_f32_parts", parts, always)];
const NORM_PTX: &[Kernel] = &[ptx!("squared_norm_f32_block", a_part_a_block, always)];
const NORM_WGSL: &[Kernel] = &[wgsl!("squared_norm_f32_workgroup", a_part_a_group, bindable)];

const CPU: &[Kernel] = &[
    rust("adamw_f32_chunks", |d, args| in_chunks(d, args, update), always),
    #[cfg(target_arch = "x86_64")]
    rust("adamw_f32_chunks_avx2", |d, args| in_chunks(d, args, update_avx2), has_avx2),
];
const PTX: &[Kernel] = &[ptx!("adamw_f32_vec4", four_elements_a_thread, always)];
const WGSL: &[Kernel] = &[wgsl!("adamw_f32_flat" + "exact", |d| flat(d["N"].div_ceil(16)), bindable)];

/// A block of 512 threads for each part.
fn a_part_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["P"] as u32, 1, 1], block: [512, 1, 1], shared_bytes: 0 }
}

/// A buffer that one argument cannot bind is taken piece by piece.
fn bindable(d: &Dims, caps: &Caps) -> bool {
    4 * d["N"] <= caps.max_binding
}

/// A group of 256 invocations for each part, with a word of workgroup memory each.
fn a_part_a_group(d: &Dims) -> Launch {
    Launch { grid: [d["P"] as u32, 1, 1], block: [256, 1, 1], shared_bytes: 1024 }
}

/// A block of 256 threads takes 1024 elements.
fn four_elements_a_thread(d: &Dims) -> Launch {
    Launch { grid: [d["N"].div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

/// What AdamW is told once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Decay of the mean of gradients, such as 0.9.
    pub beta1: f64,
    /// Decay of the mean of their squares, such as 0.999.
    pub beta2: f64,
    /// Added to the root of the mean square, such as 1e-8.
    pub eps: f64,
    /// Share of a parameter, times the learning rate, that a step takes off.
    pub decay: f64,
    /// Largest global norm of the gradients; read where P > 0.
    pub max_norm: f64,
}

impl Settings {
    /// The scalars of step `step`, counted from 1, at learning rate `lr`: differences from 1 are taken in f64, since
    /// f32 would keep few digits of 1 − 0.999.
    pub fn scalars(&self, lr: f64, step: u64) -> [f32; 8] {
        let bias = |beta: f64| 1.0 - beta.powf(step as f64);
        let Settings { beta1, beta2, eps, decay, max_norm } = *self;
        [lr, 1.0 - beta1, 1.0 - beta2, eps, decay, bias(beta1), bias(beta2), max_norm].map(|v| v as f32)
    }
}

/// Elements of part `p`.
fn slice_of(d: &Dims, p: usize) -> std::ops::Range<usize> {
    let size = d["N"].div_ceil(d["P"]);
    (p * size).min(d["N"])..((p + 1) * size).min(d["N"])
}

/// The definition in f64.
fn norm_oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let x = args[0].to_f64();
    vec![Expected::relative((0..d["P"]).map(|p| x[slice_of(d, p)].iter().map(|x| x * x).sum()).collect())]
}

/// The definition in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let [g, part, p, m, v] = [0, 1, 2, 3, 4].map(|i| args[i].to_f64());
    let names = ["lr", "rate1", "rate2", "eps", "decay", "bias1", "bias2", "max_norm"];
    let [lr, rate1, rate2, eps, decay, bias1, bias2, max_norm] = names.map(|name| d.scalar(name) as f64);
    let norm = part.iter().sum::<f64>().sqrt();
    let clip = if part.is_empty() { 1.0 } else { (max_norm / (norm + NORM_EPS)).min(1.0) };

    let mut out = [0; 3].map(|_| Expected { value: Vec::new(), magnitude: Vec::new() });
    for i in 0..g.len() {
        let g = clip * g[i];
        let new_m = (1.0 - rate1) * m[i] + rate1 * g;
        let new_v = (1.0 - rate2) * v[i] + rate2 * g * g;
        let size_m = (1.0 - rate1) * m[i].abs() + rate1 * g.abs();
        let (root, shrunk) = ((new_v / bias2).sqrt(), lr * decay * p[i]);
        let step = |m: f64| lr * (m / bias1) / (root + eps);
        let size_step = step(size_m) + step(new_m).abs();
        for (out, (value, magnitude)) in out.iter_mut().zip([
            (p[i] - shrunk - step(new_m), p[i].abs() + shrunk.abs() + size_step),
            (new_m, size_m),
            (new_v, new_v),
        ]) {
            out.value.push(value);
            out.magnitude.push(magnitude);
        }
    }
    out.into()
}

/// CPU: parts in parallel, each in sixteen running sums.
fn parts(d: &Dims, args: &mut [Slice<'_>]) {
    let [x, part] = args else { unreachable!("two arguments") };
    let x = x.f32();
    let grain = simd::grain(0.1 * d["N"].div_ceil(d["P"]) as f64);
    let work = part.f32_mut().par_iter_mut().enumerate().with_min_len(grain);
    work.for_each(|(p, part)| *part = simd::sum(&x[slice_of(d, p)], |x| x * x));
}

/// Gradients, then parameters and their two means: one run of each.
type Run<'a> = (&'a [f32], &'a mut [f32], &'a mut [f32], &'a mut [f32]);

/// CPU: runs of elements in parallel; memory is the limit.
fn in_chunks(d: &Dims, args: &mut [Slice<'_>], body: fn(&Dims, f32, Run<'_>)) {
    const CHUNK: usize = 4096;
    let [g, part, p, m, v] = args else { unreachable!("five arguments") };
    let norm = part.f32().iter().sum::<f32>().sqrt();
    let clip = if d["P"] == 0 { 1.0 } else { (d.scalar("max_norm") / (norm + NORM_EPS as f32)).min(1.0) };
    let means = m.f32_mut().par_chunks_mut(CHUNK).zip(v.f32_mut().par_chunks_mut(CHUNK));
    let work = g.f32().par_chunks(CHUNK).zip(p.f32_mut().par_chunks_mut(CHUNK)).zip(means);
    let work = work.with_min_len(simd::grain(0.8 * CHUNK as f64));
    work.for_each(|((g, p), (m, v))| body(d, clip, (g, p, m, v)));
}

#[inline(always)]
fn update(d: &Dims, clip: f32, (g, p, m, v): Run<'_>) {
    let names = ["lr", "rate1", "rate2", "eps", "decay", "bias1", "bias2"];
    let [lr, rate1, rate2, eps, decay, bias1, bias2] = names.map(|name| d.scalar(name));
    let (keep, keep1, keep2, step) = (1.0 - lr * decay, 1.0 - rate1, 1.0 - rate2, lr / bias1);
    for (((g, p), m), v) in g.iter().zip(p).zip(m).zip(v) {
        let g = clip * g;
        *m = keep1 * *m + rate1 * g;
        *v = keep2 * *v + rate2 * (g * g);
        *p = keep * *p - step * *m / ((*v / bias2).sqrt() + eps);
    }
}

/// One run with AVX2.
#[cfg(target_arch = "x86_64")]
fn update_avx2(d: &Dims, clip: f32, run: Run<'_>) {
    #[target_feature(enable = "avx2,fma")]
    fn body(d: &Dims, clip: f32, run: Run<'_>) {
        update(d, clip, run);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(d, clip, run) }
}
