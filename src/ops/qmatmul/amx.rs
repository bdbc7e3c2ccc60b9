//! `qmatmul` on AMX tiles: f32 in and out, each number the sum of three bf16 ([`crate::ops::amx`])
//!
//! ```text
//! pack x, S and 1 as tiles of B                      columns K, K+R and K+R+1 of one long row: [x | S | 1]
//! for 32 rows of W, threads side by side
//!     decode them, s·B and the bias: [W | s·B | bias]; pack as tiles of A
//!     yᵀ[32, M] = those rows · [x | S | 1]ᵀ           two by two tiles of C
//! ```

use super::args::{arguments, Args};
use crate::op::*;
use crate::ops::amx::{self, Packed, Scratch, DEPTH, ROWS};
use crate::ops::vector::{for_simd, Body, Vector};
use crate::ops::weights::SCALE_ROWS;
use rayon::prelude::*;
use std::cell::Cell;

thread_local! {
    static LAUNCH: Cell<Scratch> = Cell::default();
    static TASK: Cell<Scratch> = Cell::default();
}

/// Rows of W in a strip: two tiles.
const STRIP: usize = 2 * ROWS;

/// The launch.
pub fn launch(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    if a.m == 0 || a.n == 0 {
        return;
    }
    let length = a.k + a.extra.r + usize::from(!a.extra.bias.is_empty());
    let depth = length.div_ceil(DEPTH);
    let mut scratch = LAUNCH.take();
    let most = STRIP * amx::even(a.m.div_ceil(STRIP), amx::far_tiles(depth) / 2);
    for first in (0..a.m).step_by(most) {
        let rows = most.min(a.m - first);
        let pairs = rows.div_ceil(STRIP);
        scratch.fit(0, 2 * pairs * depth, 0);
        let x = &mut scratch.tiles[..2 * pairs * depth];
        x.par_chunks_mut(depth).enumerate().for_each(|(tile, out)| pack_x(&a, first + ROWS * tile, length, out));
        let strips = a.n.div_ceil(STRIP);
        let per_task = strips.div_ceil(4 * rayon::current_num_threads());
        (0..strips.div_ceil(per_task)).into_par_iter().for_each(|task| {
            amx::with_tiles(|| {
                let mut scratch = TASK.take();
                for strip in task * per_task..strips.min((task + 1) * per_task) {
                    product(&a, STRIP * strip, first, length, x, &mut scratch);
                }
                TASK.set(scratch);
            });
        });
    }
    LAUNCH.set(scratch);
}

/// 16 rows of [x | S | 1] from row `first` on; rows past the last are zero.
fn pack_x(a: &Args<'_>, first: usize, length: usize, out: &mut [Packed]) {
    let rows = a.m.saturating_sub(first).min(ROWS);
    let mut scratch = TASK.take();
    scratch.fit(ROWS * length, 0, 0);
    let values = &mut scratch.values[..rows * length];
    for (i, row) in values.chunks_exact_mut(length).enumerate() {
        let (x, rest) = row.split_at_mut(a.k);
        let (s, one) = rest.split_at_mut(a.extra.r);
        let m = first + i;
        x.copy_from_slice(&a.x[m * a.k..][..a.k]);
        s.copy_from_slice(&a.extra.lora_s[m * a.extra.r..][..a.extra.r]);
        one.fill(1.0);
    }
    // SAFETY: the table offers this kernel only where `amx::available`, which asks for these features too.
    unsafe { amx::pack_b_transposed(values, length, rows, length, out) };
    TASK.set(scratch);
}

/// 32 rows of [W | s·B | bias] from row `n` on times the packed rows of x, from row `m` on.
fn product(a: &Args<'_>, n: usize, m: usize, length: usize, x: &[Packed], scratch: &mut Scratch) {
    let depth = length.div_ceil(DEPTH);
    let rows = STRIP.min(a.n - n);
    let pairs = x.len() / (2 * depth);
    scratch.fit(STRIP * length, 2 * depth, pairs);
    let values = &mut scratch.values[..rows * length];
    for_simd(Simd::Avx512, Decode { a, first: n, rows: values, length });
    let strip = &mut scratch.tiles[..2 * depth];
    let blocks = &mut scratch.blocks[..pairs];
    for (tile, out) in strip.chunks_exact_mut(depth).enumerate() {
        let of_tile = rows.saturating_sub(ROWS * tile).min(ROWS);
        let values = &values[(ROWS * tile * length).min(values.len())..];
        // SAFETY: as in `pack_x`.
        unsafe { amx::pack_a(values, length, of_tile, length, out) };
    }
    // SAFETY: within `with_tiles`.
    unsafe { amx::sweep::<true>(strip, x, depth, blocks) };
    for (pair, block) in blocks.iter().enumerate() {
        for (i, tile) in block.0.iter().enumerate() {
            let (n, m) = (n + ROWS * (i / 2), m + STRIP * pair + ROWS * (i % 2));
            let (columns, rows) = (a.n.saturating_sub(n).min(ROWS), a.m.saturating_sub(m).min(ROWS));
            if rows > 0 && columns > 0 {
                // SAFETY: rows m.. and columns n.. of y are this task's; the features are there.
                unsafe { amx::store::<true>(tile, a.y.at(m, n), a.y.stride(), rows, columns, false) };
            }
        }
    }
}

/// Rows `first..` of [W | s·B | bias] into `rows`.
struct Decode<'a> {
    a: &'a Args<'a>,
    first: usize,
    rows: &'a mut [f32],
    length: usize,
}

impl Body for Decode<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let (w, extra, k) = (self.a.w, self.a.extra, self.a.k);
        let groups = w.groups(k);
        let mut scales = vec![0.0; SCALE_ROWS * groups];
        let mut mins = vec![0.0; SCALE_ROWS * groups];
        for (block, rows) in self.rows.chunks_mut(SCALE_ROWS * self.length).enumerate() {
            let first = self.first + block * SCALE_ROWS;
            let used = rows.len() / self.length * groups;
            w.read_scales::<V>(first, groups, &mut scales[..used], &mut mins[..used]);
            for (i, row) in rows.chunks_exact_mut(self.length).enumerate() {
                let (weights, rest) = row.split_at_mut(k);
                let (b, bias) = rest.split_at_mut(extra.r);
                let of_row = i * groups..(i + 1) * groups;
                w.decode_row::<V>(first + i, &scales[of_row.clone()], &mins[of_row], weights);
                let lora_b = &extra.lora_b[(first + i) * extra.r..][..extra.r];
                b.iter_mut().zip(lora_b).for_each(|(out, b)| *out = extra.s * b);
                bias.fill(extra.bias.get(first + i).copied().unwrap_or(0.0));
            }
        }
    }
}
