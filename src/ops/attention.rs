//! `attention`: y = softmax(scale · q·kᵀ) · v over a span of cached rows         Vaswani et al. 2017, arXiv 1706.03762
//!
//! Several query heads may share a key head (Ainslie et al. 2023, arXiv 2305.13245): head h reads key head h/(H/KV).
//! One rule covers every mask in use: row m sees the rows `span[m,0]..span[m,1]` of the cache. A causal model gives it
//! 0..pos+1, packed documents start..pos+1, a bidirectional encoder its sentence start..end, padding an empty span.

mod decode;
mod tiled;

use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Attention of query rows to spans of a key and value cache.
pub static ATTENTION: OpSpec = OpSpec {
    name: "attention",
    format: "f32",
    formula: "y[m,h] = Σ_c softmax_c(scale · q[m,h]·k[c,h/(H/KV)]) · v[c,h/(H/KV)], c in span[m,0]..span[m,1]; \
              0 for an empty span",
    dims: &["M", "H", "KV", "D", "C"],
    scalars: &["scale"],
    args: &[
        input("q", ArgType::Act, &["M", "H*D"], Fill::Normal),
        input("k", ArgType::Act, &["C", "KV*D"], Fill::Normal),
        input("v", ArgType::Act, &["C", "KV*D"], Fill::Normal),
        input("span", ArgType::Is(Dtype::U32), &["M", "2"], Fill::With(spans)),
        output("y", ArgType::Act, &["M", "H*D"]),
    ],
    oracle,
    // Of a causal document whose last M of C rows are the queries; other spans are counted as if they were that.
    cost: |d| {
        let (m, c) = (d["M"], d["C"]);
        let pairs = (0..m).map(|i| (c + i + 1).saturating_sub(m)).sum::<usize>();
        let rows = 2 * m * d["H"] * d["D"] + 2 * c * d["KV"] * d["D"];
        Cost { flops: (4 * pairs * d["H"] * d["D"]) as u64, bytes: (4 * rows + 8 * m) as u64 }
    },
    tolerance: Tolerance {
        roundings: |d| (d["D"] as f64).sqrt() + (d["C"] as f64).sqrt() + 8.0,
        nmse: 1e-11,
        why: "a score errs by sqrt(D) independent roundings of scale · Σ|q k|, and minus the largest score by one of \
              the difference: relative errors of its weight, as exp makes them. Weight errors move y by w (|v| + |y|), \
              and the sums over at most C rows add sqrt(C) roundings. exp's 1.1 ulp counts 2.2, the quotient, the \
              scale and the rescaling of a running softmax the rest. Scores of size T make the mean square error T² \
              times a dot product's",
    },
    cases: &[
        case_with(&[1, 1, 1, 1, 1], &[1.0], "the smallest"),
        case_with(&[7, 2, 1, 33, 7], &[0.2], "odd head width, two heads to a key head, packed documents"),
        case_with(&[2, 3, 3, 7, 2], &[0.378], "one row that sees something, one that sees nothing"),
        case_with(&[33, 3, 3, 32, 33], &[0.177], "bidirectional sentences and padding"),
        case_with(&[65, 6, 2, 7, 257], &[3.0], "causal after a cache, one row past a block, scores far apart"),
        case_with(&[257, 4, 2, 16, 257], &[0.25], "packed documents longer than a block of keys"),
        case_with(&[2, 9, 3, 64, 65], &[0.125], "two rows, each with a span of its own"),
        case_with(&[1, 9, 3, 64, 257], &[0.125], "decode"),
        case_with(&[1, 7, 1, 65, 33], &[3.0], "decode with large scores and odd sizes"),
        case_with(&[33, 4, 2, 128, 65], &[0.088], "the widest heads of common decoders, causal after a cache"),
        case_with(&[128, 12, 12, 32, 128], &[0.177], "MiniLM"),
        case_with(&[128, 9, 3, 64, 257], &[0.125], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    rung("attention_f32_naive", naive, always),
    rung("attention_f32_tiled", |d, args| tiled::launch(d, args, tiled::portable), always),
    #[cfg(target_arch = "x86_64")]
    rung("attention_f32_tiled_avx2", |d, args| tiled::launch(d, args, tiled::avx2), |_, caps| caps.simd >= Simd::Avx2),
    // With fewer lanes most of a block would be idle.
    #[cfg(target_arch = "x86_64")]
    rung(
        "attention_f32_tiled_avx512",
        |d, args| tiled::launch(d, args, tiled::avx512),
        |d, caps| caps.simd >= Simd::Avx512 && d["M"] * (d["H"] / d["KV"]) > 48,
    ),
    rung("attention_f32_decode", |d, args| decode::launch(d, args, decode::portable), |d, _| d["M"] <= 16),
    #[cfg(target_arch = "x86_64")]
    rung(
        "attention_f32_decode_avx2",
        |d, args| decode::launch(d, args, decode::avx2),
        |d, caps| caps.simd >= Simd::Avx2 && d["M"] <= 16,
    ),
];

const PTX: &[Kernel] = &[
    // A row's scores lie in shared memory.
    ptx!("attention_f32_naive", a_row_and_head_a_block, |d, caps| shared_for_scores(d) <= caps.shared_bytes as usize),
    // Its threads hold the results of up to 128 columns.
    ptx!("attention_f32_tiled", queries_a_block, |d, caps| {
        d["D"] <= 128 && queries_a_block(d).shared_bytes <= caps.shared_bytes
    }),
    // With more rows, tiles that many queries share pay.
    ptx!("attention_f32_decode", a_row_and_head_a_wide_block, |d, _| d["M"] <= 8 && d["D"] <= 128),
];

/// The scores of a row and the parts of two sums, in bytes.
fn shared_for_scores(d: &Dims) -> usize {
    4 * d["C"] + 32
}

/// A block of 128 threads for each row and head.
fn a_row_and_head_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["H"] as u32, 1], block: [128, 1, 1], shared_bytes: 4 * d["C"] as u32 }
}

/// A block of 512 threads for each row and head.
fn a_row_and_head_a_wide_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["H"] as u32, 1], block: [512, 1, 1], shared_bytes: 0 }
}

/// A block of 128 threads for 64 of the queries that share a key head, and tiles of 64 + 32 + 32 rows of D rounded up
/// to 32, plus 4, numbers and of 64 rows of 40.
fn queries_a_block(d: &Dims) -> Launch {
    let (heads, kv_heads) = (d["H"], d["KV"]);
    let row = d["D"].next_multiple_of(32) + 4;
    Launch {
        grid: [(d["M"] * (heads / kv_heads)).div_ceil(64) as u32, kv_heads as u32, 1],
        block: [128, 1, 1],
        shared_bytes: (4 * (128 * row + 64 * 40)) as u32,
    }
}

const WGSL: &[Kernel] = &[
    wgsl!("attention_f32_naive" + "exact", one_head_an_invocation, always),
    wgsl!("attention_f32_workgroup" + "exact", |d| one_head_a_group(d, 512), |d, _| d["D"] <= 256),
    wgsl!("attention_f32_decode" + "exact" + "exact4", |d| one_head_a_group(d, 1536), |d, _| d["D"].is_multiple_of(4)
        && d["D"] <= 256),
    wgsl!("attention_f32_tiled" + "exact4", one_tile_a_group, |d, caps| {
        d["D"].is_multiple_of(4) && d["M"] >= 8 && caps.shared_bytes >= TILE_BYTES
    }),
];

fn one_head_an_invocation(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["H"]).div_ceil(64) as u32, 1, 1], block: [64, 1, 1], shared_bytes: 0 }
}

fn one_head_a_group(d: &Dims, shared_bytes: u32) -> Launch {
    Launch { grid: [d["H"] as u32, d["M"] as u32, 1], block: [64, 1, 1], shared_bytes }
}

/// 32 rows of q, of k and v, and of weights, and what 64 invocations tell each other.
const TILE_BYTES: u32 = 22544;

/// 32 rows and 64 columns of a head.
fn one_tile_a_group(d: &Dims) -> Launch {
    let grid = [d["M"].div_ceil(32) as u32, d["H"] as u32, d["D"].div_ceil(64) as u32];
    Launch { grid, block: [64, 1, 1], shared_bytes: TILE_BYTES }
}

/// A kernel of this table: Rust, f32.
const fn rung(stem: &'static str, body: fn(&Dims, &mut [Slice<'_>]), supports: fn(&Dims, &Caps) -> bool) -> Kernel {
    Kernel { stem, source: Source::Rust(body), act: Dtype::F32, launch: no_grid, supports }
}

/// Spans by what the dims, M ≤ C, make likely: M < C, a causal document whose last rows are the queries; M = C with
/// heads sharing keys, a decoder's packed documents; else an encoder's sentences, each with some padding after it, and
/// the last row padding.
pub(super) fn spans(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let (m, c) = (d["M"], d["C"]);
    let mut span = Vec::with_capacity(2 * m);
    if m < c {
        (0..m).for_each(|row| span.extend([0, c - m + row + 1]));
    }
    while span.len() < 2 * m {
        let start = span.len() / 2;
        let length = rng.random_range(1..=(m - start).min(m / 2 + 1));
        let tokens = rng.random_range(length.div_ceil(2)..=length);
        for row in start..start + length {
            let causal = d["H"] > d["KV"];
            span.extend(match row {
                _ if causal => [start, row + 1],
                _ if row < start + tokens && (row + 1 < m || m == 1) => [start, start + tokens],
                _ => [row, row],
            });
        }
    }
    HostTensor::from_u32(&[m, 2], &span.iter().map(|&v| v as u32).collect::<Vec<_>>())
}

/// The definition in f64: scores, weights, weighted mean.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (h, kv, dim, scale) = (d["H"], d["KV"], d["D"], d.scalar("scale") as f64);
    let (q, k, v, span) = (args[0].to_f64(), args[1].to_f64(), args[2].to_f64(), args[3].u32());

    let mut expected = Expected { value: vec![0.0; q.len()], magnitude: vec![0.0; q.len()] };
    for (i, q) in q.chunks(dim).enumerate() {
        let (m, head) = (i / h, i % h);
        let cached = span[2 * m] as usize..span[2 * m + 1] as usize;
        let row = |c: usize| (c * kv + head / (h / kv)) * dim..(c * kv + head / (h / kv) + 1) * dim;

        // A score, and the sum of the sizes of its terms.
        let scores: Vec<(f64, f64)> = cached
            .clone()
            .map(|c| {
                q.iter().zip(&k[row(c)]).map(|(q, k)| scale * q * k).fold((0.0, 0.0), |s, t| (s.0 + t, s.1 + t.abs()))
            })
            .collect();
        let largest = scores.iter().fold(f64::NEG_INFINITY, |max, s| max.max(s.0));
        let total: f64 = scores.iter().map(|s| (s.0 - largest).exp()).sum();
        let weights: Vec<f64> = scores.iter().map(|s| (s.0 - largest).exp() / total).collect();

        let value = &mut expected.value[i * dim..(i + 1) * dim];
        for (c, w) in cached.clone().zip(&weights) {
            for (y, v) in value.iter_mut().zip(&v[row(c)]) {
                *y += w * v;
            }
        }
        let magnitude = &mut expected.magnitude[i * dim..(i + 1) * dim];
        for ((c, w), (score, size)) in cached.zip(&weights).zip(&scores) {
            for ((error, v), y) in magnitude.iter_mut().zip(&v[row(c)]).zip(&*value) {
                *error += w * (v.abs() + y.abs()) * (1.0 + size + (largest - score));
            }
        }
    }
    vec![expected]
}

/// CPU, plain: one query row and head after another, as the formula says.
fn naive(d: &Dims, args: &mut [Slice<'_>]) {
    let (h, kv, dim, scale) = (d["H"], d["KV"], d["D"], d.scalar("scale"));
    let [q, k, v, span, y] = args else { unreachable!("five arguments") };
    let (q, k, v, span) = (q.f32(), k.f32(), v.f32(), span.u32());

    let mut weights = Vec::new();
    for (i, (y, q)) in y.f32_mut().chunks_mut(dim).zip(q.chunks(dim)).enumerate() {
        let (m, head) = (i / h, i % h);
        let cached = span[2 * m] as usize..span[2 * m + 1] as usize;
        let row = |c: usize| (c * kv + head / (h / kv)) * dim..(c * kv + head / (h / kv) + 1) * dim;

        weights.clear();
        weights.extend(cached.clone().map(|c| scale * q.iter().zip(&k[row(c)]).map(|(q, k)| q * k).sum::<f32>()));
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|w| *w = (*w - largest).exp());
        let total = weights.iter().sum::<f32>();

        y.fill(0.0);
        for (c, w) in cached.zip(&weights) {
            for (y, v) in y.iter_mut().zip(&v[row(c)]) {
                *y += w / total * v;
            }
        }
    }
}
