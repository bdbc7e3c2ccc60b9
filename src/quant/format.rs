//! The formats, their parts and the arithmetic of their sizes.

use super::{Error, Result};
use crate::tensor::{Dtype, HostTensor};

/// Weights that share one absmax in NF4.
pub const NF4_BLOCK: usize = 64;
/// Absmax values that share one absmax of their own in double-quantized NF4.
pub const NF4_NESTED_BLOCK: usize = 256;
/// The smallest group of q4 and q8.
const MIN_GROUP: usize = 16;

/// How a weight matrix is stored. See the [module](super) for the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// Affine 4-bit groups: scale*code + min, codes 0..=15.
    Q4 {
        /// Columns that share a scale and a min: a power of two, at least 16.
        group: usize,
        /// Scales and mins are f32, else f16.
        wide: bool,
    },
    /// 8-bit groups: scale*code (+ min), codes -128..=127.
    Q8 {
        /// Columns that share a scale: a power of two, at least 16.
        group: usize,
        /// Scales and mins are f32, else f16.
        wide: bool,
        /// There are mins.
        affine: bool,
    },
    /// bitsandbytes NF4: 16 levels, one f32 absmax per 64 weights.
    Nf4,
    /// NF4 whose absmax is itself 8 bits, 256 of them sharing an f32 absmax; one offset a matrix.
    Nf4Dq,
}

/// What one part of a packed matrix must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartSpec {
    /// Its name in messages and files.
    pub name: &'static str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape; one dim where the second is `None`.
    pub shape: (usize, Option<usize>),
}

impl PartSpec {
    /// The shape as a list.
    pub fn dims(&self) -> Vec<usize> {
        std::iter::once(self.shape.0).chain(self.shape.1).collect()
    }

    /// Bytes, or `None` when they overflow.
    pub fn bytes(&self) -> Option<usize> {
        self.shape.0.checked_mul(self.shape.1.unwrap_or(1))?.checked_mul(self.dtype.size())
    }
}

impl Format {
    /// The word in kernel names, flags and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::F16 => "f16",
            Format::BF16 => "bf16",
            Format::Q4 { .. } => "q4",
            Format::Q8 { .. } => "q8",
            Format::Nf4 => "nf4",
            Format::Nf4Dq => "nf4dq",
        }
    }

    /// The format a word names; `q4` and `q8` with groups of 32 and f16 scales, the ones GGUF files can hold.
    pub fn parse(word: &str) -> Result<Format> {
        Ok(match word {
            "f32" => Format::F32,
            "f16" => Format::F16,
            "bf16" => Format::BF16,
            "q4" => Format::Q4 { group: 32, wide: false },
            "q8" => Format::Q8 { group: 32, wide: false, affine: false },
            "nf4" => Format::Nf4,
            "nf4dq" => Format::Nf4Dq,
            _ => return Err(Error::UnknownFormat(word.to_string())),
        })
    }

    /// The parts of an N x K matrix in kernel argument order. Meaningful for dims that pass [`Format::check`].
    pub fn parts(self, n: usize, k: usize) -> Vec<PartSpec> {
        let matrix = |name, dtype, rows, cols| PartSpec { name, dtype, shape: (rows, Some(cols)) };
        let vector = |name, dtype, len| PartSpec { name, dtype, shape: (len, None) };
        match self {
            Format::F32 => vec![matrix("weight", Dtype::F32, n, k)],
            Format::F16 => vec![matrix("weight", Dtype::F16, n, k)],
            Format::BF16 => vec![matrix("weight", Dtype::BF16, n, k)],
            Format::Q4 { group, wide } => {
                let scale = scale_dtype(wide);
                vec![
                    matrix("codes", Dtype::U8, n, k / 2),
                    matrix("scales", scale, n, k / group),
                    matrix("mins", scale, n, k / group),
                ]
            }
            Format::Q8 { group, wide, affine } => {
                let scale = scale_dtype(wide);
                vec![
                    matrix("codes", Dtype::I8, n, k),
                    matrix("scales", scale, n, k / group),
                    matrix("mins", scale, if affine { n } else { 0 }, k / group),
                ]
            }
            Format::Nf4 => {
                vec![matrix("codes", Dtype::U8, n, k / 2), matrix("absmax", Dtype::F32, n, k / NF4_BLOCK)]
            }
            Format::Nf4Dq => {
                let blocks = n.saturating_mul(k / NF4_BLOCK);
                vec![
                    matrix("codes", Dtype::U8, n, k / 2),
                    matrix("absmax", Dtype::U8, n, k / NF4_BLOCK),
                    vector("code", Dtype::F32, 256),
                    vector("absmax2", Dtype::F32, blocks.div_ceil(NF4_NESTED_BLOCK)),
                    vector("offset", Dtype::F32, 1),
                ]
            }
        }
    }

    /// Bytes of all parts of an N x K matrix; `None` when the dims do not fit the format or the count overflows.
    pub fn bytes(self, n: usize, k: usize) -> Option<usize> {
        self.check(n, k).ok()?;
        self.sum_bytes(n, k)
    }

    fn sum_bytes(self, n: usize, k: usize) -> Option<usize> {
        self.parts(n, k).iter().try_fold(0usize, |sum, part| sum.checked_add(part.bytes()?))
    }

    /// Whether the format can hold N x K: both at least 1, columns divisible by the group, sizes addressable.
    pub fn check(self, n: usize, k: usize) -> Result<()> {
        let refuse = |reason| Err(Error::Shape { format: self, rows: n, cols: k, reason });
        if n == 0 || k == 0 {
            return refuse("a weight has at least one row and one column");
        }
        match self {
            Format::F32 | Format::F16 | Format::BF16 => {}
            Format::Q4 { group, .. } | Format::Q8 { group, .. } => {
                if !group.is_power_of_two() || group < MIN_GROUP {
                    return refuse("a group is a power of two and at least 16; 32 suits most models");
                }
                if !k.is_multiple_of(group) {
                    return refuse("columns must be a multiple of the group; take a smaller group or keep it in f16");
                }
            }
            Format::Nf4 | Format::Nf4Dq => {
                if !k.is_multiple_of(NF4_BLOCK) {
                    return refuse(
                        "columns must be a multiple of 64; keep it in f16 or take q4 with groups of 32 or 16",
                    );
                }
            }
        }
        // The decoded matrix must be addressable too, in the widest type anyone decodes to (f64).
        let decoded = n.checked_mul(k).and_then(|len| len.checked_mul(8)).filter(|&bytes| bytes <= isize::MAX as usize);
        match (decoded, self.sum_bytes(n, k)) {
            (Some(_), Some(_)) => Ok(()),
            _ => Err(Error::Overflow { rows: n, cols: k }),
        }
    }
}

/// The element type of scales and mins.
const fn scale_dtype(wide: bool) -> Dtype {
    if wide {
        Dtype::F32
    } else {
        Dtype::F16
    }
}

/// A weight matrix in one of the formats.
#[derive(Clone)]
pub struct Packed {
    /// What the parts mean.
    pub format: Format,
    /// Rows: output features, N.
    pub rows: usize,
    /// Columns: input features, K.
    pub cols: usize,
    /// The tensors, in kernel argument order.
    pub parts: Vec<HostTensor>,
}

impl Packed {
    /// A matrix of `parts` made elsewhere, checked: dims, count, dtypes, shapes and lengths.
    pub fn new(format: Format, rows: usize, cols: usize, parts: Vec<HostTensor>) -> Result<Packed> {
        check_parts(format, rows, cols, &parts)?;
        Ok(Packed { format, rows, cols, parts })
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.len()).sum()
    }
}

/// Whether `parts` are those of a `rows` x `cols` matrix of this format.
pub(super) fn check_parts(format: Format, rows: usize, cols: usize, parts: &[HostTensor]) -> Result<()> {
    format.check(rows, cols)?;
    let specs = format.parts(rows, cols);
    for (index, spec) in specs.iter().enumerate() {
        let wrong = |reason| Err(Error::Part { format, index, name: spec.name, reason });
        let Some(part) = parts.get(index) else { return wrong("is missing".to_string()) };
        if part.dtype != spec.dtype || part.shape != spec.dims() {
            let (want, have) = (spec.dtype.name(), part.dtype.name());
            return wrong(format!("{want}{:?} expected, {have}{:?} found", spec.dims(), part.shape));
        }
        // The spec's bytes did not overflow: `check` added them up.
        if Some(part.bytes.len()) != spec.bytes() {
            return wrong(format!("its shape {:?} does not match its {} bytes", part.shape, part.bytes.len()));
        }
    }
    if parts.len() > specs.len() {
        return Err(Error::Length { what: "parts of the matrix", expected: specs.len(), found: parts.len() });
    }
    Ok(())
}
/// A zeroed tensor for each part of a matrix that passed [`Format::check`].
pub(super) fn empty_parts(format: Format, rows: usize, cols: usize) -> Vec<HostTensor> {
    format.parts(rows, cols).iter().map(|spec| HostTensor::zeros(spec.dtype, &spec.dims())).collect()
}
