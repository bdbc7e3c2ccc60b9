// topk_merge_f32_ranks: ids, scores [Q,K] = the K best of S lists of K      contract: src/ops/cosine_topk/merge.rs
// grid   Q, ceil(S*K/128)  block 128 = one place of a list an invocation
// smem   0 B               features none
// reads  8QSK B, and places of other lists from caches      writes 8QK B      bound: latency
// idea   a place's rank among all is its place in its list and, for each other list, how many stand before it there:
//        a bisection. A place whose rank reaches K is given up, most of them after few lists. Nothing is sorted

struct Params { Q: u32, S: u32, K: u32 }

@group(0) @binding(0) var<storage, read> list_ids: array<u32>;          // [Q,S,K]
@group(0) @binding(1) var<storage, read> list_scores: array<u32>;       // [Q,S,K], bits
@group(0) @binding(2) var<storage, read_write> ids: array<u32>;         // [Q,K]
@group(0) @binding(3) var<storage, read_write> scores: array<u32>;      // [Q,K], bits
@group(0) @binding(4) var<uniform> p: Params;

/// Of a score's bits: an integer that orders as the score does; −0 equals 0.
fn key_of(bits: u32) -> u32 {
    let number = select(bits, 0u, bits == 0x80000000u);
    return select(number | 0x80000000u, ~number, number >= 0x80000000u);
}

@compute @workgroup_size(128)
fn topk_merge_f32_ranks(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let place = group.y * 128u + lane;
    if place >= p.S * p.K {
        return;
    }
    let lists = group.x * p.S * p.K;
    let own = place / p.K;
    let id = list_ids[lists + place];
    let bits = list_scores[lists + place];
    let key = key_of(bits);
    var rank = place % p.K;
    for (var list = 0u; list < p.S && rank < p.K; list++) {
        if list == own {
            continue;
        }
        // low = how many of this list come before; unfilled places are equal, and come in order of the lists
        var low = 0u;
        var high = p.K;
        while low < high {
            let middle = (low + high) / 2u;
            let at = lists + list * p.K + middle;
            let its = key_of(list_scores[at]);
            let its_id = list_ids[at];
            if its > key || (its == key && (its_id < id || (its_id == id && list < own))) {
                low = middle + 1u;
            } else {
                high = middle;
            }
        }
        rank += low;
    }
    if rank < p.K {
        ids[group.x * p.K + rank] = id;
        scores[group.x * p.K + rank] = bits;
    }
}
