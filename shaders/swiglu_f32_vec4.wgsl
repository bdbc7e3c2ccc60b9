// swiglu_f32_vec4: y[M,F] = gate[M,F] / (1 + exp(−gate)) · up[M,F]     contract: src/ops/swiglu.rs
// grid   min(ceil(M*F/1024), 65535)     block 256
// smem   0 B              features none
// reads  8MF B            writes 4MF B       bound: memory
// idea   four elements an invocation, where M·F is a multiple of four

struct Params { M: u32, F: u32 }

@group(0) @binding(0) var<storage, read>       gate: array<vec4<f32>>;      // [M,F]
@group(0) @binding(1) var<storage, read>       up: array<vec4<f32>>;        // [M,F]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;         // [M,F]
@group(0) @binding(3) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn swiglu_f32_vec4(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.F / 4u; i += groups.x * 256u) {
        let g = gate[i];
        // A quarter of both, as divisors above 2^126 may make 0; below −88.7 the result is under 3e-37 |up|.
        let quotient = exact_divide4(0.25 * g, fma(vec4(0.25), exact_exp4(-g), vec4(0.25)));
        y[i] = select(quotient, vec4<f32>(), g < vec4(-88.7)) * up[i];
    }
}
