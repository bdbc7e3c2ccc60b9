//! `lora_shrink`: `S[M,R] = x[M,K] · A[R,K]ᵀ`, an adapter's first half            Hu et al. 2021, arXiv 2106.09685
//!
//! With `IDS` = 0 there is one adapter, and A `[T,K]` is its matrix, T = R; `adapter` and `rows` are empty and L is 0.
//! With `IDS` = 1 each row names its own, so that one launch serves a batch of many (Chen et al. 2023, arXiv
//! 2310.18547): A holds the matrices of L adapters, one below the other, each with its true rank; those of adapter l
//! are rows `rows[l,0]..rows[l,1]` of A, at most R of them, `rows[l,1]` ≤ T; token m uses adapter `adapter[m]`. Columns
//! of S past an adapter's rank are zero, and so is the whole row where `adapter[m]` is −1 or no index below L.

use super::lora_backward::{BLOCKS, MOST_ROWS};
use super::skinny::{self, Rows};
use super::vector::{for_simd, Body, Vector};
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Tokens into the low rank of their adapter.
pub static LORA_SHRINK: OpSpec = OpSpec {
    name: "lora_shrink",
    format: "f32",
    formula: "S[m,r] = Σ_k x[m,k] · A[rows[adapter[m],0] + r, k], 0 past the adapter's rank and without an adapter",
    dims: &["M", "K", "R", "T", "L", "IDS"],
    scalars: &[],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::Normal),
        input("lora_a", ArgType::Is(Dtype::F32), &["T", "K"], Fill::Normal),
        input("adapter", ArgType::Is(Dtype::I32), &["IDS*M"], Fill::With(adapters)),
        input("rows", ArgType::Is(Dtype::U32), &["IDS*L", "2"], Fill::With(true_ranks)),
        output("s", ArgType::Is(Dtype::F32), &["M", "R"]),
    ],
    oracle,
    // Counted as if every token had an adapter of rank R, another one each as long as there are others.
    cost: |d| {
        let (m, k, r) = (d["M"], d["K"], d["R"]);
        let met = d["T"].min(m * r);
        Cost { flops: (2 * m * k * r) as u64, bytes: (4 * (m * k + met * k + m * r)) as u64 }
    },
    tolerance: Tolerance {
        roundings: |d| (d["K"] as f64).sqrt() + 2.0,
        nmse: 1e-11,
        why: "K products are summed; their roundings, independent of each other, grow with sqrt(K)",
    },
    // M, K, R, T, L, IDS
    cases: &[
        case(&[1, 1, 1, 1, 0, 0], "the smallest"),
        case(&[7, 33, 3, 3, 0, 0], "tails everywhere"),
        case(&[33, 257, 9, 23, 3, 1], "three adapters, ranks of their own, tokens without one"),
        case(&[65, 65, 8, 1, 1, 1], "one adapter of rank 1 in a batch made for 8"),
        case(&[257, 33, 65, 65, 0, 0], "a rank beyond a vector"),
        case(&[5, 1536, 16, 64, 4, 1], "four adapters of rank 16, down projection"),
        case(&[65, 132, 5, 5, 0, 0], "columns by fours, tails of tiles, a rank that is none of fours"),
        case(&[70, 68, 12, 12, 0, 0], "ranks in two groups of eight"),
        case(&[41, 36, 36, 36, 0, 0], "ranks beyond four groups of eight"),
        case(&[256, 576, 8, 8, 0, 0], "SmolLM2-135M, rank 8"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    rust("lora_shrink_f32_naive", naive, always),
    rust("lora_shrink_f32_rows", |d, args| rows(d, args, Simd::Portable), always),
    rust("lora_shrink_f32_rows_avx2", |d, args| rows(d, args, Simd::Avx2), has_avx2),
    rust("lora_shrink_f32_rows_avx512", |d, args| rows(d, args, Simd::Avx512), has_avx512),
];

const PTX: &[Kernel] = &[
    ptx!("lora_shrink_f32_warp", four_tokens_a_block, always),
    ptx!("lora_shrink_f32_tiled", tokens_by_32, one_adapter_in_tiles),
];

/// A block of 128 threads holds four warps, each warp a token and eight ranks.
fn four_tokens_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"].div_ceil(4) as u32, d["R"].div_ceil(8) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// Blocks of 128 threads, each 32 ranks of 32 tokens.
fn tokens_by_32(d: &Dims) -> Launch {
    Launch { grid: [d["M"].div_ceil(32) as u32, d["R"].div_ceil(32) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// Where four columns of x and A lie in 16 bytes, all tokens have the same adapter, and there are some for most lanes.
fn one_adapter_in_tiles(d: &Dims, _: &Caps) -> bool {
    let counted = d["M"].max(d["K"]) <= MOST_ROWS && d["R"].div_ceil(32) <= BLOCKS;
    d["IDS"] == 0 && d["K"].is_multiple_of(4) && d["M"] >= 16 && counted
}

const WGSL: &[Kernel] = &[wgsl!("lora_shrink_f32_workgroup", four_ranks_a_group, always)];

/// Four words of workgroup memory an invocation.
fn four_ranks_a_group(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["R"].div_ceil(4) as u32, 1], block: [64, 1, 1], shared_bytes: 1024 }
}

/// Indices of adapters, −1 and one past the last among them.
fn adapters(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let count = d["IDS"] * d["M"];
    let ids: Vec<i32> = (0..count).map(|_| rng.random_range(-1..=d["L"] as i32)).collect();
    HostTensor::from_slice(Dtype::I32, &[count], &ids)
}

/// T rows, cut where L adapters take at most R each and all but the last as many as they can.
fn true_ranks(d: &Dims, _: &mut ChaCha8Rng) -> HostTensor {
    let count = d["IDS"] * d["L"];
    let ends = |l: usize| [l * d["R"], (l + 1) * d["R"]].map(|row| row.min(d["T"]) as u32);
    HostTensor::from_u32(&[count, 2], &(0..count).flat_map(ends).collect::<Vec<_>>())
}

/// Rows of A that token m uses.
fn of_token(d: &Dims, m: usize, adapter: &[i32], rows: &[u32]) -> std::ops::Range<usize> {
    if d["IDS"] == 0 {
        return 0..d["R"];
    }
    match usize::try_from(adapter[m]) {
        Ok(l) if l < d["L"] => rows[2 * l] as usize..rows[2 * l + 1] as usize,
        _ => 0..0,
    }
}

/// The definition in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (m, k, r) = (d["M"], d["K"], d["R"]);
    let (x, a, adapter, rows) = (args[0].to_f64(), args[1].to_f64(), args[2].as_slice::<i32>(), args[3].u32());
    let mut expected = Expected { value: vec![0.0; m * r], magnitude: vec![0.0; m * r] };
    for i in 0..m {
        for (j, row) in of_token(d, i, adapter, rows).enumerate() {
            for (x, a) in x[i * k..(i + 1) * k].iter().zip(&a[row * k..]) {
                expected.value[i * r + j] += x * a;
                expected.magnitude[i * r + j] += (x * a).abs();
            }
        }
    }
    vec![expected]
}

/// CPU, plain: the definition.
fn naive(d: &Dims, args: &mut [Slice<'_>]) {
    let (k, r) = (d["K"], d["R"]);
    let [x, a, adapter, rows, s] = args else { unreachable!("five arguments") };
    let (x, a, adapter, rows) = (x.f32(), a.f32(), adapter.as_slice::<i32>(), rows.u32());
    for (m, s) in s.f32_mut().chunks_mut(r).enumerate() {
        let of_token = of_token(d, m, adapter, rows);
        s[of_token.len()..].fill(0.0);
        for (s, row) in s.iter_mut().zip(of_token) {
            *s = x[m * k..(m + 1) * k].iter().zip(&a[row * k..]).map(|(x, a)| x * a).sum();
        }
    }
}

/// CPU: tokens in parallel.
fn rows(d: &Dims, args: &mut [Slice<'_>], simd: Simd) {
    let (k, r) = (d["K"], d["R"]);
    let [x, a, adapter, rows, s] = args else { unreachable!("five arguments") };
    let (x, a, adapter, rows) = (x.f32(), a.f32(), adapter.as_slice::<i32>(), rows.u32());
    let m = d["M"];
    assert!(x.len() == m * k && s.f32().len() == m * r);
    let s = Rows(s.f32_mut().as_mut_ptr());
    skinny::in_parts(m, k * r, &|m| {
        let of_token = of_token(d, m, adapter, rows);
        // SAFETY: row m lies in S, as just seen, and is this part's alone.
        let s = unsafe { std::slice::from_raw_parts_mut(s.at(m * r), r) };
        let (used, unused) = s.split_at_mut(of_token.len());
        unused.fill(0.0);
        for_simd(simd, Shrink { x: &x[m * k..(m + 1) * k], a: &a[of_token.start * k..of_token.end * k], s: used });
    });
}

/// One token's ranks.
struct Shrink<'a> {
    x: &'a [f32],
    a: &'a [f32],
    s: &'a mut [f32],
}

impl Body for Shrink<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        skinny::dots::<V>(self.x, self.a, self.s);
    }
}
