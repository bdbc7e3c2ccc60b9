//! Allocations and copies.

use crate::*;

impl State {
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
    done(status, format_args!("{call} {bytes}"))
}

#[no_mangle]
unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: usize) -> Status {
    if stream != STREAM || pretends("no_pool").is_some() {
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
    if stream != STREAM || pretends("no_pool").is_some() {
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
    let copy = |mut state: MutexGuard<State>| match state.find(to, bytes) {
        Some((id, start)) if stream == STREAM => {
            // SAFETY: the caller gave `bytes` bytes.
            let source = unsafe { std::slice::from_raw_parts(from, bytes) };
            state.memory.bytes_mut(id)[start..start + bytes].copy_from_slice(source);
            SUCCESS
        }
        _ => INVALID_VALUE,
    };
    done(on_card().map_or_else(|status| status, copy), format_args!("cuMemcpyHtoDAsync {bytes}"))
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize) -> Status {
    let copy = |state: MutexGuard<State>| match state.find(from, bytes) {
        Some((id, start)) if stream == STREAM => {
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
        (Some((to, at)), Some((from, start))) if stream == STREAM => {
            let data = state.memory.bytes(from)[start..start + bytes].to_vec();
            state.memory.bytes_mut(to)[at..at + bytes].copy_from_slice(&data);
            SUCCESS
        }
        _ => INVALID_VALUE,
    };
    done(on_card().map_or_else(|status| status, copy), format_args!("cuMemcpyDtoDAsync {bytes}"))
}
