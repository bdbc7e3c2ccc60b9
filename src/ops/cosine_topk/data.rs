//! What the cases put in, and the oracle.
//!
//! Where N is odd every value is a small multiple of 1/8, scales are powers of two: products and sums are exact in any
//! order, many rows tie, and some are equal. Where N is even values are normal, so that a row has about unit norm.

use super::{CODE_PITCH, NO_ROW};
use crate::op::{Dims, Expected};
use crate::tensor::{Dtype, HostTensor};
use crate::verify::normal;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// How far from its floor a score of normal values is certain to stay on its side: four roundings to bf16 of products
/// whose terms sum to 1.
const NEAR_FLOOR: f64 = 4.0 / 256.0;

fn on_grid(d: &Dims) -> bool {
    d["N"] % 2 == 1
}

/// `count` vectors of D elements.
fn vectors(d: &Dims, count: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let width = d["D"];
    let scale = 1.0 / (width as f64).sqrt();
    let element = |rng: &mut ChaCha8Rng| match on_grid(d) {
        true => (rng.random_range(0..7) as f64 - 3.0) / 8.0,
        false => normal(rng) * scale,
    };
    (0..count * width).map(|_| element(rng)).collect()
}

/// N rows, every seventh a copy of the one three before it.
fn rows(d: &Dims, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let (n, width) = (d["N"], d["D"]);
    let mut rows = vectors(d, n, rng);
    for copy in (3..n).step_by(7) {
        rows.copy_within((copy - 3) * width..(copy - 2) * width, copy * width);
    }
    rows
}

pub fn queries(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    HostTensor::from_f64(Dtype::F32, &[d["Q"], d["D"]], &vectors(d, d["Q"], rng))
}

pub fn rows_f32(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    HostTensor::from_f64(Dtype::F32, &[d["N"], d["D"]], &rows(d, rng))
}

pub fn rows_f16(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    HostTensor::from_f64(Dtype::F16, &[d["N"], d["D"]], &rows(d, rng))
}

/// Codes of vectors: on the grid the eighths, else such that the largest is ±127; padded with zeros.
fn codes(d: &Dims, values: &[f64]) -> HostTensor {
    let (width, pitch) = (d["D"], d["D"].next_multiple_of(CODE_PITCH));
    let mut codes = vec![0i8; values.len() / width * pitch];
    for (codes, values) in codes.chunks_mut(pitch).zip(values.chunks(width)) {
        let largest = values.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
        let steps = if on_grid(d) { 8.0 } else { 127.0 / largest };
        codes.iter_mut().zip(values).for_each(|(code, v)| *code = (v * steps).round() as i8);
    }
    HostTensor::from_slice(Dtype::I8, &[values.len() / width, pitch], &codes)
}

pub fn query_codes(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    codes(d, &vectors(d, d["Q"], rng))
}

pub fn row_codes(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    codes(d, &rows(d, rng))
}

/// Powers of two on the grid, else steps that give about unit norm.
fn scales(d: &Dims, count: usize, rng: &mut ChaCha8Rng) -> HostTensor {
    let step = 1.0 / (40.0 * (d["D"] as f64).sqrt());
    let scale = |rng: &mut ChaCha8Rng| match on_grid(d) {
        true => [0.125, 0.25][rng.random_range(0..2usize)],
        false => step * (0.75 + 0.5 * rng.random::<f64>()),
    };
    HostTensor::from_f64(Dtype::F32, &[count], &(0..count).map(|_| scale(rng)).collect::<Vec<_>>())
}

pub fn query_scales(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    scales(d, d["Q"], rng)
}

pub fn row_scales(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    scales(d, d["N"], rng)
}

/// Two rows of three pass, bits beyond N are anything; of fewer than 32 rows none passes.
pub fn filter(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let words = d["N"].div_ceil(32) * d["FILTER"];
    let bit = |rng: &mut ChaCha8Rng| rng.random_range(0..3) != 0 && d["N"] >= 32;
    let word = |rng: &mut ChaCha8Rng| (0..32).fold(0u32, |word, i| word | (bit(rng) as u32) << i);
    HostTensor::from_u32(&[words], &(0..words).map(|_| word(rng)).collect::<Vec<_>>())
}

/// None for every other query; then in turn one that few scores reach and one that about half do, some exactly.
pub fn floor(d: &Dims, _: &mut ChaCha8Rng) -> HostTensor {
    let floor = |q: usize| [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0625][q % 4];
    HostTensor::from_f32(&[d["Q"]], &(0..d["Q"]).map(floor).collect::<Vec<_>>())
}

/// f32 and f16: q, rows, filter, floor.
pub fn oracle_plain(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    oracle(d, &args[0].to_f64(), &args[1].to_f64(), args[2].u32(), args[3].f32())
}

/// i8: q, q_scales, rows, scales, filter, floor.
pub fn oracle_codes(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let decode = |codes: &HostTensor, scales: &HostTensor| {
        let (codes, pitch) = (codes.to_f64(), d["D"].next_multiple_of(CODE_PITCH));
        let rows = codes.chunks(pitch).zip(scales.to_f64());
        rows.flat_map(|(row, scale)| row[..d["D"]].iter().map(move |v| v * scale).collect::<Vec<_>>()).collect()
    };
    let (q, rows): (Vec<f64>, Vec<f64>) = (decode(&args[0], &args[1]), decode(&args[2], &args[3]));
    oracle(d, &q, &rows, args[4].u32(), args[5].f32())
}

/// The definition in f64: ids, then scores.
fn oracle(d: &Dims, q: &[f64], rows: &[f64], filter: &[u32], floor: &[f32]) -> Vec<Expected> {
    let (n, width, k, splits) = (d["N"], d["D"], d["K"], d["S"]);
    let passes = |row: usize| filter.is_empty() || filter[row / 32] >> (row % 32) & 1 == 1;
    let mut ids = Expected { value: Vec::new(), magnitude: Vec::new() };
    let mut scores = Expected { value: Vec::new(), magnitude: Vec::new() };
    let mut place = |id: f64, id_magnitude: f64, score: f64, magnitude: f64| {
        ids.value.push(id);
        ids.magnitude.push(id_magnitude);
        scores.value.push(score);
        scores.magnitude.push(magnitude);
    };
    for (q, floor) in q.chunks(width).zip(floor) {
        for split in 0..splits {
            let len = n.div_ceil(splits);
            let range = (split * len).min(n)..((split + 1) * len).min(n);
            let mut largest = 0.0f64;
            let mut found: Vec<(f64, usize)> = Vec::new();
            for row in range.filter(|row| passes(*row)) {
                let terms = || q.iter().zip(&rows[row * width..]).map(|(a, b)| a * b);
                largest = largest.max(terms().map(f64::abs).sum());
                found.push((terms().sum(), row));
            }
            found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for j in 0..k {
                let Some((score, row)) = found.get(j).copied() else {
                    place(NO_ROW as f64, 0.0, f64::NEG_INFINITY, 0.0);
                    continue;
                };
                let (id, floor) = ((d["BASE"] + row) as f64, *floor as f64);
                match score >= floor {
                    true if on_grid(d) => place(id, 0.0, score, 0.0),
                    // Whether it reaches the floor is a matter of rounding.
                    _ if !on_grid(d) && (score - floor).abs() < NEAR_FLOOR * largest => {
                        place(id, f64::INFINITY, score, f64::INFINITY)
                    }
                    true => place(id, f64::INFINITY, score, largest),
                    false => place(NO_ROW as f64, 0.0, f64::NEG_INFINITY, 0.0),
                }
            }
        }
    }
    vec![ids, scores]
}
