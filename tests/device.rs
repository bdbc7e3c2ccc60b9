//! The devices that run PTX: what they refuse, what they find, and that the driver's side of a launch is right.

#[cfg(target_os = "linux")] // where a driver can be put in the place of the one that is there
#[path = "device/cuda.rs"]
mod cuda;
#[path = "device/ptx_sim.rs"]
mod ptx_sim;

use handmill::op::*;
use handmill::tensor::Dtype;

/// y = 2x on 32 threads a block; its kernels are right, or wrong in one way each.
static DOUBLE: OpSpec = OpSpec {
    name: "double",
    format: "f32",
    formula: "y[N] = 2 · x[N]",
    dims: &["N"],
    scalars: &[],
    args: &[input("x", ArgType::Act, &["N"], Fill::Normal), output("y", ArgType::Act, &["N"])],
    oracle: |_, args| vec![Expected::relative(args[0].to_f64().iter().map(|x| 2.0 * x).collect())],
    cost: |d| Cost { flops: d["N"] as u64, bytes: 8 * d["N"] as u64 },
    tolerance: Tolerance { roundings: |_| 1.0, nmse: 1e-12, why: "one product" },
    cases: &[],
    kernels: &[&[
        kernel("double_f32_right", include_str!("device/double_f32_right.ptx"), blocks_of_32),
        kernel("double_f32_past", include_str!("device/double_f32_past.ptx"), blocks_of_32),
        kernel("double_f32_many", include_str!("device/double_f32_many.ptx"), blocks_of_32),
        kernel("double_f32_syntax", include_str!("device/double_f32_syntax.ptx"), blocks_of_32),
        kernel("double_f32_right", include_str!("device/double_f32_right.ptx"), |_| launch([70_000, 70_000, 1], 32, 0)),
        kernel("double_f32_right", include_str!("device/double_f32_right.ptx"), |_| launch([1; 3], 2048, 0)),
        kernel("double_f32_right", include_str!("device/double_f32_right.ptx"), |_| launch([1; 3], 32, 1 << 20)),
    ]],
};
const RIGHT: usize = 0;
const PAST: usize = 1;
const MANY: usize = 2;
const SYNTAX: usize = 3;
const GRID: usize = 4;
const BLOCK: usize = 5;
const SHARED: usize = 6;

const fn kernel(stem: &'static str, text: &'static str, launch: fn(&Dims) -> Launch) -> Kernel {
    let source = Source::Ptx(File { path: "tests/device.ptx", text });
    Kernel { stem, source, act: Dtype::F32, launch, supports: always }
}

fn blocks_of_32(d: &Dims) -> Launch {
    launch([d["N"].div_ceil(32) as u32, 1, 1], 32, 0)
}

fn launch(grid: [u32; 3], threads: u32, shared_bytes: u32) -> Launch {
    Launch { grid, block: [threads, 1, 1], shared_bytes }
}
