//! `qmatmul_t` on AMX tiles: f32 in and out, each number the sum of three bf16 ([`crate::ops::amx`])
//!
//! ```text
//! for a panel of rows of [W; A]
//!     decode it; pack these columns of [dy | dS] as tiles of A
//!     for 32 columns of the panel, threads side by side
//!         pack them as tiles of B; dx[M, 32 columns] += [dy | dS] · panel      two by two tiles of C
//! ```
//!
//! A panel has the same rows whatever the number of threads, so dx is the same sum in the same order.

use super::cpu::{arguments, Args, Decode};
use crate::op::*;
use crate::ops::amx::{self, Packed, Scratch, DEPTH, ROWS};
use crate::ops::vector::for_simd;
use rayon::prelude::*;
use std::cell::Cell;

thread_local! {
    static LAUNCH: Cell<Scratch> = Cell::default();
    static TASK: Cell<Scratch> = Cell::default();
}

/// Decoded weights held at a time, in values.
const PANEL: usize = 1 << 18;
/// Columns of dx in a strip: two tiles.
const STRIP: usize = 2 * ROWS;

/// dx as tasks share it: each writes its own columns.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: tasks write columns that are theirs alone.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// The launch.
pub fn launch(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    let terms = a.n + a.r;
    if a.m == 0 || a.k == 0 || terms == 0 {
        if d["ACC"] == 0 {
            a.dx.fill(0.0);
        }
        return;
    }
    // Decoded weights serve a block of rows; 512 make decoding cheap beside their products.
    let block = STRIP * amx::even(a.m.div_ceil(STRIP), 16);
    let deepest = amx::far_depth(block / ROWS).min((PANEL / a.k / DEPTH).max(1));
    let panel_rows = DEPTH * amx::even(terms.div_ceil(DEPTH), deepest);
    let mut scratch = LAUNCH.take();
    for (m, first) in (0..a.m).step_by(block).flat_map(|m| (0..terms).step_by(panel_rows).map(move |first| (m, first)))
    {
        let rows = panel_rows.min(terms - first);
        let depth = rows.div_ceil(DEPTH);
        let tiles = block.min(a.m - m).div_ceil(STRIP) * 2;
        scratch.fit(rows * a.k, tiles * depth, 0);
        let panel = &mut scratch.values[..rows * a.k];
        panel.par_chunks_mut(ROWS * a.k).enumerate().for_each(|(i, rows)| decode(&a, first + ROWS * i, rows));
        let dy = &mut scratch.tiles[..tiles * depth];
        dy.par_chunks_mut(depth).enumerate().for_each(|(tile, out)| pack_dy(&a, m + ROWS * tile, first, rows, out));
        let dx = Shared(a.dx.as_mut_ptr());
        let strips = a.k.div_ceil(STRIP);
        let per_task = strips.div_ceil(4 * rayon::current_num_threads());
        let add = d["ACC"] == 1 || first > 0;
        (0..strips.div_ceil(per_task)).into_par_iter().for_each(|task| {
            amx::with_tiles(|| {
                let mut scratch = TASK.take();
                for strip in task * per_task..strips.min((task + 1) * per_task) {
                    product(&a, dx, (m, STRIP * strip), panel, dy, add, &mut scratch);
                }
                TASK.set(scratch);
            });
        });
    }
    LAUNCH.set(scratch);
}

/// Rows `first..` of [W; A].
fn decode(a: &Args<'_>, first: usize, rows: &mut [f32]) {
    let of_w = a.n.saturating_sub(first).min(rows.len() / a.k);
    let (of_w, of_a) = rows.split_at_mut(of_w * a.k);
    for_simd(Simd::Avx512, Decode { w: a.w, first, rows: of_w, k: a.k });
    if !of_a.is_empty() {
        let from = (first + of_w.len() / a.k - a.n) * a.k;
        of_a.copy_from_slice(&a.lora_a[from..from + of_a.len()]);
    }
}

/// 16 rows of [dy | dS] from row `m` on, columns `first..first + length`; rows past the last are zero.
fn pack_dy(a: &Args<'_>, m: usize, first: usize, length: usize, out: &mut [Packed]) {
    let rows = a.m.saturating_sub(m).min(ROWS);
    let mut scratch = TASK.take();
    scratch.fit(ROWS * length, 0, 0);
    let values = &mut scratch.values[..rows * length];
    let of_dy = a.n.saturating_sub(first).min(length);
    for (i, row) in values.chunks_exact_mut(length).enumerate() {
        let (dy, ds) = row.split_at_mut(of_dy);
        let i = m + i;
        if !dy.is_empty() {
            dy.copy_from_slice(&a.dy[i * a.ldy + first..][..of_dy]);
        }
        if !ds.is_empty() {
            ds.copy_from_slice(&a.ds[i * a.r + first + of_dy - a.n..][..ds.len()]);
        }
    }
    // SAFETY: the table offers this kernel only where `amx::available`, which asks for these features too.
    unsafe { amx::pack_a(values, length, rows, length, out) };
    TASK.set(scratch);
}

/// dx from row m and column k on, 32 columns of it: the packed rows of dy times those columns of the panel.
fn product(
    a: &Args<'_>,
    dx: Shared,
    (m, k): (usize, usize),
    panel: &[f32],
    dy: &[Packed],
    add: bool,
    scratch: &mut Scratch,
) {
    let rows = panel.len() / a.k;
    let depth = rows.div_ceil(DEPTH);
    let pairs = dy.len() / (2 * depth);
    scratch.fit(0, 2 * depth, pairs);
    let strip = &mut scratch.tiles[..2 * depth];
    for (tile, out) in strip.chunks_exact_mut(depth).enumerate() {
        let k = k + ROWS * tile;
        let width = a.k.saturating_sub(k).min(ROWS);
        for (i, out) in out.iter_mut().enumerate() {
            let rows = if width > 0 { DEPTH.min(rows - DEPTH * i) } else { 0 };
            let from = (DEPTH * i * a.k + k).min(panel.len());
            // SAFETY: as in `pack_dy`.
            unsafe { amx::pack_b(&panel[from..], a.k, rows, width, out) };
        }
    }
    let blocks = &mut scratch.blocks[..pairs];
    // SAFETY: within `with_tiles`.
    unsafe { amx::sweep::<false>(strip, dy, depth, blocks) };
    for (pair, block) in blocks.iter().enumerate() {
        for (i, tile) in block.0.iter().enumerate() {
            let (m, k) = (m + STRIP * pair + ROWS * (i / 2), k + ROWS * (i % 2));
            let (rows, columns) = (a.m.saturating_sub(m).min(ROWS), a.k.saturating_sub(k).min(ROWS));
            if rows > 0 && columns > 0 {
                // SAFETY: rows m.. and columns k.. of dx[M,K] are this task's; the features are there.
                unsafe { amx::store::<false>(tile, dx.0.add(m * a.k + k), a.k, rows, columns, add) };
            }
        }
    }
}
