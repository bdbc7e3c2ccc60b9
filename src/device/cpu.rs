//! The CPU device: always there. A launch runs at once, its kernel on as many threads as it sees fit, so order is the
//! order of calls.

use super::{check_launch, Buffer, Device, Error, Listed, Result};
use crate::op::{Caps, DeviceKind, Dims, Kernel, OpSpec, Role, Simd, Slice, Source};
use crate::tensor::Bytes;
use memmap2::Mmap;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// What a CPU buffer's memory is.
enum Memory {
    Owned(UnsafeCell<Bytes>),
    Mapped(Arc<Mmap>),
}

// SAFETY: owned bytes are reached only under the device's queue lock (`Cpu::queue`), and a map is read only.
unsafe impl Sync for Memory {}

/// The CPU.
pub struct Cpu {
    caps: Caps,
    /// Held while buffers are read or written: one queue, in order.
    queue: Mutex<()>,
}

impl Default for Cpu {
    fn default() -> Cpu {
        Cpu::new()
    }
}

impl Cpu {
    /// With the widest instructions this processor has.
    pub fn new() -> Cpu {
        Cpu::with_simd(detect_simd())
    }

    /// With at most these instructions, so that narrower rungs can be tested and timed.
    pub fn with_simd(simd: Simd) -> Cpu {
        let simd = simd.min(detect_simd());
        let kind = DeviceKind::Cpu;
        let caps = Caps {
            kind,
            simd,
            sm: 0,
            software: false,
            f16: false,
            coopmat: false,
            subgroup: (0, 0),
            shared_bytes: 0,
            max_binding: usize::MAX,
            view_alignment: 64,
            batch_invariant: false,
        };
        Cpu { caps, queue: Mutex::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // A kernel that panicked leaves bytes behind, not a broken structure.
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The CPU for a list of devices.
pub fn list() -> Vec<Listed> {
    let name = Cpu::new().description();
    vec![Listed { id: "cpu".into(), kind: DeviceKind::Cpu, name, software: false, reason: None }]
}

/// Makes the calling thread one of rayon's. A launch from it then begins at once; from any other thread each launch
/// wakes a sleeping one and waits for it, which for one token costs as much as a small matrix. For a program's main
/// thread, before anything else; later calls change nothing.
pub fn work_on_this_thread() {
    if let Err(error) = rayon::ThreadPoolBuilder::new().use_current_thread().build_global() {
        log::debug!("this thread stays outside rayon's pool: {error}");
    }
}

/// The widest instruction set with rungs of its own.
fn detect_simd() -> Simd {
    #[cfg(target_arch = "x86_64")]
    {
        let has_avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let has_avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        #[cfg(target_os = "linux")]
        if has_avx2 && has_avx512 && crate::ops::amx::available() {
            return Simd::Amx;
        }
        if has_avx2 && has_avx512 {
            return Simd::Avx512;
        }
        if has_avx2 {
            return Simd::Avx2;
        }
    }
    Simd::Portable
}

/// The first byte of a buffer. The caller holds the queue lock and stays within the buffer.
fn pointer(buffer: &Buffer) -> Result<(*mut u8, bool)> {
    match buffer.memory::<Memory>() {
        // SAFETY: the lock is held, so no other reference to the bytes exists; only a pointer leaves.
        Some(Memory::Owned(bytes)) => Ok((unsafe { (*bytes.get()).as_mut_ptr().add(buffer.range().start) }, true)),
        Some(Memory::Mapped(map)) => Ok((map[buffer.range()].as_ptr().cast_mut(), false)),
        None => Err(Error::Invalid { what: "cpu".into(), reason: "a buffer of another device".into() }),
    }
}

/// Checks `offset + bytes` against a buffer.
fn check_range(what: &str, buffer: &Buffer, offset: usize, bytes: usize) -> Result<()> {
    match offset.checked_add(bytes) {
        Some(end) if end <= buffer.bytes() => Ok(()),
        _ => Err(Error::Invalid {
            what: what.to_string(),
            reason: format!("bytes {offset}+{bytes} of a buffer of {} bytes", buffer.bytes()),
        }),
    }
}

impl Device for Cpu {
    fn id(&self) -> &str {
        "cpu"
    }

    fn description(&self) -> String {
        let simd = match self.caps.simd {
            Simd::Portable => "portable code",
            Simd::Avx2 => "AVX2",
            Simd::Avx512 => "AVX-512",
            Simd::Amx => "AVX-512 and AMX",
        };
        format!("{}, {} threads, {simd}", processor_name(), rayon::current_num_threads())
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        Ok(Buffer::new(Arc::new(Memory::Owned(UnsafeCell::new(Bytes::zeroed(bytes)))), bytes))
    }

    fn import(&self, map: &Arc<Mmap>, range: Range<usize>) -> Result<Buffer> {
        if range.start > range.end || range.end > map.len() {
            let reason = format!("bytes {range:?} of a file of {} bytes", map.len());
            return Err(Error::Invalid { what: "import".into(), reason });
        }
        // Kernels cast bytes to elements of up to 4 bytes; SIMD loads are unaligned ones.
        if range.start.is_multiple_of(16) {
            let whole = Buffer::new(Arc::new(Memory::Mapped(map.clone())), map.len());
            return Ok(whole.view(range.start, range.len()));
        }
        let buffer = self.alloc(range.len())?;
        self.write(&buffer, 0, &map[range])?;
        Ok(buffer)
    }

    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        check_range("write", target, offset, source.len())?;
        let _queue = self.lock();
        let (start, writable) = pointer(target)?;
        if !writable {
            return Err(Error::Invalid { what: "write".into(), reason: "the buffer is a file's, read only".into() });
        }
        // SAFETY: the range lies in the buffer, the lock is held, and `source` is a borrow of other memory.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), start.add(offset), source.len()) };
        Ok(())
    }

    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        check_range("read", source, offset, target.len())?;
        let _queue = self.lock();
        let (start, _) = pointer(source)?;
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(start.add(offset), target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        check_range("copy from", from, from_offset, bytes)?;
        check_range("copy to", to, to_offset, bytes)?;
        if !(from_offset | to_offset | bytes).is_multiple_of(4) {
            let reason = format!("offsets {from_offset}, {to_offset} and size {bytes} are not multiples of 4");
            return Err(Error::Invalid { what: "copy".into(), reason });
        }
        let _queue = self.lock();
        let ((source, _), (target, writable)) = (pointer(from)?, pointer(to)?);
        if !writable {
            return Err(Error::Invalid { what: "copy".into(), reason: "the target is a file's, read only".into() });
        }
        // SAFETY: both ranges lie in their buffers and the lock is held; `copy` allows them to overlap.
        unsafe { std::ptr::copy(source.add(from_offset), target.add(to_offset), bytes) };
        Ok(())
    }

    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        check_launch(spec, kernel, args, dims)?;
        let Source::Rust(body) = kernel.source else {
            return Err(Error::Invalid { what: kernel.stem.into(), reason: "not a kernel of the CPU".into() });
        };
        let _queue = self.lock();
        let mut slices = Vec::with_capacity(args.len());
        for (arg, buffer) in spec.args.iter().zip(args) {
            let (start, writable) = pointer(buffer)?;
            let bytes = arg.bytes(dims, kernel.act);
            slices.push(match arg.role {
                // SAFETY: `check_launch` saw that `bytes` fit the buffer and that no output overlaps another argument;
                // the lock keeps other launches and copies out until the slices are gone.
                Role::In => Slice::In(unsafe { std::slice::from_raw_parts(start, bytes) }),
                // SAFETY: the same.
                _ if writable => Slice::Out(unsafe { std::slice::from_raw_parts_mut(start, bytes) }),
                _ => {
                    let reason = format!("output {} is a file's, read only", arg.name);
                    return Err(Error::Invalid { what: kernel.stem.into(), reason });
                }
            });
        }
        body(dims, &mut slices);
        Ok(())
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

/// The processor's name where the system tells it.
fn processor_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}
