//! Whole kernels against plain loops, checked and unchecked.

mod common;

use common::{bytes_f32, checked, f32s, run_with, unchecked, Buf, Random};
use half::f16;
use ptx_sim::{mutants, Class, Error, Options};

fn dims(words: &[u32]) -> Vec<u8> {
    let mut block = common::bytes32(words);
    block.resize(64, 0);
    block
}

/// |a − b| within `bound` of the largest magnitude that the row's sum ran through.
fn close(a: f32, b: f64, bound: f64) {
    assert!((f64::from(a) - b).abs() <= bound, "{a} is not {b} within {bound}");
}

#[test]
fn dot_rows_matches_loops() {
    let source = include_str!("ptx/dot_rows.ptx");
    for (n, k) in [(1, 1), (7, 33), (65, 257)] {
        let mut random = Random(9 + k as u64);
        let a: Vec<f32> = (0..n * k).map(|_| random.unit()).collect();
        let x: Vec<f32> = (0..k).map(|_| random.unit()).collect();
        for options in [checked(), unchecked(), Options { threads: 2, ..checked() }] {
            let buffers = [Buf::In(bytes_f32(&a)), Buf::In(bytes_f32(&x)), Buf::Out(4 * n)];
            let grid = [n.div_ceil(4) as u32, 1, 1];
            let ran =
                run_with(source, grid, [128, 1, 1], 0, &buffers, &[dims(&[n as u32, k as u32])], &options).unwrap();
            assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
            for (row, y) in f32s(&ran.buffers[2]).into_iter().enumerate() {
                let terms = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(x[i]));
                let size: f64 = terms.clone().map(f64::abs).sum();
                // A product or sum at each of K / 32 + 6 steps rounds by at most 2^-24 of the terms' total.
                close(y, terms.sum(), size * (k as f64 / 32.0 + 6.0) * 2f64.powi(-24));
            }
        }
    }
}

#[test]
fn mean_square_matches_loops() {
    let source = include_str!("ptx/mean_square.ptx");
    for (m, k) in [(1, 1), (3, 65), (5, 576)] {
        let mut random = Random(3 + k as u64);
        let x: Vec<f32> = (0..m * k).map(|_| random.unit()).collect();
        let gain: Vec<f32> = (0..k).map(|_| random.unit()).collect();
        let eps = 1e-5f32;
        for options in [checked(), unchecked()] {
            let buffers = [Buf::In(bytes_f32(&x)), Buf::In(bytes_f32(&gain)), Buf::Out(4 * m * k)];
            let block = dims(&[m as u32, k as u32, eps.to_bits()]);
            let ran = run_with(source, [m as u32, 1, 1], [64, 1, 1], 0, &buffers, &[block], &options).unwrap();
            assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
            let y = f32s(&ran.buffers[2]);
            for row in 0..m {
                let row_x = &x[row * k..(row + 1) * k];
                let mean = row_x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / k as f64;
                let scale = 1.0 / (mean + f64::from(eps)).sqrt();
                for i in 0..k {
                    let want = f64::from(row_x[i]) * scale * f64::from(gain[i]);
                    // Squares cannot cancel: K / 64 + 12 roundings, halved by the root.
                    close(y[row * k + i], want, want.abs() * (k as f64 / 64.0 + 12.0) * 2f64.powi(-24));
                }
            }
        }
    }
}

/// x, q, scale, and the exact result, which small integers make independent of the order of sums.
fn q4_case(m: usize, n: usize, k: usize) -> ([Vec<u8>; 3], Vec<f32>) {
    let mut random = Random(77);
    let x: Vec<i32> = (0..m * k).map(|_| (random.bits() >> 40) as i32 % 9 - 4).collect();
    let q: Vec<u8> = (0..n * k / 2).map(|_| (random.bits() >> 40) as u8).collect();
    let scale: Vec<f32> = (0..n).map(|i| [0.5, 1.0, 2.0][i % 3]).collect();
    let nibble = |row: usize, i: usize| i32::from(q[(row * k + i) / 2] >> (4 * (i % 2)) & 15) - 8;
    let mut y = Vec::new();
    for row in 0..m {
        for (col, scale) in scale.iter().enumerate() {
            let dot: i32 = (0..k).map(|i| x[row * k + i] * nibble(col, i)).sum();
            y.push(dot as f32 * scale);
        }
    }
    let halves = x.iter().flat_map(|v| f16::from_f32(*v as f32).to_le_bytes()).collect();
    ([halves, q, bytes_f32(&scale)], y)
}

#[test]
fn tile_q4_is_exact() {
    let source = include_str!("ptx/tile_q4.ptx");
    for (m, n, k) in [(16, 32, 32), (32, 64, 96), (16, 96, 256)] {
        let (inputs, y) = q4_case(m, n, k);
        for options in [checked(), unchecked()] {
            let buffers: Vec<Buf> = inputs.iter().map(|b| Buf::In(b.clone())).chain([Buf::Out(4 * m * n)]).collect();
            let block = dims(&[n as u32, k as u32]);
            let grid = [n as u32 / 32, m as u32 / 16, 1];
            let ran = run_with(source, grid, [64, 1, 1], 0, &buffers, &[block], &options).unwrap();
            assert!(ran.report.findings.is_empty(), "{:#?}", ran.report.findings);
            assert_eq!(f32s(&ran.buffers[3]), y, "{m} {n} {k}");
            if options.count {
                let conflicts = |name: &str| -> u64 {
                    ran.report.counts.lines.iter().filter(|l| l.name.starts_with(name)).map(|l| l.conflicts).sum()
                };
                assert_eq!((conflicts("ldmatrix"), conflicts("cp.async")), (0, 0));
                assert_eq!(ran.report.counts.mma_macs, (m * n * k) as u64);
            }
        }
    }
}

/// Every fault of control put into the tile betrays itself: a finding, a fault, or a wrong result. Steps and offsets
/// are left to larger shapes: here the tile runs once.
#[test]
fn mutants_of_the_tile_are_caught() {
    let source = include_str!("ptx/tile_q4.ptx");
    let (m, n, k) = (16, 32, 96);
    let (inputs, y) = q4_case(m, n, k);
    let mut all = mutants(source);
    all.retain(|mutant| mutant.class <= Class::Comparison);
    assert!(all.len() >= 10, "{} mutants", all.len());
    let mut silent = Vec::new();
    for mutant in &all {
        let buffers: Vec<Buf> = inputs.iter().map(|b| Buf::In(b.clone())).chain([Buf::Out(4 * m * n)]).collect();
        let ran = run_with(&mutant.source, [1; 3], [64, 1, 1], 0, &buffers, &[dims(&[n as u32, k as u32])], &checked());
        match ran {
            Ok(ran) if ran.report.findings.is_empty() && f32s(&ran.buffers[3]) == y => silent.push(mutant),
            Ok(_) | Err(Error::Fault { .. }) => {}
            Err(e) => panic!("{}: {e}", mutant.change),
        }
    }
    assert!(silent.is_empty(), "{:#?}", silent.iter().map(|m| (m.line, &m.change)).collect::<Vec<_>>());
}
