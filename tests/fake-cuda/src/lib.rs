//! A CUDA driver without a card: the calls that the `cuda` device makes, launches run on ptx-sim. It is loaded in the
//! driver's place by tests, and refuses what a driver refuses: a thread without a context, a foreign address, a copy
//! past an allocation, too much shared memory without opting in.
//!
//! `FAKE_CUDA` is a list of what to pretend, separated by commas: `old_driver`, `no_device`, `broken_driver`,
//! `old_card`, `two_cards`, `no_pool`, `bytes=N` (the card's memory), `no_resources` (launches are refused), `idle`
//! (launches do nothing), `only=STEM` (launches of other kernels do nothing). `FAKE_CUDA_LOG` names a file that each call adds a line to.

mod memory;
mod module;

use ptx_sim::{BufferId, Memory, Module};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fmt::Display;
use std::io::Write;
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Instant;

type Status = c_uint;
const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const NO_DEVICE: Status = 100;
const INVALID_DEVICE: Status = 101;
const INVALID_CONTEXT: Status = 201;
const INVALID_PTX: Status = 218;
const INVALID_HANDLE: Status = 400;
const NOT_FOUND: Status = 500;
const ILLEGAL_ADDRESS: Status = 700;
const OUT_OF_RESOURCES: Status = 701;
const UNKNOWN: Status = 999;

/// Handles that are not addresses: a call that is given another one is refused.
const CONTEXT: usize = 0xc0;
const STREAM: usize = 0x57;
const POOL: usize = 0x90;

/// The card and everything on it.
#[derive(Default)]
struct State {
    memory: Memory,
    /// Live allocations by the upper half of their addresses.
    allocations: HashMap<u64, (BufferId, usize)>,
    allocated: usize,
    modules: Vec<Module>,
    functions: Vec<module::Function>,
    events: Vec<Option<Instant>>,
    streams: usize,
    retained: usize,
    /// A fault on the card: told by each call from then on.
    fault: Option<Status>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

thread_local! {
    static CURRENT: Cell<bool> = const { Cell::new(false) };
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Whether a word stands in `FAKE_CUDA`, and what follows its `=`.
fn pretends(word: &str) -> Option<String> {
    let all = std::env::var("FAKE_CUDA").unwrap_or_default();
    let found = all.split(',').find(|part| part.split('=').next() == Some(word))?;
    Some(found.split_once('=').map_or(String::new(), |(_, value)| value.to_string()))
}

fn card_bytes() -> usize {
    pretends("bytes").and_then(|n| n.parse().ok()).unwrap_or(8 << 30)
}

/// Writes the call's line and gives its status.
fn done(status: Status, call: impl Display) -> Status {
    if let Some(path) = std::env::var_os("FAKE_CUDA_LOG") {
        if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
            let _ = writeln!(file, "{call} = {status}");
        }
    }
    status
}

/// The state, for calls that need a context on their thread and a card without faults.
fn on_card() -> Result<MutexGuard<'static, State>, Status> {
    let state = state();
    match (CURRENT.get(), state.fault) {
        (false, _) => Err(INVALID_CONTEXT),
        (true, Some(fault)) => Err(fault),
        (true, None) => Ok(state),
    }
}

/// Stores through a pointer that the caller gave.
///
/// # Safety
/// As the driver's: the pointer is null or good for one write.
unsafe fn put<T>(target: *mut T, value: T) -> Status {
    if target.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: as the caller promises.
    unsafe { target.write(value) };
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    // SAFETY: as the driver's.
    let status = unsafe { put(version, if pretends("old_driver").is_some() { 11080 } else { 12020 }) };
    done(status, "cuDriverGetVersion")
}

#[no_mangle]
extern "C" fn cuInit(flags: c_uint) -> Status {
    let status = match (flags, pretends("no_device"), pretends("broken_driver")) {
        (0, None, None) => SUCCESS,
        (0, Some(_), _) => NO_DEVICE,
        (0, ..) => UNKNOWN,
        _ => INVALID_VALUE,
    };
    done(status, "cuInit")
}

fn cards() -> c_int {
    if pretends("two_cards").is_some() {
        2
    } else {
        1
    }
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    // SAFETY: as the driver's.
    done(unsafe { put(count, cards()) }, "cuDeviceGetCount")
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    // SAFETY: as the driver's.
    let status = if (0..cards()).contains(&ordinal) { unsafe { put(device, ordinal) } } else { INVALID_DEVICE };
    done(status, format_args!("cuDeviceGet {ordinal}"))
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, _device: c_int) -> Status {
    let text = c"Fake card (PTX on the CPU)".to_bytes_with_nul();
    if (room as usize) < text.len() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller gave `room` bytes.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
    done(SUCCESS, "cuDeviceGetName")
}

#[no_mangle]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Status {
    // SAFETY: as the driver's.
    unsafe { put(bytes, card_bytes()) }
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) -> Status {
    let answer = match attribute {
        75 => 8 - c_int::from(pretends("old_card").is_some()), // major: 8, or 7
        76 => 0,
        97 => ptx_sim::shared_limit(80) as c_int,
        115 => c_int::from(pretends("no_pool").is_none()),
        _ => return done(INVALID_VALUE, format_args!("cuDeviceGetAttribute {attribute}")),
    };
    // SAFETY: as the driver's.
    unsafe { put(value, answer) }
}

#[no_mangle]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Status {
    state().retained += 1;
    // SAFETY: as the driver's.
    done(unsafe { put(context, CONTEXT) }, format_args!("cuDevicePrimaryCtxRetain {device}"))
}

#[no_mangle]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Status {
    let mut state = state();
    let status = if state.retained > 0 { SUCCESS } else { INVALID_CONTEXT };
    state.retained = state.retained.saturating_sub(1);
    let (left, streams) = (state.allocations.len(), state.streams);
    done(status, format_args!("cuDevicePrimaryCtxRelease with {left} allocations and {streams} streams left"))
}

#[no_mangle]
extern "C" fn cuCtxSetCurrent(context: usize) -> Status {
    if context != CONTEXT || state().retained == 0 {
        return done(INVALID_CONTEXT, "cuCtxSetCurrent");
    }
    CURRENT.set(true);
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut usize, _device: c_int) -> Status {
    // SAFETY: as the driver's.
    unsafe { put(pool, POOL) }
}

#[no_mangle]
unsafe extern "C" fn cuMemPoolSetAttribute(pool: usize, attribute: c_uint, value: *const c_void) -> Status {
    if pool != POOL || attribute != 4 || value.is_null() {
        return done(INVALID_VALUE, "cuMemPoolSetAttribute");
    }
    // SAFETY: attribute 4, the release threshold, is a u64.
    let threshold = unsafe { value.cast::<u64>().read_unaligned() };
    done(SUCCESS, format_args!("cuMemPoolSetAttribute release threshold {threshold}"))
}

#[no_mangle]
unsafe extern "C" fn cuStreamCreate(stream: *mut usize, _flags: c_uint) -> Status {
    let status = on_card().map(|mut state| state.streams += 1).err().unwrap_or(SUCCESS);
    // SAFETY: as the driver's.
    done(if status == SUCCESS { unsafe { put(stream, STREAM) } } else { status }, "cuStreamCreate")
}

#[no_mangle]
extern "C" fn cuStreamSynchronize(stream: usize) -> Status {
    let status = on_card().err().unwrap_or(if stream == STREAM { SUCCESS } else { INVALID_HANDLE });
    done(status, "cuStreamSynchronize")
}

#[no_mangle]
extern "C" fn cuStreamDestroy_v2(stream: usize) -> Status {
    let mut state = state();
    if stream != STREAM || state.streams == 0 {
        return done(INVALID_HANDLE, "cuStreamDestroy");
    }
    state.streams -= 1;
    done(SUCCESS, "cuStreamDestroy")
}

#[no_mangle]
unsafe extern "C" fn cuEventCreate(event: *mut usize, flags: c_uint) -> Status {
    match on_card() {
        Err(status) => done(status, "cuEventCreate"),
        Ok(_) if flags & 2 != 0 => done(INVALID_VALUE, "cuEventCreate: an event without time cannot be asked for it"),
        Ok(mut state) => {
            state.events.push(None);
            // SAFETY: as the driver's.
            done(unsafe { put(event, state.events.len()) }, "cuEventCreate")
        }
    }
}

#[no_mangle]
extern "C" fn cuEventRecord(event: usize, stream: usize) -> Status {
    let record = |mut state: MutexGuard<State>| match state.events.get_mut(event.wrapping_sub(1)) {
        Some(slot) if stream == STREAM => {
            *slot = Some(Instant::now());
            SUCCESS
        }
        _ => INVALID_HANDLE,
    };
    done(on_card().map_or_else(|status| status, record), "cuEventRecord")
}

#[no_mangle]
extern "C" fn cuEventSynchronize(event: usize) -> Status {
    let recorded = |state: MutexGuard<State>| match state.events.get(event.wrapping_sub(1)) {
        Some(Some(_)) => SUCCESS,
        _ => INVALID_HANDLE,
    };
    done(on_card().map_or_else(|status| status, recorded), "cuEventSynchronize")
}

#[no_mangle]
unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) -> Status {
    let state = state();
    let at = |event: usize| state.events.get(event.wrapping_sub(1)).copied().flatten();
    match (at(start), at(end)) {
        // SAFETY: as the driver's.
        (Some(start), Some(end)) => unsafe { put(milliseconds, (end - start).as_secs_f32() * 1e3) },
        _ => done(INVALID_HANDLE, "cuEventElapsedTime"),
    }
}

#[no_mangle]
extern "C" fn cuEventDestroy_v2(event: usize) -> Status {
    match state().events.get_mut(event.wrapping_sub(1)) {
        Some(slot) => {
            *slot = None;
            done(SUCCESS, "cuEventDestroy")
        }
        None => done(INVALID_HANDLE, "cuEventDestroy"),
    }
}

#[no_mangle]
unsafe extern "C" fn cuGetErrorString(status: Status, text: *mut *const c_char) -> Status {
    let words: &CStr = match status {
        INVALID_VALUE => c"invalid argument",
        OUT_OF_MEMORY => c"out of memory",
        NO_DEVICE => c"no CUDA-capable device is detected",
        INVALID_PTX => c"a PTX JIT compilation failed",
        ILLEGAL_ADDRESS => c"an illegal memory access was encountered",
        OUT_OF_RESOURCES => c"too many resources requested for launch",
        UNKNOWN => c"unknown error",
        _ => c"an error of the fake driver",
    };
    // SAFETY: as the driver's.
    unsafe { put(text, words.as_ptr()) }
}
