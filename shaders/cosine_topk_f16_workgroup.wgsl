// cosine_topk_f16_workgroup: ids, scores = the K best of each split of the rows contract: src/ops/cosine_topk/mod.rs
// grid   ceil(Q/8), S     block 64 = 2 x 32, an invocation 4 x 4 scores
// smem   14444 B          features none
// reads  all rows once for up to 8 queries      writes 8QSK B, and again where lists change      bound: memory
// idea   the tiles of shaders/cosine_topk_tiled.wgsl, narrow ones: rows stream by and meet few queries; their lists:
//        shaders/cosine_topk_lists.wgsl

struct Params { Q: u32, N: u32, D: u32, K: u32, S: u32, BASE: u32, FILTER: u32 }

const QUERIES: u32 = 8u;
const ROWS: u32 = 128u;
const WIDTH: u32 = 64u;

@compute @workgroup_size(64)
fn cosine_topk_f16_workgroup(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    find(group.x * QUERIES, group.y, lane);
}
