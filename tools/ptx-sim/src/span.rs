//! Where the lanes of one access point, and the bytes moved between there and registers.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering::Relaxed};

use crate::exec::{fault, Fault};
use crate::inst::{Access, Inst, NONE};
use crate::memory::POISON;
use crate::warp::Warp;

/// Where a group of lanes points: one region, an offset for each lane.
pub(crate) struct Span {
    pub region: Region,
    pub ptr: *mut u8,
    /// Valid for the lanes in `good`; other lanes repeat a good one's.
    pub offsets: [u32; 32],
    /// Lanes that may access.
    pub good: u32,
    /// Lanes that this span answers for, good or not.
    pub lanes: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Region {
    Buffer(usize),
    Shared,
    Const,
    Module,
    Nowhere,
}

/// An integer that memory holds, read and written by relaxed atomics: plain moves that racing blocks may share.
pub(crate) trait Word: Copy + Default {
    /// # Safety
    /// `p` is valid and aligned.
    unsafe fn read(p: *mut u8) -> Self;
    /// # Safety
    /// As for `read`.
    unsafe fn write(p: *mut u8, v: Self);
}

macro_rules! word {
    ($t:ty, $a:ty) => {
        impl Word for $t {
            #[inline(always)]
            unsafe fn read(p: *mut u8) -> $t {
                // SAFETY: passed on.
                unsafe { <$a>::from_ptr(p.cast()) }.load(Relaxed)
            }
            #[inline(always)]
            unsafe fn write(p: *mut u8, v: $t) {
                // SAFETY: passed on.
                unsafe { <$a>::from_ptr(p.cast()) }.store(v, Relaxed)
            }
        }
    };
}
word!(u8, AtomicU8);
word!(u16, AtomicU16);
word!(u32, AtomicU32);
word!(u64, AtomicU64);

impl Span {
    /// Each lane's value `shift` bytes into its access.
    #[inline(always)]
    pub fn gather<T: Word>(&self, shift: usize) -> [T; 32] {
        // SAFETY: `locate` bounded and aligned every offset, and `shift` stays within the access.
        std::array::from_fn(|l| unsafe { T::read(self.ptr.add(self.offsets[l] as usize + shift)) })
    }

    #[inline(always)]
    pub fn scatter<T: Word>(&self, shift: usize, values: impl Fn(usize) -> T) {
        for l in (0..32).filter(|l| self.good >> l & 1 == 1) {
            // SAFETY: as in `gather`; good lanes only.
            unsafe { T::write(self.ptr.add(self.offsets[l] as usize + shift), values(l)) }
        }
    }

    /// One good lane's bytes.
    pub fn bytes(&self, lane: usize, n: u32) -> [u8; 16] {
        let mut out = [0; 16];
        for (i, b) in out.iter_mut().enumerate().take(n as usize) {
            // SAFETY: as in `gather`: the access has n bytes.
            *b = unsafe { u8::read(self.ptr.add(self.offsets[lane] as usize + i)) };
        }
        out
    }

    pub fn put_bytes(&self, lane: usize, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            // SAFETY: as in `gather`: the caller passes no more bytes than the access has.
            unsafe { u8::write(self.ptr.add(self.offsets[lane] as usize + i), *b) }
        }
    }

    /// All lanes run, in a row of 32-bit words from lane 0 on.
    #[inline(always)]
    pub fn contiguous(&self) -> bool {
        let first = self.offsets[0];
        let mut differ = !self.good;
        for l in 0..32 {
            differ |= self.offsets[l].wrapping_sub(4 * l as u32) ^ first;
        }
        differ == 0
    }

    /// All lanes point to one place.
    #[inline(always)]
    pub fn uniform(&self) -> bool {
        let mut differ = 0;
        for l in 0..32 {
            differ |= self.offsets[l] ^ self.offsets[0];
        }
        differ == 0
    }
}

/// Each lane's address.
#[inline(always)]
pub(crate) fn addresses(w: &Warp, base: u16, base64: bool, offset: i64) -> [u64; 32] {
    if base64 {
        w.u64s(base).map(|a| a.wrapping_add(offset as u64))
    } else {
        w.u32s(base).map(|a| u64::from(a.wrapping_add(offset as u32)))
    }
}

pub(crate) fn writable(span: &Span) -> Result<(), Fault> {
    if matches!(span.region, Region::Const | Region::Module) {
        return fault(span.lanes.trailing_zeros() % 32, "a store to the module's variables, which are read-only here");
    }
    Ok(())
}

/// Moves loaded values to the data registers.
#[inline(always)]
pub(crate) fn fill(w: &mut Warp, inst: &Inst, access: Access, span: &Span) {
    let shared = span.region == Region::Shared;
    if access.bytes == 4 && !access.wide && shared && access.n == 1 && span.contiguous() {
        if inst.r[0] != NONE {
            // SAFETY: `locate` bounded the first and the last lane; shared memory is this block's alone.
            *w.u32s_mut(inst.r[0]) = unsafe { span.ptr.add(span.offsets[0] as usize).cast::<[u32; 32]>().read() };
        }
        return;
    }
    let uniform = span.uniform();
    for i in 0..usize::from(access.n) {
        let unit = inst.r[i];
        if unit == NONE {
            continue;
        }
        let shift = i * usize::from(access.bytes);
        if access.bytes == 8 {
            let v = span.gather::<u64>(shift);
            let out = w.u64s_mut(unit);
            for l in 0..32 {
                out[l] = if span.good >> l & 1 == 1 { v[l] } else { out[l] };
            }
            continue;
        }
        let v: [u32; 32] = match (access.bytes, access.signed) {
            // SAFETY: `locate` bounded and aligned the offset.
            (4, _) if uniform => [unsafe { u32::read(span.ptr.add(span.offsets[0] as usize + shift)) }; 32],
            (4, _) => span.gather::<u32>(shift),
            (2, false) => span.gather::<u16>(shift).map(u32::from),
            (2, true) => span.gather::<u16>(shift).map(|v| v as i16 as i32 as u32),
            (_, false) => span.gather::<u8>(shift).map(u32::from),
            (_, true) => span.gather::<u8>(shift).map(|v| v as i8 as i32 as u32),
        };
        if access.wide {
            let out = w.u64s_mut(unit);
            for l in (0..32).filter(|l| span.good >> l & 1 == 1) {
                out[l] = if access.signed { v[l] as i32 as i64 as u64 } else { u64::from(v[l]) };
            }
        } else {
            w.set(unit, span.good, &v);
        }
    }
}

/// What a refused load gives: a NaN, or −1.
pub(crate) fn poison(w: &mut Warp, inst: &Inst, access: Access, lanes: u32) {
    for unit in inst.r[..usize::from(access.n)].iter().copied().filter(|u| *u != NONE) {
        if access.wide {
            let out = w.u64s_mut(unit);
            (0..32).filter(|l| lanes >> l & 1 == 1).for_each(|l| out[l] = u64::from_ne_bytes([POISON; 8]));
        } else {
            w.set(unit, lanes, &[u32::from_ne_bytes([POISON; 4]); 32]);
        }
    }
}

/// The bytes that one lane stores.
pub(crate) fn lane_bytes(w: &Warp, inst: &Inst, access: Access, lane: usize) -> [u8; 16] {
    let mut out = [0; 16];
    let n = usize::from(access.bytes);
    for i in 0..usize::from(access.n) {
        let unit = inst.r[i];
        let value = if access.wide { w.u64s(unit)[lane] } else { u64::from(w.u32s(unit)[lane]) };
        out[i * n..(i + 1) * n].copy_from_slice(&value.to_le_bytes()[..n]);
    }
    out
}
