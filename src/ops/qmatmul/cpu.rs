//! `qmatmul` on the CPU, three rungs a format, the last two for each instruction set, and those for AMX in rooms of their
//! own:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | decode a row of W, one dot product after another | reading |
//! | `gemm` | decode W once into f32, then one large product by the `gemm` crate | many tokens |
//! | `amx` | the same on tiles of bf16, three to a number | processors that have them |
//! | `rows` | a row of W is decoded in registers as it streams by and meets every x: no decoded W in memory | M ≤ 16 |
//! | `vnni` | whole numbers: codes meet the bytes of x, 64 products an instruction ([`super::vnni`]) | M ≤ 16, q4, q8 |
//! | `amx_codes` | codes on tiles as they are, scales on their products | codes, where there are tiles |
//! | `amx_rows` | plain weights on tiles in the same way ([`super::amx_codes`]) | more than 8 rows of the others |
//!
//! ```text
//! rows:  for n in 0..N, threads side by side
//!            for 32 columns of a group g:  acc[m] += scale[n,g] · (code · x[m])     lane by lane; 16 columns in q8
//!            y[m,n] = Σ lanes of acc[m] + Σ over g of min[n,g] · xsum[m,g]      xsum: once a launch, not once a row
//! ```

use super::args::{arguments, Args, Extra};
use crate::op::*;
use crate::ops::team;
use crate::ops::vector::{for_simd, prefetch, Body, Portable, Vector, LANES};
use crate::ops::weights::{Weights, SCALE_ROWS};
use crate::quant;
use crate::tensor::Dtype;
use rayon::prelude::*;
use std::cell::Cell;

/// Most rows of x that `rows` takes. On 1536×576 in q4 with AVX-512 it takes 0.3 of `gemm`'s time at 8 rows, 0.7 at 16,
/// 1.4 at 32.
const MAX_ROWS: usize = 16;
/// Decoded weights held at a time, in values: 1 MiB, so that what one thread decodes the others find in cache, and the
/// pages are not given back and faulted in again at each launch. With 4 MiB the head's 49152×576 in q8 takes a sixth
/// longer at 64 to 256 rows of x.
const PANEL: usize = 1 << 18;
thread_local! {
    /// The panel of the last launch, to be used again.
    static PANEL_MEMORY: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}
/// How far ahead of the row in work its weights are asked for, in bytes. The processor's own prefetch stops at each page.
pub(super) const AHEAD: usize = 2048;
/// Multiply-adds below which waking a second thread costs more than it saves.
const SERIAL: usize = 1 << 16;

/// A format's three rungs in three instruction sets.
macro_rules! kernels {
    ($name:ident, $word:literal, $tiles:literal, $supports:ident $(, $vnni:ident)?) => {
        pub const $name: &[Kernel] = &[
            rung(concat!("qmatmul_", $word, "_naive"), |d, a| naive($word, d, a), always),
            rung(concat!("qmatmul_", $word, "_gemm"), |d, a| gemm($word, Simd::Portable, d, a), always),
            rung(concat!("qmatmul_", $word, "_gemm_avx2"), |d, a| gemm($word, Simd::Avx2, d, a), avx2),
            rung(concat!("qmatmul_", $word, "_gemm_avx512"), |d, a| gemm($word, Simd::Avx512, d, a), avx512),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            rung(concat!("qmatmul_", $word, "_amx"), |d, a| super::amx::launch($word, d, a), has_amx),
            rung(concat!("qmatmul_", $word, "_rows"), |d, a| rows($word, Simd::Portable, d, a), few_rows),
            rung(concat!("qmatmul_", $word, "_rows_avx2"), |d, a| rows($word, Simd::Avx2, d, a), few_rows_avx2),
            rung(concat!("qmatmul_", $word, "_rows_avx512"), |d, a| rows($word, Simd::Avx512, d, a), few_rows_avx512),
            $(
                #[cfg(target_arch = "x86_64")]
                rung(concat!("qmatmul_", $word, "_vnni"), |d, a| super::$vnni::launch($word, d, a), super::$vnni::supports),
            )?
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            rung(
                concat!("qmatmul_", $word, $tiles),
                |d, a| super::amx_codes::launch($word, d, a),
                super::amx_codes::$supports,
            ),
        ];
    };
}
kernels!(KERNELS_F32, "f32", "_amx_rows", supports_f32);
kernels!(KERNELS_F16, "f16", "_amx_rows", supports_f16);
kernels!(KERNELS_BF16, "bf16", "_amx_rows", supports_bf16);
kernels!(KERNELS_Q4, "q4", "_amx_codes", supports, vnni);
kernels!(KERNELS_Q8, "q8", "_amx_codes", supports, vnni);
kernels!(KERNELS_NF4, "nf4", "_amx_codes", supports);
kernels!(KERNELS_NF4DQ, "nf4dq", "_amx_codes", supports);

const fn rung(stem: &'static str, body: fn(&Dims, &mut [Slice<'_>]), supports: fn(&Dims, &Caps) -> bool) -> Kernel {
    Kernel { stem, source: Source::Rust(body), act: Dtype::F32, launch: no_grid, supports }
}

fn avx2(_: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Avx2
}

fn avx512(_: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Avx512
}

/// The body of 4-bit codes takes 32 columns of one group at a time; that of q8 takes 16, the narrowest group there is.
fn few_rows(d: &Dims, _: &Caps) -> bool {
    d["M"] <= MAX_ROWS && (d.get("AFFINE").is_some() || d.get("G").is_none_or(|g| g % 32 == 0))
}

fn few_rows_avx2(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps) && avx2(d, caps)
}

fn few_rows_avx512(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps) && avx512(d, caps)
}

/// One row of W after another: decode, then M dot products.
fn naive(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    let mut row = vec![0.0; a.k];
    for n in 0..a.n {
        a.w.decode_rows::<Portable>(n, a.k, &mut row);
        for m in 0..a.m {
            let dot: f32 = a.x[m * a.k..(m + 1) * a.k].iter().zip(&row).map(|(x, w)| x * w).sum();
            // SAFETY: one thread.
            unsafe { a.y.set(m, n, dot + a.extra.at(m, n)) };
        }
    }
}

/// Decodes a panel of W into f32, once for all rows of x, and multiplies.
fn gemm(word: &str, simd: Simd, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    if a.m == 0 || a.n == 0 {
        return;
    }
    if let Weights::F32 { w } = a.w {
        multiply(&a, 0, w);
    } else {
        let panel_rows = (PANEL / a.k).max(1).min(a.n);
        let mut panel = PANEL_MEMORY.take();
        panel.resize(panel_rows * a.k, 0.0);
        for first in (0..a.n).step_by(panel_rows) {
            let rows = panel_rows.min(a.n - first);
            let panel = &mut panel[..rows * a.k];
            let per_task = rows.div_ceil(tasks(rows * a.k));
            panel.par_chunks_mut(per_task * a.k).enumerate().for_each(|(task, rows)| {
                for_simd(simd, Decode { w: a.w, first: first + task * per_task, rows, k: a.k });
            });
            multiply(&a, first, panel);
        }
        PANEL_MEMORY.set(panel);
    }
    if !a.extra.bias.is_empty() {
        let (y, bias) = (&a.y, a.extra.bias);
        (0..a.m).into_par_iter().for_each(|m| {
            // SAFETY: each m is one task's.
            let row = unsafe { y.row(m) };
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        });
    }
    if a.extra.r > 0 {
        add_low_rank(&a);
    }
}

/// y += s · S · Bᵀ
fn add_low_rank(a: &Args<'_>) {
    let Extra { s, r, lora_s, lora_b, .. } = a.extra;
    assert!(lora_s.len() == a.m * r && lora_b.len() == a.n * r);
    // SAFETY: strides and sizes are those of y[M,LDY], S[M,R] and B[N,R], which lie in their slices.
    unsafe {
        gemm::gemm(
            a.m,
            a.n,
            r,
            a.y.first(),
            1,
            a.y.stride() as isize,
            true,
            lora_s.as_ptr(),
            1,
            r as isize,
            lora_b.as_ptr(),
            r as isize,
            1,
            1.0,
            s,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// y[:, first..] = x · wᵀ for the rows `w` of W, [rows,K].
fn multiply(a: &Args<'_>, first: usize, w: &[f32]) {
    let rows = w.len() / a.k;
    assert!(first + rows <= a.n && a.x.len() == a.m * a.k);
    // y[m,n] = Σ over k of x[m,k] · w[n,k]: dst is M by N, lhs M by K, rhs K by N.
    // SAFETY: strides and sizes are those of y[M,LDY], x[M,K] and w[rows,K], which lie in their slices.
    unsafe {
        gemm::gemm(
            a.m,
            rows,
            a.k,
            a.y.first().add(first),
            1,
            a.y.stride() as isize,
            false,
            a.x.as_ptr(),
            1,
            a.k as isize,
            w.as_ptr(),
            a.k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// How many tasks to split so many multiply-adds into.
fn tasks(work: usize) -> usize {
    if work < SERIAL {
        1
    } else {
        rayon::current_num_threads()
    }
}

/// Rows `first..` of W into `rows`.
struct Decode<'a> {
    w: Weights<'a>,
    first: usize,
    rows: &'a mut [f32],
    k: usize,
}

impl Body for Decode<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        self.w.decode_rows::<V>(self.first, self.k, self.rows);
    }
}

/// Streams W once past all rows of x.
fn rows(word: &str, simd: Simd, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    let x = Prepared::new(a.x, a.m, a.k, &a.w);
    // One body, so one compiled function, for each way to unpack a row: small enough to stay in registers.
    match a.w {
        Weights::F32 { w } => stream(simd, &a, &x, PlainF32(w)),
        Weights::F16 { w } => stream(simd, &a, &x, PlainF16(w)),
        Weights::Bf16 { w } => stream(simd, &a, &x, PlainBf16(w)),
        Weights::Q8 { codes, group, .. } => stream(simd, &a, &x, Bytes { codes, group }),
        Weights::Q4 { codes, group, .. } => stream(simd, &a, &x, Nibbles { codes, group }),
        Weights::Nf4 { codes, .. } | Weights::Nf4Dq { codes, .. } => stream(simd, &a, &x, Levels { codes }),
    }
}

/// How many rows of W a task takes: several tasks a thread, so that one that is held up leaves its share to the others,
/// and whole blocks of scales.
pub(super) fn rows_of_part(a: &Args<'_>, tasks: usize) -> usize {
    let split = a.m * a.n * a.k >= SERIAL;
    let parts = if split { tasks * rayon::current_num_threads() } else { 1 };
    a.n.div_ceil(parts).next_multiple_of(SCALE_ROWS)
}

/// Divides the rows of W among the threads.
fn stream(simd: Simd, a: &Args<'_>, x: &Prepared, row: impl RowDot) {
    let per_part = rows_of_part(a, 16);
    team::run(a.n.div_ceil(per_part), &|part| {
        let rows = part * per_part..((part + 1) * per_part).min(a.n);
        for_simd(simd, Stream { a, x, row, rows });
    });
}

/// x as the streaming body reads it.
struct Prepared {
    /// [M,K]; for 4-bit codes each 32 columns are 16 even ones, then 16 odd ones.
    x: Vec<f32>,
    /// Sums of each group's columns [M,K/G]; empty for formats without mins.
    sums: Vec<f32>,
}

impl Prepared {
    fn new(x: &[f32], m: usize, k: usize, w: &Weights<'_>) -> Prepared {
        let mut sums = Vec::new();
        if w.has_mins() {
            sums.extend(x.chunks(w.group()).map(|group| group.iter().sum::<f32>()));
            debug_assert_eq!(sums.len(), m * (k / w.group()));
        }
        let mut x = x.to_vec();
        if w.is_4bit() {
            for chunk in x.as_chunks_mut::<32>().0 {
                let mixed = *chunk;
                for (i, pair) in mixed.as_chunks::<2>().0.iter().enumerate() {
                    [chunk[i], chunk[i + LANES]] = *pair;
                }
            }
        }
        Prepared { x, sums }
    }
}

/// How a row of W meets T rows of x: the lanes of each sum, and what did not fill a vector.
trait RowDot: Copy + Sync + Send {
    fn dot<V: Vector, const T: usize>(self, n: usize, x: [&[f32]; T], scales: &[f32]) -> [(V, f32); T];
}

/// Rows of W for one thread.
struct Stream<'a, R: RowDot> {
    a: &'a Args<'a>,
    x: &'a Prepared,
    row: R,
    rows: std::ops::Range<usize>,
}

impl<R: RowDot> Body for Stream<'_, R> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let groups = self.a.w.groups(self.a.k);
        let mut scales = vec![0.0; SCALE_ROWS * groups];
        let mut mins = vec![0.0; SCALE_ROWS * groups];
        for first in self.rows.clone().step_by(SCALE_ROWS) {
            let count = SCALE_ROWS.min(self.rows.end - first);
            let used = count * groups;
            self.a.w.read_scales::<V>(first, groups, &mut scales[..used], &mut mins[..used]);
            // Four rows of x at a time, or eight, share a decoded weight, fit the registers and stay near meanwhile.
            let mut m = 0;
            while m < self.a.m {
                let rows = match self.a.m - m {
                    1 => 1,
                    2 | 3 => 2,
                    8.. if V::MANY => 8,
                    _ => 4,
                };
                for i in 0..count {
                    let of_row = i * groups..(i + 1) * groups;
                    let (scales, mins) = (&scales[of_row.clone()], &mins[of_row]);
                    match rows {
                        1 => self.tile::<V, 1>(first + i, m, scales, mins),
                        2 => self.tile::<V, 2>(first + i, m, scales, mins),
                        4 => self.tile::<V, 4>(first + i, m, scales, mins),
                        _ => self.tile::<V, 8>(first + i, m, scales, mins),
                    }
                }
                m += rows;
            }
        }
    }
}

impl<R: RowDot> Stream<'_, R> {
    /// y[m..m+T, n].
    #[inline(always)]
    fn tile<V: Vector, const T: usize>(&self, n: usize, m: usize, scales: &[f32], mins: &[f32]) {
        let k = self.a.k;
        let x: [&[f32]; T] = std::array::from_fn(|t| &self.x.x[(m + t) * k..(m + t + 1) * k]);
        let dots = self.row.dot::<V, T>(n, x, scales);
        for (t, (mut lanes, mut rest)) in dots.into_iter().enumerate() {
            if !mins.is_empty() && self.a.w.has_mins() {
                let sums = &self.x.sums[(m + t) * mins.len()..(m + t + 1) * mins.len()];
                let (min_vectors, min_tail) = mins.as_chunks::<LANES>();
                let (sum_vectors, sum_tail) = sums.as_chunks::<LANES>();
                for (min, sum) in min_vectors.iter().zip(sum_vectors) {
                    lanes = V::load(min).mul_add(V::load(sum), lanes);
                }
                rest += min_tail.iter().zip(sum_tail).map(|(min, sum)| min * sum).sum::<f32>();
            }
            // SAFETY: column n is this task's alone.
            unsafe { self.a.y.set(m + t, n, lanes.sum() + rest + self.a.extra.at(m + t, n)) };
        }
    }
}

/// Σ w·x for weights without groups, as lanes and a rest: two running sums a row of x, so that one addition need not wait for the last.
#[inline(always)]
fn plain<V: Vector, E: Copy, const T: usize>(
    w: &[E],
    x: [&[f32]; T],
    load: impl Fn(&[E]) -> V,
    one: impl Fn(E) -> f32,
) -> [(V, f32); T] {
    let k = w.len();
    let pairs = k / (2 * LANES) * (2 * LANES);
    let vectors = k / LANES * LANES;
    let mut first = [V::splat(0.0); T];
    let mut second = [V::splat(0.0); T];
    for i in (0..pairs).step_by(2 * LANES) {
        let (wa, wb) = (load(&w[i..]), load(&w[i + LANES..]));
        for t in 0..T {
            first[t] = wa.mul_add(V::load(&x[t][i..]), first[t]);
            second[t] = wb.mul_add(V::load(&x[t][i + LANES..]), second[t]);
        }
    }
    if pairs < vectors {
        let wa = load(&w[pairs..]);
        for t in 0..T {
            first[t] = wa.mul_add(V::load(&x[t][pairs..]), first[t]);
        }
    }
    std::array::from_fn(|t| {
        let tail: f32 = w[vectors..].iter().zip(&x[t][vectors..]).map(|(w, x)| one(*w) * x).sum();
        (first[t].add(second[t]), tail)
    })
}

#[derive(Clone, Copy)]
struct PlainF32<'a>(&'a [f32]);
#[derive(Clone, Copy)]
struct PlainF16<'a>(&'a [u16]);
#[derive(Clone, Copy)]
struct PlainBf16<'a>(&'a [u16]);

impl RowDot for PlainF32<'_> {
    #[inline(always)]
    fn dot<V: Vector, const T: usize>(self, n: usize, x: [&[f32]; T], _: &[f32]) -> [(V, f32); T] {
        plain(&self.0[n * x[0].len()..][..x[0].len()], x, V::load, |v| v)
    }
}

impl RowDot for PlainF16<'_> {
    #[inline(always)]
    fn dot<V: Vector, const T: usize>(self, n: usize, x: [&[f32]; T], _: &[f32]) -> [(V, f32); T] {
        plain(&self.0[n * x[0].len()..][..x[0].len()], x, V::load_f16, |v| half::f16::from_bits(v).to_f32())
    }
}

impl RowDot for PlainBf16<'_> {
    #[inline(always)]
    fn dot<V: Vector, const T: usize>(self, n: usize, x: [&[f32]; T], _: &[f32]) -> [(V, f32); T] {
        plain(&self.0[n * x[0].len()..][..x[0].len()], x, V::load_bf16, |v| f32::from_bits((v as u32) << 16))
    }
}

/// q8: 16 codes at a time, of one group.
#[derive(Clone, Copy)]
struct Bytes<'a> {
    codes: &'a [i8],
    group: usize,
}

impl RowDot for Bytes<'_> {
    #[inline(always)]
    fn dot<V: Vector, const T: usize>(self, n: usize, x: [&[f32]; T], scales: &[f32]) -> [(V, f32); T] {
        let k = x[0].len();
        let codes = &self.codes[n * k..(n + 1) * k];
        prefetch(codes.as_ptr().wrapping_add(AHEAD), k);
        let shift = (self.group / LANES).ilog2();
        let codes = codes.as_chunks::<LANES>().0;
        // One length for all, so that one comparison in the loop serves every row.
        let x = x.map(|x| &x.as_chunks::<LANES>().0[..codes.len()]);
        let mut sums = [V::splat(0.0); T];
        for (i, codes) in codes.iter().enumerate() {
            let w = V::load_i8(codes).mul(V::splat(scales[i >> shift]));
            for t in 0..T {
                sums[t] = w.mul_add(V::load(&x[t][i]), sums[t]);
            }
        }
        sums.map(|sum| (sum, 0.0))
    }
}

/// q4: 32 codes at a time, of one group.
#[derive(Clone, Copy)]
struct Nibbles<'a> {
    codes: &'a [u8],
    group: usize,
}

impl RowDot for Nibbles<'_> {
    #[inline(always)]
    fn dot<V: Vector, const T: usize>(self, n: usize, x: [&[f32]; T], scales: &[f32]) -> [(V, f32); T] {
        let bytes = x[0].len() / 2;
        nibbles(&self.codes[n * bytes..(n + 1) * bytes], x, self.group, scales, |bytes| {
            let (even, odd) = V::load_nibbles(bytes);
            (V::from_codes(even), V::from_codes(odd))
        })
    }
}

/// nf4: as q4, each code a level; the high nibble is the even column.
#[derive(Clone, Copy)]
struct Levels<'a> {
    codes: &'a [u8],
}

impl RowDot for Levels<'_> {
    #[inline(always)]
    fn dot<V: Vector, const T: usize>(self, n: usize, x: [&[f32]; T], scales: &[f32]) -> [(V, f32); T] {
        let bytes = x[0].len() / 2;
        let levels = V::table(&quant::nf4::LEVELS);
        nibbles(&self.codes[n * bytes..(n + 1) * bytes], x, quant::NF4_BLOCK, scales, |bytes| {
            let (odd, even) = V::load_nibbles(bytes);
            (V::look_up(levels, even), V::look_up(levels, odd))
        })
    }
}

/// Σ scale · level · x; `unpack` gives the levels of 32 columns, even ones and odd ones.
#[inline(always)]
fn nibbles<V: Vector, const T: usize>(
    codes: &[u8],
    x: [&[f32]; T],
    group: usize,
    scales: &[f32],
    unpack: impl Fn(&[u8]) -> (V, V),
) -> [(V, f32); T] {
    prefetch(codes.as_ptr().wrapping_add(AHEAD), codes.len());
    let shift = (group / (2 * LANES)).ilog2();
    let codes = codes.as_chunks::<LANES>().0;
    // As for bytes.
    let x = x.map(|x| &x.as_chunks::<{ 2 * LANES }>().0[..codes.len()]);
    let mut sums = [V::splat(0.0); T];
    for (i, bytes) in codes.iter().enumerate() {
        let (even, odd) = unpack(bytes);
        let scale = V::splat(scales[i >> shift]);
        for t in 0..T {
            let part = even.mul_add(V::load(&x[t][i]), odd.mul(V::load(&x[t][i][LANES..])));
            sums[t] = part.mul_add(scale, sums[t]);
        }
    }
    sums.map(|sum| (sum, 0.0))
}
