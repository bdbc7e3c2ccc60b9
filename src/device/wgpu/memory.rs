//! Device memory: buffers, and those given back, kept for the next request of their size.

use super::fault::{lock, Faults};
use super::{Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use wgpu::BufferUsages;

/// Freed memory kept at most, and of it the largest buffer kept.
const POOL_BYTES: usize = 256 << 20;
const POOLED_BYTES: usize = 32 << 20;
/// Sizes are rounded up to multiples of this, so that more of them can be used again.
const UNIT: usize = 256;

/// What a [`crate::device::Buffer`] of this device holds.
pub(super) struct Memory {
    /// Names the wgpu buffer in caches, and is never given twice.
    pub id: u64,
    pub buffer: wgpu::Buffer,
    /// Bytes asked for; the wgpu buffer has more.
    pub bytes: usize,
    heap: Arc<Heap>,
}

/// Makes buffers and takes them back.
pub(super) struct Heap {
    device: wgpu::Device,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// By size.
    free: HashMap<usize, Vec<(u64, wgpu::Buffer)>>,
    free_bytes: usize,
    /// Buffers given up since [`Heap::take_dead`] was last called.
    dead: Vec<u64>,
}

impl Heap {
    pub fn new(device: &wgpu::Device) -> Arc<Heap> {
        Arc::new(Heap { device: device.clone(), state: Mutex::default() })
    }

    /// Memory of `bytes` bytes, zero or from an earlier use.
    pub fn alloc(self: &Arc<Heap>, id: &str, faults: &Faults, bytes: usize) -> Result<Memory> {
        let out_of_memory = |reason: String| Error::OutOfMemory { device: id.into(), bytes, reason };
        let size = bytes.max(1).checked_next_multiple_of(UNIT);
        let limit = self.device.limits().max_buffer_size;
        let size = size.filter(|&size| size as u64 <= limit);
        let size = size.ok_or_else(|| out_of_memory(format!("the adapter's buffers have at most {limit} bytes")))?;
        let mut state = lock(&self.state);
        if let Some((id, buffer)) = state.free.get_mut(&size).and_then(Vec::pop) {
            state.free_bytes -= size;
            return Ok(Memory { id, buffer, bytes, heap: self.clone() });
        }
        let descriptor = wgpu::BufferDescriptor {
            label: None,
            size: size as u64,
            usage: BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let mut buffer = self.device.create_buffer(&descriptor);
        if faults.take_out_of_memory() {
            // What the pool keeps may be what is missing.
            state.clear();
            buffer = self.device.create_buffer(&descriptor);
            if faults.take_out_of_memory() {
                let reason = "out of device memory: take a smaller model, context or batch".into();
                return Err(out_of_memory(reason));
            }
        }
        faults.take(id, "alloc")?;
        state.next += 1;
        Ok(Memory { id: state.next, buffer, bytes, heap: self.clone() })
    }

    /// Ids of buffers that are gone: caches must let go of them.
    pub fn take_dead(&self) -> Vec<u64> {
        std::mem::take(&mut lock(&self.state).dead)
    }
}

impl State {
    fn clear(&mut self) {
        self.dead.extend(self.free.values().flatten().map(|(id, _)| *id));
        self.free.clear();
        self.free_bytes = 0;
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let size = self.buffer.size() as usize;
        let mut state = lock(&self.heap.state);
        if size <= POOLED_BYTES && state.free_bytes + size <= POOL_BYTES {
            state.free_bytes += size;
            state.free.entry(size).or_default().push((self.id, self.buffer.clone()));
        } else {
            state.dead.push(self.id);
        }
    }
}
