//! `qmatmul` in WGSL. Kernels of a format end with its decoding, `shaders/weights_<format>.wgsl`.

use crate::op::*;

pub const KERNELS_F32: &[Kernel] =
    &[wgsl!("qmatmul_f32_naive" + "weights_f32" + "qmatmul_tail", one_output_an_invocation, always)];
pub const KERNELS_F16: &[Kernel] =
    &[wgsl!("qmatmul_f16_naive" + "weights_f16" + "qmatmul_tail", one_output_an_invocation, always)];
pub const KERNELS_BF16: &[Kernel] =
    &[wgsl!("qmatmul_bf16_naive" + "weights_bf16" + "qmatmul_tail", one_output_an_invocation, always)];
pub const KERNELS_Q4: &[Kernel] =
    &[wgsl!("qmatmul_q4_naive" + "weights_q4" + "qmatmul_tail", one_output_an_invocation, always)];
pub const KERNELS_Q8: &[Kernel] =
    &[wgsl!("qmatmul_q8_naive" + "weights_q8" + "qmatmul_tail", one_output_an_invocation, always)];
pub const KERNELS_NF4: &[Kernel] =
    &[wgsl!("qmatmul_nf4_naive" + "weights_nf4" + "qmatmul_tail", one_output_an_invocation, always)];
pub const KERNELS_NF4DQ: &[Kernel] =
    &[wgsl!("qmatmul_nf4dq_naive" + "weights_nf4dq" + "qmatmul_tail", one_output_an_invocation, always)];

fn one_output_an_invocation(d: &Dims) -> Launch {
    Launch { grid: [d["N"].div_ceil(64) as u32, d["M"] as u32, 1], block: [64, 1, 1], shared_bytes: 0 }
}
