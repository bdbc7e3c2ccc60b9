//! Whole kernels against plain loops, checked and unchecked.

mod common;

use common::{bytes_f32, checked, f32s, run_with, unchecked, Buf, Random};
use ptx_sim::Options;

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
