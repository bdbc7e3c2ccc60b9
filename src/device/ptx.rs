//! What the two devices that run PTX share: a launch worked out and checked before either sees it.

use super::{check_launch, Buffer, Error, Result};
use crate::op::{Caps, Dims, File, Kernel, OpSpec, Role, Source, PARAMS_BYTES};
use std::ops::Range;

/// Threads that a block may have on every card.
const BLOCK_THREADS: u64 = 1024;
/// Blocks along x, y and z on every card.
const GRID: [u32; 3] = [(1 << 31) - 1, 65535, 65535];

/// One launch: what runs, how it is divided, and with which bytes.
pub struct Work {
    /// The source.
    pub file: File,
    /// Entry point.
    pub entry: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
    /// Bytes of each argument's memory object, in contract order: no more than its shape has.
    pub ranges: Vec<Range<usize>>,
    /// The block that follows the pointers.
    pub params: [u8; PARAMS_BYTES],
}

/// Works out a launch. None: every output is empty, and there is nothing to do.
///
/// Errors: arguments that do not fit the contract, or a division of the work that the device cannot take.
pub fn work(spec: &OpSpec, kernel: &Kernel, args: &[&Buffer], dims: &Dims, caps: &Caps) -> Result<Option<Work>> {
    check_launch(spec, kernel, args, dims)?;
    let refuse = |reason: String| Err(invalid(&format!("{} ({dims})", kernel.stem), reason));
    let Source::Ptx(file) = kernel.source else { return refuse("not a kernel in PTX".into()) };
    let mut outputs = spec.args.iter().filter(|arg| arg.role != Role::In);
    if outputs.all(|arg| arg.bytes(dims, kernel.act) == 0) {
        return Ok(None);
    }
    let mut ranges = Vec::with_capacity(args.len());
    for (arg, buffer) in spec.args.iter().zip(args) {
        let start = buffer.range().start;
        if !start.is_multiple_of(caps.view_alignment) {
            let unit = caps.view_alignment;
            return refuse(format!(
                "{} begins at byte {start} of its memory, which is no multiple of {unit}",
                arg.name
            ));
        }
        ranges.push(start..start + arg.bytes(dims, kernel.act));
    }
    let launch = (kernel.launch)(dims);
    let threads = launch.block.iter().map(|&n| u64::from(n)).product::<u64>();
    if threads == 0 || threads > BLOCK_THREADS || launch.block[2] > 64 {
        return refuse(format!(
            "a block of {:?}: it has 1 to {BLOCK_THREADS} threads, at most 64 along z",
            launch.block
        ));
    }
    if (0..3).any(|axis| launch.grid[axis] == 0 || launch.grid[axis] > GRID[axis]) {
        return refuse(format!("a grid of {:?}: it has 1 to {GRID:?} blocks; split the work by rows", launch.grid));
    }
    if launch.shared_bytes > caps.shared_bytes {
        let (wanted, has) = (launch.shared_bytes, caps.shared_bytes);
        return refuse(format!("{wanted} bytes of shared memory for a block: the device has {has}"));
    }
    let (entry, params) = (kernel.stem, dims.params());
    let (grid, block, shared_bytes) = (launch.grid, launch.block, launch.shared_bytes);
    Ok(Some(Work { file, entry, grid, block, shared_bytes, ranges, params }))
}

/// An [`Error::Invalid`].
pub fn invalid(what: &str, reason: impl ToString) -> Error {
    Error::Invalid { what: what.to_string(), reason: reason.to_string() }
}

/// The bytes of its memory object that `offset..offset + bytes` of a buffer are.
pub fn range(what: &str, buffer: &Buffer, offset: usize, bytes: usize) -> Result<Range<usize>> {
    match offset.checked_add(bytes) {
        Some(end) if end <= buffer.bytes() => Ok(buffer.range().start + offset..buffer.range().start + end),
        _ => Err(invalid(what, format!("bytes {offset}+{bytes} of a buffer of {} bytes", buffer.bytes()))),
    }
}

/// Both sides of a copy between buffers, which goes by words.
pub fn copy_ranges(
    from: &Buffer,
    from_offset: usize,
    to: &Buffer,
    to_offset: usize,
    bytes: usize,
) -> Result<(Range<usize>, Range<usize>)> {
    let ranges = (range("copy from", from, from_offset, bytes)?, range("copy to", to, to_offset, bytes)?);
    if !(from_offset | to_offset | bytes).is_multiple_of(4) {
        let reason = format!("offsets {from_offset}, {to_offset} and size {bytes} are not multiples of 4");
        return Err(invalid("copy", reason));
    }
    Ok(ranges)
}
