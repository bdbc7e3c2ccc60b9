//! Rows as 8-bit codes, and how far from the rows they are.
//!
//! ```text
//! scale[n] = max_d |x[n,d]| / 127      code[n,d] = round(x[n,d] / scale[n])      residual[n] ≥ ‖x[n] − scale[n]·code[n]‖
//! ```
//!
//! By Cauchy and Schwarz a product with a query q that has codes too, q̂ its decoded form, is off by no more than
//! `|q·x − q̂·x̂| ≤ ‖q̂‖·‖x − x̂‖ + ‖q − q̂‖·‖x‖`.

use std::borrow::Cow;

use rayon::prelude::*;

use super::Exact;
use crate::ops::cosine_topk::CODE_PITCH;
use crate::Error;

/// Codes of N rows.
#[derive(Clone)]
pub struct Codes<'a> {
    /// `[N, d counted up to a multiple of 16]`, −127 to 127, padded with zeros.
    pub codes: Cow<'a, [i8]>,
    /// `[N]`.
    pub scales: Cow<'a, [f32]>,
    /// `[N]`: norms of what the codes leave out, rounded up.
    pub residuals: Cow<'a, [f32]>,
}

/// A query's codes and what they leave out.
pub(super) struct QueryCodes {
    pub codes: Vec<i8>,
    pub scale: f32,
    /// ‖q − q̂‖, rounded up.
    pub residual: f32,
    /// ‖q̂‖.
    pub norm: f64,
}

impl Codes<'static> {
    /// The codes of rows of `d` elements.
    pub fn quantize(d: usize, rows: Exact<'_>) -> Codes<'static> {
        let n = rows.len() / d.max(1);
        let pitch = d.next_multiple_of(CODE_PITCH);
        let mut codes = vec![0i8; n * pitch];
        let of_row = |(row, codes): (usize, &mut [i8])| match rows {
            Exact::F32(rows) => encode(&rows[row * d..(row + 1) * d], codes),
            Exact::F16(rows) => {
                encode(&rows[row * d..(row + 1) * d].iter().map(|v| v.to_f32()).collect::<Vec<_>>(), codes)
            }
        };
        let (scales, residuals): (Vec<f32>, Vec<f32>) =
            codes.par_chunks_mut(pitch.max(1)).enumerate().with_min_len(64).map(of_row).unzip();
        Codes { codes: codes.into(), scales: scales.into(), residuals: residuals.into() }
    }
}

impl Codes<'_> {
    /// That there are as many as rows, and every number is one.
    pub(super) fn check(&self, d: usize, n: usize) -> Result<(), Error> {
        let wanted = (n * d.next_multiple_of(CODE_PITCH), n, n);
        let found = (self.codes.len(), self.scales.len(), self.residuals.len());
        if wanted != found {
            let what = "codes, scales and residuals";
            return Err(Error::Request(format!("{n} rows of {d} have {wanted:?} {what}, not {found:?}")));
        }
        let bad = |v: &f32| !v.is_finite() || *v < 0.0;
        if let Some(row) = self.scales.iter().zip(self.residuals.iter()).position(|(s, r)| bad(s) || bad(r)) {
            let (scale, residual) = (self.scales[row], self.residuals[row]);
            return Err(Error::Request(format!("row {row} of the codes has scale {scale} and residual {residual}")));
        }
        Ok(())
    }

    /// The largest residual.
    pub(super) fn largest_residual(&self) -> f32 {
        self.residuals.iter().copied().fold(0.0, f32::max)
    }
}

impl QueryCodes {
    pub(super) fn of(query: &[f32]) -> QueryCodes {
        let mut codes = vec![0; query.len().next_multiple_of(CODE_PITCH)];
        let (scale, residual) = encode(query, &mut codes);
        let norm = codes.iter().map(|code| (*code as f64).powi(2)).sum::<f64>().sqrt() * scale as f64;
        QueryCodes { codes, scale, residual, norm }
    }
}

/// A vector's codes; its scale and residual. All zero where it is not of numbers: no search finds it.
fn encode(x: &[f32], codes: &mut [i8]) -> (f32, f32) {
    if !x.iter().all(|v| v.is_finite()) {
        return (0.0, 0.0);
    }
    let largest = x.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    let scale = largest / 127.0;
    let steps = if scale > 0.0 { 1.0 / scale as f64 } else { 0.0 };
    let mut squares = 0.0;
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = (x as f64 * steps).round().clamp(-127.0, 127.0) as i8;
        squares += (x as f64 - *code as f64 * scale as f64).powi(2);
    }
    // Two units above cover the rounding of the sum, the root and this one.
    (scale, (squares.sqrt() as f32).next_up().next_up())
}
