//! `embedding` in PTX: a warp for each token, the row decoded as it is read.

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[ptx!("embedding_f32_warp", four_tokens_a_block, always)];
pub const KERNELS_F16: &[Kernel] = &[ptx!("embedding_f16_warp", four_tokens_a_block, always)];
pub const KERNELS_BF16: &[Kernel] = &[ptx!("embedding_bf16_warp", four_tokens_a_block, always)];
pub const KERNELS_Q4: &[Kernel] = &[ptx!("embedding_q4_warp", four_tokens_a_block, always)];
pub const KERNELS_Q8: &[Kernel] = &[ptx!("embedding_q8_warp", four_tokens_a_block, always)];
pub const KERNELS_NF4: &[Kernel] = &[ptx!("embedding_nf4_warp", four_tokens_a_block, always)];
pub const KERNELS_NF4DQ: &[Kernel] = &[ptx!("embedding_nf4dq_warp", four_tokens_a_block, always)];

/// A block of 128 threads holds four warps, each warp one token.
fn four_tokens_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"].div_ceil(4) as u32, 1, 1], block: [128, 1, 1], shared_bytes: 0 }
}
