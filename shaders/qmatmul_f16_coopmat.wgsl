// qmatmul_f16_coopmat: y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s·S·Bᵀ     contract: src/ops/qmatmul/mod.rs
// grid   ceil(N/64), ceil(M/64)     block 128 = 4 subgroups of 32, each 32 x 32 outputs
// smem   10240 B           features cooperative matrix, f16, subgroups
// reads  N/64 · 2MK + M/64 · (2NK) B      writes 4MN B       bound: arithmetic
// idea   tensor cores, x in f16: shaders/qmatmul_coopmat.wgsl tells it; validated, not run: no adapter was at hand

enable f16;
enable wgpu_cooperative_matrix;

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, BIAS: u32, R: u32, s: f32 }

@group(0) @binding(0) var<storage, read> x: array<f16>;                 // [M,K]
@group(0) @binding(2) var<storage, read> bias: array<f32>;              // [BIAS*N]
@group(0) @binding(3) var<storage, read> lora_s: array<f32>;            // [M,R]
@group(0) @binding(4) var<storage, read> lora_b: array<f32>;            // [N,R]
@group(0) @binding(5) var<storage, read_write> y: array<f32>;           // [M,LDY]
@group(0) @binding(6) var<uniform> p: Params;

@compute @workgroup_size(128)
fn qmatmul_f16_coopmat(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) id: u32,
    @builtin(subgroup_id)            subgroup: u32,
) {
    tile(group.y * 64u, group.x * 64u, id, subgroup);
}
