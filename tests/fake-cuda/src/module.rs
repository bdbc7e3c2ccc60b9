//! Modules, their functions, and launches.

use crate::*;
use ptx_sim::{launch, Entry, Launch, Options, Param};

/// Shared memory of a block that needs no opting in.
const PLAIN_SHARED: u32 = 48 << 10;

#[derive(Clone)]
pub struct Function {
    module: usize,
    entry: Entry,
    /// Dynamic shared memory that it has opted in to.
    opted: u32,
}

/// Where a JIT option's value is, among those given.
unsafe fn option(count: c_uint, options: *const c_uint, values: *const *mut c_void, wanted: c_uint) -> Option<usize> {
    // SAFETY: the caller gave `count` of both.
    (0..count as usize).find_map(|i| unsafe { (*options.add(i) == wanted).then(|| *values.add(i) as usize) })
}

#[no_mangle]
unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut usize,
    image: *const c_char,
    count: c_uint,
    options: *const c_uint,
    values: *const *mut c_void,
) -> Status {
    let mut state = match on_card() {
        Ok(state) => state,
        Err(status) => return done(status, "cuModuleLoadDataEx"),
    };
    // SAFETY: an image in PTX ends with a zero.
    let source = unsafe { CStr::from_ptr(image) }.to_string_lossy();
    let refused = match Module::parse(&source, "ptx") {
        Ok(parsed) => {
            state.modules.push(parsed);
            // SAFETY: as the driver's.
            return done(unsafe { put(module, state.modules.len()) }, "cuModuleLoadDataEx");
        }
        Err(error) => error.to_string(),
    };
    // `ptx:27: message`, as the driver's compiler puts it.
    let mut parts = refused.splitn(3, ':').skip(1);
    let (line, message) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let log = format!(
        "ptxas application ptx input, line {line}; error   :{message}\n\
         ptxas fatal   : Ptx assembly aborted due to errors\n"
    );
    // SAFETY: as the caller's counts say; 5 is the error log, 6 its size.
    let (buffer, room) = unsafe { (option(count, options, values, 5), option(count, options, values, 6)) };
    if let (Some(buffer), Some(room)) = (buffer, room) {
        let n = log.len().min(room.saturating_sub(1));
        // SAFETY: the caller gave `room` bytes there.
        unsafe { std::ptr::copy_nonoverlapping(log.as_ptr(), buffer as *mut u8, n) };
    }
    done(INVALID_PTX, "cuModuleLoadDataEx")
}

#[no_mangle]
unsafe extern "C" fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) -> Status {
    let mut state = state();
    // SAFETY: a string of the caller's.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    let found = state.modules.get(module.wrapping_sub(1)).and_then(|m| m.entry(&name)).cloned();
    let Some(entry) = found else { return done(NOT_FOUND, format_args!("cuModuleGetFunction {name}")) };
    state.functions.push(Function { module: module - 1, entry, opted: 0 });
    // SAFETY: as the driver's.
    done(unsafe { put(function, state.functions.len()) }, format_args!("cuModuleGetFunction {name}"))
}

#[no_mangle]
unsafe extern "C" fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: usize) -> Status {
    let state = state();
    let Some(function) = state.functions.get(function.wrapping_sub(1)) else { return INVALID_HANDLE };
    let answer = match attribute {
        0 => (65536 / function.entry.live_registers.max(1)).min(1024),
        1 => function.entry.static_shared,
        _ => return INVALID_VALUE,
    };
    // SAFETY: as the driver's.
    unsafe { put(value, answer as c_int) }
}

#[no_mangle]
extern "C" fn cuFuncSetAttribute(function: usize, attribute: c_uint, value: c_int) -> Status {
    let mut state = state();
    let Some(function) = state.functions.get_mut(function.wrapping_sub(1)) else { return INVALID_HANDLE };
    if attribute != 8 || value as u32 + function.entry.static_shared > most_shared() {
        return done(INVALID_VALUE, format_args!("cuFuncSetAttribute {attribute} {value}"));
    }
    function.opted = value as u32;
    done(SUCCESS, format_args!("cuFuncSetAttribute {} dynamic shared {value}", function.entry.name))
}

#[no_mangle]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    stream: usize,
    params: *const *const u8,
    extra: *const c_void,
) -> Status {
    let mut state = match on_card() {
        Ok(state) => state,
        Err(status) => return done(status, "cuLaunchKernel"),
    };
    let Some(function) = state.functions.get(function.wrapping_sub(1)).cloned() else { return INVALID_HANDLE };
    let name = &function.entry.name;
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    let call = format!("cuLaunchKernel {name} grid {grid:?} block {block:?} shared {shared}");
    if pretends("no_resources").is_some() {
        return done(OUT_OF_RESOURCES, call);
    }
    let plain = shared + function.entry.static_shared <= PLAIN_SHARED;
    if !state.is_first(stream) || params.is_null() || !extra.is_null() || !(plain || shared <= function.opted) {
        return done(INVALID_VALUE, call);
    }
    if pretends("idle").is_some() || pretends("only").is_some_and(|stem| stem != *name) {
        return done(SUCCESS, call);
    }
    let mut arguments = Vec::new();
    for (i, declared) in function.entry.params.iter().enumerate() {
        // SAFETY: the caller gave a pointer for each parameter, to as many bytes as it has.
        let bytes = unsafe { std::slice::from_raw_parts(*params.add(i), declared.size as usize) }.to_vec();
        let address = <[u8; 8]>::try_from(&bytes[..]).ok().map(u64::from_le_bytes);
        arguments.push(match address.and_then(|address| state.find(address, 0)) {
            Some((id, start)) => Param::Offset(id, start as u32),
            None => Param::Bytes(bytes),
        });
    }
    let shape = Launch { grid, block, dynamic_shared: shared, params: arguments };
    let State { memory, modules, fault, .. } = &mut *state;
    match launch(&modules[function.module], name, memory, &shape, &Options::default()) {
        Ok(_) => done(SUCCESS, call),
        Err(error @ ptx_sim::Error::Fault { .. }) => {
            // The card tells of a fault when it gets there: with the next call.
            *fault = Some(ILLEGAL_ADDRESS);
            done(SUCCESS, format_args!("{call}: {error}"))
        }
        Err(error) => done(INVALID_VALUE, format_args!("{call}: {error}")),
    }
}
