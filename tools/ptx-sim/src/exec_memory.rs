//! Loads and stores: every lane's address is placed in its buffer, checked, and the bytes moved.

use crate::check::{Kind, Touch};
use crate::decode::{MODULE_WINDOW, SHARED_WINDOW};
use crate::exec::{fault, Fault, Machine};
use crate::inst::{Access, Inst, Space, NONE};
use crate::launch::Bank;
use crate::span::{addresses, fill, lane_bytes, poison, writable, Region, Span, Word};
use crate::warp::Warp;

impl Machine<'_> {
    #[inline(always)]
    fn region(&mut self, space: Space, high: u64) -> (Region, *mut u8, u64) {
        let shared = (Region::Shared, self.shared.as_mut_ptr().cast(), u64::from(self.ctx.shared));
        let nowhere = (Region::Nowhere, std::ptr::null_mut(), 0);
        let bank = |r, b: &Bank| (r, b.words.as_ptr().cast_mut().cast(), b.len as u64);
        match (space, high) {
            (Space::Shared, 0) => shared,
            (Space::Const, 0) => bank(Region::Const, self.ctx.constants),
            (Space::Generic, SHARED_WINDOW) => shared,
            (Space::Global | Space::Generic, MODULE_WINDOW) => bank(Region::Module, self.ctx.globals),
            (Space::Global | Space::Generic, h) if h >= 2 && h % 2 == 0 => match self.ctx.views.get(h as usize / 2 - 1)
            {
                Some(v) if !v.data.is_null() => (Region::Buffer(h as usize / 2 - 1), v.data, v.len),
                _ => nowhere,
            },
            _ => nowhere,
        }
    }

    /// Where a load or store points. Shared memory by 32-bit addresses, all lanes running, is placed without widening.
    #[inline(always)]
    fn aim<const CHECK: bool>(
        &mut self,
        w: &Warp,
        inst: &Inst,
        access: Access,
        bytes: u32,
        lanes: u32,
    ) -> Result<Span, Fault> {
        if access.space == Space::Shared && !access.base64 && lanes == u32::MAX {
            let base = w.u32s(inst.r[8]);
            let (mut offsets, mut most, mut low) = ([0; 32], 0, 0);
            for l in 0..32 {
                offsets[l] = base[l].wrapping_add(inst.imm as u32);
                most = most.max(offsets[l]);
                low |= offsets[l];
            }
            if u64::from(most) + u64::from(bytes) <= u64::from(self.ctx.shared) && low & (bytes - 1) == 0 {
                let ptr = self.shared.as_mut_ptr().cast();
                return Ok(Span { region: Region::Shared, ptr, offsets, good: lanes, lanes });
            }
        }
        let address = addresses(w, inst.r[8], access.base64, inst.imm);
        self.locate::<CHECK>(w, access.space, &address, bytes, bytes, lanes)
    }

    /// Places the first lanes that share a region. Bad lanes are findings when checking, else the first is a fault.
    #[inline(always)]
    fn locate<const CHECK: bool>(
        &mut self,
        w: &Warp,
        space: Space,
        address: &[u64; 32],
        bytes: u32,
        align: u32,
        lanes: u32,
    ) -> Result<Span, Fault> {
        let first = address[lanes.trailing_zeros() as usize];
        let address: [u64; 32] = if lanes == u32::MAX {
            *address
        } else {
            std::array::from_fn(|l| if lanes >> l & 1 == 1 { address[l] } else { first })
        };
        let (region, ptr, len) = self.region(space, first >> 32);
        let (mut differ, mut most, mut low) = (0, 0, 0);
        let mut offsets = [0; 32];
        for l in 0..32 {
            differ |= (address[l] ^ first) >> 32;
            offsets[l] = address[l] as u32;
            most = most.max(offsets[l]);
            low |= offsets[l];
        }
        if differ == 0 && u64::from(most) + u64::from(bytes) <= len && low & (align - 1) == 0 {
            return Ok(Span { region, ptr, offsets, good: lanes, lanes });
        }
        self.locate_some::<CHECK>(w, space, &address, bytes, align, lanes)
    }

    /// [`Machine::locate`] where lanes point to several regions or some point wrong.
    #[cold]
    fn locate_some<const CHECK: bool>(
        &mut self,
        w: &Warp,
        space: Space,
        address: &[u64; 32],
        bytes: u32,
        align: u32,
        lanes: u32,
    ) -> Result<Span, Fault> {
        let high = address[lanes.trailing_zeros() as usize] >> 32;
        let (region, ptr, len) = self.region(space, high);
        let mut span = Span { region, ptr, offsets: address.map(|a| a as u32), good: 0, lanes: 0 };
        for l in (0..32u32).filter(|l| lanes >> l & 1 == 1 && address[*l as usize] >> 32 == high) {
            span.lanes |= 1 << l;
            let a = address[l as usize];
            let offset = a & 0xffff_ffff;
            let (kind, message) = if offset + u64::from(bytes) > len || region == Region::Nowhere {
                (Kind::OutOfBounds, self.beyond(space, a, bytes))
            } else if offset & u64::from(align - 1) != 0 {
                (Kind::Misaligned, format!("{bytes} bytes at offset {offset}, which is not a multiple of {align}"))
            } else {
                span.good |= 1 << l;
                continue;
            };
            if !CHECK {
                return fault(l, format!("{kind}: {message}"));
            }
            self.find(kind, w, l, || message);
        }
        // Lanes that must not access repeat one that may, or nobody accesses.
        if span.good != 0 {
            let stand_in = span.offsets[span.good.trailing_zeros() as usize];
            for l in (0..32).filter(|l| span.good >> l & 1 == 0) {
                span.offsets[l] = stand_in;
            }
        }
        Ok(span)
    }

    /// Words for an address out of bounds.
    fn beyond(&self, space: Space, address: u64, bytes: u32) -> String {
        let (high, offset) = (address >> 32, address & 0xffff_ffff);
        let buffer = |index: u64| self.ctx.views.get(index as usize).filter(|v| !v.data.is_null());
        match (space, high) {
            (Space::Shared, _) | (Space::Generic, SHARED_WINDOW) => {
                format!("{bytes} bytes at shared offset {offset:#x} of {}", self.ctx.shared)
            }
            (Space::Const, _) => format!("{bytes} bytes at constant offset {offset:#x} of {}", self.ctx.constants.len),
            (_, MODULE_WINDOW) => format!("{bytes} bytes at {offset:#x} of the module's {}", self.ctx.globals.len),
            (_, 0) => format!("{bytes} bytes at address {address:#x}, which belongs to no buffer: a null pointer?"),
            (_, h) if h % 2 == 0 => match buffer(h / 2 - 1) {
                Some(v) => {
                    let name = self.ctx.name((h / 2 - 1) as usize);
                    format!("{bytes} bytes at offset {offset} of {name}, which has {} bytes", v.len)
                }
                None => format!("{bytes} bytes at address {address:#x}: buffer {} does not exist", h / 2 - 1),
            },
            // Between two buffers: below the next, or past 4 GiB of the one before.
            (_, h) if buffer(h / 2).is_some() => {
                let name = self.ctx.name((h / 2) as usize);
                format!("{bytes} bytes at offset -{} of {name}", (1u64 << 32) - offset)
            }
            _ => format!("{bytes} bytes at address {address:#x}, which belongs to no buffer"),
        }
    }

    fn count_access(&mut self, w: &Warp, span: &Span, bytes: u32, store: bool) {
        let pc = w.pc as usize;
        match span.region {
            Region::Shared => self.counts.shared_access(pc, &span.offsets, span.good, bytes),
            Region::Buffer(b) => {
                let (sectors, n) = self.counts.global_access(pc, Some(b), &span.offsets, span.good, bytes, store);
                let len = self.ctx.views[b].len;
                for &sector in &sectors[..n] {
                    if self.caches.access(pc, b, len, sector, store) && !store {
                        self.counts.buffers[b].missed += 32;
                    }
                }
            }
            Region::Module => {
                self.counts.global_access(pc, None, &span.offsets, span.good, bytes, store);
            }
            Region::Const | Region::Nowhere => {}
        }
    }

    /// Checked mode's word on one good lane's access: unwritten bytes and races. `changes`: a write alters a byte.
    fn touch(&mut self, w: &Warp, span: &Span, how: Touch, bytes: u32, lane: u32, changes: bool) {
        let offset = span.offsets[lane as usize];
        match span.region {
            Region::Shared => self.touch_shared(w, how, offset, bytes, lane, changes),
            Region::Buffer(b) => {
                let view = self.ctx.views[b];
                if !view.init.is_null() {
                    // SAFETY: one flag a byte, and the access lies within the buffer.
                    let flag = |i: u32| unsafe { view.init.add((offset + i) as usize) };
                    // SAFETY: as above.
                    let missing = |i: &u32| unsafe { u8::read(flag(*i)) } == 0;
                    if matches!(how, Touch::Read | Touch::Atomic) {
                        if let Some(i) = (0..bytes).find(missing) {
                            let name = self.ctx.name(b);
                            let message = || format!("byte {} of {name} was never written", offset + i);
                            self.find(Kind::UninitialisedGlobal, w, lane, message);
                        }
                    }
                    if how != Touch::Read {
                        // SAFETY: as above.
                        (0..bytes).for_each(|i| unsafe { u8::write(flag(i), 1) });
                    }
                }
                let Some(shadow) = &self.ctx.shadows[b] else { return };
                if let Some(other) = shadow.touch(how, u64::from(offset), bytes, self.id) {
                    if !(self.fenced && self.atomic) && (changes || how == Touch::Read) {
                        self.global_race(w, lane, b, offset, other);
                    }
                }
            }
            Region::Const | Region::Module | Region::Nowhere => {}
        }
    }

    /// One lane's bytes of a buffer count as written.
    fn mark_written(&self, span: &Span, bytes: u32, lane: u32) {
        let Region::Buffer(b) = span.region else { return };
        let init = self.ctx.views[b].init;
        if !init.is_null() {
            let start = span.offsets[lane as usize];
            // SAFETY: one flag a byte, and the access lies within the buffer.
            (start..start + bytes).for_each(|i| unsafe { u8::write(init.add(i as usize), 1) });
        }
    }

    #[inline(always)]
    pub(crate) fn touch_shared(&mut self, w: &Warp, how: Touch, offset: u32, bytes: u32, lane: u32, changes: bool) {
        let Some(shadow) = &mut self.shadow else { return };
        let t = shadow.touch(how, offset, bytes, w.number, lane, changes);
        if t.unwritten | t.in_flight | t.race.is_some() {
            self.shared_findings(w, how, offset, lane, t);
        }
    }

    #[cold]
    fn shared_findings(&mut self, w: &Warp, how: Touch, offset: u32, lane: u32, t: crate::check::Touched) {
        if t.in_flight {
            let message = || format!("shared offset {offset:#x} is the target of a cp.async not yet waited for");
            self.find(Kind::CopyInFlight, w, lane, message);
        } else if t.unwritten {
            self.find(Kind::UninitialisedShared, w, lane, || format!("shared offset {offset:#x} was never written"));
        }
        if let (Some((warp, other, wrote)), false) = (t.race, t.in_flight && how == Touch::Read) {
            let (verb, did) =
                (if how == Touch::Read { "reads" } else { "writes" }, if wrote { "wrote" } else { "read" });
            let message = || {
                format!(
                    "{verb} shared offset {offset:#x}, which warp {warp} lane {other} {did} without a barrier between"
                )
            };
            self.find(Kind::SharedRace, w, lane, message);
        }
    }

    #[cold]
    fn global_race(&mut self, w: &Warp, lane: u32, buffer: usize, offset: u32, other: u32) {
        let [gx, gy, _] = self.ctx.grid;
        let with = match other {
            0 => "several other blocks".to_string(),
            n => format!("block ({},{},{})", (n - 1) % gx, (n - 1) / gx % gy, (n - 1) / gx / gy),
        };
        let name = self.ctx.name(buffer);
        self.find(Kind::GlobalRace, w, lane, || format!("offset {offset} of {name} is also used by {with}"));
    }

    pub(crate) fn load_param(&mut self, w: &mut Warp, inst: &Inst, access: Access, exec: u32) {
        let bytes = usize::from(access.bytes);
        for i in 0..usize::from(access.n) {
            let start = inst.imm as usize + i * bytes;
            let mut raw = [0; 8];
            raw[..bytes].copy_from_slice(&self.ctx.params[start..start + bytes]);
            let unsigned = u64::from_le_bytes(raw);
            let spare = 64 - 8 * bytes as u32;
            let value = if access.signed { ((unsigned << spare) as i64 >> spare) as u64 } else { unsigned };
            if inst.r[i] == NONE {
                continue;
            }
            if access.wide {
                let out = w.u64s_mut(inst.r[i]);
                (0..32).filter(|l| exec >> l & 1 == 1).for_each(|l| out[l] = value);
            } else {
                w.set(inst.r[i], exec, &[value as u32; 32]);
            }
        }
    }

    #[inline(always)]
    pub(crate) fn load<const CHECK: bool>(
        &mut self,
        w: &mut Warp,
        inst: &Inst,
        access: Access,
        exec: u32,
    ) -> Result<(), Fault> {
        let bytes = access.total();
        let mut left = exec;
        while left != 0 {
            let span = self.aim::<CHECK>(w, inst, access, bytes, left)?;
            left &= !span.lanes;
            if self.ctx.count {
                self.count_access(w, &span, bytes, false);
            }
            if CHECK {
                let how = if access.strong { Touch::Atomic } else { Touch::Read };
                self.check_load(w, &span, how, bytes);
                self.atomic |= access.strong && access.sync;
                self.fenced |= access.sync;
                let bad = span.lanes & !span.good;
                if bad != 0 {
                    poison(w, inst, access, bad);
                }
            }
            if span.good != 0 {
                fill(w, inst, access, &span);
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn check_load(&mut self, w: &Warp, span: &Span, how: Touch, bytes: u32) {
        if let Region::Buffer(b) = span.region {
            if self.ctx.views[b].init.is_null() && self.ctx.shadows[b].is_none() {
                return;
            }
            if how == Touch::Atomic {
                return; // a strong load races with nothing and leaves no trace
            }
        }
        let how = if how == Touch::Atomic { Touch::Read } else { how };
        if span.region == Region::Shared {
            if bytes == 4 && span.contiguous() {
                if let Some(shadow) = &mut self.shadow {
                    if shadow.read_row(span.offsets[0], w.number) {
                        return;
                    }
                }
            }
            // Of lanes that read one place, the first and the last stand for all.
            let lanes = if span.good != 0 && span.uniform() {
                1 << span.good.trailing_zeros() | 1 << (31 - span.good.leading_zeros())
            } else {
                span.good
            };
            for l in (0..32u32).filter(|l| lanes >> l & 1 == 1) {
                self.touch_shared(w, how, span.offsets[l as usize], bytes, l, false);
            }
        } else {
            for l in (0..32u32).filter(|l| span.good >> l & 1 == 1) {
                self.touch(w, span, how, bytes, l, false);
            }
        }
    }

    #[inline(always)]
    pub(crate) fn store<const CHECK: bool>(
        &mut self,
        w: &mut Warp,
        inst: &Inst,
        access: Access,
        exec: u32,
    ) -> Result<(), Fault> {
        let bytes = access.total();
        let mut left = exec;
        while left != 0 {
            let span = self.aim::<CHECK>(w, inst, access, bytes, left)?;
            left &= !span.lanes;
            writable(&span)?;
            if self.ctx.count {
                self.count_access(w, &span, bytes, true);
            }
            if CHECK {
                let how = if access.strong { Touch::Atomic } else { Touch::Write };
                self.atomic |= access.strong && access.sync;
                self.fenced |= access.sync;
                let word = access.bytes == 4 && access.n == 1 && !access.wide;
                let row = word && span.region == Region::Shared && span.contiguous();
                if row && self.shadow.as_mut().is_some_and(|s| s.write_row(span.offsets[0], w.number)) {
                    span.scatter::<u32>(0, |l| w.u32s(inst.r[0])[l]);
                    continue;
                }
                // Lane by lane: two lanes that write the same value to one place do no harm.
                for l in (0..32usize).filter(|l| span.good >> l & 1 == 1) {
                    let value = lane_bytes(w, inst, access, l);
                    let changes = span.bytes(l, bytes) != value;
                    if how == Touch::Atomic {
                        self.mark_written(&span, bytes, l as u32); // unlike an atomic, it reads nothing
                    }
                    if how == Touch::Atomic && span.region == Region::Shared {
                        self.touch_shared(w, Touch::Write, span.offsets[l], bytes, l as u32, changes);
                    } else {
                        self.touch(w, &span, how, bytes, l as u32, changes);
                    }
                    span.put_bytes(l, &value[..bytes as usize]);
                }
                continue;
            }
            for i in 0..usize::from(access.n) {
                let shift = i * usize::from(access.bytes);
                let unit = inst.r[i];
                match (access.bytes, access.wide) {
                    (8, _) => span.scatter::<u64>(shift, |l| w.u64s(unit)[l]),
                    (4, false) => span.scatter::<u32>(shift, |l| w.u32s(unit)[l]),
                    (4, true) => span.scatter::<u32>(shift, |l| w.u64s(unit)[l] as u32),
                    (2, false) => span.scatter::<u16>(shift, |l| w.u32s(unit)[l] as u16),
                    (2, true) => span.scatter::<u16>(shift, |l| w.u64s(unit)[l] as u16),
                    (_, false) => span.scatter::<u8>(shift, |l| w.u32s(unit)[l] as u8),
                    (_, true) => span.scatter::<u8>(shift, |l| w.u64s(unit)[l] as u8),
                }
            }
        }
        Ok(())
    }

    pub(crate) fn lane_addresses(&self, w: &Warp, base: u16, base64: bool, offset: i64) -> [u64; 32] {
        addresses(w, base, base64, offset)
    }

    /// Locates for `cp.async`: see `locate`.
    pub(crate) fn locate_copy<const CHECK: bool>(
        &mut self,
        w: &Warp,
        space: Space,
        address: &[u64; 32],
        bytes: u32,
        align: u32,
        lanes: u32,
    ) -> Result<Span, Fault> {
        self.locate::<CHECK>(w, space, address, bytes, align, lanes)
    }

    pub(crate) fn count_span(&mut self, w: &Warp, span: &Span, bytes: u32, store: bool) {
        if self.ctx.count {
            self.count_access(w, span, bytes, store);
        }
    }

    pub(crate) fn touch_lane(&mut self, w: &Warp, span: &Span, how: Touch, bytes: u32, lane: u32) {
        self.touch(w, span, how, bytes, lane, true);
    }
}
