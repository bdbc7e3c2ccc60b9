//! A device that notes how long each op takes. Timing waits for each launch, so a device with a queue of its own is
//! slower while it is watched.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::Mmap;

use super::{Buffer, Device, Result};
use crate::op::{Caps, Dims, Kernel, OpSpec};

/// Launches of one op, summed up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Row {
    /// How many.
    pub launches: u64,
    /// How long they took.
    pub seconds: f64,
    /// Floating-point operations by the ops' contracts.
    pub flops: u64,
}

/// Another device, watched.
pub struct Profiled {
    inner: Arc<dyn Device>,
    rows: Mutex<BTreeMap<String, Row>>,
}

impl Profiled {
    /// Watches a device.
    pub fn new(inner: Arc<dyn Device>) -> Profiled {
        Profiled { inner, rows: Mutex::default() }
    }

    /// The kernels launched since the last call, the one that took longest first.
    pub fn take(&self) -> Vec<(String, Row)> {
        let rows = std::mem::take(&mut *self.rows.lock().unwrap_or_else(PoisonError::into_inner));
        let mut rows: Vec<(String, Row)> = rows.into_iter().collect();
        rows.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        rows
    }
}

impl Device for Profiled {
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
        let seconds = self.inner.time(&mut || self.inner.launch(spec, kernel, args, dims))?;
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let row = rows.entry(kernel.stem.to_string()).or_default();
        row.launches += 1;
        row.seconds += seconds;
        row.flops += (spec.cost)(dims).flops;
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.inner.time(work)
    }
}
