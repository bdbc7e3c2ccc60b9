//! `qmatmul` on AMX tiles for any number of rows of x. A code is a small integer, so one bf16 holds it, and its group's
//! scale can wait for the group's product (`amx_codes`). Plain weights are one, two or three bf16 and have no scales
//! (`amx_rows`).
//!
//! ```text
//! x = h + m + l                              three bf16 to a number, without loss (crate::ops::amx); once a launch
//! for 32 rows of W, threads side by side
//!     unpack codes of 32 columns a step      tiles of B: [columns, rows of W]
//!     for 16 rows of x
//!         C[m,n] = Σ over a group's columns and over the parts of x      on the tiles
//!         y[m,n] += scale[n,g] · C[m,n] + min[n,g] · xsum[m,g]           scales and mins lie as vectors of n
//!     y[m,n] += bias[n] + s · Σ S[m,r]·B[n,r]
//! ```
//!
//! 1. q4 and bf16 take three products where two f32 numbers take six; q8 takes six, as 16·(its high half) + its low
//!    half, and so do f16, two bf16 each, the levels of nf4 and f32, three each.
//! 2. W is B, so that few rows of x are few rows of A and C: a product's cycles are A's rows. A word of B holds two
//!    columns of one row of W, and a row's four bytes are eight 4-bit codes: 16 rows' words side by side, shifted and
//!    looked up 16 bits at a time, are four rows of B. No code is moved on its own; the columns of x lie in the order
//!    that comes of it.
//! 3. A row of y is summed in one order however many rows there are, and wherever it lies: batch-invariant.

mod codes;
mod plain;
mod product;
mod rows;

use self::codes::{Bytes, Codes, Levels, Nibbles};
use self::plain::{Bf16, F16, F32};
use self::product::{multiply, Pair};
use self::rows::{Rows, Vectors, READ, STRIP};
use super::args::{arguments, Args};
use crate::op::*;
use crate::ops::amx::{self, Packed, Tile, DEPTH, ROWS};
use crate::ops::vector::{for_simd, Body, Vector};
use crate::ops::weights::{Scales, Weights};
use crate::ops::{skinny, team};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::Cell;

/// Columns of 32, and tiles, of a strip that are unpacked before they are multiplied: x's stay beside them in a core's
/// first cache. Twice as many take a tenth longer at 8 rows.
const STEPS: usize = 4;
const UNPACKED: usize = 16;
/// Multiply-adds below which waking a second thread costs more than it saves.
const SERIAL: usize = 1 << 16;

thread_local! {
    static LAUNCH: Cell<Activations> = Cell::default();
    static TASK: Cell<Scratch> = Cell::default();
}

/// Sums of 16 rows of x with a strip, a row's 32 side by side.
type Sums = [[f32; STRIP]; ROWS];

/// x as the tiles take it.
#[derive(Default)]
struct Activations {
    /// For each 16 rows, their columns 0..32, 32..64 and so on, each in three parts.
    tiles: Vec<Packed>,
    /// Sums of each group's columns [M,K/G]; unused where there are no mins.
    sums: Vec<f32>,
}

/// Memory of a task, to be used again.
#[derive(Default)]
struct Scratch {
    tiles: Vec<Tile>,
    products: Vec<Pair>,
    sums: Vec<Sums>,
    /// Bias and columns of s·B of a strip.
    extra: Vec<f32>,
    /// A strip's codes, scales and mins where they end the matrix, filled up with zeros; and scales that are codes.
    filled: [Vec<u8>; 3],
    scales: Vec<f32>,
}

/// What all tasks of a launch share.
struct Work<'a, C> {
    a: &'a Args<'a>,
    codes: &'a [u8],
    how: C,
    /// Tiles along a row.
    depth: usize,
    /// Tiles along a group.
    span: usize,
    /// Tiles along a row that are unpacked before they are multiplied: whole groups.
    unit: usize,
}

/// Groups of a multiple of 32 columns. Any number of rows, but for one or two other rungs are faster: on 1536×576 with
/// one thread `vnni` takes 0.55 of the time for a row of q4, 0.45 for one of q8; `rows` 0.6 for one of nf4.
pub fn supports(d: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Amx && d.get("G").is_none_or(|group| group % DEPTH == 0) && (d["M"] > 2 || caps.batch_invariant)
}

/// Plain weights, whole tiles of columns. Up to eight rows `rows` is faster, which reads W as it lies: here 32 rows go by
/// side by side, and memory does not keep up. bf16 from there on: on 1536×576 it takes 0.8 of the time for 16 rows and
/// 0.85 of `amx`'s for 512.
pub fn supports_bf16(d: &Dims, caps: &Caps) -> bool {
    supports_plain(d, caps, usize::MAX)
}

/// f16: 0.75 for 16 rows, as much as `amx` for 64, 1.1 for 512.
pub fn supports_f16(d: &Dims, caps: &Caps) -> bool {
    supports_plain(d, caps, 64)
}

/// f32: 0.9 for 16 rows, 1.05 for 64, 1.2 for 512.
pub fn supports_f32(d: &Dims, caps: &Caps) -> bool {
    supports_plain(d, caps, 32)
}

fn supports_plain(d: &Dims, caps: &Caps, most: usize) -> bool {
    let rows = d["M"] > 8 && d["M"] <= most;
    caps.simd >= Simd::Amx && d["K"].is_multiple_of(DEPTH) && (rows || caps.batch_invariant)
}

/// The launch.
pub fn launch(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    match a.w {
        Weights::Q4 { codes, .. } => run(&a, codes, Nibbles),
        Weights::Q8 { codes, .. } => run(&a, bytemuck::cast_slice(codes), Bytes),
        Weights::Nf4 { codes, .. } | Weights::Nf4Dq { codes, .. } => run(&a, codes, Levels),
        Weights::Bf16 { w } => run(&a, bytemuck::cast_slice(w), Bf16),
        Weights::F16 { w } => run(&a, bytemuck::cast_slice(w), F16),
        Weights::F32 { w } => run(&a, bytemuck::cast_slice(w), F32),
    }
}

fn run<C: Codes>(a: &Args<'_>, codes: &[u8], how: C) {
    if a.m == 0 || a.n == 0 {
        return;
    }
    let depth = a.k / DEPTH;
    let most = STEPS.min(UNPACKED / (2 * C::TILES));
    // Plain weights: as many columns at a time as fit, the same number each time.
    let span = if a.w.group() > 1 {
        a.w.group() / DEPTH
    } else {
        (1..=most).rev().find(|s| depth.is_multiple_of(*s)).unwrap_or(1)
    };
    let unit = (most / span).max(1) * span;
    assert!(codes.len() == a.n * depth * C::BYTES && depth.is_multiple_of(span));
    let work = Work { a, codes, how, depth, span, unit };

    let mut x = LAUNCH.take();
    // As many rows of x as stay in a core's second cache while all of W goes by.
    let most = ROWS * amx::far_tiles(depth).min(a.m.div_ceil(ROWS));
    for first in (0..a.m).step_by(most) {
        let rows = first..(first + most).min(a.m);
        let blocks = rows.len().div_ceil(ROWS);
        x.tiles.resize(x.tiles.len().max(blocks * depth), amx::ZERO);
        x.sums.resize(x.sums.len().max(rows.len() * depth / span), 0.0);
        work.pack(rows.clone(), &mut x);

        let strips = a.n.div_ceil(STRIP);
        let parts = if rows.len() * a.n * a.k < SERIAL { 1 } else { (8 * rayon::current_num_threads()).min(strips) };
        let per_part = strips.div_ceil(parts);
        let part = |part: usize| {
            amx::with_rows(rows.len().min(ROWS), || {
                let mut scratch = TASK.take();
                for strip in part * per_part..strips.min((part + 1) * per_part) {
                    // SAFETY: the table offers this kernel only where `amx::available`, which asks for these features
                    // too; the tiles are set up, and no other task has this strip.
                    unsafe { work.strip(strip * STRIP, rows.clone(), &x, &mut scratch) };
                }
                TASK.set(scratch);
            })
        };
        spread(rows.len(), strips.div_ceil(per_part), &part);
    }
    LAUNCH.set(x);
}

/// Few rows of x: the team that waits awake for a token's next matrix. Many: the pool that the rest of a prompt uses.
fn spread(rows: usize, parts: usize, body: &(dyn Fn(usize) + Sync)) {
    if rows <= ROWS {
        team::run(parts, body)
    } else {
        (0..parts).into_par_iter().for_each(body)
    }
}

impl<C: Codes> Work<'_, C> {
    /// Rows of x as tiles, and their groups' sums.
    fn pack(&self, rows: std::ops::Range<usize>, x: &mut Activations) {
        let (k, groups) = (self.a.k, self.depth / self.span);
        let (tiles, sums) = (skinny::Rows(x.tiles.as_mut_ptr()), skinny::Rows(x.sums.as_mut_ptr()));
        let units = self.depth.div_ceil(self.unit);
        let part = |part: usize| {
            let (block, unit) = (part / units, part % units);
            let steps = unit * self.unit..self.depth.min((unit + 1) * self.unit);
            let (first, count) = (block * ROWS, (rows.len() - block * ROWS).min(ROWS));
            for step in steps.clone() {
                let values = &self.a.x[(rows.start + first) * k + step * DEPTH..];
                // SAFETY: this part's tile, which no other part touches; the features as in `run`.
                unsafe { amx::pack_a_ordered(values, k, count, &C::ORDER, &mut *tiles.at(block * self.depth + step)) };
            }
            if self.a.w.has_mins() {
                for (row, group) in (first..first + count)
                    .flat_map(|r| (steps.start / self.span..steps.end / self.span).map(move |group| (r, group)))
                {
                    let values = &self.a.x[(rows.start + row) * k + group * self.span * DEPTH..][..self.span * DEPTH];
                    // SAFETY: this part's sum; the features as in `run`.
                    unsafe { *sums.at(row * groups + group) = sum(values) };
                }
            }
        };
        let parts = rows.len().div_ceil(ROWS) * units;
        if rows.len() * k < SERIAL / 16 {
            (0..parts).for_each(part);
        } else {
            spread(rows.len(), parts, &part);
        }
    }

    /// y[rows, n..n+32].
    ///
    /// # Safety
    /// Within [`amx::with_rows`]; no one else touches these columns of y; AVX-512 F, BW, DQ and VL are there.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn strip(&self, n: usize, rows: std::ops::Range<usize>, x: &Activations, scratch: &mut Scratch) {
        let (a, groups) = (self.a, self.depth / self.span);
        let blocks = rows.len().div_ceil(ROWS);
        let Scratch { tiles, products, sums, extra, filled: [codes, scales, mins], scales: of_codes } = scratch;
        tiles.resize(tiles.len().max(2 * C::TILES * self.unit), amx::ZERO[0]);
        products.resize(products.len().max(self.unit / self.span), Pair([[0.0; 256]; 2]));
        sums.resize(sums.len().max(blocks), [[0.0; STRIP]; ROWS]);
        let sums = &mut sums[..blocks];
        sums.fill([[0.0; STRIP]; ROWS]);

        let codes = Rows::new(self.codes, self.depth * C::BYTES, n, codes);
        let (scales, mins) = match a.w {
            Weights::Q4 { scales: s, mins: m, .. } | Weights::Q8 { scales: s, mins: Some(m), .. } => {
                (Some(Rows::of_scales(s, groups, n, scales)), Some(Rows::of_scales(m, groups, n, mins)))
            }
            Weights::Q8 { scales: s, mins: None, .. } => (Some(Rows::of_scales(s, groups, n, scales)), None),
            Weights::Nf4 { absmax, .. } => (Some(Rows::of_scales(Scales::Full(absmax), groups, n, scales)), None),
            Weights::Nf4Dq { .. } => {
                of_codes.resize(of_codes.len().max(STRIP * groups), 0.0);
                let used = &mut of_codes[..STRIP.min(a.n - n) * groups];
                for_simd(Simd::Avx512, ReadScales { w: &a.w, first: n, groups, scales: used });
                (Some(Rows::of_scales(Scales::Full(used), groups, 0, scales)), None)
            }
            Weights::F32 { .. } | Weights::F16 { .. } | Weights::Bf16 { .. } => (None, None),
        };
        let (mut scale_vectors, mut min_vectors) =
            const { (Vectors([[1.0; STRIP]; READ]), Vectors([[0.0; STRIP]; READ])) };
        for first in (0..self.depth).step_by(self.unit) {
            let steps = self.unit.min(self.depth - first);
            for step in 0..steps {
                codes.prefetch((first + step) * C::BYTES, C::BYTES);
                for half in 0..2 {
                    // SAFETY: 16 rows of the strip; a step's tiles are each part of the first 16 rows and the next 16.
                    unsafe {
                        let from = codes.at(half * ROWS, (first + step) * C::BYTES);
                        let to = tiles.as_mut_ptr().add(2 * C::TILES * step + half);
                        self.how.unpack(from, codes.stride, to, 2);
                    }
                }
            }
            let group = first / self.span;
            let count = steps / self.span;
            if group.is_multiple_of(READ) {
                if let Some(scales) = scales {
                    scales.read(group, &mut scale_vectors);
                }
                if let Some(mins) = mins {
                    mins.read(group, &mut min_vectors);
                }
            }
            let scale_vectors = &scale_vectors.0[group % READ..][..count];
            let min_vectors = if mins.is_some() { &min_vectors.0[group % READ..][..count] } else { &[] };
            for (block, sums) in sums.iter_mut().enumerate() {
                let products = &mut products[..count];
                for (i, product) in products.iter_mut().enumerate() {
                    let x = &x.tiles[block * self.depth + first + i * self.span..][..self.span];
                    let b = &tiles[2 * C::TILES * i * self.span..][..2 * C::TILES * self.span];
                    // SAFETY: the tiles are set up; those of the group lie one after another.
                    unsafe { multiply::<C>(x, b.as_ptr(), product) };
                }
                let sums = &mut sums[..(rows.len() - block * ROWS).min(ROWS)];
                let xsums = if mins.is_some() { &x.sums[block * ROWS * groups + group..] } else { &[] };
                match count {
                    1 => add::<1>(products, scale_vectors, min_vectors, xsums, groups, sums),
                    2 => add::<2>(products, scale_vectors, min_vectors, xsums, groups, sums),
                    3 => add::<3>(products, scale_vectors, min_vectors, xsums, groups, sums),
                    _ => add::<STEPS>(products, scale_vectors, min_vectors, xsums, groups, sums),
                }
            }
        }
        extra.resize(extra.len().max((a.extra.r + 1) * STRIP), 0.0);
        // SAFETY: the caller's promise.
        unsafe { self.finish(n, rows, sums, extra) };
    }

    /// Bias, low-rank term, and the sums to y.
    ///
    /// # Safety
    /// No one else touches these columns of y.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn finish(&self, n: usize, rows: std::ops::Range<usize>, sums: &[Sums], extra: &mut [f32]) {
        let (a, r) = (self.a, self.a.extra.r);
        let columns = STRIP.min(a.n - n);
        let (bias, lora) = extra.split_at_mut(STRIP);
        let bias: &mut [f32; STRIP] = bias.try_into().expect("room for a strip's bias");
        bias.fill(0.0);
        if !a.extra.bias.is_empty() {
            bias[..columns].copy_from_slice(&a.extra.bias[n..n + columns]);
        }
        // s·B of the strip, as vectors of 32 rows of W.
        let (lora, _) = lora[..r * STRIP].as_chunks_mut::<STRIP>();
        lora.as_flattened_mut().fill(0.0);
        for j in 0..columns {
            for (lora, b) in lora.iter_mut().zip(&a.extra.lora_b[(n + j) * r..][..r]) {
                lora[j] = a.extra.s * b;
            }
        }
        let masks = [columns.min(ROWS), columns.saturating_sub(ROWS)].map(|c| ((1u32 << c) - 1) as __mmask16);
        for (i, m) in rows.enumerate() {
            let sums = &sums[i / ROWS][i % ROWS];
            let s = &a.extra.lora_s[m * r..][..r];
            for (half, mask) in masks.into_iter().enumerate().filter(|(_, mask)| *mask != 0) {
                let of = |row: &[f32; STRIP]| load(&row[half * ROWS..]);
                let mut y = _mm512_add_ps(of(sums), of(bias));
                for (s, b) in s.iter().zip(lora.iter()) {
                    y = _mm512_fmadd_ps(_mm512_set1_ps(*s), of(b), y);
                }
                // SAFETY: as many columns of y's row as the mask has, this task's.
                unsafe { _mm512_mask_storeu_ps(a.y.at(m, n + half * ROWS), mask, y) };
            }
        }
    }
}

/// Σ of a group's columns: 16 lanes, then those.
#[target_feature(enable = "avx512f")]
#[inline]
fn sum(values: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for chunk in values.as_chunks::<ROWS>().0 {
        sum = _mm512_add_ps(sum, load(chunk));
    }
    _mm512_reduce_add_ps(sum)
}

/// Sixteen numbers.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(from: &[f32]) -> __m512 {
    assert!(from.len() >= ROWS);
    // SAFETY: sixteen numbers.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

/// sums += scales · products + mins · xsums over `N` groups; xsums has `groups` to a row.
#[target_feature(enable = "avx512f")]
#[inline]
fn add<const N: usize>(
    products: &[Pair],
    scales: &[[f32; STRIP]],
    mins: &[[f32; STRIP]],
    xsums: &[f32],
    groups: usize,
    sums: &mut [[f32; STRIP]],
) {
    assert!(products.len() == N && scales.len() == N);
    for half in 0..2 {
        let of = |row: &[f32; STRIP]| load(&row[half * ROWS..]);
        let scales: [__m512; N] = std::array::from_fn(|i| of(&scales[i]));
        let mins: [__m512; N] = std::array::from_fn(|i| mins.get(i).map_or(_mm512_setzero_ps(), of));
        for (row, sums) in sums.iter_mut().enumerate() {
            let mut sum = of(sums);
            for i in 0..N {
                sum = _mm512_fmadd_ps(load(&products[i].0[half][row * ROWS..]), scales[i], sum);
            }
            if !xsums.is_empty() {
                // A sum of its own: its additions need not wait for the others.
                let xsums = &xsums[row * groups..][..N];
                let mut shift = _mm512_mul_ps(_mm512_set1_ps(xsums[0]), mins[0]);
                for i in 1..N {
                    shift = _mm512_fmadd_ps(_mm512_set1_ps(xsums[i]), mins[i], shift);
                }
                sum = _mm512_add_ps(sum, shift);
            }
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(sums[half * ROWS..][..ROWS].as_mut_ptr(), sum) };
        }
    }
}

/// Scales that are codes themselves, of whole rows of W.
struct ReadScales<'a> {
    w: &'a Weights<'a>,
    first: usize,
    groups: usize,
    scales: &'a mut [f32],
}

impl Body for ReadScales<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        self.w.read_scales::<V>(self.first, self.groups, self.scales, &mut []);
    }
}
