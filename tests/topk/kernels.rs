//! What the table's cases leave open: on values that are not on a grid, the rows of a list against their scores.

use super::*;
use handmill::op::{Dims, OpSpec, Role};
use handmill::ops::cosine_topk::{self, score_error, CODE_PITCH, NO_ROW};
use handmill::tensor::HostTensor;
use handmill::verify;

/// Q, N (even: normal values), D, K, S, BASE, FILTER. The last rows take every kernel several steps.
const SHAPES: [[usize; 7]; 5] = [
    [5, 300, 33, 8, 2, 0, 0],
    [33, 258, 65, 17, 5, 32, 1],
    [17, 514, 384, 10, 3, 0, 0],
    [3, 70, 1032, 7, 1, 0, 0],
    [9, 70, 1032, 7, 1, 0, 0],
];

#[test]
fn lists_hold_the_rows_of_their_scores() {
    let mut checked = 0;
    for (name, device) in devices() {
        for spec in [&cosine_topk::COSINE_TOPK_F32, &cosine_topk::COSINE_TOPK_F16, &cosine_topk::COSINE_TOPK_I8] {
            for kernel in spec.kernels().filter(|kernel| device.caps().kind.runs(&kernel.source)) {
                for shape in SHAPES {
                    let dims = spec.dims(&shape, &[]);
                    if !(kernel.supports)(&dims, device.caps()) {
                        continue;
                    }
                    let mut tensors = verify::fill(spec, &dims, kernel.act, 3);
                    let buffers: Vec<_> = tensors
                        .iter()
                        .map(|tensor| {
                            let buffer = device.alloc(tensor.bytes.len()).unwrap();
                            device.write(&buffer, 0, tensor.bytes.as_slice()).unwrap();
                            buffer
                        })
                        .collect();
                    device.launch(spec, kernel, &buffers.iter().collect::<Vec<_>>(), &dims).unwrap();
                    for (i, buffer) in buffers.iter().enumerate().filter(|(i, _)| spec.args[*i].role == Role::Out) {
                        device.read(buffer, 0, tensors[i].bytes.as_mut_slice()).unwrap();
                    }
                    let most = score_error(kernel, dims["D"]);
                    check(spec, &dims, &tensors, most, &format!("{} ({dims}) on {name}", kernel.stem));
                    checked += 1;
                }
            }
        }
    }
    assert!(checked >= 3 * 3 * 4, "{checked} launches");
}

/// Every score is that of its row, within the error; rows are allowed, in their split, no row twice; lists are sorted;
/// no row left out is better than the last by more than twice the error; a list is only short where rows run out.
fn check(spec: &OpSpec, dims: &Dims, tensors: &[HostTensor], most: f64, what: &str) {
    let (n, d, k, splits) = (dims["N"], dims["D"], dims["K"], dims["S"]);
    let at = |name: &str| spec.args.iter().position(|arg| arg.name == name).unwrap();
    let tensor = |name: &str| &tensors[at(name)];
    let decode = |name: &str, scales: Option<&str>| -> Vec<Vec<f64>> {
        let pitch = if scales.is_some() { d.next_multiple_of(CODE_PITCH) } else { d };
        let rows = tensor(name).to_f64();
        let rows = rows.chunks(pitch).enumerate().map(|(row, values)| {
            let scale = scales.map_or(1.0, |scales| tensor(scales).f32()[row] as f64);
            values[..d].iter().map(|v| v * scale).collect()
        });
        rows.collect()
    };
    let codes = spec.format == "i8";
    let (q, rows) = (decode("q", codes.then_some("q_scales")), decode("rows", codes.then_some("scales")));
    let (filter, floor) = (tensor("mask").u32(), tensor("floor").f32());
    let norm = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
    let longest = rows.iter().map(|row| norm(row)).fold(0.0, f64::max);
    let (ids, scores) = (tensor("ids").u32(), tensor("scores").f32());
    for (list, (ids, scores)) in ids.chunks(k).zip(scores.chunks(k)).enumerate() {
        let (query, split) = (list / splits, list % splits);
        let error = most * norm(&q[query]) * longest + 1e-12;
        let len = n.div_ceil(splits);
        let range = (split * len).min(n)..((split + 1) * len).min(n);
        let counts = |row: usize| filter.is_empty() || filter[row / 32] >> (row % 32) & 1 == 1;
        let exact = |row: usize| q[query].iter().zip(&rows[row]).map(|(a, b)| a * b).sum::<f64>();
        let filled = ids.iter().take_while(|id| **id != NO_ROW).count();
        let mut seen = Vec::new();
        for (place, (&id, &score)) in ids.iter().zip(scores).enumerate() {
            if place >= filled {
                assert!(id == NO_ROW && score == f32::NEG_INFINITY, "{what}: list {list} after its end");
                continue;
            }
            let row = (id as usize).checked_sub(dims["BASE"]).unwrap_or(usize::MAX);
            assert!(range.contains(&row) && counts(row), "{what}: list {list} has row {row}");
            assert!((exact(row) - score as f64).abs() <= error, "{what}: row {row} has {score}, not {}", exact(row));
            assert!(score >= floor[query], "{what}: list {list}: {score} below its floor");
            seen.push(row);
        }
        let sorted = (1..filled).all(|i| (-scores[i - 1], ids[i - 1]) < (-scores[i], ids[i]));
        assert!(sorted, "{what}: list {list} is not sorted, or has a row twice");
        let bound = if filled == k { scores[k - 1].max(floor[query]) } else { floor[query] } as f64;
        for row in range.filter(|row| counts(*row) && !seen.contains(row)) {
            assert!(exact(row) <= bound + 2.0 * error, "{what}: list {list} lacks row {row} of {}", exact(row));
        }
    }
}
