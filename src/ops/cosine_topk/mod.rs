//! `cosine_topk`: of N rows the K with the largest products with each query, in S lists, one for each split of the rows
//!
//! ```text
//! score[q,n]  = Σ_d q[q,d]·rows[n,d]                                                  i8: · q_scales[q]·scales[n]
//! split s     = rows [s·L, min((s+1)·L, N)), L = ceil(N/S)                            may be empty
//! counts(q,n) = score[q,n] ≥ floor[q], and bit n%32 of mask[n/32] where FILTER is 1
//! ids, scores = for each query and split the K best that count, by (score descending, id ascending); id = BASE + n
//! ```
//!
//! Places that nothing fills have id 0xFFFFFFFF and score −∞. Scores compare as numbers: −0 equals 0. All inputs are
//! finite, but for a floor of −∞, and unit rows make the products cosines. N and K are at least 1, K at most 2048, D of
//! codes at most 131072 (their sums fit an i32), and BASE + N stays below 2³². Scores meet their list as they arise: a
//! matrix of them is never written.
//!
//! `floor` carries what earlier launches found: rows below a query's K best so far need no list. `topk_merge` joins the
//! lists of a launch into one. A kernel whose [`Kernel::act`] is BF16 or F16 rounds queries and rows to that type before
//! it multiplies; a caller bounds by [`score_error`] what that moves a score by, and computes the survivors' anew.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod cpu;
mod data;
mod merge;
mod ptx;
pub mod select;
#[cfg(target_arch = "x86_64")]
mod vnni;
mod wgsl;

use crate::op::*;
use crate::tensor::{Dtype, HostTensor};

pub use merge::TOPK_MERGE;

/// The id of a place that no row fills.
pub const NO_ROW: u32 = u32::MAX;
/// The longest rows of codes: 127² of them together stay below 2³¹.
pub const MAX_CODES: usize = 1 << 17;
/// Most places of a list.
pub const MAX_K: usize = 2048;
/// Codes of a row, and of a query beside them, are padded with zeros to a multiple of this: rows begin aligned.
pub const CODE_PITCH: usize = 16;

const DIMS: &[&str] = &["Q", "N", "D", "K", "S", "BASE", "FILTER"];
const FILTER: Arg = input("mask", ArgType::Is(Dtype::U32), &["N/32*FILTER"], Fill::With(data::filter));
const FLOOR: Arg = input("floor", ArgType::Is(Dtype::F32), &["Q"], Fill::With(data::floor));
const IDS: Arg = output("ids", ArgType::Is(Dtype::U32), &["Q", "S", "K"]);
const SCORES: Arg = output("scores", ArgType::Is(Dtype::F32), &["Q", "S", "K"]);
const Q: Arg = input("q", ArgType::Is(Dtype::F32), &["Q", "D"], Fill::With(data::queries));

/// Rows in f32.
pub static COSINE_TOPK_F32: OpSpec = spec(
    "f32",
    &[Q, input("rows", ArgType::Is(Dtype::F32), &["N", "D"], Fill::With(data::rows_f32)), FILTER, FLOOR, IDS, SCORES],
    data::oracle_plain,
    |d| cost(d, 4 * d["N"] * d["D"], 4 * d["Q"] * d["D"]),
    &[cpu::KERNELS_F32, ptx::KERNELS_F32, wgsl::KERNELS_F32],
);

/// Rows in f16, queries in f32.
pub static COSINE_TOPK_F16: OpSpec = spec(
    "f16",
    &[Q, input("rows", ArgType::Is(Dtype::F16), &["N", "D"], Fill::With(data::rows_f16)), FILTER, FLOOR, IDS, SCORES],
    data::oracle_plain,
    |d| cost(d, 2 * d["N"] * d["D"], 4 * d["Q"] * d["D"]),
    &[cpu::KERNELS_F16, ptx::KERNELS_F16, wgsl::KERNELS_F16],
);

/// Rows and queries as 8-bit codes −127 to 127 with a scale each; a row's codes are padded with zeros to a multiple of 16.
pub static COSINE_TOPK_I8: OpSpec = spec(
    "i8",
    &[
        input("q", ArgType::Is(Dtype::I8), &["Q", "D/16*16"], Fill::With(data::query_codes)),
        input("q_scales", ArgType::Is(Dtype::F32), &["Q"], Fill::With(data::query_scales)),
        input("rows", ArgType::Is(Dtype::I8), &["N", "D/16*16"], Fill::With(data::row_codes)),
        input("scales", ArgType::Is(Dtype::F32), &["N"], Fill::With(data::row_scales)),
        FILTER,
        FLOOR,
        IDS,
        SCORES,
    ],
    data::oracle_codes,
    |d| cost(d, d["N"] * (d["D"] + 4), d["Q"] * (d["D"] + 4)),
    &[cpu::KERNELS_I8, ptx::KERNELS_I8, wgsl::KERNELS_I8],
);

/// The fields all formats share.
const fn spec(
    format: &'static str,
    args: &'static [Arg],
    oracle: fn(&Dims, &[HostTensor]) -> Vec<Expected>,
    cost: fn(&Dims) -> Cost,
    kernels: &'static [&'static [Kernel]],
) -> OpSpec {
    OpSpec {
        name: "cosine_topk",
        format,
        formula: "ids, scores [Q,S,K] = for each query and split of the rows the K largest Σ_d q[q,d]·rows[n,d] that \
                  reach floor[q] and pass the filter, by (score descending, id ascending)",
        dims: DIMS,
        scalars: &[],
        args,
        oracle,
        cost,
        tolerance: Tolerance {
            roundings: |d| (d["D"] as f64).sqrt() + 6.0,
            nmse: 1e-11,
            why: "D products are summed and their roundings, independent of each other, grow with sqrt(D); scaling a \
                  sum of codes takes three more. The j-th largest of many numbers moves by no more than the largest \
                  change of any of them, so each place has the bound of a product, with the largest terms among the \
                  rows that count. Where N is odd, values lie on a coarse grid on which every sum is exact in any \
                  order and in bf16 too: ids and scores must then equal the oracle's. Where N is even they are normal \
                  and ids, which near-ties may exchange, are held against the scores by tests of their own",
        },
        cases: CASES,
        kernels,
    }
}

/// How far a score of this kernel may be from the real product of `d` elements, relative to the norms of query and row:
/// Σ|q·x| ≤ ‖q‖·‖x‖ (Cauchy, Schwarz), and a sum of n terms in any order is off by at most n·u/(1 − n·u) of that, u the
/// unit roundoff of f32 (Higham 2002, 4.2); eight more for the scales of codes and the rounding of what it is compared
/// with. Narrower factors add one rounding of their type each, and tensor cores, which multiply them, may truncate where
/// f32 rounds: four times u a term.
pub fn score_error(kernel: &Kernel, d: usize) -> f64 {
    let narrow = if kernel.act == Dtype::F32 { 0.0 } else { kernel.act.unit_roundoff() };
    let terms = if kernel.act == Dtype::F32 { d + 8 } else { 4 * (d + 8) };
    let roundings = terms as f64 * Dtype::F32.unit_roundoff();
    // Beyond some million elements nothing is known.
    let sum = if roundings < 0.5 { roundings / (1.0 - roundings) } else { f64::INFINITY };
    // The terms that are summed may be larger by what rounding adds to their factors.
    sum * (1.0 + narrow).powi(2) + 2.0 * narrow + narrow * narrow
}

fn cost(d: &Dims, row_bytes: usize, query_bytes: usize) -> Cost {
    let filter = 4 * d["FILTER"] * d["N"].div_ceil(32);
    let lists = 8 * d["Q"] * d["S"] * d["K"];
    let bytes = row_bytes + query_bytes + filter + 4 * d["Q"] + lists;
    Cost { flops: (2 * d["Q"] * d["N"] * d["D"]) as u64, bytes: bytes as u64 }
}

// Q, N, D, K, S, BASE, FILTER
const CASES: &[Case] = &[
    case(&[1, 1, 1, 1, 1, 0, 0], "the smallest"),
    case(&[7, 33, 33, 10, 3, 0, 1], "odd sizes; some rows are filtered out; a split's rows end within a filter word"),
    case(&[3, 7, 65, 33, 2, 5, 1], "K beyond N; the filter leaves no row"),
    case(&[3, 9, 65, 33, 4, 5, 0], "K beyond N; the last split has no row; ids from 5 on"),
    case(&[65, 257, 7, 1, 4, 1000, 0], "one place; more queries than a tile"),
    case(&[2, 2305, 5, 2048, 1, 0, 0], "the most places; many ties"),
    case(&[33, 258, 65, 17, 5, 0, 1], "real values; more queries than a warp"),
    case(&[1, 1026, 384, 32, 2, 64, 0], "real values; one query over rows of MiniLM"),
    case(&[64, 1025, 384, 40, 2, 0, 1], "a batch over rows of MiniLM, on the grid"),
    case(&[5, 203, 136, 40, 3, 0, 1], "few queries; lists that fill more than once, on the grid"),
    case(&[17, 401, 40, 100, 2, 3, 1], "a batch; lists that fill more than once, on the grid"),
    case(&[70, 130, 24, 9, 1, 0, 0], "real values; a few queries and rows past a tile"),
    case(&[64, 1000, 384, 10, 4, 0, 0], "a batch over rows of MiniLM"),
];
