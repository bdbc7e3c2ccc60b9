//! Host tensors: a dtype, a row-major shape and 64-byte aligned bytes. What fixtures, oracles and files speak.

use bytemuck::{AnyBitPattern, NoUninit, Pod, Zeroable};
use half::{bf16, f16};

/// Element types of tensors and kernel arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    U32,
    I32,
    U8,
    I8,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 | Dtype::U32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::U8 | Dtype::I8 => 1,
        }
    }

    /// The name used in kernels, messages and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
            Dtype::U32 => "u32",
            Dtype::I32 => "i32",
            Dtype::U8 => "u8",
            Dtype::I8 => "i8",
        }
    }

    /// Unit roundoff: the largest relative error of rounding a real to this type. Zero for integers.
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            Dtype::F32 => 1.0 / (1u64 << 24) as f64,
            Dtype::F16 => 1.0 / 2048.0,
            Dtype::BF16 => 1.0 / 256.0,
            _ => 0.0,
        }
    }
}

/// A cache line: what keeps [`Bytes`] aligned for every SIMD load and every dtype.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Owned bytes, 64-byte aligned, zero on creation.
#[derive(Clone)]
pub struct Bytes {
    lines: Vec<Line>,
    len: usize,
}

impl Bytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Bytes {
        Bytes { lines: bytemuck::zeroed_vec(len.div_ceil(64)), len }
    }

    /// A copy of `source`.
    pub fn from_slice<T: NoUninit>(source: &[T]) -> Bytes {
        let source: &[u8] = bytemuck::cast_slice(source);
        let mut bytes = Bytes::zeroed(source.len());
        bytes.as_mut_slice().copy_from_slice(source);
        bytes
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    /// The bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }

    /// Where the bytes begin; valid for reads and writes of `len` bytes while `self` is borrowed mutably.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A row-major tensor on the host.
#[derive(Clone)]
pub struct HostTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The elements, little-endian.
    pub bytes: Bytes,
}

impl HostTensor {
    /// A tensor of zeros.
    pub fn zeros(dtype: Dtype, shape: &[usize]) -> HostTensor {
        let count: usize = shape.iter().product();
        HostTensor { dtype, shape: shape.to_vec(), bytes: Bytes::zeroed(count * dtype.size()) }
    }

    /// A tensor holding `values`, whose type must have the size of `dtype`. Panics when counts disagree.
    pub fn from_slice<T: NoUninit>(dtype: Dtype, shape: &[usize], values: &[T]) -> HostTensor {
        assert_eq!(size_of::<T>(), dtype.size(), "element size of {}", dtype.name());
        assert_eq!(values.len(), shape.iter().product::<usize>(), "elements of shape {shape:?}");
        HostTensor { dtype, shape: shape.to_vec(), bytes: Bytes::from_slice(values) }
    }

    /// An f32 tensor.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> HostTensor {
        HostTensor::from_slice(Dtype::F32, shape, values)
    }

    /// A u32 tensor.
    pub fn from_u32(shape: &[usize], values: &[u32]) -> HostTensor {
        HostTensor::from_slice(Dtype::U32, shape, values)
    }

    /// `values` rounded to a floating-point `dtype`. Panics for an integer dtype.
    pub fn from_f64(dtype: Dtype, shape: &[usize], values: &[f64]) -> HostTensor {
        match dtype {
            Dtype::F32 => HostTensor::from_f32(shape, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
            Dtype::F16 => {
                HostTensor::from_slice(dtype, shape, &values.iter().map(|&v| f16::from_f64(v)).collect::<Vec<_>>())
            }
            Dtype::BF16 => {
                HostTensor::from_slice(dtype, shape, &values.iter().map(|&v| bf16::from_f64(v)).collect::<Vec<_>>())
            }
            _ => panic!("from_f64 makes floating-point tensors, not {}", dtype.name()),
        }
    }

    /// How many elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True when there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as `T`, whose size must be the dtype's.
    pub fn as_slice<T: AnyBitPattern>(&self) -> &[T] {
        assert_eq!(size_of::<T>(), self.dtype.size(), "element size of {}", self.dtype.name());
        bytemuck::cast_slice(self.bytes.as_slice())
    }

    /// The elements of an f32 tensor.
    pub fn f32(&self) -> &[f32] {
        assert_eq!(self.dtype, Dtype::F32);
        self.as_slice()
    }

    /// The elements of a u32 tensor.
    pub fn u32(&self) -> &[u32] {
        assert_eq!(self.dtype, Dtype::U32);
        self.as_slice()
    }

    /// Every element as f64, exactly.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            Dtype::F32 => self.as_slice::<f32>().iter().map(|&v| v as f64).collect(),
            Dtype::F16 => self.as_slice::<f16>().iter().map(|&v| v.to_f64()).collect(),
            Dtype::BF16 => self.as_slice::<bf16>().iter().map(|&v| v.to_f64()).collect(),
            Dtype::U32 => self.as_slice::<u32>().iter().map(|&v| v as f64).collect(),
            Dtype::I32 => self.as_slice::<i32>().iter().map(|&v| v as f64).collect(),
            Dtype::U8 => self.as_slice::<u8>().iter().map(|&v| v as f64).collect(),
            Dtype::I8 => self.as_slice::<i8>().iter().map(|&v| v as f64).collect(),
        }
    }
}
