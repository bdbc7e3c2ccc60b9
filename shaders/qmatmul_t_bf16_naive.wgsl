// qmatmul_t_bf16_naive: dx[M,K] = dy[M,N] · deq(W[N,K]) + dS[M,R] · A (+ dx)     contract: src/ops/qmatmul_t/mod.rs
// grid   ceil(K/64), M     block 64 = 64 elements of a row
// smem   0 B               features none
// reads  4MN + M(2NK) B      writes 4MK B       bound: loads of single elements
// idea   one element of dx an invocation, as the formula says: shaders/qmatmul_t_naive.wgsl

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, R: u32, ACC: u32 }

@group(0) @binding(0) var<storage, read> dy: array<f32>;                // [M,LDY]
@group(0) @binding(2) var<storage, read> ds: array<f32>;                // [M,R]
@group(0) @binding(3) var<storage, read> lora_a: array<f32>;            // [R,K]
@group(0) @binding(4) var<storage, read_write> dx: array<f32>;          // [M,K]
@group(0) @binding(5) var<uniform> p: Params;

@compute @workgroup_size(64)
fn qmatmul_t_bf16_naive(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < p.K {
        element(id.y, id.x);
    }
}
