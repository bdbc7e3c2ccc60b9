// gelu_f32_flat: y[M,F] = 0.5 · x · (1 + erf(x / √2))     contract: src/ops/gelu.rs
// grid   min(ceil(M*F/256), 65535)     block 256
// smem   0 B              features none
// reads  4MF B            writes 4MF B       bound: memory
// idea   erf within 1.5 ulp by two polynomials, those of src/ops/gelu.rs: x + x·p(x²) near 0, 1 − e^(−q(|x|)) far off

struct Params { M: u32, F: u32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,F]
@group(0) @binding(1) var<storage, read_write> y: array<f32>;       // [M,F]
@group(0) @binding(2) var<uniform>             p: Params;

fn erf(x: f32) -> f32 {
    let square = x * x;
    var near = fma(7.853861e-5, square, -0.00080101937);
    near = fma(near, square, 0.0051883277);
    near = fma(near, square, -0.026853813);
    near = fma(near, square, 0.112835854);
    near = fma(near, square, -0.37612626);
    near = fma(near, square, 0.12837917);
    near = fma(x, near, x);

    // erf(4) rounds to 1, and beyond 4 the polynomial is no guide.
    let t = min(abs(x), 4.0);
    var q = fma(-0.000186379, t, 0.0029476564);
    q = fma(q, t, -0.021838056);
    q = fma(q, t, 0.10310674);
    q = fma(q, t, 0.63814485);
    q = fma(q, t, 1.1270891);
    q = fma(q, t, 0.000341526);
    let far = 1.0 - exact_exp(-q);
    return select(select(far, -far, x < 0.0), near, abs(x) < 1.0);
}

@compute @workgroup_size(256)
fn gelu_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.F; i += groups.x * 256u) {
        y[i] = 0.5 * x[i] * (1.0 + erf(x[i] * 0.70710678));
    }
}
