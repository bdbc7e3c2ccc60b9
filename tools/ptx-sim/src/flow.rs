//! Facts about a whole kernel: how many registers are live at once, and through which parameters it may write.

use crate::ast::ParamDecl;
use crate::inst::{Inst, Op, Program, Space, NONE};
use crate::types::Type;

/// A pointer of unknown origin may be any.
pub(crate) const UNKNOWN: u64 = 1 << 63;

pub(crate) fn analyse(program: &mut Program, params: &[ParamDecl]) {
    let mut width = vec![0u8; program.slots];
    for (place, _, ty) in &program.registers {
        if *ty != Type::Pred {
            width[*place as usize] = if ty.bytes() == 8 { 2 } else { 1 };
        }
    }
    program.live = live_registers(program, &width);
    program.written = written_params(program, params, &width);
}

/// Where control may go after instruction `i`: the next one and a branch target.
fn successors(i: usize, inst: &Inst) -> (Option<usize>, Option<usize>) {
    let guarded = inst.guard != NONE;
    match inst.op {
        Op::Bra => (guarded.then_some(i + 1), Some(inst.imm as usize)),
        Op::Ret | Op::Trap => (guarded.then_some(i + 1), None),
        _ => (Some(i + 1), None),
    }
}

/// The most 32-bit registers live at once: an estimate of what the assembler will allocate, which also reorders and
/// folds.
fn live_registers(program: &Program, width: &[u8]) -> u32 {
    let words = program.slots.div_ceil(64);
    let n = program.code.len();
    let mut live_in = vec![0u64; (n + 1) * words];
    let mut out = vec![0u64; words];
    let mut most = 0;
    let mut changed = true;
    while changed {
        changed = false;
        most = 0;
        for i in (0..n).rev() {
            let inst = &program.code[i];
            out.fill(0);
            let (next, target) = successors(i, inst);
            for s in [next, target].into_iter().flatten() {
                for w in 0..words {
                    out[w] |= live_in[s * words + w];
                }
            }
            let uses = &program.uses[i];
            let count = |set: &[u64]| -> u32 {
                let mut total = 0;
                for (w, bits) in set.iter().enumerate() {
                    let mut bits = *bits;
                    while bits != 0 {
                        total += u32::from(width[w * 64 + bits.trailing_zeros() as usize]);
                        bits &= bits - 1;
                    }
                }
                total
            };
            most = most.max(count(&out));
            if inst.guard == NONE {
                for &s in &uses.writes {
                    out[s as usize / 64] &= !(1 << (s % 64));
                }
            }
            for &s in uses.reads.iter().chain(&uses.updates).chain((uses.guard != NONE).then_some(&uses.guard)) {
                out[s as usize / 64] |= 1 << (s % 64);
            }
            let before = &mut live_in[i * words..(i + 1) * words];
            if *before != out[..] {
                before.copy_from_slice(&out);
                changed = true;
            }
        }
    }
    most
}

/// Follows pointers from `ld.param` through 64-bit registers, without regard to order.
fn written_params(program: &Program, params: &[ParamDecl], width: &[u8]) -> u64 {
    let mut origin = vec![0u64; program.slots];
    let mut changed = true;
    while changed {
        changed = false;
        for (inst, uses) in program.code.iter().zip(&program.uses) {
            let from = match inst.op {
                Op::LdParam(_) => {
                    let at = inst.imm as u32;
                    let index = params.iter().position(|p| (p.offset..p.offset + p.size).contains(&at));
                    index.filter(|i| *i < 63).map_or(UNKNOWN, |i| 1 << i)
                }
                // A pointer read from memory, or glued from halves.
                Op::Ld(_) | Op::Atom { .. } | Op::Pack { .. } => UNKNOWN,
                _ => uses.reads.iter().map(|s| origin.get(*s as usize).copied().unwrap_or(0)).fold(0, |a, b| a | b),
            };
            for &s in &uses.writes {
                let s = s as usize;
                if s < width.len() && width[s] == 2 && origin[s] | from != origin[s] {
                    origin[s] |= from;
                    changed = true;
                }
            }
        }
    }
    let mut written = 0;
    for inst in &program.code {
        let (Op::St(access) | Op::Atom { access, .. }) = inst.op else { continue };
        if access.space != Space::Shared {
            let base = inst.r[8] as usize;
            let from = if base < origin.len() && base < width.len() { origin[base] } else { 0 };
            written |= if from == 0 { UNKNOWN } else { from };
        }
    }
    if written & UNKNOWN != 0 {
        u64::MAX
    } else {
        written
    }
}
