//! `qmatmul` in PTX, up to six rungs a format:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one output a thread | reading |
//! | `warp` | a warp streams two rows of W once past 16 rows of x, which lie in shared memory | few tokens |
//! | `mma` | tensor cores; x in bf16, W decoded to bf16 in registers | many tokens |
//! | `wgmma` | the same on warpgroups, W brought by the copy engine | many tokens on compute capability 9.0 |
//! | `wgmma64` | tiles of 64 rows of x in place of 128, of which 16, 32 or 64 are multiplied | up to 64 tokens there |
//! | `splitk` | tensor cores on strips of 16 rows of W, the eight warps of a block split K | up to 16 tokens in bf16 |
//!
//! How much of the tolerance `mma` uses: let u = 2^-8, the unit roundoff of bf16. x is exact, being the input; a weight
//! is decoded in f32 and rounded once, so each term x·w is off by at most u·|x·w|, and decoding, scale, bias and the
//! low-rank term are f32 work, of 2^-24. The tensor cores add products exact in f32, each sum off by at most 2^-22
//! (they may truncate where f32 rounds): K sums by K·2^-14·u, below sqrt(K)·u for K up to 2^28. So even when no two
//! errors cancel, all of them fit in the sqrt(K + R) + 6 roundings of u that are allowed. `wgmma` decodes in bf16: level
//! or scale, absmax or min and the weight are rounded, three roundings for each term in place of one, which fit as well.
//! `splitk` rounds no weight in q4, where scales and mins multiply sums in f32; in nf4 it rounds the level alone, in q8
//! the weight alone. That it adds eight sums in place of one changes nothing: they are parts of the same f32 sum, taken
//! in the same order every time.
//!
//! Weights of 16 bits: one in bf16 is multiplied as it is, without a rounding. One in f16 is rounded to bf16, once, as a
//! decoded one is by `mma`, and so within the same bound: 11 bits become 8, and no weight overflows or becomes 0, since
//! the exponents of bf16 reach beyond f16's, subnormals included. Products in f16 would keep the weight instead of x,
//! whose values beyond 65504, which models have, would be infinite; the weight as a sum of two bf16 would be exact for
//! twice the products, where x has been rounded once already.
//!
//! Why `mma` is not given the scales' windows of `splitk`, with which scales come in whole sectors: two sectors of 128
//! rows' scales and mins are 16 KiB, by which its three tiles of 64 rows of x no longer leave room for a second block
//! on compute capability 8.6 and 8.9. For more than 16 rows of x the tensor cores decide, and the sectors that it asks
//! for again are in a cache by then; for up to 16 rows there is `splitk`.
//!
//! Why `mma` has tiles of 32 columns where weights have 16 bits, and of 64 where they have fewer: three of 64 columns
//! would be 72 KiB, one block on compute capability 8.6 and 8.9; four of 32 are 48 KiB, two blocks there and three on 8.0.
//! Such a tile's 262,144 multiply-adds take 288 waves through shared memory, 96 in and 192 out to the four warps, and 256
//! cycles of 8.0's tensor cores, but 128 of 9.0's: for many rows there is `wgmma`, where four warps read x once.
//!
//! Why codes keep the order of rows, and are not laid out on upload so that 16 bytes are a lane's fragments. Counted in
//! `splitk`, q4: a lane runs 178 instructions for its 32 weights of a tile at M = 1, 234 at M = 16. Packed codes would
//! save three of four loads and the 8 or 16 byte permutations that bring x into the order of the codes: 7 to 9 %.
//! Nothing else: W's sectors are asked for 1.00 times as it is; 16 rows by 64 columns are 512 bytes, four waves through
//! shared memory in and four out, however they are ordered, without conflicts; loads past shared memory would use whole
//! sectors in either order. For that every other reader of W, the gradient and the embedding in three languages among
//! them, would need a second copy of it or another text, and the contract a word for the order.

use crate::op::*;
use crate::tensor::Dtype;

pub const KERNELS_F32: &[Kernel] = &[
    ptx!("qmatmul_f32_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_f32_warp", sixteen_by_sixteen, rows_of_4_fit),
];
pub const KERNELS_F16: &[Kernel] = &[
    ptx!("qmatmul_f16_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_f16_warp", sixteen_by_sixteen, rows_of_8_fit),
    tensor_cores(ptx!("qmatmul_f16_mma", tiles, tiles_of_8_fit)),
    tensor_cores(ptx!("qmatmul_f16_wgmma", hopper_tiles_16bit, many_rows_hopper)),
    tensor_cores(ptx!("qmatmul_f16_splitk", strips_16bit, few_rows_16bit)),
];
pub const KERNELS_BF16: &[Kernel] = &[
    ptx!("qmatmul_bf16_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_bf16_warp", sixteen_by_sixteen, rows_of_8_fit),
    tensor_cores(ptx!("qmatmul_bf16_mma", tiles, tiles_of_8_fit)),
    tensor_cores(ptx!("qmatmul_bf16_wgmma", hopper_tiles_16bit, many_rows_hopper)),
    tensor_cores(ptx!("qmatmul_bf16_splitk", strips_16bit, few_rows_16bit)),
];
pub const KERNELS_Q4: &[Kernel] = &[
    ptx!("qmatmul_q4_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_q4_warp", sixteen_by_sixteen, rows_fit),
    tensor_cores(ptx!("qmatmul_q4_mma", tiles, whole_vectors)),
    tensor_cores(ptx!("qmatmul_q4_wgmma", |d| hopper_tiles(d, 128, CODES_4BIT), groups_of_32)),
    tensor_cores(ptx!("qmatmul_q4_wgmma64", |d| hopper_tiles(d, 64, CODES_4BIT), |d, caps| {
        d["M"] <= 64 && groups_of_32(d, caps)
    })),
    tensor_cores(ptx!("qmatmul_q4_splitk", strips_q4, few_rows_q4)),
];
pub const KERNELS_Q8: &[Kernel] = &[
    ptx!("qmatmul_q8_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_q8_warp", sixteen_by_sixteen, rows_fit),
    tensor_cores(ptx!("qmatmul_q8_mma", tiles, columns_fit)),
    tensor_cores(ptx!("qmatmul_q8_wgmma", |d| hopper_tiles(d, 128, CODES_8BIT), groups_of_32)),
    tensor_cores(ptx!("qmatmul_q8_wgmma64", |d| hopper_tiles(d, 64, CODES_8BIT), |d, caps| {
        d["M"] <= 64 && groups_of_32(d, caps)
    })),
    tensor_cores(ptx!("qmatmul_q8_splitk", strips_q8, few_rows_q8)),
];
pub const KERNELS_NF4: &[Kernel] = &[
    ptx!("qmatmul_nf4_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_nf4_warp", sixteen_by_sixteen, rows_fit),
    tensor_cores(ptx!("qmatmul_nf4_mma", tiles, columns_fit)),
    tensor_cores(ptx!("qmatmul_nf4_wgmma", |d| hopper_tiles(d, 128, CODES_4BIT), hopper)),
    tensor_cores(ptx!("qmatmul_nf4_wgmma64", |d| hopper_tiles(d, 64, CODES_4BIT), |d, caps| {
        d["M"] <= 64 && hopper(d, caps)
    })),
    tensor_cores(ptx!("qmatmul_nf4_splitk", strips_nf4, few_rows_nf4)),
];
pub const KERNELS_NF4DQ: &[Kernel] = &[
    ptx!("qmatmul_nf4dq_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_nf4dq_warp", sixteen_by_sixteen, rows_fit),
    tensor_cores(ptx!("qmatmul_nf4dq_mma", tiles, columns_fit)),
    tensor_cores(ptx!("qmatmul_nf4dq_wgmma", |d| hopper_tiles(d, 128, CODES_4BIT), hopper)),
    tensor_cores(ptx!("qmatmul_nf4dq_wgmma64", |d| hopper_tiles(d, 64, CODES_4BIT), |d, caps| {
        d["M"] <= 64 && hopper(d, caps)
    })),
    tensor_cores(ptx!("qmatmul_nf4dq_splitk", strips_nf4, few_rows_nf4)),
];

/// The same with activations in bf16.
const fn tensor_cores(kernel: Kernel) -> Kernel {
    Kernel { act: Dtype::BF16, ..kernel }
}

/// `naive`: a block is one row of x and 128 rows of W.
fn row_by_columns(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["N"].div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// A grid has 65,535 blocks along its second axis.
fn columns_fit(d: &Dims, _: &Caps) -> bool {
    d["N"].div_ceil(128) <= 65_535
}

/// Rows of x that a block of `warp` takes: their sums and two steps of their columns fill its shared memory.
const ROWS: usize = 16;
/// Shared memory of `warp` for each row of x: two buffers of 512 columns, and two sums for each of 256 threads.
const ROW_BYTES: usize = 2 * 512 * 4 + 256 * 8;

/// `warp`: 16 rows of x by eight warps of two rows of W each.
fn sixteen_by_sixteen(d: &Dims) -> Launch {
    Launch {
        grid: [d["M"].div_ceil(ROWS) as u32, d["N"].div_ceil(16) as u32, 1],
        block: [256, 1, 1],
        shared_bytes: (d["M"].min(ROWS) * ROW_BYTES) as u32,
    }
}

/// Packed rows begin at a multiple of what a lane loads at once: their groups see to that.
fn rows_fit(d: &Dims, _: &Caps) -> bool {
    d["N"].div_ceil(16) <= 65_535
}

/// Rows of f32 begin at multiples of 16 bytes.
fn rows_of_4_fit(d: &Dims, caps: &Caps) -> bool {
    rows_fit(d, caps) && d["K"].is_multiple_of(4)
}

/// Rows of 16-bit weights begin at multiples of 16 bytes.
fn rows_of_8_fit(d: &Dims, caps: &Caps) -> bool {
    rows_fit(d, caps) && d["K"].is_multiple_of(8)
}

/// `mma`: tiles of 64 rows of x by 128 rows of W.
fn tiles(d: &Dims) -> Launch {
    Launch { grid: [d["M"].div_ceil(64) as u32, d["N"].div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// Rows of 16-bit weights and activations begin at multiples of 16 bytes.
fn tiles_of_8_fit(d: &Dims, caps: &Caps) -> bool {
    columns_fit(d, caps) && d["K"].is_multiple_of(8)
}

/// Rows of 4-bit codes begin at multiples of 16 bytes: all but groups of 16 in odd number see to that.
fn whole_vectors(d: &Dims, caps: &Caps) -> bool {
    columns_fit(d, caps) && d["K"].is_multiple_of(32)
}

/// `splitk`: strips of 16 rows of W, one a block up to 128 blocks, two in blocks of many. A tile has 512 columns of
/// each strip, `codes` bytes a row, of x, and `windows` bytes a row of scales; one strip has four tiles in shared
/// memory, two have three.
fn strips(d: &Dims, codes: usize, windows: usize) -> Launch {
    let (blocks, strips) = if d["N"] > 128 * 16 { (d["N"].div_ceil(32).max(128), 2) } else { (d["N"].div_ceil(16), 1) };
    let shared = (5 - strips) * (d["M"] * 512 * 2 + strips * 16 * (codes + windows));
    Launch { grid: [blocks as u32, 1, 1], block: [256, 1, 1], shared_bytes: shared as u32 }
}

/// Bytes of a row's scales in shared memory: those of a tile, at least a sector, and 16 since a row begins anywhere.
fn window(d: &Dims) -> usize {
    (512 * (2 << d["WIDE"]) / d["G"]).max(32) + 16
}

fn strips_q4(d: &Dims) -> Launch {
    strips(d, 256, 2 * window(d))
}

/// 8-bit codes: always one strip, or x would find no room.
fn strips_q8(d: &Dims) -> Launch {
    let shared = 4 * (d["M"] * 512 * 2 + 16 * (512 + (1 + d["AFFINE"]) * window(d)));
    Launch { grid: [d["N"].div_ceil(16) as u32, 1, 1], block: [256, 1, 1], shared_bytes: shared as u32 }
}

fn strips_nf4(d: &Dims) -> Launch {
    strips(d, 256, 32 + 16)
}

/// Rows of x that two products have, where their tiles find room.
fn few_rows(d: &Dims, caps: &Caps, launch: fn(&Dims) -> Launch) -> bool {
    d["M"] <= 16 && launch(d).shared_bytes <= caps.shared_bytes
}

/// 32 columns lie in one group, and no group is longer than a tile.
fn few_rows_q4(d: &Dims, caps: &Caps) -> bool {
    whole_vectors(d, caps) && (32..=512).contains(&d["G"]) && few_rows(d, caps, strips_q4)
}

/// No group is longer than a tile.
fn few_rows_q8(d: &Dims, caps: &Caps) -> bool {
    d["G"] <= 512 && few_rows(d, caps, strips_q8)
}

/// 16-bit weights: one strip, and four tiles of 256 columns of it and of 8 or 16 rows of x.
fn strips_16bit(d: &Dims) -> Launch {
    let shared_bytes = (4 * 256 * 16 * (2 + d["M"].div_ceil(8))) as u32;
    Launch { grid: [d["N"].div_ceil(16) as u32, 1, 1], block: [256, 1, 1], shared_bytes }
}

/// Rows of 16-bit weights and activations begin at multiples of 16 bytes.
fn few_rows_16bit(d: &Dims, caps: &Caps) -> bool {
    d["K"].is_multiple_of(8) && few_rows(d, caps, strips_16bit)
}

fn few_rows_nf4(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps, strips_nf4)
}

/// Bytes of 128 columns of 128 rows of codes in shared memory: rows of 8-bit codes lie 144 bytes apart.
const CODES_4BIT: usize = 128 * 64;
const CODES_8BIT: usize = 128 * 144;

/// `wgmma` and `wgmma64`: tiles of so many `rows` of x by 128 rows of W. Shared memory holds four tiles of 128 columns,
/// x in bf16 and `codes`, and eight mbarriers.
fn hopper_tiles(d: &Dims, rows: usize, codes: usize) -> Launch {
    let (m, n) = (d["M"].div_ceil(rows) as u32, d["N"].div_ceil(128) as u32);
    let shared_bytes = (4 * (rows * 128 * 2 + codes) + 8 * 8) as u32;
    // `wgmma64` is for one tile of x.
    let grid = if rows == 64 { [n, 1, 1] } else { [m, n, 1] };
    Launch { grid, block: [384, 1, 1], shared_bytes }
}

/// 16-bit weights: six tiles of 64 columns of 128 rows of x and of W, whose rows lie 144 bytes apart, and 12 mbarriers.
fn hopper_tiles_16bit(d: &Dims) -> Launch {
    let grid = [d["M"].div_ceil(128) as u32, d["N"].div_ceil(128) as u32, 1];
    Launch { grid, block: [384, 1, 1], shared_bytes: 6 * 128 * (128 + 144) + 12 * 8 }
}

/// Code for sm_90a runs on compute capability 9.0 and on no other.
fn hopper(d: &Dims, caps: &Caps) -> bool {
    columns_fit(d, caps) && caps.sm == 90 && d["K"].is_multiple_of(64)
}

/// A step of 32 columns lies in one group.
fn groups_of_32(d: &Dims, caps: &Caps) -> bool {
    hopper(d, caps) && d["G"].is_multiple_of(32)
}

/// For up to 64 rows of x half of what `wgmma` multiplies were zeros, and W's bytes take longer than `mma`'s products.
fn many_rows_hopper(d: &Dims, caps: &Caps) -> bool {
    d["M"] > 64 && hopper(d, caps)
}
