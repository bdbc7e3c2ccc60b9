//! Mbarriers, bulk copies that complete on them, and proxy fences.
//!
//! A phase ends when its arrivals have come and as many bytes as were expected. A bulk copy's bytes count when it is
//! asked for, which is as early as a card may be, and are there when a wait for their phase has succeeded, which is as
//! late as a kernel may rely on.

use crate::check::{Kind, Touch};
use crate::exec::{fault, Fault, Machine};
use crate::inst::{Inst, Mbarrier, MbarrierVerb, Op, Space, NONE};
use crate::memory::POISON;
use crate::span::Region;
use crate::warp::{State, Warp};

/// Arrivals and bytes that one phase may have.
const MOST_ARRIVALS: u32 = (1 << 20) - 1;
const MOST_BYTES: i64 = (1 << 20) - 1;

/// An mbarrier object.
pub(crate) struct Mbar {
    count: u32,
    pending: u32,
    /// Bytes expected less bytes that have come.
    bytes: i64,
    phase: u32,
    /// Vector clock of those who have arrived, and what it was when the last phase ended.
    told: [u32; 32],
    done: [u32; 32],
    /// Clock and warp that made it.
    made: (u32, u32),
    /// The copy engine may know of it: a fence came after its initialisation.
    fenced: bool,
    landings: Vec<Landing>,
}

/// Bytes on their way to shared memory.
struct Landing {
    phase: u32,
    target: u32,
    data: Vec<u8>,
    /// Clock, warp and lane.
    by: (u32, u32, u32),
}

impl Mbar {
    fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 {
            self.phase += 1;
            self.pending = self.count;
            self.done = self.told;
        }
    }

    fn is_over(&self, parity: u32) -> bool {
        self.phase & 1 != parity & 1
    }
}

impl Machine<'_> {
    pub(crate) fn phase_is_over(&self, at: u32, parity: u32) -> bool {
        self.mbarriers.get(&at).is_none_or(|m| m.is_over(parity))
    }

    /// What an mbarrier still waits for.
    pub(crate) fn describe_mbarrier(&self, at: u32) -> String {
        let what = |m: &Mbar| format!("for {} arrivals and {} bytes", m.pending, m.bytes);
        format!("waits at the mbarrier at shared offset {at:#x} {}", self.mbarriers.get(&at).map_or("".into(), what))
    }

    pub(crate) fn proxy_fence(&mut self, w: &Warp, exec: u32, shared: bool) {
        if let (Some(shadow), true) = (&mut self.shadow, shared) {
            shadow.proxy_fence(w.number as usize, exec == w.live);
        }
        self.mbarriers.values_mut().for_each(|m| m.fenced = true);
    }

    /// False: the lanes wait, or others run first.
    pub(crate) fn mbarrier<const CHECK: bool>(
        &mut self,
        w: &mut Warp,
        inst: &Inst,
        mbarrier: Mbarrier,
        exec: u32,
    ) -> Result<bool, Fault> {
        let address = self.lane_addresses(w, inst.r[8], mbarrier.base64, inst.imm);
        let operand = if inst.r[1] == NONE { [1; 32] } else { *w.u32s(inst.r[1]) };
        let mut over = 0u32;
        // A try_wait may time out before a phase that ends a little later; the next one at the same place is patient.
        let gives_up = self.ctx.impatient && mbarrier.verb == MbarrierVerb::TryWait && !w.gave_up.contains(&w.pc);
        w.gave_up.retain(|pc| *pc != w.pc);
        if gives_up {
            w.gave_up.push(w.pc);
        }
        for l in (0..32u32).filter(|l| exec >> l & 1 == 1) {
            let span = self.locate_copy::<CHECK>(w, Space::Shared, &address, 8, 8, 1 << l)?;
            if span.good == 0 {
                over |= 1 << l; // said; nobody waits for what is not there
                continue;
            }
            let (at, value) = (span.offsets[l as usize], operand[l as usize]);
            if mbarrier.verb == MbarrierVerb::Init {
                self.initialise::<CHECK>(w, l, at, value)?;
                continue;
            }
            if !self.mbarriers.contains_key(&at) {
                if !CHECK {
                    return fault(l, format!("there is no mbarrier at shared offset {at:#x}"));
                }
                self.find(Kind::Mbarrier, w, l, || format!("there is no mbarrier at shared offset {at:#x}"));
                over |= 1 << l;
                continue;
            }
            self.check_made(w, l, at);
            match mbarrier.verb {
                MbarrierVerb::Init => {}
                MbarrierVerb::Inval => {
                    self.mbarriers.remove(&at);
                }
                MbarrierVerb::Arrive => self.arrive(w, l, exec, at, value, 0),
                MbarrierVerb::ExpectTx => self.arrive(w, l, exec, at, 0, value.into()),
                MbarrierVerb::ArriveExpectTx => self.arrive(w, l, exec, at, 1, value.into()),
                MbarrierVerb::TryWait | MbarrierVerb::TestWait => {
                    if gives_up {
                        continue;
                    }
                    if !self.phase_is_over(at, value) {
                        if mbarrier.verb == MbarrierVerb::TryWait {
                            w.steps -= 1; // it has not happened yet
                            if w.may_run_others() {
                                w.put_behind();
                            } else {
                                w.state = State::Blocked(at, value);
                            }
                            if self.ctx.impatient {
                                w.gave_up.push(w.pc);
                            }
                            return Ok(false);
                        }
                        w.yielded = true;
                        continue;
                    }
                    over |= 1 << l;
                    self.pass(w, at);
                }
            }
        }
        if matches!(mbarrier.verb, MbarrierVerb::TryWait | MbarrierVerb::TestWait) {
            w.set_pred(inst.r[0], exec, over);
        }
        Ok(true)
    }

    fn initialise<const CHECK: bool>(&mut self, w: &Warp, lane: u32, at: u32, count: u32) -> Result<(), Fault> {
        if count == 0 || count > MOST_ARRIVALS {
            return fault(lane, format!("an mbarrier of {count} arrivals; it may have 1 to {MOST_ARRIVALS}"));
        }
        if CHECK {
            self.touch_shared(w, Touch::Write, at, 8, lane, true);
        }
        let none = [0; 32];
        let (pending, landings) = (count, Vec::new());
        let made = (self.shadow.as_ref().map_or(0, |shadow| shadow.clock_of(w.number as usize)), w.number);
        let new = Mbar { count, pending, bytes: 0, phase: 0, told: none, done: none, made, fenced: false, landings };
        let old = self.mbarriers.insert(at, new);
        if CHECK && old.is_some() {
            self.find(Kind::Mbarrier, w, lane, || format!("the mbarrier at {at:#x} is initialised a second time"));
        }
        Ok(())
    }

    /// Whoever uses an mbarrier must come after who made it.
    fn check_made(&mut self, w: &Warp, lane: u32, at: u32) {
        let (Some(shadow), Some(m)) = (&self.shadow, self.mbarriers.get(&at)) else { return };
        let (clock, maker) = m.made;
        if maker != w.number && !shadow.knows(w.number as usize, maker as usize, clock) {
            let message = || format!("warp {maker} makes the mbarrier at {at:#x}, without a barrier between");
            self.find(Kind::SharedRace, w, lane, message);
        }
    }

    fn arrive(&mut self, w: &Warp, lane: u32, exec: u32, at: u32, arrivals: u32, bytes: i64) {
        let Some(m) = self.mbarriers.get_mut(&at) else { return };
        m.bytes += bytes;
        let excess = arrivals > m.pending || m.bytes > MOST_BYTES;
        if excess {
            let (pending, expected) = (m.pending, m.bytes);
            let message = || {
                format!("{arrivals} arrivals and {expected} bytes, where {pending} and at most {MOST_BYTES} are due")
            };
            self.find(Kind::Mbarrier, w, lane, message);
            return;
        }
        m.pending -= arrivals;
        if arrivals > 0 {
            if let Some(shadow) = &mut self.shadow {
                // The first of all lanes speaks for the warp; one of a few knows only what the warp has agreed on.
                if exec != w.live {
                    shadow.release(w.number as usize, &mut m.told);
                } else if lane == exec.trailing_zeros() {
                    shadow.arrive(w.number as usize, &mut m.told);
                } else {
                    shadow.release(w.number as usize, &mut m.told);
                }
            }
        }
        m.settle();
    }

    /// A wait has succeeded: bytes of the phases that are over are there, and the warp knows what came before.
    fn pass(&mut self, w: &Warp, at: u32) {
        let count = self.ctx.block.iter().product::<u32>().div_ceil(32) as usize;
        let Some(m) = self.mbarriers.get_mut(&at) else { return };
        let (phase, done) = (m.phase, m.done);
        let (landed, flying) = std::mem::take(&mut m.landings).into_iter().partition(|l: &Landing| l.phase < phase);
        m.landings = flying;
        for l in landed {
            self.shared_bytes(l.target, l.data.len() as u32).copy_from_slice(&l.data);
            if let Some(shadow) = &mut self.shadow {
                shadow.land(l.target, l.data.len() as u32, l.by);
            }
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.leave(w.number as usize, &done, count);
        }
    }

    pub(crate) fn bulk_copy<const CHECK: bool>(&mut self, w: &mut Warp, inst: &Inst, exec: u32) -> Result<(), Fault> {
        let Op::BulkCopy { base64, dst64, mbar64 } = inst.op else { return Ok(()) };
        let from = self.lane_addresses(w, inst.r[8], base64, i64::from(inst.imm as i32));
        let to = self.lane_addresses(w, inst.r[0], dst64, inst.imm >> 32);
        let mbar = self.lane_addresses(w, inst.r[2], mbar64, inst.more);
        let sizes = *w.u32s(inst.r[1]);
        for l in (0..32u32).filter(|l| exec >> l & 1 == 1) {
            let bytes = sizes[l as usize];
            if bytes == 0 {
                continue;
            }
            if !bytes.is_multiple_of(16) || i64::from(bytes) > MOST_BYTES {
                let message = format!("a bulk copy of {bytes} bytes; a multiple of 16 below 1 MiB is needed");
                if !CHECK {
                    return fault(l, message);
                }
                self.find(Kind::Misaligned, w, l, || message);
                continue;
            }
            let source = self.locate_copy::<CHECK>(w, Space::Global, &from, bytes, 16, 1 << l)?;
            let target = self.locate_copy::<CHECK>(w, Space::Shared, &to, bytes, 16, 1 << l)?;
            let object = self.locate_copy::<CHECK>(w, Space::Shared, &mbar, 8, 8, 1 << l)?;
            if object.good == 0 {
                continue;
            }
            if target.good == 0 {
                // Said; whoever waits for the bytes may go on.
                if let Some(m) = self.mbarriers.get_mut(&object.offsets[l as usize]) {
                    m.bytes -= i64::from(bytes);
                    m.settle();
                }
                continue;
            }
            let mut data = vec![POISON; bytes as usize];
            if let (Region::Buffer(b), true) = (source.region, source.good != 0) {
                if self.ctx.count {
                    let first = l == exec.trailing_zeros();
                    let (pc, offset) = (w.pc as usize, source.offsets[l as usize]);
                    self.counts.bulk_access(pc, b, offset, bytes, first);
                    for sector in offset / 32..=(offset + bytes - 1) / 32 {
                        self.caches.access(pc, b, self.ctx.views[b].len, sector, false);
                    }
                }
                for (i, chunk) in data.chunks_exact_mut(16).enumerate() {
                    let mut part = crate::span::Span { ..source };
                    part.offsets[l as usize] += 16 * i as u32;
                    if CHECK {
                        self.touch_lane(w, &part, Touch::Read, 16, l);
                    }
                    chunk.copy_from_slice(&part.bytes(l as usize, 16));
                }
            }
            let (target, at) = (target.offsets[l as usize], object.offsets[l as usize]);
            self.ask::<CHECK>(w, l, target, at, data)?;
        }
        Ok(())
    }

    /// One lane's bytes set off to shared memory.
    fn ask<const CHECK: bool>(
        &mut self,
        w: &Warp,
        lane: u32,
        target: u32,
        at: u32,
        data: Vec<u8>,
    ) -> Result<(), Fault> {
        let bytes = data.len() as u32;
        let Some(fenced) = self.mbarriers.get(&at).map(|m| m.fenced) else {
            let message = format!("there is no mbarrier at shared offset {at:#x} for the copy to complete on");
            if !CHECK {
                return fault(lane, message);
            }
            self.find(Kind::Mbarrier, w, lane, || message);
            return Ok(());
        };
        if CHECK {
            if !fenced {
                let message = || {
                    format!(
                        "the mbarrier at {at:#x} has no `fence.mbarrier_init` or `fence.proxy.async` after its making"
                    )
                };
                self.find(Kind::Proxy, w, lane, message);
            }
            self.check_made(w, lane, at);
            self.touch_proxy(w, lane, target, bytes, "is written by a bulk copy");
            self.touch_shared(w, Touch::Issue, target, bytes, lane, true);
        }
        self.shared_bytes(target, bytes).fill(POISON);
        let Some(m) = self.mbarriers.get_mut(&at) else { return Ok(()) };
        let clock = self.shadow.as_mut().map_or(0, |shadow| shadow.ask(w.number as usize, &mut m.told));
        m.bytes -= i64::from(bytes);
        m.landings.push(Landing { phase: m.phase, target, data, by: (clock, w.number, lane) });
        m.settle();
        Ok(())
    }

    /// Finds threads' writes that an asynchronous access would not see.
    pub(crate) fn touch_proxy(&mut self, w: &Warp, lane: u32, offset: u32, bytes: u32, what: &str) {
        let Some(shadow) = &self.shadow else { return };
        if shadow.unfenced(offset, bytes, w.number as usize) {
            let message =
                || format!("shared offset {offset:#x} {what}: no `fence.proxy.async` follows a thread's write");
            self.find(Kind::Proxy, w, lane, message);
        }
    }
}
