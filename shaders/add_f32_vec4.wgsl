// add_f32_vec4: y[M,K] = a[M,K] + b[M,K]     contract: src/ops/add.rs
// grid   min(ceil(M*K/1024), 65535)     block 256
// smem   0 B              features none
// reads  8MK B            writes 4MK B       bound: memory
// idea   four elements an invocation, where M·K is a multiple of four

struct Params { M: u32, K: u32 }

@group(0) @binding(0) var<storage, read>       a: array<vec4<f32>>; // [M,K]
@group(0) @binding(1) var<storage, read>       b: array<vec4<f32>>; // [M,K]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [M,K]
@group(0) @binding(3) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn add_f32_vec4(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.K / 4u; i += groups.x * 256u) {
        y[i] = a[i] + b[i];
    }
}
