//! Weight formats: what the bytes of a quantized matrix mean, how to make them and how to read them back.
//!
//! A weight W is N rows (output features) by K columns (input features), row-major. A [`Packed`] holds it as plain
//! tensors in the order kernels take them:
//!
//! ```text
//! format          parts                                                                      a weight's value
//! f32 f16 bf16    weight [N,K]                                                               itself
//! q4  (G, wide)   codes u8[N,K/2]  scales f16|f32[N,K/G]  mins, as scales                    scale*code + min
//! q8  (G, wide)   codes i8[N,K]    scales f16|f32[N,K/G]  mins, as scales, or [0,K/G]        scale*code (+ min)
//! nf4             codes u8[N,K/2]  absmax f32[N,K/64]                                        LEVELS[code]*absmax
//! nf4dq           codes u8[N,K/2]  absmax u8[N,K/64]      code f32[256]  absmax2 f32[B/256]  offset f32[1]
//!                 with B = N*K/64 blocks; the absmax of block b is code[absmax[b]]*absmax2[b/256] + offset
//!
//! a byte of q4    bits 7..4: column 2j+1   bits 3..0: column 2j          (little end first, as integers are stored)
//! a byte of nf4   bits 7..4: column 2j     bits 3..0: column 2j+1        (the order of bitsandbytes)
//! ```
//!
//! A value is the f32 that IEEE arithmetic gives for the formula on the right, one rounding an operation:
//! [`decode`]. Bounds on kernels that sum in another order start from the real numbers: [`decode_with_magnitude`].

mod error;
mod float;
mod format;
pub mod gguf_blocks;
pub mod nf4;
mod q4;
mod q8;
mod scales;

use crate::tensor::HostTensor;
use rayon::prelude::*;

pub use error::{Error, Result};
pub use format::{Format, Packed, PartSpec, NF4_BLOCK, NF4_NESTED_BLOCK};

/// Packs `weights`, `f32[rows, cols]`, into a format; rows in parallel, the same bytes for any number of threads.
///
/// Errors: dims the format cannot hold, another count of weights, a weight that is NaN or infinite (the first, by row
/// and column), a value, scale or minimum beyond the range of f16.
pub fn encode(format: Format, rows: usize, cols: usize, weights: &[f32]) -> Result<Packed> {
    format.check(rows, cols)?;
    if weights.len() != rows * cols {
        return Err(Error::Length { what: "weights of the matrix", expected: rows * cols, found: weights.len() });
    }
    let mut parts = format::empty_parts(format, rows, cols);
    match format {
        Format::F32 | Format::F16 | Format::BF16 => float::encode(cols, weights, &mut parts)?,
        Format::Q4 { group, wide } => q4::encode(group, wide, cols, weights, &mut parts)?,
        Format::Q8 { group, wide, affine } => q8::encode(group, wide, affine, cols, weights, &mut parts)?,
        Format::Nf4 => nf4::encode(cols, weights, &mut parts)?,
        Format::Nf4Dq => nf4::encode_double(cols, weights, &mut parts)?,
    }
    Ok(Packed { format, rows, cols, parts })
}

/// Writes the values of one row, `f32[cols]`, to `out`. Panics for a row or a length outside the matrix, and for parts
/// that [`Packed::new`] would refuse.
pub fn decode_row(packed: &Packed, row: usize, out: &mut [f32]) {
    assert!(row < packed.rows, "row {row} of {}", packed.rows);
    assert_eq!(out.len(), packed.cols, "columns of the row");
    match packed.format {
        Format::F32 | Format::F16 | Format::BF16 => float::decode_row(&packed.parts, row, out),
        Format::Q4 { group, .. } => q4::decode_row(&packed.parts, group, row, out),
        Format::Q8 { group, affine, .. } => q8::decode_row(&packed.parts, group, affine, row, out),
        Format::Nf4 | Format::Nf4Dq => nf4::decode_row(&packed.parts, row, out),
    }
}

/// All values, `f32[rows, cols]`; rows in parallel. Panics as [`decode_row`] does.
pub fn decode(packed: &Packed) -> Vec<f32> {
    let mut out = vec![0.0; packed.rows * packed.cols];
    out.par_chunks_mut(packed.cols).enumerate().for_each(|(row, out)| decode_row(packed, row, out));
    out
}

/// The real values `f64[rows, cols]` behind the formulas, and the magnitude of each: what its rounding errors are
/// relative to in a kernel that sums scale*Σ(code·x) and min*Σx apart, `|scale*code| + |min|`; for double-quantized
/// NF4 `|LEVELS[code]|*(|code*absmax2| + |offset|)`; elsewhere the value's own. Products are exact in f64 but for the
/// level times a rebuilt absmax; a sum rounds once, far below any f32 rounding.
///
/// Takes bare parts because the oracles of kernels hold nothing else. Panics for parts that [`Packed::new`] would
/// refuse.
pub fn decode_with_magnitude(parts: &[HostTensor], format: Format, rows: usize, cols: usize) -> (Vec<f64>, Vec<f64>) {
    if let Err(error) = format::check_parts(format, rows, cols, parts) {
        panic!("{error}");
    }
    match format {
        Format::F32 | Format::F16 | Format::BF16 => {
            let values = parts[0].to_f64();
            let magnitudes = values.iter().map(|v| v.abs()).collect();
            (values, magnitudes)
        }
        Format::Q4 { group, .. } => q4::decode_with_magnitude(parts, group),
        Format::Q8 { group, affine, .. } => q8::decode_with_magnitude(parts, group, affine),
        Format::Nf4 | Format::Nf4Dq => nf4::decode_with_magnitude(parts),
    }
}

/// Refuses the first weight of a row that is NaN or infinite.
fn check_finite(weights: &[f32], row: usize) -> Result<()> {
    // One pass without branches first: bits without the sign order like magnitudes, infinity and NaN above all.
    let largest = weights.iter().fold(0, |max, w| (w.to_bits() & 0x7fff_ffff).max(max));
    if f32::from_bits(largest).is_finite() {
        return Ok(());
    }
    match weights.iter().position(|v| !v.is_finite()) {
        Some(col) => Err(Error::NotFinite { what: "weight", row, col, value: weights[col] }),
        None => Ok(()),
    }
}
