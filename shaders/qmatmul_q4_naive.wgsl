// qmatmul_q4_naive: y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s·S·Bᵀ     contract: src/ops/qmatmul/mod.rs
// grid   ceil(N/64), M     block 64 = 64 outputs of a row
// smem   0 B               features none
// reads  4MK + M(NK/2 + scales) B      writes 4MN B       bound: loads of single elements
// idea   one output an invocation: shaders/qmatmul_naive.wgsl tells it

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, BIAS: u32, R: u32, G: u32, WIDE: u32, s: f32 }

@group(0) @binding(0) var<storage, read> x: array<f32>;                 // [M,K]
@group(0) @binding(4) var<storage, read> bias: array<f32>;              // [BIAS*N]
@group(0) @binding(5) var<storage, read> lora_s: array<f32>;            // [M,R]
@group(0) @binding(6) var<storage, read> lora_b: array<f32>;            // [N,R]
@group(0) @binding(7) var<storage, read_write> y: array<f32>;           // [M,LDY]
@group(0) @binding(8) var<uniform> p: Params;

@compute @workgroup_size(64)
fn qmatmul_q4_naive(@builtin(global_invocation_id) id: vec3<u32>) {
    one_output(id.y, id.x);
}
