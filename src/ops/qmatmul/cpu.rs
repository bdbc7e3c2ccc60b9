//! `qmatmul` on the CPU, three rungs a format, the last two for each instruction set:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | decode a row of W, one dot product after another | reading |
//! | `gemm` | decode W once into f32, then one large product by the `gemm` crate | many tokens |
//! | `rows` | a row of W is decoded in registers as it streams by and meets every x: no decoded W in memory | M ≤ 8 |
//!
//! ```text
//! rows:  for n in 0..N, threads side by side
//!            for g in groups:  part[m] = Σ over the group of code · x[m]        the scale waits until the group's end
//!                              acc[m] += scale[n,g] · part[m]
//!            y[m,n] = Σ lanes of acc[m] + Σ over g of min[n,g] · xsum[m,g]      xsum: once a launch, not once a row
//! ```

use crate::op::*;
use crate::ops::vector::{for_simd, Body, Vector, LANES};
use crate::ops::weights::{part_count, Weights};
use crate::quant;
use crate::tensor::Dtype;
use rayon::prelude::*;

/// Most rows of x that `rows` takes: beyond it `gemm` is faster (AVX-512, 576×576 to 1536×576).
const MAX_ROWS: usize = 8;
/// Multiply-adds below which waking a second thread costs more than it saves.
const SERIAL: usize = 1 << 16;

/// A format's three rungs in three instruction sets.
macro_rules! kernels {
    ($name:ident, $word:literal) => {
        pub const $name: &[Kernel] = &[
            rung(concat!("qmatmul_", $word, "_naive"), |d, a| naive($word, d, a), always),
            rung(concat!("qmatmul_", $word, "_gemm"), |d, a| gemm($word, Simd::Portable, d, a), always),
            rung(concat!("qmatmul_", $word, "_gemm_avx2"), |d, a| gemm($word, Simd::Avx2, d, a), avx2),
            rung(concat!("qmatmul_", $word, "_gemm_avx512"), |d, a| gemm($word, Simd::Avx512, d, a), avx512),
            rung(concat!("qmatmul_", $word, "_rows"), |d, a| rows($word, Simd::Portable, d, a), few_rows),
            rung(concat!("qmatmul_", $word, "_rows_avx2"), |d, a| rows($word, Simd::Avx2, d, a), few_rows_avx2),
            rung(concat!("qmatmul_", $word, "_rows_avx512"), |d, a| rows($word, Simd::Avx512, d, a), few_rows_avx512),
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

const fn rung(stem: &'static str, body: fn(&Dims, &mut [Slice<'_>]), supports: fn(&Dims, &Caps) -> bool) -> Kernel {
    Kernel { stem, source: Source::Rust(body), act: Dtype::F32, launch: no_grid, supports }
}

fn avx2(_: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Avx2
}

fn avx512(_: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Avx512
}

/// The streaming body takes 32 columns of one group at a time; only groups of 16 (Q6_K) are narrower, and go in halves.
fn few_rows(d: &Dims, _: &Caps) -> bool {
    d["M"] <= MAX_ROWS && (d.get("AFFINE").is_some() || d.get("G").is_none_or(|g| g % 32 == 0))
}

fn few_rows_avx2(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps) && avx2(d, caps)
}

fn few_rows_avx512(d: &Dims, caps: &Caps) -> bool {
    few_rows(d, caps) && avx512(d, caps)
}

/// A launch's arguments by name.
struct Args<'a> {
    m: usize,
    n: usize,
    k: usize,
    x: &'a [f32],
    w: Weights<'a>,
    extra: Extra<'a>,
    y: Output<'a>,
}

/// What is added to a product: the bias and the low-rank term.
#[derive(Clone, Copy)]
struct Extra<'a> {
    bias: &'a [f32],
    s: f32,
    r: usize,
    lora_s: &'a [f32],
    lora_b: &'a [f32],
}

impl Extra<'_> {
    /// Of element (m, n).
    #[inline]
    fn at(&self, m: usize, n: usize) -> f32 {
        let bias = self.bias.get(n).copied().unwrap_or(0.0);
        if self.r == 0 {
            return bias;
        }
        let (s, b) = (&self.lora_s[m * self.r..][..self.r], &self.lora_b[n * self.r..][..self.r]);
        bias + self.s * s.iter().zip(b).map(|(s, b)| s * b).sum::<f32>()
    }

    fn is_zero(&self) -> bool {
        self.bias.is_empty() && self.r == 0
    }
}

/// y's columns Y0..Y0+N, written by several threads, each its own columns or rows.
struct Output<'a> {
    first: *mut f32,
    ld: usize,
    m: usize,
    n: usize,
    _memory: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: threads write through `set` and `row` at places that are theirs alone.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    fn new(y: &'a mut [f32], ld: usize, y0: usize, m: usize, n: usize) -> Output<'a> {
        assert!(y0 + n <= ld && y.len() == m * ld, "columns {y0}+{n} of y[{m},{ld}]");
        let start = y0.min(y.len());
        let first = y[start..].as_mut_ptr();
        Output { first, ld, m, n, _memory: std::marker::PhantomData }
    }

    /// Writes element (m, n).
    ///
    /// # Safety
    /// No other thread touches this element meanwhile.
    #[inline]
    unsafe fn set(&self, m: usize, n: usize, value: f32) {
        debug_assert!(m < self.m && n < self.n);
        // SAFETY: `new` saw that the element lies in y; the caller that no one else touches it.
        unsafe { *self.first.add(m * self.ld + n) = value }
    }

    /// Row m.
    ///
    /// # Safety
    /// No other thread touches this row meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, m: usize) -> &mut [f32] {
        assert!(m < self.m);
        // SAFETY: `new` saw that the row lies in y; the caller that no one else touches it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(m * self.ld), self.n) }
    }
}

fn arguments<'a>(word: &str, d: &Dims, args: &'a mut [Slice<'_>]) -> Args<'a> {
    let (m, n, k) = (d["M"], d["N"], d["K"]);
    let (y, inputs) = args.split_last_mut().expect("arguments of the contract");
    let [x, rest @ ..] = &*inputs else { unreachable!("arguments of the contract") };
    let (parts, rest) = rest.split_at(part_count(word));
    let [bias, lora_s, lora_b] = rest else { unreachable!("arguments of the contract") };
    Args {
        m,
        n,
        k,
        x: x.f32(),
        w: Weights::new(word, d, parts),
        extra: Extra { bias: bias.f32(), s: d.scalar("s"), r: d["R"], lora_s: lora_s.f32(), lora_b: lora_b.f32() },
        y: Output::new(y.f32_mut(), d["LDY"], d["Y0"], m, n),
    }
}

/// One row of W after another: decode, then M dot products.
fn naive(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    let mut row = vec![0.0; a.k];
    for n in 0..a.n {
        a.w.decode_row_plain(n, &mut row);
        for m in 0..a.m {
            let dot: f32 = a.x[m * a.k..(m + 1) * a.k].iter().zip(&row).map(|(x, w)| x * w).sum();
            // SAFETY: one thread.
            unsafe { a.y.set(m, n, dot + a.extra.at(m, n)) };
        }
    }
}

/// Decodes W into f32, once, then multiplies.
fn gemm(word: &str, simd: Simd, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    if a.m == 0 || a.n == 0 {
        return;
    }
    let decoded;
    let w = match a.w {
        Weights::F32 { w } => w,
        _ => {
            let mut buffer: Vec<f32> = vec![0.0; a.n * a.k];
            let per_task = a.n.div_ceil(tasks(a.n * a.k));
            buffer.par_chunks_mut(per_task * a.k).enumerate().for_each(|(task, rows)| {
                for_simd(simd, Decode { w: a.w, first: task * per_task, rows, k: a.k });
            });
            decoded = buffer;
            &decoded
        }
    };
    // y[m,n] = Σ over k of x[m,k] · w[n,k]: dst is M by N, lhs M by K, rhs K by N.
    // SAFETY: strides and sizes are those of y[M,LDY], x[M,K] and w[N,K], whose lengths the launch has checked.
    unsafe {
        gemm::gemm(
            a.m,
            a.n,
            a.k,
            a.y.first,
            1,
            a.y.ld as isize,
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
    if !a.extra.is_zero() {
        let (y, extra) = (&a.y, a.extra);
        (0..a.m).into_par_iter().for_each(|m| {
            // SAFETY: each m is one task's.
            let row = unsafe { y.row(m) };
            for (n, y) in row.iter_mut().enumerate() {
                *y += extra.at(m, n);
            }
        });
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
        let mut scratch = vec![0.0; 2 * (self.k / self.w.group())];
        for (i, row) in self.rows.chunks_mut(self.k).enumerate() {
            self.w.decode_row::<V>(self.first + i, row, &mut scratch);
        }
    }
}

/// Streams W once past all rows of x.
fn rows(word: &str, simd: Simd, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    let x = Prepared::new(a.x, a.m, a.k, &a.w);
    let per_task = a.n.div_ceil(tasks(a.m * a.n * a.k)).max(1);
    (0..a.n.div_ceil(per_task)).into_par_iter().for_each(|task| {
        let range = task * per_task..((task + 1) * per_task).min(a.n);
        for_simd(simd, Stream { a: &a, x: &x, rows: range });
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

/// Rows of W for one thread.
struct Stream<'a> {
    a: &'a Args<'a>,
    x: &'a Prepared,
    rows: std::ops::Range<usize>,
}

impl Body for Stream<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let groups = if self.a.w.group() == 1 { 0 } else { self.a.k / self.a.w.group() };
        let mut scales = vec![0.0; groups];
        let mut mins = vec![0.0; groups];
        for n in self.rows.clone() {
            self.a.w.row_scales::<V>(n, &mut scales, &mut mins);
            // Four rows of x at a time share a decoded weight and fit the registers.
            let mut m = 0;
            while m < self.a.m {
                m += match self.a.m - m {
                    1 => self.tile::<V, 1>(n, m, &scales, &mins),
                    2 | 3 => self.tile::<V, 2>(n, m, &scales, &mins),
                    _ => self.tile::<V, 4>(n, m, &scales, &mins),
                };
            }
        }
    }
}

impl Stream<'_> {
    /// y[m..m+T, n]; returns T.
    #[inline(always)]
    fn tile<V: Vector, const T: usize>(&self, n: usize, m: usize, scales: &[f32], mins: &[f32]) -> usize {
        let k = self.a.k;
        let x: [&[f32]; T] = std::array::from_fn(|t| &self.x.x[(m + t) * k..(m + t + 1) * k]);
        let dots = match self.a.w {
            Weights::F32 { w } => plain::<V, _, T>(&w[n * k..(n + 1) * k], x, V::load, |v| v),
            Weights::F16 { w } => {
                plain::<V, _, T>(&w[n * k..(n + 1) * k], x, V::load_f16, |v| half::f16::from_bits(v).to_f32())
            }
            Weights::Bf16 { w } => {
                plain::<V, _, T>(&w[n * k..(n + 1) * k], x, V::load_bf16, |v| f32::from_bits((v as u32) << 16))
            }
            Weights::Q8 { codes, group, .. } => grouped_i8::<V, T>(&codes[n * k..(n + 1) * k], x, group, scales),
            Weights::Q4 { codes, group, .. } => {
                let codes = &codes[n * k / 2..(n + 1) * k / 2];
                grouped_4bit::<V, T>(codes, x, group, scales, |bytes| {
                    let (even, odd) = V::load_nibbles(bytes);
                    (V::from_codes(even), V::from_codes(odd))
                })
            }
            Weights::Nf4 { codes, .. } | Weights::Nf4Dq { codes, .. } => {
                let levels = V::table(&quant::nf4::LEVELS);
                let codes = &codes[n * k / 2..(n + 1) * k / 2];
                grouped_4bit::<V, T>(codes, x, quant::NF4_BLOCK, scales, |bytes| {
                    let (odd, even) = V::load_nibbles(bytes);
                    (V::look_up(levels, even), V::look_up(levels, odd))
                })
            }
        };
        for (t, mut dot) in dots.into_iter().enumerate() {
            if self.a.w.has_mins() {
                let sums = &self.x.sums[(m + t) * mins.len()..(m + t + 1) * mins.len()];
                dot += plain::<V, _, 1>(mins, [sums], V::load, |v| v)[0];
            }
            // SAFETY: column n is this task's alone.
            unsafe { self.a.y.set(m + t, n, dot + self.a.extra.at(m + t, n)) };
        }
        T
    }
}

/// Σ w·x for weights without groups: two running sums a row of x, so that one addition need not wait for the last.
#[inline(always)]
fn plain<V: Vector, E: Copy, const T: usize>(
    w: &[E],
    x: [&[f32]; T],
    load: impl Fn(&[E]) -> V,
    one: impl Fn(E) -> f32,
) -> [f32; T] {
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
        first[t].add(second[t]).sum() + tail
    })
}

/// Σ over groups of scale · Σ code·x, codes i8; a group is a multiple of 16 columns.
#[inline(always)]
fn grouped_i8<V: Vector, const T: usize>(codes: &[i8], x: [&[f32]; T], group: usize, scales: &[f32]) -> [f32; T] {
    let mut sums = [V::splat(0.0); T];
    for (g, (codes, scale)) in codes.chunks_exact(group).zip(scales).enumerate() {
        let mut parts = [V::splat(0.0); T];
        for (i, codes) in codes.chunks_exact(LANES).enumerate() {
            let w = V::load_i8(codes);
            for t in 0..T {
                parts[t] = w.mul_add(V::load(&x[t][g * group + i * LANES..]), parts[t]);
            }
        }
        for t in 0..T {
            sums[t] = parts[t].mul_add(V::splat(*scale), sums[t]);
        }
    }
    sums.map(V::sum)
}

/// Σ over groups of scale · Σ level·x; `unpack` gives the levels of 32 columns, even ones and odd ones; a group is a
/// multiple of 32 columns.
#[inline(always)]
fn grouped_4bit<V: Vector, const T: usize>(
    codes: &[u8],
    x: [&[f32]; T],
    group: usize,
    scales: &[f32],
    unpack: impl Fn(&[u8]) -> (V, V),
) -> [f32; T] {
    let mut sums = [V::splat(0.0); T];
    for (g, (codes, scale)) in codes.chunks_exact(group / 2).zip(scales).enumerate() {
        let mut parts = [V::splat(0.0); T];
        for (i, codes) in codes.chunks_exact(LANES).enumerate() {
            let (even, odd) = unpack(codes);
            let at = g * group + i * 2 * LANES;
            for t in 0..T {
                let part = odd.mul_add(V::load(&x[t][at + LANES..]), parts[t]);
                parts[t] = even.mul_add(V::load(&x[t][at..]), part);
            }
        }
        for t in 0..T {
            sums[t] = parts[t].mul_add(V::splat(*scale), sums[t]);
        }
    }
    sums.map(V::sum)
}
