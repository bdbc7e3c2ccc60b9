//! The kernels in PTX, slowest first:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one query and split a block, one row a thread | reading; rows that begin anywhere |
//! | `tiled` | 64 queries by 128 rows in shared memory, 8 x 8 a thread | batches, in f32 or exact |
//! | `warp` | a warp streams four rows past eight queries in shared memory | Q ≤ 8 |
//! | `mma` | tensor cores: f32 rounds to bf16, queries beside f16 rows to f16, sums of codes are exact | batches |
//!
//! How much of the tolerance `mma` uses: let u be the unit roundoff of its type, 2^-8 or 2^-11. A factor rounds once or
//! not at all, and 2u are allowed for the two. A sum of D terms in f32 has errors of 2^-22 a step at most, as tensor
//! cores may truncate where f32 rounds: what sqrt(D) + 6 roundings do not hold of it is small beside u.

use crate::op::*;
use crate::tensor::Dtype;

pub const KERNELS_F32: &[Kernel] = &[
    ptx!("cosine_topk_f32_naive", a_query_a_block, blocks_fit),
    ptx!("cosine_topk_f32_tiled", |d| tiles_64x128(d, 128), |d, caps| batch(d, caps, 128, 4)),
    ptx!("cosine_topk_f32_warp", |d| eight_queries(d, 128, 512), |d, caps| few_queries(
        d,
        caps,
        eight_queries(d, 128, 512),
        4
    )),
    Kernel {
        act: Dtype::BF16,
        ..ptx!("cosine_topk_f32_mma", |d| tiles_64x128(d, 128), |d, caps| batch(d, caps, 128, 4))
    },
];
pub const KERNELS_F16: &[Kernel] = &[
    ptx!("cosine_topk_f16_naive", a_query_a_block, blocks_fit),
    ptx!("cosine_topk_f16_tiled", |d| tiles_64x128(d, 64), |d, caps| batch(d, caps, 64, 8)),
    ptx!("cosine_topk_f16_warp", |d| eight_queries(d, 256, 1024), |d, caps| few_queries(
        d,
        caps,
        eight_queries(d, 256, 1024),
        8
    )),
    Kernel { act: Dtype::F16, ..ptx!("cosine_topk_f16_mma", |d| tiles_64x128(d, 64), |d, caps| batch(d, caps, 64, 8)) },
];
pub const KERNELS_I8: &[Kernel] = &[
    ptx!("cosine_topk_i8_naive", a_query_a_block, blocks_fit),
    ptx!("cosine_topk_i8_tiled", |d| tiles_64x128(d, 128), |d, caps| batch(d, caps, 128, 1)),
    ptx!("cosine_topk_i8_warp", |d| eight_queries(d, 512, 512), |d, caps| few_queries(
        d,
        caps,
        eight_queries(d, 512, 512),
        1
    )),
    ptx!("cosine_topk_i8_mma", |d| tiles_64x128(d, 128), |d, caps| batch(d, caps, 128, 1)),
];
pub const MERGE: &[Kernel] = &[ptx!("topk_merge_f32_ranks", a_place_a_thread, places_fit)];

/// Blocks of a grid along its second axis.
const BLOCKS: usize = 65_535;
/// Most queries that `warp` takes, which are also those of a block.
const FEW_QUERIES: usize = 8;

/// `naive`.
fn a_query_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["Q"] as u32, d["S"] as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

fn blocks_fit(d: &Dims, _: &Caps) -> bool {
    d["S"] <= BLOCKS
}

/// `tiled` and `mma`: three parts of 64 queries and 128 rows, 128 bytes of a query and `row_bytes` of a row; 64 lists'
/// keys and states, and eight scores a thread.
fn tiles_64x128(d: &Dims, row_bytes: usize) -> Launch {
    let shared_bytes = (3 * (64 * 128 + 128 * row_bytes) + 64 * (32 * 8 + 16) + 128 * 32) as u32;
    Launch { grid: [d["Q"].div_ceil(64) as u32, d["S"] as u32, 1], block: [128, 1, 1], shared_bytes }
}

/// Where rows of a multiple of `columns` columns begin at multiples of 16 bytes.
fn batch(d: &Dims, caps: &Caps, row_bytes: usize, columns: usize) -> bool {
    let room = tiles_64x128(d, row_bytes).shared_bytes <= caps.shared_bytes;
    d["Q"] > FEW_QUERIES && d["D"].is_multiple_of(columns) && room && blocks_fit(d, caps)
}

/// `warp`: eight queries of `bytes` a step of `columns` columns, with their lists' keys and states.
fn eight_queries(d: &Dims, columns: usize, bytes: usize) -> Launch {
    let shared_bytes = (8 * bytes * d["D"].div_ceil(columns) + 8 * (32 * 8 + 16)) as u32;
    Launch { grid: [d["Q"].div_ceil(8) as u32, d["S"] as u32, 1], block: [256, 1, 1], shared_bytes }
}

/// The same of rows for few queries, in `launch`'s shared memory.
fn few_queries(d: &Dims, caps: &Caps, launch: Launch, columns: usize) -> bool {
    let room = launch.shared_bytes <= caps.shared_bytes;
    d["Q"] <= FEW_QUERIES && d["D"].is_multiple_of(columns) && room && blocks_fit(d, caps)
}

/// `topk_merge_f32_ranks`.
fn a_place_a_thread(d: &Dims) -> Launch {
    Launch { grid: [d["Q"] as u32, (d["S"] * d["K"]).div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

fn places_fit(d: &Dims, _: &Caps) -> bool {
    (d["S"] * d["K"]).div_ceil(128) <= BLOCKS
}
