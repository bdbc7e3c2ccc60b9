//! Devices: how to allocate, copy, launch and time. Nothing here knows of models.
//!
//! Work is queued and runs in the order given; `read` and `sync` wait for it. Buffers are opaque, so code written over
//! [`Device`] runs unchanged on every kind.

pub mod cpu;
pub mod cuda;
pub mod invariant;
pub mod profile;
pub mod ptx;
pub mod ptx_sim;
pub mod wgpu;

use crate::op::{Caps, DeviceKind, Dims, Kernel, OpSpec, Role};
use crate::tensor::Dtype;
use memmap2::Mmap;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such device here.
    #[error("device {device}: {reason}")]
    Unavailable {
        /// As asked for.
        device: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// Memory is short.
    #[error("device {device}: cannot allocate {bytes} bytes: {reason}")]
    OutOfMemory {
        /// The device's id.
        device: String,
        /// The size asked for.
        bytes: usize,
        /// What the allocator said.
        reason: String,
    },
    /// A launch or copy that does not fit its contract.
    #[error("{what}: {reason}")]
    Invalid {
        /// Kernel or copy.
        what: String,
        /// What does not fit.
        reason: String,
    },
    /// No kernel of the op runs here with these dims.
    #[error("{op} ({dims}): no kernel of this op runs on device {device}")]
    Unsupported {
        /// The op's id.
        op: String,
        /// The dims asked for.
        dims: String,
        /// The device's id.
        device: String,
    },
}

/// Result of a device's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// A range of device memory. Cloning shares it; the memory goes back when the last clone is dropped.
#[derive(Clone)]
pub struct Buffer {
    memory: Arc<dyn Any + Send + Sync>,
    range: Range<usize>,
}

impl Buffer {
    /// Wraps a device's own memory object of `bytes` bytes.
    pub fn new(memory: Arc<dyn Any + Send + Sync>, bytes: usize) -> Buffer {
        Buffer { memory, range: 0..bytes }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    /// Where it lies in its memory object.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The device's memory object, if it is of type `T`.
    pub fn memory<T: 'static>(&self) -> Option<&T> {
        self.memory.downcast_ref()
    }

    /// True when both lie in one memory object and share a byte.
    pub fn overlaps(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }

    /// A part of this buffer; `start` a multiple of the device's [`Caps::view_alignment`]. Panics outside the buffer.
    pub fn view(&self, start: usize, bytes: usize) -> Buffer {
        assert!(start + bytes <= self.bytes(), "view {start}+{bytes} of a buffer of {} bytes", self.bytes());
        let start = self.range.start + start;
        Buffer { memory: self.memory.clone(), range: start..start + bytes }
    }
}

/// A place that runs kernels.
pub trait Device: Send + Sync {
    /// As `--device` names it: `cpu`, `wgpu:0`.
    fn id(&self) -> &str;

    /// What a person calls it: processor, adapter and driver.
    fn description(&self) -> String;

    /// What it can do.
    fn caps(&self) -> &Caps;

    /// Uninitialised or zero memory of `bytes` bytes.
    fn alloc(&self, bytes: usize) -> Result<Buffer>;

    /// A part of a mapped file as a read-only buffer; a device with memory of its own copies it.
    fn import(&self, map: &Arc<Mmap>, range: Range<usize>) -> Result<Buffer> {
        let buffer = self.alloc(range.len())?;
        self.write(&buffer, 0, &map[range])?;
        Ok(buffer)
    }

    /// Copies `source` to `target` from byte `offset` on.
    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()>;

    /// Waits for the work queued so far and copies from byte `offset` of `source` on.
    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()>;

    /// Queues a copy of `bytes` bytes between buffers; offsets and size are multiples of 4.
    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()>;

    /// Queues `kernel` of `spec` with buffers in contract order.
    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()>;

    /// Waits for everything queued.
    fn sync(&self) -> Result<()>;

    /// Seconds the device spent on what `work` queues, by the device's own clock where it has one.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
}

/// Queues the fastest kernel of `spec` with f32 activations that this device runs.
pub fn run(device: &dyn Device, spec: &OpSpec, args: &[&Buffer], dims: &Dims) -> Result<()> {
    run_as(Dtype::F32, device, spec, args, dims)
}

/// The same with activations of type `act`.
pub fn run_as(act: Dtype, device: &dyn Device, spec: &OpSpec, args: &[&Buffer], dims: &Dims) -> Result<()> {
    match spec.choose(dims, act, device.caps()) {
        Some(kernel) => device.launch(spec, kernel, args, dims),
        None => Err(Error::Unsupported { op: spec.id(), dims: dims.to_string(), device: device.id().to_string() }),
    }
}

/// Checks a launch against its contract, for every device alike: the number of arguments, that each is large enough,
/// and that no output shares bytes with another argument.
pub fn check_launch(spec: &OpSpec, kernel: &Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
    let invalid = |reason: String| Error::Invalid { what: format!("{} ({dims})", kernel.stem), reason };
    if args.len() != spec.args.len() {
        return Err(invalid(format!("takes {} buffers, got {}", spec.args.len(), args.len())));
    }
    for (arg, buffer) in spec.args.iter().zip(args) {
        let needed = arg.bytes(dims, kernel.act);
        if buffer.bytes() < needed {
            return Err(invalid(format!("{} needs {needed} bytes, its buffer has {}", arg.name, buffer.bytes())));
        }
    }
    for (i, (arg, buffer)) in spec.args.iter().zip(args).enumerate() {
        let shared = args.iter().enumerate().find(|&(j, other)| j != i && buffer.overlaps(other));
        if let (true, Some((j, _))) = (arg.role != Role::In, shared) {
            return Err(invalid(format!("output {} shares memory with {}", arg.name, spec.args[j].name)));
        }
    }
    Ok(())
}

/// A device as a list shows it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// What [`open`] takes.
    pub id: String,
    /// Its kind.
    pub kind: DeviceKind,
    /// What a person calls it; empty where there is none.
    pub name: String,
    /// True where it runs on the CPU what is meant for a GPU: for correctness, not for speed.
    pub software: bool,
    /// Why it cannot be used and what to do; none where it can.
    pub reason: Option<String>,
}

/// Every device of this build, or, of a kind that has none here, one entry that says why. Nothing is opened for long.
pub fn list() -> Vec<Listed> {
    [cpu::list(), cuda::list(), wgpu::list(), ptx_sim::list()].concat()
}

/// What `auto` takes, and why: a CUDA card, else a graphics card by wgpu, else the CPU. Neither the executor nor a
/// software adapter is taken: they only check.
pub fn auto() -> (String, String) {
    let cards = [cuda::list(), wgpu::list()].concat();
    if let Some(card) = cards.iter().find(|card| card.reason.is_none() && !card.software) {
        return (card.id.clone(), format!("{} is the fastest kind of device here", card.name));
    }
    let why = |card: &Listed| {
        let reason = card.reason.as_deref().unwrap_or("is software, for checks only");
        format!("{} {reason}", card.id)
    };
    ("cpu".to_string(), format!("no GPU can be used: {}", cards.iter().map(why).collect::<Vec<_>>().join("; ")))
}

/// Opens a device by its id: `cpu`, `cuda` (the first card), `cuda:1`, `wgpu`, `wgpu:1`, `ptx-sim`, or `auto` for the
/// best there is.
pub fn open(id: &str) -> Result<Arc<dyn Device>> {
    let (kind, number) = id.split_once(':').unwrap_or((id, "0"));
    Ok(match (kind, number.parse::<usize>()) {
        _ if id == "auto" => return open(&auto().0),
        _ if id == "cpu" => Arc::new(cpu::Cpu::new()),
        _ if id == "ptx-sim" => Arc::new(ptx_sim::PtxSim::new()),
        ("wgpu", _) => Arc::new(wgpu::Wgpu::open(id)?),
        ("cuda", Ok(ordinal)) => Arc::new(cuda::Cuda::open(ordinal)?),
        _ => {
            let reason = "not a device of this build; `handmill doctor` lists what there is".to_string();
            return Err(Error::Unavailable { device: id.to_string(), reason });
        }
    })
}
