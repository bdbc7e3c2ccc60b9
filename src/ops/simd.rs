//! Vector arithmetic shared by the CPU kernels: `exp`, sums, and how much work is worth a second thread.
//!
//! A kernel's body is plain loops over slices and fixed-size arrays, written once and compiled for each instruction
//! set: an `#[inline(always)]` function called from functions with `#[target_feature]`. The constant `FMA` of a body
//! says whether its instruction set has a fused multiply-add, which Rust never forms by itself and which is a slow
//! library call where the processor lacks it.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Whether the build's own target has fused multiply-adds: the `FMA` of portable kernels.
pub const FMA: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// Running sums of one loop: an AVX-512 register of f32, two of AVX2, four of SSE or NEON.
pub const LANES: usize = 16;

/// How many items of this many nanoseconds a thread must get: below 20 µs in all a launch stays on its caller's thread,
/// since waking another costs about as much.
pub fn grain(nanoseconds: f64) -> usize {
    (10_000.0 / nanoseconds) as usize + 1
}

/// a·b + c, rounded once with `FMA`, else twice.
#[inline(always)]
pub fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// e^x within 1.1 ulp, without branches so that loops over it become vectors; results below e^−86.5 ≈ 2.7e-38 are zero,
/// as processors are slow with denormal numbers.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2 (Cody and Waite 1980); e^r = 1 + r + r²·q(r), q the polynomial of degree 4 whose
/// largest relative error in e^r is least (Remez exchange; 3.1e-9 = 0.05 ulp). The last sum rounds by half an ulp, r
/// and r + r²·q by a quarter each, q by little; the worst found over a third of all floats is 1.01.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding it rounds to an integer, which stands in the low bits.
    const TO_INTEGER: f32 = 12_582_912.0; // 1.5 · 2^23
    /// ln 2 to 15 bits, so that its product with |n| ≤ 128 is exact, and the rest.
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    const Q: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_4, 0.008_368_851, 0.001_381_432];
    const LOWEST: f32 = -86.5;
    const HIGHEST: f32 = 89.0;

    // Written so that NaN passes.
    let x_clamped = if x > HIGHEST { HIGHEST } else { x };
    let shifted = mul_add::<FMA>(x_clamped, std::f32::consts::LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    let r = mul_add::<FMA>(n, -LN2_LOW, mul_add::<FMA>(n, -LN2_HIGH, x_clamped));

    let mut q = Q[4];
    for i in (0..4).rev() {
        q = mul_add::<FMA>(q, r, Q[i]);
    }
    let power = 1.0 + mul_add::<FMA>(q, r * r, r);

    // 2^(n−1), then twice: n = 128 has no power of two of its own. The low bits of `shifted` are n.
    let half_scale = f32::from_bits(shifted.to_bits().wrapping_add(126) << 23);
    let y = power * half_scale * 2.0;
    if x < LOWEST {
        0.0
    } else {
        y
    }
}

/// Σ term(x), in [`LANES`] running sums: vectors in a fixed order.
#[inline(always)]
pub fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for l in 0..LANES {
            sums[l] += term(chunk[l]);
        }
    }
    let tail: f32 = tail.iter().map(|v| term(*v)).sum();
    fold(sums, |a, b| a + b) + tail
}

/// Σ a·b of slices of one length, in [`LANES`] running sums. Compilers make poor vectors of it, so AVX2 has its own.
#[inline(always)]
pub fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let ((a_chunks, a_tail), (b_chunks, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for l in 0..LANES {
            sums[l] = mul_add::<FMA>(a[l], b[l], sums[l]);
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    fold(sums, |a, b| a + b) + tail
}

/// [`dot`] with AVX2.
///
/// # Safety
///
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
    let ((a_chunks, a_tail), (b_chunks, b_tail)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = _mm256_setzero_ps();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        // SAFETY: both are eight numbers.
        let (a, b) = unsafe { (_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(b.as_ptr())) };
        sums = _mm256_fmadd_ps(a, b, sums);
    }
    let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
    let sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    let sums = _mm_add_ss(sums, _mm_movehdup_ps(sums));
    a_tail.iter().zip(b_tail).fold(_mm_cvtss_f32(sums), |sum, (a, b)| a.mul_add(*b, sum))
}

/// The largest element, −∞ without any; NaN is passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut largest = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for l in 0..LANES {
            largest[l] = larger(largest[l], chunk[l]);
        }
    }
    tail.iter().fold(fold(largest, larger), |a, b| larger(a, *b))
}

/// Halves a vector until one number is left.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Error of `got` in units in the last place of the f32 nearest to `exact`.
    fn ulps(got: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        (got as f64 - exact).abs() / (nearest.next_up() - nearest) as f64
    }

    #[test]
    fn exp_is_within_its_bound() {
        let mut worst: f64 = 0.0;
        for sign in [1.0f32, -1.0] {
            // Every 997th float from 0 up.
            for x in (0..).step_by(997).map(|bits| sign * f32::from_bits(bits)) {
                if !(-86.5..=88.72).contains(&x) {
                    break;
                }
                let exact = (x as f64).exp();
                worst = worst.max(ulps(exp::<false>(x), exact)).max(ulps(exp::<true>(x), exact));
            }
        }
        assert!(worst <= 1.1, "{worst} ulp");
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp::<FMA>(0.0), 1.0);
        for x in [f32::NEG_INFINITY, f32::MIN, -1e6, -104.0, -86.6] {
            assert_eq!(exp::<FMA>(x), 0.0, "exp({x})");
        }
        for x in [88.73, 89.0, 1e6, f32::MAX, f32::INFINITY] {
            assert_eq!(exp::<FMA>(x), f32::INFINITY, "exp({x})");
        }
        assert!(exp::<FMA>(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_element_once() {
        for n in [0, 1, 7, 15, 16, 17, 65] {
            // Whole numbers: every sum is exact.
            let x: Vec<f32> = (1..=n).map(|v| v as f32).collect();
            let y: Vec<f32> = x.iter().map(|v| 2.0 * v - 9.0).collect();
            let product: f32 = (1..=n).map(|v| (v * (2 * v - 9)) as f32).sum();
            assert_eq!(sum(&x, |v| 2.0 * v), (n * (n + 1)) as f32);
            assert_eq!((dot::<false>(&x, &y), dot::<true>(&x, &y)), (product, product));
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: just detected.
                assert_eq!(unsafe { dot_avx2(&x, &y) }, product);
            }
            for i in 0..x.len() {
                let mut x = x.clone();
                x[i] = 1e9;
                assert_eq!(max(&x), 1e9);
            }
        }
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
