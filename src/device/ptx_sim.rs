//! The `ptx-sim` device: the PTX kernels on the CPU, every access checked. A finding of the executor is an error of the
//! launch.

use super::ptx::{copy_ranges, invalid, range, work, Work};
use super::{Buffer, Device, Error, Listed, Result};
use crate::op::{Caps, DeviceKind, Dims, Kernel, OpSpec, Simd};
use ptx_sim::{BufferId, Entry, Finding, Memory, Module, Options, Param, Report};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// Findings that an error lists; the rest are counted.
const LISTED: usize = 5;

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

/// What a launch did, for whoever counts.
pub struct Ran {
    /// Counts, findings and trace.
    pub report: Report,
    /// Registers, shared memory and parameters of the kernel.
    pub entry: Entry,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Static and dynamic shared memory in bytes.
    pub shared_bytes: u32,
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
    /// A device of compute capability 9.0, which runs what is written for 8.0 and for 9.0 alike.
    pub fn new() -> PtxSim {
        PtxSim::with_sm(90)
    }

    /// A device of another compute capability (major·10 + minor), with its shared memory.
    pub fn with_sm(sm: u32) -> PtxSim {
        let caps = Caps {
            kind: DeviceKind::PtxSim,
            simd: Simd::Portable,
            sm,
            f16: true,
            software: false,
            coopmat: false,
            subgroup: (32, 32),
            shared_bytes: ptx_sim::shared_limit(sm),
            max_binding: 1 << 32,
            view_alignment: 256,
            batch_invariant: false,
        };
        PtxSim { caps, state: Arc::default() }
    }

    /// Runs a kernel as `options` say. Findings are not an error here but part of the report. None: every output is
    /// empty, and nothing ran.
    pub fn run(
        &self,
        spec: &OpSpec,
        kernel: &'static Kernel,
        args: &[&Buffer],
        dims: &Dims,
        options: &Options,
    ) -> Result<Option<Ran>> {
        let Some(work) = work(spec, kernel, args, dims, &self.caps)? else { return Ok(None) };
        let Work { file, entry, grid, block, shared_bytes, ranges, params } = work;
        let pointers = args.iter().zip(ranges).map(|(buffer, r)| Ok(Param::View(id_of(buffer)?, r.start, r.len())));
        let params = pointers.chain([Ok(Param::Bytes(params.to_vec()))]).collect::<Result<Vec<_>>>()?;

        let State { memory, modules } = &mut *lock(&self.state);
        let module = match modules.get(entry) {
            Some(module) => module.clone(),
            None => {
                let source = file.read().map_err(|error| invalid(entry, error))?;
                let module = Module::parse(&source, file.path).map_err(|error| invalid(entry, error))?;
                modules.entry(entry).or_insert(module).clone()
            }
        };
        let launch = ptx_sim::Launch { grid, block, dynamic_shared: shared_bytes, params };
        let report = ptx_sim::launch(&module, entry, memory, &launch, options)
            .map_err(|error| invalid(&format!("{entry} ({dims})"), error))?;
        let entry = module.entry(entry).expect("it ran").clone();
        let shared_bytes = entry.static_shared + shared_bytes;
        Ok(Some(Ran { report, entry, grid, block, shared_bytes }))
    }
}

/// The executor for a list of devices.
pub fn list() -> Vec<Listed> {
    let name = PtxSim::new().description();
    vec![Listed { id: "ptx-sim".into(), kind: DeviceKind::PtxSim, name, software: true, reason: None }]
}

/// Findings for a message: the first few, each with kernel, line, block, warp and lane.
pub fn describe(findings: &[Finding]) -> String {
    let mut text = match findings.len() {
        1 => "1 finding".to_string(),
        n => format!("{n} findings"),
    };
    for finding in findings.iter().take(LISTED) {
        text += &format!("\n  {finding}");
    }
    if findings.len() > LISTED {
        text += &format!("\n  and {} more", findings.len() - LISTED);
    }
    text
}

fn id_of(buffer: &Buffer) -> Result<BufferId> {
    let owned = buffer.memory::<Owned>();
    owned.map(|owned| owned.id).ok_or_else(|| invalid("ptx-sim", "a buffer of another device"))
}

impl Device for PtxSim {
    fn id(&self) -> &str {
        "ptx-sim"
    }

    fn description(&self) -> String {
        format!(
            "PTX executed and checked on the CPU, {} threads, software: correctness only",
            rayon::current_num_threads()
        )
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
        copy_ranges(from, from_offset, to, to_offset, bytes)?;
        let mut bytes = vec![0; bytes];
        self.read(from, from_offset, &mut bytes)?;
        self.write(to, to_offset, &bytes)
    }

    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        let options = Options { checked: true, impatient: true, ..Options::default() };
        match self.run(spec, kernel, args, dims, &options)? {
            Some(ran) if !ran.report.findings.is_empty() => {
                Err(invalid(&format!("{} ({dims})", kernel.stem), describe(&ran.report.findings)))
            }
            _ => Ok(()),
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
