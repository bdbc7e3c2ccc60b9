//! `qmatmul_t` in WGSL, two rungs a format:
//!
//! | variant | idea |
//! | --- | --- |
//! | `naive` | one element of dx an invocation |
//! | `tiled` | tiles of 64 x 64 elements, dy and decoded W in workgroup memory |
//!
//! A kernel's file holds its bindings and its entry. The algorithm follows, once for all formats, then the decoding of W,
//! the same files as `qmatmul`'s.

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[
    wgsl!("qmatmul_t_f32_naive" + "qmatmul_t_naive" + "weights_f32", one_element_an_invocation, always),
    wgsl!("qmatmul_t_f32_tiled" + "qmatmul_t_tiled" + "weights_f32", tiles_64x64, always),
];
pub const KERNELS_F16: &[Kernel] = &[
    wgsl!("qmatmul_t_f16_naive" + "qmatmul_t_naive" + "weights_f16", one_element_an_invocation, always),
    wgsl!("qmatmul_t_f16_tiled" + "qmatmul_t_tiled" + "weights_f16", tiles_64x64, always),
];
pub const KERNELS_BF16: &[Kernel] = &[
    wgsl!("qmatmul_t_bf16_naive" + "qmatmul_t_naive" + "weights_bf16", one_element_an_invocation, always),
    wgsl!("qmatmul_t_bf16_tiled" + "qmatmul_t_tiled" + "weights_bf16", tiles_64x64, always),
];
pub const KERNELS_Q4: &[Kernel] = &[
    wgsl!(
        "qmatmul_t_q4_naive" + "qmatmul_t_naive" + "weights_q4" + "weights_q4_scales",
        one_element_an_invocation,
        always
    ),
    wgsl!("qmatmul_t_q4_tiled" + "qmatmul_t_tiled" + "weights_q4" + "weights_q4_scales", tiles_64x64, always),
];
pub const KERNELS_Q8: &[Kernel] = &[
    wgsl!(
        "qmatmul_t_q8_naive" + "qmatmul_t_naive" + "weights_q8" + "weights_q8_scales",
        one_element_an_invocation,
        always
    ),
    wgsl!("qmatmul_t_q8_tiled" + "qmatmul_t_tiled" + "weights_q8" + "weights_q8_scales", tiles_64x64, always),
];
pub const KERNELS_NF4: &[Kernel] = &[
    wgsl!(
        "qmatmul_t_nf4_naive" + "qmatmul_t_naive" + "weights_nf4" + "weights_nf4_scales",
        one_element_an_invocation,
        always
    ),
    wgsl!("qmatmul_t_nf4_tiled" + "qmatmul_t_tiled" + "weights_nf4" + "weights_nf4_scales", tiles_64x64, always),
];
pub const KERNELS_NF4DQ: &[Kernel] = &[
    wgsl!(
        "qmatmul_t_nf4dq_naive" + "qmatmul_t_naive" + "weights_nf4dq" + "weights_nf4dq_scales",
        one_element_an_invocation,
        always
    ),
    wgsl!("qmatmul_t_nf4dq_tiled" + "qmatmul_t_tiled" + "weights_nf4dq" + "weights_nf4dq_scales", tiles_64x64, always),
];

fn one_element_an_invocation(d: &Dims) -> Launch {
    Launch { grid: [d["K"].div_ceil(64) as u32, d["M"] as u32, 1], block: [64, 1, 1], shared_bytes: 0 }
}

fn tiles_64x64(d: &Dims) -> Launch {
    let grid = [d["K"].div_ceil(64) as u32, d["M"].div_ceil(64) as u32, 1];
    Launch { grid, block: [64, 1, 1], shared_bytes: 8192 }
}
