//! `cosine_topk` over codes with AVX-512 VNNI: exact sums in i32, four products a lane and instruction.
//!
//! ```text
//! tile[r, q] += Σ of 4: (code of q + 128) · code of r      a row's four codes broadcast, 16 queries' from a transposed copy
//! Σ code of q · code of r = tile[r, q] − 128 · Σ codes of r
//! ```
//!
//! The instruction multiplies unsigned by signed bytes, so queries have 128 added, which what a row's codes sum to takes
//! away again.

use super::cpu::{arguments, lists_of_splits, Rows};
use super::select::Lists;
use super::CODE_PITCH;
use crate::op::*;
use crate::ops::vector::LANES;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows and vectors of queries in a tile: 24 of the 32 registers.
const ROWS: usize = 12;
const VECTORS: usize = 2;
/// Rows that stay in a core's first cache while all queries meet them.
const NEAR: usize = 5 * ROWS;
/// The longest rows: 255·127 of them stay below 2³¹.
const MAX_WIDTH: usize = 1 << 16;

pub fn has_vnni(d: &Dims, caps: &Caps) -> bool {
    has_avx512(d, caps) && is_x86_feature_detected!("avx512vnni") && d["D"] <= MAX_WIDTH
}

/// What a launch reads.
#[derive(Clone, Copy)]
struct Operands<'a> {
    /// Bytes of a row.
    pitch: usize,
    codes: &'a [i8],
    scales: &'a [f32],
    /// Panels [pitch/4][32 queries][4], 128 added.
    queries: &'a [[u8; 64]],
    /// Counted up to whole panels.
    q_scales: &'a [f32],
}

/// Runs a launch.
pub fn launch(d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments("i8", args);
    let Rows::I8 { codes, scales, q, q_scales } = a.rows else { unreachable!("a kernel of codes") };
    let pitch = d["D"].next_multiple_of(CODE_PITCH);
    let padded = d["Q"].next_multiple_of(VECTORS * LANES);
    let mut queries = vec![[128u8; 64]; padded / LANES * pitch / 4];
    for (n, codes) in q.chunks(pitch).enumerate() {
        let (panel, lane) = (n / (VECTORS * LANES), n % (VECTORS * LANES));
        for (step, four) in codes.as_chunks::<4>().0.iter().enumerate() {
            let vector = &mut queries[(panel * pitch / 4 + step) * VECTORS + lane / LANES];
            vector[lane % LANES * 4..][..4].copy_from_slice(&four.map(|code| (code as u8).wrapping_add(128)));
        }
    }
    let mut q_scales = q_scales.to_vec();
    q_scales.resize(padded, 0.0);
    let operands = Operands { pitch, codes, scales, queries: &queries, q_scales: &q_scales };
    lists_of_splits(d, a.ids, a.scores, |rows| {
        let mut lists = Lists::new(d["K"], a.floor, padded, a.filter, d["BASE"]);
        // SAFETY: the table offers this kernel only where `has_vnni`.
        unsafe { split(operands, rows, &mut lists) };
        lists.into_best()
    });
}

/// The rows of one split, with all queries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn split(o: Operands<'_>, rows: Range<usize>, lists: &mut Lists<'_>) {
    for first in rows.clone().step_by(NEAR) {
        let some = first..(first + NEAR).min(rows.end);
        if lists.skips(some.clone()) {
            continue;
        }
        let mut extra = [0; NEAR];
        for (extra, row) in extra.iter_mut().zip(o.codes[some.start * o.pitch..].chunks_exact(o.pitch)) {
            *extra = 128 * row.iter().map(|code| *code as i32).sum::<i32>();
        }
        for (panel, queries) in o.queries.chunks_exact(o.pitch / 4 * VECTORS).enumerate() {
            let mut row = some.start;
            while row + ROWS <= some.end {
                tile::<ROWS>(o, row, panel, queries, &extra[row - some.start..], lists);
                row += ROWS;
            }
            for row in row..some.end {
                tile::<1>(o, row, panel, queries, &extra[row - some.start..], lists);
            }
        }
    }
}

/// R rows from `row` on with the queries of a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn tile<const R: usize>(
    o: Operands<'_>,
    row: usize,
    panel: usize,
    queries: &[[u8; 64]],
    extra: &[i32],
    lists: &mut Lists<'_>,
) {
    let rows: &[u8] = bytemuck::cast_slice(&o.codes[row * o.pitch..(row + R) * o.pitch]);
    let mut sums = [[_mm512_setzero_si512(); VECTORS]; R];
    for (step, queries) in queries.as_chunks::<VECTORS>().0.iter().enumerate() {
        // SAFETY: 64 bytes each.
        let queries = queries.map(|vector| unsafe { _mm512_loadu_si512(vector.as_ptr().cast()) });
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: row r < R has pitch/4 fours of codes, as a panel has steps.
            let four = unsafe { rows.as_ptr().add(r * o.pitch + 4 * step).cast::<i32>().read_unaligned() };
            let four = _mm512_set1_epi32(four);
            for (sum, queries) in sums.iter_mut().zip(queries) {
                *sum = _mm512_dpbusd_epi32(*sum, queries, four);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (vector, sum) in sums.into_iter().enumerate() {
            let query = (panel * VECTORS + vector) * LANES;
            let exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(extra[r]));
            // SAFETY: sixteen numbers each.
            let (of_queries, enter) = unsafe {
                (_mm512_loadu_ps(o.q_scales[query..][..16].as_ptr()), _mm512_loadu_ps(lists.enter(query).as_ptr()))
            };
            let scale = _mm512_mul_ps(of_queries, _mm512_set1_ps(o.scales[row + r]));
            let scores = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale);
            let which = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(scores, enter);
            if which != 0 {
                let mut lanes = [0.0; LANES];
                // SAFETY: sixteen numbers.
                unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), scores) };
                lists.put(row + r, query, &lanes, which);
            }
        }
    }
}
