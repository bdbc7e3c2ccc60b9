//! The `ptx-sim` device: the PTX kernels on the CPU, every access checked. A finding of the executor is an error of the
//! launch.

use super::{check_launch, Buffer, Device, Error, Result};
use crate::op::{Caps, DeviceKind, Dims, Kernel, OpSpec, Simd, Source};
use ptx_sim::{BufferId, Memory, Module, Options, Param};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// The executor and its memory.
pub struct PtxSim {
    caps: Caps,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    memory: Memory,
    modules: HashMap<&'static str, Module>,
}

/// A buffer's memory; freed when the last view of it goes.
struct Owned {
    id: BufferId,
    state: Arc<Mutex<State>>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        lock(&self.state).memory.free(self.id);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Default for PtxSim {
    fn default() -> PtxSim {
        PtxSim::new()
    }
}

impl PtxSim {
    /// A device of compute capability 8.0.
    pub fn new() -> PtxSim {
        let caps = Caps {
            kind: DeviceKind::PtxSim,
            simd: Simd::Portable,
            sm: 80,
            f16: true,
            software: false,
            coopmat: false,
            subgroup: (32, 32),
            shared_bytes: 163 << 10,
            max_binding: 1 << 32,
            view_alignment: 256,
        };
        PtxSim { caps, state: Arc::default() }
    }
}

fn id_of(buffer: &Buffer) -> Result<BufferId> {
    let owned = buffer.memory::<Owned>();
    owned.map(|owned| owned.id).ok_or_else(|| invalid("ptx-sim", "a buffer of another device"))
}

fn invalid(what: &str, reason: impl ToString) -> Error {
    Error::Invalid { what: what.to_string(), reason: reason.to_string() }
}

/// The bytes of a memory object that `offset..offset + bytes` of a buffer are.
fn range(what: &str, buffer: &Buffer, offset: usize, bytes: usize) -> Result<std::ops::Range<usize>> {
    match offset.checked_add(bytes) {
        Some(end) if end <= buffer.bytes() => Ok(buffer.range().start + offset..buffer.range().start + end),
        _ => Err(invalid(what, format!("bytes {offset}+{bytes} of a buffer of {} bytes", buffer.bytes()))),
    }
}

impl Device for PtxSim {
    fn id(&self) -> &str {
        "ptx-sim"
    }

    fn description(&self) -> String {
        format!("PTX executed and checked on the CPU, {} threads", rayon::current_num_threads())
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let id = lock(&self.state).memory.alloc(bytes, false).map_err(|error| Error::OutOfMemory {
            device: "ptx-sim".into(),
            bytes,
            reason: error.to_string(),
        })?;
        Ok(Buffer::new(Arc::new(Owned { id, state: self.state.clone() }), bytes))
    }

    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        let (id, range) = (id_of(target)?, range("write", target, offset, source.len())?);
        let memory = &mut lock(&self.state).memory;
        memory.bytes_mut(id)[range.clone()].copy_from_slice(source);
        memory.mark_initialised(id, range);
        Ok(())
    }

    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        let (id, range) = (id_of(source)?, range("read", source, offset, target.len())?);
        target.copy_from_slice(&lock(&self.state).memory.bytes(id)[range]);
        Ok(())
    }

    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        let mut bytes = vec![0; bytes];
        self.read(from, from_offset, &mut bytes)?;
        self.write(to, to_offset, &bytes)
    }

    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        check_launch(spec, kernel, args, dims)?;
        let Source::Ptx(file) = kernel.source else { return Err(invalid(kernel.stem, "not a kernel in PTX")) };
        let what = || format!("{} ({dims})", kernel.stem);
        let mut params = Vec::with_capacity(args.len() + 1);
        for buffer in args {
            params.push(Param::Offset(id_of(buffer)?, buffer.range().start as u32));
        }
        params.push(Param::Bytes(dims.params().to_vec()));

        let State { memory, modules } = &mut *lock(&self.state);
        let module = match modules.get(kernel.stem) {
            Some(module) => module.clone(),
            None => {
                let source = file.read().map_err(|error| invalid(kernel.stem, error))?;
                let module = Module::parse(&source, file.path).map_err(|error| invalid(kernel.stem, error))?;
                modules.entry(kernel.stem).or_insert(module).clone()
            }
        };
        let work = (kernel.launch)(dims);
        let launch = ptx_sim::Launch { grid: work.grid, block: work.block, dynamic_shared: work.shared_bytes, params };
        let options = Options { checked: true, ..Options::default() };
        let report = ptx_sim::launch(&module, kernel.stem, memory, &launch, &options)
            .map_err(|error| invalid(&what(), error))?;
        match report.findings.first() {
            None => Ok(()),
            Some(first) => Err(invalid(&what(), format!("{} findings, the first: {first}", report.findings.len()))),
        }
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64())
    }
}
