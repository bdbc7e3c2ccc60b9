//! `qmatmul_t` in PTX:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one value of dx a thread | reading |

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[ptx!("qmatmul_t_f32_naive", row_by_columns, columns_fit)];
pub const KERNELS_F16: &[Kernel] = &[ptx!("qmatmul_t_f16_naive", row_by_columns, columns_fit)];
pub const KERNELS_BF16: &[Kernel] = &[ptx!("qmatmul_t_bf16_naive", row_by_columns, columns_fit)];
pub const KERNELS_Q4: &[Kernel] = &[ptx!("qmatmul_t_q4_naive", row_by_columns, columns_fit)];
pub const KERNELS_Q8: &[Kernel] = &[ptx!("qmatmul_t_q8_naive", row_by_columns, columns_fit)];
pub const KERNELS_NF4: &[Kernel] = &[ptx!("qmatmul_t_nf4_naive", row_by_columns, columns_fit)];
pub const KERNELS_NF4DQ: &[Kernel] = &[ptx!("qmatmul_t_nf4dq_naive", row_by_columns, columns_fit)];

/// `naive`: a block is 128 columns of one row.
fn row_by_columns(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["K"].div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// A grid has 65,535 blocks along its second axis.
fn columns_fit(d: &Dims, _: &Caps) -> bool {
    d["K"].div_ceil(128) <= 65_535
}
