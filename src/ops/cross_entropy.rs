//! `cross_entropy`: the loss of each row of logits, and in their place its gradient: softmax and loss in one op
//!
//! ```text
//! loss[m]     = ln Σ_v exp(logits[m,v]) − logits[m, label[m]]                       in nats
//! logits[m,v] = scale · (softmax(logits[m])_v − (1 where v is label[m], else 0))
//! ```
//!
//! `scale` is one over the number of labels that the whole step counts, whatever chunk of rows a launch holds; the
//! losses are not scaled. A label that is no class, such as 0xFFFFFFFF, is left out: its loss and gradient are zero.

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use crate::verify::normal;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Losses of rows of logits, and their gradient in place.
pub static CROSS_ENTROPY: OpSpec = OpSpec {
    name: "cross_entropy",
    format: "f32",
    formula: "loss[m] = ln Σ_v exp(logits[m,v]) − logits[m,label[m]]; logits[m,v] = scale·(softmax_v − [v is \
              label[m]]); both 0 where label[m] ≥ V",
    dims: &["M", "V"],
    scalars: &["scale"],
    args: &[
        inout("logits", ArgType::Is(Dtype::F32), &["M", "V"], Fill::With(logits)),
        input("label", ArgType::Is(Dtype::U32), &["M"], Fill::With(labels)),
        output("loss", ArgType::Is(Dtype::F32), &["M"]),
    ],
    oracle,
    // An exp counts as one operation. Logits are read and written once: every last-level cache holds a row.
    cost: |d| Cost { flops: (5 * d["M"] * d["V"]) as u64, bytes: (8 * d["M"] * d["V"] + 8 * d["M"]) as u64 },
    tolerance: Tolerance {
        roundings: |d| (d["V"] as f64).sqrt() + 8.0,
        nmse: 1e-11,
        why: "a logit minus the largest rounds to an error of the difference, relative in its exp, which has 1.1 ulp \
              (2.2 u) of its own; the sum of V positive terms adds sqrt(V) roundings, independent of each other. The \
              loss is that sum's logarithm, so relative errors of the sum are errors of 1, and two differences, each \
              of its terms' size. The gradient divides, subtracts and scales: four more. Weights under 1e-30 may be \
              flushed to zero",
    },
    // M, V
    cases: &[
        case_with(&[1, 1], &[1.0], "the smallest: one class, no loss"),
        case_with(&[7, 33], &[0.25], "both odd: tails of a warp and of a vec4; rows left out, logits far apart"),
        case_with(&[65, 257], &[0.015_384_615], "more rows than a block, one past a power of two"),
        case_with(&[3, 4097], &[0.5], "one past several strides of a block"),
        case_with(&[4, 49152], &[0.003_906_25], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    rust("cross_entropy_f32_rows", |d, args| rows(d, args, row::<{ simd::FMA }>), always),
    #[cfg(target_arch = "x86_64")]
    rust("cross_entropy_f32_rows_avx2", |d, args| rows(d, args, row_avx2), has_avx2),
    #[cfg(target_arch = "x86_64")]
    rust("cross_entropy_f32_rows_avx512", |d, args| rows(d, args, row_avx512), has_avx512),
];

const PTX: &[Kernel] = &[ptx!("cross_entropy_f32_block", a_row_a_block, always)];

/// A block of 512 threads for each row.
fn a_row_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, 1, 1], block: [512, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[wgsl!("cross_entropy_f32_workgroup" + "exact", a_row_a_group, always)];

/// A word of workgroup memory an invocation.
fn a_row_a_group(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, 1, 1], block: [256, 1, 1], shared_bytes: 1024 }
}

/// Normal of standard deviation 2 and, every third row, 40: one class then takes all.
fn logits(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let shape = [d["M"], d["V"]];
    let logit = |i: usize| (normal(rng) * if i / shape[1] % 3 == 2 { 40.0 } else { 2.0 }) as f32;
    HostTensor::from_f32(&shape, &(0..shape[0] * shape[1]).map(logit).collect::<Vec<_>>())
}

/// Any class; every fifth from the second on is left out, by V or by a large number.
fn labels(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let v = d["V"] as u32;
    let label = |m: usize| match m % 10 {
        1 => u32::MAX,
        6 => v,
        _ => rng.random_range(0..v),
    };
    HostTensor::from_u32(&[d["M"]], &(0..d["M"]).map(label).collect::<Vec<_>>())
}

/// The definition in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (v, scale) = (d["V"], d.scalar("scale") as f64);
    let (logits, labels) = (args[0].to_f64(), args[1].u32());
    let mut gradient = Expected::relative(vec![0.0; logits.len()]);
    let mut loss = Expected::relative(vec![0.0; labels.len()]);
    for (m, (x, &label)) in logits.chunks(v).zip(labels).enumerate() {
        if label as usize >= v {
            continue;
        }
        let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = x.iter().map(|x| (x - largest).exp()).sum();
        // How far the logits lie under the largest, on average: what their differences err by.
        let distance: f64 = x.iter().map(|x| (x - largest).exp() / total * (largest - x)).sum();
        let at_label = x[label as usize];
        loss.value[m] = largest + total.ln() - at_label;
        loss.magnitude[m] = 1.0 + distance + largest.abs() + total.ln() + at_label.abs();
        for (i, x) in x.iter().enumerate() {
            let weight = (x - largest).exp() / total;
            let hit = if i == label as usize { 1.0 } else { 0.0 };
            gradient.value[m * v + i] = scale * (weight - hit);
            gradient.magnitude[m * v + i] = scale * (weight * (1.0 + distance + largest - x) + hit + 1e-30);
        }
    }
    vec![gradient, loss]
}

/// CPU: rows in parallel.
fn rows(d: &Dims, args: &mut [Slice<'_>], row: fn(&mut [f32], u32, f32) -> f32) {
    let (v, scale) = (d["V"], d.scalar("scale"));
    let [logits, label, loss] = args else { unreachable!("three arguments") };
    let work = logits.f32_mut().par_chunks_mut(v).zip(label.u32()).zip(loss.f32_mut());
    let grain = simd::grain(0.4 * v as f64);
    work.with_min_len(grain).for_each(|((logits, label), loss)| *loss = row(logits, *label, scale));
}

/// One row's gradient in place; returns its loss.
#[inline(always)]
fn row<const FMA: bool>(logits: &mut [f32], label: u32, scale: f32) -> f32 {
    let label = label as usize;
    if label >= logits.len() {
        logits.fill(0.0);
        return 0.0;
    }
    let at_label = logits[label];
    let largest = simd::max(logits);
    let mut sums = [0.0f32; simd::LANES];
    let (chunks, tail) = logits.as_chunks_mut::<{ simd::LANES }>();
    for chunk in chunks {
        for (x, sum) in chunk.iter_mut().zip(&mut sums) {
            *x = simd::exp::<FMA>(*x - largest);
            *sum += *x;
        }
    }
    for (x, sum) in tail.iter_mut().zip(&mut sums) {
        *x = simd::exp::<FMA>(*x - largest);
        *sum += *x;
    }
    let total: f32 = sums.iter().sum();
    let share = scale / total;
    logits.iter_mut().for_each(|x| *x *= share);
    logits[label] -= scale;
    largest + total.ln() - at_label
}

/// One row with AVX2.
#[cfg(target_arch = "x86_64")]
fn row_avx2(logits: &mut [f32], label: u32, scale: f32) -> f32 {
    #[target_feature(enable = "avx2,fma")]
    fn body(logits: &mut [f32], label: u32, scale: f32) -> f32 {
        row::<true>(logits, label, scale)
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(logits, label, scale) }
}

/// One row with AVX-512.
#[cfg(target_arch = "x86_64")]
fn row_avx512(logits: &mut [f32], label: u32, scale: f32) -> f32 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn body(logits: &mut [f32], label: u32, scale: f32) -> f32 {
        row::<true>(logits, label, scale)
    }
    // SAFETY: the table offers this kernel only to processors with these parts of AVX-512.
    unsafe { body(logits, label, scale) }
}
