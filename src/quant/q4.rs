//! q4: groups of 4-bit integers with a scale and a min; w = scale*code + min, codes 0..=15.
//!
//! ```text
//! lo, hi = min and max of the group
//! best   = (min = lo, scale = (hi - min)/15), both as stored, each code the nearest
//! for span in SPANS, while best is not exact:
//!     code  = the nearest of 16 levels spread over `span` of the range, about its middle
//!     REFITS times:
//!         pair  = the line through (code, w) with the least squared error, as stored
//!         code  = the nearest under that pair
//!         best  = the pair if its squared error is lower
//! ```
//!
//! Cutting the range clips the outermost weights a little and makes every step finer; the line then moves both ends
//! to where they serve best. On normal weights this leaves 0.79, 0.83, 0.86 and 0.87 of the squared error that min and
//! max alone give for groups of 16, 32, 64 and 128 (a test prints and bounds it). The search can only lower the
//! squared error of a group, so its root mean square stays within what min and max alone guarantee: half a stored
//! step, or what rounded ends leave uncovered.

use super::scales::{self, Scales};
use super::{check_finite, Error, Result};
use crate::tensor::HostTensor;
use rayon::prelude::*;

/// Shares of a group's range over which the first codes of each trial are spread.
const SPANS: [f32; 3] = [1.0, 0.92, 0.84];
/// How often the line is drawn anew from the codes it gave.
const REFITS: usize = 3;
/// The highest code.
const HIGHEST: f32 = 15.0;

pub(super) fn encode(group: usize, wide: bool, cols: usize, weights: &[f32], parts: &mut [HostTensor]) -> Result<()> {
    let scale_bytes = cols / group * parts[1].dtype.size();
    let [codes, scale, min] = parts else { unreachable!("q4 has three parts") };
    let codes = codes.bytes.as_mut_slice().par_chunks_mut(cols / 2);
    let scale = scale.bytes.as_mut_slice().par_chunks_mut(scale_bytes);
    let min = min.bytes.as_mut_slice().par_chunks_mut(scale_bytes);
    let rows = codes.zip(scale).zip(min).zip(weights.par_chunks(cols)).enumerate();
    let error = rows.find_map_first(|(row, (((codes, scale), min), weights))| {
        encode_row(group, wide, row, weights, codes, scale, min).err()
    });
    error.map_or(Ok(()), Err)
}

fn encode_row(
    group: usize,
    wide: bool,
    row: usize,
    weights: &[f32],
    codes_out: &mut [u8],
    scale_out: &mut [u8],
    min_out: &mut [u8],
) -> Result<()> {
    check_finite(weights, row)?;
    let (mut codes, mut trial) = (vec![0.0f32; group], vec![0.0f32; group]);
    for (g, (weights, packed)) in weights.chunks_exact(group).zip(codes_out.chunks_exact_mut(group / 2)).enumerate() {
        let (scale, min) = encode_group(weights, wide, row, g * group, &mut codes, &mut trial)?;
        scales::put(scale_out, wide, g, scale);
        scales::put(min_out, wide, g, min);
        pack(&codes, packed);
    }
    Ok(())
}

/// Chooses scale, min and `codes` (whole numbers 0..=15) of one group; `trial` is scratch of the same length.
fn encode_group(
    weights: &[f32],
    wide: bool,
    row: usize,
    col: usize,
    codes: &mut [f32],
    trial: &mut [f32],
) -> Result<(f32, f32)> {
    let lo = weights.iter().fold(f32::INFINITY, |lo, &w| lo.min(w));
    let hi = weights.iter().fold(f32::NEG_INFINITY, |hi, &w| hi.max(w));
    if !(hi - lo).is_finite() {
        let advice = "weights this large are damaged; check the source of the model";
        return Err(Error::Range { what: "span of the group", row, col, value: hi, dtype: "f32", advice });
    }
    let mut min = scales::round(lo, wide, "minimum", row, col)?;
    // A rounded min can lie above hi; the group is then as good as constant.
    let mut scale = scales::round(((hi - min) / HIGHEST).max(0.0), wide, "scale", row, col)?;
    nearest(weights, scale, min, codes);
    let mut error = squared_error(weights, scale, min, codes);
    for span in SPANS {
        let step = (hi - lo) * span / HIGHEST;
        if error == 0.0 || step == 0.0 {
            break;
        }
        nearest(weights, step, lo + (hi - lo) * (0.5 - 0.5 * span), trial);
        for _ in 0..REFITS {
            let Some((line_scale, line_min)) = fit(weights, lo, trial) else { break };
            // Only the first pair must be storable: a line that is not is no candidate.
            let (Ok(line_scale), Ok(line_min)) = (
                scales::round(line_scale, wide, "scale", row, col),
                scales::round(line_min, wide, "minimum", row, col),
            ) else {
                break;
            };
            nearest(weights, line_scale, line_min, trial);
            let line_error = squared_error(weights, line_scale, line_min, trial);
            if line_error < error {
                (scale, min, error) = (line_scale, line_min, line_error);
                codes.copy_from_slice(trial);
            }
        }
    }
    Ok((scale, min))
}

/// codes = round((w - min) / scale) in 0..=15; all zero where scale is.
fn nearest(weights: &[f32], scale: f32, min: f32, codes: &mut [f32]) {
    if scale == 0.0 {
        codes.fill(0.0);
        return;
    }
    // 2^23: adding it and taking it away again rounds a small positive number to the nearest integer.
    const ROUND: f32 = 8_388_608.0;
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = (((w - min) / scale).clamp(0.0, HIGHEST) + ROUND) - ROUND;
    }
}

/// In f64, where no square of an f32 overflows or vanishes.
fn squared_error(weights: &[f32], scale: f32, min: f32, codes: &[f32]) -> f64 {
    weights.iter().zip(codes).map(|(&w, code)| ((scale * code + min) as f64 - w as f64).powi(2)).sum()
}

/// Scale and min of the line with the least squared error over `codes`; `None` when all codes are equal. Weights are
/// taken relative to `lo` so that a common offset does not drown their differences.
fn fit(weights: &[f32], lo: f32, codes: &[f32]) -> Option<(f32, f32)> {
    let (mut c, mut cc, mut w, mut cw) = (0.0f32, 0.0f32, 0.0f32, 0.0f32);
    for (&code, weight) in codes.iter().zip(weights) {
        let weight = weight - lo;
        c += code;
        cc += code * code;
        w += weight;
        cw += code * weight;
    }
    let n = codes.len() as f32;
    let spread = n * cc - c * c;
    if spread <= 0.0 {
        return None;
    }
    let scale = (n * cw - c * w) / spread;
    Some((scale, lo + (w - scale * c) / n))
}

/// Two codes a byte: column 2j in bits 3..0, column 2j+1 in bits 7..4.
fn pack(codes: &[f32], packed: &mut [u8]) {
    for (byte, pair) in packed.iter_mut().zip(codes.chunks_exact(2)) {
        *byte = pair[0] as u8 | (pair[1] as u8) << 4;
    }
}

pub(super) fn decode_row(parts: &[HostTensor], group: usize, row: usize, out: &mut [f32]) {
    let bytes = out.len() / 2;
    let codes = &parts[0].as_slice::<u8>()[row * bytes..(row + 1) * bytes];
    let (scale, min) = (Scales::of(&parts[1]), Scales::of(&parts[2]));
    let first = row * (out.len() / group);
    for (g, (codes, out)) in codes.chunks_exact(group / 2).zip(out.chunks_exact_mut(group)).enumerate() {
        let (scale, min) = (scale.get(first + g), min.get(first + g));
        for (out, &byte) in out.chunks_exact_mut(2).zip(codes) {
            out[0] = scale * (byte & 15) as f32 + min;
            out[1] = scale * (byte >> 4) as f32 + min;
        }
    }
}

pub(super) fn decode_with_magnitude(parts: &[HostTensor], group: usize) -> (Vec<f64>, Vec<f64>) {
    let codes = parts[0].as_slice::<u8>();
    let (scale, min) = (Scales::of(&parts[1]), Scales::of(&parts[2]));
    let (mut values, mut magnitudes) = (Vec::with_capacity(2 * codes.len()), Vec::with_capacity(2 * codes.len()));
    for (g, codes) in codes.chunks_exact(group / 2).enumerate() {
        let (scale, min) = (scale.get(g) as f64, min.get(g) as f64);
        for &byte in codes {
            for code in [byte & 15, byte >> 4] {
                let product = scale * code as f64;
                values.push(product + min);
                magnitudes.push(product.abs() + min.abs());
            }
        }
    }
    (values, magnitudes)
}
