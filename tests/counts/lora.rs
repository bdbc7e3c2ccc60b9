//! What the tiled rungs of an adapter's first half and of its gradients move: dy once for each gradient, x once, and
//! nothing in vain.

use crate::{launched, Counted};
use handmill::device::{ptx_sim::PtxSim, Device};
use handmill::op::Source;
use handmill::tensor::Dtype;

fn run(op: &str, variant: &str, dims: &[(&str, usize)]) -> Counted {
    let spec = handmill::ops::find(op, "f32");
    let stem = format!("{op}_f32_{variant}");
    let mut of_stem = spec.kernels().filter(|k| k.stem == stem);
    let kernel = of_stem.find(|k| matches!(k.source, Source::Ptx(_))).expect("a kernel of the table in PTX");
    let value = |name: &&str| dims.iter().find(|(dim, _)| dim == name).map_or(0, |(_, value)| *value);
    let values: Vec<usize> = spec.dims.iter().map(value).collect();
    launched(spec, kernel, spec.dims(&values, &vec![1.0; spec.scalars.len()]))
}

/// Bytes that an argument has, and that the second-level cache is asked for.
fn of_l2(run: &Counted, name: &str) -> (u64, u64) {
    let (bytes, count) = run.arg(name);
    (bytes, count.missed + count.sector_written)
}

#[test]
fn lora_backward_tiled_reads_dy_once_for_each_gradient_and_32_ranks() {
    // Ranks, and the most instructions for a multiply-add.
    for (r, instructions) in [(8, 1.7), (16, 1.5), (64, 1.4)] {
        let (m, n) = (256, 576);
        let run = run("lora_backward", "tiled", &[("M", m), ("N", n), ("LDY", n), ("R", r)]);
        let (what, blocks) = (run.what(), r.div_ceil(32) as u64);
        for (name, times) in
            [("dy", 2 * blocks), ("lora_b", m as u64 / 32), ("lora_s", n as u64 / 32), ("ds", 1), ("db", 1)]
        {
            let (bytes, moved) = of_l2(&run, name);
            assert_eq!(moved, times * bytes, "{what}: {name}");
        }
        let (bytes, moved) = run.arg("dy");
        // Warps beside each other have other ranks of the same tokens: the first-level cache is asked for each.
        let groups = (r as u64).div_ceil(8);
        assert_eq!(moved.sector_read, 2 * groups * bytes, "{what}: dy, of the first-level cache");
        assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");
        let a_product = run.counts.thread_instructions as f64 / (2 * m * n * r) as f64;
        assert!(a_product < instructions, "{what}: {a_product:.3} instructions a multiply-add");
    }
}

#[test]
fn lora_backward_tiled_asks_the_second_cache_for_little_more_than_dy_twice() {
    // The contract's least holds dy once. B comes for each 32 tokens and S for each 32 columns: 2 R/32 of dy's bytes, for
    // each 32 ranks.
    for (n, r, most) in [(576, 8, 2.4), (4096, 8, 2.4), (4096, 16, 2.8), (4096, 64, 5.5)] {
        let run = run("lora_backward", "tiled", &[("M", 256), ("N", n), ("LDY", n), ("R", r)]);
        let moved: u64 = run.spec.args.iter().map(|arg| of_l2(&run, arg.name).1).sum();
        let times = moved as f64 / (run.spec.cost)(&run.dims).bytes as f64;
        assert!(times < most, "{}: {times:.2} times the least", run.what());
    }
}

#[test]
fn lora_backward_a_tiled_reads_x_once_for_32_ranks() {
    for (r, instructions) in [(8, 1.7), (16, 1.5), (64, 1.4)] {
        let (m, k) = (256, 1536);
        let run = run("lora_backward_a", "tiled", &[("M", m), ("K", k), ("R", r)]);
        let what = run.what();
        for (name, times) in [("x", r.div_ceil(32) as u64), ("ds", k as u64 / 32), ("da", 1)] {
            let (bytes, moved) = of_l2(&run, name);
            assert_eq!(moved, times * bytes, "{what}: {name}");
        }
        assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");
        let a_product = run.counts.thread_instructions as f64 / (m * k * r) as f64;
        assert!(a_product < instructions, "{what}: {a_product:.3} instructions a multiply-add");
    }
}

#[test]
fn lora_shrink_tiled_reads_x_once_for_32_ranks() {
    for (r, instructions) in [(8, 1.35), (16, 1.3), (64, 1.3)] {
        let (m, k) = (256, 1536);
        let run = run("lora_shrink", "tiled", &[("M", m), ("K", k), ("R", r), ("T", r)]);
        let what = run.what();
        for (name, times) in [("x", r.div_ceil(32) as u64), ("lora_a", m as u64 / 32), ("s", 1)] {
            let (bytes, moved) = of_l2(&run, name);
            assert_eq!(moved, times * bytes, "{what}: {name}");
        }
        assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");
        let a_product = run.counts.thread_instructions as f64 / (m * k * r) as f64;
        assert!(a_product < instructions, "{what}: {a_product:.3} instructions a multiply-add");
    }
}

/// The stem of the kernel that is taken for these dims.
fn taken(op: &str, dims: &[usize]) -> &'static str {
    let (spec, device) = (handmill::ops::find(op, "f32"), PtxSim::new());
    let dims = spec.dims(dims, &vec![1.0; spec.scalars.len()]);
    spec.choose(&dims, Dtype::F32, device.caps()).expect("a kernel").stem
}

/// Rows that a tiled rung can count.
const MOST: usize = (1 << 31) - 257;

#[test]
fn lora_backward_tiled_takes_columns_by_fours_and_rows_that_it_can_count() {
    let (tiled, block) = ("lora_backward_f32_tiled", "lora_backward_f32_block");
    for (dims, stem) in [
        ([16, 4, 1, 4, 0, 0], tiled),
        ([15, 4, 1, 4, 0, 0], block),
        ([16, 6, 1, 8, 0, 0], block),
        ([16, 4, 1, 6, 0, 0], block),
        ([16, 4, 1, 8, 2, 0], block),
        ([MOST, 4, 1, 4, 0, 0], tiled),
        ([MOST + 1, 4, 1, 4, 0, 0], block),
        ([16, MOST - 3, 1, MOST - 3, 0, 0], tiled),
        ([16, MOST + 1, 1, MOST + 1, 0, 0], block),
        ([16, 4, 32 * 65_535, 4, 0, 0], tiled),
        ([16, 4, 32 * 65_535 + 1, 4, 0, 0], block),
    ] {
        assert_eq!(taken("lora_backward", &dims), stem, "{dims:?}");
    }
}

#[test]
fn lora_backward_a_tiled_takes_columns_by_fours_and_rows_that_it_can_count() {
    let (tiled, block) = ("lora_backward_a_f32_tiled", "lora_backward_a_f32_block");
    for (dims, stem) in [
        ([16, 4, 1, 0], tiled),
        ([15, 4, 1, 0], block),
        ([16, 6, 1, 0], block),
        ([MOST, 4, 1, 0], tiled),
        ([MOST + 1, 4, 1, 0], block),
        ([16, MOST - 3, 1, 0], tiled),
        ([16, MOST + 1, 1, 0], block),
        ([16, 4, 32 * 65_535, 0], tiled),
        ([16, 4, 32 * 65_535 + 1, 0], block),
    ] {
        assert_eq!(taken("lora_backward_a", &dims), stem, "{dims:?}");
    }
}

#[test]
fn lora_shrink_tiled_takes_one_adapter_and_columns_by_fours() {
    let (tiled, warp) = ("lora_shrink_f32_tiled", "lora_shrink_f32_warp");
    for (dims, stem) in [
        ([16, 4, 1, 1, 0, 0], tiled),
        ([16, 4, 1, 1, 1, 1], warp),
        ([15, 4, 1, 1, 0, 0], warp),
        ([16, 6, 1, 1, 0, 0], warp),
        ([MOST, 4, 1, 1, 0, 0], tiled),
        ([MOST + 1, 4, 1, 1, 0, 0], warp),
        ([16, MOST - 3, 1, 1, 0, 0], tiled),
        ([16, MOST + 1, 1, 1, 0, 0], warp),
        ([16, 4, 32 * 65_535, 1, 0, 0], tiled),
        ([16, 4, 32 * 65_535 + 1, 1, 0, 0], warp),
    ] {
        assert_eq!(taken("lora_shrink", &dims), stem, "{dims:?}");
    }
}
