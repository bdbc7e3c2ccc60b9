//! `cosine_topk` on the CPU.

use super::select::{Best, Scored};
use super::CODE_PITCH;
use crate::op::*;
use half::f16;

pub const KERNELS_F32: &[Kernel] = &[rust("cosine_topk_f32_naive", |d, args| naive("f32", d, args), always)];
pub const KERNELS_F16: &[Kernel] = &[rust("cosine_topk_f16_naive", |d, args| naive("f16", d, args), always)];
pub const KERNELS_I8: &[Kernel] = &[rust("cosine_topk_i8_naive", |d, args| naive("i8", d, args), always)];

/// N rows as they are stored.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// [N,D].
    F32(&'a [f32]),
    /// [N,D].
    F16(&'a [f16]),
    /// [N, D padded], [N], and the queries' codes [Q, D padded] and scales [Q].
    I8 { codes: &'a [i8], scales: &'a [f32], q: &'a [i8], q_scales: &'a [f32] },
}

/// A launch's arguments by name.
struct Args<'a> {
    /// [Q,D]; empty for i8.
    q: &'a [f32],
    rows: Rows<'a>,
    filter: &'a [u32],
    floor: &'a [f32],
    /// [Q,S,K].
    ids: &'a mut [u32],
    /// [Q,S,K].
    scores: &'a mut [f32],
}

fn arguments<'a>(format: &str, args: &'a mut [Slice<'_>]) -> Args<'a> {
    let (inputs, outputs) = args.split_at_mut(args.len() - 2);
    let [Slice::Out(ids), Slice::Out(scores)] = outputs else { unreachable!("two outputs") };
    let (ids, scores) = (bytemuck::cast_slice_mut(ids), bytemuck::cast_slice_mut(scores));
    let (q, rows, filter, floor) = match (format, &*inputs) {
        ("f32", [q, rows, filter, floor]) => (q.f32(), Rows::F32(rows.f32()), filter, floor),
        ("f16", [q, rows, filter, floor]) => (q.f32(), Rows::F16(rows.as_slice()), filter, floor),
        ("i8", [q, q_scales, rows, scales, filter, floor]) => {
            let (codes, scales) = (rows.as_slice(), scales.f32());
            (&[][..], Rows::I8 { codes, scales, q: q.as_slice(), q_scales: q_scales.f32() }, filter, floor)
        }
        _ => unreachable!("arguments of the contract"),
    };
    Args { q, rows, filter: filter.u32(), floor: floor.f32(), ids, scores }
}

/// The rows of split `split`.
fn split_rows(d: &Dims, split: usize) -> std::ops::Range<usize> {
    let len = d["N"].div_ceil(d["S"]);
    (split * len).min(d["N"])..((split + 1) * len).min(d["N"])
}

/// One query after another, one row after another.
fn naive(format: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let (width, pitch, k) = (d["D"], d["D"].next_multiple_of(CODE_PITCH), d["K"]);
    let a = arguments(format, args);
    let score = |q: usize, n: usize| -> f32 {
        let plain = n * width..(n + 1) * width;
        let query = || a.q[q * width..(q + 1) * width].iter();
        match a.rows {
            Rows::F32(rows) => query().zip(&rows[plain]).map(|(q, x)| q * x).sum(),
            Rows::F16(rows) => query().zip(&rows[plain]).map(|(q, x)| q * x.to_f32()).sum(),
            Rows::I8 { codes, scales, q: query, q_scales } => {
                let pairs = query[q * pitch..(q + 1) * pitch].iter().zip(&codes[n * pitch..(n + 1) * pitch]);
                let sum: i32 = pairs.map(|(q, x)| *q as i32 * *x as i32).sum();
                sum as f32 * (q_scales[q] * scales[n])
            }
        }
    };
    let lists = a.ids.chunks_mut(k).zip(a.scores.chunks_mut(k)).enumerate();
    for (list, (ids, scores)) in lists {
        let (q, split) = (list / d["S"], list % d["S"]);
        let mut best = Best::new(k, a.floor[q]);
        for n in split_rows(d, split) {
            if a.filter.is_empty() || a.filter[n / 32] >> (n % 32) & 1 == 1 {
                best.put(Scored { score: score(q, n), id: (d["BASE"] + n) as u32 });
            }
        }
        best.finish(ids, scores);
    }
}
