//! The `cuda` device: an NVIDIA card through the driver, which is found when the program runs. PTX is compiled by the
//! driver; what it says of a source it refuses is shown with file and line.
//!
//! One stream, so work runs in the order given; a second one only brings what [`Device::write_ahead`] is given
//! (`ahead`). Memory comes from the driver's pool, which keeps what is freed.

mod ahead;
mod context;

use super::ptx::{copy_ranges, invalid, range, work, Work};
use super::{Buffer, Device, Error, Listed, Result};
use crate::op::{Caps, DeviceKind, Dims, File, Kernel, OpSpec, Simd};
use ahead::Ahead;
use context::{describe, lock, Context, Event, Owned};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUfunction_attribute_enum as FunctionAttribute};
use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUresult, CUstream};
use std::collections::HashMap;
use std::ffi::{c_int, c_void, CString};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

/// The oldest driver interface that will do, as the driver counts: 12.2, which driver 535 brought.
const LEAST_VERSION: i32 = 12020;
/// The oldest compute capability the kernels are written for: Ampere.
const LEAST_SM: u32 = 80;
/// Shared memory of a block that needs no opting in.
const PLAIN_SHARED: u32 = 48 << 10;
/// Room for what the driver's compiler says of one source.
const LOG_BYTES: usize = 16 << 10;

/// A card.
pub struct Cuda {
    context: Arc<Context>,
    name: String,
    memory: usize,
    caps: Caps,
    loaded: Mutex<Loaded>,
}

/// Kernels that the driver has compiled.
#[derive(Default)]
struct Loaded {
    functions: HashMap<&'static str, Function>,
    /// The last kernel launched: a fault on the card is told later, by whichever call comes next.
    last: Option<&'static str>,
}

#[derive(Clone, Copy)]
struct Function {
    handle: CUfunction,
    /// Static shared memory in bytes.
    shared: u32,
    /// Dynamic shared memory that launches may ask for now.
    opted: u32,
    /// Threads that its registers leave room for in a block.
    threads: u32,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Function {}

/// How many cards there are, at least one; or why none can be used, and what to do.
fn probe() -> std::result::Result<usize, String> {
    // SAFETY: loads the driver's library by its name, which runs its initialisers.
    if !unsafe { sys::is_culib_present() } {
        let reason = "there is no NVIDIA driver here (libcuda.so.1, on Windows nvcuda.dll): install driver 535 or \
                      later for an NVIDIA card, or use another device";
        return Err(reason.into());
    }
    let mut version = 0;
    // SAFETY: the library is there, and every version of it has this call.
    let answer = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    if let Err(error) = answer {
        return Err(format!(
            "the NVIDIA driver does not answer: {}; run nvidia-smi, which tells more",
            describe(error)
        ));
    }
    if version < LEAST_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(format!(
            "the NVIDIA driver offers CUDA {major}.{minor}, and 12.2 is needed: install driver 535 or later"
        ));
    }
    let no_card = "the NVIDIA driver finds no card: run nvidia-smi, look at CUDA_VISIBLE_DEVICES, and in a container \
                   pass the cards through";
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) if count > 0 => Ok(count as usize),
        Ok(_) | Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Err(no_card.into()),
        Err(error) => {
            Err(format!("the NVIDIA driver does not start: {}; run nvidia-smi, which tells more", describe(error)))
        }
    }
}

/// The cards for a list of devices, or one line that says why there are none.
pub fn list() -> Vec<Listed> {
    let entry = |id: String, name: String, reason: Option<String>| Listed {
        id,
        kind: DeviceKind::Cuda,
        name,
        software: false,
        reason,
    };
    match probe() {
        Err(reason) => vec![entry("cuda".into(), String::new(), Some(reason))],
        Ok(count) => (0..count)
            .map(|ordinal| match facts(ordinal) {
                Ok(facts) => entry(format!("cuda:{ordinal}"), facts.name.clone(), facts.too_old()),
                Err(error) => entry(format!("cuda:{ordinal}"), String::new(), Some(describe(error))),
            })
            .collect(),
    }
}

/// What a card is, asked without using it.
struct Facts {
    device: c_int,
    name: String,
    sm: u32,
    memory: usize,
    shared: u32,
    pooled: bool,
}

fn facts(ordinal: usize) -> std::result::Result<Facts, DriverError> {
    let device = result::device::get(ordinal as c_int)?;
    // SAFETY: a device that the driver just named.
    let attribute = |a| unsafe { result::device::get_attribute(device, a) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Facts {
        device,
        name: result::device::get_name(device)?,
        sm: (10 * major + minor) as u32,
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }?,
        shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        pooled: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 1,
    })
}

impl Facts {
    fn too_old(&self) -> Option<String> {
        let (major, minor) = (self.sm / 10, self.sm % 10);
        (self.sm < LEAST_SM).then(|| {
            format!(
                "{} has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or later: use another \
                 device",
                self.name
            )
        })
    }
}

impl Cuda {
    /// Opens a card by its number, from 0.
    pub fn open(ordinal: usize) -> Result<Cuda> {
        let id = format!("cuda:{ordinal}");
        let unavailable = |reason: String| Error::Unavailable { device: id.clone(), reason };
        let count = probe().map_err(unavailable)?;
        if ordinal >= count {
            return Err(unavailable(format!("the last card here is cuda:{}; see `handmill doctor`", count - 1)));
        }
        let driver = |error| unavailable(format!("{}; run nvidia-smi, which tells more", describe(error)));
        let facts = facts(ordinal).map_err(driver)?;
        if let Some(reason) = facts.too_old() {
            return Err(unavailable(reason));
        }
        // SAFETY: the device was named by the driver; `Context` gives it back.
        let context = unsafe { result::primary_ctx::retain(facts.device) }.map_err(driver)?;
        let start = || {
            // SAFETY: retained above.
            unsafe { result::ctx::set_current(context) }?;
            if facts.pooled {
                // What is freed stays for the next allocation.
                let mut all = u64::MAX;
                // SAFETY: the device was named by the driver, and this attribute is a u64.
                unsafe {
                    let pool = result::device::get_default_mem_pool(facts.device)?;
                    let threshold = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
                    sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut all).cast()).result()?;
                }
            }
            result::stream::create(result::stream::StreamKind::NonBlocking)
        };
        let stream = match start() {
            Ok(stream) => stream,
            Err(error) => {
                // SAFETY: retained above, and nobody else has it yet.
                let _ = unsafe { result::primary_ctx::release(facts.device) };
                return Err(driver(error));
            }
        };
        let caps = Caps {
            kind: DeviceKind::Cuda,
            simd: Simd::Portable,
            sm: facts.sm,
            software: false,
            coopmat: false,
            f16: true,
            subgroup: (32, 32),
            shared_bytes: facts.shared,
            max_binding: facts.memory,
            view_alignment: 256,
            batch_invariant: false,
        };
        let context = Context {
            id,
            device: facts.device,
            context,
            stream,
            pooled: facts.pooled,
            queued: AtomicU64::new(0),
            done: AtomicU64::new(0),
            ahead: Mutex::default(),
        };
        Ok(Cuda { context: Arc::new(context), name: facts.name, memory: facts.memory, caps, loaded: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        lock(&self.loaded)
    }

    /// Makes the context current; the stream to work on.
    fn stream(&self) -> Result<CUstream> {
        self.context.bind().map_err(|error| self.failed(error))?;
        Ok(self.context.stream)
    }

    /// The address of a buffer for what is queued next, with the context made current.
    fn address(&self, buffer: &Buffer) -> Result<CUdeviceptr> {
        let owned = owned(buffer)?;
        self.stream()?;
        owned.settled().map_err(|error| self.failed(error))
    }

    /// Words for a call that failed, maybe because of a kernel launched before it.
    fn failed(&self, error: DriverError) -> Error {
        self.failed_after(error, self.lock().last)
    }

    fn failed_after(&self, error: DriverError, last: Option<&'static str>) -> Error {
        let mut reason = describe(error);
        if let Some(stem) = last {
            reason += &format!(
                ", at or before the launch of {stem}; `handmill verify --device ptx-sim --kernel {stem}` checks each \
                 access"
            );
        }
        invalid(&self.context.id, reason)
    }

    /// The compiled kernel.
    fn function(&self, loaded: &mut Loaded, entry: &'static str, file: &File) -> Result<Function> {
        if let Some(function) = loaded.functions.get(entry) {
            return Ok(*function);
        }
        let source = file.read().map_err(|error| invalid(entry, error))?;
        let image = CString::new(source.as_bytes()).map_err(|error| invalid(entry, error))?;
        let module = compile(&image).map_err(|(error, log)| {
            let log = name_lines(&log, file.path);
            invalid(entry, format!("the driver does not compile {}: {}{log}", file.path, describe(error)))
        })?;
        let name = CString::new(entry).map_err(|error| invalid(entry, error))?;
        let load = || {
            // SAFETY: the module was just loaded and is never unloaded.
            unsafe {
                let handle = result::module::get_function(module, name)?;
                let attribute = |a| result::function::get_function_attribute(handle, a).map(|v| v as u32);
                let shared = attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
                let threads = attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
                Ok(Function { handle, shared, opted: PLAIN_SHARED.saturating_sub(shared), threads })
            }
        };
        let function = load().map_err(|error| invalid(entry, format!("{}: {}", file.path, describe(error))))?;
        loaded.functions.insert(entry, function);
        Ok(function)
    }
}

/// Loads a source; on failure also what the compiler said.
fn compile(image: &CString) -> std::result::Result<sys::CUmodule, (DriverError, String)> {
    use sys::CUjit_option_enum::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // Numbers are passed in the place of pointers.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG_BYTES as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image ends with a zero; options and values are as many as said, and the log outlives the call.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(&mut module, image.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    loaded.result().map(|()| module).map_err(|error| {
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(LOG_BYTES);
        (error, String::from_utf8_lossy(&log[..end]).into_owned())
    })
}

/// The compiler's log with its `.. input, line 27; ..` made `kernels/x.ptx:27: ..`, each line on one of its own.
fn name_lines(log: &str, path: &str) -> String {
    let named = |line: &str| {
        let Some((_, rest)) = line.split_once(" line ") else { return line.trim().to_string() };
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        match digits {
            0 => line.trim().to_string(),
            _ => format!("{path}:{}: {}", &rest[..digits], rest[digits..].trim_start_matches([';', ' '])),
        }
    };
    log.lines().filter(|line| !line.trim().is_empty()).map(|line| format!("\n  {}", named(line))).collect()
}

impl Device for Cuda {
    fn id(&self) -> &str {
        &self.context.id
    }

    fn description(&self) -> String {
        let (major, minor) = (self.caps.sm / 10, self.caps.sm % 10);
        let memory = self.memory as f64 / (1u64 << 30) as f64;
        let mut version = 0;
        // SAFETY: the driver is loaded.
        let version = match unsafe { sys::cuDriverGetVersion(&mut version) } {
            CUresult::CUDA_SUCCESS => format!(", driver for CUDA {}.{}", version / 1000, version % 1000 / 10),
            _ => String::new(),
        };
        format!("{}, compute capability {major}.{minor}, {memory:.1} GiB{version}", self.name)
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let stream = self.stream()?;
        // The driver refuses to allocate nothing.
        let asked = bytes.max(1);
        // SAFETY: fresh memory of the device, owned by `Owned` alone.
        let allocated = unsafe {
            match self.context.pooled {
                true => result::malloc_async(stream, asked),
                false => result::malloc_sync(asked),
            }
        };
        match allocated {
            Ok(address) => {
                let (context, arriving) = (self.context.clone(), Mutex::default());
                let owned = Owned { address, context, last: AtomicU64::new(0), arriving };
                owned.used();
                Ok(Buffer::new(Arc::new(owned), bytes))
            }
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
                let reason = format!(
                    "the card has {:.2} of its {:.2} GiB free: end other programs on it, take a smaller model or \
                     format, or use --device cpu",
                    gib(free),
                    gib(self.memory)
                );
                Err(Error::OutOfMemory { device: self.context.id.clone(), bytes, reason })
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        let to = self.address(target)? + range("write", target, offset, source.len())?.start as u64;
        let stream = self.stream()?;
        // SAFETY: the range lies in the buffer. The driver has copied pageable memory when the call returns.
        unsafe { result::memcpy_htod_async(to, source, stream) }.map_err(|error| self.failed(error))?;
        owned(target)?.used();
        Ok(())
    }

    fn write_ahead(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        let owned = owned(target)?;
        let to = owned.address + range("write", target, offset, source.len())?.start as u64;
        self.stream()?;
        let after = owned.last.load(SeqCst) > self.context.done.load(SeqCst);
        let copy = || {
            let mut ahead = lock(&self.context.ahead);
            if ahead.is_none() {
                *ahead = Some(Ahead::new()?);
            }
            let ahead = ahead.as_mut().expect("made above");
            ahead.copy(&self.context, to, source, after)
        };
        let arrived = copy().map_err(|error| self.failed(error))?;
        // The second stream is in order: the later event stands for both.
        *lock(&owned.arriving) = Some(arrived);
        Ok(())
    }

    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        let from = self.address(source)? + range("read", source, offset, target.len())?.start as u64;
        let stream = self.stream()?;
        // SAFETY: the range lies in the buffer, and `target` is borrowed until the stream is done.
        let copied = unsafe { result::memcpy_dtoh_async(target, from, stream) };
        copied.and_then(|()| self.context.synchronize()).map_err(|error| self.failed(error))
    }

    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        let (source, target) = copy_ranges(from, from_offset, to, to_offset, bytes)?;
        let (source, target) = (self.address(from)? + source.start as u64, self.address(to)? + target.start as u64);
        if source.abs_diff(target) < bytes as u64 {
            return Err(invalid("copy", "source and target overlap"));
        }
        let stream = self.stream()?;
        // SAFETY: both ranges lie in their buffers and do not overlap.
        unsafe { result::memcpy_dtod_async(target, source, bytes, stream) }.map_err(|error| self.failed(error))?;
        owned(from)?.used();
        owned(to)?.used();
        Ok(())
    }

    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        let Some(work) = work(spec, kernel, args, dims, &self.caps)? else { return Ok(()) };
        let Work { file, entry, grid, block, shared_bytes, ranges, mut params } = work;
        let refuse = |reason: String| Err(invalid(&format!("{entry} ({dims})"), reason));
        let mut addresses = Vec::with_capacity(args.len());
        for (buffer, range) in args.iter().zip(&ranges) {
            addresses.push(self.address(buffer)? + range.start as u64);
        }
        let stream = self.stream()?;
        let mut loaded = self.lock();
        let mut function = self.function(&mut loaded, entry, &file)?;
        if block.iter().product::<u32>() > function.threads {
            return refuse(format!("a block of {block:?}: its registers leave room for {} threads", function.threads));
        }
        if function.shared + shared_bytes > self.caps.shared_bytes {
            let (wanted, has) = (function.shared + shared_bytes, self.caps.shared_bytes);
            return refuse(format!("{wanted} bytes of shared memory for a block: the device has {has}"));
        }
        if shared_bytes > function.opted {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a handle of a module that stays loaded.
            let opted =
                unsafe { result::function::set_function_attribute(function.handle, attribute, shared_bytes as c_int) };
            opted.map_err(|error| invalid(entry, describe(error)))?;
            function.opted = shared_bytes;
            loaded.functions.insert(entry, function);
        }
        let mut pointers: Vec<*mut c_void> = addresses.iter_mut().map(|a| (a as *mut CUdeviceptr).cast()).collect();
        pointers.push(params.as_mut_ptr().cast());
        let (grid, block) = ((grid[0], grid[1], grid[2]), (block[0], block[1], block[2]));
        // SAFETY: the arguments are as many and as large as the contract says, which the entry's parameters follow; the
        // driver copies them before the call returns.
        let launched =
            unsafe { result::launch_kernel(function.handle, grid, block, shared_bytes, stream, &mut pointers) };
        let before = loaded.last.replace(entry);
        for buffer in args {
            owned(buffer)?.used();
        }
        launched.map_err(|error| {
            // Only these two can be the fault of work queued earlier: everything else is of this launch.
            let late = matches!(error.0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS | CUresult::CUDA_ERROR_LAUNCH_FAILED);
            match before.filter(|_| late) {
                Some(before) => self.failed_after(error, Some(before)),
                None => invalid(&format!("{entry} ({dims})"), format!("the driver refuses: {}", describe(error))),
            }
        })
    }

    fn sync(&self) -> Result<()> {
        self.stream()?;
        self.context.synchronize().map_err(|error| self.failed(error))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let stream = self.stream()?;
        let events = (Event::new().map_err(|e| self.failed(e))?, Event::new().map_err(|e| self.failed(e))?);
        // SAFETY: live events and the device's own stream.
        let record = |event: &Event| unsafe { result::event::record(event.0, stream) }.map_err(|e| self.failed(e));
        record(&events.0)?;
        work()?;
        // The work may have come from other threads' context.
        self.stream()?;
        record(&events.1)?;
        // SAFETY: both were recorded on this stream.
        let elapsed = unsafe {
            result::event::synchronize(events.1 .0).and_then(|()| result::event::elapsed(events.0 .0, events.1 .0))
        };
        Ok(f64::from(elapsed.map_err(|error| self.failed(error))?) * 1e-3)
    }
}

fn owned(buffer: &Buffer) -> Result<&Owned> {
    buffer.memory().ok_or_else(|| invalid("cuda", "a buffer of another device"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_lines_are_the_files() {
        let log = "ptxas application ptx input, line 27; error   : Unknown modifier '.f33'\n\
                   ptxas fatal   : Ptx assembly aborted due to errors\n";
        assert_eq!(
            name_lines(log, "kernels/x.ptx"),
            "\n  kernels/x.ptx:27: error   : Unknown modifier '.f33'\n  \
             ptxas fatal   : Ptx assembly aborted due to errors"
        );
        assert_eq!(name_lines("", "x"), "");
        assert_eq!(name_lines(" in line of duty", "x"), "\n  in line of duty");
    }
}
