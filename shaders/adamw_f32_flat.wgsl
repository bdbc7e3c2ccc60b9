// adamw_f32_flat: m, v and p of a step of AdamW, the gradient clipped by its norm     contract: src/ops/adamw.rs
// grid   min(ceil(N/4096), 65535)     block 256
// smem   0 B              features none
// reads  16N B (the parts of the norm from cache)      writes 12N B       bound: memory
// idea   every invocation adds up the parts, in order, then takes 16 elements a grid apart: no launch for the norm

struct Params {
    N: u32, P: u32, lr: f32, rate1: f32, rate2: f32, eps: f32, decay: f32, bias1: f32, bias2: f32, max_norm: f32,
}

@group(0) @binding(0) var<storage, read>       g: array<f32>;       // [N]
@group(0) @binding(1) var<storage, read>       part: array<f32>;    // [P]
@group(0) @binding(2) var<storage, read_write> p: array<f32>;       // [N]
@group(0) @binding(3) var<storage, read_write> m: array<f32>;       // [N]
@group(0) @binding(4) var<storage, read_write> v: array<f32>;       // [N]
@group(0) @binding(5) var<uniform>             params: Params;

@compute @workgroup_size(256)
fn adamw_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    // clip = min(1, max_norm / (√Σ part + 1e-6)), 1 where there are no parts
    var clip = 1.0;
    if params.P > 0u {
        var squares = 0.0;
        for (var i = 0u; i < params.P; i++) {
            squares += part[i];
        }
        clip = min(exact_divide(params.max_norm, exact_sqrt(squares) + 1e-6), 1.0);
    }

    let keep = fma(-params.lr, params.decay, 1.0);
    let rate = exact_divide(params.lr, params.bias1);
    for (var i = id.x; i < params.N; i += groups.x * 256u) {
        let gradient = clip * g[i];
        let mean = fma(1.0 - params.rate1, m[i], params.rate1 * gradient);
        let square = fma(1.0 - params.rate2, v[i], params.rate2 * gradient * gradient);
        let root = exact_sqrt(exact_divide(square, params.bias2));
        m[i] = mean;
        v[i] = square;
        p[i] = fma(keep, p[i], -exact_divide(rate * mean, root + params.eps));
    }
}
