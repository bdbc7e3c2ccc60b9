//! `qmatmul_t` in WGSL, three rungs a format:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one element of dx an invocation | reading |
//! | `tiled` | tiles of 64 x 64 elements, dy and decoded W in workgroup memory | graphics cards |
//! | `broadcast` | 16 rows of dy, spread over a subgroup's registers and broadcast | adapters that run on the CPU |
//!
//! A kernel's file holds its bindings and its entry. The algorithm follows, once for all formats, then the decoding of W:
//! `weights_<format>`, the same files as `qmatmul`'s, or `weights_<format>_rows`, eight rows at a time.

use crate::op::*;

/// A format's rungs: its word, that of the files that decode its weights, and the scales' file where there is one.
macro_rules! kernels {
    ($name:ident, $word:literal, $weights:literal $(, $scales:literal)?) => {
        pub const $name: &[Kernel] = &[
            shaders(
                concat!("qmatmul_t_", $word, "_naive"),
                &[shader!("qmatmul_t_" $word "_naive"), NAIVE, shader!("weights_" $weights), $(shader!($scales),)?],
                one_element_an_invocation,
                always,
            ),
            shaders(
                concat!("qmatmul_t_", $word, "_tiled"),
                &[shader!("qmatmul_t_" $word "_tiled"), TILED, shader!("weights_" $weights), $(shader!($scales),)?],
                tiles_64x64,
                always,
            ),
            shaders(
                concat!("qmatmul_t_", $word, "_broadcast"),
                &[
                    shader!("qmatmul_t_" $word "_broadcast"), BROADCAST, shader!("weights_" $weights "_rows"),
                    $(shader!($scales),)?
                ],
                tiles_32x16,
                on_a_processor,
            ),
        ];
    };
}
kernels!(KERNELS_F32, "f32", "f32");
kernels!(KERNELS_F16, "f16", "f16");
kernels!(KERNELS_BF16, "bf16", "bf16");
kernels!(KERNELS_Q4, "q4", "q4", "weights_q4_scales");
kernels!(KERNELS_Q8, "q8", "q8", "weights_q8_scales");
kernels!(KERNELS_NF4, "nf4", "nf4", "weights_nf4_scales");
kernels!(KERNELS_NF4DQ, "nf4dq", "nf4", "weights_nf4dq_scales");

const NAIVE: File = shader!("qmatmul_t_naive");
const TILED: File = shader!("qmatmul_t_tiled");
const BROADCAST: File = shader!("qmatmul_t_broadcast");

fn one_element_an_invocation(d: &Dims) -> Launch {
    Launch { grid: [d["K"].div_ceil(64) as u32, d["M"] as u32, 1], block: [64, 1, 1], shared_bytes: 0 }
}

fn tiles_64x64(d: &Dims) -> Launch {
    let grid = [d["K"].div_ceil(64) as u32, d["M"].div_ceil(64) as u32, 1];
    Launch { grid, block: [64, 1, 1], shared_bytes: 8192 }
}

fn tiles_32x16(d: &Dims) -> Launch {
    Launch { grid: [d["K"].div_ceil(32) as u32, d["M"].div_ceil(16) as u32, 1], block: [8, 1, 1], shared_bytes: 0 }
}

/// Rows of dy, W and dx begin at 16 bytes, and no chunk of 32 rows or columns of W ends beyond one.
fn on_a_processor(d: &Dims, caps: &Caps) -> bool {
    let whole = d["N"].is_multiple_of(32) && d["K"].is_multiple_of(32);
    caps.software && caps.subgroup.0 >= 8 && whole && d["LDY"].is_multiple_of(4) && d["Y0"].is_multiple_of(4)
}
