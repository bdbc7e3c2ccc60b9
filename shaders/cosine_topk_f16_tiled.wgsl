// cosine_topk_f16_tiled: ids, scores = the K best of each split of the rows     contract: src/ops/cosine_topk/mod.rs
// grid   ceil(Q/32), S    block 128 = 8 x 16, an invocation 4 x 4 scores
// smem   15500 B          features none
// reads  all rows for each 32 queries      writes 8QSK B, and again where lists change      bound: arithmetic
// idea   tiles of queries and rows in workgroup memory: shaders/cosine_topk_tiled.wgsl; a score meets its list as it
//        arises: shaders/cosine_topk_lists.wgsl

struct Params { Q: u32, N: u32, D: u32, K: u32, S: u32, BASE: u32, FILTER: u32 }

const QUERIES: u32 = 32u;
const ROWS: u32 = 64u;
const WIDTH: u32 = 128u;

@compute @workgroup_size(128)
fn cosine_topk_f16_tiled(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    find(group.x * QUERIES, group.y, lane);
}
