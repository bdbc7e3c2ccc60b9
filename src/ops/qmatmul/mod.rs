//! `qmatmul`: `y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s · S[M,R] · B[N,R]ᵀ`
//!
//! One spec for each weight format; they differ in the arguments that hold W. `BIAS` is 0 or 1 and `R` may be 0: those
//! arguments are then empty. y is columns Y0..Y0+N of a matrix `[M,LDY]`, so that W can be split by rows, or several W
//! share one y. S = x·Aᵀ is `lora_shrink`'s; with it the low-rank term costs no pass over y of its own.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx_codes;
mod args;
mod cpu;
mod ptx;
#[cfg(target_arch = "x86_64")]
mod vnni;
mod wgsl;

use super::weights::*;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};

const PLAIN_DIMS: &[&str] = &["M", "N", "K", "LDY", "Y0", "BIAS", "R"];
const Q4_DIMS: &[&str] = &["M", "N", "K", "LDY", "Y0", "BIAS", "R", "G", "WIDE"];
const Q8_DIMS: &[&str] = &["M", "N", "K", "LDY", "Y0", "BIAS", "R", "G", "WIDE", "AFFINE"];

const X: Arg = input("x", ArgType::Act, &["M", "K"], Fill::Normal);
const BIAS: Arg = input("bias", ArgType::Is(Dtype::F32), &["BIAS*N"], Fill::Normal);
const LORA_S: Arg = input("lora_s", ArgType::Is(Dtype::F32), &["M", "R"], Fill::Normal);
const LORA_B: Arg = input("lora_b", ArgType::Is(Dtype::F32), &["N", "R"], Fill::Normal);
// The sums are f32 whatever x is, and leave unrounded.
const Y: Arg = output("y", ArgType::Is(Dtype::F32), &["M", "LDY"]);

const TOLERANCE: Tolerance = Tolerance {
    roundings: |d| ((d["K"] + d["R"]) as f64).sqrt() + 6.0,
    nmse: 1e-11,
    why: "K + R products are summed and their roundings, independent of each other, grow with sqrt(K + R); decoding a \
          weight takes two more, a group's scale two, the bias and the low-rank term one each. An affine weight counts \
          with |scale·code| + |min|, since a kernel may sum the two parts apart",
};

/// The fields all formats share.
const fn spec(
    format: &'static str,
    dims: &'static [&'static str],
    args: &'static [Arg],
    oracle: fn(&Dims, &[HostTensor]) -> Vec<Expected>,
    cost: fn(&Dims) -> Cost,
    cases: &'static [Case],
    kernels: &'static [&'static [Kernel]],
) -> OpSpec {
    OpSpec {
        name: "qmatmul",
        format,
        formula: "y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s · S[M,R] · B[N,R]ᵀ",
        dims,
        scalars: &["s"],
        args,
        oracle,
        cost,
        tolerance: TOLERANCE,
        cases,
        kernels,
    }
}

// Dims of the cases: M, N, K, LDY, Y0, BIAS, R, then the format's.
const PLAIN_CASES: &[Case] = &[
    case_with(&[1, 1, 1, 1, 0, 0, 0], &[0.0], "the smallest"),
    case_with(&[7, 33, 65, 40, 7, 1, 1], &[0.5], "tails everywhere, part of a wider y, bias, rank 1"),
    case_with(&[65, 7, 257, 7, 0, 0, 8], &[2.0], "one past a power of two, rank 8"),
    case_with(&[1, 257, 576, 257, 0, 1, 0], &[0.0], "one token, odd rows"),
    case_with(&[257, 65, 33, 65, 0, 0, 0], &[0.0], "many tokens, few columns"),
    case_with(&[16, 70, 1096, 70, 0, 1, 3], &[0.5], "16 rows, columns past two steps of 512"),
    case_with(&[9, 18, 2056, 18, 0, 0, 1], &[0.5], "one row past eight, columns past eight steps of 256"),
    case_with(&[161, 34, 1601, 34, 0, 0, 2], &[0.5], "more rows and columns than a core's cache holds in bf16 parts"),
    case_with(
        &[130, 136, 200, 136, 0, 0, 0],
        &[0.0],
        "past tiles of 64 and 128, a quarter of a tile of columns left over",
    ),
    case_with(&[66, 130, 328, 131, 1, 1, 20], &[0.5], "rank 20, part of a wider y, bias"),
    case_with(&[130, 136, 192, 136, 0, 1, 0], &[0.0], "past tiles of 64 and 128, whole tiles of 64 columns, bias"),
    case_with(&[66, 130, 832, 133, 3, 0, 20], &[0.5], "13 tiles of 64 columns, rank 20, part of a wider y"),
    case_with(&[161, 34, 1600, 34, 0, 0, 2], &[0.5], "the same in whole tiles of columns"),
    case_with(&[12, 33, 608, 40, 7, 1, 1], &[0.5], "19 tiles of columns, part of a wider y, bias, rank 1"),
    case_with(&[30, 70, 1088, 70, 0, 1, 3], &[0.5], "two blocks of rows, 34 tiles of columns"),
    case_with(&[5, 384, 1536, 384, 0, 1, 0], &[0.0], "MiniLM's second feed-forward matrix"),
];
const Q4_CASES: &[Case] = &[
    case_with(&[1, 1, 32, 1, 0, 0, 0, 32, 0], &[0.0], "the smallest"),
    case_with(&[7, 33, 96, 40, 7, 1, 1, 32, 0], &[0.5], "tails, part of a wider y, bias, rank 1"),
    case_with(&[3, 65, 48, 65, 0, 0, 0, 16, 1], &[0.0], "groups of 16, f32 scales, half a vector of bytes left over"),
    case_with(&[5, 33, 96, 33, 0, 0, 0, 16, 0], &[0.0], "groups of 16, two to 32 columns"),
    case_with(&[65, 7, 256, 7, 0, 0, 8, 64, 1], &[2.0], "groups of 64, f32 scales, rank 8"),
    case_with(&[2, 257, 384, 257, 0, 1, 33, 128, 0], &[1.0], "groups of 128, odd rank"),
    case_with(&[1, 257, 288, 257, 0, 0, 0, 32, 1], &[0.0], "one token, nine groups, f32 scales"),
    case_with(&[130, 136, 192, 136, 0, 0, 0, 16, 0], &[0.0], "past tiles of 64 and 128, groups of 16, f16 scales"),
    case_with(&[130, 136, 192, 136, 0, 0, 0, 32, 0], &[0.0], "past tiles of 64 and 128, groups of 32"),
    case_with(&[66, 130, 320, 131, 1, 1, 20, 32, 1], &[0.5], "rank 20, part of a wider y, f32 scales"),
    case_with(&[66, 130, 96, 131, 1, 1, 20, 16, 1], &[0.5], "half a tile of columns left over, rank 20"),
    case_with(&[17, 129, 256, 129, 0, 0, 0, 128, 1], &[0.0], "groups of 128, f32 scales"),
    case_with(&[16, 70, 1088, 70, 0, 1, 3, 64, 0], &[0.5], "16 rows, columns past two steps of 512, groups of 64"),
    case_with(&[130, 34, 1600, 34, 0, 0, 2, 32, 0], &[0.5], "more rows than a core's cache holds in bf16 parts"),
    case_with(&[12, 18, 2336, 18, 0, 0, 0, 32, 0], &[0.0], "many short groups: 73 a row, so that rows begin anywhere"),
    case_with(&[8, 33, 1632, 34, 1, 0, 2, 32, 1], &[1.0], "51 f32 scales a row, columns past three steps of 512"),
    case_with(&[2, 19, 3200, 19, 0, 0, 0, 128, 0], &[0.0], "25 groups a row, columns past six steps of 512"),
    case_with(&[9, 2070, 96, 2070, 0, 1, 2, 32, 0], &[0.5], "more rows of W than 128 blocks of 16"),
    case_with(&[33, 192, 576, 192, 0, 0, 0, 32, 0], &[0.0], "SmolLM2-135M's keys"),
    case_with(&[1, 576, 1536, 576, 0, 0, 0, 32, 0], &[0.0], "SmolLM2-135M's down projection, one token"),
];
const Q8_CASES: &[Case] = &[
    case_with(&[1, 1, 32, 1, 0, 0, 0, 32, 0, 0], &[0.0], "the smallest"),
    case_with(&[7, 33, 96, 40, 7, 1, 1, 32, 0, 0], &[0.5], "tails, part of a wider y, bias, rank 1"),
    case_with(&[3, 65, 48, 65, 0, 0, 0, 16, 1, 0], &[0.0], "groups of 16, f32 scales, as Q6_K becomes"),
    case_with(&[5, 33, 96, 33, 0, 0, 0, 16, 1, 1], &[0.0], "groups of 16, two to 32 columns, with mins"),
    case_with(&[65, 7, 256, 7, 0, 0, 8, 32, 1, 1], &[2.0], "f32 scales and mins, as Q5_K becomes"),
    case_with(&[2, 257, 384, 257, 0, 1, 33, 128, 0, 1], &[1.0], "groups of 128 with f16 mins, odd rank"),
    case_with(&[1, 257, 288, 257, 0, 0, 0, 32, 0, 0], &[0.0], "one token, nine groups"),
    case_with(&[130, 136, 192, 136, 0, 0, 0, 16, 0, 1], &[0.0], "past tiles of 64 and 128, groups of 16, f16 mins"),
    case_with(&[130, 136, 192, 136, 0, 0, 0, 32, 0, 1], &[0.0], "past tiles of 64 and 128, groups of 32, f16 mins"),
    case_with(&[66, 130, 320, 131, 1, 1, 20, 32, 1, 0], &[0.5], "rank 20, part of a wider y, f32 scales"),
    case_with(&[66, 130, 80, 131, 1, 1, 20, 16, 1, 1], &[0.5], "a quarter of a tile of columns left over, rank 20"),
    case_with(&[17, 129, 256, 129, 0, 0, 0, 128, 1, 0], &[0.0], "groups of 128, f32 scales"),
    case_with(&[16, 70, 1088, 70, 0, 1, 3, 64, 0, 0], &[0.5], "16 rows, columns past two steps of 512, groups of 64"),
    case_with(&[12, 18, 2336, 18, 0, 0, 0, 32, 0, 1], &[0.0], "73 groups a row with mins, so that rows begin anywhere"),
    case_with(&[8, 33, 1632, 34, 1, 0, 2, 16, 1, 0], &[1.0], "groups of 16 in f32, columns past three steps of 512"),
    case_with(&[2, 19, 3200, 19, 0, 0, 0, 128, 0, 0], &[0.0], "25 groups a row, columns past six steps of 512"),
    case_with(&[33, 192, 576, 192, 0, 0, 0, 32, 0, 0], &[0.0], "SmolLM2-135M's keys"),
    case_with(&[1, 768, 576, 768, 0, 0, 0, 32, 0, 0], &[0.0], "a slice of SmolLM2-135M's head"),
];
const NF4_CASES: &[Case] = &[
    case_with(&[1, 1, 64, 1, 0, 0, 0], &[0.0], "the smallest"),
    case_with(&[7, 33, 192, 40, 7, 1, 1], &[0.5], "tails, part of a wider y, bias, rank 1"),
    case_with(&[65, 7, 320, 7, 0, 0, 8], &[2.0], "rank 8"),
    case_with(&[1, 257, 576, 257, 0, 1, 0], &[0.0], "one token, nine blocks; a nested block ends inside a row"),
    case_with(&[130, 136, 192, 136, 0, 0, 0], &[0.0], "past tiles of 64 and 128"),
    case_with(&[66, 130, 320, 131, 1, 1, 20], &[0.5], "rank 20, part of a wider y"),
    case_with(&[16, 70, 1088, 70, 0, 1, 3], &[0.5], "16 rows, columns past two steps of 512"),
    case_with(&[12, 18, 2368, 18, 0, 0, 0], &[0.0], "37 blocks a row, columns past four steps of 512"),
    case_with(&[9, 2070, 128, 2070, 0, 1, 2], &[0.5], "more rows of W than 128 blocks of 16"),
    case_with(&[33, 192, 576, 192, 0, 0, 0], &[0.0], "SmolLM2-135M's keys"),
];

/// The spec, the oracle and the cost of one format: the word stands here once.
macro_rules! qmatmul {
    ($spec:ident, $word:literal, $dims:expr, [$($part:expr),*], $cases:expr, $kernels:expr) => {
        #[doc = concat!("`qmatmul` with weights in ", $word, ".")]
        pub static $spec: OpSpec = spec(
            $word,
            $dims,
            &[X, $($part,)* BIAS, LORA_S, LORA_B, Y],
            |d, args| oracle($word, d, args),
            |d| cost($word, d),
            $cases,
            $kernels,
        );
    };
}

qmatmul!(
    QMATMUL_F32,
    "f32",
    PLAIN_DIMS,
    [W_F32],
    PLAIN_CASES,
    &[cpu::KERNELS_F32, ptx::KERNELS_F32, wgsl::KERNELS_F32]
);
qmatmul!(
    QMATMUL_F16,
    "f16",
    PLAIN_DIMS,
    [W_F16],
    PLAIN_CASES,
    &[cpu::KERNELS_F16, ptx::KERNELS_F16, wgsl::KERNELS_F16]
);
qmatmul!(
    QMATMUL_BF16,
    "bf16",
    PLAIN_DIMS,
    [W_BF16],
    PLAIN_CASES,
    &[cpu::KERNELS_BF16, ptx::KERNELS_BF16, wgsl::KERNELS_BF16]
);
qmatmul!(
    QMATMUL_Q4,
    "q4",
    Q4_DIMS,
    [CODES_4BIT, SCALES, MINS],
    Q4_CASES,
    &[cpu::KERNELS_Q4, ptx::KERNELS_Q4, wgsl::KERNELS_Q4]
);
qmatmul!(
    QMATMUL_Q8,
    "q8",
    Q8_DIMS,
    [CODES_I8, SCALES, MINS_IF_AFFINE],
    Q8_CASES,
    &[cpu::KERNELS_Q8, ptx::KERNELS_Q8, wgsl::KERNELS_Q8]
);
qmatmul!(
    QMATMUL_NF4,
    "nf4",
    PLAIN_DIMS,
    [CODES_4BIT, ABSMAX],
    NF4_CASES,
    &[cpu::KERNELS_NF4, ptx::KERNELS_NF4, wgsl::KERNELS_NF4]
);
qmatmul!(
    QMATMUL_NF4DQ,
    "nf4dq",
    PLAIN_DIMS,
    [CODES_4BIT, ABSMAX_U8, ABSMAX_CODE, ABSMAX2, ABSMAX_OFFSET],
    NF4_CASES,
    &[cpu::KERNELS_NF4DQ, ptx::KERNELS_NF4DQ, wgsl::KERNELS_NF4DQ]
);

/// The pseudo-code made runnable.
fn oracle(word: &str, d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (m, n, k, r) = (d["M"], d["N"], d["K"], d["R"]);
    let (ldy, y0, s) = (d["LDY"], d["Y0"], d.scalar("s") as f64);
    let parts = part_count(word);
    let x = args[0].to_f64();
    let (w, w_magnitude) = exact(word, d, &args[1..1 + parts]);
    let [bias, lora_s, lora_b] = [1, 2, 3].map(|i| args[parts + i].to_f64());

    let mut value = vec![f64::NAN; m * ldy];
    let mut magnitude = vec![0.0; m * ldy];
    for i in 0..m {
        for j in 0..n {
            let mut sum = bias.get(j).copied().unwrap_or(0.0);
            let mut size = sum.abs();
            for l in 0..k {
                sum += x[i * k + l] * w[j * k + l];
                size += x[i * k + l].abs() * w_magnitude[j * k + l];
            }
            for l in 0..r {
                let term = s * lora_s[i * r + l] * lora_b[j * r + l];
                sum += term;
                size += term.abs();
            }
            value[i * ldy + y0 + j] = sum;
            magnitude[i * ldy + y0 + j] = size;
        }
    }
    vec![Expected { value, magnitude }]
}

fn cost(word: &str, d: &Dims) -> Cost {
    let (m, n, k, r) = (d["M"], d["N"], d["K"], d["R"]);
    let floats = m * k + m * n + d["BIAS"] * n + (m + n) * r;
    Cost { flops: (2 * m * n * (k + r)) as u64, bytes: (4 * floats + weight_bytes(word, d)) as u64 }
}
