//! Runs one block: warps in lockstep, each until it waits at a barrier, exits or has had its turn.
//!
//! A warp's lanes that stand at one instruction run it together. When they part, the group that stands first in the
//! text runs and the others wait to be met (min-pc); a group that needs absent lanes at a warp-wide instruction is
//! parked until they come.

use std::collections::BTreeMap;

use crate::ast::Special;
use crate::cache::Caches;
use crate::check::{Findings, GlobalShadow, Kind, SharedShadow};
use crate::counts::{Counts, LineCount};
use crate::decode::dynamic_base;
use crate::error::{Error, Place};
use crate::inst::{Constant, Inst, Op, PredOp, Program, Uses, NONE};
use crate::lanes::has_avx2;
use crate::launch::Bank;
use crate::memory::{View, POISON};
use crate::trace::{TraceStep, TraceWarp, Traced};
use crate::warp::{pack, unpack, State, Warp};

/// Instructions that a warp may run before the next warp has its turn.
const TURN: u64 = 1 << 16;

/// What all blocks of a launch share.
pub(crate) struct Ctx<'a> {
    pub program: &'a Program,
    pub kernel: &'a str,
    pub source: &'a str,
    pub views: &'a [View],
    /// Views that are parameters, with their names.
    pub names: &'a [(usize, &'a str)],
    pub shadows: &'a [Option<GlobalShadow>],
    pub constants: &'a Bank,
    pub globals: &'a Bank,
    pub params: &'a [u8],
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Static and dynamic bytes.
    pub shared: u32,
    pub dynamic_shared: u32,
    pub count: bool,
    pub l1_bytes: u32,
    pub impatient: bool,
    pub trace: Option<TraceWarp>,
    pub step_limit: u64,
}

impl Ctx<'_> {
    /// What messages call a view.
    pub fn name(&self, view: usize) -> String {
        match self.names.iter().find(|n| n.0 == view) {
            Some((_, name)) => format!("argument `{name}`"),
            None => format!("buffer {view}"),
        }
    }
}

/// A fault inside a warp, before its place is known.
pub(crate) struct Fault {
    pub lane: u32,
    pub message: String,
}

pub(crate) fn fault<T>(lane: u32, message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault { lane, message: message.into() })
}

/// One worker's block under way: everything but the warps.
pub(crate) struct Machine<'a> {
    pub ctx: &'a Ctx<'a>,
    pub at: [u32; 3],
    /// Block number from 1, for global races.
    pub id: u32,
    pub shared: Vec<u128>,
    pub shadow: Option<SharedShadow>,
    pub findings: Findings,
    pub counts: Counts,
    pub caches: Caches,
    pub trace: Vec<TraceStep>,
    tracing: bool,
    pub barriers: Vec<crate::barrier::Barrier>,
    /// By shared offset.
    pub mbarriers: BTreeMap<u32, crate::exec_bulk::Mbar>,
    /// This block has ordered itself with others by a device-wide fence, and by an atomic.
    pub fenced: bool,
    pub atomic: bool,
}

impl<'a> Machine<'a> {
    pub fn new(ctx: &'a Ctx<'a>, checked: bool) -> Machine<'a> {
        let lines = if ctx.count {
            let line = |(i, n): (&Inst, &String)| LineCount { line: i.line, name: n.clone(), ..LineCount::default() };
            ctx.program.code.iter().zip(&ctx.program.names).map(line).collect()
        } else {
            Vec::new()
        };
        let buffers = if ctx.count { vec![Default::default(); ctx.views.len()] } else { Vec::new() };
        let caches = match ctx.count {
            true => Caches::new(ctx.l1_bytes, &ctx.program.names, ctx.views.len()),
            false => Caches::new(0, &[], 0),
        };
        Machine {
            ctx,
            at: [0; 3],
            id: 0,
            shared: vec![0; ctx.shared.div_ceil(16) as usize + 1],
            shadow: checked.then(|| SharedShadow::new(ctx.shared.max(1), ctx.program.shared_grain)),
            findings: Findings::default(),
            counts: Counts { lines, buffers, ..Counts::default() },
            caches,
            trace: Vec::new(),
            tracing: false,
            barriers: Vec::new(),
            mbarriers: BTreeMap::new(),
            fenced: false,
            atomic: false,
        }
    }

    /// The block's warps, with constants in place; reused from block to block.
    pub fn warps(&self) -> Vec<Warp> {
        let program = self.ctx.program;
        let threads: u32 = self.ctx.block.iter().product();
        let warp = |number| {
            let mut w = Warp::new(number, program);
            for (unit, constant) in &program.constants {
                match constant {
                    Constant::Bits32(v) => *w.u32s_mut(*unit) = [*v; 32],
                    Constant::Bits64(v) => *w.u64s_mut(*unit) = [*v; 32],
                    Constant::Special(s) => *w.u32s_mut(*unit) = self.special(*s, number),
                }
            }
            w
        };
        (0..threads.div_ceil(32)).map(warp).collect()
    }

    fn special(&self, special: Special, warp: u32) -> [u32; 32] {
        let [bx, by, _] = self.ctx.block;
        std::array::from_fn(|l| {
            let thread = warp * 32 + l as u32;
            let lane = l as u32;
            match special {
                Special::Tid(0) => thread % bx,
                Special::Tid(1) => thread / bx % by,
                Special::Tid(_) => thread / bx / by,
                Special::Ntid(a) => self.ctx.block[a],
                Special::Ctaid(a) => self.at[a],
                Special::Nctaid(a) => self.ctx.grid[a],
                Special::LaneId => lane,
                Special::WarpId => warp,
                Special::NWarpId => self.ctx.block.iter().product::<u32>().div_ceil(32),
                Special::LaneMaskEq => 1 << lane,
                Special::LaneMaskLt => (1 << lane) - 1,
                Special::LaneMaskLe => u32::MAX >> (31 - lane),
                Special::LaneMaskGt => !(u32::MAX >> (31 - lane)),
                Special::LaneMaskGe => !((1 << lane) - 1),
                Special::DynamicSharedSize => self.ctx.dynamic_shared,
                Special::TotalSharedSize => dynamic_base(self.ctx.program.static_shared) + self.ctx.dynamic_shared,
            }
        })
    }

    /// Runs block number `index`.
    pub fn run_block<const CHECK: bool>(&mut self, warps: &mut [Warp], index: u64) -> Result<(), Error> {
        let [gx, gy, _] = self.ctx.grid.map(u64::from);
        self.at = [index % gx, index / gx % gy, index / gx / gy].map(|v| v as u32);
        self.id = index as u32 + 1;
        (self.fenced, self.atomic) = (false, false);
        self.barriers = (0..16).map(|_| Default::default()).collect();
        self.mbarriers.clear();
        self.caches.l1.clear();
        if let Some(shadow) = &mut self.shadow {
            shadow.begin_block();
        }
        self.shared.fill(u128::from_ne_bytes([POISON; 16]));
        let threads: u32 = self.ctx.block.iter().product();
        for w in warps.iter_mut() {
            let lanes = (threads - 32 * w.number).min(32);
            w.live = u32::MAX >> (32 - lanes);
            (w.active, w.pc, w.steps, w.state, w.awaited) = (w.live, 0, 0, State::Ready, 0);
            w.gave_up.clear();
            w.groups.clear();
            w.copies.clear();
            w.matrices.clear();
            if CHECK {
                w.init.fill(0);
            }
            for (unit, constant) in &self.ctx.program.constants {
                if let Constant::Special(s @ Special::Ctaid(_)) = constant {
                    *w.u32s_mut(*unit) = self.special(*s, w.number);
                }
            }
        }
        let fast = has_avx2();
        loop {
            let mut any = false;
            for i in 0..warps.len() {
                if let State::Blocked(at, parity) = warps[i].state {
                    if self.phase_is_over(at, parity) {
                        warps[i].state = State::Ready;
                    }
                }
                if warps[i].state != State::Ready {
                    continue;
                }
                any = true;
                self.tracing = self.ctx.trace.as_ref().is_some_and(|t| t.block == self.at && t.warp == i as u32);
                let ran = if fast {
                    // SAFETY: `has_avx2` answers for the machine.
                    unsafe { self.run_warp_fast::<CHECK>(&mut warps[i]) }
                } else {
                    self.run_warp::<CHECK>(&mut warps[i])
                };
                if let Err(f) = ran {
                    return Err(self.located(&warps[i], f));
                }
                self.settle(warps);
            }
            if warps.iter().all(|w| w.state == State::Done) {
                return Ok(());
            }
            if !any {
                return Err(self.deadlock(warps));
            }
        }
    }

    fn line(&self, pc: u32) -> u32 {
        self.ctx.program.code.get(pc as usize).map_or(self.ctx.program.last_line, |i| i.line)
    }

    fn located(&self, warp: &Warp, f: Fault) -> Error {
        let place = Place { line: self.line(warp.pc), block: self.at, warp: warp.number, lane: f.lane };
        Error::Fault { kernel: self.ctx.kernel.into(), place, message: f.message }
    }

    fn deadlock(&self, warps: &[Warp]) -> Error {
        let waiting: Vec<String> = warps
            .iter()
            .filter_map(|w| match w.state {
                State::Waiting(b) => Some(format!("warp {} at barrier {b}, line {}", w.number, self.line(w.pc))),
                State::Blocked(at, _) => {
                    Some(format!("warp {}, line {}, {}", w.number, self.line(w.pc), self.describe_mbarrier(at)))
                }
                _ => None,
            })
            .collect();
        let first =
            warps.iter().find(|w| matches!(w.state, State::Waiting(_) | State::Blocked(..))).unwrap_or(&warps[0]);
        let message = format!("no warp can go on: {}", waiting.join("; "));
        self.located(first, Fault { lane: first.active.trailing_zeros() % 32, message })
    }

    /// Records a finding about one lane of the running instruction.
    #[cold]
    pub fn find(&mut self, kind: Kind, warp: &Warp, lane: u32, message: impl FnOnce() -> String) {
        let place = Place { line: self.line(warp.pc), block: self.at, warp: warp.number, lane };
        self.findings.add(kind, place, message);
    }

    /// [`Machine::run_warp`] compiled for AVX2.
    ///
    /// # Safety
    /// The machine has the features.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi2"))]
    unsafe fn run_warp_fast<const CHECK: bool>(&mut self, w: &mut Warp) -> Result<(), Fault> {
        self.run_warp::<CHECK>(w)
    }

    /// Runs the warp until it waits, exits or has had its turn.
    #[inline(always)]
    fn run_warp<const CHECK: bool>(&mut self, w: &mut Warp) -> Result<(), Fault> {
        let program = self.ctx.program;
        let observed = self.ctx.count || self.tracing;
        let end = w.steps + TURN;
        let mut threads = 0u64;
        let start = w.steps;
        w.yielded = false;
        while w.state == State::Ready && w.steps < end && !w.yielded {
            let Some(inst) = program.code.get(w.pc as usize) else {
                let lane = w.active.trailing_zeros();
                if !CHECK {
                    return fault(lane, "control runs past the last instruction: `ret` is missing");
                }
                self.find(Kind::MissingReturn, w, lane, || "control runs past the last instruction".into());
                w.exit(w.active);
                continue;
            };
            w.steps += 1;
            let exec = match inst.guard {
                NONE => w.active,
                p => w.active & (w.preds[p as usize] ^ if inst.negate { u32::MAX } else { 0 }),
            };
            threads += u64::from(exec.count_ones());
            if CHECK {
                self.check_registers(w, &program.uses[w.pc as usize], exec);
            }
            if observed {
                self.observe(w, exec);
            }
            if exec != 0 {
                match &inst.op {
                    // SAFETY: the decoder numbered every unit below `program.units`, and chose `f` for this machine.
                    Op::Alu(f) => unsafe { f(w.file.as_mut_ptr(), inst, exec) },
                    Op::Bra => {
                        self.branch(w, inst, exec);
                        continue;
                    }
                    Op::Ret => {
                        let stay = w.active & !exec;
                        if stay == 0 {
                            w.exit(exec);
                            continue;
                        }
                        w.live &= !exec;
                        w.active = stay;
                    }
                    _ => {
                        let pc = w.pc as usize;
                        if !self.step::<CHECK>(w, inst, exec)? {
                            if !matches!(w.state, State::Waiting(_)) {
                                // Parked: it will run when the others come, or when the phase is over.
                                threads -= u64::from(exec.count_ones());
                                self.unobserve(pc, exec);
                            }
                            continue;
                        }
                    }
                }
                if self.tracing {
                    self.trace_results(w);
                }
            }
            w.pc += 1;
            if !w.groups.is_empty() {
                w.meet();
            }
        }
        self.counts.thread_instructions += threads;
        self.counts.warp_instructions += w.steps - start;
        if w.steps > self.ctx.step_limit {
            let lane = w.active.trailing_zeros() % 32;
            return fault(
                lane,
                format!("more than {} instructions in one warp: an endless loop?", self.ctx.step_limit),
            );
        }
        Ok(())
    }

    fn branch(&mut self, w: &mut Warp, inst: &Inst, taken: u32) {
        let stay = w.active & !taken;
        if stay != 0 {
            // Both ways: the earlier one in the text goes first.
            let (next, target) = (w.pc + 1, inst.imm as u32);
            w.active = stay;
            w.pc = next;
            w.put_aside_at(target, taken);
        } else {
            w.pc = inst.imm as u32;
        }
        if !w.groups.is_empty() {
            w.meet();
        }
    }

    /// Everything but arithmetic and control. False: the warp stands elsewhere or waits; do not advance.
    #[inline(always)]
    fn step<const CHECK: bool>(&mut self, w: &mut Warp, inst: &Inst, exec: u32) -> Result<bool, Fault> {
        match inst.op {
            Op::Setp { .. } => crate::compare::setp(w, inst, exec),
            Op::Selp { wide } => {
                let p = w.preds[inst.r[3] as usize];
                if wide {
                    let (a, b) = (*w.u64s(inst.r[1]), *w.u64s(inst.r[2]));
                    let out = w.u64s_mut(inst.r[0]);
                    for l in (0..32).filter(|l| exec >> l & 1 == 1) {
                        out[l] = if p >> l & 1 == 1 { a[l] } else { b[l] };
                    }
                } else {
                    let mut v = *w.u32s(inst.r[2]);
                    let a = w.u32s(inst.r[1]);
                    for l in 0..32 {
                        v[l] = if p >> l & 1 == 1 { a[l] } else { v[l] };
                    }
                    w.set(inst.r[0], exec, &v);
                }
            }
            Op::Pred { op, negate } => {
                let get = |i: usize| {
                    let p = inst.r[i + 1];
                    let v = if p == NONE { 0 } else { w.preds[p as usize] };
                    v ^ if negate[i] { u32::MAX } else { 0 }
                };
                let value = match op {
                    PredOp::Mov => get(0),
                    PredOp::Not => !get(0),
                    PredOp::And => get(0) & get(1),
                    PredOp::Or => get(0) | get(1),
                    PredOp::Xor => get(0) ^ get(1),
                };
                w.set_pred(inst.r[0], exec, value);
            }
            Op::Pack { n, part } => pack(w, inst, exec, n, part),
            Op::Unpack { n, part } => unpack(w, inst, exec, n, part),
            Op::LdParam(access) => self.load_param(w, inst, access, exec),
            Op::Ld(access) => self.load::<CHECK>(w, inst, access, exec)?,
            Op::St(access) => self.store::<CHECK>(w, inst, access, exec)?,
            Op::Atom { access, op, ty } => self.atomic::<CHECK>(w, inst, access, op, ty, exec)?,
            Op::CpAsync { .. } => self.copy_async::<CHECK>(w, inst, exec)?,
            Op::CpCommit => w.copies.commit(exec),
            Op::CpWait { groups, all } => self.copy_wait(w, exec, groups, all),
            Op::Fence { device } => self.fenced |= device,
            Op::ProxyFence { shared } => self.proxy_fence(w, exec, shared),
            Op::Mbarrier(m) => return self.mbarrier::<CHECK>(w, inst, m, exec),
            Op::BulkCopy { .. } => self.bulk_copy::<CHECK>(w, inst, exec)?,
            Op::Nop => {}
            Op::ActiveMask => w.set(inst.r[0], exec, &[exec; 32]),
            Op::Trap => return fault(exec.trailing_zeros(), "`trap` was reached"),
            Op::Alu(_) | Op::Bra | Op::Ret => {}
            _ => {
                let members = self.members(w, inst, exec)?;
                if !self.together::<CHECK>(w, inst, exec, members) {
                    return Ok(false);
                }
                return self.warp_wide::<CHECK>(w, inst, exec);
            }
        }
        Ok(true)
    }

    /// Lanes that a warp-wide instruction needs: its member mask, or all.
    fn members(&self, w: &Warp, inst: &Inst, exec: u32) -> Result<u32, Fault> {
        let unit = match inst.op {
            Op::Shfl(_) => inst.r[5],
            Op::Match { .. } => inst.r[3],
            Op::Vote { .. } | Op::Redux(_) | Op::BarWarp | Op::Elect => inst.r[2],
            _ => return Ok(u32::MAX),
        };
        let mask = w.u32s(unit)[exec.trailing_zeros() as usize];
        let other = (0..32).find(|l| exec >> l & 1 == 1 && w.u32s(unit)[*l as usize] != mask);
        if let Some(l) = other {
            // Lanes with different masks are different teams; that needs a second pass which nothing here asks for.
            return fault(l, "lanes of one instruction give different member masks, which is not supported");
        }
        Ok(mask)
    }

    /// Whether all needed lanes stand here; otherwise the running ones are parked, or it is found that the others never
    /// come.
    fn together<const CHECK: bool>(&mut self, w: &mut Warp, inst: &Inst, exec: u32, members: u32) -> bool {
        let skipped = w.active & !exec;
        if skipped & members != 0 && skipped != 0 {
            // A guarded instruction: the rest goes on and may yet come here.
            let pc = w.pc;
            w.active = exec;
            w.put_aside_at(pc + 1, skipped);
        }
        let absent = members & w.live & !exec;
        if absent != 0 && w.may_run_others() {
            w.put_aside(absent);
            return false;
        }
        let gone = w.awaited & !w.live;
        w.awaited = 0;
        let unaligned = matches!(inst.op, Op::Bar { aligned: false, .. });
        if CHECK && absent | gone != 0 && !unaligned {
            let what = &self.ctx.program.names[w.pc as usize];
            let message =
                format!("`{what}` without lanes {:#010x}, which wait elsewhere, skip it or exit", absent | gone);
            self.find(Kind::Divergence, w, exec.trailing_zeros(), || message);
        }
        if CHECK {
            let strangers = exec & !members;
            if strangers != 0 {
                let message = || format!("this lane is not in the member mask {members:#010x}");
                self.find(Kind::Divergence, w, strangers.trailing_zeros(), message);
            }
        }
        true
    }

    /// Reads of registers that some lane has not written.
    #[inline(always)]
    fn check_registers(&mut self, w: &mut Warp, uses: &Uses, exec: u32) {
        let mut missing = 0;
        for &s in &uses.reads {
            missing |= exec & !w.init[s as usize];
        }
        if uses.guard != NONE {
            missing |= w.active & !w.init[uses.guard as usize];
        }
        if missing != 0 {
            self.unwritten_registers(w, uses, exec);
        }
        if !self.ctx.program.lists.is_empty() {
            self.check_matrix_registers(w, uses);
        }
        for &s in &uses.writes {
            w.init[s as usize] |= exec;
        }
    }

    #[cold]
    fn unwritten_registers(&mut self, w: &mut Warp, uses: &Uses, exec: u32) {
        let guard = (uses.guard != NONE).then_some((uses.guard, w.active));
        let reads = uses.reads.iter().map(|s| (*s, exec));
        for (slot, lanes) in reads.chain(guard) {
            let missing = lanes & !w.init[slot as usize];
            if missing != 0 {
                let name = self.ctx.program.slot_name(slot);
                self.find(Kind::UninitialisedRegister, w, missing.trailing_zeros(), || {
                    format!("`{name}` was never written")
                });
                w.init[slot as usize] |= missing; // said once
            }
        }
    }

    fn observe(&mut self, w: &Warp, exec: u32) {
        if self.ctx.count {
            let l = &mut self.counts.lines[w.pc as usize];
            l.warps += 1;
            l.threads += u64::from(exec.count_ones());
        }
        if self.tracing && self.trace.len() < self.ctx.trace.as_ref().map_or(0, |t| t.steps) {
            let line = self.line(w.pc);
            let text = self.ctx.source.lines().nth(line as usize - 1).unwrap_or("").trim().to_string();
            self.trace.push(TraceStep { pc: w.pc, line, text, lanes: exec, results: Vec::new(), open: exec != 0 });
        }
    }

    /// Takes back [`Machine::observe`].
    #[cold]
    fn unobserve(&mut self, pc: usize, exec: u32) {
        if let Some(l) = self.counts.lines.get_mut(pc) {
            l.warps -= 1;
            l.threads -= u64::from(exec.count_ones());
        }
        if self.tracing && self.trace.last().is_some_and(|t| t.open && t.pc == pc as u32) {
            self.trace.pop();
        }
    }

    /// Completes the last trace step with what the instruction wrote.
    #[cold]
    fn trace_results(&mut self, w: &Warp) {
        let Some(step) = self.trace.last_mut() else { return };
        if !step.open || step.pc != w.pc {
            return;
        }
        step.open = false;
        let program = self.ctx.program;
        for &slot in &program.uses[w.pc as usize].writes {
            let Some((place, name, ty)) = program.slot(slot) else { continue };
            let bits = match ty.bytes() {
                0 => std::array::from_fn(|lane| u64::from(w.preds[place as usize] >> lane & 1)),
                8 => *w.u64s(place),
                _ => w.u32s(place).map(u64::from),
            };
            step.results.push(Traced { name: name.to_string(), ty: ty.name(), bits });
        }
    }
}
