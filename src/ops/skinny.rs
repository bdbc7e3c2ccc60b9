//! Products with a matrix of few rows, such as an adapter's: the loops that `lora_shrink` and `lora_backward` share.
//! What is long is read once, for eight of the few at a time.

use super::team;
use super::vector::{Vector, LANES};

/// Multiply-adds below which one thread does them all: what they read comes from memory as a rule.
const SERIAL: usize = 1 << 15;

/// Rows of a matrix that threads write, each its own.
pub struct Rows<T = f32>(pub *mut T);

// SAFETY: whoever writes through it says why no other thread touches the place.
unsafe impl<T: Send> Sync for Rows<T> {}

impl<T> Rows<T> {
    /// Where element `i` lies.
    pub fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

/// Calls `body` for each of `m` rows, on several threads where rows of `work` multiply-adds are worth it.
pub fn in_parts(m: usize, work: usize, body: &(dyn Fn(usize) + Sync)) {
    if m < 2 || m * work < SERIAL {
        return (0..m).for_each(body);
    }
    let per_part = m.div_ceil(16 * rayon::current_num_threads());
    team::run(m.div_ceil(per_part), &|part| (part * per_part..m.min((part + 1) * per_part)).for_each(body));
}

/// out[r] = Σ_k x[k] · a[r,k], K = `x.len()`, R = `out.len()`.
#[inline(always)]
pub fn dots<V: Vector>(x: &[f32], a: &[f32], out: &mut [f32]) {
    let k = x.len();
    assert_eq!(a.len(), out.len() * k);
    let (eights, ones) = out.as_chunks_mut::<8>();
    for (r, out) in eights.iter_mut().enumerate() {
        *out = dots_of::<V, 8>(x, &a[r * 8 * k..]);
    }
    let first = eights.len() * 8;
    for (r, out) in ones.iter_mut().enumerate() {
        [*out] = dots_of::<V, 1>(x, &a[(first + r) * k..]);
    }
}

/// [`dots`] of the first T rows of `a`.
#[inline(always)]
fn dots_of<V: Vector, const T: usize>(x: &[f32], a: &[f32]) -> [f32; T] {
    let k = x.len();
    let rows: [&[f32]; T] = std::array::from_fn(|t| &a[t * k..(t + 1) * k]);
    let mut sums = [V::splat(0.0); T];
    let vectors = k / LANES * LANES;
    for i in (0..vectors).step_by(LANES) {
        let x = V::load(&x[i..]);
        for t in 0..T {
            sums[t] = x.mul_add(V::load(&rows[t][i..]), sums[t]);
        }
    }
    std::array::from_fn(|t| {
        let tail: f32 = x[vectors..].iter().zip(&rows[t][vectors..]).map(|(x, a)| x * a).sum();
        sums[t].sum() + tail
    })
}

/// Rows of x that are near when their sums are.
const NEAR: usize = 16;

/// out[r,k] += Σ_m s[m,r] · x[m,k], m in order; R = `r`, K = `out.len() / r`, a row of x every `ldx`.
#[inline(always)]
pub fn add_outer<V: Vector>(x: &[f32], ldx: usize, s: &[f32], r: usize, out: &mut [f32]) {
    let k = out.len() / r;
    for (block, s) in s.chunks(NEAR * r).enumerate() {
        let x = &x[block * NEAR * ldx..];
        let (mut first, mut rest) = (0, &mut out[..]);
        while first < r {
            let taken = if r - first >= 8 { 8 } else { 1 };
            let (out, after) = rest.split_at_mut(taken * k);
            match taken {
                8 => add_outer_of::<V, 8>(x, ldx, s, r, first, out),
                _ => add_outer_of::<V, 1>(x, ldx, s, r, first, out),
            }
            (first, rest) = (first + taken, after);
        }
    }
}

/// [`add_outer`] for columns `first..first + T` of s.
#[inline(always)]
fn add_outer_of<V: Vector, const T: usize>(x: &[f32], ldx: usize, s: &[f32], r: usize, first: usize, out: &mut [f32]) {
    let k = out.len() / T;
    let vectors = k / LANES * LANES;
    for i in (0..vectors).step_by(LANES) {
        let mut sums: [V; T] = std::array::from_fn(|t| V::load(&out[t * k + i..]));
        for (m, s) in s.chunks_exact(r).enumerate() {
            let (x, s): (V, &[f32; T]) = (V::load(&x[m * ldx + i..]), s[first..].first_chunk().expect("T of R"));
            for t in 0..T {
                sums[t] = x.mul_add(V::splat(s[t]), sums[t]);
            }
        }
        for (t, sum) in sums.into_iter().enumerate() {
            sum.store(&mut out[t * k + i..]);
        }
    }
    for (m, s) in s.chunks_exact(r).enumerate() {
        for t in 0..T {
            for i in vectors..k {
                out[t * k + i] += s[first + t] * x[m * ldx + i];
            }
        }
    }
}
