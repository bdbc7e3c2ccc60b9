//! The gradients of an adapter, y = .. + s · S · Bᵀ with S = x · Aᵀ:
//!
//! - `lora_backward`: `dS[M,R] = s · dy[M,N] · B[N,R]` and `dB[N,R] = s · dyᵀ[N,M] · S[M,R] (+ dB)`, which both read dy
//! - `lora_backward_a`: `dA[R,K] = dSᵀ[R,M] · x[M,K] (+ dA)`
//!
//! dy is columns Y0..Y0+N of a matrix `[M,LDY]`. With `ACC` = 1 the gradients of the weights are added to what dB and
//! dA hold, as accumulation over microbatches wants; with 0 the old values are never read. dS is always written.
//!
//! Sums have one order: a kernel may cut M or N into parts, never by the number of its threads, and adds the parts in
//! order, with no atomic additions. So a step gives the same bits every time.
//!
//! The floor of `lora_backward` is 4 (MN + 2MR + 2NR) bytes and 2 MNR multiply-adds; MB / millions of multiply-adds:
//!
//! | N | R | M = 1 | M = 64 | M = 256 | M = 2048 |
//! | --- | --- | --- | --- | --- | --- |
//! | 576 | 8 | 0.04 / 0.01 | 0.19 / 0.6 | 0.64 / 2.4 | 4.9 / 19 |
//! | 576 | 64 | 0.30 / 0.07 | 0.48 / 4.7 | 1.0 / 19 | 6.1 / 151 |
//! | 1536 | 8 | 0.11 / 0.02 | 0.50 / 1.6 | 1.7 / 6.3 | 13 / 50 |
//! | 1536 | 64 | 0.79 / 0.20 | 1.2 / 13 | 2.5 / 50 | 14 / 403 |
//! | 4096 | 8 | 0.28 / 0.07 | 1.3 / 4.2 | 4.5 / 17 | 34 / 134 |
//! | 4096 | 16 | 0.54 / 0.13 | 1.6 / 8.4 | 4.8 / 34 | 34 / 268 |
//! | 4096 | 64 | 2.1 / 0.52 | 3.2 / 34 | 6.4 / 134 | 37 / 1070 |
//! | 14336 | 8 | 0.98 / 0.23 | 4.6 / 15 | 16 / 59 | 118 / 470 |
//! | 14336 | 64 | 7.4 / 1.8 | 11 / 117 | 22 / 470 | 126 / 3760 |
//!
//! So there are R/2 multiply-adds a byte where M and N are large, half as many in `lora_backward_a`. An A100 does 4.8 a
//! byte from DRAM (9.7 T/s, 2.0 TB/s), an H100 10 (33 T/s, 3.35 TB/s): rank 8 is bound by bytes on both, rank 16 only on
//! the second, rank 64 by f32 arithmetic. Tensor cores would round the factors to TF32's 11 bits, which the tolerance of
//! an adapter's gradients does not leave room for.
//!
//! Kernels of a grid read dy once for each gradient: whoever sums dS over N and dB over M from one tile of dy holds parts
//! of one of them for other blocks, and there is no memory to put them. The second time dy comes from the second-level
//! cache as long as it fits: up to N = 6000 at M = 2048 and 50 MB; beyond, as at N = 14336, from memory again.

use super::vector::{for_simd, Body, Vector};
use super::{simd, skinny};
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;

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
        case_with(&[65, 132, 5, 140, 4, 1], &[0.5], "columns by fours, tails of tiles, a rank that is none of fours"),
        case_with(&[70, 68, 12, 68, 0, 0], &[0.5], "ranks in two groups of eight"),
        case_with(&[41, 36, 36, 48, 8, 1], &[0.5], "ranks beyond four groups of eight"),
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
        case(&[150, 36, 5, 1], "columns by fours, tails of tiles, a rank that is none of fours"),
        case(&[70, 68, 12, 0], "ranks in two groups of eight"),
        case(&[41, 36, 36, 1], "ranks beyond four groups of eight"),
        case(&[256, 1536, 8, 1], "SmolLM2-135M's down projection, rank 8"),
    ],
    kernels: &[CPU_A, PTX_A, WGSL_A],
};

const CPU: &[Kernel] = &[
    rust("lora_backward_f32_naive", naive, always),
    rust("lora_backward_f32_blocked", |d, args| blocked(d, args, Simd::Portable), always),
    rust("lora_backward_f32_blocked_avx2", |d, args| blocked(d, args, Simd::Avx2), has_avx2),
    rust("lora_backward_f32_blocked_avx512", |d, args| blocked(d, args, Simd::Avx512), has_avx512),
];
const PTX: &[Kernel] = &[
    ptx!("lora_backward_f32_block", tokens_then_columns, always),
    ptx!("lora_backward_f32_tiled", tokens_then_columns_by_32, in_tiles),
];
const WGSL: &[Kernel] = &[wgsl!("lora_backward_f32_workgroup", four_ranks_a_group, always)];

const CPU_A: &[Kernel] = &[
    rust("lora_backward_a_f32_naive", naive_a, always),
    rust("lora_backward_a_f32_columns", |d, args| columns(d, args, Simd::Portable), always),
    rust("lora_backward_a_f32_columns_avx2", |d, args| columns(d, args, Simd::Avx2), has_avx2),
    rust("lora_backward_a_f32_columns_avx512", |d, args| columns(d, args, Simd::Avx512), has_avx512),
];
const PTX_A: &[Kernel] = &[
    ptx!("lora_backward_a_f32_block", columns_a_block, always),
    ptx!("lora_backward_a_f32_tiled", columns_by_32, columns_in_tiles),
];
const WGSL_A: &[Kernel] = &[wgsl!("lora_backward_a_f32_columns", |d| four_ranks(d["K"].div_ceil(64), d, 0), always)];

/// A group for each token's dS and for 64 rows of dB, with four words of workgroup memory an invocation.
fn four_ranks_a_group(d: &Dims) -> Launch {
    four_ranks(d["M"] + d["N"].div_ceil(64), d, 1024)
}

/// 64 invocations, four ranks each.
fn four_ranks(groups: usize, d: &Dims, shared_bytes: u32) -> Launch {
    Launch { grid: [groups as u32, d["R"].div_ceil(4) as u32, 1], block: [64, 1, 1], shared_bytes }
}

/// Blocks of 256 threads, each eight ranks of eight tokens of dS, then of 32 columns of dB.
fn tokens_then_columns(d: &Dims) -> Launch {
    let blocks = d["M"].div_ceil(8) + d["N"].div_ceil(32);
    Launch { grid: [blocks as u32, d["R"].div_ceil(8) as u32, 1], block: [256, 1, 1], shared_bytes: 0 }
}

/// Blocks of 128 threads, each 32 ranks of 32 tokens of dS, then of 32 columns of dB.
fn tokens_then_columns_by_32(d: &Dims) -> Launch {
    let blocks = d["M"].div_ceil(32) + d["N"].div_ceil(32);
    Launch { grid: [blocks as u32, d["R"].div_ceil(32) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// Where four columns of dy lie in 16 bytes, and there are tokens for most lanes; `tiled` counts in i32, some tiles past
/// the last row, and has a grid of ranks.
fn in_tiles(d: &Dims, _: &Caps) -> bool {
    let fours = ["N", "LDY", "Y0"].iter().all(|dim| d[dim].is_multiple_of(4));
    fours && d["M"] >= 16 && d["M"].max(d["N"]) <= MOST_ROWS && d["R"].div_ceil(32) <= BLOCKS
}

/// Blocks of 256 threads, each eight ranks of 32 columns.
fn columns_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["K"].div_ceil(32) as u32, d["R"].div_ceil(8) as u32, 1], block: [256, 1, 1], shared_bytes: 0 }
}

/// Blocks of 128 threads, each 32 ranks of 32 columns.
fn columns_by_32(d: &Dims) -> Launch {
    Launch { grid: [d["K"].div_ceil(32) as u32, d["R"].div_ceil(32) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

/// As [`in_tiles`], of x.
fn columns_in_tiles(d: &Dims, _: &Caps) -> bool {
    let counted = d["M"].max(d["K"]) <= MOST_ROWS && d["R"].div_ceil(32) <= BLOCKS;
    d["K"].is_multiple_of(4) && d["M"] >= 16 && counted
}

/// Rows of a matrix that a kernel counts in i32, two tiles of 128 past the last.
pub(super) const MOST_ROWS: usize = i32::MAX as usize - 256;
/// Blocks of a grid along its second axis.
pub(super) const BLOCKS: usize = 65_535;

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

/// Values of dy in a block of rows: 1 MiB, which stays near while both gradients read it.
const BLOCK: usize = 1 << 18;
/// Columns of dy or x whose sums over all rows are one task's.
const COLUMNS: usize = 128;

/// CPU: a block of dy's rows after another, read once: for dS its rows side by side, for dB its columns. dB's sums lie
/// as [COLUMNS of N][R][COLUMNS] until the end, so that dy's columns are vectors; each runs over all rows in order.
fn blocked(d: &Dims, args: &mut [Slice<'_>], simd: Simd) {
    let (m, n, r, ldy, y0, s) = (d["M"], d["N"], d["R"], d["LDY"], d["Y0"], d.scalar("s"));
    let [dy, b, lora_s, ds, db] = args else { unreachable!("five arguments") };
    let (dy, b, lora_s, ds, db) = (dy.f32(), b.f32(), lora_s.f32(), ds.f32_mut(), db.f32_mut());
    assert!(y0 + n <= ldy && dy.len() == m * ldy, "columns {y0}+{n} of dy[{m},{ldy}]");

    let mut b_t = vec![0.0; r * n];
    for (j, b) in b.chunks_exact(r).enumerate() {
        b.iter().enumerate().for_each(|(l, b)| b_t[l * n + j] = *b);
    }
    let mut sums = vec![0.0; n * r];
    let rows = (BLOCK / n).max(1);
    // At 30 multiply-adds a nanosecond.
    let (row_grain, column_grain) =
        (simd::grain((n * r) as f64 / 30.0), simd::grain((rows * COLUMNS * r) as f64 / 30.0));
    for (block, (ds, lora_s)) in ds.chunks_mut(rows * r).zip(lora_s.chunks(rows * r)).enumerate() {
        let dy = &dy[block * rows * ldy + y0..];
        ds.par_chunks_mut(row_grain * r).enumerate().for_each(|(task, ds)| {
            for_simd(simd, Dots { dy: &dy[task * row_grain * ldy..], ldy, n, b_t: &b_t, s, r, ds });
        });
        sums.par_chunks_mut(COLUMNS * r).enumerate().with_min_len(column_grain).for_each(|(task, sums)| {
            for_simd(simd, Outer { x: &dy[task * COLUMNS..], ldx: ldy, s: lora_s, r, sums });
        });
    }
    let add = d["ACC"] == 1;
    let work = db.par_chunks_mut(COLUMNS * r).zip(sums.par_chunks(COLUMNS * r));
    work.with_min_len(simd::grain((COLUMNS * r) as f64)).for_each(|(db, sums)| {
        let columns = sums.len() / r;
        for (j, db) in db.chunks_exact_mut(r).enumerate() {
            for (l, db) in db.iter_mut().enumerate() {
                let before = if add { *db } else { 0.0 };
                *db = s * sums[l * columns + j] + before;
            }
        }
    });
}

/// CPU: columns of x in parallel, each task's sums over all rows, in order.
fn columns(d: &Dims, args: &mut [Slice<'_>], simd: Simd) {
    let (m, k, r) = (d["M"], d["K"], d["R"]);
    let [x, ds, da] = args else { unreachable!("three arguments") };
    let (x, ds, add) = (x.f32(), ds.f32(), d["ACC"] == 1);
    // Each task's columns of each row of dA.
    let mut tasks: Vec<Vec<&mut [f32]>> = (0..k.div_ceil(COLUMNS)).map(|_| Vec::with_capacity(r)).collect();
    for row in da.f32_mut().chunks_mut(k) {
        tasks.iter_mut().zip(row.chunks_mut(COLUMNS)).for_each(|(task, part)| task.push(part));
    }
    let grain = simd::grain((m * COLUMNS * r) as f64 / 30.0);
    tasks.par_iter_mut().enumerate().with_min_len(grain).for_each(|(task, rows)| {
        let mut sums = vec![0.0; rows.iter().map(|row| row.len()).sum()];
        for_simd(simd, Outer { x: &x[task * COLUMNS..], ldx: k, s: ds, r, sums: &mut sums });
        for (row, sums) in rows.iter_mut().zip(sums.chunks(COLUMNS.min(k - task * COLUMNS))) {
            for (da, sum) in row.iter_mut().zip(sums) {
                *da = if add { *da + sum } else { *sum };
            }
        }
    });
}

/// The rows of dS of one task.
struct Dots<'a> {
    /// From the first row's column Y0 on.
    dy: &'a [f32],
    ldy: usize,
    n: usize,
    /// [R,N]
    b_t: &'a [f32],
    s: f32,
    r: usize,
    ds: &'a mut [f32],
}

impl Body for Dots<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        for (i, ds) in self.ds.chunks_exact_mut(self.r).enumerate() {
            skinny::dots::<V>(&self.dy[i * self.ldy..][..self.n], self.b_t, ds);
            ds.iter_mut().for_each(|ds| *ds *= self.s);
        }
    }
}

/// sums[r,k] += Σ_m s[m,r] · x[m,k] for the columns of one task.
struct Outer<'a> {
    /// From the first row's first column of the task on.
    x: &'a [f32],
    ldx: usize,
    s: &'a [f32],
    r: usize,
    sums: &'a mut [f32],
}

impl Body for Outer<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        skinny::add_outer::<V>(self.x, self.ldx, self.s, self.r, self.sums);
    }
}
