//! A device on which a row of a result has the same bits whatever the other rows are and however many: only kernels
//! that have this property run, and which of them does not depend on the number of rows.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

use super::{Buffer, Device, Result};
use crate::op::{Caps, Dims, Kernel, OpSpec};

/// Another device, restricted.
pub struct Invariant {
    inner: Arc<dyn Device>,
    caps: Caps,
}

/// `device`, restricted to kernels of which [`crate::op::row_invariant`] says so.
pub fn invariant(device: Arc<dyn Device>) -> Arc<dyn Device> {
    let caps = Caps { batch_invariant: true, ..device.caps().clone() };
    Arc::new(Invariant { inner: device, caps })
}

impl Device for Invariant {
    fn id(&self) -> &str {
        self.inner.id()
    }

    fn description(&self) -> String {
        format!("{}, batch-invariant", self.inner.description())
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.inner.alloc(bytes)
    }

    fn import(&self, map: &Arc<Mmap>, range: Range<usize>) -> Result<Buffer> {
        self.inner.import(map, range)
    }

    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        self.inner.write(target, offset, source)
    }

    fn write_ahead(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        self.inner.write_ahead(target, offset, source)
    }

    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        self.inner.read(source, offset, target)
    }

    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        self.inner.copy(from, from_offset, to, to_offset, bytes)
    }

    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        self.inner.launch(spec, kernel, args, dims)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.inner.time(work)
    }
}
