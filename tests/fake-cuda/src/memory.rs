//! Allocations and copies.

use crate::*;

/// A copy to the card that has not happened yet: where to, from which address of the host, how many bytes.
pub struct Late {
    to: u64,
    from: usize,
    bytes: usize,
}

impl State {
    /// Makes the late copies up to number `last` happen.
    pub fn arrive(&mut self, last: usize) {
        while self.late.front().is_some_and(|(number, _)| *number <= last) {
            let (_, Late { to, from, bytes }) = self.late.pop_front().expect("looked at");
            let source = self.host_bytes(from, bytes).expect("memory was checked when it was queued").to_vec();
            if let Some((id, start)) = self.find(to, bytes) {
                self.memory.bytes_mut(id)[start..start + bytes].copy_from_slice(&source);
            }
        }
    }

    /// Bytes within one of the driver's pieces of the host's memory.
    fn host_bytes(&self, from: usize, bytes: usize) -> Option<&[u8]> {
        let within = |(start, room): (&usize, &usize)| {
            let offset = from.checked_sub(*start)?;
            // SAFETY: within a piece that is not freed, which the program filled before it queued the copy.
            (offset + bytes <= *room).then(|| unsafe { std::slice::from_raw_parts(from as *const u8, bytes) })
        };
        self.host.iter().find_map(within)
    }

    /// The allocation that holds `bytes` bytes at an address, and where in it they begin.
    pub fn find(&self, address: u64, bytes: usize) -> Option<(BufferId, usize)> {
        let (id, len) = *self.allocations.get(&(address >> 32))?;
        let start = (address - id.address()) as usize;
        (start + bytes <= len).then_some((id, start))
    }

    fn alloc(&mut self, bytes: usize) -> Result<u64, Status> {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if self.allocated + bytes > card_bytes() {
            return Err(OUT_OF_MEMORY);
        }
        let id = self.memory.alloc(bytes, false).map_err(|_| OUT_OF_MEMORY)?;
        self.allocations.insert(id.address() >> 32, (id, bytes));
        self.allocated += bytes;
        Ok(id.address())
    }

    fn free(&mut self, address: u64) -> Status {
        match self.allocations.remove(&(address >> 32)) {
            Some((id, bytes)) if id.address() == address => {
                self.memory.free(id);
                self.allocated -= bytes;
                SUCCESS
            }
            _ => INVALID_VALUE,
        }
    }
}

unsafe fn alloc(address: *mut u64, bytes: usize, call: &str) -> Status {
    let status = match on_card().and_then(|mut state| state.alloc(bytes)) {
        // SAFETY: as the driver's.
        Ok(at) => unsafe { put(address, at) },
        Err(status) => status,
    };
    let held = state().allocated;
    done(status, format_args!("{call} {bytes}, {held} held"))
}

#[no_mangle]
unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: usize) -> Status {
    if !state().is_first(stream) || pretends("no_pool").is_some() {
        return done(INVALID_VALUE, "cuMemAllocAsync");
    }
    // SAFETY: as the driver's.
    unsafe { alloc(address, bytes, "cuMemAllocAsync") }
}

#[no_mangle]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    // SAFETY: as the driver's.
    unsafe { alloc(address, bytes, "cuMemAlloc") }
}

fn free(address: u64, call: &str) -> Status {
    let status = if CURRENT.get() { state().free(address) } else { INVALID_CONTEXT };
    done(status, call)
}

#[no_mangle]
extern "C" fn cuMemFreeAsync(address: u64, stream: usize) -> Status {
    if !state().is_first(stream) || pretends("no_pool").is_some() {
        return done(INVALID_VALUE, "cuMemFreeAsync");
    }
    free(address, "cuMemFreeAsync")
}

#[no_mangle]
extern "C" fn cuMemFree_v2(address: u64) -> Status {
    free(address, "cuMemFree")
}

#[no_mangle]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    let state = state();
    // SAFETY: as the driver's.
    unsafe { put(free, card_bytes() - state.allocated) | put(total, card_bytes()) }
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: usize) -> Status {
    let which = state().which(stream);
    let copy = |mut state: MutexGuard<State>| match state.find(to, bytes) {
        // From other memory the driver would wait.
        Some(_) if state.stream(stream) == Stream::Late && state.host_bytes(from as usize, bytes).is_some() => {
            state.copies += 1;
            let number = state.copies;
            state.late.push_back((number, Late { to, from: from as usize, bytes }));
            SUCCESS
        }
        Some((id, start)) if state.is_first(stream) => {
            // SAFETY: the caller gave `bytes` bytes.
            let source = unsafe { std::slice::from_raw_parts(from, bytes) };
            state.memory.bytes_mut(id)[start..start + bytes].copy_from_slice(source);
            SUCCESS
        }
        _ => INVALID_VALUE,
    };
    done(on_card().map_or_else(|status| status, copy), format_args!("cuMemcpyHtoDAsync {bytes}{which}"))
}

#[no_mangle]
unsafe extern "C" fn cuMemHostAlloc(memory: *mut *mut u8, bytes: usize, _flags: c_uint) -> Status {
    let alloc = |mut state: MutexGuard<State>| {
        let start = Box::into_raw(vec![0u8; bytes].into_boxed_slice()).cast::<u8>();
        state.host.insert(start as usize, bytes);
        // SAFETY: as the driver's.
        unsafe { put(memory, start) }
    };
    done(on_card().map_or_else(|status| status, alloc), format_args!("cuMemHostAlloc {bytes}"))
}

#[no_mangle]
extern "C" fn cuMemFreeHost(memory: usize) -> Status {
    let Some(bytes) = state().host.remove(&memory) else { return done(INVALID_VALUE, "cuMemFreeHost") };
    // SAFETY: a boxed slice of this address and length was given up when it was allocated, and is taken back once.
    drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(memory as *mut u8, bytes)) });
    done(SUCCESS, "cuMemFreeHost")
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize) -> Status {
    let copy = |state: MutexGuard<State>| match state.find(from, bytes) {
        Some((id, start)) if state.is_first(stream) => {
            // SAFETY: the caller gave room for `bytes` bytes.
            let target = unsafe { std::slice::from_raw_parts_mut(to, bytes) };
            target.copy_from_slice(&state.memory.bytes(id)[start..start + bytes]);
            SUCCESS
        }
        _ => INVALID_VALUE,
    };
    done(on_card().map_or_else(|status| status, copy), format_args!("cuMemcpyDtoHAsync {bytes}"))
}

#[no_mangle]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> Status {
    let copy = |mut state: MutexGuard<State>| match (state.find(to, bytes), state.find(from, bytes)) {
        (Some((to, at)), Some((from, start))) if state.is_first(stream) => {
            let data = state.memory.bytes(from)[start..start + bytes].to_vec();
            state.memory.bytes_mut(to)[at..at + bytes].copy_from_slice(&data);
            SUCCESS
        }
        _ => INVALID_VALUE,
    };
    done(on_card().map_or_else(|status| status, copy), format_args!("cuMemcpyDtoDAsync {bytes}"))
}
