//! The kernels in WGSL, slowest first.

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[];
pub const KERNELS_F16: &[Kernel] = &[];
pub const KERNELS_I8: &[Kernel] = &[];
pub const MERGE: &[Kernel] = &[];
