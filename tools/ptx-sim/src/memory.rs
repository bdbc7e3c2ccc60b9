//! Global memory: separate buffers, so that every bound is exact.
//!
//! An address is `2 (index + 1) << 32 | offset`: the gap between two buffers' upper halves catches offsets that run
//! below zero or past 4 GiB.

use std::ops::Range;

use crate::error::Error;

/// A buffer of [`Memory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub(crate) u32);

impl BufferId {
    /// Position in order of allocation, from 0.
    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// The address of its first byte.
    pub fn address(self) -> u64 {
        (u64::from(self.0) + 1) << 33
    }
}

pub(crate) struct Buffer {
    /// 16-byte words: aligned for every access.
    words: Vec<u128>,
    len: usize,
    /// One flag a byte, or none when all bytes have been written.
    init: Option<Vec<u8>>,
}

/// Owns the buffers that launches read and write.
#[derive(Default)]
pub struct Memory {
    buffers: Vec<Option<Buffer>>,
}

/// What fresh memory holds: a NaN in f32, f16 and bf16, −1 in integers.
pub(crate) const POISON: u8 = 0xff;
/// Offsets have 32 bits.
const MAX_BUFFER: usize = 1 << 32;

impl Memory {
    /// No buffers.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// A buffer of `bytes`, zeroed if `initialised`, else of unwritten bytes that checked launches refuse to read.
    pub fn alloc(&mut self, bytes: usize, initialised: bool) -> Result<BufferId, Error> {
        if bytes > MAX_BUFFER {
            return Err(Error::Memory(format!("a buffer of {bytes} bytes; at most {MAX_BUFFER} have addresses")));
        }
        if self.buffers.len() >= 1 << 28 {
            return Err(Error::Memory("too many buffers have been allocated".into()));
        }
        let fill = if initialised { 0 } else { u128::from_ne_bytes([POISON; 16]) };
        let buffer = Buffer {
            words: vec![fill; bytes.div_ceil(16)],
            len: bytes,
            init: (!initialised).then(|| vec![0; bytes.next_multiple_of(16)]),
        };
        self.buffers.push(Some(buffer));
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    /// An initialised buffer with the given bytes.
    pub fn alloc_from(&mut self, bytes: &[u8]) -> Result<BufferId, Error> {
        let id = self.alloc(bytes.len(), true)?;
        self.bytes_mut(id).copy_from_slice(bytes);
        Ok(id)
    }

    fn get(&self, id: BufferId) -> Option<&Buffer> {
        self.buffers.get(id.0 as usize)?.as_ref()
    }

    pub(crate) fn exists(&self, id: BufferId) -> bool {
        self.get(id).is_some()
    }

    /// Length in bytes; 0 after [`Memory::free`].
    pub fn len_of(&self, id: BufferId) -> usize {
        self.get(id).map_or(0, |b| b.len)
    }

    /// The buffer's bytes; empty after [`Memory::free`].
    pub fn bytes(&self, id: BufferId) -> &[u8] {
        // SAFETY: `len` is at most the words' bytes, and every byte of a u128 is valid.
        self.get(id).map_or(&[], |b| unsafe { std::slice::from_raw_parts(b.words.as_ptr().cast(), b.len) })
    }

    /// The buffer's bytes to write; follow with [`Memory::mark_initialised`] unless it was allocated so.
    pub fn bytes_mut(&mut self, id: BufferId) -> &mut [u8] {
        match self.buffers.get_mut(id.0 as usize).and_then(Option::as_mut) {
            // SAFETY: as in `bytes`, and the borrow of self is exclusive.
            Some(b) => unsafe { std::slice::from_raw_parts_mut(b.words.as_mut_ptr().cast(), b.len) },
            None => &mut [],
        }
    }

    /// Declares bytes written, as far as they exist.
    pub fn mark_initialised(&mut self, id: BufferId, range: Range<usize>) {
        let Some(buffer) = self.buffers.get_mut(id.0 as usize).and_then(Option::as_mut) else { return };
        let range = range.start.min(buffer.len)..range.end.min(buffer.len);
        if range == (0..buffer.len) {
            buffer.init = None;
        } else if let Some(init) = &mut buffer.init {
            if range.start < range.end {
                init[range].fill(1);
            }
        }
    }

    /// Gives the buffer's memory back; a later access through it is out of bounds.
    pub fn free(&mut self, id: BufferId) {
        if let Some(slot) = self.buffers.get_mut(id.0 as usize) {
            *slot = None;
        }
    }

    /// How many buffers were ever allocated.
    pub(crate) fn buffers(&self) -> usize {
        self.buffers.len()
    }

    /// What a launch sees: one view for each buffer ever allocated.
    pub(crate) fn views(&mut self) -> Vec<View> {
        let view = |slot: &mut Option<Buffer>| match slot {
            Some(b) => View {
                data: b.words.as_mut_ptr().cast(),
                len: b.len as u64,
                init: b.init.as_mut().map_or(std::ptr::null_mut(), |i| i.as_mut_ptr()),
            },
            None => View { data: std::ptr::null_mut(), len: 0, init: std::ptr::null_mut() },
        };
        self.buffers.iter_mut().map(view).collect()
    }
}

/// A buffer as the blocks of a launch share it. Blocks run in parallel and a faulty kernel may race, so bytes are
/// touched only by relaxed atomic operations while a launch runs.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub data: *mut u8,
    pub len: u64,
    /// One flag a byte, or null: all initialised.
    pub init: *mut u8,
}

impl View {
    /// Bytes `start..start + bytes` of this view, which has them.
    pub fn part(&self, start: usize, bytes: usize) -> View {
        View {
            data: self.data.wrapping_add(start),
            len: bytes as u64,
            init: if self.init.is_null() { self.init } else { self.init.wrapping_add(start) },
        }
    }
}

// SAFETY: the launch holds `&mut Memory` for the views' whole life and touches the bytes atomically only.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_and_freed() {
        let mut memory = Memory::new();
        let (a, b) = (memory.alloc(3, true).unwrap(), memory.alloc_from(&[1, 2]).unwrap());
        assert_eq!(memory.bytes(a), [0; 3]);
        assert_eq!(memory.bytes(b), [1, 2]);
        assert_eq!(b.address() - a.address(), 2 << 32);
        memory.free(a);
        assert!(memory.bytes(a).is_empty() && memory.bytes_mut(a).is_empty());
        memory.mark_initialised(a, 0..9);
        let c = memory.alloc(20, false).unwrap();
        assert_eq!(memory.bytes(c), [POISON; 20]);
        memory.mark_initialised(c, 30..40);
        assert!(memory.alloc(MAX_BUFFER + 1, true).is_err());
    }
}
