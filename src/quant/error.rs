//! What can be wrong with a format, a matrix or the bytes of one. Each message says what to do next.

use super::gguf_blocks::GgmlType;
use super::Format;

/// An error of encoding, checking or re-laying weights.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A format word that is not one of ours.
    #[error("unknown weight format {0:?}; use f32, f16, bf16, q4, q8, nf4 or nf4dq")]
    UnknownFormat(String),
    /// A matrix the format cannot hold.
    #[error("{} cannot hold a matrix of {rows} x {cols}: {reason}", .format.name())]
    Shape {
        /// The format asked for.
        format: Format,
        /// Rows, N.
        rows: usize,
        /// Columns, K.
        cols: usize,
        /// What is wrong and what to do.
        reason: &'static str,
    },
    /// The bytes of the matrix cannot be counted in a `usize`.
    #[error("a matrix of {rows} x {cols} is too large to address; check the dims in the file's header")]
    Overflow {
        /// Rows, N.
        rows: usize,
        /// Columns, K.
        cols: usize,
    },
    /// Fewer or more elements or bytes than the dims say.
    #[error("{what}: {expected} expected, {found} found; the file is cut short or its dims are wrong")]
    Length {
        /// What was counted, with its unit.
        what: &'static str,
        /// How many the dims ask for.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A weight, or the scale or minimum of its block, is NaN or infinite.
    #[error("{what} at row {row}, column {col} is {value}; weights must be finite, check the source of the model")]
    NotFinite {
        /// `weight`, `scale` or `minimum`.
        what: &'static str,
        /// Row, from 0.
        row: usize,
        /// Column, from 0: for a scale the first of its block.
        col: usize,
        /// What was found.
        value: f32,
    },
    /// A finite value that the element type of the format rounds to infinity.
    #[error("{what} at row {row}, column {col} is {value}, beyond the range of {dtype}; {advice}")]
    Range {
        /// `weight`, `scale` or `minimum`.
        what: &'static str,
        /// Row, from 0.
        row: usize,
        /// Column, from 0: for a scale the first of its group.
        col: usize,
        /// What was found.
        value: f32,
        /// The element type that cannot hold it.
        dtype: &'static str,
        /// What holds it.
        advice: &'static str,
    },
    /// A part of a packed matrix that is missing, or has another dtype, shape or length than its format.
    #[error("part {index} ({name}) of a {} matrix: {reason}", .format.name())]
    Part {
        /// The format.
        format: Format,
        /// Which part, in kernel argument order.
        index: usize,
        /// Its name.
        name: &'static str,
        /// What differs.
        reason: String,
    },
    /// A ggml type that exists but is not read here.
    #[error(
        "{name} (ggml type {id}) is not supported; use a file in F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K or Q6_K"
    )]
    UnsupportedType {
        /// The number in the file.
        id: u32,
        /// Its published name.
        name: &'static str,
    },
    /// A ggml type number nobody has published.
    #[error("ggml type {0} is unknown; the file is damaged or newer than this program")]
    UnknownType(u32),
    /// A row that does not end with a whole block.
    #[error("{} has {block} weights a block; rows of {cols} do not end with a whole one", .ty.name())]
    Block {
        /// The block type.
        ty: GgmlType,
        /// Weights in one block.
        block: usize,
        /// Columns, K.
        cols: usize,
    },
    /// A matrix in a format that has no such block in GGUF.
    #[error("{} with these groups is no GGUF {}; encode it as {wanted} first", .format.name(), .ty.name())]
    NotThatBlock {
        /// The format given.
        format: Format,
        /// The block type asked for.
        ty: GgmlType,
        /// The format that can be written.
        wanted: &'static str,
    },
}

/// A result with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
