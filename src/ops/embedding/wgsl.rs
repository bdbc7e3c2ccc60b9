//! `embedding` in WGSL. Kernels of a format end with its decoding, `shaders/weights_<format>.wgsl`.

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[wgsl!("embedding_f32_rows" + "weights_f32", one_element_an_invocation, always)];
pub const KERNELS_F16: &[Kernel] = &[wgsl!("embedding_f16_rows" + "weights_f16", one_element_an_invocation, always)];
pub const KERNELS_BF16: &[Kernel] = &[wgsl!("embedding_bf16_rows" + "weights_bf16", one_element_an_invocation, always)];
pub const KERNELS_Q4: &[Kernel] =
    &[wgsl!("embedding_q4_rows" + "weights_q4" + "weights_q4_scales", one_element_an_invocation, always)];
pub const KERNELS_Q8: &[Kernel] =
    &[wgsl!("embedding_q8_rows" + "weights_q8" + "weights_q8_scales", one_element_an_invocation, always)];
pub const KERNELS_NF4: &[Kernel] =
    &[wgsl!("embedding_nf4_rows" + "weights_nf4" + "weights_nf4_scales", one_element_an_invocation, always)];
pub const KERNELS_NF4DQ: &[Kernel] =
    &[wgsl!("embedding_nf4dq_rows" + "weights_nf4" + "weights_nf4dq_scales", one_element_an_invocation, always)];

fn one_element_an_invocation(d: &Dims) -> Launch {
    Launch { grid: [d["K"].div_ceil(64) as u32, d["M"] as u32, 1], block: [64, 1, 1], shared_bytes: 0 }
}
