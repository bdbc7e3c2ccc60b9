//! The block's sixteen barriers: who has arrived, who waits, and what a `bar.red` has gathered.

use crate::exec::{fault, Fault, Machine};
use crate::inst::{BarrierKind, Inst, Op, NONE};
use crate::warp::{State, Warp};

#[derive(Default)]
pub(crate) struct Barrier {
    /// Threads that have arrived, in whole warps.
    arrived: u32,
    /// Threads that complete the barrier; none: all that have not exited.
    need: Option<u32>,
    /// Vector clock of those who have arrived.
    told: [u32; 32],
    /// Threads whose predicate held, and threads that gave one.
    held: u32,
    gave: u32,
}

impl Machine<'_> {
    /// The running lanes reach a barrier. True: they go on at once.
    pub(crate) fn reach(&mut self, w: &mut Warp, inst: &Inst, exec: u32) -> Result<bool, Fault> {
        let Op::Bar { kind, negate, .. } = inst.op else { return Ok(true) };
        let lane = exec.trailing_zeros();
        let number = w.u32s(inst.r[1])[lane as usize];
        if number > 15 {
            return fault(lane, format!("barrier {number}; there are 16"));
        }
        let need = (inst.r[2] != NONE).then(|| w.u32s(inst.r[2])[lane as usize]);
        if let Some(n) = need.filter(|n| n % 32 != 0 || *n == 0) {
            return fault(lane, format!("a barrier of {n} threads; the count must be a multiple of 32"));
        }
        let barrier = &mut self.barriers[number as usize];
        if barrier.arrived > 0 && barrier.need != need {
            let (had, has) = (barrier.need.unwrap_or(0), need.unwrap_or(0));
            return fault(
                lane,
                format!("barrier {number} is awaited with the counts {had} and {has} (0: all threads)"),
            );
        }
        barrier.need = need;
        barrier.arrived += 32;
        if matches!(kind, BarrierKind::Popc | BarrierKind::And | BarrierKind::Or) {
            let p = w.preds[inst.r[3] as usize] ^ if negate { u32::MAX } else { 0 };
            barrier.held += (p & exec).count_ones();
            barrier.gave += exec.count_ones();
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.arrive(w.number as usize, &mut barrier.told);
        }
        if kind == BarrierKind::Arrive {
            return Ok(true);
        }
        w.wait(number);
        Ok(false)
    }

    /// Lets go the warps whose barrier is complete.
    pub(crate) fn settle(&mut self, warps: &mut [Warp]) {
        for number in 0..self.barriers.len() {
            let waits = |w: &Warp| w.state == State::Waiting(number as u32);
            let barrier = &self.barriers[number];
            let complete = match barrier.need {
                Some(n) => barrier.arrived >= n,
                None => barrier.arrived > 0 && warps.iter().all(|w| w.state == State::Done || waits(w)),
            };
            if !complete {
                continue;
            }
            let barrier = std::mem::take(&mut self.barriers[number]);
            let count = warps.len();
            for w in warps.iter_mut().filter(|w| waits(w)) {
                if let Some(shadow) = &mut self.shadow {
                    shadow.leave(w.number as usize, &barrier.told, count);
                }
                if let Some(inst) = self.ctx.program.code.get(w.pc as usize) {
                    finish(w, inst, &barrier);
                }
                w.release(self.ctx.program);
            }
        }
    }
}

/// Gives a waiting warp the result of its `bar.red`.
fn finish(w: &mut Warp, inst: &Inst, barrier: &Barrier) {
    let Op::Bar { kind, .. } = inst.op else { return };
    let lanes = w.active;
    let spread = |v: bool| if v { u32::MAX } else { 0 };
    match kind {
        BarrierKind::Popc => w.set(inst.r[0], lanes, &[barrier.held; 32]),
        BarrierKind::And => w.set_pred(inst.r[0], lanes, spread(barrier.held == barrier.gave)),
        BarrierKind::Or => w.set_pred(inst.r[0], lanes, spread(barrier.held > 0)),
        BarrierKind::Sync | BarrierKind::Arrive => {}
    }
}
