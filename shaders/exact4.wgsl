// exact4: the functions of exact.wgsl for four numbers at once     appended to kernels

/// e^x within 1.1 ulp; 0 below e^−86.5; x at most 88.7.
fn exact_exp4(x: vec4<f32>) -> vec4<f32> {
    let bounded = clamp(x, vec4(-87.0), vec4(88.7));
    let n = round(bounded * 1.442695);
    let r = fma(n, vec4(-1.4286068e-6), fma(n, vec4(-0.69314575), bounded));
    var q = fma(vec4(0.001381432), r, vec4(0.008368851));
    q = fma(q, r, vec4(0.0416684));
    q = fma(q, r, vec4(0.1666652));
    q = fma(q, r, vec4(0.49999994));
    let power = 1.0 + fma(q, r * r, r);
    let scale = bitcast<vec4<f32>>(vec4<u32>(vec4<i32>(n) + 126) << vec4(23u));
    return select(power * scale * 2.0, vec4<f32>(), x < vec4(-86.5));
}

/// a / b: the residual of the built-in quotient corrects it.
fn exact_divide4(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let q = a / b;
    return q + fma(-q, b, a) / b;
}
