//! Atomics and `cp.async`: the target of a copy holds poison until the thread that issued it has waited.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::check::Touch;
use crate::exec::{fault, Fault, Machine};
use crate::float::Half;
use crate::inst::{Access, Atomic, Inst, Op, Space, NONE};
use crate::lanes::F16;
use crate::memory::POISON;
use crate::span::{writable, Region};
use crate::types::Type;
use crate::warp::Warp;

/// More copies in flight than any pipeline has: a kernel that never waits.
const MAX_IN_FLIGHT: usize = 4096;

/// One `cp.async` of a warp.
struct Copy {
    /// Lanes not yet delivered.
    lanes: u32,
    bytes: u32,
    /// Each lane's group number.
    group: [u32; 32],
    target: [u32; 32],
    data: [[u8; 16]; 32],
}

/// A warp's copies in flight.
#[derive(Default)]
pub(crate) struct CopyQueue {
    copies: Vec<Copy>,
    /// Groups that each lane has committed: the number of its open group.
    committed: [u32; 32],
}

impl CopyQueue {
    pub fn clear(&mut self) {
        self.copies.clear();
        self.committed = [0; 32];
    }

    pub fn commit(&mut self, lanes: u32) {
        (0..32).filter(|l| lanes >> l & 1 == 1).for_each(|l| self.committed[l] += 1);
    }
}

impl Machine<'_> {
    pub(crate) fn copy_async<const CHECK: bool>(&mut self, w: &mut Warp, inst: &Inst, exec: u32) -> Result<(), Fault> {
        let Op::CpAsync { bytes, base64, dst64 } = inst.op else { return Ok(()) };
        let bytes = u32::from(bytes);
        let from = self.lane_addresses(w, inst.r[8], base64, i64::from(inst.imm as i32));
        let to = self.lane_addresses(w, inst.r[0], dst64, inst.imm >> 32);
        let mut data = [[0; 16]; 32];

        // Source, by the number of bytes that lanes ask for; the rest of the target becomes zero.
        let sizes = if inst.r[1] == NONE { [bytes; 32] } else { *w.u32s(inst.r[1]) };
        let mut left = exec;
        while left != 0 {
            let size = sizes[left.trailing_zeros() as usize];
            let mut same = (0..32).filter(|l| left >> l & 1 == 1 && sizes[*l] == size).fold(0, |m, l| m | 1 << l);
            left &= !same;
            if size > bytes {
                return fault(
                    same.trailing_zeros(),
                    format!("the source size {size} is larger than the copy's {bytes}"),
                );
            }
            while same != 0 && size != 0 {
                let span = self.locate_copy::<CHECK>(w, Space::Global, &from, size, bytes, same)?;
                same &= !span.lanes;
                self.count_span(w, &span, size, false);
                for l in (0..32usize).filter(|l| span.lanes >> l & 1 == 1) {
                    if span.good >> l & 1 == 1 {
                        if CHECK {
                            self.touch_lane(w, &span, Touch::Read, size, l as u32);
                        }
                        data[l] = span.bytes(l, size);
                    } else {
                        data[l] = [POISON; 16];
                    }
                }
            }
        }

        let span = self.locate_copy::<CHECK>(w, Space::Shared, &to, bytes, bytes, exec)?;
        self.count_span(w, &span, bytes, true);
        for l in (0..32u32).filter(|l| span.good >> l & 1 == 1) {
            let offset = span.offsets[l as usize];
            if CHECK {
                self.touch_shared(w, Touch::Issue, offset, bytes, l, true);
            }
            self.shared_bytes(offset, bytes).fill(POISON);
        }
        if w.copies.copies.len() >= MAX_IN_FLIGHT {
            return fault(exec.trailing_zeros(), format!("more than {MAX_IN_FLIGHT} cp.async in flight: no wait?"));
        }
        let group = w.copies.committed;
        w.copies.copies.push(Copy { lanes: span.good, bytes, group, target: span.offsets, data });
        Ok(())
    }

    pub(crate) fn copy_wait(&mut self, w: &mut Warp, exec: u32, groups: u32, all: bool) {
        let mut copies = std::mem::take(&mut w.copies.copies);
        for copy in &mut copies {
            let lanes = exec & copy.lanes;
            for l in (0..32usize).filter(|l| lanes >> l & 1 == 1) {
                if all || u64::from(copy.group[l]) + u64::from(groups) < u64::from(w.copies.committed[l]) {
                    copy.lanes &= !(1 << l);
                    let n = copy.bytes as usize;
                    self.shared_bytes(copy.target[l], copy.bytes).copy_from_slice(&copy.data[l][..n]);
                    if let Some(shadow) = &mut self.shadow {
                        shadow.deliver(copy.target[l], copy.bytes, w.number, l as u32);
                    }
                }
            }
        }
        copies.retain(|c| c.lanes != 0);
        w.copies.copies = copies;
    }

    /// Part of shared memory; the range was checked by `locate`.
    pub(crate) fn shared_bytes(&mut self, offset: u32, bytes: u32) -> &mut [u8] {
        // SAFETY: the words' bytes, exclusively borrowed; the slice is bounds-checked.
        let all =
            unsafe { std::slice::from_raw_parts_mut(self.shared.as_mut_ptr().cast::<u8>(), self.shared.len() * 16) };
        &mut all[offset as usize..(offset + bytes) as usize]
    }

    pub(crate) fn atomic<const CHECK: bool>(
        &mut self,
        w: &mut Warp,
        inst: &Inst,
        access: Access,
        op: Atomic,
        ty: Type,
        exec: u32,
    ) -> Result<(), Fault> {
        let address = self.lane_addresses(w, inst.r[8], access.base64, inst.imm);
        let bytes = access.total();
        let operand = |w: &Warp, i: usize, l: usize| match (inst.r[i], access.wide) {
            (NONE, _) => 0,
            (unit, true) => w.u64s(unit)[l],
            (unit, false) => u64::from(w.u32s(unit)[l]),
        };
        let mut left = exec;
        while left != 0 {
            let span = self.locate_copy::<CHECK>(w, access.space, &address, bytes, bytes, left)?;
            left &= !span.lanes;
            writable(&span)?;
            self.count_span(w, &span, bytes, true);
            if matches!(span.region, Region::Buffer(_)) {
                self.atomic = true;
                self.fenced |= access.sync;
            }
            for l in (0..32usize).filter(|l| span.lanes >> l & 1 == 1) {
                let (b, c) = (operand(w, 1, l), operand(w, 2, l));
                let mut old = u64::from_ne_bytes([POISON; 8]);
                if span.good >> l & 1 == 1 {
                    if CHECK {
                        self.touch_lane(w, &span, Touch::Atomic, bytes, l as u32);
                    }
                    // SAFETY: `locate` bounded and aligned the lane's offset.
                    let p = unsafe { span.ptr.add(span.offsets[l] as usize) };
                    // SAFETY: p is valid and aligned for the width; blocks share it by atomics only.
                    old = unsafe { update(p, bytes, |v| apply(op, ty, v, b, c)) };
                }
                if inst.r[0] != NONE {
                    if access.wide {
                        w.u64s_mut(inst.r[0])[l] = old;
                    } else {
                        w.u32s_mut(inst.r[0])[l] = old as u32;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Replaces the `bytes` at `p` by a function of them, at once for all blocks; the old value.
///
/// # Safety
/// `p` is valid and aligned for `bytes`, and shared through atomics only.
unsafe fn update(p: *mut u8, bytes: u32, new: impl Fn(u64) -> u64) -> u64 {
    // The closures always give a value, so both results carry the old one.
    match bytes {
        2 => {
            // SAFETY: as the caller promises.
            let cell = unsafe { AtomicU16::from_ptr(p.cast()) };
            let (Ok(old) | Err(old)) = cell.fetch_update(SeqCst, SeqCst, |v| Some(new(v.into()) as u16));
            old.into()
        }
        4 => {
            // SAFETY: as the caller promises.
            let cell = unsafe { AtomicU32::from_ptr(p.cast()) };
            let (Ok(old) | Err(old)) = cell.fetch_update(SeqCst, SeqCst, |v| Some(new(v.into()) as u32));
            old.into()
        }
        _ => {
            // SAFETY: as the caller promises.
            let cell = unsafe { AtomicU64::from_ptr(p.cast()) };
            let (Ok(old) | Err(old)) = cell.fetch_update(SeqCst, SeqCst, |v| Some(new(v)));
            old
        }
    }
}

/// The new value.
fn apply(op: Atomic, ty: Type, old: u64, b: u64, c: u64) -> u64 {
    let mask = if ty.bytes() == 8 { u64::MAX } else { (1 << (8 * ty.bytes())) - 1 };
    let (old, b, c) = (old & mask, b & mask, c & mask);
    let less = match ty {
        Type::S32 => (old as i32) < b as i32,
        Type::S64 => (old as i64) < b as i64,
        _ => old < b,
    };
    let half = |shift: u32| u64::from(F16((old >> shift) as u16).add(F16((b >> shift) as u16)).0) << shift;
    let out = match (op, ty) {
        (Atomic::Add, Type::F32) => {
            let sum = f32::from_bits(old as u32) + f32::from_bits(b as u32);
            u64::from(crate::float::canonical(sum))
        }
        (Atomic::Add, Type::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (Atomic::Add, Type::F16) => half(0),
        (Atomic::Add, Type::F16x2) => half(0) | half(16),
        (Atomic::Add, _) => old.wrapping_add(b),
        (Atomic::Min, _) => {
            if less {
                old
            } else {
                b
            }
        }
        (Atomic::Max, _) => {
            if less {
                b
            } else {
                old
            }
        }
        (Atomic::And, _) => old & b,
        (Atomic::Or, _) => old | b,
        (Atomic::Xor, _) => old ^ b,
        (Atomic::Exch, _) => b,
        (Atomic::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (Atomic::Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (Atomic::Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    };
    out & mask
}
