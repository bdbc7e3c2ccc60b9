//! Attention's gradients in blocks: the CPU kernels `attention_stats_f32_blocked*` and
//! `attention_backward_f32_blocked*`.
//!
//! 1. A lane is a query row of one head. Scores are [key][W], as in the forward pass: queries lie as [D][W], a key's
//!    numbers are read where they lie and serve W rows, and softmax needs no sum across a vector.
//! 2. Keys come in blocks of KEYS, so that a block's p and ds stay in L1 for the three sums they go into.
//! 3. dq is a sum over keys, [D][W] again. dk and dv are sums over the lanes: there vectors run along D, W at a time.
//! 4. All five products are one loop over registers: `accumulate`.
//! 5. A task is a head, from its first row to its last. Heads that share a key head leave dk and dv apart, and a second
//!    stage adds them in order: the same bits on any number of threads.

use crate::op::{Dims, Slice};
use crate::ops::lanes::{accumulate, Lanes};
use crate::ops::simd;
use rayon::prelude::*;

/// Keys in a block.
const KEYS: usize = 64;

/// What the tasks of a launch share: `q`, `dy` [M, H·D], `k`, `v` [C, KV·D], `span` [M], `stats` [M·H, 2].
pub(super) struct Problem<'a> {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    scale: f32,
    q: &'a [f32],
    k: &'a [f32],
    /// `attention_stats` has y here.
    v: &'a [f32],
    span: &'a [[u32; 2]],
    dy: &'a [f32],
    stats: &'a [f32],
}

impl Problem<'_> {
    /// Head `head` of a query row, in q and dy.
    fn of_row<'a>(&self, x: &'a [f32], row: usize, head: usize) -> &'a [f32] {
        &x[(row * self.heads + head) * self.dim..][..self.dim]
    }

    /// Where key `c` of the key head of head `head` begins.
    fn of_key(&self, c: usize, head: usize) -> usize {
        (c * self.kv_heads + head / (self.heads / self.kv_heads)) * self.dim
    }
}

/// One thread's memory.
pub(super) struct Scratch<const W: usize> {
    /// [D]: queries times scale.
    q: Vec<Lanes<W>>,
    /// [D]
    dy: Vec<Lanes<W>>,
    /// [D]
    dq: Vec<Lanes<W>>,
    /// [KEYS]: scores, then p.
    p: Vec<Lanes<W>>,
    /// [KEYS]
    ds: Vec<Lanes<W>>,
    /// [D/W][W lanes][W of D]: queries times scale as they lie, zeros past D.
    q_rows: Vec<Lanes<W>>,
    /// The same of dy.
    dy_rows: Vec<Lanes<W>>,
}

impl<const W: usize> Scratch<W> {
    fn new(dim: usize) -> Scratch<W> {
        let zeros = |n: usize| vec![Lanes::ZERO; n];
        let rows = dim.div_ceil(W) * W;
        Scratch {
            q: zeros(dim),
            dy: zeros(dim),
            dq: zeros(dim),
            p: zeros(KEYS),
            ds: zeros(KEYS),
            q_rows: zeros(rows),
            dy_rows: zeros(rows),
        }
    }
}

/// A block of W query rows of a head: which keys its lanes see. A lane without a row sees none.
struct Block<const W: usize> {
    start: [u32; W],
    end: [u32; W],
    /// Keys that any lane sees.
    low: u32,
    high: u32,
    /// Keys that all lanes see.
    all_low: u32,
    all_high: u32,
}

impl<const W: usize> Block<W> {
    #[inline(always)]
    fn new(span: &[[u32; 2]]) -> Block<W> {
        let (mut start, mut end) = ([0; W], [0; W]);
        for (l, ends) in span.iter().take(W).enumerate() {
            [start[l], end[l]] = *ends;
        }
        let seen = start.iter().zip(&end).filter(|(start, end)| start < end);
        let (low, high) = seen.fold((u32::MAX, 0), |(low, high), (start, end)| (low.min(*start), high.max(*end)));
        let (all_low, all_high) = (*start.iter().max().unwrap_or(&0), *end.iter().min().unwrap_or(&0));
        Block { start, end, low, high, all_low, all_high }
    }

    /// s[key] = q · k[key] for the keys from `first` on, −∞ for a lane that does not see it.
    #[inline(always)]
    fn scores<const R: usize, const FMA: bool>(
        &self,
        p: &Problem<'_>,
        head: usize,
        first: u32,
        q: &[Lanes<W>],
        s: &mut [Lanes<W>],
    ) {
        s.fill(Lanes::ZERO);
        accumulate::<W, R, FMA>(&p.k[p.of_key(first as usize, head)..], 1, p.kv_heads * p.dim, q, s);
        if first < self.all_low || first + s.len() as u32 > self.all_high {
            for (key, s) in (first..).zip(s.iter_mut()) {
                for l in 0..W {
                    s.0[l] = if self.start[l] <= key && key < self.end[l] { s.0[l] } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}

/// Lanes from rows: to[d][l] = factor · row(l)[d]; lanes past `rows` are zero.
#[inline(always)]
fn transpose<'a, const W: usize>(to: &mut [Lanes<W>], rows: usize, factor: f32, row: impl Fn(usize) -> &'a [f32]) {
    if rows < W {
        to.fill(Lanes::ZERO);
    }
    for l in 0..rows.min(W) {
        for (to, x) in to.iter_mut().zip(row(l)) {
            to.0[l] = factor * x;
        }
    }
}

/// A head and its rows of dq, [M][D]; what its queries add to dk and dv, [D/W][C][W of D].
pub(super) struct Head<'a, const W: usize> {
    head: usize,
    dq: Vec<&'a mut [f32]>,
    dk: &'a mut [Lanes<W>],
    dv: &'a mut [Lanes<W>],
}

/// Gives each head to a thread, then joins those that share a key head.
pub(super) fn backward<const W: usize>(
    d: &Dims,
    args: &mut [Slice<'_>],
    run: fn(&Problem<'_>, &mut Scratch<W>, &mut Head<'_, W>),
) {
    let (rows, heads, kv_heads, dim, keys, scale) = (d["M"], d["H"], d["KV"], d["D"], d["C"], d.scalar("scale"));
    let [q, k, v, span, dy, stats, dq, dk, dv] = args else { unreachable!("nine arguments") };
    let (span, _) = span.u32().as_chunks::<2>();
    let (q, k, v, dy, stats) = (q.f32(), k.f32(), v.f32(), dy.f32(), stats.f32());
    let problem = Problem { heads, kv_heads, dim, scale, q, k, v, span, dy, stats };

    let part = dim.div_ceil(W) * keys;
    let mut parts = vec![Lanes::ZERO; 2 * heads * part];
    let mut tasks: Vec<Head<'_, W>> = Vec::with_capacity(heads);
    for (head, part) in parts.chunks_mut(2 * part).enumerate() {
        let (dk, dv) = part.split_at_mut(part.len() / 2);
        tasks.push(Head { head, dq: Vec::with_capacity(rows), dk, dv });
    }
    for (i, row) in dq.f32_mut().chunks_mut(dim).enumerate() {
        tasks[i % heads].dq.push(row);
    }
    tasks
        .par_iter_mut()
        .with_max_len(1)
        .for_each_init(|| Scratch::new(dim), |scratch, task| run(&problem, scratch, task));

    let group = heads / kv_heads;
    let join = |c: usize, which: usize, row: &mut [f32]| {
        for (kv_head, row) in row.chunks_mut(dim).enumerate() {
            for (chunk, out) in row.chunks_mut(W).enumerate() {
                let of_head = |i: usize| &parts[(2 * (kv_head * group + i) + which) * part + chunk * keys + c].0;
                out.copy_from_slice(&of_head(0)[..out.len()]);
                for i in 1..group {
                    out.iter_mut().zip(of_head(i)).for_each(|(out, part)| *out += part);
                }
            }
        }
    };
    let width = kv_heads * dim;
    let gradients = dk.f32_mut().par_chunks_mut(width).zip(dv.f32_mut().par_chunks_mut(width));
    gradients.enumerate().with_min_len(simd::grain((heads * dim) as f64 / 4.0)).for_each(|(c, (dk, dv))| {
        join(c, 0, dk);
        join(c, 1, dv);
    });
}

/// A head, W rows at a time.
#[inline(always)]
fn of_head<const W: usize, const R: usize, const FMA: bool>(
    p: &Problem<'_>,
    scratch: &mut Scratch<W>,
    task: &mut Head<'_, W>,
) {
    let head = task.head;
    for (block, dq) in task.dq.chunks_mut(W).enumerate() {
        let first = block * W;
        let count = dq.len();
        let lanes = Block::<W>::new(&p.span[first..first + count]);
        let (mut lse, mut delta) = ([0.0; W], [0.0; W]);
        for l in 0..count {
            let at = 2 * ((first + l) * p.heads + head);
            (lse[l], delta[l]) = (p.stats[at], p.stats[at + 1]);
            for (rows, x, factor) in [(&mut scratch.q_rows, p.q, p.scale), (&mut scratch.dy_rows, p.dy, 1.0)] {
                for (chunk, x) in p.of_row(x, first + l, head).chunks(W).enumerate() {
                    rows[chunk * W + l].0.iter_mut().zip(x).for_each(|(to, x)| *to = factor * x);
                }
            }
        }
        transpose(&mut scratch.q, count, p.scale, |l| p.of_row(p.q, first + l, head));
        transpose(&mut scratch.dy, count, 1.0, |l| p.of_row(p.dy, first + l, head));
        scratch.dq.fill(Lanes::ZERO);

        for first_key in (lanes.low..lanes.high).step_by(KEYS) {
            let keys = (lanes.high - first_key).min(KEYS as u32) as usize;
            of_keys::<W, R, FMA>(p, scratch, &lanes, &lse, &delta, task.dk, task.dv, (head, first_key as usize, keys));
        }
        for (l, dq) in dq.iter_mut().enumerate() {
            for (to, sum) in dq.iter_mut().zip(&scratch.dq) {
                *to = p.scale * sum.0[l];
            }
        }
    }
}

/// What a block of rows and a block of keys add to their gradients.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn of_keys<const W: usize, const R: usize, const FMA: bool>(
    problem: &Problem<'_>,
    scratch: &mut Scratch<W>,
    lanes: &Block<W>,
    lse: &[f32; W],
    delta: &[f32; W],
    dk: &mut [Lanes<W>],
    dv: &mut [Lanes<W>],
    (head, first, keys): (usize, usize, usize),
) {
    let Scratch { q, dy, dq, p, ds, q_rows, dy_rows } = scratch;
    let (p, ds) = (&mut p[..keys], &mut ds[..keys]);
    let (at, stride) = (problem.of_key(first, head), problem.kv_heads * problem.dim);

    // p = exp(s − lse); ds = p · (dy·v − delta)
    lanes.scores::<R, FMA>(problem, head, first as u32, q, p);
    ds.fill(Lanes::ZERO);
    accumulate::<W, R, FMA>(&problem.v[at..], 1, stride, dy, ds);
    for (p, ds) in p.iter_mut().zip(ds.iter_mut()) {
        for l in 0..W {
            p.0[l] = simd::exp::<FMA>(p.0[l] - lse[l]);
            ds.0[l] = p.0[l] * (ds.0[l] - delta[l]);
        }
    }

    // dq += ds · k; dk += dsᵀ · q; dv += pᵀ · dy
    accumulate::<W, R, FMA>(&problem.k[at..], stride, 1, ds, dq);
    let all_keys = dk.len() / (q_rows.len() / W);
    for chunk in 0..q_rows.len() / W {
        let rows = chunk * W..(chunk + 1) * W;
        let out = chunk * all_keys + first..chunk * all_keys + first + keys;
        accumulate::<W, R, FMA>(Lanes::flat(ds), 1, W, &q_rows[rows.clone()], &mut dk[out.clone()]);
        accumulate::<W, R, FMA>(Lanes::flat(p), 1, W, &dy_rows[rows], &mut dv[out]);
    }
}

/// The first row, the head, and each row's two numbers.
pub(super) type Stats<'a> = (usize, usize, Vec<&'a mut [f32]>);

/// Divides rows and heads among threads.
pub(super) fn stats<const W: usize>(
    d: &Dims,
    args: &mut [Slice<'_>],
    run: fn(&Problem<'_>, &mut Scratch<W>, &mut Stats<'_>),
) {
    let (heads, kv_heads, dim, scale) = (d["H"], d["KV"], d["D"], d.scalar("scale"));
    let [q, k, span, y, dy, stats] = args else { unreachable!("six arguments") };
    let (span, _) = span.u32().as_chunks::<2>();
    let (q, k, y, dy) = (q.f32(), k.f32(), y.f32(), dy.f32());
    let problem = Problem { heads, kv_heads, dim, scale, q, k, v: y, span, dy, stats: &[] };

    let mut tasks: Vec<Stats<'_>> = Vec::new();
    for (block, stats) in stats.f32_mut().chunks_mut(2 * W * heads).enumerate() {
        let first = tasks.len();
        tasks.extend((0..heads).map(|head| (block * W, head, Vec::with_capacity(W))));
        for (i, pair) in stats.chunks_mut(2).enumerate() {
            tasks[first + i % heads].2.push(pair);
        }
    }
    let grain = simd::grain((2 * W * dim * d["C"]) as f64 / 40.0);
    let scratch = || Scratch::new(dim);
    tasks.par_iter_mut().with_min_len(grain).for_each_init(scratch, |scratch, task| run(&problem, scratch, task));
}

/// Each lane's largest score and sum of exp(score − largest), block of keys after block, as in the forward pass.
#[inline(always)]
fn of_rows<const W: usize, const R: usize, const FMA: bool>(
    p: &Problem<'_>,
    scratch: &mut Scratch<W>,
    (first, head, stats): &mut Stats<'_>,
) {
    let (first, head) = (*first, *head);
    let lanes = Block::<W>::new(&p.span[first..first + stats.len()]);
    transpose(&mut scratch.q, stats.len(), p.scale, |l| p.of_row(p.q, first + l, head));
    let (mut largest, mut total) = ([f32::NEG_INFINITY; W], [0.0f32; W]);
    for first_key in (lanes.low..lanes.high).step_by(KEYS) {
        let keys = (lanes.high - first_key).min(KEYS as u32) as usize;
        let s = &mut scratch.p[..keys];
        lanes.scores::<R, FMA>(p, head, first_key, &scratch.q, s);
        let mut larger = largest;
        for s in s.iter() {
            for (larger, s) in larger.iter_mut().zip(&s.0) {
                *larger = if s > larger { *s } else { *larger };
            }
        }
        let mut base = [0.0f32; W];
        for l in 0..W {
            base[l] = if larger[l] == f32::NEG_INFINITY { 0.0 } else { larger[l] };
            total[l] *= simd::exp::<FMA>(largest[l] - base[l]);
        }
        for s in s.iter() {
            for l in 0..W {
                total[l] += simd::exp::<FMA>(s.0[l] - base[l]);
            }
        }
        largest = larger;
    }
    for (l, stats) in stats.iter_mut().enumerate() {
        stats[0] = if total[l] > 0.0 { largest[l] + total[l].ln() } else { 0.0 };
        stats[1] = simd::dot::<FMA>(p.of_row(p.dy, first + l, head), p.of_row(p.v, first + l, head));
    }
}

/// A head with what the build's own target has.
pub(super) fn portable(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Head<'_, 16>) {
    of_head::<16, 4, { simd::FMA }>(p, scratch, task);
}

/// Rows with what the build's own target has.
pub(super) fn stats_portable(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Stats<'_>) {
    of_rows::<16, 4, { simd::FMA }>(p, scratch, task);
}

/// A head with AVX2: eight registers of sums.
#[cfg(target_arch = "x86_64")]
pub(super) fn avx2(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Head<'_, 16>) {
    #[target_feature(enable = "avx2,fma")]
    fn body(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Head<'_, 16>) {
        of_head::<16, 4, true>(p, scratch, task);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(p, scratch, task) }
}

/// Rows with AVX2.
#[cfg(target_arch = "x86_64")]
pub(super) fn stats_avx2(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Stats<'_>) {
    #[target_feature(enable = "avx2,fma")]
    fn body(p: &Problem<'_>, scratch: &mut Scratch<16>, task: &mut Stats<'_>) {
        of_rows::<16, 4, true>(p, scratch, task);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(p, scratch, task) }
}

/// A head with AVX-512: sixteen registers of sums.
#[cfg(target_arch = "x86_64")]
pub(super) fn avx512(p: &Problem<'_>, scratch: &mut Scratch<64>, task: &mut Head<'_, 64>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn body(p: &Problem<'_>, scratch: &mut Scratch<64>, task: &mut Head<'_, 64>) {
        of_head::<64, 4, true>(p, scratch, task);
    }
    // SAFETY: the table offers this kernel only to processors with these parts of AVX-512.
    unsafe { body(p, scratch, task) }
}

/// Rows with AVX-512.
#[cfg(target_arch = "x86_64")]
pub(super) fn stats_avx512(p: &Problem<'_>, scratch: &mut Scratch<64>, task: &mut Stats<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn body(p: &Problem<'_>, scratch: &mut Scratch<64>, task: &mut Stats<'_>) {
        of_rows::<64, 4, true>(p, scratch, task);
    }
    // SAFETY: the table offers this kernel only to processors with these parts of AVX-512.
    unsafe { body(p, scratch, task) }
}
