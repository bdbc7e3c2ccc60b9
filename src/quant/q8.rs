//! q8: groups of 8-bit integers with a scale, and a min when affine.
//!
//! Plain groups take scale = max|w| / 127 and the nearest code in -127..=127. Affine ones spread -128..=127 over the
//! group's range. Codes are chosen against the scale as stored, so rounding it to f16 costs nothing but range: the
//! error of a weight is at most half a stored step, or what the rounded ends of the range leave uncovered.

use super::scales::{self, Scales};
use super::{check_finite, Error, Result};
use crate::tensor::HostTensor;
use rayon::prelude::*;

pub(super) fn encode(
    group: usize,
    wide: bool,
    affine: bool,
    cols: usize,
    weights: &[f32],
    parts: &mut [HostTensor],
) -> Result<()> {
    let scale_bytes = cols / group * parts[1].dtype.size();
    let [codes, scale, min] = parts else { unreachable!("q8 has three parts") };
    let codes = codes.bytes.as_mut_slice().par_chunks_mut(cols);
    let scale = scale.bytes.as_mut_slice().par_chunks_mut(scale_bytes);
    let rows = codes.zip(scale).zip(weights.par_chunks(cols)).enumerate();
    let error = if affine {
        let min = min.bytes.as_mut_slice().par_chunks_mut(scale_bytes);
        rows.zip(min).find_map_first(|((row, ((codes, scale), weights)), min)| {
            encode_row_affine(group, wide, row, weights, bytemuck::cast_slice_mut(codes), scale, min).err()
        })
    } else {
        rows.find_map_first(|(row, ((codes, scale), weights))| {
            encode_row(group, wide, row, weights, bytemuck::cast_slice_mut(codes), scale).err()
        })
    };
    error.map_or(Ok(()), Err)
}

fn encode_row(
    group: usize,
    wide: bool,
    row: usize,
    weights: &[f32],
    codes: &mut [i8],
    scale_out: &mut [u8],
) -> Result<()> {
    check_finite(weights, row)?;
    for (g, (weights, codes)) in weights.chunks_exact(group).zip(codes.chunks_exact_mut(group)).enumerate() {
        let absmax = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
        let scale = scales::round(absmax / 127.0, wide, "scale", row, g * group)?;
        scales::put(scale_out, wide, g, scale);
        quantize(weights, scale, 0.0, -127.0, codes);
    }
    Ok(())
}

fn encode_row_affine(
    group: usize,
    wide: bool,
    row: usize,
    weights: &[f32],
    codes: &mut [i8],
    scale_out: &mut [u8],
    min_out: &mut [u8],
) -> Result<()> {
    check_finite(weights, row)?;
    for (g, (weights, codes)) in weights.chunks_exact(group).zip(codes.chunks_exact_mut(group)).enumerate() {
        let lo = weights.iter().fold(f32::INFINITY, |lo, &w| lo.min(w));
        let hi = weights.iter().fold(f32::NEG_INFINITY, |hi, &w| hi.max(w));
        if !(hi - lo).is_finite() {
            let advice = "weights this large are damaged; check the source of the model";
            return Err(Error::Range {
                what: "span of the group",
                row,
                col: g * group,
                value: hi,
                dtype: "f32",
                advice,
            });
        }
        // Code 0 stands at `min`, which rounding may move: the step must still reach both ends.
        let min = scales::round(lo + (hi - lo) * (128.0 / 255.0), wide, "minimum", row, g * group)?;
        let step = ((hi - min) / 127.0).max((min - lo) / 128.0);
        let scale = scales::round(step, wide, "scale", row, g * group)?;
        scales::put(scale_out, wide, g, scale);
        scales::put(min_out, wide, g, min);
        quantize(weights, scale, min, -128.0, codes);
    }
    Ok(())
}

/// codes = round((w - min) / scale) in lowest..=127, ties to even; all zero where scale is.
fn quantize(weights: &[f32], scale: f32, min: f32, lowest: f32, codes: &mut [i8]) {
    if scale == 0.0 {
        codes.fill(0);
        return;
    }
    // 1.5 * 2^23: adding it leaves the integer nearest to a small number in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    for (code, w) in codes.iter_mut().zip(weights) {
        let exact = ((w - min) / scale).clamp(lowest, 127.0);
        *code = (exact + ROUND).to_bits() as i8;
    }
}

pub(super) fn decode_row(parts: &[HostTensor], group: usize, affine: bool, row: usize, out: &mut [f32]) {
    let codes = &parts[0].as_slice::<i8>()[row * out.len()..(row + 1) * out.len()];
    let (scale, min) = (Scales::of(&parts[1]), Scales::of(&parts[2]));
    let first = row * (out.len() / group);
    for (g, (codes, out)) in codes.chunks_exact(group).zip(out.chunks_exact_mut(group)).enumerate() {
        let scale = scale.get(first + g);
        if affine {
            let min = min.get(first + g);
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = scale * code as f32 + min;
            }
        } else {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = scale * code as f32;
            }
        }
    }
}

pub(super) fn decode_with_magnitude(parts: &[HostTensor], group: usize, affine: bool) -> (Vec<f64>, Vec<f64>) {
    let codes = parts[0].as_slice::<i8>();
    let (scale, min) = (Scales::of(&parts[1]), Scales::of(&parts[2]));
    let (mut values, mut magnitudes) = (Vec::with_capacity(codes.len()), Vec::with_capacity(codes.len()));
    for (g, codes) in codes.chunks_exact(group).enumerate() {
        let scale = scale.get(g) as f64;
        let min = if affine { min.get(g) as f64 } else { 0.0 };
        for &code in codes {
            let product = scale * code as f64;
            values.push(product + min);
            magnitudes.push(product.abs() + min.abs());
        }
    }
    (values, magnitudes)
}
