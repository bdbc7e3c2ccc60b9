//! `cosine_topk` on the CPU:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one dot product after another | reading |
//! | `tiled` | a tile of rows by 16 or 32 queries in registers; rows pass once, whatever the number of queries | f32 sums |
//! | `vnni` | the same over codes, exact sums in i32 ([`super::vnni`]) | processors that have it |
//! | `amx` | blocks of 32 rows by 32 queries on tiles of bf16 or of codes ([`super::amx`]) | processors that have them |
//!
//! ```text
//! tiled:  for each split, threads side by side
//!             for a few dozen rows, as f32:   for 16 or 32 queries:   for 3 to 12 of the rows:
//!                 tile[r,q] += rows[r,d] · q[d,q]  over d     rows broadcast, queries as vectors from a transposed copy
//!                 for each vector of 16 scores: put in their lists those that reach the list's threshold, mostly none
//! ```

use super::select::{Best, Lists, Scored};
use super::CODE_PITCH;
use crate::op::*;
use crate::ops::vector::{for_simd, prefetch, Body, Vector, LANES};
use crate::tensor::Dtype;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of rows, as f32, that stay near while all queries meet them.
const NEAR: usize = 64 << 10;

/// A format's rungs: the plain one, then tiles in each instruction set. Those on AMX are of bf16, but for codes.
macro_rules! kernels {
    ($name:ident, $word:literal, $act:expr, $has_amx:path $(, $more:expr)?) => {
        pub const $name: &[Kernel] = &[
            rust(concat!("cosine_topk_", $word, "_naive"), |d, args| naive($word, d, args), always),
            rust(concat!("cosine_topk_", $word, "_tiled"), |d, args| tiled($word, Simd::Portable, d, args), always),
            #[cfg(target_arch = "x86_64")]
            rust(concat!("cosine_topk_", $word, "_tiled_avx2"), |d, args| tiled($word, Simd::Avx2, d, args), has_avx2),
            #[cfg(target_arch = "x86_64")]
            rust(
                concat!("cosine_topk_", $word, "_tiled_avx512"),
                |d, args| tiled($word, Simd::Avx512, d, args),
                has_avx512,
            ),
            $(
                #[cfg(target_arch = "x86_64")]
                $more,
            )?
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel {
                act: $act,
                ..rust(concat!("cosine_topk_", $word, "_amx"), |d, args| super::amx::launch($word, d, args), $has_amx)
            },
        ];
    };
}
kernels!(KERNELS_F32, "f32", Dtype::BF16, has_amx);
kernels!(KERNELS_F16, "f16", Dtype::BF16, has_amx);
kernels!(
    KERNELS_I8,
    "i8",
    Dtype::F32,
    super::amx::has_amx_int8,
    rust("cosine_topk_i8_vnni", super::vnni::launch, super::vnni::has_vnni)
);

/// N rows as they are stored.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// [N,D].
    F32(&'a [f32]),
    /// [N,D].
    F16(&'a [f16]),
    /// [N, D padded], [N], and the queries' codes [Q, D padded] and scales [Q].
    I8 { codes: &'a [i8], scales: &'a [f32], q: &'a [i8], q_scales: &'a [f32] },
}

/// A launch's arguments by name.
pub struct Args<'a> {
    /// [Q,D]; empty for i8.
    pub q: &'a [f32],
    pub rows: Rows<'a>,
    pub filter: &'a [u32],
    pub floor: &'a [f32],
    /// [Q,S,K].
    pub ids: &'a mut [u32],
    /// [Q,S,K].
    pub scores: &'a mut [f32],
}

pub fn arguments<'a>(format: &str, args: &'a mut [Slice<'_>]) -> Args<'a> {
    let (inputs, outputs) = args.split_at_mut(args.len() - 2);
    let [Slice::Out(ids), Slice::Out(scores)] = outputs else { unreachable!("two outputs") };
    let (ids, scores) = (bytemuck::cast_slice_mut(ids), bytemuck::cast_slice_mut(scores));
    let (q, rows, filter, floor) = match (format, &*inputs) {
        ("f32", [q, rows, filter, floor]) => (q.f32(), Rows::F32(rows.f32()), filter, floor),
        ("f16", [q, rows, filter, floor]) => (q.f32(), Rows::F16(rows.as_slice()), filter, floor),
        ("i8", [q, q_scales, rows, scales, filter, floor]) => {
            let (codes, scales) = (rows.as_slice(), scales.f32());
            (&[][..], Rows::I8 { codes, scales, q: q.as_slice(), q_scales: q_scales.f32() }, filter, floor)
        }
        _ => unreachable!("arguments of the contract"),
    };
    Args { q, rows, filter: filter.u32(), floor: floor.f32(), ids, scores }
}

/// The rows of split `split`.
fn split_rows(d: &Dims, split: usize) -> std::ops::Range<usize> {
    let len = d["N"].div_ceil(d["S"]);
    (split * len).min(d["N"])..((split + 1) * len).min(d["N"])
}

/// One query after another, one row after another.
fn naive(format: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let (width, pitch, k) = (d["D"], d["D"].next_multiple_of(CODE_PITCH), d["K"]);
    let a = arguments(format, args);
    let score = |q: usize, n: usize| -> f32 {
        let plain = n * width..(n + 1) * width;
        let query = || a.q[q * width..(q + 1) * width].iter();
        match a.rows {
            Rows::F32(rows) => query().zip(&rows[plain]).map(|(q, x)| q * x).sum(),
            Rows::F16(rows) => query().zip(&rows[plain]).map(|(q, x)| q * x.to_f32()).sum(),
            Rows::I8 { codes, scales, q: query, q_scales } => {
                let pairs = query[q * pitch..(q + 1) * pitch].iter().zip(&codes[n * pitch..(n + 1) * pitch]);
                let sum: i32 = pairs.map(|(q, x)| *q as i32 * *x as i32).sum();
                sum as f32 * (q_scales[q] * scales[n])
            }
        }
    };
    let lists = a.ids.chunks_mut(k).zip(a.scores.chunks_mut(k)).enumerate();
    for (list, (ids, scores)) in lists {
        let (q, split) = (list / d["S"], list % d["S"]);
        let mut best = Best::new(k, a.floor[q]);
        for n in split_rows(d, split) {
            if a.filter.is_empty() || a.filter[n / 32] >> (n % 32) & 1 == 1 {
                best.put(Scored { score: score(q, n), id: (d["BASE"] + n) as u32 });
            }
        }
        best.finish(ids, scores);
    }
}

/// Tiles of scores in registers, each met by its lists' thresholds.
fn tiled(format: &str, simd: Simd, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(format, args);
    // Queries in a tile: as many registers as there are, less those of a row of the tile.
    let lanes = if simd == Simd::Avx512 && d["Q"] > LANES { 2 * LANES } else { LANES };
    let panels = Panels::new(d, &a, lanes);
    lists_of_splits(d, a.ids, a.scores, |rows| {
        let mut lists = Lists::new(d["K"], a.floor, panels.lanes(), a.filter, d["BASE"]);
        for_simd(simd, Split { d, rows, corpus: a.rows, panels: &panels, simd, lists: &mut lists });
        lists.into_best()
    });
}

/// Runs the splits side by side and writes the lists that each leaves, one a query.
pub fn lists_of_splits(
    d: &Dims,
    ids: &mut [u32],
    scores: &mut [f32],
    lists: impl Fn(Range<usize>) -> Vec<Best> + Sync,
) {
    let (splits, k) = (d["S"], d["K"]);
    let found: Vec<Vec<Best>> = (0..splits).into_par_iter().map(|split| lists(split_rows(d, split))).collect();
    for (split, lists) in found.into_iter().enumerate() {
        for (q, best) in lists.into_iter().enumerate() {
            let at = (q * splits + split) * k;
            best.finish(&mut ids[at..at + k], &mut scores[at..at + k]);
        }
    }
}

/// The queries, transposed: panels [D][lanes], filled up with zeros; and what scales the sums of i8.
struct Panels {
    lanes: usize,
    width: usize,
    values: Vec<f32>,
    /// One a query for i8, else empty.
    scales: Vec<f32>,
}

impl Panels {
    fn new(d: &Dims, a: &Args<'_>, lanes: usize) -> Panels {
        let (queries, width) = (d["Q"], d["D"]);
        let padded = queries.next_multiple_of(lanes);
        let mut values = vec![0.0; padded * width];
        let at = |q: usize, i: usize| q / lanes * lanes * width + i * lanes + q % lanes;
        let mut scales = Vec::new();
        if let Rows::I8 { q: codes, q_scales, .. } = a.rows {
            for (q, codes) in codes.chunks(width.next_multiple_of(CODE_PITCH)).enumerate() {
                codes[..width].iter().enumerate().for_each(|(i, code)| values[at(q, i)] = *code as f32);
            }
            scales = q_scales.to_vec();
            scales.resize(padded, 0.0);
        } else {
            for (q, query) in a.q.chunks(width).enumerate() {
                query.iter().enumerate().for_each(|(i, v)| values[at(q, i)] = *v);
            }
        }
        Panels { lanes, width, values, scales }
    }

    /// Queries, counted up to whole panels.
    fn lanes(&self) -> usize {
        self.values.len() / self.width
    }
}

/// The rows of one split, with all queries.
struct Split<'a, 'b> {
    d: &'a Dims,
    rows: Range<usize>,
    corpus: Rows<'a>,
    panels: &'a Panels,
    simd: Simd,
    lists: &'a mut Lists<'b>,
}

impl Body for Split<'_, '_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        // Rows × vectors of a tile: 12 × 2 and 12 × 1 of the 32 registers of AVX-512, 6 × 1 (two registers each) of the 16
        // of AVX2, 3 × 1 (four each) of others' 16.
        match (self.simd, self.panels.lanes) {
            (Simd::Portable, _) => self.sweep::<V, 3, 1>(),
            (Simd::Avx2, _) => self.sweep::<V, 6, 1>(),
            (_, LANES) => self.sweep::<V, 12, 1>(),
            _ => self.sweep::<V, 12, 2>(),
        }
    }
}

impl Split<'_, '_> {
    #[inline(always)]
    fn sweep<V: Vector, const R: usize, const C: usize>(self) {
        let width = self.d["D"];
        let near = (NEAR / (4 * width) / R * R).max(R);
        let mut decoded = vec![0.0; if matches!(self.corpus, Rows::F32(_)) { 0 } else { near * width }];
        for first in self.rows.clone().step_by(near) {
            let some = first..(first + near).min(self.rows.end);
            if self.lists.skips(some.clone()) {
                continue;
            }
            let values = match self.corpus {
                Rows::F32(rows) => &rows[some.start * width..some.end * width],
                rows => {
                    let values = &mut decoded[..some.len() * width];
                    decode::<V>(rows, some.clone(), width, values);
                    &*values
                }
            };
            for (panel, queries) in self.panels.values.chunks_exact(width * C * LANES).enumerate() {
                let mut tiles = values.chunks_exact(R * width);
                let mut row = some.start;
                for rows in &mut tiles {
                    if panel == 0 {
                        prefetch(rows.as_ptr().wrapping_add(R * width), 4 * R * width);
                    }
                    let tile = tile::<V, R, C>(rows, queries, width);
                    for (r, scores) in tile.into_iter().enumerate() {
                        offer(self.lists, &self.corpus, self.panels, row + r, panel * C * LANES, scores);
                    }
                    row += R;
                }
                for rows in tiles.remainder().chunks_exact(width) {
                    let [scores] = tile::<V, 1, C>(rows, queries, width);
                    offer(self.lists, &self.corpus, self.panels, row, panel * C * LANES, scores);
                    row += 1;
                }
            }
        }
    }
}

/// Scores of R rows [R,D] with C vectors of queries [D, C·16], each summed in the order of d.
#[inline(always)]
fn tile<V: Vector, const R: usize, const C: usize>(rows: &[f32], queries: &[f32], width: usize) -> [[V; C]; R] {
    assert_eq!(rows.len(), R * width);
    let mut sums = [[V::splat(0.0); C]; R];
    let queries = &queries.as_chunks::<LANES>().0[..C * width];
    for (i, queries) in queries.chunks_exact(C).enumerate() {
        let q: [V; C] = std::array::from_fn(|c| V::load(&queries[c]));
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: i < width, as there are C vectors for each of its numbers, and r < R.
            let x = V::splat(unsafe { *rows.get_unchecked(r * width + i) });
            for (sum, q) in sums.iter_mut().zip(q) {
                *sum = x.mul_add(q, *sum);
            }
        }
    }
    sums
}

/// Puts a row's scores in the lists of the queries from `query` on, where they reach the thresholds.
#[inline(always)]
fn offer<V: Vector, const C: usize>(
    lists: &mut Lists<'_>,
    corpus: &Rows<'_>,
    panels: &Panels,
    row: usize,
    query: usize,
    scores: [V; C],
) {
    for (c, mut scores) in scores.into_iter().enumerate() {
        let query = query + c * LANES;
        if let Rows::I8 { scales, .. } = corpus {
            scores = scores.mul(V::load(&panels.scales[query..]).mul(V::splat(scales[row])));
        }
        let which = scores.at_least(V::load(lists.enter(query)));
        if which != 0 {
            let mut lanes = [0.0; LANES];
            scores.store(&mut lanes);
            lists.put(row, query, &lanes, which);
        }
    }
}

/// Rows of f16 or codes as f32, [rows, D].
#[inline(always)]
fn decode<V: Vector>(corpus: Rows<'_>, rows: Range<usize>, width: usize, values: &mut [f32]) {
    match corpus {
        Rows::F32(_) => unreachable!("needs no decoding"),
        Rows::F16(corpus) => {
            let from: &[u16] = bytemuck::cast_slice(&corpus[rows.start * width..rows.end * width]);
            let ((to, to_tail), (from, tail)) = (values.as_chunks_mut::<LANES>(), from.as_chunks::<LANES>());
            to.iter_mut().zip(from).for_each(|(to, from)| V::load_f16(from).store(to));
            to_tail.iter_mut().zip(tail).for_each(|(to, from)| *to = f16::from_bits(*from).to_f32());
        }
        Rows::I8 { codes, .. } => {
            let pitch = width.next_multiple_of(CODE_PITCH);
            let codes = codes[rows.start * pitch..rows.end * pitch].chunks_exact(pitch);
            for (to, from) in values.chunks_exact_mut(width).zip(codes) {
                let ((to, to_tail), (from, tail)) = (to.as_chunks_mut::<LANES>(), from[..width].as_chunks::<LANES>());
                to.iter_mut().zip(from).for_each(|(to, from)| V::load_i8(from).store(to));
                to_tail.iter_mut().zip(tail).for_each(|(to, from)| *to = *from as f32);
            }
        }
    }
}
