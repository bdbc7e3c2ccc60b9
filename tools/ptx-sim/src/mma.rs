//! `mma.sync m16n8k*`: D[16,8] = A[16,k] · B[k,8] + C over the warp's fragments.
//!
//! With p elements in a 32-bit register, g = lane / 4 and t = lane mod 4, register r and element e hold
//! A[g + 8 (r mod 2)][p t + e + 4 p (r div 2)], B[p t + e + 4 p r][g], and C and D[g + 8 (r div 2)][2 t + r mod 2].
//!
//! Integers are exact. Floats: products are exact in f32 and are added one by one to C for ascending k, rounding each
//! sum; hardware adds groups of products with its own alignment and truncation, so results agree within a tolerance,
//! not in bits.

use crate::float::{brain_to_f32, canonical, half_of_f32, half_to_f32};
use crate::inst::{Factor, Inst, Mma};
use crate::lanes::has_avx2;
use crate::warp::Warp;

const K: usize = 32;

/// Puts the elements of an operand's registers where they belong: `put(g, t, r, e, value)`.
#[inline(always)]
fn gather<T: Copy + Default, const P: usize>(
    w: &Warp,
    units: &[u16],
    value: impl Fn(u32, usize) -> T,
    mut put: impl FnMut(usize, usize, usize, usize, T),
) {
    for (r, unit) in units.iter().enumerate() {
        let v = w.u32s(*unit);
        for e in 0..P {
            let mut converted = [T::default(); 32];
            for l in 0..32 {
                converted[l] = value(v[l], e);
            }
            for g in 0..8 {
                for t in 0..4 {
                    put(g, t, r, e, converted[4 * g + t]);
                }
            }
        }
    }
}

pub(crate) fn mma(w: &mut Warp, inst: &Inst, exec: u32, mma: Mma) {
    if has_avx2() {
        // SAFETY: the machine has the features.
        unsafe { mma_fast(w, inst, exec, mma) }
    } else {
        mma_body(w, inst, exec, mma);
    }
}

#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi2"))]
unsafe fn mma_fast(w: &mut Warp, inst: &Inst, exec: u32, mma: Mma) {
    mma_body(w, inst, exec, mma);
}

#[inline(always)]
fn mma_body(w: &mut Warp, inst: &Inst, exec: u32, mma: Mma) {
    let upper = |v: u32, e: usize| (v >> (16 * e)) as u16;
    match mma.factor {
        Factor::Int8(a_signed, b_signed) => integers(w, inst, exec, mma, (a_signed, b_signed)),
        Factor::F16 => floats::<2>(w, inst, exec, mma, |v, e| half_to_f32(upper(v, e))),
        Factor::Bf16 => floats::<2>(w, inst, exec, mma, |v, e| brain_to_f32(upper(v, e))),
        // The low 13 bits are not part of the format; hardware leaves them out.
        Factor::Tf32 => floats::<1>(w, inst, exec, mma, |v, _| f32::from_bits(v & 0xffff_e000)),
    }
}

/// The units of A, B and C.
fn operands<'a>(inst: &'a Inst, mma: &Mma) -> [&'a [u16]; 3] {
    let (sums, na, nb) = mma.registers();
    let (a, rest) = inst.r[sums..].split_at(na);
    let (b, c) = rest.split_at(nb);
    [a, b, &c[..sums]]
}

#[inline(always)]
fn floats<const P: usize>(w: &mut Warp, inst: &Inst, exec: u32, mma: Mma, value: impl Fn(u32, usize) -> f32) {
    let [a, b, c] = operands(inst, &mma);
    let (mut am, mut bm, mut sum) = ([[0f32; 16]; K], [[0f32; 8]; K], [[0f32; 8]; 16]);
    gather::<f32, P>(w, a, &value, |g, t, r, e, v| am[(P * t + e + 4 * P * (r / 2)) % K][g + 8 * (r % 2)] = v);
    gather::<f32, P>(w, b, &value, |g, t, r, e, v| bm[(P * t + e + 4 * P * r) % K][g] = v);
    if mma.half_sum {
        let half = |v: u32, e: usize| half_to_f32((v >> (16 * e)) as u16);
        gather::<f32, 2>(w, c, half, |g, t, r, e, v| sum[g + 8 * (r % 2)][2 * t + e] = v);
    } else {
        gather::<f32, 1>(w, c, |v, _| f32::from_bits(v), |g, t, r, _, v| sum[g + 8 * (r / 2 % 2)][2 * t + r % 2] = v);
    }
    // Eight rows at a time: eight sums that do not wait for each other.
    for (half, rows) in sum.chunks_exact_mut(8).enumerate() {
        let mut s = [[0f32; 8]; 8];
        s.copy_from_slice(rows);
        for (a, b) in am.iter().zip(&bm).take(usize::from(mma.k)) {
            for (row, s) in s.iter_mut().enumerate() {
                for n in 0..8 {
                    s[n] = a[8 * half + row].mul_add(b[n], s[n]);
                }
            }
        }
        rows.copy_from_slice(&s);
    }
    for r in 0..c.len() {
        let mut out = [0; 32];
        for (l, out) in out.iter_mut().enumerate() {
            let (g, t) = (l / 4, l % 4);
            *out = if mma.half_sum {
                let half = |e: usize| u32::from(half_of_f32(sum[g + 8 * (r % 2)][2 * t + e]));
                half(0) | half(1) << 16
            } else {
                canonical(sum[g + 8 * (r / 2 % 2)][2 * t + r % 2])
            };
        }
        w.set(inst.r[r], exec, &out);
    }
}

#[inline(always)]
fn integers(w: &mut Warp, inst: &Inst, exec: u32, mma: Mma, signed: (bool, bool)) {
    let byte = |signed: bool| {
        move |v: u32, e: usize| {
            let v = (v >> (8 * e)) as u8;
            if signed {
                i32::from(v as i8)
            } else {
                i32::from(v)
            }
        }
    };
    let [a, b, c] = operands(inst, &mma);
    let (mut am, mut bm, mut sum) = ([[0i32; K]; 16], [[0i32; 8]; K], [[0i32; 8]; 16]);
    gather::<i32, 4>(w, a, byte(signed.0), |g, t, r, e, v| am[g + 8 * (r % 2)][4 * t + e + 16 * (r / 2)] = v);
    gather::<i32, 4>(w, b, byte(signed.1), |g, t, r, e, v| bm[4 * t + e + 16 * r][g] = v);
    gather::<i32, 1>(w, c, |v, _| v as i32, |g, t, r, _, v| sum[g + 8 * (r / 2)][2 * t + r % 2] = v);
    let k = usize::from(mma.k);
    for (row, a) in sum.iter_mut().zip(&am) {
        for n in 0..8 {
            // At most 32 products of 16 bits: the dot product itself cannot overflow.
            let dot: i32 = a.iter().zip(&bm).take(k).map(|(a, b)| a * b[n]).sum();
            row[n] = if mma.saturate { row[n].saturating_add(dot) } else { row[n].wrapping_add(dot) };
        }
    }
    for r in 0..4 {
        let out: [u32; 32] = std::array::from_fn(|l| sum[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2] as u32);
        w.set(inst.r[r], exec, &out);
    }
}
