//! What can go wrong, always with the place: file or kernel, line, block, warp and lane.

use std::fmt;

/// Where in a launch something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Place {
    /// Source line of the instruction, from 1.
    pub line: u32,
    /// `%ctaid`.
    pub block: [u32; 3],
    /// Warp within the block.
    pub warp: u32,
    /// Lane within the warp.
    pub lane: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "line {}, block ({x},{y},{z}), warp {}, lane {}", self.line, self.warp, self.lane)
    }
}

/// A fault that cannot be executed past, or a source or launch that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The source is not PTX that this crate runs.
    Parse {
        /// The name given to [`crate::Module::parse`].
        file: String,
        /// Source line, from 1.
        line: u32,
        /// What is wrong and what to do.
        message: String,
    },
    /// The launch does not fit the kernel.
    Launch {
        /// Entry name.
        kernel: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// The kernel did something that has no result to continue with.
    Fault {
        /// Entry name.
        kernel: String,
        /// Where.
        place: Place,
        /// What happened.
        message: String,
    },
    /// A buffer could not be made or found.
    Memory(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Parse { file, line, message } => write!(f, "{file}:{line}: {message}"),
            Error::Launch { kernel, message } => write!(f, "launch of {kernel}: {message}"),
            Error::Fault { kernel, place, message } => write!(f, "{kernel}, {place}: {message}"),
            Error::Memory(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

/// A message bound to a source line, before the file is known.
#[derive(Debug)]
pub(crate) struct At {
    pub line: u32,
    pub message: String,
}

/// Shorthand for `Err(At { .. })`.
pub(crate) fn at<T>(line: u32, message: impl Into<String>) -> Result<T, At> {
    Err(At { line, message: message.into() })
}
