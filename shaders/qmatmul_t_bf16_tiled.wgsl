// qmatmul_t_bf16_tiled: dx[M,K] = dy[M,N] · deq(W[N,K]) + dS[M,R] · A (+ dx)     contract: src/ops/qmatmul_t/mod.rs
// grid   ceil(K/64), ceil(M/64)     block 64 = 8 x 8, an invocation 8 x 8 elements
// smem   8192 B            features none
// reads  K/64 · 4MN + M/64 · (2NK) B      writes 4MK B       bound: arithmetic
// idea   tiles of dy and of decoded W in workgroup memory: shaders/qmatmul_t_tiled.wgsl tells it

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, R: u32, ACC: u32 }

@group(0) @binding(0) var<storage, read> dy: array<f32>;                // [M,LDY]
@group(0) @binding(2) var<storage, read> ds: array<f32>;                // [M,R]
@group(0) @binding(3) var<storage, read> lora_a: array<f32>;            // [R,K]
@group(0) @binding(4) var<storage, read_write> dx: array<f32>;          // [M,K]
@group(0) @binding(5) var<uniform> p: Params;

@compute @workgroup_size(64)
fn qmatmul_t_bf16_tiled(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) id: u32) {
    tile(group.y * 64u, group.x * 64u, id);
}
