//! How 16 rows of W become tiles of B: the trait, and codes.

use crate::ops::amx::{Tile, DEPTH, PARTS};
use crate::quant::nf4::LEVELS;
use std::arch::asm;
use std::arch::x86_64::*;

/// How 16 rows of a format become tiles of B.
pub(super) trait Codes: Copy + Sync {
    /// Tiles of B for 32 columns of 16 rows.
    const TILES: usize;
    /// Bytes of 32 columns.
    const BYTES: usize;
    /// Which column lies at each place along the sum.
    const ORDER: [u16; DEPTH];

    /// 32 columns of 16 rows, `stride` bytes from one row to the next, as tiles at `out`, `apart` tiles from one to the
    /// next.
    ///
    /// # Safety
    /// The rows' bytes and the tiles are there; so are AVX-512 F, BW, DQ and VL.
    unsafe fn unpack(self, codes: *const u8, stride: usize, out: *mut Tile, apart: usize);
}

/// The bf16 of 16 numbers, twice, so that a look-up by 5 bits needs no mask for 4.
const fn table(numbers: [f32; 16], part: usize) -> [u16; 32] {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        let mut rest = numbers[i % 16];
        let mut p = 0;
        loop {
            // To the nearest; none of these numbers is a tie.
            let bits = rest.to_bits();
            table[i] = ((bits + 0x8000) >> 16) as u16;
            if p == part {
                break;
            }
            rest -= f32::from_bits((table[i] as u32) << 16);
            p += 1;
        }
        i += 1;
    }
    table
}

/// factor · 0..16, or with `signed` factor · (0..8, −8..0).
const fn integers(factor: f32, signed: bool) -> [f32; 16] {
    let mut numbers = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        let value = if signed && i >= 8 { i as i32 - 16 } else { i as i32 };
        numbers[i] = factor * value as f32;
        i += 1;
    }
    numbers
}

/// Place 2p + h, p = 4c + j, holds column 8c + 4h + j: word c of a row has columns 8c.., four in each half h, and j is
/// how far it is shifted. With `high_first` the high half of a byte is the even column.
const fn nibble_order(high_first: bool) -> [u16; DEPTH] {
    let mut order = [0; DEPTH];
    let mut place = 0;
    while place < DEPTH {
        let (c, j, half) = (place / 8, place / 2 % 4, place % 2);
        let j = if high_first { j ^ 1 } else { j };
        order[place] = (8 * c + 4 * half + j) as u16;
        place += 1;
    }
    order
}

/// Place 2p + h, p = 2c + i, holds column 4c + 2h + i: word c of a row has columns 4c.., two in each half h.
const fn byte_order() -> [u16; DEPTH] {
    let mut order = [0; DEPTH];
    let mut place = 0;
    while place < DEPTH {
        let (c, i, half) = (place / 4, place / 2 % 2, place % 2);
        order[place] = (4 * c + 2 * half + i) as u16;
        place += 1;
    }
    order
}

static SMALL: [u16; 32] = table(integers(1.0, false), 0);
static SIXTEENS: [u16; 32] = table(integers(16.0, true), 0);
static LEVEL_PARTS: [[u16; 32]; PARTS] = [table(LEVELS, 0), table(LEVELS, 1), table(LEVELS, 2)];

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_table(table: &[u16; 32]) -> __m512i {
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
}

/// q4.
#[derive(Clone, Copy)]
pub(super) struct Nibbles;
/// q8.
#[derive(Clone, Copy)]
pub(super) struct Bytes;
/// nf4 and nf4dq.
#[derive(Clone, Copy)]
pub(super) struct Levels;

impl Codes for Nibbles {
    const TILES: usize = 1;
    const BYTES: usize = 16;
    const ORDER: [u16; DEPTH] = nibble_order(false);

    #[inline(always)]
    unsafe fn unpack(self, codes: *const u8, stride: usize, out: *mut Tile, _: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let small = load_table(&SMALL);
            for (c, words) in words(codes, stride).into_iter().enumerate() {
                look_up(words, small, out, 4 * c);
            }
        }
    }
}

impl Codes for Levels {
    const TILES: usize = PARTS;
    const BYTES: usize = 16;
    const ORDER: [u16; DEPTH] = nibble_order(true);

    #[inline(always)]
    unsafe fn unpack(self, codes: *const u8, stride: usize, out: *mut Tile, apart: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let parts = [0, 1, 2].map(|part| load_table(&LEVEL_PARTS[part]));
            for (c, words) in words(codes, stride).into_iter().enumerate() {
                for (part, table) in parts.into_iter().enumerate() {
                    look_up(words, table, out.add(part * apart), 4 * c);
                }
            }
        }
    }
}

impl Codes for Bytes {
    const TILES: usize = 2;
    const BYTES: usize = 32;
    const ORDER: [u16; DEPTH] = byte_order();

    #[inline(always)]
    unsafe fn unpack(self, codes: *const u8, stride: usize, out: *mut Tile, apart: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let (low, high) = (load_table(&SMALL), load_table(&SIXTEENS));
            for half in 0..2 {
                for (c, words) in words(codes.add(16 * half), stride).into_iter().enumerate() {
                    let row = 8 * half + 2 * c;
                    store_row(out, row, _mm512_permutexvar_epi16(words, low));
                    store_row(out, row + 1, _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(words), low));
                    let out = out.add(apart);
                    store_row(out, row, _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(words), high));
                    store_row(out, row + 1, _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(words), high));
                }
            }
        }
    }
}

/// 16 bytes of each of 16 rows, as the rows' first words side by side, then their second ones, third and fourth.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn words(rows: *const u8, mut stride: usize) -> [__m512i; 4] {
    // SAFETY: does nothing, but keeps the compiler from holding 16 multiples of the stride on the stack.
    unsafe { asm!("/* {} */", inout(reg) stride, options(nomem, nostack, preserves_flags)) };
    // Rows 4i + j in lane i of vector j: after two exchanges within lanes, row n's word is word n.
    let quads: [__m512i; 4] = std::array::from_fn(|j| {
        // SAFETY: the rows are there.
        let row = |i: usize| unsafe { _mm_loadu_si128(rows.add((4 * i + j) * stride).cast()) };
        let quad = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(row(0)), row(1));
        _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(quad, row(2)), row(3))
    });
    let (a, b) = (_mm512_unpacklo_epi32(quads[0], quads[1]), _mm512_unpackhi_epi32(quads[0], quads[1]));
    let (c, d) = (_mm512_unpacklo_epi32(quads[2], quads[3]), _mm512_unpackhi_epi32(quads[2], quads[3]));
    let lower = [_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c)];
    let upper = [_mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)];
    [lower[0], lower[1], upper[0], upper[1]]
}

/// Four rows of a tile: the first to fourth 4 bits of each half of the words.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn look_up(words: __m512i, table: __m512i, out: *mut Tile, row: usize) {
    // SAFETY: the tile is there.
    unsafe {
        store_row(out, row, _mm512_permutexvar_epi16(words, table));
        store_row(out, row + 1, _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(words), table));
        store_row(out, row + 2, _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(words), table));
        store_row(out, row + 3, _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(words), table));
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn store_row(tile: *mut Tile, row: usize, values: __m512i) {
    // SAFETY: a tile has 16 rows of 64 bytes, aligned to 64.
    unsafe { _mm512_store_si512(tile.cast::<__m512i>().add(row), values) }
}
