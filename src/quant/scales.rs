//! Scales and mins of q4 and q8: f16, or f32 when wide.

use super::{Error, Result};
use crate::tensor::{Dtype, HostTensor};
use half::f16;

/// `value` as it will read back from a scale of this width. An f16 that would be infinite is an error naming `what`
/// of the group at `row`, `col`.
pub(super) fn round(value: f32, wide: bool, what: &'static str, row: usize, col: usize) -> Result<f32> {
    let rounded = if wide { value } else { f16::from_f32(value).to_f32() };
    if rounded.is_finite() {
        return Ok(rounded);
    }
    let (dtype, advice) = match wide {
        true => ("f32", "weights this large are damaged; check the source of the model"),
        false => ("f16", "take a format with f32 scales (wide), or keep this matrix in f32"),
    };
    Err(Error::Range { what, row, col, value, dtype, advice })
}

/// Stores a value that [`round`] returned as number `index` of the scales in `bytes`.
pub(super) fn put(bytes: &mut [u8], wide: bool, index: usize, value: f32) {
    if wide {
        bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
    } else {
        bytes[2 * index..2 * index + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    }
}

/// Scales, or mins, of a whole matrix.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
}

impl<'a> Scales<'a> {
    pub fn of(tensor: &'a HostTensor) -> Scales<'a> {
        match tensor.dtype {
            Dtype::F16 => Scales::F16(tensor.as_slice()),
            _ => Scales::F32(tensor.f32()),
        }
    }

    pub fn get(self, index: usize) -> f32 {
        match self {
            Scales::F16(values) => values[index].to_f32(),
            Scales::F32(values) => values[index],
        }
    }
}
