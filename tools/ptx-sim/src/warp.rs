//! A warp: its registers, where its lanes stand, and how they part and meet.

use crate::exec_copy::CopyQueue;
use crate::exec_wgmma::MatrixQueue;
use crate::inst::{Inst, Op, Program, NONE};
use crate::lanes::Unit;
use crate::memory::POISON;

/// Lanes that stand together, away from the running ones.
pub(crate) struct Group {
    pc: u32,
    lanes: u32,
    /// Waits for absent lanes, or at a barrier.
    parked: bool,
    /// The lanes it waits for.
    awaited: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// At a barrier.
    Waiting(u32),
    /// For the phase of this parity to end at the mbarrier at this shared offset.
    Blocked(u32, u32),
    Done,
}

pub(crate) struct Warp {
    pub number: u32,
    pub file: Vec<Unit>,
    pub preds: Vec<u32>,
    /// Lanes that have written each slot.
    pub init: Vec<u32>,
    pub pc: u32,
    pub active: u32,
    /// Lanes that have not exited.
    pub live: u32,
    pub groups: Vec<Group>,
    /// Lanes that the running ones have been waiting for at this instruction.
    pub awaited: u32,
    pub state: State,
    pub steps: u64,
    pub copies: CopyQueue,
    pub matrices: MatrixQueue,
    /// Give the next warp its turn.
    pub yielded: bool,
    /// Each `try_wait` that has timed out and has not been asked again.
    pub gave_up: Vec<u32>,
}

impl Warp {
    /// All registers poisoned, nobody running.
    pub fn new(number: u32, program: &Program) -> Warp {
        Warp {
            number,
            file: vec![Unit([u32::from_ne_bytes([POISON; 4]); 32]); program.units],
            preds: vec![0; program.preds],
            init: vec![0; program.slots],
            pc: 0,
            active: 0,
            live: 0,
            groups: Vec::new(),
            awaited: 0,
            state: State::Ready,
            steps: 0,
            copies: CopyQueue::default(),
            matrices: MatrixQueue::default(),
            yielded: false,
            gave_up: Vec::new(),
        }
    }

    #[inline(always)]
    pub fn u32s(&self, unit: u16) -> &[u32; 32] {
        &self.file[unit as usize].0
    }

    #[inline(always)]
    pub fn u32s_mut(&mut self, unit: u16) -> &mut [u32; 32] {
        &mut self.file[unit as usize].0
    }

    #[inline(always)]
    pub fn u64s(&self, unit: u16) -> &[u64; 32] {
        let pair = &self.file[unit as usize..unit as usize + 2];
        // SAFETY: two units are 256 bytes in a row, aligned to 64; every u64 is valid.
        unsafe { &*pair.as_ptr().cast() }
    }

    #[inline(always)]
    pub fn u64s_mut(&mut self, unit: u16) -> &mut [u64; 32] {
        let pair = &mut self.file[unit as usize..unit as usize + 2];
        // SAFETY: as in `u64s`, exclusive.
        unsafe { &mut *pair.as_mut_ptr().cast() }
    }

    /// Writes the masked lanes of a 32-bit register.
    #[inline(always)]
    pub fn set(&mut self, unit: u16, lanes: u32, value: &[u32; 32]) {
        let out = self.u32s_mut(unit);
        if lanes == u32::MAX {
            *out = *value;
        } else {
            for l in 0..32 {
                out[l] = if lanes >> l & 1 == 1 { value[l] } else { out[l] };
            }
        }
    }

    #[inline(always)]
    pub fn set_pred(&mut self, pred: u16, lanes: u32, value: u32) {
        if pred != NONE {
            let p = &mut self.preds[pred as usize];
            *p = *p & !lanes | value & lanes;
        }
    }

    /// Ends the given lanes.
    pub fn exit(&mut self, lanes: u32) {
        self.live &= !lanes;
        self.active &= !lanes;
        if self.active == 0 {
            self.switch();
        }
    }

    /// Puts the running lanes aside at `pc`, parked if they await some, and goes on with another group, if one may run.
    pub fn put_aside(&mut self, awaited: u32) {
        let (pc, lanes) = (self.pc, self.active);
        let awaited = awaited | self.awaited;
        self.active = 0;
        self.groups.push(Group { pc, lanes, parked: awaited != 0, awaited });
        self.switch();
    }

    /// Takes up the first group in text order: one that may run, else any.
    fn switch(&mut self) {
        let next = (0..self.groups.len()).min_by_key(|i| (self.groups[*i].parked, self.groups[*i].pc));
        match next {
            Some(i) => {
                let g = self.groups.swap_remove(i);
                (self.pc, self.active, self.awaited) = (g.pc, g.lanes, g.awaited);
            }
            None if self.live == 0 => self.state = State::Done,
            None => {}
        }
    }

    /// Puts the running lanes aside until the others have exited or wait themselves.
    pub fn put_behind(&mut self) {
        let (pc, lanes) = (self.pc, self.active);
        self.active = 0;
        self.groups.push(Group { pc, lanes, parked: true, awaited: 0 });
        self.switch();
    }

    pub fn may_run_others(&self) -> bool {
        self.groups.iter().any(|g| !g.parked)
    }

    /// After a move of `pc`: meets a group that stands there, and lets one that stands earlier go first.
    pub fn meet(&mut self) {
        if let Some(i) = self.groups.iter().position(|g| g.pc == self.pc) {
            let g = self.groups.swap_remove(i);
            self.active |= g.lanes;
            self.awaited |= g.awaited;
        }
        if self.groups.iter().any(|g| !g.parked && g.pc < self.pc) {
            self.put_aside(0);
        }
    }

    /// A barrier lets this warp go: groups at barriers move past them.
    pub fn release(&mut self, program: &Program) {
        self.state = State::Ready;
        for g in &mut self.groups {
            if matches!(program.code.get(g.pc as usize).map(|i| i.op), Some(Op::Bar { .. })) {
                g.pc += 1;
            }
            (g.parked, g.awaited) = (false, 0);
        }
        self.awaited = 0;
        self.pc += 1;
        self.meet();
    }
}

impl Warp {
    /// Sends lanes to stand at `pc`, merged with those already there.
    pub fn put_aside_at(&mut self, pc: u32, lanes: u32) {
        match self.groups.iter_mut().find(|g| g.pc == pc) {
            Some(g) => {
                g.lanes |= lanes;
                g.parked = false;
            }
            None => self.groups.push(Group { pc, lanes, parked: false, awaited: 0 }),
        }
    }

    /// The running lanes wait at a barrier.
    pub fn wait(&mut self, barrier: u32) {
        self.state = State::Waiting(barrier);
    }
}

pub(crate) fn pack(w: &mut Warp, inst: &Inst, exec: u32, n: u8, part: u8) {
    if part == 8 {
        let v = *w.u64s(inst.r[1]);
        let out = w.u64s_mut(inst.r[0]);
        (0..32).filter(|l| exec >> l & 1 == 1).for_each(|l| out[l] = v[l]);
        return;
    }
    let bits = 8 * u32::from(part);
    let mut sum = [0u64; 32];
    for i in 0..usize::from(n) {
        let v = w.u32s(inst.r[1 + i]);
        for l in 0..32 {
            sum[l] |= (u64::from(v[l]) & ((1 << bits) - 1)) << (bits * i as u32);
        }
    }
    if n * part == 8 {
        let out = w.u64s_mut(inst.r[0]);
        (0..32).filter(|l| exec >> l & 1 == 1).for_each(|l| out[l] = sum[l]);
    } else {
        w.set(inst.r[0], exec, &sum.map(|v| v as u32));
    }
}

pub(crate) fn unpack(w: &mut Warp, inst: &Inst, exec: u32, n: u8, part: u8) {
    let bits = 8 * u32::from(part);
    let v: [u64; 32] = if n * part == 8 { *w.u64s(inst.r[8]) } else { w.u32s(inst.r[8]).map(u64::from) };
    for i in 0..usize::from(n) {
        if inst.r[i] != NONE {
            let out = v.map(|v| (v >> (bits * i as u32) & ((1 << bits) - 1)) as u32);
            w.set(inst.r[i], exec, &out);
        }
    }
}
