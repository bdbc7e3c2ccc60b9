//! `qmatmul_t` in PTX, up to three rungs a format:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one value of dx a thread | reading |
//! | `tiled` | tiles of 64 x 128 values of dx, 8 x 8 a thread; W is decoded into shared memory | training in f32 |
//! | `mma` | tensor cores; dy in bf16, W decoded to bf16 in registers, any scales staged once a tile | training |
//!
//! How much of the tolerance `mma` uses: as in `qmatmul`, one rounding of u = 2^-8 for each weight and N·2^-14·u, below
//! sqrt(N)·u for N up to 2^28, for the sums in the tensor cores; decoding, the low-rank term and what dx held before
//! are f32 work. A weight in bf16 is taken as it is; one in f16 is rounded to bf16 once. So even when no two errors cancel, all fit in the sqrt(N + R) + 6 roundings of u that are allowed.

use crate::op::*;
use crate::tensor::Dtype;

pub const KERNELS_F32: &[Kernel] =
    &[ptx!("qmatmul_t_f32_naive", row_by_columns, columns_fit), ptx!("qmatmul_t_f32_tiled", tiles_f32, many_rows)];
pub const KERNELS_F16: &[Kernel] = &[
    ptx!("qmatmul_t_f16_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_t_f16_tiled", tiles_f32, many_rows),
    tensor_cores(ptx!("qmatmul_t_f16_mma", tiles_16bit, rows_of_8_fit)),
];
pub const KERNELS_BF16: &[Kernel] = &[
    ptx!("qmatmul_t_bf16_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_t_bf16_tiled", tiles_f32, many_rows),
    tensor_cores(ptx!("qmatmul_t_bf16_mma", tiles_16bit, rows_of_8_fit)),
];
pub const KERNELS_Q4: &[Kernel] = &[
    ptx!("qmatmul_t_q4_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_t_q4_tiled", tiles_f32, many_rows),
    tensor_cores(ptx!("qmatmul_t_q4_mma", tiles_q4, rows_of_q4_fit)),
];
pub const KERNELS_Q8: &[Kernel] = &[
    ptx!("qmatmul_t_q8_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_t_q8_tiled", tiles_f32, many_rows),
    tensor_cores(ptx!("qmatmul_t_q8_mma", tiles_q8, rows_fit)),
];
pub const KERNELS_NF4: &[Kernel] = &[
    ptx!("qmatmul_t_nf4_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_t_nf4_tiled", tiles_f32, many_rows),
    tensor_cores(ptx!("qmatmul_t_nf4_mma", tiles_nf4, rows_fit)),
];
pub const KERNELS_NF4DQ: &[Kernel] = &[
    ptx!("qmatmul_t_nf4dq_naive", row_by_columns, columns_fit),
    ptx!("qmatmul_t_nf4dq_tiled", tiles_f32, many_rows),
    tensor_cores(ptx!("qmatmul_t_nf4dq_mma", tiles_nf4, rows_fit)),
];

/// The same with activations in bf16.
const fn tensor_cores(kernel: Kernel) -> Kernel {
    Kernel { act: Dtype::BF16, ..kernel }
}

/// `naive`: a block is 128 columns of one row.
fn row_by_columns(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["K"].div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// A grid has 65,535 blocks along its second axis.
fn columns_fit(d: &Dims, _: &Caps) -> bool {
    d["K"].div_ceil(128) <= 65_535
}

/// `tiled`: tiles of 64 rows by 128 columns of dx.
fn tiles_f32(d: &Dims) -> Launch {
    tiles(d, 0)
}

/// Fewest rows of dy that `tiled` takes: it computes 32 or 64 whatever there are.
const MANY_ROWS: usize = 5;

fn many_rows(d: &Dims, caps: &Caps) -> bool {
    d["M"] >= MANY_ROWS && columns_fit(d, caps)
}

/// `mma`: tiles of 64 rows by 128 columns of dx; shared memory holds three tiles of dy and of codes, and two of scales.
fn tiles(d: &Dims, shared_bytes: u32) -> Launch {
    Launch { grid: [d["M"].div_ceil(64) as u32, d["K"].div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes }
}

/// What the tiles need is in the kernel's own shared memory.
fn tiles_16bit(d: &Dims) -> Launch {
    tiles(d, 0)
}

/// Scales and mins of eight groups of 16 columns.
fn tiles_q4(d: &Dims) -> Launch {
    tiles(d, 3 * (64 * 128 + 64 * 64) + 2 * 2 * 8 * 64 * 4)
}

/// Scales and mins of eight groups of 16 columns.
fn tiles_q8(d: &Dims) -> Launch {
    tiles(d, 3 * (64 * 128 + 64 * 128) + 2 * 2 * 8 * 64 * 4)
}

/// Scales of two blocks.
fn tiles_nf4(d: &Dims) -> Launch {
    tiles(d, 3 * (64 * 128 + 64 * 64) + 2 * 2 * 64 * 4)
}

/// Rows of dy begin at multiples of 16 bytes; rows of codes do by their groups.
fn rows_fit(d: &Dims, caps: &Caps) -> bool {
    columns_fit(d, caps) && d["LDY"].is_multiple_of(8) && d["Y0"].is_multiple_of(8)
}

/// Rows of 16-bit weights begin at multiples of 16 bytes too.
fn rows_of_8_fit(d: &Dims, caps: &Caps) -> bool {
    rows_fit(d, caps) && d["K"].is_multiple_of(8)
}

/// Rows of 4-bit codes begin at multiples of 16 bytes too: all but groups of 16 in odd number see to that.
fn rows_of_q4_fit(d: &Dims, caps: &Caps) -> bool {
    rows_fit(d, caps) && d["K"].is_multiple_of(32)
}
