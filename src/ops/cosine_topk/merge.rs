//! `topk_merge`: the K best of S lists of K, for each query
//!
//! ```text
//! ids, scores [Q,K] = the first K of the S·K places of a query, by (score descending, id ascending)
//! ```
//!
//! Each list is sorted so, as `cosine_topk` leaves it; its unfilled places, id 0xFFFFFFFF and score −∞, come last, and
//! no id stands twice. Scores compare as numbers and are copied as they are.

use super::{ptx, wgsl, NO_ROW};
use crate::op::*;
use crate::ops::cosine_topk::select::Scored;
use crate::tensor::{Dtype, HostTensor};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Lists of one launch joined.
pub static TOPK_MERGE: OpSpec = OpSpec {
    name: "topk_merge",
    format: "f32",
    formula: "ids, scores [Q,K] = the K best of list_ids, list_scores [Q,S,K], by (score descending, id ascending)",
    dims: &["Q", "S", "K"],
    scalars: &[],
    args: &[
        input("list_ids", ArgType::Is(Dtype::U32), &["Q", "S", "K"], Fill::With(list_ids)),
        input("list_scores", ArgType::Is(Dtype::F32), &["Q", "S", "K"], Fill::With(list_scores)),
        output("ids", ArgType::Is(Dtype::U32), &["Q", "K"]),
        output("scores", ArgType::Is(Dtype::F32), &["Q", "K"]),
    ],
    oracle,
    // A comparison for each place that leaves a list.
    cost: |d| Cost { flops: (d["Q"] * d["K"]) as u64, bytes: (8 * d["Q"] * d["K"] * (d["S"] + 1)) as u64 },
    tolerance: Tolerance { roundings: |_| 0.0, nmse: 0.0, why: "nothing is computed: every place is a copy" },
    // Q, S, K
    cases: &[
        case(&[1, 1, 1], "the smallest"),
        case(&[7, 3, 33], "odd sizes"),
        case(&[3, 65, 10], "more lists than a warp has lanes"),
        case(&[2, 2, 2048], "the most places"),
        case(&[257, 4, 1], "the best alone; more queries than a block"),
        case(&[64, 16, 32], "a batch of 64 queries"),
    ],
    kernels: &[&[rust("topk_merge_f32_heads", heads, always)], ptx::MERGE, wgsl::MERGE],
};

/// The lists of every query: scores of few values, so that ties stand in one list and across lists; every fifth list is
/// half empty, every eleventh empty.
fn lists(d: &Dims) -> Vec<Scored> {
    let (splits, k) = (d["S"], d["K"]);
    let mut all = Vec::with_capacity(d["Q"] * splits * k);
    for query in 0..d["Q"] {
        for split in 0..splits {
            let number = query + split;
            let filled = if number % 11 == 10 { 0 } else { k.div_ceil(1 + usize::from(number % 5 == 4)) };
            let row = |place: usize| {
                let id = place * splits + split;
                let mixed = (id as u32 ^ query as u32).wrapping_mul(0x9E37_79B9) >> 24;
                Scored { score: (mixed % 61) as f32 * 0.03125 - 0.9, id: id as u32 }
            };
            let mut list: Vec<Scored> = (0..filled).map(row).collect();
            list.sort_by(Scored::order);
            list.resize(k, Scored::NONE);
            all.extend(list);
        }
    }
    all
}

fn list_ids(d: &Dims, _: &mut ChaCha8Rng) -> HostTensor {
    let ids: Vec<u32> = lists(d).iter().map(|row| row.id).collect();
    HostTensor::from_u32(&[d["Q"], d["S"], d["K"]], &ids)
}

fn list_scores(d: &Dims, _: &mut ChaCha8Rng) -> HostTensor {
    let scores: Vec<f32> = lists(d).iter().map(|row| row.score).collect();
    HostTensor::from_f32(&[d["Q"], d["S"], d["K"]], &scores)
}

/// Everything sorted, the first K taken.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let of_query = d["S"] * d["K"];
    let (mut ids, mut scores) = (Vec::new(), Vec::new());
    for (list_ids, list_scores) in args[0].u32().chunks(of_query).zip(args[1].f32().chunks(of_query)) {
        let mut all: Vec<(f32, u32)> = list_scores.iter().copied().zip(list_ids.iter().copied()).collect();
        all.sort_by(|a, b| b.0.partial_cmp(&a.0).expect("scores are numbers").then(a.1.cmp(&b.1)));
        ids.extend(all[..d["K"]].iter().map(|row| row.1 as f64));
        scores.extend(all[..d["K"]].iter().map(|row| row.0 as f64));
    }
    let exact = |value: Vec<f64>| Expected { magnitude: vec![0.0; value.len()], value };
    vec![exact(ids), exact(scores)]
}

/// CPU: the best of the lists' heads leaves its list, K times.
fn heads(d: &Dims, args: &mut [Slice<'_>]) {
    let (splits, k) = (d["S"], d["K"]);
    let [list_ids, list_scores, Slice::Out(ids), Slice::Out(scores)] = args else { unreachable!("four arguments") };
    let (list_ids, list_scores) = (list_ids.u32().par_chunks(splits * k), list_scores.f32().par_chunks(splits * k));
    let ids = bytemuck::cast_slice_mut::<u8, u32>(ids).par_chunks_mut(k);
    let scores = bytemuck::cast_slice_mut::<u8, f32>(scores).par_chunks_mut(k);
    let grain = crate::ops::simd::grain((splits * k) as f64);
    let queries = list_ids.zip(list_scores).zip(ids.zip(scores)).with_min_len(grain);
    queries.for_each(|((list_ids, list_scores), (ids, scores))| {
        let at = |list: usize, place: usize| match place < k {
            true => Scored { id: list_ids[list * k + place], score: list_scores[list * k + place] },
            false => Scored::NONE,
        };
        let mut next = vec![0; splits];
        for (id, score) in ids.iter_mut().zip(scores) {
            let (mut from, mut best) = (0, Scored::NONE);
            for (list, &place) in next.iter().enumerate() {
                let head = at(list, place);
                if head.before(&best) {
                    (from, best) = (list, head);
                }
            }
            (*id, *score) = (best.id, best.score);
            next[from] += usize::from(best.id != NO_ROW);
        }
    });
}
