//! The table of ops. A new op is a room here, a line in [`OPS`] and its kernels.

pub mod rmsnorm;

use crate::op::OpSpec;

/// Every op in every format.
pub static OPS: &[&OpSpec] = &[&rmsnorm::RMSNORM];
