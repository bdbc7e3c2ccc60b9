// lora_expand_f32_columns: y[M,N] += scale · S[M,R] · B[N,R]ᵀ of each row's adapter   contract: src/ops/lora_expand.rs
// grid   ceil(N/64), M     block 64 = one invocation per column of a row
// smem   0 B              features none
// reads  4MN + 4TN + 4MR B (B from cache after an adapter's first row)      writes 4MN B       bound: memory
// idea   B lies transposed, so that neighbours read neighbours; ranks are added in order. A row without an adapter, or
//        whose adapter has no rows here, is left alone

struct Params { M: u32, N: u32, R: u32, T: u32, L: u32, LDY: u32, Y0: u32 }

@group(0) @binding(0) var<storage, read>       s: array<f32>;       // [M,R]
@group(0) @binding(1) var<storage, read>       lora_bt: array<f32>; // [T,N]
@group(0) @binding(2) var<storage, read>       adapter: array<i32>; // [M]
@group(0) @binding(3) var<storage, read>       rows: array<u32>;    // [L,2]
@group(0) @binding(4) var<storage, read>       scale: array<f32>;   // [L]
@group(0) @binding(5) var<storage, read_write> y: array<f32>;       // [M,LDY]
@group(0) @binding(6) var<uniform>             p: Params;

@compute @workgroup_size(64)
fn lora_expand_f32_columns(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y;
    let n = group.x * 64u + lane;
    let l = bitcast<u32>(adapter[m]);
    if n >= p.N || l >= p.L {
        return;
    }
    let first = rows[2u * l];
    let ranks = rows[2u * l + 1u] - first;
    if ranks == 0u {
        return;
    }

    // sum = Σ over the ranks of S · Bᵀ
    var sum = 0.0;
    for (var r = 0u; r < ranks; r++) {
        sum = fma(s[m * p.R + r], lora_bt[(first + r) * p.N + n], sum);
    }
    let at = m * p.LDY + p.Y0 + n;
    y[at] = fma(scale[l], sum, y[at]);
}
