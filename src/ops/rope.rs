//! `rope`: rotary position embedding, the two halves of a head paired                  Su et al. 2021, arXiv 2104.09864
//!
//! Besides the op, [`table`] makes the cosines and sines it reads, once for a model.

use super::simd;
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rayon::prelude::*;
use std::f32::consts::PI;

/// Rotation of every head of every row by the row's position.
pub static ROPE: OpSpec = OpSpec {
    name: "rope",
    format: "f32",
    formula:
        "y[i] = x[i]·cos_i − x[i+D/2]·sin_i; y[i+D/2] = x[i+D/2]·cos_i + x[i]·sin_i, i < D/2, in each head of x[M,H*D]",
    dims: &["M", "H", "D", "C"],
    scalars: &[],
    args: &[
        input("x", ArgType::Act, &["M", "H*D"], Fill::Normal),
        input("position", ArgType::Is(Dtype::U32), &["M"], Fill::Below("C")),
        input(
            "table",
            ArgType::Is(Dtype::F32),
            &["C", "D"],
            Fill::With(|d, _| {
                HostTensor::from_f32(&[d["C"], d["D"]], &table(d["C"], &frequencies(d["D"], 10_000.0, Scaling::None)))
            }),
        ),
        output("y", ArgType::Act, &["M", "H*D"]),
    ],
    oracle,
    cost: |d| {
        let elements = d["M"] * d["H"] * d["D"];
        // Rows at different positions read different rows of the table, but no more than there are.
        let table = d["M"].min(d["C"]) * d["D"];
        Cost { flops: 3 * elements as u64, bytes: (8 * elements + 4 * d["M"] + 4 * table) as u64 }
    },
    tolerance: Tolerance {
        roundings: |_| 2.01,
        nmse: 1e-13,
        why: "two products and their sum: each term is rounded twice, (1 + u)² − 1 = 2 u and a little",
    },
    cases: &[
        case(&[1, 1, 2, 1], "the smallest"),
        case(&[7, 3, 66, 33], "half a head of 33: tails of a warp and of a vec4"),
        case(&[65, 7, 18, 257], "odd numbers of rows, heads and pairs"),
        case(&[257, 1, 32, 65], "more rows than positions"),
        case(&[128, 9, 64, 2048], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] =
    &[Kernel { stem: "rope_f32_rows", source: Source::Rust(rows), act: Dtype::F32, launch: no_grid, supports: always }];

const PTX: &[Kernel] = &[ptx!("rope_f32_warp", four_heads_a_block, always)];

/// A block of 128 threads holds four warps, each warp a head of a row.
fn four_heads_a_block(d: &Dims) -> Launch {
    Launch { grid: [d["M"] as u32, d["H"].div_ceil(4) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[
    wgsl!("rope_f32_flat", |d| flat(d["M"] * d["H"] * d["D"] / 2), always),
    wgsl!("rope_f32_vec4", |d| flat(d["M"] * d["H"] * d["D"] / 8), |d, _| d["D"].is_multiple_of(8)),
];

/// How a model's context was stretched beyond the one it was trained with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all, or by the tensor `rope_freqs.weight` of a GGUF file, [D/2], which divides frequencies.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// Frequencies of long wavelengths divided by `factor`, of short ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// At least 1.
        factor: f32,
        /// Wavelengths over `original_max / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Wavelengths under `original_max / high_freq_factor` are short.
        high_freq_factor: f32,
        /// Positions seen in pretraining.
        original_max: usize,
    },
}

/// The op's `table`, [positions, head_dim], of [`frequencies`] f_i: row p holds cos(p·f_i) for i < head_dim/2, then
/// sin(p·f_i). Angles are rounded to f32 as the models' training code does; the cosines and sines are those of the
/// rounded angles.
pub fn table(positions: usize, frequencies: &[f32]) -> Vec<f32> {
    let mut table = Vec::with_capacity(positions * 2 * frequencies.len());
    for position in 0..positions {
        let angles = frequencies.iter().map(|f| (position as f32 * f) as f64);
        table.extend(angles.clone().map(|angle| angle.cos() as f32));
        table.extend(angles.map(|angle| angle.sin() as f32));
    }
    table
}

/// f_i = theta^(−2i/head_dim) for i < head_dim/2, scaled, each step in f32.
pub fn frequencies(head_dim: usize, theta: f32, scaling: Scaling) -> Vec<f32> {
    let plain = (0..head_dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        1.0 / (theta as f64).powf(exponent as f64) as f32
    });
    match scaling {
        Scaling::None => plain.collect(),
        Scaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
            let context = original_max as f32;
            let stretch = |f: f32| {
                let wavelength = 2.0 * PI / f;
                if wavelength > context / low_freq_factor {
                    f / factor
                } else if wavelength < context / high_freq_factor {
                    f
                } else {
                    let keep = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - keep) * f / factor + keep * f
                }
            };
            plain.map(stretch).collect()
        }
    }
}

/// The definition, by indices.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (h, dim) = (d["H"], d["D"]);
    let (x, position, table) = (args[0].to_f64(), args[1].u32(), args[2].to_f64());

    let mut expected = Expected { value: vec![0.0; x.len()], magnitude: vec![0.0; x.len()] };
    for (row, &p) in position.iter().enumerate() {
        for head in 0..h {
            for i in 0..dim / 2 {
                let at = p as usize * dim + i;
                let (cos, sin) = (table[at], table[at + dim / 2]);
                let first = (row * h + head) * dim + i;
                let second = first + dim / 2;
                expected.value[first] = x[first] * cos - x[second] * sin;
                expected.value[second] = x[second] * cos + x[first] * sin;
                expected.magnitude[first] = (x[first] * cos).abs() + (x[second] * sin).abs();
                expected.magnitude[second] = (x[second] * cos).abs() + (x[first] * sin).abs();
            }
        }
    }
    vec![expected]
}

/// CPU: rows in parallel, each reading its row of the table once for all heads.
fn rows(d: &Dims, args: &mut [Slice<'_>]) {
    let (h, dim) = (d["H"], d["D"]);
    let [x, position, table, y] = args else { unreachable!("four arguments") };
    let (x, position, table) = (x.f32(), position.u32(), table.f32());

    let one_row = |(y, (x, p)): (&mut [f32], (&[f32], &u32))| {
        let (cos, sin) = table[*p as usize * dim..][..dim].split_at(dim / 2);
        for (y, x) in y.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
            let (y0, y1) = y.split_at_mut(dim / 2);
            let (x0, x1) = x.split_at(dim / 2);
            for ((((y, a), b), cos), sin) in y0.iter_mut().zip(x0).zip(x1).zip(cos).zip(sin) {
                *y = a * cos - b * sin;
            }
            for ((((y, a), b), cos), sin) in y1.iter_mut().zip(x0).zip(x1).zip(cos).zip(sin) {
                *y = b * cos + a * sin;
            }
        }
    };
    let grain = simd::grain(0.2 * (h * dim) as f64);
    let inputs = x.par_chunks(h * dim).zip(position);
    y.f32_mut().par_chunks_mut(h * dim).zip(inputs).with_min_len(grain).for_each(one_row);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: Scaling =
        Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max: 8192 };

    #[test]
    fn table_holds_cosines_then_sines() {
        let table = table(9, &frequencies(64, 100_000.0, Scaling::None));
        assert_eq!(table[..32], [1.0; 32]);
        assert_eq!(table[32..64], [0.0; 32]);
        // f_5 = 100000^(−10/64) = 0.165481709994318
        let angle = 7.0 * 0.165_481_709_994_318_f64;
        assert!((table[7 * 64 + 5] as f64 - angle.cos()).abs() < 2e-7);
        assert!((table[7 * 64 + 32 + 5] as f64 - angle.sin()).abs() < 2e-7);
    }

    #[test]
    fn linear_scaling_moves_positions() {
        let [plain, scaled] =
            [Scaling::None, Scaling::Linear { factor: 2.0 }].map(|s| table(9, &frequencies(8, 1e4, s)));
        assert_eq!(plain[4 * 8..5 * 8], scaled[8 * 8..]);
    }

    #[test]
    fn llama3_scaling_keeps_short_and_divides_long_wavelengths() {
        let plain = frequencies(128, 500_000.0, Scaling::None);
        let scaled = frequencies(128, 500_000.0, LLAMA3);
        assert_eq!(plain[..29], scaled[..29]);
        for i in 35..64 {
            assert_eq!(scaled[i], plain[i] / 8.0);
        }
        // Between: the ramp in exact arithmetic, a sum of terms a few times its size.
        assert!((scaled[31] as f64 / 0.000_856_751_412_9 - 1.0).abs() < 1e-6);
    }
}
