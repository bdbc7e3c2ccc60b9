// exact: functions whose errors WGSL leaves wide, to about one unit in the last place     appended to kernels
//
// WGSL allows exp 3 + 2|x| ulp, a quotient 2.5, a root 2 and more, log 2^−21 near 1. Infinities and NaN are not made on
// the way, since a compiler may take it that there are none.

/// e^x within 1.1 ulp; 0 below e^−86.5, as processors are slow with denormal numbers or flush them; x at most 88.7,
/// whose result is near the largest number.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2 (Cody and Waite 1980); e^r = 1 + r + r²·q(r), the same q as src/ops/simd.rs.
fn exact_exp(x: f32) -> f32 {
    let bounded = clamp(x, -87.0, 88.7);
    let n = round(bounded * 1.442695);
    // ln 2 to 15 bits, so that its product with n is exact, and the rest.
    let r = fma(n, -1.4286068e-6, fma(n, -0.69314575, bounded));
    var q = fma(0.001381432, r, 0.008368851);
    q = fma(q, r, 0.0416684);
    q = fma(q, r, 0.1666652);
    q = fma(q, r, 0.49999994);
    let power = 1.0 + fma(q, r * r, r);
    // 2^(n−1), then twice: n = 128 has no power of two of its own.
    let scale = bitcast<f32>(u32(i32(n) + 126) << 23u);
    return select(power * scale * 2.0, 0.0, x < -86.5);
}

/// a / b: the residual of the built-in quotient corrects it.
fn exact_divide(a: f32, b: f32) -> f32 {
    let q = a / b;
    return q + fma(-q, b, a) / b;
}

/// 1 / √v for v > 0: one step of Newton's on the built-in one.
fn exact_rsqrt(v: f32) -> f32 {
    let s = inverseSqrt(v);
    return fma(s, fma(-0.5 * v * s, s, 0.5), s);
}

/// √v for v ≥ 0; below 1e-37 less than that.
fn exact_sqrt(v: f32) -> f32 {
    return v * exact_rsqrt(max(v, 1e-37));
}

/// ln v for v ≥ 1: one step of Newton's on the built-in one, the root of e^y − v.
fn exact_ln(v: f32) -> f32 {
    let y = log(v);
    return y + fma(v, exact_exp(-y), -1.0);
}
