//! `mma.sync m16n8k*`: D[16,8] = A[16,k] · B[k,8] + C over the warp's fragments.
//!
//! With p elements in a 32-bit register, g = lane / 4 and t = lane mod 4, register r and element e hold
//! A[g + 8 (r mod 2)][p t + e + 4 p (r div 2)], B[p t + e + 4 p r][g], and C and D[g + 8 (r div 2)][2 t + r mod 2].
//!
//! Integers are exact. Floats: products are exact in f32 and are added one by one to C for ascending k, rounding each sum;
//! hardware adds groups of products with its own alignment and truncation, so results agree within a tolerance, not in bits.

use crate::exec::Warp;
use crate::float::{brain_to_f32, canonical, half_to_f32, Half};
use crate::inst::{Factor, Inst, Mma};
use crate::lanes::{has_avx2, F16};

const K: usize = 32;

/// Element `(i, j)` of an operand for each lane, register and element: `place(g, t, r, e)`.
fn gather<T: Copy>(
    w: &Warp,
    units: &[u16],
    p: usize,
    value: impl Fn(u32, usize) -> T,
    mut put: impl FnMut(usize, usize, usize, usize, T),
) {
    for (r, unit) in units.iter().enumerate() {
        let v = w.u32s(*unit);
        for l in 0..32 {
            for e in 0..p {
                put(l / 4, l % 4, r, e, value(v[l], e));
            }
        }
    }
}

pub(crate) fn mma(w: &mut Warp, inst: &Inst, exec: u32, mma: Mma) {
    let (sums, na, nb) = mma.registers();
    let (a, rest) = inst.r[sums..].split_at(na);
    let (b, c) = rest.split_at(nb);
    let c = &c[..sums];
    if let Factor::Int8(a_signed, b_signed) = mma.factor {
        return integers(w, inst, exec, mma, [a, b, c], (a_signed, b_signed));
    }
    let (p, value): (usize, fn(u32, usize) -> f32) = match mma.factor {
        Factor::F16 => (2, |v, e| half_to_f32((v >> (16 * e)) as u16)),
        Factor::Bf16 => (2, |v, e| brain_to_f32((v >> (16 * e)) as u16)),
        // The low 13 bits are not part of the format; hardware leaves them out.
        _ => (1, |v, _| f32::from_bits(v & 0xffff_e000)),
    };
    let (mut am, mut bm, mut sum) = ([[0f32; K]; 16], [[0f32; 8]; K], [[0f32; 8]; 16]);
    gather(w, a, p, value, |g, t, r, e, v| am[g + 8 * (r % 2)][p * t + e + 4 * p * (r / 2)] = v);
    gather(w, b, p, value, |g, t, r, e, v| bm[p * t + e + 4 * p * r][g] = v);
    if mma.half_sum {
        let half = |v: u32, e: usize| half_to_f32((v >> (16 * e)) as u16);
        gather(w, c, 2, half, |g, t, r, e, v| sum[g + 8 * r][2 * t + e] = v);
    } else {
        gather(w, c, 1, |v, _| f32::from_bits(v), |g, t, r, _, v| sum[g + 8 * (r / 2)][2 * t + r % 2] = v);
    }
    let k = usize::from(mma.k);
    if has_avx2() {
        // SAFETY: the machine has the features.
        unsafe { products_fast(&am, &bm, &mut sum, k) }
    } else {
        products(&am, &bm, &mut sum, k);
    }
    for r in 0..sums {
        let out: [u32; 32] = std::array::from_fn(|l| {
            let (g, t) = (l / 4, l % 4);
            if mma.half_sum {
                let half = |e: usize| u32::from(F16::round(f64::from(sum[g + 8 * r][2 * t + e])).0);
                half(0) | half(1) << 16
            } else {
                canonical(sum[g + 8 * (r / 2)][2 * t + r % 2])
            }
        });
        w.set(inst.r[r], exec, &out);
    }
}

#[inline(always)]
fn products(a: &[[f32; K]; 16], b: &[[f32; 8]; K], sum: &mut [[f32; 8]; 16], k: usize) {
    for (row, a) in sum.iter_mut().zip(a) {
        let mut s = *row;
        for (a, b) in a.iter().zip(b).take(k) {
            for n in 0..8 {
                s[n] = a.mul_add(b[n], s[n]);
            }
        }
        *row = s;
    }
}

#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
unsafe fn products_fast(a: &[[f32; K]; 16], b: &[[f32; 8]; K], sum: &mut [[f32; 8]; 16], k: usize) {
    products(a, b, sum, k);
}

fn integers(w: &mut Warp, inst: &Inst, exec: u32, mma: Mma, units: [&[u16]; 3], signed: (bool, bool)) {
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
    let [a, b, c] = units;
    let (mut am, mut bm, mut sum) = ([[0i32; K]; 16], [[0i32; 8]; K], [[0i32; 8]; 16]);
    gather(w, a, 4, byte(signed.0), |g, t, r, e, v| am[g + 8 * (r % 2)][4 * t + e + 16 * (r / 2)] = v);
    gather(w, b, 4, byte(signed.1), |g, t, r, e, v| bm[4 * t + e + 16 * r][g] = v);
    gather(w, c, 1, |v, _| v as i32, |g, t, r, _, v| sum[g + 8 * (r / 2)][2 * t + r % 2] = v);
    let k = usize::from(mma.k);
    for (row, a) in sum.iter_mut().zip(&am) {
        for n in 0..8 {
            // At most 32 products of 16 bits: the dot product itself cannot overflow.
            let dot: i32 = (0..k).map(|i| a[i] * bm[i][n]).sum();
            row[n] = if mma.saturate { row[n].saturating_add(dot) } else { row[n].wrapping_add(dot) };
        }
    }
    for r in 0..4 {
        let out: [u32; 32] = std::array::from_fn(|l| sum[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2] as u32);
        w.set(inst.r[r], exec, &out);
    }
}
