//! Attention for a few query rows, each over a long span: the CPU kernels `attention_f32_decode*`.
//!
//! 1. Memory is the limit, so a task reads a range of keys and values once, for all heads that share them.
//! 2. A row's span is cut into ranges of RANGE keys, so that one row keeps several threads busy; each range leaves its
//!    largest score, sum of weights and weighted sum of values, which are joined at the end (Dao et al. 2023,
//!    Flash-Decoding). The cuts depend on the span alone: the same bits on any number of threads.
//! 3. Vectors run along D: a score is a dot product.

use crate::op::{Dims, Slice};
use crate::ops::simd;
use rayon::prelude::*;

/// Keys in a task.
const RANGE: usize = 256;
/// Keys whose values stay in L1 while one head after another reads them.
const NEAR: usize = 64;
/// Results in registers.
const WIDTH: usize = 64;

/// Keys `start..end` for the heads of one key head of one row.
pub(super) struct Task<'a> {
    start: usize,
    end: usize,
    /// [H/KV, D].
    q: &'a [f32],
    /// From the key head's first number of row 0 on, a row every `stride`.
    k: &'a [f32],
    v: &'a [f32],
    stride: usize,
    dim: usize,
    scale: f32,
    /// [H/KV, D + 2]: for each head the weighted sum of values, the largest score, the sum of weights.
    part: &'a mut [f32],
}

/// Divides the work among threads and joins the parts.
pub(super) fn launch(d: &Dims, args: &mut [Slice<'_>], run: fn(&mut Task<'_>)) {
    let (heads, kv_heads, dim, scale) = (d["H"], d["KV"], d["D"], d.scalar("scale"));
    let [q, k, v, span, y] = args else { unreachable!("five arguments") };
    let (q, k, v, (span, _)) = (q.f32(), k.f32(), v.f32(), span.u32().as_chunks::<2>());
    let group = heads / kv_heads;

    // Tasks of one row and key head lie side by side, and so do their parts.
    let ranges = |ends: &[u32; 2]| (ends[1].saturating_sub(ends[0]) as usize).div_ceil(RANGE);
    let part_len = group * (dim + 2);
    let mut parts = vec![0.0; span.iter().map(ranges).sum::<usize>() * kv_heads * part_len];
    let mut unused = parts.chunks_mut(part_len);
    let mut tasks = Vec::new();
    for (ends, q) in span.iter().zip(q.chunks(heads * dim)) {
        for (kv_head, q) in q.chunks(group * dim).enumerate() {
            let (k, v) = (&k[kv_head * dim..], &v[kv_head * dim..]);
            for (start, part) in (ends[0] as usize..ends[1] as usize).step_by(RANGE).zip(&mut unused) {
                let end = (start + RANGE).min(ends[1] as usize);
                tasks.push(Task { start, end, q, k, v, stride: kv_heads * dim, dim, scale, part });
            }
        }
    }
    // At 20 flop a nanosecond, which is what a core's memory feeds.
    let grain = simd::grain((4 * RANGE.min(d["C"]) * group * dim) as f64 / 20.0);
    tasks.par_iter_mut().with_min_len(grain).for_each(run);

    let mut unread = &parts[..];
    for (i, y) in y.f32_mut().chunks_mut(group * dim).enumerate() {
        let (mine, rest) = unread.split_at(ranges(&span[i / kv_heads]) * part_len);
        unread = rest;
        for (head, y) in y.chunks_mut(dim).enumerate() {
            join(mine.chunks(part_len).map(|part| part[head * (dim + 2)..][..dim + 2].split_at(dim)), y);
        }
    }
}

/// One head's result from its ranges' (weighted sums, [largest score, sum of weights]); 0 without any.
fn join<'a>(parts: impl Iterator<Item = (&'a [f32], &'a [f32])> + Clone, y: &mut [f32]) {
    let largest = parts.clone().fold(f32::NEG_INFINITY, |largest, (_, ends)| largest.max(ends[0]));
    let mut total = 0.0;
    y.fill(0.0);
    for (sums, ends) in parts {
        let share = (ends[0] - largest).exp();
        total += share * ends[1];
        for (y, sum) in y.iter_mut().zip(sums) {
            *y += share * sum;
        }
    }
    if total != 0.0 {
        y.iter_mut().for_each(|y| *y /= total);
    }
}

/// A task with what the build's own target has.
pub(super) fn portable(task: &mut Task<'_>) {
    run::<{ simd::FMA }>(task, simd::dot::<{ simd::FMA }>);
}

/// A task with AVX2. AVX-512 is no faster: memory and the sums across a vector take the time.
#[cfg(target_arch = "x86_64")]
pub(super) fn avx2(task: &mut Task<'_>) {
    #[target_feature(enable = "avx2,fma")]
    fn body(task: &mut Task<'_>) {
        run::<true>(task, |a, b| simd::dot_avx2(a, b));
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(task) }
}

/// A task.
#[inline(always)]
fn run<const FMA: bool>(t: &mut Task<'_>, dot: impl Fn(&[f32], &[f32]) -> f32) {
    let keys = t.end - t.start;
    let group = t.q.len() / t.dim;
    let row = |j: usize| (t.start + j) * t.stride..(t.start + j) * t.stride + t.dim;

    // Scores: all heads while a key is near.
    let mut scores = vec![[0.0f32; RANGE]; group];
    for j in 0..keys {
        let k = &t.k[row(j)];
        for (scores, q) in scores.iter_mut().zip(t.q.chunks_exact(t.dim)) {
            scores[j] = t.scale * dot(q, k);
        }
    }

    // Weights
    for (scores, part) in scores.iter_mut().zip(t.part.chunks_exact_mut(t.dim + 2)) {
        let scores = &mut scores[..keys];
        let largest = simd::max(scores);
        for s in scores.iter_mut() {
            *s = simd::exp::<FMA>(*s - largest);
        }
        part.fill(0.0);
        part[t.dim] = largest;
        part[t.dim + 1] = simd::sum(scores, |w| w);
    }

    // Weighted sums of values
    for near in (0..keys).step_by(NEAR) {
        let near = near..(near + NEAR).min(keys);
        for (weights, part) in scores.iter().zip(t.part.chunks_exact_mut(t.dim + 2)) {
            let (chunks, rest) = part[..t.dim].as_chunks_mut::<WIDTH>();
            let done = chunks.len() * WIDTH;
            for (c, chunk) in chunks.iter_mut().enumerate() {
                let mut sums = *chunk;
                for j in near.clone() {
                    let v: &[f32; WIDTH] = t.v[row(j)][c * WIDTH..].first_chunk().expect("a chunk of D");
                    for (sum, v) in sums.iter_mut().zip(v) {
                        *sum = simd::mul_add::<FMA>(weights[j], *v, *sum);
                    }
                }
                *chunk = sums;
            }
            for j in near.clone() {
                for (sum, v) in rest.iter_mut().zip(&t.v[row(j)][done..]) {
                    *sum = simd::mul_add::<FMA>(weights[j], *v, *sum);
                }
            }
        }
    }
}
