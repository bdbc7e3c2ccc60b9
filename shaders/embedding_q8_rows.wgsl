// embedding_q8_rows: y[M,K] = deq(W[N,K])[ids[M] − N0], for ids in N0..N0+N     contract: src/ops/embedding.rs
// grid   ceil(K/64), M     block 64 = 64 elements of a row
// smem   0 B               features none
// reads  4M + M/N(NK + scales) B      writes 4MK B       bound: memory
// idea   one element an invocation; rows of other shards' ids stay as they are

struct Params { M: u32, N: u32, K: u32, N0: u32, G: u32, WIDE: u32, AFFINE: u32 }

@group(0) @binding(0) var<storage, read> ids: array<u32>;               // [M]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;           // [M,K]
@group(0) @binding(5) var<uniform> p: Params;

@compute @workgroup_size(64)
fn embedding_q8_rows(@builtin(global_invocation_id) id: vec3<u32>) {
    let m = id.y;
    let k = id.x;
    // An id below N0 wraps round to one far above N.
    let row = ids[m] - p.N0;
    if k < p.K && row < p.N {
        y[m * p.K + k] = weight(row, k);
    }
}
