//! `splitk`, the rung of `qmatmul` for few rows of x: what it moves, and over how many blocks.

use super::{count, count_of, Counted, K};
use handmill::ops;

/// Bytes of the sectors of all parts of W, as a share of the bytes of these.
fn share_of_w(run: &Counted) -> f64 {
    let (mut least, mut sectors) = (0, 0);
    for name in run.parts_of_w() {
        let (bytes, moved) = run.arg(name);
        least += bytes;
        sectors += moved.sector_read;
    }
    sectors as f64 / least as f64
}

/// Codes or weights and x once, y once; no bank conflicts, no products but those that are needed.
fn moves_each_once(run: &Counted) {
    let what = run.what();
    let (m, n, k) = (run.dims["M"] as u64, run.dims["N"] as u64, run.dims["K"] as u64);
    let (bytes, moved) = run.arg(run.streamed());
    assert_eq!((moved.read, moved.sector_read), (bytes, bytes), "{what}: {}", run.streamed());
    let (bytes, moved) = run.arg("x");
    let blocks = u64::from(run.work.grid[0]);
    assert_eq!((moved.read, moved.sector_read), (blocks * bytes, blocks * bytes), "{what}: x");
    let (bytes, moved) = run.arg("y");
    assert_eq!((moved.written, moved.sector_written), (bytes, bytes), "{what}: y");
    // By 16 rows of W, 8 of x and 16 columns; in q4 a block sums x as well.
    let sums = if run.spec.format == "q4" { blocks } else { 0 };
    let products = (n.div_ceil(16) + sums) * m.div_ceil(8) * k.next_multiple_of(64) / 16;
    assert_eq!(run.counts.mma, products, "{what}: mma instructions");
    assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");
}

#[test]
fn splitk_streams_w_once_with_its_scales() {
    for format in ["q4", "q8", "nf4", "nf4dq", "bf16", "f16"] {
        for m in [1, 8, 16] {
            let run = count("qmatmul", format, "splitk", m);
            moves_each_once(&run);
            // A row of nf4dq has 24 bytes of absmax here, so that its sectors are its neighbours' too, and absmax2 is
            // looked up by each warp: 8 warps, 16 rows, 1536 columns.
            let allowed = if format == "nf4dq" { 1.10 } else { 1.0 };
            let share = share_of_w(&run);
            assert!(share <= allowed, "{}: {share:.3} of W's bytes moved", run.what());
        }
    }
}

#[test]
fn splitk_of_two_strips_streams_w_once() {
    for format in ["q4", "nf4"] {
        let run = count_of("qmatmul", format, "splitk", [16, 2080, 512], &[("G", 32)]);
        assert_eq!(run.work.grid, [128, 1, 1], "{}", run.what());
        moves_each_once(&run);
        assert_eq!(share_of_w(&run), 1.0, "{}: W's bytes moved", run.what());
    }
}

#[test]
fn splitk_brings_scales_of_every_width_in_whole_sectors() {
    // Groups whose scales fill two sectors a tile, four, one, half of one and a quarter.
    for (group, wide) in [(16, 0), (16, 1), (32, 0), (32, 1), (64, 0), (128, 0), (128, 1)] {
        for format in ["q4", "q8"] {
            // Those of 16 are not q4's: 32 columns of it lie in one group.
            if format == "q4" && group < 32 {
                continue;
            }
            let own = [("G", group), ("WIDE", wide), ("AFFINE", 1)];
            let run = count_of("qmatmul", format, "splitk", [2, 48, 4096], &own);
            moves_each_once(&run);
            assert_eq!(share_of_w(&run), 1.0, "{}: W's bytes moved", run.what());
        }
    }
}

/// What the headers say of the shapes that gain: blocks of `splitk`, and of `mma`.
#[test]
fn splitk_spreads_few_rows_over_a_card() {
    let spec = ops::find("qmatmul", "q4");
    for ([n, k], splitk, mma) in [([576, K], 36, 5), ([2048, 8192], 128, 16), ([4096, 14336], 128, 32)] {
        for m in [1, 16] {
            let dims = spec.dims(&[m, n, k, n, 0, 0, 0, 32, 0], &[0.0]);
            let blocks = |variant: &str| {
                let stem = format!("qmatmul_q4_{variant}");
                let kernel = spec.kernels().find(|kernel| kernel.stem == stem).expect("a kernel of the table");
                (kernel.launch)(&dims).grid.iter().product::<u32>()
            };
            assert_eq!((blocks("splitk"), blocks("mma")), (splitk, mma), "{dims}");
        }
    }
}

/// Instructions of a weight, without what a block does once: what two widths differ by.
fn instructions_a_weight(format: &str, variant: &str, m: usize, n: usize) -> f64 {
    let instructions = |k| count_of("qmatmul", format, variant, [m, n, k], &[("G", 32)]).counts.thread_instructions;
    (instructions(1024) - instructions(512)) as f64 / (n * 512) as f64
}

#[test]
fn splitk_runs_fewer_instructions_than_warp() {
    // Decoding takes 1.4 or 2.4 of them in q4 and nf4; what a tile costs besides is shared by one or two strips.
    for (format, m, n, allowed) in [
        ("q4", 1, 1024, 5.6),
        ("q4", 1, 4096, 4.3),
        ("q4", 16, 4096, 5.5),
        ("q8", 16, 1024, 7.3),
        ("nf4", 1, 1024, 4.8),
        ("nf4", 1, 4096, 3.9),
        ("nf4", 16, 4096, 4.7),
        ("nf4dq", 16, 4096, 5.2),
        ("bf16", 8, 1024, 2.1),
        ("bf16", 16, 1024, 2.3),
        ("f16", 16, 1024, 4.3),
    ] {
        let a_weight = instructions_a_weight(format, "splitk", m, n);
        assert!(a_weight < allowed, "qmatmul_{format}_splitk, M {m}, N {n}: {a_weight:.3} instructions a weight");
    }
    // There every product is an instruction: 17 at 8 rows, from which on a model rounds x for it, 30 at 16. Weights of 16
    // bits need no decoding in either.
    for (format, m, times) in [("q4", 8, 2.8), ("q4", 16, 4.0), ("bf16", 8, 7.0), ("bf16", 16, 12.0)] {
        let [splitk, warp] = ["splitk", "warp"].map(|variant| instructions_a_weight(format, variant, m, 1024));
        assert!(times * splitk < warp, "{format}, M {m}: {splitk:.3} instructions a weight, {warp:.3} in warp");
    }
}
