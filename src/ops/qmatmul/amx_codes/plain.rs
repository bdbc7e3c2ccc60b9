//! How 16 rows of plain weights become tiles of B: a word of B is two columns of a row, as they lie in bf16.

use super::codes::{load_table, store_row, words, Codes};
use crate::ops::amx::{Tile, DEPTH, PARTS};
use std::arch::x86_64::*;

/// Columns as they lie.
const fn in_order() -> [u16; DEPTH] {
    let mut order = [0; DEPTH];
    let mut place = 0;
    while place < DEPTH {
        order[place] = place as u16;
        place += 1;
    }
    order
}

/// bf16: itself.
#[derive(Clone, Copy)]
pub(super) struct Bf16;
/// f16: 11 bits are 8 of one bf16 and 3 of another.
#[derive(Clone, Copy)]
pub(super) struct F16;
/// f32: 24 bits are 8 of each of three.
#[derive(Clone, Copy)]
pub(super) struct F32;

impl Codes for Bf16 {
    const TILES: usize = 1;
    const BYTES: usize = 64;
    const ORDER: [u16; DEPTH] = in_order();

    #[inline(always)]
    unsafe fn unpack(self, codes: *const u8, stride: usize, out: *mut Tile, _: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            for quarter in 0..4 {
                for (i, words) in words(codes.add(16 * quarter), stride).into_iter().enumerate() {
                    store_row(out, 4 * quarter + i, words);
                }
            }
        }
    }
}

impl Codes for F16 {
    const TILES: usize = 2;
    const BYTES: usize = 64;
    const ORDER: [u16; DEPTH] = in_order();

    #[inline(always)]
    unsafe fn unpack(self, codes: *const u8, stride: usize, out: *mut Tile, apart: usize) {
        // The even columns of all words, then the odd ones.
        let halves: [u16; 32] = std::array::from_fn(|i| (i % 16 * 2 + i / 16) as u16);
        // SAFETY: the caller's promise.
        unsafe {
            let halves = load_table(&halves);
            for quarter in 0..4 {
                for (i, words) in words(codes.add(16 * quarter), stride).into_iter().enumerate() {
                    let both = _mm512_permutexvar_epi16(halves, words);
                    let even = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
                    let odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(both));
                    split::<2>(even, odd, out, apart, 4 * quarter + i);
                }
            }
        }
    }
}

impl Codes for F32 {
    const TILES: usize = PARTS;
    const BYTES: usize = 128;
    const ORDER: [u16; DEPTH] = in_order();

    #[inline(always)]
    unsafe fn unpack(self, codes: *const u8, stride: usize, out: *mut Tile, apart: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            for eighth in 0..8 {
                let columns = words(codes.add(16 * eighth), stride).map(|words| _mm512_castsi512_ps(words));
                for (i, [even, odd]) in columns.as_chunks::<2>().0.iter().enumerate() {
                    split::<PARTS>(*even, *odd, out, apart, 2 * eighth + i);
                }
            }
        }
    }
}

/// Row `row` of `N` tiles from two columns of 16 rows of W: their upper halves, those of what is left, and so on. Each
/// half takes 8 bits of the number, so that nothing is left after as many as its format needs.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn split<const N: usize>(mut even: __m512, mut odd: __m512, out: *mut Tile, apart: usize, row: usize) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for part in 0..N {
        let tops = [even, odd].map(|v| _mm512_and_si512(_mm512_castps_si512(v), upper));
        // SAFETY: the caller's tiles.
        unsafe { store_row(out.add(part * apart), row, _mm512_or_si512(_mm512_srli_epi32::<16>(tops[0]), tops[1])) };
        even = _mm512_sub_ps(even, _mm512_castsi512_ps(tops[0]));
        odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(tops[1]));
    }
}
