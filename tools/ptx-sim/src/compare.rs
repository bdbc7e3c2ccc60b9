//! `setp`: comparisons of 32 lanes to predicate masks.

use crate::float::{brain_to_f32, flush, half_to_f32};
use crate::inst::{Combine, Inst, Op, EQUAL, GREATER, LESS, UNORDERED};
use crate::types::Class;
use crate::warp::Warp;

/// Lanes in which `f` holds. The loop is shaped so that four lanes become one vector comparison.
#[inline(always)]
fn mask<T: Copy>(a: &[T; 32], b: &[T; 32], f: impl Fn(T, T) -> bool) -> u32 {
    let mut out = 0;
    for c in (0..32).step_by(4) {
        let mut t = [0i32; 4];
        for j in 0..4 {
            t[j] = if f(a[c + j], b[c + j]) { -1 } else { 0 };
        }
        out |= sign_bits(t) << c;
    }
    out
}

#[inline(always)]
fn sign_bits(t: [i32; 4]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and both types are 16 plain bytes.
    return unsafe {
        std::arch::x86_64::_mm_movemask_ps(std::mem::transmute::<[i32; 4], std::arch::x86_64::__m128>(t)) as u32
    };
    #[cfg(not(target_arch = "x86_64"))]
    t.iter().enumerate().map(|(i, v)| ((*v as u32) >> 31) << i).fold(0, |a, b| a | b)
}

/// The wanted ways to stand: a union of less, equal, greater and unordered.
#[inline(always)]
fn compare<T: Copy + PartialOrd>(a: &[T; 32], b: &[T; 32], truth: u8) -> u32 {
    let less = if truth & LESS != 0 { mask(a, b, |x, y| x < y) } else { 0 };
    let equal = if truth & EQUAL != 0 { mask(a, b, |x, y| x == y) } else { 0 };
    let greater = if truth & GREATER != 0 { mask(a, b, |x, y| x > y) } else { 0 };
    let apart = if truth & UNORDERED != 0 { mask(a, b, |x, y| x.partial_cmp(&y).is_none()) } else { 0 };
    less | equal | greater | apart
}

#[inline(always)]
pub(crate) fn setp(w: &mut Warp, inst: &Inst, exec: u32) {
    let Op::Setp { ty, truth, ftz, combine, negate } = inst.op else { return };
    let (a, b) = (inst.r[2], inst.r[3]);
    let pairs = |shift: u32, f: fn(u16) -> f32| {
        let side = |unit| -> [f32; 32] { w.u32s(unit).map(|v| f((v >> shift) as u16)) };
        compare(&side(a), &side(b), truth)
    };
    let mut second = None;
    let p = match (ty.class(), ty.bytes(), ty.signed()) {
        (Class::Int, 4, true) => compare(&w.u32s(a).map(|v| v as i32), &w.u32s(b).map(|v| v as i32), truth),
        (Class::Int, 8, true) => compare(&w.u64s(a).map(|v| v as i64), &w.u64s(b).map(|v| v as i64), truth),
        (Class::Int, 2, true) => compare(&w.u32s(a).map(|v| v as i16), &w.u32s(b).map(|v| v as i16), truth),
        (Class::F32, ..) if ftz => {
            let side = |unit| w.u32s(unit).map(|v| flush(f32::from_bits(v)));
            compare(&side(a), &side(b), truth)
        }
        (Class::F32, ..) => compare(&w.u32s(a).map(f32::from_bits), &w.u32s(b).map(f32::from_bits), truth),
        (Class::F64, ..) => compare(&w.u64s(a).map(f64::from_bits), &w.u64s(b).map(f64::from_bits), truth),
        (Class::F16, ..) => pairs(0, half_to_f32),
        (Class::Bf16, ..) => pairs(0, brain_to_f32),
        (Class::F16x2, ..) => {
            second = Some(pairs(16, half_to_f32));
            pairs(0, half_to_f32)
        }
        (Class::Bf16x2, ..) => {
            second = Some(pairs(16, brain_to_f32));
            pairs(0, brain_to_f32)
        }
        (_, 2, _) => compare(&w.u32s(a).map(|v| v as u16), &w.u32s(b).map(|v| v as u16), truth),
        (_, 8, _) => compare(w.u64s(a), w.u64s(b), truth),
        _ => compare(w.u32s(a), w.u32s(b), truth),
    };
    let with =
        if combine == Combine::None { 0 } else { w.preds[inst.r[4] as usize] ^ if negate { u32::MAX } else { 0 } };
    let join = |v: u32| match combine {
        Combine::None => v,
        Combine::And => v & with,
        Combine::Or => v | with,
        Combine::Xor => v ^ with,
    };
    w.set_pred(inst.r[0], exec, join(p));
    w.set_pred(inst.r[1], exec, join(second.unwrap_or(!p)));
}
