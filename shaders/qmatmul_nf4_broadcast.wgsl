// qmatmul_nf4_broadcast: y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s·S·Bᵀ     contract: src/ops/qmatmul/mod.rs
// grid   ceil(N/64), ceil(M/16)     block 16 = four columns an invocation, 16 rows; subgroups of 8 or more
// smem   0 B               features subgroups
// reads  N/64 · 4MK + M/16 · (NK/2 + NK/16) B      writes 4MN B       bound: arithmetic
// idea   for processors that play a graphics card: shaders/qmatmul_broadcast.wgsl tells it

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, BIAS: u32, R: u32, s: f32 }

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;           // [M,K]
@group(0) @binding(3) var<storage, read> bias: array<f32>;              // [BIAS*N]
@group(0) @binding(4) var<storage, read> lora_s: array<f32>;            // [M,R]
@group(0) @binding(5) var<storage, read> lora_b: array<f32>;            // [N,R]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;           // [M,LDY]
@group(0) @binding(7) var<uniform> p: Params;

@compute @workgroup_size(16)
fn qmatmul_nf4_broadcast(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) id: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    broadcast_tile(group.x * 64u + id, group.y * 16u, lane % 8u);
}
