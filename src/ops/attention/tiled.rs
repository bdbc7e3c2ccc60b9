//! Attention for many query rows: the CPU kernels `attention_f32_tiled*`.
//!
//! 1. A lane is one query row and one of the heads that share a key head. A task takes a block of W lanes of one key
//!    head, so that a key, once read, serves all of them; its keys are those of any lane's span.
//! 2. Lanes lie side by side in vectors: queries as [D][W], scores as [key][W], results as [D][W]. Keys and values are
//!    read where they lie, each number once for W lanes, and softmax needs no sum across a vector.
//! 3. Keys come in blocks of KEYS with a running largest score and sum (Milakov & Gimelshein 2018, arXiv 1805.02867;
//!    Dao et al. 2022, arXiv 2205.14135), so that a block's scores stay in L1.
//! 4. Both products, scores and results, are one loop over registers: `accumulate`.
//! 5. Spans are compared with keys only in blocks where one begins or ends.

use crate::op::{Dims, Slice};
use crate::ops::lanes::{accumulate, Lanes};
use crate::ops::simd;
use rayon::prelude::*;

/// Keys in a block.
const KEYS: usize = 64;

/// What the tasks of a launch share. `q` is [M, H·D], `k` and `v` are [C, KV·D], `span` is [M].
pub(super) struct Problem<'a> {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    scale: f32,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    span: &'a [[u32; 2]],
}

/// One task's memory.
pub(super) struct Scratch<const W: usize> {
    /// [D]: queries times scale.
    q: Vec<Lanes<W>>,
    /// [KEYS]: scores, then weights.
    s: Vec<Lanes<W>>,
    /// [D]: results.
    y: Vec<Lanes<W>>,
}

/// A task: the query rows from the first on, the key head, and the output rows [H/KV · D], one for each query row.
pub(super) type Task<'a> = (usize, usize, Vec<&'a mut [f32]>);

/// Divides the work among threads: a task for each key head and W lanes' worth of rows.
pub(super) fn launch<const W: usize>(
    d: &Dims,
    args: &mut [Slice<'_>],
    run: fn(&Problem<'_>, &mut Scratch<W>, &mut Task<'_>),
) {
    let (heads, kv_heads, dim, scale) = (d["H"], d["KV"], d["D"], d.scalar("scale"));
    let [q, k, v, span, y] = args else { unreachable!("five arguments") };
    let (span, _) = span.u32().as_chunks::<2>();
    let problem = Problem { heads, kv_heads, dim, scale, q: q.f32(), k: k.f32(), v: v.f32(), span };

    let group = heads / kv_heads;
    let rows = (W / group).max(1);
    let mut tasks: Vec<Task<'_>> = Vec::new();
    let (mut row, mut rest) = (0, y.f32_mut());
    while row < span.len() {
        let count = alike(&span[row..], rows);
        let (y, after) = rest.split_at_mut(count * heads * dim);
        let first = tasks.len();
        tasks.extend((0..kv_heads).map(|kv_head| (row, kv_head, Vec::with_capacity(count))));
        for (i, part) in y.chunks_mut(group * dim).enumerate() {
            tasks[first + i % kv_heads].2.push(part);
        }
        (row, rest) = (row + count, after);
    }
    // A guess of 40 flop a nanosecond and all keys for every row.
    let grain = simd::grain((4 * rows * group * dim * d["C"]) as f64 / 40.0);
    let scratch =
        || Scratch { q: vec![Lanes([0.0; W]); dim], s: vec![Lanes([0.0; W]); KEYS], y: vec![Lanes([0.0; W]); dim] };
    tasks.par_iter_mut().with_min_len(grain).for_each_init(scratch, |scratch, task| run(&problem, scratch, task));
}

/// How many of these rows, at most `most`, make one tile: as long as the keys of all are hardly more than twice those of
/// one, for a tile's keys are those of any lane. Rows of a text see much the same; those of two texts may lie far apart.
fn alike(span: &[[u32; 2]], most: usize) -> usize {
    let (mut low, mut high, mut longest) = (u32::MAX, 0, 0);
    for (i, &[start, end]) in span.iter().take(most).enumerate() {
        if start < end {
            (low, high, longest) = (low.min(start), high.max(end), longest.max(end - start));
            if i > 0 && (high - low) as usize > 2 * longest as usize + KEYS {
                return i;
            }
        }
    }
    span.len().min(most)
}

/// A task with what the build's own target has; four or eight registers hold 32 sums.
pub(super) fn portable(p: &Problem<'_>, scratch: &mut Scratch<8>, task: &mut Task<'_>) {
    run::<8, 4, { simd::FMA }>(p, scratch, task);
}

/// A task with AVX2: eight registers of sums.
#[cfg(target_arch = "x86_64")]
pub(super) fn avx2(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Task<'_>) {
    #[target_feature(enable = "avx2,fma")]
    fn body(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Task<'_>) {
        run::<16, 4, true>(p, scratch, task);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(p, scratch, task) }
}

/// A task with AVX-512: sixteen registers of sums.
#[cfg(target_arch = "x86_64")]
pub(super) fn avx512(p: &Problem<'_>, scratch: &mut Scratch<64>, task: &mut Task<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn body(p: &Problem<'_>, scratch: &mut Scratch<64>, task: &mut Task<'_>) {
        run::<64, 4, true>(p, scratch, task);
    }
    // SAFETY: the table offers this kernel only to processors with these parts of AVX-512.
    unsafe { body(p, scratch, task) }
}

/// A task, W lanes at a time; R vectors of W sums in registers. W and R are the fastest of those measured: rustc 1.95
/// makes good code of these and very slow code of some others, such as 32 and 8.
#[inline(always)]
fn run<const W: usize, const R: usize, const FMA: bool>(
    p: &Problem<'_>,
    scratch: &mut Scratch<W>,
    task: &mut Task<'_>,
) {
    let (first_row, kv_head, y) = task;
    let group = p.heads / p.kv_heads;
    let lanes = y.len() * group;
    for first in (0..lanes).step_by(W) {
        let last = (first + W).min(lanes);
        // Lanes past the last one repeat it.
        let of_lane = |l: usize| ((first + l).min(last - 1) / group, (first + l).min(last - 1) % group);
        let mut start = [0; W];
        let mut end = [0; W];
        for l in 0..W {
            let (row, head) = of_lane(l);
            [start[l], end[l]] = p.span[*first_row + row];
            let q = &p.q[((*first_row + row) * p.heads + *kv_head * group + head) * p.dim..][..p.dim];
            for (to, q) in scratch.q.iter_mut().zip(q) {
                to.0[l] = q * p.scale;
            }
        }
        attend::<W, R, FMA>(p, *kv_head, &start, &end, scratch);
        for l in 0..last - first {
            let (row, head) = of_lane(l);
            for (y, from) in y[row][head * p.dim..][..p.dim].iter_mut().zip(&scratch.y) {
                *y = from.0[l];
            }
        }
    }
}

/// Softmax of W lanes over their spans: `scratch.q` to `scratch.y`.
#[inline(always)]
fn attend<const W: usize, const R: usize, const FMA: bool>(
    p: &Problem<'_>,
    kv_head: usize,
    start: &[u32; W],
    end: &[u32; W],
    scratch: &mut Scratch<W>,
) {
    let Scratch { q, s, y } = scratch;
    let stride = p.kv_heads * p.dim;
    let mut largest = [f32::NEG_INFINITY; W];
    let mut total = [0.0f32; W];
    y.fill(Lanes([0.0; W]));

    // Keys that any lane sees, and those that all see.
    let seen = start.iter().zip(end).filter(|(start, end)| start < end);
    let (low, high) = seen.fold((u32::MAX, 0), |(low, high), (start, end)| (low.min(*start), high.max(*end)));
    let (all_low, all_high) = (*start.iter().max().unwrap_or(&0), *end.iter().min().unwrap_or(&0));

    for first in (low..high).step_by(KEYS) {
        let keys = (high - first).min(KEYS as u32) as usize;
        let at = first as usize * stride + kv_head * p.dim;
        let s = &mut s[..keys];

        // s = q · k, −∞ for keys that a lane does not see
        s.fill(Lanes([0.0; W]));
        accumulate::<W, R, FMA>(&p.k[at..], 1, stride, q, s);
        if first < all_low || first + keys as u32 > all_high {
            for (key, s) in (first..).zip(s.iter_mut()) {
                for l in 0..W {
                    s.0[l] = if start[l] <= key && key < end[l] { s.0[l] } else { f32::NEG_INFINITY };
                }
            }
        }

        // The largest score so far, and what this does to the sums so far
        let mut larger = largest;
        for s in s.iter() {
            for (larger, s) in larger.iter_mut().zip(&s.0) {
                *larger = if s > larger { *s } else { *larger };
            }
        }
        let mut shrink = [0.0f32; W];
        let mut base = [0.0f32; W];
        for l in 0..W {
            base[l] = if larger[l] == f32::NEG_INFINITY { 0.0 } else { larger[l] };
            shrink[l] = simd::exp::<FMA>(largest[l] - base[l]);
        }
        if larger != largest {
            for y in y.iter_mut() {
                for (y, shrink) in y.0.iter_mut().zip(&shrink) {
                    *y *= shrink;
                }
            }
        }
        largest = larger;

        // Weights, their sum, and y = y + w · v
        for (total, shrink) in total.iter_mut().zip(&shrink) {
            *total *= shrink;
        }
        for s in s.iter_mut() {
            for ((s, base), total) in s.0.iter_mut().zip(&base).zip(&mut total) {
                *s = simd::exp::<FMA>(*s - base);
                *total += *s;
            }
        }
        accumulate::<W, R, FMA>(&p.v[at..], stride, 1, s, y);
    }

    for y in y.iter_mut() {
        for (y, total) in y.0.iter_mut().zip(&total) {
            *y = if *total == 0.0 { 0.0 } else { *y / total };
        }
    }
}
