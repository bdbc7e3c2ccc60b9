// add_f32_flat: y[M,K] = a[M,K] + b[M,K]     contract: src/ops/add.rs
// grid   min(ceil(M*K/256), 65535)     block 256
// smem   0 B              features none
// reads  8MK B            writes 4MK B       bound: memory
// idea   the matrix is one run of elements: neighbours read neighbours; a grid too short for it strides on

struct Params { M: u32, K: u32 }

@group(0) @binding(0) var<storage, read>       a: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read>       b: array<f32>;       // [M,K]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;       // [M,K]
@group(0) @binding(3) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn add_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.K; i += groups.x * 256u) {
        y[i] = a[i] + b[i];
    }
}
