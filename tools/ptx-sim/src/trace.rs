//! A record of what one warp did.

/// Which warp to trace, and how far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceWarp {
    /// `%ctaid`.
    pub block: [u32; 3],
    /// Warp within the block.
    pub warp: u32,
    /// At most this many instructions.
    pub steps: usize,
}

/// One instruction of the traced warp.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceStep {
    /// Source line, from 1.
    pub line: u32,
    /// The source line's text.
    pub text: String,
    /// Lanes that ran it.
    pub lanes: u32,
    /// Registers written.
    pub results: Vec<Traced>,
    pub(crate) pc: u32,
    pub(crate) open: bool,
}

/// A register after the instruction that wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traced {
    /// Its name.
    pub name: String,
    /// Its type as declared, such as `f32` or `pred`.
    pub ty: &'static str,
    /// Its bits in each lane (predicates 0 or 1); old ones where the lane did not run.
    pub bits: [u64; 32],
}
