//! `qmatmul_t`: `dx[M,K] = dy[M,N] · deq(W[N,K]) + dS[M,R] · A[R,K] (+ dx[M,K])`, the gradient that flows back through
//! frozen packed weights and their adapter
//!
//! One spec for each weight format, with the arguments that hold W as in `qmatmul`. The sum runs over the rows of W,
//! while its scales lie along K: a kernel decodes a panel of W and multiplies, and W never exists whole.
//!
//! dy is columns Y0..Y0+N of a matrix `[M,LDY]`. With `ACC` = 1 the result is added to dx, which is how several terms
//! meet in one dx, one launch after another and so in an order: q, k and v of one input, gate and up, the shards of one
//! W. With `ACC` = 0 dx is written and its old value never read. `R` may be 0: `ds` and `lora_a` are then empty.
//!
//! dS = s·dy·B is `lora_backward`'s. With dropout on the adapter's input its term passes the mask first: give this op
//! R = 0, make dS·A by a second launch in f32 with A in the place of W, and add it by `dropout`.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod cpu;
mod ptx;
mod wgsl;

use super::weights::*;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};

const PLAIN_DIMS: &[&str] = &["M", "N", "K", "LDY", "Y0", "R", "ACC"];
const Q4_DIMS: &[&str] = &["M", "N", "K", "LDY", "Y0", "R", "ACC", "G", "WIDE"];
const Q8_DIMS: &[&str] = &["M", "N", "K", "LDY", "Y0", "R", "ACC", "G", "WIDE", "AFFINE"];

const DY: Arg = input("dy", ArgType::Act, &["M", "LDY"], Fill::Columns);
const DS: Arg = input("ds", ArgType::Is(Dtype::F32), &["M", "R"], Fill::Normal);
const LORA_A: Arg = input("lora_a", ArgType::Is(Dtype::F32), &["R", "K"], Fill::Normal);
const DX: Arg = inout("dx", ArgType::Is(Dtype::F32), &["M", "K"], Fill::Sum);

const TOLERANCE: Tolerance = Tolerance {
    roundings: |d| ((d["N"] + d["R"]) as f64).sqrt() + 6.0,
    nmse: 1e-11,
    why: "N + R products are summed and their roundings, independent of each other, grow with sqrt(N + R); decoding a \
          weight takes two more, a group's scale two, the low-rank term and what dx held before one each. An affine \
          weight counts with |scale·code| + |min|, since a kernel may sum the two parts apart",
};

// Dims of the cases: M, N, K, LDY, Y0, R, ACC, then the format's.
const PLAIN_CASES: &[Case] = &[
    case(&[1, 1, 1, 1, 0, 0, 0], "the smallest"),
    case(&[7, 33, 65, 40, 7, 1, 1], "tails everywhere, part of a wider dy, rank 1, added to dx"),
    case(&[65, 7, 257, 7, 0, 8, 0], "one past a power of two, rank 8"),
    case(&[257, 65, 33, 65, 0, 0, 1], "many tokens, few columns, added to dx"),
    case(&[33, 257, 384, 257, 0, 33, 0], "odd rank"),
    case(&[530, 34, 40, 34, 0, 2, 0], "more rows than are taken at once"),
    case(&[17, 64, 96, 72, 4, 20, 1], "whole chunks of 32, one row past 16, part of a wider dy, rank 20, added to dx"),
    case(&[130, 136, 200, 152, 8, 0, 1], "past tiles of 64 and 128, part of a wider dy, added to dx"),
    case(&[66, 67, 328, 72, 0, 20, 0], "rows of W past a tile, an odd number; rank 20"),
    case(&[5, 384, 1536, 384, 0, 0, 0], "MiniLM's second feed-forward matrix"),
];
const Q4_CASES: &[Case] = &[
    case(&[1, 1, 32, 1, 0, 0, 0, 32, 0], "the smallest"),
    case(&[7, 33, 96, 40, 7, 1, 1, 32, 0], "tails, part of a wider dy, rank 1, added to dx"),
    case(&[3, 65, 48, 65, 0, 0, 0, 16, 1], "groups of 16, f32 scales, half a vector of bytes left over"),
    case(&[65, 7, 256, 7, 0, 8, 0, 64, 1], "groups of 64, f32 scales, rank 8"),
    case(&[2, 257, 384, 257, 0, 33, 1, 128, 0], "groups of 128, odd rank, added to dx"),
    case(
        &[130, 136, 192, 152, 8, 0, 1, 16, 0],
        "past tiles of 64 and 128, groups of 16, part of a wider dy, added to dx",
    ),
    case(&[66, 67, 288, 72, 0, 20, 0, 32, 1], "rows of W past a tile, an odd number; f32 scales, rank 20"),
    case(&[17, 129, 256, 136, 0, 0, 0, 128, 1], "groups of 128, f32 scales"),
    case(&[17, 64, 96, 72, 4, 20, 1, 16, 0], "whole chunks of 32 with two groups each, part of a wider dy, rank 20"),
    case(&[33, 192, 576, 192, 0, 8, 0, 32, 0], "SmolLM2-135M's keys"),
    case(&[16, 576, 1536, 576, 0, 8, 1, 32, 0], "SmolLM2-135M's down projection"),
];
const Q8_CASES: &[Case] = &[
    case(&[1, 1, 32, 1, 0, 0, 0, 32, 0, 0], "the smallest"),
    case(&[7, 33, 96, 40, 7, 1, 1, 32, 0, 0], "tails, part of a wider dy, rank 1, added to dx"),
    case(&[3, 65, 48, 65, 0, 0, 0, 16, 1, 0], "groups of 16, f32 scales, as Q6_K becomes"),
    case(&[65, 7, 256, 7, 0, 8, 0, 32, 1, 1], "f32 scales and mins, as Q5_K becomes"),
    case(&[2, 257, 384, 257, 0, 33, 1, 128, 0, 1], "groups of 128 with f16 mins, odd rank, added to dx"),
    case(&[130, 136, 192, 152, 8, 0, 1, 16, 0, 1], "past tiles of 64 and 128, groups of 16 with f16 mins, added to dx"),
    case(&[66, 67, 304, 72, 0, 20, 0, 16, 1, 1], "rows of W past a tile, an odd number; 19 groups, f32 mins, rank 20"),
    case(&[17, 129, 256, 136, 0, 0, 0, 128, 1, 0], "groups of 128, f32 scales"),
    case(
        &[17, 64, 96, 72, 4, 20, 1, 16, 0, 1],
        "whole chunks of 32 with two groups and mins each, rank 20, added to dx",
    ),
    case(&[17, 64, 96, 64, 0, 0, 0, 32, 1, 1], "whole chunks of 32, f32 mins"),
    case(&[33, 192, 576, 192, 0, 8, 0, 32, 0, 0], "SmolLM2-135M's keys"),
    case(&[16, 768, 576, 768, 0, 0, 1, 32, 0, 0], "a slice of SmolLM2-135M's head, added to dx"),
];
const NF4_CASES: &[Case] = &[
    case(&[1, 1, 64, 1, 0, 0, 0], "the smallest"),
    case(&[7, 33, 192, 40, 7, 1, 1], "tails, part of a wider dy, rank 1, added to dx"),
    case(&[65, 7, 320, 7, 0, 8, 0], "rank 8"),
    case(&[2, 257, 576, 257, 0, 33, 1], "nine blocks; a nested block ends inside a row; odd rank, added to dx"),
    case(&[130, 136, 192, 152, 8, 0, 1], "past tiles of 64 and 128, part of a wider dy, added to dx"),
    case(&[66, 67, 320, 72, 0, 20, 0], "rows of W past a tile, an odd number; rank 20"),
    case(&[17, 64, 64, 72, 4, 20, 1], "whole chunks of 32, one row past 16, part of a wider dy, rank 20, added to dx"),
    case(&[33, 192, 576, 192, 0, 8, 0], "SmolLM2-135M's keys"),
];

/// The spec of one format: the word stands here once.
macro_rules! qmatmul_t {
    ($spec:ident, $word:literal, $dims:expr, [$($part:expr),*], $cases:expr, $kernels:ident) => {
        #[doc = concat!("`qmatmul_t` with weights in ", $word, ".")]
        pub static $spec: OpSpec = OpSpec {
            name: "qmatmul_t",
            format: $word,
            formula: "dx[M,K] = dy[M,N] · deq(W[N,K]) + dS[M,R] · A[R,K] (+ dx[M,K] where ACC is 1)",
            dims: $dims,
            scalars: &[],
            args: &[DY, $($part,)* DS, LORA_A, DX],
            oracle: |d, args| oracle($word, d, args),
            cost: |d| cost($word, d),
            tolerance: TOLERANCE,
            cases: $cases,
            kernels: &[cpu::$kernels, ptx::$kernels, wgsl::$kernels],
        };
    };
}

qmatmul_t!(QMATMUL_T_F32, "f32", PLAIN_DIMS, [W_F32], PLAIN_CASES, KERNELS_F32);
qmatmul_t!(QMATMUL_T_F16, "f16", PLAIN_DIMS, [W_F16], PLAIN_CASES, KERNELS_F16);
qmatmul_t!(QMATMUL_T_BF16, "bf16", PLAIN_DIMS, [W_BF16], PLAIN_CASES, KERNELS_BF16);
qmatmul_t!(QMATMUL_T_Q4, "q4", Q4_DIMS, [CODES_4BIT, SCALES, MINS], Q4_CASES, KERNELS_Q4);
qmatmul_t!(QMATMUL_T_Q8, "q8", Q8_DIMS, [CODES_I8, SCALES, MINS_IF_AFFINE], Q8_CASES, KERNELS_Q8);
qmatmul_t!(QMATMUL_T_NF4, "nf4", PLAIN_DIMS, [CODES_4BIT, ABSMAX], NF4_CASES, KERNELS_NF4);
qmatmul_t!(
    QMATMUL_T_NF4DQ,
    "nf4dq",
    PLAIN_DIMS,
    [CODES_4BIT, ABSMAX_U8, ABSMAX_CODE, ABSMAX2, ABSMAX_OFFSET],
    NF4_CASES,
    KERNELS_NF4DQ
);

/// The pseudo-code made runnable.
fn oracle(word: &str, d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (m, n, k, r, ldy, y0) = (d["M"], d["N"], d["K"], d["R"], d["LDY"], d["Y0"]);
    let parts = part_count(word);
    let dy = args[0].to_f64();
    let (w, w_magnitude) = exact(word, d, &args[1..1 + parts]);
    let [ds, a, before] = [1, 2, 3].map(|i| args[parts + i].to_f64());

    let mut value = if d["ACC"] == 1 { before } else { vec![0.0; m * k] };
    let mut magnitude: Vec<f64> = value.iter().map(|v| v.abs()).collect();
    for i in 0..m {
        let (value, magnitude) = (&mut value[i * k..(i + 1) * k], &mut magnitude[i * k..(i + 1) * k]);
        for j in 0..n {
            let dy = dy[i * ldy + y0 + j];
            for l in 0..k {
                value[l] += dy * w[j * k + l];
                magnitude[l] += dy.abs() * w_magnitude[j * k + l];
            }
        }
        for j in 0..r {
            for l in 0..k {
                let term = ds[i * r + j] * a[j * k + l];
                value[l] += term;
                magnitude[l] += term.abs();
            }
        }
    }
    vec![Expected { value, magnitude }]
}

fn cost(word: &str, d: &Dims) -> Cost {
    let (m, n, k, r) = (d["M"], d["N"], d["K"], d["R"]);
    let floats = m * n + (1 + d["ACC"]) * m * k + (m + k) * r;
    Cost { flops: (2 * m * k * (n + r)) as u64, bytes: (4 * floats + weight_bytes(word, d)) as u64 }
}
