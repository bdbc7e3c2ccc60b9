//! A device that fails when it is told to, once.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::Arc;

use handmill::device::{Buffer, Device, Error, Result};
use handmill::op::{Caps, Dims, Kernel, OpSpec};
use memmap2::Mmap;

/// The next launch of attention is an error.
pub const ERROR: u8 = 1;
/// The next launch of attention panics.
pub const PANIC: u8 = 2;
/// The next allocation is an error.
pub const ALLOC: u8 = 3;

struct Faulty {
    inner: Arc<dyn Device>,
    fail: Arc<AtomicU8>,
}

/// `inner`, and what it is to do wrong next.
pub fn faulty(inner: Arc<dyn Device>) -> (Arc<dyn Device>, Arc<AtomicU8>) {
    let fail = Arc::new(AtomicU8::new(0));
    (Arc::new(Faulty { inner, fail: fail.clone() }), fail)
}

fn error() -> Error {
    Error::Invalid { what: "a test".into(), reason: "fails on purpose".into() }
}

impl Device for Faulty {
    fn id(&self) -> &str {
        self.inner.id()
    }
    fn description(&self) -> String {
        self.inner.description()
    }
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        match self.fail.compare_exchange(ALLOC, 0, SeqCst, SeqCst) {
            Ok(_) => Err(error()),
            Err(_) => self.inner.alloc(bytes),
        }
    }
    fn import(&self, map: &Arc<Mmap>, range: Range<usize>) -> Result<Buffer> {
        self.inner.import(map, range)
    }
    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        self.inner.write(target, offset, source)
    }
    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        self.inner.read(source, offset, target)
    }
    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        self.inner.copy(from, from_offset, to, to_offset, bytes)
    }
    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        if spec.name == "attention" {
            if self.fail.compare_exchange(ERROR, 0, SeqCst, SeqCst).is_ok() {
                return Err(error());
            }
            if self.fail.compare_exchange(PANIC, 0, SeqCst, SeqCst).is_ok() {
                panic!("fails on purpose");
            }
        }
        self.inner.launch(spec, kernel, args, dims)
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.inner.time(work)
    }
}
