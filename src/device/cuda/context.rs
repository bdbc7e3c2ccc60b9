//! The card's context and first stream, memory on it, and how much of what was queued is known to be done.

use super::ahead::Ahead;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUcontext, CUdeviceptr, CUstream};
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

/// The card's context and stream; the last buffer or device to go gives them back.
pub(super) struct Context {
    pub id: String,
    pub device: c_int,
    pub context: CUcontext,
    pub stream: CUstream,
    /// Whether the card has a memory pool.
    pub pooled: bool,
    /// How much was queued on the stream, and how much of it is known to be done: calls, counted from 1.
    pub queued: AtomicU64,
    pub done: AtomicU64,
    /// What copies beside the stream, from its first use on.
    pub ahead: Mutex<Option<Ahead>>,
}

// SAFETY: the driver's calls may come from any thread; each makes the context current on its thread first.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A buffer's memory on the card.
pub(super) struct Owned {
    pub address: CUdeviceptr,
    pub context: Arc<Context>,
    /// The last call on the stream that uses it, by [`Context::queued`].
    pub last: AtomicU64,
    /// The end of a copy by the second stream that the first has not waited for yet.
    pub arriving: Mutex<Option<Event>>,
}

impl Owned {
    /// The address, for what is queued next on the stream.
    pub fn settled(&self) -> std::result::Result<CUdeviceptr, DriverError> {
        if let Some(event) = lock(&self.arriving).take() {
            let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            // SAFETY: a live event and stream; the driver keeps what it needs of an event that goes.
            unsafe { result::stream::wait_event(self.context.stream, event.0, wait) }?;
        }
        Ok(self.address)
    }

    /// Notes that what was queued last uses it.
    pub fn used(&self) {
        self.last.fetch_max(self.context.queued.fetch_add(1, SeqCst) + 1, SeqCst);
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let context = &self.context;
        if context.bind().is_err() {
            return; // the driver is shutting down, and takes the memory with it
        }
        if let Err(error) = self.settled() {
            return log::debug!("{}: memory is not given back: {}", context.id, describe(error));
        }
        // SAFETY: this is the only owner of an address that the same allocator gave; freeing waits for queued work.
        let freed = unsafe {
            match context.pooled {
                true => result::free_async(self.address, context.stream),
                false => result::free_sync(self.address),
            }
        };
        if let Err(error) = freed {
            log::debug!("{}: memory is not given back: {}", context.id, describe(error));
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Errors here mean that the driver has gone first.
        if self.bind().is_ok() {
            if let Some(ahead) = lock(&self.ahead).take() {
                ahead.close();
            }
            // SAFETY: no buffer or device is left that could use the stream.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
        // SAFETY: retained once, in `Cuda::open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Context {
    /// Makes the context the calling thread's.
    pub fn bind(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the context is retained until `self` goes.
        unsafe { result::ctx::set_current(self.context) }
    }

    /// An event after all that the stream has.
    pub fn record(&self) -> std::result::Result<Event, DriverError> {
        let event = Event::new()?;
        // SAFETY: a live event and stream.
        unsafe { result::event::record(event.0, self.stream) }?;
        Ok(event)
    }

    /// Waits for the stream.
    pub fn synchronize(&self) -> std::result::Result<(), DriverError> {
        let queued = self.queued.load(SeqCst);
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }?;
        self.done.fetch_max(queued, SeqCst);
        Ok(())
    }
}

/// A thread that panicked leaves whole values behind.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// `CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)`
pub(super) fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{:?} ({})", error.0, text.to_string_lossy()),
        Err(_) => format!("{:?}", error.0),
    }
}

/// An event that keeps time.
pub(super) struct Event(pub(super) sys::CUevent);

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Event {}

impl Event {
    pub fn new() -> std::result::Result<Event, DriverError> {
        result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map(Event)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `new`, and nobody else has it.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
