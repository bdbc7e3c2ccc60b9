//! A record of what one warp did.

/// Which warp to trace, and how far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceWarp {
    /// `%ctaid`.
    pub block: [u32; 3],
    /// Warp within the block.
    pub warp: u32,
    /// The lane whose results are kept.
    pub lane: u32,
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
    /// Registers written and their bits in the traced lane (predicates 0 or 1).
    pub results: Vec<(String, u64)>,
    pub(crate) pc: u32,
    pub(crate) open: bool,
}
