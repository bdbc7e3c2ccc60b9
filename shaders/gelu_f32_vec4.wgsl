// gelu_f32_vec4: y[M,F] = 0.5 · x · (1 + erf(x / √2))     contract: src/ops/gelu.rs
// grid   min(ceil(M*F/1024), 65535)     block 256
// smem   0 B              features none
// reads  4MF B            writes 4MF B       bound: memory
// idea   four elements an invocation, where M·F is a multiple of four; erf as in gelu_f32_flat

struct Params { M: u32, F: u32 }

@group(0) @binding(0) var<storage, read>       x: array<vec4<f32>>; // [M,F]
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>; // [M,F]
@group(0) @binding(2) var<uniform>             p: Params;

fn erf(x: vec4<f32>) -> vec4<f32> {
    let square = x * x;
    var near = fma(vec4(7.853861e-5), square, vec4(-0.00080101937));
    near = fma(near, square, vec4(0.0051883277));
    near = fma(near, square, vec4(-0.026853813));
    near = fma(near, square, vec4(0.112835854));
    near = fma(near, square, vec4(-0.37612626));
    near = fma(near, square, vec4(0.12837917));
    near = fma(x, near, x);

    // erf(4) rounds to 1, and beyond 4 the polynomial is no guide.
    let t = min(abs(x), vec4(4.0));
    var q = fma(vec4(-0.000186379), t, vec4(0.0029476564));
    q = fma(q, t, vec4(-0.021838056));
    q = fma(q, t, vec4(0.10310674));
    q = fma(q, t, vec4(0.63814485));
    q = fma(q, t, vec4(1.1270891));
    q = fma(q, t, vec4(0.000341526));
    let far = 1.0 - exact_exp4(-q);
    return select(select(far, -far, x < vec4<f32>()), near, abs(x) < vec4(1.0));
}

@compute @workgroup_size(256)
fn gelu_f32_vec4(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.F / 4u; i += groups.x * 256u) {
        y[i] = 0.5 * x[i] * (1.0 + erf(x[i] * 0.70710678));
    }
}
