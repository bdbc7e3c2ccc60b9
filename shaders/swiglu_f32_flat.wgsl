// swiglu_f32_flat: y[M,F] = gate[M,F] / (1 + exp(−gate)) · up[M,F]     contract: src/ops/swiglu.rs
// grid   min(ceil(M*F/256), 65535)     block 256
// smem   0 B              features none
// reads  8MF B            writes 4MF B       bound: memory
// idea   the matrix is one run of elements: neighbours read neighbours; a grid too short for it strides on

struct Params { M: u32, F: u32 }

@group(0) @binding(0) var<storage, read>       gate: array<f32>;    // [M,F]
@group(0) @binding(1) var<storage, read>       up: array<f32>;      // [M,F]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;       // [M,F]
@group(0) @binding(3) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn swiglu_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.F; i += groups.x * 256u) {
        let g = gate[i];
        // A quarter of both, as divisors above 2^126 may make 0; below −88.7 the result is under 3e-37 |up|.
        let quotient = exact_divide(0.25 * g, fma(0.25, exact_exp(-g), 0.25));
        y[i] = select(quotient, 0.0, g < -88.7) * up[i];
    }
}
