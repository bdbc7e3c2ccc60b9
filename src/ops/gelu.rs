//! `gelu`: y = x · Φ(x), Φ the normal distribution, in its exact form         Hendrycks & Gimpel 2016, arXiv 1606.08415

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;
use std::f64::consts::{FRAC_2_SQRT_PI, SQRT_2};

/// Gaussian error linear unit, with erf rather than its tanh approximation.
pub static GELU: OpSpec = OpSpec {
    name: "gelu",
    format: "f32",
    formula: "y[M,F] = 0.5 · x · (1 + erf(x / √2))",
    dims: &["M", "F"],
    scalars: &[],
    args: &[input("x", ArgType::Act, &["M", "F"], Fill::Uniform(-7.0, 7.0)), output("y", ArgType::Act, &["M", "F"])],
    oracle,
    // An erf counts as one operation.
    cost: |d| Cost { flops: (5 * d["M"] * d["F"]) as u64, bytes: (8 * d["M"] * d["F"]) as u64 },
    tolerance: Tolerance {
        roundings: |_| 6.0,
        nmse: 1e-12,
        why:
            "relative to 0.5 |x| (1 + |erf|): x / √2 is off by 2 u, of which erf's slope leaves at most 1; erf errs by \
              1.5 ulp, 1.5 u of 1; the sum and the product round once each",
    },
    cases: &[
        case(&[1, 1], "the smallest"),
        case(&[1, 8], "whole vectors and nothing else"),
        case(&[3, 6], "two elements past whole vectors"),
        case(&[7, 33], "both odd: tails of a warp and of a vec4"),
        case(&[65, 257], "more than one chunk, the last one short"),
        case(&[128, 1536], "MiniLM"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    Kernel {
        stem: "gelu_f32_chunks",
        source: Source::Rust(|d, args| in_chunks(d, args, gelu::<{ simd::FMA }>)),
        act: Dtype::F32,
        launch: no_grid,
        supports: always,
    },
    #[cfg(target_arch = "x86_64")]
    Kernel {
        stem: "gelu_f32_chunks_avx2",
        source: Source::Rust(|d, args| in_chunks(d, args, gelu_avx2)),
        act: Dtype::F32,
        launch: no_grid,
        supports: |_, caps| caps.simd >= Simd::Avx2,
    },
];

const PTX: &[Kernel] = &[ptx!("gelu_f32_vec4", four_elements_a_thread, always)];

/// A block of 256 threads takes 1024 elements.
fn four_elements_a_thread(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["F"]).div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[
    wgsl!("gelu_f32_flat" + "exact", |d| flat(d["M"] * d["F"]), always),
    wgsl!("gelu_f32_vec4" + "exact4", |d| flat((d["M"] * d["F"]).div_ceil(4)), |d, _| (d["M"] * d["F"])
        .is_multiple_of(4)),
];

/// The definition; 1 + erf as erfc(−x / √2), which keeps its digits where erf nears −1.
fn oracle(_: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let x = args[0].to_f64();
    let value = x.iter().map(|x| 0.5 * x * erfc_f64(-x / SQRT_2)).collect();
    let magnitude = x.iter().map(|x| 0.5 * x.abs() * (1.0 + erf_f64(x / SQRT_2).abs())).collect();
    vec![Expected { value, magnitude }]
}

/// erf to about 1e-15: Σ 2^n x^(2n+1) / (1·3·..·(2n+1)) · 2/√π · e^(−x²), whose terms all have one sign
/// (Abramowitz & Stegun 7.1.6), and 1 − erfc where the series grows long.
fn erf_f64(x: f64) -> f64 {
    if x.abs() > 2.5 {
        return x.signum() * (1.0 - erfc_f64(x.abs()));
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        term *= 2.0 * x * x / (2 * n + 1) as f64;
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// erfc = 1 − erf, in its tail the continued fraction e^(−x²)/√π · 1/(x + (1/2)/(x + 1/(x + (3/2)/(x + ..))))
/// (Abramowitz & Stegun 7.1.14) from its sixtieth level up.
fn erfc_f64(x: f64) -> f64 {
    if x < 2.5 {
        return if x < -2.5 { 2.0 - erfc_f64(-x) } else { 1.0 - erf_f64(x) };
    }
    let fraction = (1..=60).rev().fold(x, |below, n| x + 0.5 * n as f64 / below);
    0.5 * FRAC_2_SQRT_PI * (-x * x).exp() / fraction
}

/// CPU: runs of elements in parallel.
fn in_chunks(_: &Dims, args: &mut [Slice<'_>], body: fn(&[f32], &mut [f32])) {
    const CHUNK: usize = 2048;
    let [x, y] = args else { unreachable!("two arguments") };
    let grain = simd::grain(CHUNK as f64);
    let work = y.f32_mut().par_chunks_mut(CHUNK).zip(x.f32().par_chunks(CHUNK)).with_min_len(grain);
    work.for_each(|(y, x)| body(x, y));
}

/// One run.
#[inline(always)]
fn gelu<const FMA: bool>(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = 0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
    }
}

/// One run with AVX2. AVX-512 would take two thirds of the time, of a part that takes little.
#[cfg(target_arch = "x86_64")]
fn gelu_avx2(x: &[f32], y: &mut [f32]) {
    #[target_feature(enable = "avx2,fma")]
    fn body(x: &[f32], y: &mut [f32]) {
        gelu::<true>(x, y);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(x, y) }
}

/// erf within 1.5 ulp, without branches: x + x·p(x²) for |x| < 1, ±(1 − e^(−q(|x|))) beyond, q for −ln erfc. Both
/// polynomials have the least largest error relative to erf on [0,1] and [1,4] (Remez exchange; 1.2e-9 and 1.1e-9).
#[inline(always)]
fn erf<const FMA: bool>(x: f32) -> f32 {
    const P: [f32; 7] =
        [0.128_379_17, -0.376_126_26, 0.112_835_854, -0.026_853_813, 0.005_188_327_7, -0.000_801_019_37, 7.853_861e-5];
    const Q: [f32; 7] =
        [0.000_341_526, 1.127_089_1, 0.638_144_85, 0.103_106_74, -0.021_838_056, 0.002_947_656_4, -0.000_186_379];

    let size = x.abs();
    let square = x * x;
    let mut p = P[6];
    for i in (0..6).rev() {
        p = simd::mul_add::<FMA>(p, square, P[i]);
    }
    let near = simd::mul_add::<FMA>(x, p, x);

    // erf(4) rounds to 1, and beyond 4 the polynomial is no guide. Written so that NaN passes.
    let t = if size > 4.0 { 4.0 } else { size };
    let mut q = Q[6];
    for i in (0..6).rev() {
        q = simd::mul_add::<FMA>(q, t, Q[i]);
    }
    let far = (1.0 - simd::exp::<FMA>(-q)).copysign(x);
    if size < 1.0 {
        near
    } else {
        far
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_f64_has_the_tables_values() {
        // Abramowitz & Stegun, table 7.1; erfc to 40 digits by mpmath, rounded.
        for (x, erf) in [(0.0, 0.0), (0.5, 0.520_499_877_813_046_5), (1.0, 0.842_700_792_949_714_9)] {
            assert!((erf_f64(x) - erf).abs() < 1e-15, "erf({x}) = {}", erf_f64(x));
            assert_eq!(erf_f64(-x), -erf_f64(x));
        }
        assert!((erf_f64(2.0) - 0.995_322_265_018_952_7).abs() < 1e-15);
        for (x, erfc) in [(3.0, 2.209_049_699_858_544e-5), (5.0, 1.537_459_794_428_035e-12)] {
            assert!((erfc_f64(x) / erfc - 1.0).abs() < 1e-14, "erfc({x}) = {:e}", erfc_f64(x));
        }
    }

    #[test]
    fn erf_f64_is_smooth_where_its_methods_meet() {
        let (below, above) = (erfc_f64(2.5f64.next_down()), erfc_f64(2.5));
        assert!((below / above - 1.0).abs() < 1e-11, "{below:e} {above:e}");
    }

    #[test]
    fn erf_is_within_its_bound() {
        let mut worst: f64 = 0.0;
        for x in (0..).step_by(4999).map(f32::from_bits).take_while(|x| *x < 6.0) {
            let exact = erf_f64(x as f64);
            let nearest = exact as f32;
            let ulp = (nearest.next_up() - nearest) as f64;
            for got in [erf::<false>(x), erf::<true>(x), -erf::<{ simd::FMA }>(-x)] {
                worst = worst.max((got as f64 - exact).abs() / ulp);
            }
        }
        assert!(worst <= 1.5, "{worst} ulp");
        assert_eq!(erf::<{ simd::FMA }>(f32::INFINITY), 1.0);
        assert!(erf::<{ simd::FMA }>(f32::NAN).is_nan());
    }
}
