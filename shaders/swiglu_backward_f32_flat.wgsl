// swiglu_backward_f32_flat: dgate = dy·up·σ·(1 + gate·(1 − σ)), dup = dy·gate·σ    contract: src/ops/swiglu_backward.rs
// grid   min(ceil(M*F/256), 65535)     block 256
// smem   0 B              features none
// reads  12MF B           writes 8MF B       bound: memory
// idea   σ = 1/(1 + exp(−gate)) once for both gradients; a grid too short for the matrix strides on

struct Params { M: u32, F: u32 }

@group(0) @binding(0) var<storage, read>       gate: array<f32>;    // [M,F]
@group(0) @binding(1) var<storage, read>       up: array<f32>;      // [M,F]
@group(0) @binding(2) var<storage, read>       dy: array<f32>;      // [M,F]
@group(0) @binding(3) var<storage, read_write> dgate: array<f32>;   // [M,F]
@group(0) @binding(4) var<storage, read_write> dup: array<f32>;     // [M,F]
@group(0) @binding(5) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn swiglu_backward_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.F; i += groups.x * 256u) {
        let g = gate[i];
        // A quarter of both, as divisors above 2^126 may make 0; below −88.7 the results are under 3e-37 of dy.
        let quotient = exact_divide(0.25, fma(0.25, exact_exp(-g), 0.25));
        let sigma = select(quotient, 0.0, g < -88.7);
        let scaled = dy[i] * sigma;
        dgate[i] = scaled * up[i] * fma(g, 1.0 - sigma, 1.0);
        dup[i] = scaled * g;
    }
}
