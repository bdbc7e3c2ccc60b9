//! `embedding`: `y[m,K]` = row `ids[m] − N0` of `deq(W[N,K])`, for ids in N0..N0+N
//!
//! W holds the rows of tokens N0.. of a table that may be split by rows; a token of another shard leaves its row of y
//! as it is, so the shards' launches fill y between them.

mod ptx;
mod wgsl;

use super::vector::{Body, Vector};
use super::weights::*;
use crate::op::*;
use crate::ops::vector::for_simd;
use crate::tensor::{Dtype, HostTensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

const PLAIN_DIMS: &[&str] = &["M", "N", "K", "N0"];
const Q4_DIMS: &[&str] = &["M", "N", "K", "N0", "G", "WIDE"];
const Q8_DIMS: &[&str] = &["M", "N", "K", "N0", "G", "WIDE", "AFFINE"];

const IDS: Arg = input("ids", ArgType::Is(Dtype::U32), &["M"], Fill::With(some_ids));
const Y: Arg = output("y", ArgType::Act, &["M", "K"]);

/// Ids of this shard and of its neighbours.
fn some_ids(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let (first, rows) = (d["N0"] as u32, d["N"] as u32);
    let range = first.saturating_sub(2)..first + rows + if first == 0 { 0 } else { 2 };
    HostTensor::from_u32(&[d["M"]], &(0..d["M"]).map(|_| rng.random_range(range.clone())).collect::<Vec<_>>())
}

// Dims of the cases: M, N, K, N0, then the format's.
const PLAIN_CASES: &[Case] = &[
    case(&[1, 1, 1, 0], "the smallest"),
    case(&[33, 7, 65, 5], "a shard with neighbours on both sides"),
    case(&[7, 257, 33, 0], "odd rows and columns"),
    case(&[65, 512, 384, 0], "MiniLM's positions"),
];
const Q4_CASES: &[Case] = &[
    case(&[1, 1, 32, 0, 32, 0], "the smallest"),
    case(&[33, 7, 48, 5, 16, 1], "groups of 16, f32 scales, a shard with neighbours on both sides"),
    case(&[7, 65, 384, 0, 128, 0], "groups of 128"),
    case(&[16, 257, 576, 0, 32, 0], "SmolLM2-135M's width"),
];
const Q8_CASES: &[Case] = &[
    case(&[1, 1, 32, 0, 32, 0, 0], "the smallest"),
    case(&[33, 7, 48, 5, 16, 1, 0], "as Q6_K becomes, a shard with neighbours on both sides"),
    case(&[7, 65, 384, 0, 128, 0, 1], "groups of 128 with mins"),
    case(&[16, 257, 576, 0, 32, 0, 0], "SmolLM2-135M's table, as stored"),
];
const NF4_CASES: &[Case] = &[
    case(&[1, 1, 64, 0], "the smallest"),
    case(&[33, 7, 192, 5], "a shard with neighbours on both sides"),
    case(&[7, 65, 320, 0], "odd rows, five blocks"),
    case(&[16, 257, 576, 0], "SmolLM2-135M's width"),
];

/// The spec, the oracle and the cost of one format: the word stands here once.
macro_rules! embedding {
    ($spec:ident, $word:literal, $dims:expr, [$($part:expr),*], $cases:expr, $ptx:expr, $wgsl:expr) => {
        #[doc = concat!("`embedding` from a table in ", $word, ".")]
        pub static $spec: OpSpec = OpSpec {
            name: "embedding",
            format: $word,
            formula: "y[M,K] = deq(W[N,K])[ids[M] − N0], for ids in N0..N0+N",
            dims: $dims,
            scalars: &[],
            args: &[IDS, $($part,)* Y],
            oracle: |d, args| oracle($word, d, args),
            cost: |d| cost($word, d),
            tolerance: Tolerance {
                roundings: |_| 4.0,
                nmse: 1e-13,
                why: "an element is one weight: at most a product and a sum, and two roundings of its group's scale; \
                      an affine weight counts with |scale·code| + |min|",
            },
            cases: $cases,
            kernels: &[
                &[Kernel {
                    stem: concat!("embedding_", $word, "_rows"),
                    source: Source::Rust(|d, args| rows($word, d, args)),
                    act: Dtype::F32,
                    launch: no_grid,
                    supports: always,
                }],
                $ptx,
                $wgsl,
            ],
        };
    };
}

embedding!(EMBEDDING_F32, "f32", PLAIN_DIMS, [W_F32], PLAIN_CASES, ptx::KERNELS_F32, wgsl::KERNELS_F32);
embedding!(EMBEDDING_F16, "f16", PLAIN_DIMS, [W_F16], PLAIN_CASES, ptx::KERNELS_F16, wgsl::KERNELS_F16);
embedding!(EMBEDDING_BF16, "bf16", PLAIN_DIMS, [W_BF16], PLAIN_CASES, ptx::KERNELS_BF16, wgsl::KERNELS_BF16);
embedding!(EMBEDDING_Q4, "q4", Q4_DIMS, [CODES_4BIT, SCALES, MINS], Q4_CASES, ptx::KERNELS_Q4, wgsl::KERNELS_Q4);
embedding!(
    EMBEDDING_Q8,
    "q8",
    Q8_DIMS,
    [CODES_I8, SCALES, MINS_IF_AFFINE],
    Q8_CASES,
    ptx::KERNELS_Q8,
    wgsl::KERNELS_Q8
);
embedding!(EMBEDDING_NF4, "nf4", PLAIN_DIMS, [CODES_4BIT, ABSMAX], NF4_CASES, ptx::KERNELS_NF4, wgsl::KERNELS_NF4);
embedding!(
    EMBEDDING_NF4DQ,
    "nf4dq",
    PLAIN_DIMS,
    [CODES_4BIT, ABSMAX_U8, ABSMAX_CODE, ABSMAX2, ABSMAX_OFFSET],
    NF4_CASES,
    ptx::KERNELS_NF4DQ,
    wgsl::KERNELS_NF4DQ
);

/// Row `id` − N0 where this shard has the token.
fn shard_row(id: u32, d: &Dims) -> Option<usize> {
    (id as usize).checked_sub(d["N0"]).filter(|row| *row < d["N"])
}

/// The pseudo-code made runnable.
fn oracle(word: &str, d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let k = d["K"];
    let (w, w_magnitude) = exact(word, d, &args[1..1 + part_count(word)]);
    let (mut value, mut magnitude) = (Vec::new(), Vec::new());
    for id in args[0].u32() {
        match shard_row(*id, d) {
            Some(row) => {
                value.extend_from_slice(&w[row * k..(row + 1) * k]);
                magnitude.extend_from_slice(&w_magnitude[row * k..(row + 1) * k]);
            }
            None => {
                value.extend(std::iter::repeat_n(f64::NAN, k));
                magnitude.extend(std::iter::repeat_n(0.0, k));
            }
        }
    }
    vec![Expected { value, magnitude }]
}

/// Every id once, and for each a row of y written and a row of the table read, but none twice.
fn cost(word: &str, d: &Dims) -> Cost {
    let (m, n) = (d["M"], d["N"]);
    let row = weight_bytes(word, d) / n.max(1);
    Cost { flops: 0, bytes: (m * (4 + 4 * d["K"]) + m.min(n) * row) as u64 }
}

/// CPU: a row after another, decoded where it lies; never more than a few hundred rows, so one thread.
fn rows(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let (y, inputs) = args.split_last_mut().expect("arguments of the contract");
    let w = Weights::new(word, d, &inputs[1..]);
    let body = Rows { ids: inputs[0].u32(), d, w, y: y.f32_mut() };
    for_simd(Simd::Portable, body);
}

struct Rows<'a> {
    ids: &'a [u32],
    d: &'a Dims,
    w: Weights<'a>,
    y: &'a mut [f32],
}

impl Body for Rows<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let k = self.d["K"];
        for (id, y) in self.ids.iter().zip(self.y.chunks_mut(k)) {
            if let Some(row) = shard_row(*id, self.d) {
                self.w.decode_rows::<V>(row, k, y);
            }
        }
    }
}
