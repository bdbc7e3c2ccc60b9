//! A strip of W: 32 rows of its codes, and of its scales as vectors of rows.

use super::codes::{load_table, words};
use crate::ops::amx::ROWS;
use crate::ops::vector::prefetch;
use crate::ops::weights::Scales;
use std::arch::x86_64::*;

/// Rows of W in a strip: two tiles side by side.
pub(super) const STRIP: usize = 2 * ROWS;
/// Groups whose scales are read at once: 16 bytes of a row.
pub(super) const READ: usize = 8;

/// Scales or mins of `READ` groups, as vectors of 32 rows of W.
#[repr(C, align(64))]
pub(super) struct Vectors(pub [[f32; STRIP]; READ]);

/// 32 rows of an array that has a row for each of W's.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// From the strip's first row on, at least 32 rows and what a read of `READ` groups may take beyond.
    bytes: &'a [u8],
    pub stride: usize,
    /// Scales in f16, not f32.
    half: bool,
}

impl<'a> Rows<'a> {
    /// From row `first` on. Where the matrix ends too early for whole reads, `filled` takes what there is, and zeros.
    pub(super) fn new(all: &'a [u8], stride: usize, first: usize, filled: &'a mut Vec<u8>) -> Rows<'a> {
        let bytes = &all[first * stride..];
        let read = STRIP * stride + 4 * READ;
        if bytes.len() >= read {
            return Rows { bytes, stride, half: false };
        }
        filled.clear();
        filled.extend_from_slice(bytes);
        filled.resize(read, 0);
        Rows { bytes: filled, stride, half: false }
    }

    pub(super) fn of_scales(scales: Scales<'a>, groups: usize, first: usize, filled: &'a mut Vec<u8>) -> Rows<'a> {
        match scales {
            Scales::Half(bits) => {
                Rows { half: true, ..Rows::new(bytemuck::cast_slice(bits), 2 * groups, first, filled) }
            }
            Scales::Full(values) => Rows::new(bytemuck::cast_slice(values), 4 * groups, first, filled),
        }
    }

    /// Byte `column` of a row.
    pub(super) fn at(&self, row: usize, column: usize) -> *const u8 {
        self.bytes[row * self.stride + column..].as_ptr()
    }

    /// Asks for as many bytes of the next strip as 32 rows have in `bytes` columns from `column` on, in the order in
    /// which they lie: the processor's own prefetch does not follow 32 rows at once.
    #[inline(always)]
    pub(super) fn prefetch(&self, column: usize, bytes: usize) {
        prefetch(self.bytes.as_ptr().wrapping_add((self.stride + column) * STRIP), bytes * STRIP);
    }

    /// `READ` groups from `group` on; what lies beyond a row's end is whatever follows.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    #[inline]
    pub(super) fn read(&self, group: usize, out: &mut Vectors) {
        let size = if self.half { 2 } else { 4 };
        self.prefetch(group * size, READ * size);
        // The lower halves of the words, then the upper ones.
        let halves: [u16; 32] = std::array::from_fn(|i| (i % 16 * 2 + i / 16) as u16);
        let halves = load_table(&halves);
        for row in [0, ROWS] {
            let from = |group: usize| self.at(row, group * size);
            let store = |out: &mut [f32; STRIP], values: __m512| {
                // SAFETY: sixteen numbers.
                unsafe { _mm512_storeu_ps(out[row..][..ROWS].as_mut_ptr(), values) };
            };
            if self.half {
                // SAFETY: `new` saw to whole reads.
                let pairs = unsafe { words(from(group), self.stride) };
                for (pair, out) in pairs.into_iter().zip(out.0.as_chunks_mut::<2>().0) {
                    let pair = _mm512_permutexvar_epi16(halves, pair);
                    store(&mut out[0], _mm512_cvtph_ps(_mm512_castsi512_si256(pair)));
                    store(&mut out[1], _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(pair)));
                }
            } else {
                for (quad, out) in out.0.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    // SAFETY: as above.
                    let words = unsafe { words(from(group + 4 * quad), self.stride) };
                    for (values, out) in words.into_iter().zip(out) {
                        store(out, _mm512_castsi512_ps(values));
                    }
                }
            }
        }
    }
}
