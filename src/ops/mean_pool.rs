//! `mean_pool`: the mean of a sentence's token vectors, scaled to length 1    Reimers & Gurevych 2019, arXiv 1908.10084

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// The least norm divided by: a sentence whose mean is zero stays zero.
const LEAST_NORM: f64 = 1e-12;

/// Sentence embeddings from token vectors.
pub static MEAN_POOL: OpSpec = OpSpec {
    name: "mean_pool",
    format: "f32",
    formula: "y[S,K] = v / max(‖v‖, 1e-12), v = mean of the rows span[s,0]..span[s,1] of x[M,K]; 0 for an empty span",
    dims: &["S", "M", "K"],
    scalars: &[],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::Normal),
        input("span", ArgType::Is(Dtype::U32), &["S", "2"], Fill::With(sentences)),
        output("y", ArgType::Is(Dtype::F32), &["S", "K"]),
    ],
    oracle,
    cost: |d| Cost {
        flops: (d["M"] * d["K"] + 4 * d["S"] * d["K"]) as u64,
        bytes: (4 * d["M"] * d["K"] + 4 * d["S"] * d["K"] + 8 * d["S"]) as u64,
    },
    tolerance: Tolerance {
        roundings: |d| (d["M"] as f64).sqrt() + (d["K"] as f64).sqrt() + 6.0,
        nmse: 1e-12,
        why:
            "a mean of up to M values errs by sqrt(M) independent roundings of its mean |x|, and so does every element \
              under the norm; the norm's K squares, all positive, add sqrt(K)/2; a few divisions and a root follow",
    },
    cases: &[
        case(&[1, 1, 1], "the smallest"),
        case(&[3, 7, 33], "odd sizes and an empty span"),
        case(&[7, 257, 65], "spans of many lengths, one past a power of two"),
        case(&[8, 1024, 384], "MiniLM"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[Kernel {
    stem: "mean_pool_f32_rows",
    source: Source::Rust(rows),
    act: Dtype::F32,
    launch: no_grid,
    supports: always,
}];

const PTX: &[Kernel] = &[ptx!("mean_pool_f32_block", a_sentence_a_block, always)];

/// A block of 256 threads for each sentence.
fn a_sentence_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["S"] as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[wgsl!("mean_pool_f32_workgroup" + "exact", one_sentence_a_group, always)];

fn one_sentence_a_group(d: &Dims) -> Launch {
    Launch { grid: [d["S"] as u32, 1, 1], block: [64, 1, 1], shared_bytes: 256 }
}

/// The rows shared out among the sentences, each of which leaves some out as padding; of several the last is empty.
fn sentences(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let (s, m) = (d["S"], d["M"]);
    let mut span = Vec::with_capacity(2 * s);
    for i in 0..s {
        let (start, next) = (i * m / s, (i + 1) * m / s);
        let tokens = if i + 1 == s && s > 1 { 0 } else { rng.random_range(1..=next - start) };
        span.extend([start as u32, (start + tokens) as u32]);
    }
    HostTensor::from_u32(&[s, 2], &span)
}

/// The definition; an element's error comes from its own mean and, through the norm, from everyone's.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let k = d["K"];
    let (x, span) = (args[0].to_f64(), args[1].u32());

    let mut expected = Expected { value: Vec::new(), magnitude: Vec::new() };
    for ends in span.chunks(2) {
        let (start, end) = (ends[0] as usize, ends[1] as usize);
        let (mut mean, mut size) = (vec![0.0; k], vec![0.0; k]);
        for row in x[start * k..end * k].chunks(k) {
            for (i, v) in row.iter().enumerate() {
                mean[i] += v / (end - start) as f64;
                size[i] += v.abs() / (end - start) as f64;
            }
        }
        let norm = mean.iter().map(|v| v * v).sum::<f64>().sqrt().max(LEAST_NORM);
        let size_norm = size.iter().map(|v| v * v).sum::<f64>().sqrt() / norm;
        expected.value.extend(mean.iter().map(|v| v / norm));
        expected.magnitude.extend(mean.iter().zip(&size).map(|(v, s)| (s + v.abs() * size_norm) / norm));
    }
    vec![expected]
}

/// CPU: sentences in parallel.
fn rows(d: &Dims, args: &mut [Slice<'_>]) {
    let (s, m, k) = (d["S"], d["M"], d["K"]);
    let [x, span, y] = args else { unreachable!("three arguments") };
    let (x, (span, _)) = (x.f32(), span.u32().as_chunks::<2>());

    let one_sentence = |(y, ends): (&mut [f32], &[u32; 2])| {
        let (start, end) = (ends[0] as usize, ends[1] as usize);
        y.fill(0.0);
        if start >= end {
            return;
        }
        for row in x[start * k..end * k].chunks(k) {
            for (y, v) in y.iter_mut().zip(row) {
                *y += v;
            }
        }
        let tokens = (end - start) as f32;
        y.iter_mut().for_each(|v| *v /= tokens);
        let norm = simd::sum(y, |v| v * v).sqrt().max(LEAST_NORM as f32);
        y.iter_mut().for_each(|v| *v /= norm);
    };
    let grain = simd::grain(0.1 * (m * k) as f64 / s as f64);
    y.f32_mut().par_chunks_mut(k).zip(span.par_iter()).with_min_len(grain).for_each(one_sentence);
}
