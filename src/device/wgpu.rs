//! The `wgpu` device: WGSL kernels on any Vulkan, Metal or DirectX 12 adapter.
//!
//! | room | what it knows |
//! | --- | --- |
//! | `adapter` | which adapters there are and what is asked of one |
//! | `memory` | buffers, and those kept for their next use |
//! | `shader` | from WGSL files to pipelines, and from an error to its line |
//! | `queue` | launches and copies in order, params, waiting, time |
//! | `fault` | what wgpu reports by callback, until a call can return it |
//!
//! Two rules of the house make kernels fast here: a kernel writes every word of workgroup memory before it reads it, for
//! nothing clears it, and its loops end.

mod adapter;
mod fault;
mod memory;
mod queue;
mod shader;

pub use adapter::{list, Options};

use super::{check_launch, Buffer, Device, Error, Result};
use crate::op::{Caps, DeviceKind, Dims, Kernel, OpSpec, Simd};
use fault::Faults;
use memory::{Heap, Memory};
use queue::{Binding, Queue};
use shader::Shaders;
use std::sync::Arc;
use std::time::Instant;

/// Bound to one argument at most, so that every adapter sees the same shards.
const MAX_BINDING: usize = 128 << 20;
/// Views begin at multiples of what is the largest alignment that WebGPU allows an adapter to ask for.
const VIEW_ALIGNMENT: usize = 256;

/// An adapter with a queue.
pub struct Wgpu {
    id: String,
    description: String,
    caps: Caps,
    limits: wgpu::Limits,
    faults: Arc<Faults>,
    heap: Arc<Heap>,
    shaders: Shaders,
    queue: Queue,
    /// Stand for empty arguments, which must be bound to something: one that is read, one that is written.
    nothing: [Memory; 2],
    /// Two times.
    stamps: Option<wgpu::QuerySet>,
}

impl Wgpu {
    /// Opens `wgpu`, `wgpu:N`, and either followed by `:unchecked`. Errors: no such adapter, or it refuses.
    pub fn open(id: &str) -> Result<Wgpu> {
        let mut options = Options::default();
        let mut words = id.split(':').skip(1).peekable();
        let index = match words.peek().map(|word| word.parse()) {
            Some(Ok(index)) => {
                words.next();
                index
            }
            _ => 0,
        };
        for word in words {
            if word != "unchecked" {
                let reason = format!("{word} is neither an adapter's number nor `unchecked`, as in wgpu:0:unchecked");
                return Err(Error::Unavailable { device: id.into(), reason });
            }
            options.checked = false;
        }
        Wgpu::with(index, &options)
    }

    /// Opens adapter number `index` of [`list`].
    pub fn with(index: usize, options: &Options) -> Result<Wgpu> {
        let (adapter, device, queue) = adapter::open(index, options)?;
        let id = format!("wgpu:{index}");
        let (limits, features, info) = (device.limits(), device.features(), adapter.get_info());
        let faults = Faults::watch(&device);
        let heap = Heap::new(&device);
        let subgroups = features.contains(wgpu::Features::SUBGROUP);
        let limit = MAX_BINDING.min(limits.max_storage_buffer_binding_size.try_into().unwrap_or(usize::MAX));
        let caps = Caps {
            kind: DeviceKind::Wgpu,
            simd: Simd::Portable,
            sm: 0,
            software: adapter::is_software(adapter),
            f16: features.contains(wgpu::Features::SHADER_F16),
            coopmat: features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            subgroup: if subgroups { (info.subgroup_min_size, info.subgroup_max_size) } else { (0, 0) },
            shared_bytes: limits.max_compute_workgroup_storage_size,
            max_binding: options.max_binding.map_or(limit, |lower| lower.min(limit)) / VIEW_ALIGNMENT * VIEW_ALIGNMENT,
            view_alignment: VIEW_ALIGNMENT,
            batch_invariant: false,
        };
        let stamps = features.contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("time"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            })
        });
        let mut description = adapter::name(adapter);
        if adapter::is_software(adapter) {
            description += ", software: correctness only";
        }
        if !options.checked {
            description += ", unchecked";
        }
        Ok(Wgpu {
            description,
            caps,
            nothing: [heap.alloc(&id, &faults, 256)?, heap.alloc(&id, &faults, 256)?],
            shaders: Shaders::new(&device, options.checked),
            queue: Queue::new(&id, &device, queue),
            limits,
            faults,
            heap,
            stamps,
            id,
        })
    }

    /// What to bind where the contract needs `bytes` bytes of `buffer`.
    fn binding<'a>(&'a self, what: &str, buffer: &'a Buffer, bytes: usize, written: bool) -> Result<Binding<'a>> {
        if bytes == 0 {
            return Ok(Binding { memory: &self.nothing[written as usize], offset: 0, bytes: 256 });
        }
        let memory = memory(buffer)?;
        let range = buffer.range();
        if !range.start.is_multiple_of(VIEW_ALIGNMENT) {
            return Err(invalid(what, format!("a view at byte {}, no multiple of {VIEW_ALIGNMENT}", range.start)));
        }
        if bytes > self.caps.max_binding {
            let reason = format!("{bytes} bytes in one argument; the device binds at most {}", self.caps.max_binding);
            return Err(invalid(what, reason));
        }
        // The whole view, the same at every call, so that the binding is made once; a rounded end lies in the memory.
        let whole = buffer.bytes().next_multiple_of(4);
        let bytes = if whole <= self.caps.max_binding { whole } else { bytes.next_multiple_of(4) };
        Ok(Binding { memory, offset: range.start, bytes })
    }
}

fn invalid(what: &str, reason: impl ToString) -> Error {
    Error::Invalid { what: what.to_string(), reason: reason.to_string() }
}

fn memory(buffer: &Buffer) -> Result<&Memory> {
    buffer.memory().ok_or_else(|| invalid("wgpu", "a buffer of another device"))
}

/// Where `offset..offset + bytes` of a buffer begins in its memory.
fn position(what: &str, buffer: &Buffer, offset: usize, bytes: usize) -> Result<usize> {
    match offset.checked_add(bytes) {
        Some(end) if end <= buffer.bytes() => Ok(buffer.range().start + offset),
        _ => Err(invalid(what, format!("bytes {offset}+{bytes} of a buffer of {} bytes", buffer.bytes()))),
    }
}

impl Device for Wgpu {
    fn id(&self) -> &str {
        &self.id
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        Ok(Buffer::new(Arc::new(self.heap.alloc(&self.id, &self.faults, bytes)?), bytes))
    }

    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        let (memory, start) = (memory(target)?, position("write", target, offset, source.len())?);
        if source.is_empty() {
            return Ok(());
        }
        // wgpu writes whole words: those at the ends keep their other bytes.
        let end = start + source.len();
        let (first, last) = (start / 4 * 4, end.next_multiple_of(4));
        if (first, last) == (start, end) {
            return self.queue.write(&self.faults, memory, start, source);
        }
        let mut words = vec![0; last - first];
        if start > first {
            self.queue.read(&self.faults, memory, first, &mut words[..4])?;
        }
        if end < last && end < memory.bytes && !(start > first && words.len() == 4) {
            let tail = words.len() - 4;
            self.queue.read(&self.faults, memory, last - 4, &mut words[tail..])?;
        }
        words[start - first..end - first].copy_from_slice(source);
        self.queue.write(&self.faults, memory, first, &words)
    }

    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        let (memory, start) = (memory(source)?, position("read", source, offset, target.len())?);
        let end = start + target.len();
        let (first, last) = (start / 4 * 4, end.next_multiple_of(4));
        if (first, last) == (start, end) {
            return self.queue.read(&self.faults, memory, start, target);
        }
        let mut words = vec![0; last - first];
        self.queue.read(&self.faults, memory, first, &mut words)?;
        target.copy_from_slice(&words[start - first..end - first]);
        Ok(())
    }

    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        let (source, target) = (memory(from)?, memory(to)?);
        let from_start = position("copy from", from, from_offset, bytes)?;
        let to_start = position("copy to", to, to_offset, bytes)?;
        if !(from_offset | to_offset | bytes).is_multiple_of(4) {
            let reason = format!("offsets {from_offset}, {to_offset} and size {bytes} are not multiples of 4");
            return Err(invalid("copy", reason));
        }
        if bytes == 0 {
            return Ok(());
        }
        if source.id == target.id {
            // wgpu copies between two buffers only.
            let between = self.heap.alloc(&self.id, &self.faults, bytes)?;
            self.queue.copy(source, from_start, &between, 0, bytes);
            self.queue.copy(&between, 0, target, to_start, bytes);
        } else {
            self.queue.copy(source, from_start, target, to_start, bytes);
        }
        Ok(())
    }

    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        check_launch(spec, kernel, args, dims)?;
        let what = || format!("{} ({dims})", kernel.stem);
        let work = (kernel.launch)(dims);
        let most = self.limits.max_compute_workgroups_per_dimension;
        if let Some(groups) = work.grid.iter().find(|groups| **groups > most) {
            return Err(invalid(&what(), format!("{groups} workgroups in one dimension; the device runs {most}")));
        }
        let mut written = shader::written(spec);
        let mut bindings = Vec::with_capacity(args.len());
        for (i, (arg, buffer)) in spec.args.iter().zip(args).enumerate() {
            let bytes = arg.bytes(dims, kernel.act);
            let binding = self.binding(&what(), buffer, bytes, written & (1 << i) != 0)?;
            bindings.push(binding);
        }
        // wgpu tells reading from writing by the buffer: where one is both, in parts apart, all its parts are written.
        for i in 0..bindings.len() {
            let both = |j: usize| written & (1 << j) != 0 && bindings[j].memory.id == bindings[i].memory.id;
            if (0..bindings.len()).any(both) {
                written |= 1 << i;
            }
        }
        let pipeline = self.shaders.pipeline(&self.id, &self.faults, kernel, args.len(), written)?;
        if work.grid.contains(&0) {
            return Ok(());
        }
        let dead = self.heap.take_dead();
        self.queue.dispatch(&self.faults, &pipeline, &bindings, dims.params(), work.grid, &dead)?;
        self.faults.take(&self.id, &what())
    }

    fn sync(&self) -> Result<()> {
        self.queue.sync(&self.faults)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.sync()?;
        let start = Instant::now();
        if let Some(stamps) = &self.stamps {
            let target = self.heap.alloc(&self.id, &self.faults, 16)?;
            let seconds = self.queue.time(&self.faults, stamps, &target, work)? / 1e9;
            let wall = start.elapsed().as_secs_f64();
            // A clock that stands still, or runs ahead of ours, is none.
            return Ok(if seconds > 0.0 && seconds < wall { seconds } else { wall });
        }
        work()?;
        self.sync()?;
        Ok(start.elapsed().as_secs_f64())
    }
}
