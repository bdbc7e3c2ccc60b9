//! The gradients of [`attention`](super::attention), y = softmax(scale · q·kᵀ) · v over spans, in two ops:
//!
//! ```text
//! attention_stats:     lse = ln Σ_c exp(s_c),  delta = dy·y          for each query row and head, s_c = scale · q·k_c
//! attention_backward:  p_c  = exp(s_c − lse)
//!                      dp_c = dy·v_c
//!                      ds_c = p_c · (dp_c − delta)
//!                      dq   = scale · Σ_c ds_c k_c
//!                      dk_c = scale · Σ_m ds_c q_m,  dv_c = Σ_m p_c dy_m          over the rows and heads that see c
//! ```
//!
//! So no probabilities are kept from the forward pass, and none are ever written (Dao 2023, arXiv 2307.08691): with the
//! two numbers of `stats` a block of query rows and a block of keys can be taken up alone, which is how a device makes
//! dq in one set of blocks and dk and dv in another, each element by one block, in order, with no atomic additions.
//!
//! Masks are spans, as in `attention`: row m sees the rows `span[m,0]..span[m,1]` of k and v. An empty span has lse 0
//! and dq 0; a key that no row sees has dk = dv = 0. Query head h reads key head h/(H/KV), whose dk and dv are sums
//! over its heads.

mod blocked;

use super::attention::spans;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

const DIMS: &[&str] = &["M", "H", "KV", "D", "C"];
const Q: Arg = input("q", ArgType::Act, &["M", "H*D"], Fill::Normal);
const K: Arg = input("k", ArgType::Act, &["C", "KV*D"], Fill::Normal);
const V: Arg = input("v", ArgType::Act, &["C", "KV*D"], Fill::Normal);
const SPAN: Arg = input("span", ArgType::Is(Dtype::U32), &["M", "2"], Fill::With(spans));
const Y: Arg = input("y", ArgType::Act, &["M", "H*D"], Fill::Normal);
const DY: Arg = input("dy", ArgType::Act, &["M", "H*D"], Fill::Normal);

/// What the backward pass must know of each query row and head.
pub static ATTENTION_STATS: OpSpec = OpSpec {
    name: "attention_stats",
    format: "f32",
    formula: "stats[m,h] = (ln Σ_c exp(scale · q[m,h]·k[c,h/(H/KV)]), dy[m,h]·y[m,h]), c in span[m,0]..span[m,1]; \
              the first 0 for an empty span",
    dims: DIMS,
    scalars: &["scale"],
    args: &[Q, K, SPAN, Y, DY, output("stats", ArgType::Is(Dtype::F32), &["M*H", "2"])],
    oracle: stats_oracle,
    cost: |d| {
        let rows = 3 * d["M"] * d["H"] * d["D"] + d["C"] * d["KV"] * d["D"];
        Cost { flops: 2 * pairs(d), bytes: (4 * rows + 8 * d["M"] * (d["H"] + 1)) as u64 }
    },
    tolerance: Tolerance {
        roundings: |d| (d["D"] as f64).sqrt() + (d["C"] as f64).sqrt() + 8.0,
        nmse: 1e-11,
        why: "a score errs by sqrt(D) independent roundings of scale · Σ|q k|, and minus the largest score by one of \
              the difference: relative errors of its exp. Relative errors of the sum are errors of its logarithm, and \
              the sum over C adds sqrt(C) roundings; exp's and ln's own and the last sum are the rest. delta is a dot \
              product",
    },
    cases: CASES,
    kernels: &[STATS_CPU, STATS_PTX, STATS_WGSL],
};

/// Gradients of queries, keys and values.
pub static ATTENTION_BACKWARD: OpSpec = OpSpec {
    name: "attention_backward",
    format: "f32",
    formula: "p = exp(scale·q·k − lse), ds = p·(dy·v − delta); dq[m] = scale·Σ_c ds·k[c]; dk[c] = scale·Σ_m ds·q[m]; \
              dv[c] = Σ_m p·dy[m]",
    dims: DIMS,
    scalars: &["scale"],
    args: &[
        Q,
        K,
        V,
        SPAN,
        DY,
        input("stats", ArgType::Is(Dtype::F32), &["M*H", "2"], Fill::With(likely_stats)),
        output("dq", ArgType::Act, &["M", "H*D"]),
        output("dk", ArgType::Act, &["C", "KV*D"]),
        output("dv", ArgType::Act, &["C", "KV*D"]),
    ],
    oracle,
    cost: |d| {
        let rows = 3 * d["M"] * d["H"] * d["D"] + 4 * d["C"] * d["KV"] * d["D"];
        Cost { flops: 10 * pairs(d), bytes: (4 * rows + 8 * d["M"] * (d["H"] + 1)) as u64 }
    },
    tolerance: Tolerance {
        roundings: |d| (d["D"] as f64).sqrt() + (d["C"].max(d["M"] * d["H"] / d["KV"]) as f64).sqrt() + 8.0,
        nmse: 1e-11,
        why:
            "a score errs by sqrt(D) independent roundings of scale · Σ|q k|, and minus lse by one of the difference: \
              relative errors of p, as exp makes them. ds has p's relative error, and the absolute ones of dy·v, \
              sqrt(D) of Σ|dy v|, and of the difference. The sums over keys or over query rows and heads add the roots \
              of their lengths; exp's 1.1 ulp, the products and the scale are the rest",
    },
    cases: CASES,
    kernels: &[CPU, PTX, WGSL],
};

// M, H, KV, D, C; scale
const CASES: &[Case] = &[
    case_with(&[1, 1, 1, 1, 1], &[1.0], "the smallest"),
    case_with(&[7, 2, 1, 33, 7], &[0.2], "odd head width, two heads to a key head, packed documents"),
    case_with(&[2, 3, 3, 7, 2], &[0.378], "one row that sees something, one that sees nothing"),
    case_with(&[33, 3, 3, 32, 33], &[0.177], "bidirectional sentences and padding"),
    case_with(&[65, 6, 2, 7, 257], &[1.0], "causal after a cache, one row past a block"),
    case_with(&[257, 4, 2, 16, 257], &[0.25], "packed documents longer than a block of keys"),
    case_with(&[33, 4, 2, 128, 65], &[0.088], "the widest heads of common decoders, causal after a cache"),
    case_with(&[33, 2, 1, 65, 40], &[0.124], "odd wide heads, two to a key head"),
    case_with(&[128, 12, 12, 32, 128], &[0.177], "MiniLM"),
    case_with(&[129, 9, 3, 64, 129], &[0.125], "SmolLM2-135M"),
];

const STATS_CPU: &[Kernel] = &[
    rust("attention_stats_f32_naive", naive_stats, always),
    rust("attention_stats_f32_blocked", |d, args| blocked::stats(d, args, blocked::stats_portable), always),
    #[cfg(target_arch = "x86_64")]
    rust("attention_stats_f32_blocked_avx2", |d, args| blocked::stats(d, args, blocked::stats_avx2), has_avx2),
    #[cfg(target_arch = "x86_64")]
    rust("attention_stats_f32_blocked_avx512", |d, args| blocked::stats(d, args, blocked::stats_avx512), has_avx512),
];
const STATS_PTX: &[Kernel] = &[
    ptx!("attention_stats_f32_warp", four_queries_a_block, always),
    ptx!("attention_stats_f32_tiled", queries_a_block, |d, caps| {
        d["D"] <= 128 && queries_a_block(d).shared_bytes <= caps.shared_bytes
    }),
];
const STATS_WGSL: &[Kernel] = &[wgsl!("attention_stats_f32_workgroup" + "exact", |d| heads(d, d["M"], 512), always)];

const CPU: &[Kernel] = &[
    rust("attention_backward_f32_naive", naive, always),
    rust("attention_backward_f32_blocked", |d, args| blocked::backward(d, args, blocked::portable), always),
    #[cfg(target_arch = "x86_64")]
    rust("attention_backward_f32_blocked_avx2", |d, args| blocked::backward(d, args, blocked::avx2), has_avx2),
    #[cfg(target_arch = "x86_64")]
    rust("attention_backward_f32_blocked_avx512", |d, args| blocked::backward(d, args, blocked::avx512), has_avx512),
];
const PTX: &[Kernel] = &[
    // Its threads are the columns of a row.
    ptx!("attention_backward_f32_naive", a_row_a_block, |d, _| d["D"] <= 128),
    // Its threads hold the results of up to 128 columns.
    ptx!("attention_backward_f32_tiled", rows_a_block, |d, caps| {
        d["D"] <= 128 && rows_a_block(d).shared_bytes <= caps.shared_bytes
    }),
];
const WGSL: &[Kernel] = &[
    wgsl!("attention_backward_f32_workgroup" + "exact", |d| heads(d, d["M"] + d["C"], 1024), always),
    wgsl!("attention_backward_f32_vec4" + "exact", |d| heads(d, d["M"] + d["C"], 3072), |d, _| {
        d["D"].is_multiple_of(4) && d["D"] <= 256
    }),
];

/// A group of 64 invocations for each head of so many rows.
fn heads(d: &Dims, rows: usize, shared_bytes: u32) -> Launch {
    Launch { grid: [d["H"] as u32, rows as u32, 1], block: [64, 1, 1], shared_bytes }
}

/// A block of 128 threads holds four warps, each warp a query row and head.
fn four_queries_a_block(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["H"]).div_ceil(4) as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// A block of 128 threads for 64 of the queries that share a key head, and tiles of 64 + 32 + 32 rows of D rounded up to 32,
/// plus 4, numbers and of 64 pairs.
fn queries_a_block(d: &Dims) -> Launch {
    let blocks = (d["M"] * (d["H"] / d["KV"])).div_ceil(64);
    let row = d["D"].next_multiple_of(32) + 4;
    Launch {
        grid: [blocks as u32, d["KV"] as u32, 1],
        block: [128, 1, 1],
        shared_bytes: (4 * (128 * row + 128)) as u32,
    }
}

/// A block of 128 threads for each row of dq, then for each of dk and dv.
fn a_row_a_block(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["H"] + d["C"] * d["KV"]) as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// A block of 128 threads for 64 of the queries that share a key head, or 64 of its keys, and tiles of 2 · (64 + 32) rows of
/// D rounded up to 32, plus 4, numbers and of 128 rows of 40.
fn rows_a_block(d: &Dims) -> Launch {
    let blocks = (d["M"] * (d["H"] / d["KV"])).div_ceil(64) + d["C"].div_ceil(64);
    let row = d["D"].next_multiple_of(32) + 4;
    Launch {
        grid: [blocks as u32, d["KV"] as u32, 1],
        block: [128, 1, 1],
        shared_bytes: (4 * (192 * row + 128 * 40)) as u32,
    }
}

/// Pairs of a query row and a key, times H·D, as `attention` counts them.
fn pairs(d: &Dims) -> u64 {
    let (m, c) = (d["M"], d["C"]);
    let pairs = (0..m).map(|i| (c + i + 1).saturating_sub(m)).sum::<usize>();
    (pairs * d["H"] * d["D"]) as u64
}

/// Log sums that scores of normal numbers lead to, and any deltas.
fn likely_stats(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let likely = 2.5 * d.scalar("scale") * (d["D"] as f32).sqrt() + (d["C"] as f32).ln();
    let pair = |_| [likely * rng.random_range(0.7..1.3), rng.random_range(-3.0..3.0)];
    HostTensor::from_f32(&[d["M"] * d["H"], 2], &(0..d["M"] * d["H"]).flat_map(pair).collect::<Vec<f32>>())
}

/// Where things lie: for query row and head `i`, [M,H] in order, its numbers in q, its span, and a key's numbers in k.
struct Layout {
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl Layout {
    fn new(d: &Dims) -> Layout {
        Layout { heads: d["H"], kv_heads: d["KV"], dim: d["D"] }
    }

    fn query(&self, i: usize) -> std::ops::Range<usize> {
        i * self.dim..(i + 1) * self.dim
    }

    fn span(&self, i: usize, span: &[u32]) -> std::ops::Range<usize> {
        let m = i / self.heads;
        span[2 * m] as usize..span[2 * m + 1] as usize
    }

    fn key(&self, i: usize, c: usize) -> std::ops::Range<usize> {
        let head = i % self.heads / (self.heads / self.kv_heads);
        let first = (c * self.kv_heads + head) * self.dim;
        first..first + self.dim
    }
}

/// Σ a·b, and Σ |a·b|.
fn dot64(a: &[f64], b: &[f64]) -> (f64, f64) {
    a.iter().zip(b).fold((0.0, 0.0), |(sum, size), (a, b)| (sum + a * b, size + (a * b).abs()))
}

/// The definition in f64.
fn stats_oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (layout, scale) = (Layout::new(d), d.scalar("scale") as f64);
    let [q, k, y, dy] = [0, 1, 3, 4].map(|i| args[i].to_f64());
    let span = args[2].u32();
    let mut expected = Expected { value: Vec::new(), magnitude: Vec::new() };
    for i in 0..d["M"] * d["H"] {
        let scores: Vec<(f64, f64)> =
            layout.span(i, span).map(|c| dot64(&q[layout.query(i)], &k[layout.key(i, c)])).collect();
        let scores: Vec<(f64, f64)> = scores.iter().map(|(s, size)| (scale * s, scale * size)).collect();
        let largest = scores.iter().fold(f64::NEG_INFINITY, |max, s| max.max(s.0));
        let total: f64 = scores.iter().map(|s| (s.0 - largest).exp()).sum();
        let (mut lse, mut error) = (0.0, 0.0);
        if total > 0.0 {
            lse = largest + total.ln();
            let doubt = |s: &(f64, f64)| (s.0 - lse).exp() * (1.0 + s.1 + largest - s.0);
            error = largest.abs() + total.ln() + scores.iter().map(doubt).sum::<f64>();
        }
        let (delta, size) = dot64(&dy[layout.query(i)], &y[layout.query(i)]);
        expected.value.extend([lse, delta]);
        expected.magnitude.extend([error, size]);
    }
    vec![expected]
}

/// The definition in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (layout, scale) = (Layout::new(d), d.scalar("scale") as f64);
    let [q, k, v, dy, stats] = [0, 1, 2, 4, 5].map(|i| args[i].to_f64());
    let span = args[3].u32();
    let zeros = |n: usize| Expected { value: vec![0.0; n], magnitude: vec![0.0; n] };
    let (mut dq, mut dk, mut dv) = (zeros(q.len()), zeros(k.len()), zeros(v.len()));
    for i in 0..d["M"] * d["H"] {
        let (lse, delta) = (stats[2 * i], stats[2 * i + 1]);
        for c in layout.span(i, span) {
            let (query, key) = (layout.query(i), layout.key(i, c));
            let (s, s_size) = dot64(&q[query.clone()], &k[key.clone()]);
            let (dp, dp_size) = dot64(&dy[query.clone()], &v[key.clone()]);
            let p = (scale * s - lse).exp();
            let doubt = 1.0 + (scale * s_size).abs() + (scale * s - lse).abs();
            let ds = scale * p * (dp - delta);
            let ds_size = scale.abs() * p * (doubt * (dp - delta).abs() + dp_size + delta.abs());
            for (at, from) in query.zip(key) {
                dq.value[at] += ds * k[from];
                dq.magnitude[at] += ds_size * k[from].abs();
                dk.value[from] += ds * q[at];
                dk.magnitude[from] += ds_size * q[at].abs();
                dv.value[from] += p * dy[at];
                dv.magnitude[from] += p * doubt * dy[at].abs();
            }
        }
    }
    vec![dq, dk, dv]
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// CPU, plain: one query row and head after another.
fn naive_stats(d: &Dims, args: &mut [Slice<'_>]) {
    let (layout, scale) = (Layout::new(d), d.scalar("scale"));
    let [q, k, span, y, dy, stats] = args else { unreachable!("six arguments") };
    let (q, k, span, y, dy) = (q.f32(), k.f32(), span.u32(), y.f32(), dy.f32());
    let mut scores = Vec::new();
    for (i, stats) in stats.f32_mut().chunks_mut(2).enumerate() {
        scores.clear();
        scores.extend(layout.span(i, span).map(|c| scale * dot(&q[layout.query(i)], &k[layout.key(i, c)])));
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = scores.iter().map(|s| (s - largest).exp()).sum();
        stats[0] = if scores.is_empty() { 0.0 } else { largest + total.ln() };
        stats[1] = dot(&dy[layout.query(i)], &y[layout.query(i)]);
    }
}

/// CPU, plain: one query row and head after another, each adding to the keys it sees.
fn naive(d: &Dims, args: &mut [Slice<'_>]) {
    let (layout, scale) = (Layout::new(d), d.scalar("scale"));
    let [q, k, v, span, dy, stats, dq, dk, dv] = args else { unreachable!("nine arguments") };
    let (q, k, v, span, dy, stats) = (q.f32(), k.f32(), v.f32(), span.u32(), dy.f32(), stats.f32());
    let (dq, dk, dv) = (dq.f32_mut(), dk.f32_mut(), dv.f32_mut());
    dq.fill(0.0);
    dk.fill(0.0);
    dv.fill(0.0);
    for i in 0..d["M"] * d["H"] {
        for c in layout.span(i, span) {
            let (query, key) = (layout.query(i), layout.key(i, c));
            let p = (scale * dot(&q[query.clone()], &k[key.clone()]) - stats[2 * i]).exp();
            let ds = scale * p * (dot(&dy[query.clone()], &v[key.clone()]) - stats[2 * i + 1]);
            for (at, from) in query.zip(key) {
                dq[at] += ds * k[from];
                dk[from] += ds * q[at];
                dv[from] += p * dy[at];
            }
        }
    }
}
