//! `qmatmul_t` in PTX.

use crate::op::*;

pub const KERNELS_F32: &[Kernel] = &[];
pub const KERNELS_F16: &[Kernel] = &[];
pub const KERNELS_BF16: &[Kernel] = &[];
pub const KERNELS_Q4: &[Kernel] = &[];
pub const KERNELS_Q8: &[Kernel] = &[];
pub const KERNELS_NF4: &[Kernel] = &[];
pub const KERNELS_NF4DQ: &[Kernel] = &[];
