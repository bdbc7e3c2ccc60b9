//! `qmatmul_t` on the CPU, two rungs a format, the second for each instruction set:
//!
//! | variant | idea |
//! | --- | --- |
//! | `naive` | decode a row of W, add it to every row of dx, times dy |
//! | `amx` | the same on tiles of bf16, three to a number, in a room of its own |
//! | `gemm` | decode a panel of W's rows into f32, then one large product by the `gemm` crate, added to dx |
//!
//! A panel has the same rows whatever the number of threads, so dx is the same sum in the same order.

use crate::op::*;
use crate::ops::vector::{for_simd, Body, Portable, Vector};
use crate::ops::weights::{part_count, Weights};
use rayon::prelude::*;
use std::cell::Cell;

/// Decoded weights held at a time, in values: 1 MiB, near enough to be read again. With 4 MiB 256 rows of dy take a
/// tenth longer, and with a quarter of a MiB as much.
const PANEL: usize = 1 << 18;
thread_local! {
    /// The panel of the last launch, to be used again.
    static PANEL_MEMORY: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}
/// Values below which waking a second thread to decode costs more than it saves.
const SERIAL: usize = 1 << 16;

/// A format's rungs.
macro_rules! kernels {
    ($name:ident, $word:literal) => {
        pub const $name: &[Kernel] = &[
            rust(concat!("qmatmul_t_", $word, "_naive"), |d, a| naive($word, d, a), always),
            rust(concat!("qmatmul_t_", $word, "_gemm"), |d, a| gemm($word, Simd::Portable, d, a), always),
            rust(concat!("qmatmul_t_", $word, "_gemm_avx2"), |d, a| gemm($word, Simd::Avx2, d, a), has_avx2),
            rust(concat!("qmatmul_t_", $word, "_gemm_avx512"), |d, a| gemm($word, Simd::Avx512, d, a), has_avx512),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            rust(concat!("qmatmul_t_", $word, "_amx"), |d, a| super::amx::launch($word, d, a), has_amx),
        ];
    };
}
kernels!(KERNELS_F32, "f32");
kernels!(KERNELS_F16, "f16");
kernels!(KERNELS_BF16, "bf16");
kernels!(KERNELS_Q4, "q4");
kernels!(KERNELS_Q8, "q8");
kernels!(KERNELS_NF4, "nf4");
kernels!(KERNELS_NF4DQ, "nf4dq");

/// A launch's arguments by name.
pub struct Args<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub r: usize,
    /// [M,LDY] from column Y0 on.
    pub dy: &'a [f32],
    pub ldy: usize,
    pub w: Weights<'a>,
    pub ds: &'a [f32],
    pub lora_a: &'a [f32],
    pub dx: &'a mut [f32],
}

/// By name; dx is made zero where nothing is to be added to it.
pub fn arguments<'a>(word: &str, d: &Dims, args: &'a mut [Slice<'_>]) -> Args<'a> {
    let (dx, inputs) = args.split_last_mut().expect("arguments of the contract");
    let [dy, rest @ ..] = &*inputs else { unreachable!("arguments of the contract") };
    let (parts, rest) = rest.split_at(part_count(word));
    let [ds, lora_a] = rest else { unreachable!("arguments of the contract") };
    let (m, n, k, r, ldy, y0) = (d["M"], d["N"], d["K"], d["R"], d["LDY"], d["Y0"]);
    assert!(y0 + n <= ldy, "columns {y0}+{n} of dy[{m},{ldy}]");
    let dy = &dy.f32()[y0.min(m * ldy)..];
    Args { m, n, k, r, dy, ldy, w: Weights::new(word, d, parts), ds: ds.f32(), lora_a: lora_a.f32(), dx: dx.f32_mut() }
}

/// One row of W after another, then one of A.
fn naive(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    if d["ACC"] == 0 {
        a.dx.fill(0.0);
    }
    let mut row = vec![0.0; a.k];
    for n in 0..a.n {
        a.w.decode_rows::<Portable>(n, a.k, &mut row);
        for (m, dx) in a.dx.chunks_mut(a.k).enumerate() {
            let dy = a.dy[m * a.ldy + n];
            dx.iter_mut().zip(&row).for_each(|(dx, w)| *dx += dy * w);
        }
    }
    for r in 0..a.r {
        for (m, dx) in a.dx.chunks_mut(a.k).enumerate() {
            let ds = a.ds[m * a.r + r];
            dx.iter_mut().zip(&a.lora_a[r * a.k..]).for_each(|(dx, w)| *dx += ds * w);
        }
    }
}

/// A panel of W after another, then A.
fn gemm(word: &str, simd: Simd, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    if a.m == 0 || a.k == 0 {
        return;
    }
    let mut written = d["ACC"] == 1;
    if let Weights::F32 { w } = a.w {
        multiply(a.dy, a.ldy, w, a.n, a.dx, a.k, written);
        written |= a.n > 0;
    } else {
        let panel_rows = (PANEL / a.k).max(1).min(a.n);
        let mut panel = PANEL_MEMORY.take();
        panel.resize(panel.len().max(panel_rows * a.k), 0.0);
        for first in (0..a.n).step_by(panel_rows.max(1)) {
            let rows = panel_rows.min(a.n - first);
            let panel = &mut panel[..rows * a.k];
            let tasks = if panel.len() < SERIAL { 1 } else { rayon::current_num_threads() };
            let per_task = rows.div_ceil(tasks);
            panel.par_chunks_mut(per_task * a.k).enumerate().for_each(|(task, rows)| {
                for_simd(simd, Decode { w: a.w, first: first + task * per_task, rows, k: a.k });
            });
            multiply(&a.dy[first..], a.ldy, panel, rows, a.dx, a.k, written);
            written = true;
        }
        PANEL_MEMORY.set(panel);
    }
    multiply(a.ds, a.r, a.lora_a, a.r, a.dx, a.k, written);
    if !written && a.r == 0 {
        a.dx.fill(0.0);
    }
}

/// dx[M,K] = x[M,rows] · w[rows,K], added to dx where `add`; a row of x begins every `ldx`. Nothing without rows.
fn multiply(x: &[f32], ldx: usize, w: &[f32], rows: usize, dx: &mut [f32], k: usize, add: bool) {
    let m = dx.len() / k;
    if rows == 0 {
        return;
    }
    assert!(w.len() == rows * k && dx.len() == m * k && (m - 1) * ldx + rows <= x.len());
    // SAFETY: strides and sizes are those of dx[M,K], x[M,rows] with rows every ldx, and w[rows,K], which lie in their
    // slices as just asserted.
    unsafe {
        gemm::gemm(
            m,
            k,
            rows,
            dx.as_mut_ptr(),
            1,
            k as isize,
            add,
            x.as_ptr(),
            1,
            ldx as isize,
            w.as_ptr(),
            1,
            k as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// Rows `first..` of W into `rows`.
pub struct Decode<'a> {
    pub w: Weights<'a>,
    pub first: usize,
    pub rows: &'a mut [f32],
    pub k: usize,
}

impl Body for Decode<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        self.w.decode_rows::<V>(self.first, self.k, self.rows);
    }
}
