// cosine_topk_f16_naive: ids, scores = the K best of each split of the rows     contract: src/ops/cosine_topk/mod.rs
// grid   Q, S             block 64 = 64 rows at a time, for one query and split
// smem   1048 B           features none
// reads  all rows for each query      writes 8QSK B, and again where lists change      bound: latency
// idea   the definition, a row an invocation: shaders/cosine_topk_naive.wgsl; the list of the best, in the place of
//        the outputs: shaders/cosine_topk_lists.wgsl

struct Params { Q: u32, N: u32, D: u32, K: u32, S: u32, BASE: u32, FILTER: u32 }

const QUERIES: u32 = 1u;
const ROWS: u32 = 64u;
const WIDTH: u32 = 64u;

@compute @workgroup_size(64)
fn cosine_topk_f16_naive(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    find(group.x, group.y, lane);
}
