//! The gradients of an adapter, y = .. + s · S · Bᵀ with S = x · Aᵀ:
//!
//! - `lora_backward`: `dS[M,R] = s · dy[M,N] · B[N,R]` and `dB[N,R] = s · dyᵀ[N,M] · S[M,R] (+ dB)`, which both read dy
//! - `lora_backward_a`: `dA[R,K] = dSᵀ[R,M] · x[M,K] (+ dA)`
//!
//! dy is columns Y0..Y0+N of a matrix `[M,LDY]`. With `ACC` = 1 the gradients of the weights are added to what dB and dA
//! hold, as accumulation over microbatches wants; with 0 the old values are never read. dS is always written.
//!
//! Sums have one order: a kernel may cut M or N into parts, never by the number of its threads, and adds the parts in
//! order, with no atomic additions. So a step gives the same bits every time.

use crate::op::*;
use crate::tensor::{Dtype, HostTensor};

const WHY: &str =
    "as many products are summed as the longer of the two sums has; their roundings, independent of each \
                   other, grow with its square root; s, the sum of parts and what was there before round once each";

/// Gradients of S and B.
pub static LORA_BACKWARD: OpSpec = OpSpec {
    name: "lora_backward",
    format: "f32",
    formula: "dS[M,R] = s · dy[M,N] · B[N,R]; dB[N,R] = s · dyᵀ · S[M,R] (+ dB[N,R] where ACC is 1)",
    dims: &["M", "N", "R", "LDY", "Y0", "ACC"],
    scalars: &["s"],
    args: &[
        input("dy", ArgType::Act, &["M", "LDY"], Fill::Normal),
        input("lora_b", ArgType::Is(Dtype::F32), &["N", "R"], Fill::Normal),
        input("lora_s", ArgType::Is(Dtype::F32), &["M", "R"], Fill::Normal),
        output("ds", ArgType::Is(Dtype::F32), &["M", "R"]),
        inout("db", ArgType::Is(Dtype::F32), &["N", "R"], Fill::Sum),
    ],
    oracle,
    cost: |d| {
        let (m, n, r) = (d["M"], d["N"], d["R"]);
        let floats = m * n + 2 * m * r + (2 + d["ACC"]) * n * r;
        Cost { flops: (4 * m * n * r) as u64, bytes: (4 * floats) as u64 }
    },
    tolerance: Tolerance { roundings: |d| (d["M"].max(d["N"]) as f64).sqrt() + 4.0, nmse: 1e-11, why: WHY },
    // M, N, R, LDY, Y0, ACC
    cases: &[
        case_with(&[1, 1, 1, 1, 0, 0], &[1.0], "the smallest"),
        case_with(&[7, 33, 3, 40, 7, 1], &[0.5], "tails everywhere, part of a wider dy, added to dB"),
        case_with(&[65, 257, 9, 257, 0, 0], &[2.0], "one past a power of two"),
        case_with(&[257, 7, 65, 7, 0, 1], &[2.0], "a rank beyond a vector, few columns"),
        case_with(&[33, 65, 16, 65, 0, 1], &[0.25], "rank 16"),
        case_with(&[256, 576, 8, 576, 0, 1], &[2.0], "SmolLM2-135M, rank 8"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

/// Gradient of A.
pub static LORA_BACKWARD_A: OpSpec = OpSpec {
    name: "lora_backward_a",
    format: "f32",
    formula: "dA[R,K] = dSᵀ · x[M,K] (+ dA[R,K] where ACC is 1)",
    dims: &["M", "K", "R", "ACC"],
    scalars: &[],
    args: &[
        input("x", ArgType::Act, &["M", "K"], Fill::Normal),
        input("ds", ArgType::Is(Dtype::F32), &["M", "R"], Fill::Normal),
        inout("da", ArgType::Is(Dtype::F32), &["R", "K"], Fill::Sum),
    ],
    oracle: oracle_a,
    cost: |d| {
        let (m, k, r) = (d["M"], d["K"], d["R"]);
        Cost { flops: (2 * m * k * r) as u64, bytes: (4 * (m * k + m * r + (1 + d["ACC"]) * r * k)) as u64 }
    },
    tolerance: Tolerance { roundings: |d| (d["M"] as f64).sqrt() + 4.0, nmse: 1e-11, why: WHY },
    // M, K, R, ACC
    cases: &[
        case(&[1, 1, 1, 0], "the smallest"),
        case(&[7, 33, 3, 1], "tails everywhere, added to dA"),
        case(&[65, 257, 9, 0], "one past a power of two"),
        case(&[257, 7, 65, 1], "a rank beyond a vector, few columns"),
        case(&[33, 65, 16, 1], "rank 16"),
        case(&[256, 1536, 8, 1], "SmolLM2-135M's down projection, rank 8"),
    ],
    kernels: &[CPU_A, PTX_A, WGSL_A],
};

const CPU: &[Kernel] = &[rust("lora_backward_f32_naive", naive, always)];
const PTX: &[Kernel] = &[ptx!("lora_backward_f32_block", tokens_then_columns, always)];
const WGSL: &[Kernel] = &[];

const CPU_A: &[Kernel] = &[rust("lora_backward_a_f32_naive", naive_a, always)];
const PTX_A: &[Kernel] = &[ptx!("lora_backward_a_f32_block", columns_a_block, always)];
const WGSL_A: &[Kernel] = &[];

/// Blocks of 256 threads, each eight ranks of eight tokens of dS, then of 32 columns of dB.
fn tokens_then_columns(d: &Dims) -> Launch {
    let blocks = d["M"].div_ceil(8) + d["N"].div_ceil(32);
    Launch { grid: [blocks as u32, d["R"].div_ceil(8) as u32, 1], block: [256, 1, 1], shared_bytes: 0 }
}

/// Blocks of 256 threads, each eight ranks of 32 columns.
fn columns_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["K"].div_ceil(32) as u32, d["R"].div_ceil(8) as u32, 1], block: [256, 1, 1], shared_bytes: 0 }
}

/// The definition in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (m, n, r, ldy, y0, s) = (d["M"], d["N"], d["R"], d["LDY"], d["Y0"], d.scalar("s") as f64);
    let [dy, b, lora_s, before] = [0, 1, 2, 4].map(|i| args[i].to_f64());
    let mut ds = Expected { value: vec![0.0; m * r], magnitude: vec![0.0; m * r] };
    let mut db = Expected::relative(if d["ACC"] == 1 { before } else { vec![0.0; n * r] });
    for i in 0..m {
        for j in 0..n {
            let dy = s * dy[i * ldy + y0 + j];
            for l in 0..r {
                ds.value[i * r + l] += dy * b[j * r + l];
                ds.magnitude[i * r + l] += (dy * b[j * r + l]).abs();
                db.value[j * r + l] += dy * lora_s[i * r + l];
                db.magnitude[j * r + l] += (dy * lora_s[i * r + l]).abs();
            }
        }
    }
    vec![ds, db]
}

/// The definition in f64.
fn oracle_a(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (m, k, r) = (d["M"], d["K"], d["R"]);
    let [x, ds, before] = [0, 1, 2].map(|i| args[i].to_f64());
    let mut da = Expected::relative(if d["ACC"] == 1 { before } else { vec![0.0; r * k] });
    for i in 0..m {
        for l in 0..r {
            for j in 0..k {
                let term = ds[i * r + l] * x[i * k + j];
                da.value[l * k + j] += term;
                da.magnitude[l * k + j] += term.abs();
            }
        }
    }
    vec![da]
}

/// CPU, plain: the definition, token by token.
fn naive(d: &Dims, args: &mut [Slice<'_>]) {
    let (m, n, r, ldy, y0, s) = (d["M"], d["N"], d["R"], d["LDY"], d["Y0"], d.scalar("s"));
    let [dy, b, lora_s, ds, db] = args else { unreachable!("five arguments") };
    let (dy, b, lora_s, ds, db) = (dy.f32(), b.f32(), lora_s.f32(), ds.f32_mut(), db.f32_mut());
    if d["ACC"] == 0 {
        db.fill(0.0);
    }
    ds.fill(0.0);
    for i in 0..m {
        for j in 0..n {
            let dy = s * dy[i * ldy + y0 + j];
            for l in 0..r {
                ds[i * r + l] += dy * b[j * r + l];
                db[j * r + l] += dy * lora_s[i * r + l];
            }
        }
    }
}

/// CPU, plain: the definition, token by token.
fn naive_a(d: &Dims, args: &mut [Slice<'_>]) {
    let (k, r) = (d["K"], d["R"]);
    let [x, ds, da] = args else { unreachable!("three arguments") };
    let (x, ds, da) = (x.f32(), ds.f32(), da.f32_mut());
    if d["ACC"] == 0 {
        da.fill(0.0);
    }
    for (x, ds) in x.chunks(k).zip(ds.chunks(r)) {
        for (da, ds) in da.chunks_mut(k).zip(ds) {
            da.iter_mut().zip(x).for_each(|(da, x)| *da += ds * x);
        }
    }
}
