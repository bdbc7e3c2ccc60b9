//! Weights as ops take them: the arguments of each format, once for every op that has weights, and the view a CPU kernel
//! reads them through. What the bytes mean is told in [`crate::quant`].

use super::vector::{Vector, LANES};
use crate::op::*;
use crate::quant::{self, Format};
use crate::tensor::{Dtype, HostTensor};

const fn part(name: &'static str, dtype: Dtype, shape: &'static [&'static str], fill: Fill) -> Arg {
    input(name, ArgType::Is(dtype), shape, fill)
}

/// Scales of random test weights: both signs occur in files.
const SCALE_FILL: Fill = Fill::Uniform(-0.1, 0.1);

/// Plain weights.
pub const W_F32: Arg = part("w", Dtype::F32, &["N", "K"], Fill::Normal);
/// Plain weights.
pub const W_F16: Arg = part("w", Dtype::F16, &["N", "K"], Fill::Normal);
/// Plain weights.
pub const W_BF16: Arg = part("w", Dtype::BF16, &["N", "K"], Fill::Normal);
/// Two 4-bit codes a byte.
pub const CODES_4BIT: Arg = part("codes", Dtype::U8, &["N", "K/2"], Fill::Bits);
/// 8-bit codes.
pub const CODES_I8: Arg = part("codes", Dtype::I8, &["N", "K"], Fill::Bits);
/// A group's scale.
pub const SCALES: Arg = input("scales", ArgType::Scale, &["N", "K/G"], SCALE_FILL);
/// A group's value of code 0.
pub const MINS: Arg = input("mins", ArgType::Scale, &["N", "K/G"], Fill::Uniform(-0.8, 0.8));
/// A group's value of code 0, where the dim `AFFINE` is 1.
pub const MINS_IF_AFFINE: Arg = input("mins", ArgType::Scale, &["AFFINE*N", "K/G"], Fill::Uniform(-0.8, 0.8));
/// A block's largest absolute value.
pub const ABSMAX: Arg = part("absmax", Dtype::F32, &["N", "K/64"], Fill::Uniform(0.05, 1.0));
/// The same in 8 bits.
pub const ABSMAX_U8: Arg = part("absmax", Dtype::U8, &["N", "K/64"], Fill::Bits);
/// Values of the 8-bit codes.
pub const ABSMAX_CODE: Arg = part("code", Dtype::F32, &["256"], Fill::Uniform(-1.0, 1.0));
/// Scale of 256 blocks' codes, counted through the whole matrix.
pub const ABSMAX2: Arg = part("absmax2", Dtype::F32, &["N*K/64/256"], Fill::Uniform(0.0, 0.2));
/// Mean of all absmax.
pub const ABSMAX_OFFSET: Arg = part("offset", Dtype::F32, &["1"], Fill::Uniform(0.2, 0.6));

/// The format of an op's weights, its group and flags read from the dims.
pub fn format_of(word: &str, d: &Dims) -> Format {
    match word {
        "f32" => Format::F32,
        "f16" => Format::F16,
        "bf16" => Format::BF16,
        "q4" => Format::Q4 { group: d["G"], wide: d["WIDE"] == 1 },
        "q8" => Format::Q8 { group: d["G"], wide: d["WIDE"] == 1, affine: d["AFFINE"] == 1 },
        "nf4" => Format::Nf4,
        "nf4dq" => Format::Nf4Dq,
        _ => panic!("no weight format {word}"),
    }
}

/// How many arguments the weights of a format take.
pub fn part_count(word: &str) -> usize {
    match word {
        "f32" | "f16" | "bf16" => 1,
        "nf4" => 2,
        "q4" | "q8" => 3,
        "nf4dq" => 5,
        _ => panic!("no weight format {word}"),
    }
}

/// The weights' exact values and magnitudes, row-major `[N,K]`, for oracles.
pub fn exact(word: &str, d: &Dims, parts: &[HostTensor]) -> (Vec<f64>, Vec<f64>) {
    quant::decode_with_magnitude(parts, format_of(word, d), d["N"], d["K"])
}

/// Bytes of the weights: what a matmul must read at least.
pub fn weight_bytes(word: &str, d: &Dims) -> usize {
    format_of(word, d).bytes(d["N"], d["K"]).expect("dims of a launch fit memory")
}

/// Rows whose scales are read at once.
pub const SCALE_ROWS: usize = 16;

/// One number a group, in either precision.
#[derive(Clone, Copy)]
pub enum Scales<'a> {
    /// f16 bits.
    Half(&'a [u16]),
    /// f32.
    Full(&'a [f32]),
}

impl<'a> Scales<'a> {
    fn new(slice: &'a Slice<'_>, wide: bool) -> Scales<'a> {
        if wide {
            Scales::Full(slice.f32())
        } else {
            Scales::Half(slice.as_slice())
        }
    }

    /// `out.len()` values from `first` on, as f32.
    #[inline(always)]
    fn read<V: Vector>(&self, first: usize, out: &mut [f32]) {
        let range = first..first + out.len();
        match self {
            Scales::Full(values) => out.copy_from_slice(&values[range]),
            Scales::Half(bits) => {
                let (chunks, tail) = bits[range].as_chunks::<LANES>();
                let (out_chunks, out_tail) = out.as_chunks_mut::<LANES>();
                for (out, bits) in out_chunks.iter_mut().zip(chunks) {
                    V::load_f16(bits).store(out);
                }
                for (out, bits) in out_tail.iter_mut().zip(tail) {
                    *out = half::f16::from_bits(*bits).to_f32();
                }
            }
        }
    }
}

/// A weight matrix `[N,K]` in a kernel's arguments.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub enum Weights<'a> {
    F32 { w: &'a [f32] },
    F16 { w: &'a [u16] },
    Bf16 { w: &'a [u16] },
    Q4 { codes: &'a [u8], scales: Scales<'a>, mins: Scales<'a>, group: usize },
    Q8 { codes: &'a [i8], scales: Scales<'a>, mins: Option<Scales<'a>>, group: usize },
    Nf4 { codes: &'a [u8], absmax: &'a [f32] },
    Nf4Dq { codes: &'a [u8], absmax: &'a [u8], code: &'a [f32], absmax2: &'a [f32], offset: f32 },
}

impl<'a> Weights<'a> {
    /// From the arguments that hold the parts of a format.
    pub fn new(word: &str, d: &Dims, parts: &'a [Slice<'_>]) -> Weights<'a> {
        match (format_of(word, d), parts) {
            (Format::F32, [w]) => Weights::F32 { w: w.f32() },
            (Format::F16, [w]) => Weights::F16 { w: w.as_slice() },
            (Format::BF16, [w]) => Weights::Bf16 { w: w.as_slice() },
            (Format::Q4 { group, wide }, [codes, scales, mins]) => Weights::Q4 {
                codes: codes.as_slice(),
                scales: Scales::new(scales, wide),
                mins: Scales::new(mins, wide),
                group,
            },
            (Format::Q8 { group, wide, affine }, [codes, scales, mins]) => Weights::Q8 {
                codes: codes.as_slice(),
                scales: Scales::new(scales, wide),
                mins: affine.then(|| Scales::new(mins, wide)),
                group,
            },
            (Format::Nf4, [codes, absmax]) => Weights::Nf4 { codes: codes.as_slice(), absmax: absmax.f32() },
            (Format::Nf4Dq, [codes, absmax, code, absmax2, offset]) => Weights::Nf4Dq {
                codes: codes.as_slice(),
                absmax: absmax.as_slice(),
                code: code.f32(),
                absmax2: absmax2.f32(),
                offset: offset.f32()[0],
            },
            _ => panic!("{} arguments for weights in {word}", parts.len()),
        }
    }

    /// Columns that share one scale; 1 for plain weights.
    pub fn group(&self) -> usize {
        match self {
            Weights::F32 { .. } | Weights::F16 { .. } | Weights::Bf16 { .. } => 1,
            Weights::Q4 { group, .. } | Weights::Q8 { group, .. } => *group,
            Weights::Nf4 { .. } | Weights::Nf4Dq { .. } => quant::NF4_BLOCK,
        }
    }

    /// Scales in a row of `k` columns; 0 for plain weights.
    pub fn groups(&self, k: usize) -> usize {
        if self.group() == 1 {
            0
        } else {
            k / self.group()
        }
    }

    /// True where a byte holds two codes: the vector bodies then take even columns and odd columns apart.
    pub fn is_4bit(&self) -> bool {
        matches!(self, Weights::Q4 { .. } | Weights::Nf4 { .. } | Weights::Nf4Dq { .. })
    }

    /// Scales, and mins where there are any, of the rows from `row` on: as many whole rows as `scales` holds, K/group a
    /// row. Several rows at once leave no tail of half a vector at each row's end.
    #[inline(always)]
    pub fn read_scales<V: Vector>(&self, row: usize, groups: usize, scales: &mut [f32], mins: &mut [f32]) {
        let first = row * groups;
        match self {
            Weights::F32 { .. } | Weights::F16 { .. } | Weights::Bf16 { .. } => {}
            Weights::Q4 { scales: s, mins: m, .. } | Weights::Q8 { scales: s, mins: Some(m), .. } => {
                s.read::<V>(first, scales);
                m.read::<V>(first, mins);
            }
            Weights::Q8 { scales: s, mins: None, .. } => s.read::<V>(first, scales),
            Weights::Nf4 { absmax, .. } => Scales::Full(absmax).read::<V>(first, scales),
            Weights::Nf4Dq { absmax, code, absmax2, offset, .. } => {
                for (i, scale) in scales.iter_mut().enumerate() {
                    let block = first + i;
                    *scale = code[absmax[block] as usize] * absmax2[block / quant::NF4_NESTED_BLOCK] + offset;
                }
            }
        }
    }

    /// True when a group has a value for code 0 of its own.
    pub fn has_mins(&self) -> bool {
        matches!(self, Weights::Q4 { .. } | Weights::Q8 { mins: Some(_), .. })
    }

    /// Row `row` as f32, K = `out.len()`, with the row's scales and mins.
    #[inline(always)]
    pub fn decode_row<V: Vector>(&self, row: usize, scales: &[f32], mins: &[f32], out: &mut [f32]) {
        let k = out.len();
        let plain = row * k..(row + 1) * k;
        match self {
            Weights::F32 { w } => out.copy_from_slice(&w[plain]),
            Weights::F16 { w } => Scales::Half(w).read::<V>(row * k, out),
            Weights::Bf16 { w } => {
                let (out_chunks, out_tail) = out.as_chunks_mut::<LANES>();
                let (chunks, tail) = w[plain].as_chunks::<LANES>();
                for (out, bits) in out_chunks.iter_mut().zip(chunks) {
                    V::load_bf16(bits).store(out);
                }
                for (out, bits) in out_tail.iter_mut().zip(tail) {
                    *out = f32::from_bits((*bits as u32) << 16);
                }
            }
            Weights::Q8 { codes, group, mins: affine, .. } => {
                let (codes, group_lanes) = (&codes[plain], group / LANES);
                for (i, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    let scale = V::splat(scales[i / group_lanes]);
                    let value = V::load_i8(&codes[i * LANES..]);
                    match affine {
                        Some(_) => value.mul_add(scale, V::splat(mins[i / group_lanes])),
                        None => value.mul(scale),
                    }
                    .store(out);
                }
            }
            Weights::Q4 { codes, group, .. } => {
                // Sixteen bytes hold 32 columns; a group may be 16 of them.
                let codes = &codes[row * k / 2..(row + 1) * k / 2];
                let affine = |v: V, group: usize| v.mul_add(V::splat(scales[group]), V::splat(mins[group]));
                let (bytes, tail) = codes.as_chunks::<LANES>();
                for (i, (bytes, out)) in bytes.iter().zip(out.chunks_exact_mut(2 * LANES)).enumerate() {
                    let (even, odd) = V::load_nibbles(bytes);
                    let (first, second) = V::interleave(V::from_codes(even), V::from_codes(odd));
                    affine(first, i * 32 / group).store(out);
                    affine(second, (i * 32 + 16) / group).store(&mut out[LANES..]);
                }
                let done = k - 2 * tail.len();
                for (i, byte) in tail.iter().enumerate() {
                    for (j, code) in [byte & 15, byte >> 4].into_iter().enumerate() {
                        let at = done + 2 * i + j;
                        out[at] = scales[at / group] * code as f32 + mins[at / group];
                    }
                }
            }
            Weights::Nf4 { codes, .. } | Weights::Nf4Dq { codes, .. } => {
                let codes = &codes[row * k / 2..(row + 1) * k / 2];
                let levels = V::table(&quant::nf4::LEVELS);
                for (i, out) in out.chunks_exact_mut(2 * LANES).enumerate() {
                    let (odd, even) = V::load_nibbles(&codes[i * LANES..]);
                    let (first, second) = V::interleave(V::look_up(levels, even), V::look_up(levels, odd));
                    let scale = V::splat(scales[i * 2 * LANES / quant::NF4_BLOCK]);
                    first.mul(scale).store(out);
                    second.mul(scale).store(&mut out[LANES..]);
                }
            }
        }
    }

    /// Rows from `first` on into `out`, whole rows of `k`.
    #[inline(always)]
    pub fn decode_rows<V: Vector>(&self, first: usize, k: usize, out: &mut [f32]) {
        let groups = self.groups(k);
        let mut scales = vec![0.0; SCALE_ROWS * groups];
        let mut mins = vec![0.0; SCALE_ROWS * groups];
        for (block, out) in out.chunks_mut(SCALE_ROWS * k.max(1)).enumerate() {
            let row = first + block * SCALE_ROWS;
            let used = out.len() / k * groups;
            self.read_scales::<V>(row, groups, &mut scales[..used], &mut mins[..used]);
            for (i, out) in out.chunks_mut(k).enumerate() {
                let of_row = i * groups..(i + 1) * groups;
                self.decode_row::<V>(row + i, &scales[of_row.clone()], &mins[of_row], out);
            }
        }
    }
}
