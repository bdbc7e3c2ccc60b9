//! Unquantized weights: f32, f16 and bf16.

use super::{check_finite, Error, Result};
use crate::tensor::{Dtype, HostTensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// Rounds weights to the dtype of `parts[0]`, to nearest, ties to even.
pub(super) fn encode(cols: usize, weights: &[f32], parts: &mut [HostTensor]) -> Result<()> {
    let dtype = parts[0].dtype;
    let out = parts[0].bytes.as_mut_slice().par_chunks_mut(cols * dtype.size());
    let error = out.zip(weights.par_chunks(cols)).enumerate().find_map_first(|(row, (out, weights))| {
        check_finite(weights, row).and_then(|()| encode_row(dtype, row, weights, out)).err()
    });
    error.map_or(Ok(()), Err)
}

fn encode_row(dtype: Dtype, row: usize, weights: &[f32], out: &mut [u8]) -> Result<()> {
    match dtype {
        Dtype::F16 => bytemuck::cast_slice_mut::<u8, f16>(out).convert_from_f32_slice(weights),
        Dtype::BF16 => bytemuck::cast_slice_mut::<u8, bf16>(out).convert_from_f32_slice(weights),
        _ => out.copy_from_slice(bytemuck::cast_slice(weights)),
    }
    let overflowed = match dtype {
        Dtype::F16 => bytemuck::cast_slice::<u8, f16>(out).iter().position(|v| !v.is_finite()),
        Dtype::BF16 => bytemuck::cast_slice::<u8, bf16>(out).iter().position(|v| !v.is_finite()),
        _ => None,
    };
    match overflowed {
        Some(col) => {
            let advice = "keep this matrix in f32 (or bf16, which reaches 3e38)";
            Err(Error::Range { what: "weight", row, col, value: weights[col], dtype: dtype.name(), advice })
        }
        None => Ok(()),
    }
}

pub(super) fn decode_row(parts: &[HostTensor], row: usize, out: &mut [f32]) {
    let span = row * out.len()..(row + 1) * out.len();
    match parts[0].dtype {
        Dtype::F16 => parts[0].as_slice::<f16>()[span].convert_to_f32_slice(out),
        Dtype::BF16 => parts[0].as_slice::<bf16>()[span].convert_to_f32_slice(out),
        _ => out.copy_from_slice(&parts[0].f32()[span]),
    }
}
