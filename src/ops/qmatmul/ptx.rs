//! `qmatmul` in PTX:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one output a thread | reading |
//! | `warp` | a warp streams two rows of W once past all rows of x, which lie in shared memory | M <= 16 |

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[
    ptx!("qmatmul_f32_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_f32_warp", sixteen_rows_of_w, few_rows_of_4),
];
pub const KERNELS_F16: &[Kernel] = &[
    ptx!("qmatmul_f16_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_f16_warp", sixteen_rows_of_w, few_rows_of_8),
];
pub const KERNELS_BF16: &[Kernel] = &[
    ptx!("qmatmul_bf16_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_bf16_warp", sixteen_rows_of_w, few_rows_of_8),
];
pub const KERNELS_Q4: &[Kernel] =
    &[ptx!("qmatmul_q4_naive", row_by_columns, columns_fit), ptx!("qmatmul_q4_warp", sixteen_rows_of_w, few_rows)];
pub const KERNELS_Q8: &[Kernel] =
    &[ptx!("qmatmul_q8_naive", row_by_columns, columns_fit), ptx!("qmatmul_q8_warp", sixteen_rows_of_w, few_rows)];
pub const KERNELS_NF4: &[Kernel] =
    &[ptx!("qmatmul_nf4_naive", row_by_columns, columns_fit), ptx!("qmatmul_nf4_warp", sixteen_rows_of_w, few_rows)];
pub const KERNELS_NF4DQ: &[Kernel] = &[
    ptx!("qmatmul_nf4dq_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_nf4dq_warp", sixteen_rows_of_w, few_rows),
];

/// `naive`: a block is one row of x and 128 rows of W.
fn row_by_columns(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["N"].div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// A grid has 65,535 blocks along its second axis.
fn columns_fit(d: &Dims, _: &Caps) -> bool {
    d["N"].div_ceil(128) <= 65_535
}

/// Most rows of x that `warp` takes: their sums and two steps of their columns fill the shared memory of a block.
const MAX_ROWS: usize = 16;
/// Shared memory of `warp` for each row of x: two buffers of 512 columns, and two sums for each of 256 threads.
const ROW_BYTES: usize = 2 * 512 * 4 + 256 * 8;

/// `warp`: eight warps of two rows of W each.
fn sixteen_rows_of_w(d: &Dims) -> Launch {
    let shared_bytes = (d["M"] * ROW_BYTES) as u32;
    Launch { grid: [d["N"].div_ceil(16) as u32, 1, 1], block: [256, 1, 1], shared_bytes }
}

/// Packed rows begin at a multiple of what a lane loads at once: their groups see to that.
fn few_rows(d: &Dims, _: &Caps) -> bool {
    d["M"] <= MAX_ROWS
}

/// Rows of f32 begin at multiples of 16 bytes.
fn few_rows_of_4(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps) && d["K"] % 4 == 0
}

/// Rows of 16-bit weights begin at multiples of 16 bytes.
fn few_rows_of_8(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps) && d["K"] % 8 == 0
}
