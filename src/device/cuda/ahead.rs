//! Copies to the card beside its work: a second stream, and memory that the driver keeps in place to copy from.
//!
//! ```text
//! for each part of the source:  wait until the card has read the half of the memory that is next;  copy the part there
//!                               queue its copy to the card and an event after it
//! ```
//!
//! Who uses the target next makes the first stream wait for the last event: only that work waits, no other.

use super::context::{Context, Event};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdeviceptr, CUevent_wait_flags as Wait, CUstream};
use rayon::prelude::*;

/// Bytes of one half: some hundred microseconds of a copy, so that starting it is a small part.
const HALF: usize = 8 << 20;
/// Bytes that one thread copies: more of them fill the memory as fast as the card reads it.
const GRAIN: usize = 1 << 20;

/// The second stream and its memory.
pub(super) struct Ahead {
    stream: CUstream,
    /// Two halves.
    memory: *mut u8,
    /// When the card has read each half.
    read: [Event; 2],
    next: usize,
}

// SAFETY: handles and memory of the driver, which any thread may use, one at a time behind the context's lock.
unsafe impl Send for Ahead {}

impl Ahead {
    /// On the calling thread's context.
    pub fn new() -> Result<Ahead, DriverError> {
        let read = [Event::new()?, Event::new()?];
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        // SAFETY: fresh memory, which `Ahead` alone has.
        match unsafe { result::malloc_host(2 * HALF, 0) } {
            Ok(memory) => Ok(Ahead { stream, memory: memory.cast(), read, next: 0 }),
            Err(error) => {
                // SAFETY: made above, and nobody has used it.
                let _ = unsafe { result::stream::destroy(stream) };
                Err(error)
            }
        }
    }

    /// Queues copies of `source` to `target`, where the caller has room for it; `after` the work that the first stream has,
    /// where that uses the target. Gives an event at their end.
    pub fn copy(
        &mut self,
        context: &Context,
        target: CUdeviceptr,
        source: &[u8],
        after: bool,
    ) -> Result<Event, DriverError> {
        if after {
            let before = context.record()?;
            // SAFETY: a live event and stream.
            unsafe { result::stream::wait_event(self.stream, before.0, Wait::CU_EVENT_WAIT_DEFAULT) }?;
        }
        for (i, part) in source.chunks(HALF).enumerate() {
            let half = self.next;
            self.next = 1 - half;
            // SAFETY: a live event; one never recorded is over.
            unsafe { result::event::synchronize(self.read[half].0) }?;
            // SAFETY: the half is ours alone now: the card has read it, and `self` is borrowed for writing.
            let staged = unsafe { std::slice::from_raw_parts_mut(self.memory.add(half * HALF), part.len()) };
            staged.par_chunks_mut(GRAIN).zip(part.par_chunks(GRAIN)).for_each(|(to, from)| to.copy_from_slice(from));
            // SAFETY: the caller's room; the half stays as it is until the event, which is waited for above and in `close`.
            unsafe {
                result::memcpy_htod_async(target + (i * HALF) as u64, staged, self.stream)?;
                result::event::record(self.read[half].0, self.stream)?;
            }
        }
        let arrived = Event::new()?;
        // SAFETY: a live event and stream.
        unsafe { result::event::record(arrived.0, self.stream) }?;
        Ok(arrived)
    }

    /// Gives everything back, on a thread with the context.
    pub fn close(self) {
        // SAFETY: nothing reads the memory once the stream is done, and `self` goes with both.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::free_host(self.memory.cast());
            let _ = result::stream::destroy(self.stream);
        }
    }
}
