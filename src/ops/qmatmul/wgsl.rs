//! `qmatmul` in WGSL, six rungs a format:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one output an invocation | reading |
//! | `tiled` | tiles of 64 x 64 outputs, x and decoded W in workgroup memory | many tokens |
//! | `workgroup` | a row of W is decoded in registers as it streams by; sums meet in workgroup memory | M ≤ 8 |
//! | `subgroup` | the same; sums meet by subgroupAdd | M ≤ 8 |
//! | `broadcast` | 16 rows of x, spread over a subgroup's registers and broadcast | adapters that run on the CPU |
//! | `coopmat` | cooperative matrices, x in f16 | tensor cores; validated, not run yet |
//!
//! A kernel's file holds its bindings and its entry. The algorithm follows, once for all formats, then the decoding of
//! W: `weights_<format>` one weight or four columns at a time, `weights_<format>_x4` 32 columns of four rows.

use crate::op::*;
use crate::tensor::Dtype;

/// Most rows of x that the rungs for few rows take.
const FEW_ROWS: usize = 8;
/// Rows of x from which on `broadcast` is the faster one: on lavapipe, 1536×576 in q4, it takes 2.0 ms at 1 to 16 rows,
/// `subgroup` 0.8 at one and 1.3 at two.
const BROADCAST_ROWS: usize = 3;

pub const KERNELS_F32: &[Kernel] = &[
    wgsl!("qmatmul_f32_naive" + "weights_f32" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!("qmatmul_f32_tiled" + "qmatmul_tiled" + "weights_f32" + "qmatmul_tail", tiles_64x64, always),
    wgsl!(
        "qmatmul_f32_workgroup" + "qmatmul_gemv" + "weights_f32_x4" + "weights_x4" + "qmatmul_tail",
        sixteen_rows_with_tree,
        few_rows
    ),
    wgsl!(
        "qmatmul_f32_subgroup" + "qmatmul_gemv" + "weights_f32_x4" + "weights_x4" + "qmatmul_tail",
        sixteen_rows,
        few_rows_subgroups
    ),
    wgsl!(
        "qmatmul_f32_broadcast" + "qmatmul_broadcast" + "weights_f32_x4" + "weights_x4" + "qmatmul_tail",
        tiles_64x16,
        on_a_processor
    ),
    x_in_f16(wgsl!(
        "qmatmul_f32_coopmat" + "qmatmul_coopmat" + "weights_f32" + "qmatmul_tail",
        tiles_of_subgroups,
        subgroups_of_32
    )),
];
pub const KERNELS_F16: &[Kernel] = &[
    wgsl!("qmatmul_f16_naive" + "weights_f16" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!("qmatmul_f16_tiled" + "qmatmul_tiled" + "weights_f16" + "qmatmul_tail", tiles_64x64, always),
    wgsl!(
        "qmatmul_f16_workgroup" + "qmatmul_gemv" + "weights_f16_x4" + "weights_x4" + "qmatmul_tail",
        sixteen_rows_with_tree,
        few_rows
    ),
    wgsl!(
        "qmatmul_f16_subgroup" + "qmatmul_gemv" + "weights_f16_x4" + "weights_x4" + "qmatmul_tail",
        sixteen_rows,
        few_rows_subgroups
    ),
    wgsl!(
        "qmatmul_f16_broadcast" + "qmatmul_broadcast" + "weights_f16_x4" + "weights_x4" + "qmatmul_tail",
        tiles_64x16,
        on_a_processor
    ),
    x_in_f16(wgsl!(
        "qmatmul_f16_coopmat" + "qmatmul_coopmat" + "weights_f16" + "qmatmul_tail",
        tiles_of_subgroups,
        subgroups_of_32
    )),
];
pub const KERNELS_BF16: &[Kernel] = &[
    wgsl!("qmatmul_bf16_naive" + "weights_bf16" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!("qmatmul_bf16_tiled" + "qmatmul_tiled" + "weights_bf16" + "qmatmul_tail", tiles_64x64, always),
    wgsl!(
        "qmatmul_bf16_workgroup" + "qmatmul_gemv" + "weights_bf16_x4" + "weights_x4" + "qmatmul_tail",
        sixteen_rows_with_tree,
        few_rows
    ),
    wgsl!(
        "qmatmul_bf16_subgroup" + "qmatmul_gemv" + "weights_bf16_x4" + "weights_x4" + "qmatmul_tail",
        sixteen_rows,
        few_rows_subgroups
    ),
    wgsl!(
        "qmatmul_bf16_broadcast" + "qmatmul_broadcast" + "weights_bf16_x4" + "weights_x4" + "qmatmul_tail",
        tiles_64x16,
        on_a_processor
    ),
    x_in_f16(wgsl!(
        "qmatmul_bf16_coopmat" + "qmatmul_coopmat" + "weights_bf16" + "qmatmul_tail",
        tiles_of_subgroups,
        subgroups_of_32
    )),
];
pub const KERNELS_Q4: &[Kernel] = &[
    wgsl!("qmatmul_q4_naive" + "weights_q4" + "weights_q4_scales" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_q4_tiled" + "qmatmul_tiled" + "weights_q4" + "weights_q4_scales" + "qmatmul_tail",
        tiles_64x64,
        always
    ),
    wgsl!(
        "qmatmul_q4_workgroup" + "qmatmul_gemv" + "weights_q4_x4" + "weights_x4" + "weights_q4_scales" + "qmatmul_tail",
        sixteen_rows_with_tree,
        few_rows
    ),
    wgsl!(
        "qmatmul_q4_subgroup" + "qmatmul_gemv" + "weights_q4_x4" + "weights_x4" + "weights_q4_scales" + "qmatmul_tail",
        sixteen_rows,
        few_rows_subgroups
    ),
    wgsl!(
        "qmatmul_q4_broadcast"
            + "qmatmul_broadcast"
            + "weights_q4_x4"
            + "weights_x4"
            + "weights_q4_scales"
            + "qmatmul_tail",
        tiles_64x16,
        on_a_processor
    ),
    x_in_f16(wgsl!(
        "qmatmul_q4_coopmat" + "qmatmul_coopmat" + "weights_q4" + "weights_q4_scales" + "qmatmul_tail",
        tiles_of_subgroups,
        subgroups_of_32
    )),
];
pub const KERNELS_Q8: &[Kernel] = &[
    wgsl!("qmatmul_q8_naive" + "weights_q8" + "weights_q8_scales" + "qmatmul_tail", one_output_an_invocation, always),
    wgsl!(
        "qmatmul_q8_tiled" + "qmatmul_tiled" + "weights_q8" + "weights_q8_scales" + "qmatmul_tail",
        tiles_64x64,
        always
    ),
    wgsl!(
        "qmatmul_q8_workgroup" + "qmatmul_gemv" + "weights_q8_x4" + "weights_x4" + "weights_q8_scales" + "qmatmul_tail",
        sixteen_rows_with_tree,
        few_rows
    ),
    wgsl!(
        "qmatmul_q8_subgroup" + "qmatmul_gemv" + "weights_q8_x4" + "weights_x4" + "weights_q8_scales" + "qmatmul_tail",
        sixteen_rows,
        few_rows_subgroups
    ),
    wgsl!(
        "qmatmul_q8_broadcast"
            + "qmatmul_broadcast"
            + "weights_q8_x4"
            + "weights_x4"
            + "weights_q8_scales"
            + "qmatmul_tail",
        tiles_64x16,
        on_a_processor
    ),
    x_in_f16(wgsl!(
        "qmatmul_q8_coopmat" + "qmatmul_coopmat" + "weights_q8" + "weights_q8_scales" + "qmatmul_tail",
        tiles_of_subgroups,
        subgroups_of_32
    )),
];
pub const KERNELS_NF4: &[Kernel] = &[
    wgsl!(
        "qmatmul_nf4_naive" + "weights_nf4" + "weights_nf4_scales" + "qmatmul_tail",
        one_output_an_invocation,
        always
    ),
    wgsl!(
        "qmatmul_nf4_tiled" + "qmatmul_tiled" + "weights_nf4" + "weights_nf4_scales" + "qmatmul_tail",
        tiles_64x64,
        always
    ),
    wgsl!(
        "qmatmul_nf4_workgroup"
            + "qmatmul_gemv"
            + "weights_nf4_x4"
            + "weights_x4"
            + "weights_nf4_scales"
            + "qmatmul_tail",
        sixteen_rows_with_tree,
        few_rows
    ),
    wgsl!(
        "qmatmul_nf4_subgroup"
            + "qmatmul_gemv"
            + "weights_nf4_x4"
            + "weights_x4"
            + "weights_nf4_scales"
            + "qmatmul_tail",
        sixteen_rows,
        few_rows_subgroups
    ),
    wgsl!(
        "qmatmul_nf4_broadcast"
            + "qmatmul_broadcast"
            + "weights_nf4_x4"
            + "weights_x4"
            + "weights_nf4_scales"
            + "qmatmul_tail",
        tiles_64x16,
        on_a_processor
    ),
    x_in_f16(wgsl!(
        "qmatmul_nf4_coopmat" + "qmatmul_coopmat" + "weights_nf4" + "weights_nf4_scales" + "qmatmul_tail",
        tiles_of_subgroups,
        subgroups_of_32
    )),
];
pub const KERNELS_NF4DQ: &[Kernel] = &[
    wgsl!(
        "qmatmul_nf4dq_naive" + "weights_nf4dq" + "weights_nf4dq_scales" + "qmatmul_tail",
        one_output_an_invocation,
        always
    ),
    wgsl!(
        "qmatmul_nf4dq_tiled" + "qmatmul_tiled" + "weights_nf4dq" + "weights_nf4dq_scales" + "qmatmul_tail",
        tiles_64x64,
        always
    ),
    wgsl!(
        "qmatmul_nf4dq_workgroup"
            + "qmatmul_gemv"
            + "weights_nf4dq_x4"
            + "weights_x4"
            + "weights_nf4dq_scales"
            + "qmatmul_tail",
        sixteen_rows_with_tree,
        few_rows
    ),
    wgsl!(
        "qmatmul_nf4dq_subgroup"
            + "qmatmul_gemv"
            + "weights_nf4dq_x4"
            + "weights_x4"
            + "weights_nf4dq_scales"
            + "qmatmul_tail",
        sixteen_rows,
        few_rows_subgroups
    ),
    wgsl!(
        "qmatmul_nf4dq_broadcast"
            + "qmatmul_broadcast"
            + "weights_nf4dq_x4"
            + "weights_x4"
            + "weights_nf4dq_scales"
            + "qmatmul_tail",
        tiles_64x16,
        on_a_processor
    ),
    x_in_f16(wgsl!(
        "qmatmul_nf4dq_coopmat" + "qmatmul_coopmat" + "weights_nf4dq" + "weights_nf4dq_scales" + "qmatmul_tail",
        tiles_of_subgroups,
        subgroups_of_32
    )),
];

/// A kernel whose activations, and what it rounds, are f16.
const fn x_in_f16(kernel: Kernel) -> Kernel {
    Kernel { act: Dtype::F16, ..kernel }
}

fn launch(groups: [usize; 2], block: u32, shared_bytes: u32) -> Launch {
    Launch { grid: [groups[0] as u32, groups[1] as u32, 1], block: [block, 1, 1], shared_bytes }
}

fn one_output_an_invocation(d: &Dims) -> Launch {
    launch([d["N"].div_ceil(64), d["M"]], 64, 0)
}

fn tiles_64x64(d: &Dims) -> Launch {
    launch([d["N"].div_ceil(64), d["M"].div_ceil(64)], 64, 8192)
}

fn tiles_of_subgroups(d: &Dims) -> Launch {
    Launch { block: [128, 1, 1], shared_bytes: 10240, ..tiles_64x64(d) }
}

fn tiles_64x16(d: &Dims) -> Launch {
    launch([d["N"].div_ceil(64), d["M"].div_ceil(16)], 16, 0)
}

fn sixteen_rows(d: &Dims) -> Launch {
    launch([d["N"].div_ceil(16), 1], 64, 0)
}

fn sixteen_rows_with_tree(d: &Dims) -> Launch {
    Launch { shared_bytes: 1024, ..sixteen_rows(d) }
}

/// Rows of x and W begin at 16 bytes, and no chunk of 32 columns ends beyond one.
fn whole_chunks(d: &Dims) -> bool {
    d["K"].is_multiple_of(32)
}

fn few_rows(d: &Dims, _: &Caps) -> bool {
    d["M"] <= FEW_ROWS && whole_chunks(d)
}

fn few_rows_subgroups(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps) && caps.subgroup.0 >= 4
}

fn on_a_processor(d: &Dims, caps: &Caps) -> bool {
    caps.software && caps.subgroup.0 >= 8 && d["M"] >= BROADCAST_ROWS && whole_chunks(d)
}

fn subgroups_of_32(_: &Dims, caps: &Caps) -> bool {
    caps.coopmat && caps.f16 && caps.subgroup == (32, 32)
}
