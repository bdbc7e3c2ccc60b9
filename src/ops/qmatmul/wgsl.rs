//! `qmatmul` in WGSL. Kernels of a format end with its decoding, `shaders/weights_<format>.wgsl`.
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one output an invocation | reading, and what the others do not take |
//! | `broadcast` | 16 rows, x spread over a subgroup's registers and broadcast | adapters that run on the CPU |

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[
    wgsl!("qmatmul_f32_naive" + "weights_f32" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_f32_broadcast" + "qmatmul_broadcast" + "weights_f32_x4" + "weights_x4" + "qmatmul_tail",
        tiles_64x16,
        broadcasts
    ),
];
pub const KERNELS_F16: &[Kernel] = &[
    wgsl!("qmatmul_f16_naive" + "weights_f16" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_f16_broadcast" + "qmatmul_broadcast" + "weights_f16_x4" + "weights_x4" + "qmatmul_tail",
        tiles_64x16,
        broadcasts
    ),
];
pub const KERNELS_BF16: &[Kernel] = &[
    wgsl!("qmatmul_bf16_naive" + "weights_bf16" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_bf16_broadcast" + "qmatmul_broadcast" + "weights_bf16_x4" + "weights_x4" + "qmatmul_tail",
        tiles_64x16,
        broadcasts
    ),
];
pub const KERNELS_Q4: &[Kernel] = &[
    wgsl!("qmatmul_q4_naive" + "weights_q4" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_q4_broadcast" + "qmatmul_broadcast" + "weights_q4_x4" + "weights_x4" + "weights_q4" + "qmatmul_tail",
        tiles_64x16,
        broadcasts
    ),
];
pub const KERNELS_Q8: &[Kernel] = &[
    wgsl!("qmatmul_q8_naive" + "weights_q8" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_q8_broadcast" + "qmatmul_broadcast" + "weights_q8_x4" + "weights_x4" + "weights_q8" + "qmatmul_tail",
        tiles_64x16,
        broadcasts
    ),
];
pub const KERNELS_NF4: &[Kernel] = &[
    wgsl!("qmatmul_nf4_naive" + "weights_nf4" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_nf4_broadcast"
            + "qmatmul_broadcast"
            + "weights_nf4_x4"
            + "weights_x4"
            + "weights_nf4"
            + "qmatmul_tail",
        tiles_64x16,
        broadcasts
    ),
];
pub const KERNELS_NF4DQ: &[Kernel] = &[
    wgsl!("qmatmul_nf4dq_naive" + "weights_nf4dq" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_nf4dq_broadcast"
            + "qmatmul_broadcast"
            + "weights_nf4dq_x4"
            + "weights_x4"
            + "weights_nf4dq"
            + "qmatmul_tail",
        tiles_64x16,
        broadcasts
    ),
];

fn one_output_an_invocation(d: &Dims) -> Launch {
    Launch { grid: [d["N"].div_ceil(64) as u32, d["M"] as u32, 1], block: [64, 1, 1], shared_bytes: 0 }
}

fn tiles_64x16(d: &Dims) -> Launch {
    Launch { grid: [d["N"].div_ceil(64) as u32, d["M"].div_ceil(16) as u32, 1], block: [16, 1, 1], shared_bytes: 0 }
}

/// Rows of W begin at 16 bytes, and 32 columns lie in one group.
fn whole_chunks(d: &Dims) -> bool {
    d["K"].is_multiple_of(32) && d.get("G").is_none_or(|group| group.is_multiple_of(32))
}

fn broadcasts(d: &Dims, caps: &Caps) -> bool {
    caps.software && caps.subgroup.0 >= 8 && whole_chunks(d)
}
