//! Vectors of W values side by side, and the one loop that attention's products are, forward and backward.

use super::simd;

/// One value for each lane, on cache lines of its own: a vector load that straddles two costs double.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Lanes<const W: usize>(pub [f32; W]);

impl<const W: usize> Lanes<W> {
    /// All zeros.
    pub const ZERO: Lanes<W> = Lanes([0.0; W]);

    /// The values of several, one after the other.
    pub fn flat(lanes: &[Lanes<W>]) -> &[f32] {
        const { assert!(size_of::<Lanes<W>>() == size_of::<[f32; W]>(), "whole cache lines: no padding") };
        // SAFETY: `Lanes` is W numbers and no padding, as just seen.
        unsafe { std::slice::from_raw_parts(lanes.as_ptr().cast(), lanes.len() * W) }
    }
}

/// out[r] += Σ_i a[i·step_i + r·step_r] · x[i], vectors of W lanes, R of them at a time in registers.
#[inline(always)]
pub fn accumulate<const W: usize, const R: usize, const FMA: bool>(
    a: &[f32],
    step_i: usize,
    step_r: usize,
    x: &[Lanes<W>],
    out: &mut [Lanes<W>],
) {
    assert!(!x.is_empty() && (x.len() - 1) * step_i + (out.len() - 1) * step_r < a.len());
    // SAFETY: i < x.len() and r < out.len(), so the index is at most the one just compared with a.len().
    let a = |i: usize, r: usize| unsafe { *a.get_unchecked(i * step_i + r * step_r) };

    let (tiles, rest) = out.as_chunks_mut::<R>();
    let done = tiles.len() * R;
    for (t, tile) in tiles.iter_mut().enumerate() {
        let mut sums = *tile;
        for (i, x) in x.iter().enumerate() {
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = a(i, t * R + r);
                for (sum, x) in sums.0.iter_mut().zip(&x.0) {
                    *sum = simd::mul_add::<FMA>(a, *x, *sum);
                }
            }
        }
        *tile = sums;
    }
    for (r, row) in (done..).zip(rest) {
        for (i, x) in x.iter().enumerate() {
            for (sum, x) in row.0.iter_mut().zip(&x.0) {
                *sum = simd::mul_add::<FMA>(a(i, r), *x, *sum);
            }
        }
    }
}
