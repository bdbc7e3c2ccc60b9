// gather_rows_f32_flat: y[n,k] = index[n] < M ? x[index[n],k] : 0     contract: src/ops/gather_rows.rs
// grid   min(ceil(N*K/256), 65535)     block 256
// smem   0 B              features none
// reads  4NK + 4N B       writes 4NK B       bound: memory
// idea   one element an invocation; a grid too short strides on

struct Params { N: u32, K: u32, M: u32 }

@group(0) @binding(0) var<storage, read>       x: array<u32>;       // f32[M,K], copied bit by bit
@group(0) @binding(1) var<storage, read>       index: array<u32>;   // [N]
@group(0) @binding(2) var<storage, read_write> y: array<u32>;       // f32[N,K]
@group(0) @binding(3) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn gather_rows_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.N * p.K; i += groups.x * 256u) {
        let n = i / p.K;
        let row = index[n];
        var v = 0u;
        if row < p.M {
            v = x[row * p.K + (i - n * p.K)];
        }
        y[i] = v;
    }
}
