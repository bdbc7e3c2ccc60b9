// qmatmul_nf4dq_subgroup: y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s·S·Bᵀ     contract: src/ops/qmatmul/mod.rs
// grid   ceil(N/16)        block 64 = subgroups of any size, each four rows of W at a time
// smem   0 B               features subgroups
// reads  4MK + NK/2 + NK/64 B      writes 4MN B       bound: memory, while M is small
// idea   shaders/qmatmul_gemv.wgsl tells it; subgroupAdd adds what a subgroup has summed

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, BIAS: u32, R: u32, s: f32 }

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;           // [M,K]
@group(0) @binding(6) var<storage, read> bias: array<f32>;              // [BIAS*N]
@group(0) @binding(7) var<storage, read> lora_s: array<f32>;            // [M,R]
@group(0) @binding(8) var<storage, read> lora_b: array<f32>;            // [N,R]
@group(0) @binding(9) var<storage, read_write> y: array<f32>;           // [M,LDY]
@group(0) @binding(10) var<uniform> p: Params;

@compute @workgroup_size(64)
fn qmatmul_nf4dq_subgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(subgroup_id)            subgroup: u32,
    @builtin(num_subgroups)          subgroups: u32,
    @builtin(subgroup_size)          size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    columns_by_subgroups(group.x * 16u, subgroup, subgroups, size, lane);
}
