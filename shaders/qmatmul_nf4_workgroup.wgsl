// qmatmul_nf4_workgroup: y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s·S·Bᵀ     contract: src/ops/qmatmul/mod.rs
// grid   ceil(N/16)        block 64 = 4 teams of 16, a team four rows of W
// smem   1024 B            features none
// reads  4MK + NK/2 + NK/16 B      writes 4MN B       bound: memory, while M is small
// idea   shaders/qmatmul_gemv.wgsl tells it; a tree in workgroup memory adds what a team has summed

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, BIAS: u32, R: u32, s: f32 }

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;           // [M,K]
@group(0) @binding(3) var<storage, read> bias: array<f32>;              // [BIAS*N]
@group(0) @binding(4) var<storage, read> lora_s: array<f32>;            // [M,R]
@group(0) @binding(5) var<storage, read> lora_b: array<f32>;            // [N,R]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;           // [M,LDY]
@group(0) @binding(7) var<uniform> p: Params;

@compute @workgroup_size(64)
fn qmatmul_nf4_workgroup(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) id: u32) {
    columns_by_tree(group.x * 16u, id);
}
