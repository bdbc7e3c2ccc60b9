//! `qmatmul` in WGSL, six rungs a format and one more in q8:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one output an invocation | reading |
//! | `dot4i8` | q8 only: x as three bytes an element, sums of byte products | M ≤ 8, where an adapter has the instruction |
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
/// Fewest rows of x that `tiled` takes: it computes 64 whatever there are.
const MANY_ROWS: usize = 5;
/// Rows of x from which on `broadcast` is the faster one: on lavapipe, 1536×576 in q4, it takes 2.0 ms at 1 to 16 rows,
/// `subgroup` 0.8 at one and 1.3 at two.
const BROADCAST_ROWS: usize = 3;

/// A format's rungs: its word, that of the files that decode its weights, and the scales' file where there is one. The
/// codes of nf4dq are nf4's.
macro_rules! kernels {
    ($name:ident, $word:literal, $weights:literal $(, $scales:literal)? $(; $own:expr)?) => {
        pub const $name: &[Kernel] = &[
            shaders(
                concat!("qmatmul_", $word, "_naive"),
                &[shader!("qmatmul_" $word "_naive"), NAIVE, shader!("weights_" $weights), $(shader!($scales),)? TAIL],
                one_output_an_invocation,
                always,
            ),
            shaders(
                concat!("qmatmul_", $word, "_tiled"),
                &[shader!("qmatmul_" $word "_tiled"), TILED, shader!("weights_" $weights), $(shader!($scales),)? TAIL],
                tiles_64x64,
                many_rows,
            ),
            $($own,)?
            shaders(
                concat!("qmatmul_", $word, "_workgroup"),
                &[
                    shader!("qmatmul_" $word "_workgroup"), WORKGROUP, GEMV,
                    shader!("weights_" $weights "_x4"), X4, $(shader!($scales),)? TAIL,
                ],
                sixteen_rows_with_tree,
                few_rows,
            ),
            shaders(
                concat!("qmatmul_", $word, "_subgroup"),
                &[
                    shader!("qmatmul_" $word "_subgroup"), SUBGROUP, GEMV,
                    shader!("weights_" $weights "_x4"), X4, $(shader!($scales),)? TAIL,
                ],
                sixteen_rows,
                few_rows_subgroups,
            ),
            shaders(
                concat!("qmatmul_", $word, "_broadcast"),
                &[
                    shader!("qmatmul_" $word "_broadcast"), BROADCAST,
                    shader!("weights_" $weights "_x4"), X4, $(shader!($scales),)? TAIL,
                ],
                tiles_64x16,
                on_a_processor,
            ),
            x_in_f16(shaders(
                concat!("qmatmul_", $word, "_coopmat"),
                &[
                    shader!("qmatmul_" $word "_coopmat"), COOPMAT,
                    shader!("weights_" $weights), $(shader!($scales),)? TAIL,
                ],
                tiles_of_subgroups,
                subgroups_of_32,
            )),
        ];
    };
}
kernels!(KERNELS_F32, "f32", "f32");
kernels!(KERNELS_F16, "f16", "f16");
kernels!(KERNELS_BF16, "bf16", "bf16");
kernels!(KERNELS_Q4, "q4", "q4", "weights_q4_scales");
kernels!(
    KERNELS_Q8, "q8", "q8", "weights_q8_scales";
    shaders(
        "qmatmul_q8_dot4i8",
        &[shader!("qmatmul_q8_dot4i8"), shader!("weights_q8_scales"), TAIL],
        sixteen_rows_with_bytes,
        few_rows,
    )
);
kernels!(KERNELS_NF4, "nf4", "nf4", "weights_nf4_scales");
kernels!(KERNELS_NF4DQ, "nf4dq", "nf4", "weights_nf4dq_scales");

const NAIVE: File = shader!("qmatmul_naive");
const WORKGROUP: File = shader!("qmatmul_workgroup");
const SUBGROUP: File = shader!("qmatmul_subgroup");
const TILED: File = shader!("qmatmul_tiled");
const GEMV: File = shader!("qmatmul_gemv");
const BROADCAST: File = shader!("qmatmul_broadcast");
const COOPMAT: File = shader!("qmatmul_coopmat");
const X4: File = shader!("weights_x4");
const TAIL: File = shader!("qmatmul_tail");

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

fn sixteen_rows_with_bytes(d: &Dims) -> Launch {
    Launch { shared_bytes: 4608, ..sixteen_rows(d) }
}

fn sixteen_rows_with_tree(d: &Dims) -> Launch {
    Launch { shared_bytes: 1024, ..sixteen_rows(d) }
}

/// Rows of x and W begin at 16 bytes, and no chunk of 32 columns ends beyond one.
fn whole_chunks(d: &Dims) -> bool {
    d["K"].is_multiple_of(32)
}

fn many_rows(d: &Dims, _: &Caps) -> bool {
    d["M"] >= MANY_ROWS
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
