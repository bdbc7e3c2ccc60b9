// qmatmul_t_q4_broadcast: dx[M,K] = dy[M,N] · deq(W[N,K]) + dS[M,R] · A (+ dx)   contract: src/ops/qmatmul_t/mod.rs
// grid   ceil(K/32), ceil(M/16)     block 8 = four columns an invocation, 16 rows; subgroups of 8 or more
// smem   0 B               features subgroups
// reads  K/32 · 4MN + M/16 · (NK/2 + scales) B      writes 4MK B       bound: arithmetic
// idea   for processors that play a graphics card: shaders/qmatmul_t_broadcast.wgsl tells it

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, R: u32, ACC: u32, G: u32, WIDE: u32 }

@group(0) @binding(0) var<storage, read> dy: array<vec4<f32>>;          // [M,LDY]
@group(0) @binding(4) var<storage, read> ds: array<f32>;                // [M,R]
@group(0) @binding(5) var<storage, read> lora_a: array<vec4<f32>>;      // [R,K]
@group(0) @binding(6) var<storage, read_write> dx: array<vec4<f32>>;    // [M,K]
@group(0) @binding(7) var<uniform> p: Params;

@compute @workgroup_size(8)
fn qmatmul_t_q4_broadcast(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    broadcast_tile(group.x * 32u, group.y * 16u, lane);
}
