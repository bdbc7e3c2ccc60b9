//! `cosine_topk` on AMX tiles (x86-64, Linux): 32 rows by 32 queries at a time.
//!
//! ```text
//! queries and rows rounded to bf16, products exact, sums in f32; codes as they are, sums exact in i32
//! for each split, threads side by side
//!     for 32 rows, as tiles of A:   for 32 queries, as tiles of B from the launch's beginning:
//!         C[32,32] = A·B;   put in their lists those that reach the lists' thresholds, 16 compared at a time
//! ```
//!
//! 1. A cycle has 512 products of bf16, or 1024 of codes, where AVX-512 has 32 in f32 (64 at best). What rounding moves a
//!    score by is bounded, and a few dozen candidates more than asked for prove the hits; products of a number's two parts
//!    would need a dozen, but thrice the work.
//! 2. While the tiles work, the next rows come from memory: their lines are asked for between the products.
//!
//! A tile of A is 16 rows of 64 bytes along the sum, one of B the same of its transpose, four bytes of a query side by
//! side (Intel SDM, TDPBF16PS and TDPBSSD).

use super::cpu::{arguments, lists_of_splits, Args, Rows};
use super::select::Lists;
use super::CODE_PITCH;
use crate::op::*;
use crate::ops::amx::with_tiles;
use crate::ops::vector::LANES;
use half::{bf16, f16};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows, and queries, of a block.
const BLOCK: usize = 32;
/// Numbers in a tile's row: bf16, codes.
const DEPTH: usize = 32;
const DEPTH_I8: usize = 64;
/// Tiles of 32 rows, or queries, at one depth.
const HALVES: usize = 2;

/// 16 rows of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([u8; 1024]);

const ZERO: Tile = Tile([0; 1024]);

/// Scores of 32 rows with 32 queries, four tiles: rows 0..16 with queries 0..16, then 16..32; the other rows likewise.
#[repr(C, align(64))]
struct Block([u32; 4 * 256]);

/// True when the tiles multiply codes too.
pub fn has_amx_int8(d: &Dims, caps: &Caps) -> bool {
    // Leaf 7, bit 25 of edx: AMX-INT8.
    has_amx(d, caps) && __cpuid_count(7, 0).edx >> 25 & 1 == 1
}

/// Runs a launch.
pub fn launch(format: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(format, args);
    let queries = Queries::new(d, &a);
    lists_of_splits(d, a.ids, a.scores, |rows| {
        let mut lists = Lists::new(d["K"], a.floor, d["Q"].next_multiple_of(BLOCK), a.filter, d["BASE"]);
        // SAFETY: the table offers these kernels only where `has_amx`, which asks for these features too.
        with_tiles(|| unsafe { split(d["D"], rows, a.rows, &queries, &mut lists) });
        lists.into_best()
    });
}

/// The queries as tiles of B, block after block, in each depth after depth.
struct Queries {
    tiles: Vec<Tile>,
    depth: usize,
    /// For codes, one a query counted up to whole blocks.
    scales: Vec<f32>,
}

impl Queries {
    fn new(d: &Dims, a: &Args<'_>) -> Queries {
        let (queries, width) = (d["Q"], d["D"]);
        let padded = queries.next_multiple_of(BLOCK);
        if let Rows::I8 { q, q_scales, .. } = a.rows {
            let (depth, pitch) = (width.div_ceil(DEPTH_I8), width.next_multiple_of(CODE_PITCH));
            let mut tiles = vec![ZERO; padded / BLOCK * depth * HALVES];
            for (n, codes) in q.chunks(pitch).enumerate() {
                for (step, codes) in codes[..width].chunks(DEPTH_I8).enumerate() {
                    let tile = &mut tiles[(n / BLOCK * depth + step) * HALVES + n % BLOCK / 16].0;
                    for (i, code) in codes.iter().enumerate() {
                        tile[i / 4 * 64 + n % 16 * 4 + i % 4] = *code as u8;
                    }
                }
            }
            let mut scales = q_scales.to_vec();
            scales.resize(padded, 0.0);
            return Queries { tiles, depth, scales };
        }
        let depth = width.div_ceil(DEPTH);
        let mut tiles = vec![ZERO; padded / BLOCK * depth * HALVES];
        for (n, query) in a.q.chunks(width).enumerate() {
            for (step, values) in query.chunks(DEPTH).enumerate() {
                let tile = &mut tiles[(n / BLOCK * depth + step) * HALVES + n % BLOCK / 16].0;
                for (i, value) in values.iter().enumerate() {
                    let at = i / 2 * 64 + n % 16 * 4 + i % 2 * 2;
                    tile[at..at + 2].copy_from_slice(&bf16::from_f32(*value).to_bits().to_le_bytes());
                }
            }
        }
        Queries { tiles, depth, scales: Vec::new() }
    }
}

/// The rows of one split, with all queries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn split(width: usize, rows: Range<usize>, corpus: Rows<'_>, queries: &Queries, lists: &mut Lists<'_>) {
    let depth = queries.depth;
    let mut a = vec![ZERO; depth * HALVES];
    let mut block = Block([0; 4 * 256]);
    let (first_byte, row_bytes) = match corpus {
        Rows::F32(rows) => (rows.as_ptr().cast::<u8>(), 4 * width),
        Rows::F16(rows) => (rows.as_ptr().cast::<u8>(), 2 * width),
        Rows::I8 { codes, .. } => (codes.as_ptr().cast::<u8>(), width.next_multiple_of(CODE_PITCH)),
    };
    let blocks = queries.tiles.chunks_exact(depth * HALVES);
    // Lines to ask for at each depth of each block of queries, so that the next 32 rows are all asked for.
    let lines = (BLOCK * row_bytes).div_ceil(64).div_ceil(depth * blocks.len());
    for first in rows.clone().step_by(BLOCK) {
        let some = first..(first + BLOCK).min(rows.end);
        if lists.skips(some.clone()) {
            continue;
        }
        match corpus {
            Rows::F32(all) => round_rows(some.clone(), width, all, &mut a, |all| whole_f32(all), |some| load_f32(some)),
            Rows::F16(all) => round_rows(some.clone(), width, all, &mut a, |all| whole_f16(all), |some| load_f16(some)),
            Rows::I8 { codes, .. } => copy_codes(some.clone(), row_bytes, codes, &mut a),
        }
        let mut ahead = first_byte.wrapping_add((first + BLOCK) * row_bytes);
        for (number, b) in blocks.clone().enumerate() {
            // SAFETY: within `with_tiles`; A and B are of this depth.
            unsafe {
                match corpus {
                    Rows::I8 { .. } => multiply_i8(&a, b, depth, &mut block, ahead, lines),
                    _ => multiply_bf16(&a, b, depth, &mut block, ahead, lines),
                }
            }
            ahead = ahead.wrapping_add(64 * lines * depth);
            offer(&block, some.clone(), number * BLOCK, corpus, queries, lists);
        }
    }
}

/// Puts the scores of a block in the lists where they reach the thresholds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn offer(block: &Block, rows: Range<usize>, query: usize, corpus: Rows<'_>, queries: &Queries, lists: &mut Lists<'_>) {
    for half in 0..BLOCK / LANES {
        let query = query + half * LANES;
        // SAFETY: sixteen numbers.
        let mut enter = unsafe { _mm512_loadu_ps(lists.enter(query).as_ptr()) };
        for (r, row) in rows.clone().enumerate() {
            let tile = r / 16 * 2 + half;
            let line = &block.0[tile * 256 + r % 16 * 16..][..16];
            let scores = if let Rows::I8 { scales, .. } = corpus {
                // SAFETY: sixteen numbers each.
                let (sums, of_queries) = unsafe {
                    (_mm512_loadu_si512(line.as_ptr().cast()), _mm512_loadu_ps(queries.scales[query..][..16].as_ptr()))
                };
                _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(of_queries, _mm512_set1_ps(scales[row])))
            } else {
                // SAFETY: sixteen numbers.
                unsafe { _mm512_loadu_ps(line.as_ptr().cast()) }
            };
            let which = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(scores, enter);
            if which != 0 {
                let mut lanes = [0.0; LANES];
                // SAFETY: sixteen numbers.
                unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), scores) };
                lists.put(row, query, &lanes, which);
                // SAFETY: sixteen numbers.
                enter = unsafe { _mm512_loadu_ps(lists.enter(query).as_ptr()) };
            }
        }
    }
}

/// Up to 32 rows as tiles of A, rounded to the nearest bf16. `whole` gives 16 numbers, `part` fewer and zeros: masks are
/// worked out for the end of a row alone. What is past the rows stays as it was: no one reads those scores.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn round_rows<T>(
    rows: Range<usize>,
    width: usize,
    all: &[T],
    a: &mut [Tile],
    whole: impl Fn(&[T; LANES]) -> __m512,
    part: impl Fn(&[T]) -> __m512,
) {
    for (r, row) in rows.enumerate() {
        let (steps, rest) = all[row * width..(row + 1) * width].as_chunks::<DEPTH>();
        let mut tiles = a.chunks_exact_mut(HALVES).map(|tiles| &mut tiles[r / 16].0[r % 16 * 64..][..64]);
        for (values, line) in steps.iter().zip(&mut tiles) {
            let (low, high) = values.split_at(LANES);
            let both = |some: &[T]| whole(some.first_chunk().expect("half of 32"));
            store_bf16(line, both(low), both(high));
        }
        if let (false, Some(line)) = (rest.is_empty(), tiles.next()) {
            let (low, high) = rest.split_at(rest.len().min(LANES));
            store_bf16(line, part(low), part(high));
        }
    }
}

/// 32 numbers as a line of a tile.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn store_bf16(line: &mut [u8], low: __m512, high: __m512) {
    let line: &mut [u8; 64] = line.try_into().expect("a row of a tile");
    // SAFETY: 32 bf16 as their bits, 64 bytes.
    unsafe {
        let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        _mm512_storeu_si512(line.as_mut_ptr().cast(), both);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn whole_f32(from: &[f32; LANES]) -> __m512 {
    // SAFETY: sixteen numbers.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

#[target_feature(enable = "avx512f,avx512vl")]
#[inline]
fn whole_f16(from: &[f16; LANES]) -> __m512 {
    // SAFETY: sixteen numbers.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.as_ptr().cast()) })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_f32(from: &[f32]) -> __m512 {
    // SAFETY: as many numbers as the mask has bits are read.
    unsafe { _mm512_maskz_loadu_ps(mask(from.len()), from.as_ptr()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn load_f16(from: &[f16]) -> __m512 {
    // SAFETY: as many numbers as the mask has bits are read.
    _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask(from.len()), from.as_ptr().cast()) })
}

/// As many bits, at most 16.
#[inline]
fn mask(count: usize) -> u16 {
    ((1u32 << count) - 1) as u16
}

/// Up to 32 rows of codes as tiles of A.
fn copy_codes(rows: Range<usize>, pitch: usize, codes: &[i8], a: &mut [Tile]) {
    for (r, row) in rows.enumerate() {
        let codes: &[u8] = bytemuck::cast_slice(&codes[row * pitch..(row + 1) * pitch]);
        for (codes, tiles) in codes.chunks(DEPTH_I8).zip(a.chunks_exact_mut(HALVES)) {
            tiles[r / 16].0[r % 16 * 64..][..codes.len()].copy_from_slice(codes);
        }
    }
}

/// C = A·B over `depth`, 32 rows by 32 queries, by one of the two instructions. Asks for `lines` lines from `ahead` on at
/// each depth.
macro_rules! multiply {
    ($name:ident, $instruction:literal) => {
        /// # Safety
        /// Called from within [`with_tiles`], on a processor that has the instruction.
        #[inline]
        unsafe fn $name(a: &[Tile], b: &[Tile], depth: usize, c: &mut Block, ahead: *const u8, lines: usize) {
            assert!(depth > 0 && a.len() == HALVES * depth && b.len() == HALVES * depth);
            // SAFETY: A and B hold `depth` times two tiles, which is what the loop reads, and C four. A prefetch of any
            // address is no access.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{a} + {row}*1]",
                    "tileloadd tmm6, [{b} + {row}*1]",
                    concat!($instruction, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{b} + {row}*1 + 1024]",
                    concat!($instruction, " tmm1, tmm4, tmm7"),
                    "tileloadd tmm5, [{a} + {row}*1 + 1024]",
                    concat!($instruction, " tmm2, tmm5, tmm6"),
                    concat!($instruction, " tmm3, tmm5, tmm7"),
                    "mov {i}, {lines}",
                    "test {i}, {i}",
                    "jz 4f",
                    "3:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "dec {i}",
                    "jnz 3b",
                    "4:",
                    "add {a}, 2048",
                    "add {b}, 2048",
                    "dec {depth}",
                    "jnz 2b",
                    "tilestored [{c} + {row}*1], tmm0",
                    "tilestored [{c} + {row}*1 + 1024], tmm1",
                    "tilestored [{c} + {row}*1 + 2048], tmm2",
                    "tilestored [{c} + {row}*1 + 3072], tmm3",
                    depth = inout(reg) depth => _,
                    a = inout(reg) a.as_ptr() => _,
                    b = inout(reg) b.as_ptr() => _,
                    c = in(reg) c as *mut Block,
                    ahead = inout(reg) ahead => _,
                    lines = in(reg) lines,
                    i = out(reg) _,
                    row = in(reg) 64usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}
multiply!(multiply_bf16, "tdpbf16ps");
multiply!(multiply_i8, "tdpbssd");
