//! A CUDA driver without a card: the calls that the `cuda` device makes, launches run on ptx-sim. It is loaded in the
//! driver's place by tests, and refuses what a driver refuses: a thread without a context, a foreign address, a copy
//! past an allocation, too much shared memory without opting in.
//!
//! The first stream after a context is retained works at once. On any other a copy from memory of `cuMemHostAlloc` waits
//! until someone waits for it, and reads its source only then: a wait that is forgotten, or memory written too early,
//! shows in the results.
//!
//! `FAKE_CUDA` is a list of what to pretend, separated by commas: `old_driver`, `no_device`, `broken_driver`,
//! `old_card`, `hopper`, `two_cards`, `no_pool`, `bytes=N` (the card's memory), `no_resources` (launches are
//! refused), `idle` (launches do nothing), `only=STEM` (launches of other kernels do nothing). `FAKE_CUDA_LOG` names a file that each call
//! adds a line to.

mod memory;
mod module;

use ptx_sim::{BufferId, Memory, Module};
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
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

/// Handles that are not addresses: a call that is given another one is refused. Streams are numbered from `STREAM` on.
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
    events: Vec<Event>,
    streams: Vec<Stream>,
    /// Whether the next stream is a context's first.
    fresh: bool,
    /// Memory of the host that the driver gave, by address, and its bytes.
    host: HashMap<usize, usize>,
    /// Copies on other streams than the first that nobody has waited for, each with its number, from 1.
    late: VecDeque<(usize, memory::Late)>,
    copies: usize,
    retained: usize,
    /// A fault on the card: told by each call from then on.
    fault: Option<Status>,
}

/// When an event was recorded, and the last copy that it stands after; none before that or after its end.
#[derive(Clone, Copy, Default)]
struct Event {
    alive: bool,
    recorded: Option<(Instant, usize)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stream {
    AtOnce,
    Late,
    Gone,
}

impl State {
    fn stream(&self, stream: usize) -> Stream {
        let known = stream.checked_sub(STREAM).and_then(|number| self.streams.get(number));
        known.copied().unwrap_or(Stream::Gone)
    }

    /// A stream that works at once.
    fn is_first(&self, stream: usize) -> bool {
        self.stream(stream) == Stream::AtOnce
    }

    /// For the log: nothing for a first stream.
    fn which(&self, stream: usize) -> &'static str {
        if self.is_first(stream) {
            ""
        } else {
            " of another stream"
        }
    }

    fn event(&mut self, event: usize) -> Option<&mut Event> {
        self.events.get_mut(event.wrapping_sub(1)).filter(|event| event.alive)
    }
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

/// Shared memory that a block may opt in to.
fn most_shared() -> u32 {
    ptx_sim::shared_limit(if pretends("hopper").is_some() { 90 } else { 80 })
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
    let hopper = c_int::from(pretends("hopper").is_some());
    let answer = match attribute {
        75 if pretends("old_card").is_some() => 7, // major
        75 => 8 + hopper,
        76 => 0,
        97 => most_shared() as c_int,
        115 => c_int::from(pretends("no_pool").is_none()),
        _ => return done(INVALID_VALUE, format_args!("cuDeviceGetAttribute {attribute}")),
    };
    // SAFETY: as the driver's.
    unsafe { put(value, answer) }
}

#[no_mangle]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Status {
    let mut state = state();
    state.retained += 1;
    state.fresh = true;
    // SAFETY: as the driver's.
    done(unsafe { put(context, CONTEXT) }, format_args!("cuDevicePrimaryCtxRetain {device}"))
}

#[no_mangle]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Status {
    let mut state = state();
    let status = if state.retained > 0 { SUCCESS } else { INVALID_CONTEXT };
    state.retained = state.retained.saturating_sub(1);
    let (left, streams) =
        (state.allocations.len(), state.streams.iter().filter(|stream| **stream != Stream::Gone).count());
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
    let create = |mut state: MutexGuard<State>| {
        let kind = if std::mem::take(&mut state.fresh) { Stream::AtOnce } else { Stream::Late };
        state.streams.push(kind);
        // SAFETY: as the driver's.
        unsafe { put(stream, STREAM + state.streams.len() - 1) }
    };
    done(on_card().map_or_else(|status| status, create), "cuStreamCreate")
}

#[no_mangle]
extern "C" fn cuStreamSynchronize(stream: usize) -> Status {
    let which = state().which(stream);
    let wait = |mut state: MutexGuard<State>| {
        match state.stream(stream) {
            Stream::Gone => return INVALID_HANDLE,
            Stream::AtOnce => {}
            Stream::Late => {
                let all = state.copies;
                state.arrive(all);
            }
        }
        SUCCESS
    };
    done(on_card().map_or_else(|status| status, wait), format_args!("cuStreamSynchronize{which}"))
}

#[no_mangle]
extern "C" fn cuStreamDestroy_v2(stream: usize) -> Status {
    let mut state = state();
    if state.stream(stream) == Stream::Gone {
        return done(INVALID_HANDLE, "cuStreamDestroy");
    }
    state.streams[stream - STREAM] = Stream::Gone;
    done(SUCCESS, "cuStreamDestroy")
}

#[no_mangle]
unsafe extern "C" fn cuEventCreate(event: *mut usize, flags: c_uint) -> Status {
    match on_card() {
        Err(status) => done(status, "cuEventCreate"),
        Ok(_) if flags & 2 != 0 => done(INVALID_VALUE, "cuEventCreate: an event without time cannot be asked for it"),
        Ok(mut state) => {
            state.events.push(Event { alive: true, recorded: None });
            // SAFETY: as the driver's.
            done(unsafe { put(event, state.events.len()) }, "cuEventCreate")
        }
    }
}

#[no_mangle]
extern "C" fn cuEventRecord(event: usize, stream: usize) -> Status {
    let which = state().which(stream);
    let record = |mut state: MutexGuard<State>| {
        // What a first stream does is done; on another all its copies come before.
        let after = if state.is_first(stream) { 0 } else { state.copies };
        let known = state.stream(stream) != Stream::Gone;
        match state.event(event).filter(|_| known) {
            Some(event) => {
                event.recorded = Some((Instant::now(), after));
                SUCCESS
            }
            None => INVALID_HANDLE,
        }
    };
    done(on_card().map_or_else(|status| status, record), format_args!("cuEventRecord{which}"))
}

/// Waits for an event; one never recorded is over.
fn wait_for(state: &mut State, event: usize) -> Status {
    let Some(event) = state.event(event).copied() else { return INVALID_HANDLE };
    state.arrive(event.recorded.map_or(0, |(_, after)| after));
    SUCCESS
}

#[no_mangle]
extern "C" fn cuEventSynchronize(event: usize) -> Status {
    let wait = |mut state: MutexGuard<State>| wait_for(&mut state, event);
    done(on_card().map_or_else(|status| status, wait), "cuEventSynchronize")
}

#[no_mangle]
extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) -> Status {
    let which = state().which(stream);
    let wait = |mut state: MutexGuard<State>| match state.stream(stream) {
        Stream::AtOnce => wait_for(&mut state, event),
        // Whatever another stream may wait for here, a first one has done, or its own order brings.
        Stream::Late => state.event(event).map_or(INVALID_HANDLE, |_| SUCCESS),
        Stream::Gone => INVALID_HANDLE,
    };
    done(on_card().map_or_else(|status| status, wait), format_args!("cuStreamWaitEvent{which}"))
}

#[no_mangle]
unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) -> Status {
    let mut state = state();
    let mut at = |event: usize| state.event(event).and_then(|event| event.recorded);
    match (at(start), at(end)) {
        // SAFETY: as the driver's.
        (Some((start, _)), Some((end, _))) => unsafe { put(milliseconds, (end - start).as_secs_f32() * 1e3) },
        _ => done(INVALID_HANDLE, "cuEventElapsedTime"),
    }
}

#[no_mangle]
extern "C" fn cuEventDestroy_v2(event: usize) -> Status {
    match state().event(event) {
        Some(slot) => {
            slot.alive = false;
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
