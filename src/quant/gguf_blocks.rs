//! GGUF's quantized blocks, and how each becomes a device format without a change of value.
//!
//! Blocks hold 32 or 256 consecutive weights of a row; a byte of 4-bit codes holds two weights that lie 16 or 32
//! apart. The device formats hold codes and scales in arrays of their own and neighbouring codes in a byte. Blocks
//! are stored one after another in both, so re-laying is a walk over blocks that never looks at rows.
//!
//! ```text
//! block   bytes, in order                                    weight                          becomes
//! Q4_0    d f16, 16 codes                                    d*(q - 8)                       q4 (32, f16)
//! Q4_1    d f16, m f16, 16 codes                             d*q + m                         q4 (32, f16)
//! Q8_0    d f16, 32 codes                                    d*q                             q8 (32, f16)
//! Q4_K    d f16, dmin f16, 12 scales, 128 codes              (d*sc)*q - dmin*mn              q4 (32, f32)
//! Q5_K    d f16, dmin f16, 12 scales, 32 high, 128 low       (d*sc)*q - dmin*mn              q8 (32, f32, affine)
//! Q6_K    128 low, 64 high, 16 scales i8, d f16              (d*sc)*(q - 32)                 q8 (16, f32)
//! ```
//!
//! Why no value changes. An f16 is an integer of at most 11 bits times 2^-24 or more, below 2^16; an f32 keeps 24
//! bits and reaches far beyond both ends, so a product whose factors' bits add up to 24 or less is exact in f32.
//!
//! - Q4_0: d*(q-8) has 11+4 bits. As scale*code + min with min = -8d: d*q has 11+4 bits, -8d has the bits of d, and
//!   their sum is d*(q-8) itself, so no operation rounds. -8d is exact in f16 up to |d| = 8188 (8 * 8188 = 65504, the
//!   largest f16; below it only the exponent changes, and a subnormal times 8 loses no bit); a matrix with a larger
//!   |d| becomes q4 with f32 scales. A weight that is zero may change its sign: 0*d against 8d - 8d.
//! - Q4_1: the same numbers in the same formula; d*q has 11+4 bits, and the one rounding is that of + m in both.
//! - Q8_0: the same numbers in the same formula; d*q has 11+8 bits.
//! - Q4_K: d*sc and dmin*mn have 11+6 bits: exact in f32, stored as scale and -min. (d*sc)*q has 17+4 bits. The one
//!   rounding is that of the sum, in both; a - b and a + (-b) round alike.
//! - Q5_K: as Q4_K with (d*sc)*q of 17+5 bits; codes 0..=31 need the i8 of q8.
//! - Q6_K: sc is -128..=127, so d*sc has 11+7 bits (128 is one bit), and (d*sc)*(q-32) with q-32 in -32..=31 has 18+5.

use super::format::{check_parts, empty_parts};
use super::{Error, Format, Packed, Result};
use half::f16;
use rayon::prelude::*;

/// The ggml block types that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl GgmlType {
    /// The type of a number in a GGUF file; any other is refused by its published name.
    pub fn from_id(id: u32) -> Result<GgmlType> {
        let name = match id {
            0 => return Ok(GgmlType::F32),
            1 => return Ok(GgmlType::F16),
            2 => return Ok(GgmlType::Q4_0),
            3 => return Ok(GgmlType::Q4_1),
            8 => return Ok(GgmlType::Q8_0),
            12 => return Ok(GgmlType::Q4K),
            13 => return Ok(GgmlType::Q5K),
            14 => return Ok(GgmlType::Q6K),
            30 => return Ok(GgmlType::BF16),
            4 => "Q4_2",
            5 => "Q4_3",
            6 => "Q5_0",
            7 => "Q5_1",
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            31 => "Q4_0_4_4",
            32 => "Q4_0_4_8",
            33 => "Q4_0_8_8",
            34 => "TQ1_0",
            35 => "TQ2_0",
            36 => "IQ4_NL_4_4",
            37 => "IQ4_NL_4_8",
            38 => "IQ4_NL_8_8",
            39 => "MXFP4",
            40 => "NVFP4",
            41 => "Q1_0",
            42 => "Q2_0",
            _ => return Err(Error::UnknownType(id)),
        };
        Err(Error::UnsupportedType { id, name })
    }

    /// The published name.
    pub const fn name(self) -> &'static str {
        match self {
            GgmlType::F32 => "F32",
            GgmlType::F16 => "F16",
            GgmlType::BF16 => "BF16",
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q4_1 => "Q4_1",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q4K => "Q4_K",
            GgmlType::Q5K => "Q5_K",
            GgmlType::Q6K => "Q6_K",
        }
    }

    /// Weights in one block.
    pub const fn block(self) -> usize {
        match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => 1,
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q8_0 => 32,
            GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            GgmlType::F32 => 4,
            GgmlType::F16 | GgmlType::BF16 => 2,
            GgmlType::Q4_0 => 2 + 16,
            GgmlType::Q4_1 => 2 + 2 + 16,
            GgmlType::Q8_0 => 2 + 32,
            GgmlType::Q4K => 2 + 2 + 12 + 128,
            GgmlType::Q5K => 2 + 2 + 12 + 32 + 128,
            GgmlType::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// The number in a GGUF file.
    pub const fn id(self) -> u32 {
        match self {
            GgmlType::F32 => 0,
            GgmlType::F16 => 1,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q8_0 => 8,
            GgmlType::Q4K => 12,
            GgmlType::Q5K => 13,
            GgmlType::Q6K => 14,
            GgmlType::BF16 => 30,
        }
    }

    /// Bytes of a `rows` x `cols` matrix of this type. Errors: a row that ends inside a block, a size that overflows.
    pub fn matrix_bytes(self, rows: usize, cols: usize) -> Result<usize> {
        if !cols.is_multiple_of(self.block()) {
            return Err(Error::Block { ty: self, block: self.block(), cols });
        }
        (cols / self.block())
            .checked_mul(self.block_bytes())
            .and_then(|row| row.checked_mul(rows))
            .ok_or(Error::Overflow { rows, cols })
    }
}

/// Blocks that one task re-lays: up to a megabyte, small enough to share out evenly.
const RUN: usize = 4096;

/// Re-lays the blocks of a `rows` x `cols` matrix, as a GGUF file holds them, into the format of the module's table;
/// F32, F16 and BF16 are copied. Runs of blocks in parallel.
///
/// Errors: rows that end inside a block, another number of bytes than the dims ask for, a scale or minimum that is
/// NaN or infinite (by the row and first column of its block).
pub fn relay(ty: GgmlType, bytes: &[u8], rows: usize, cols: usize) -> Result<Packed> {
    let expected = ty.matrix_bytes(rows, cols)?;
    if bytes.len() != expected {
        return Err(Error::Length { what: "bytes of the matrix's blocks", expected, found: bytes.len() });
    }
    let (q4, q4_wide) = (Format::Q4 { group: 32, wide: false }, Format::Q4 { group: 32, wide: true });
    match ty {
        GgmlType::F32 => copy(Format::F32, bytes, rows, cols),
        GgmlType::F16 => copy(Format::F16, bytes, rows, cols),
        GgmlType::BF16 => copy(Format::BF16, bytes, rows, cols),
        GgmlType::Q4_0 => match relay_blocks(ty, relay_q4_0, q4, bytes, rows, cols) {
            Err(Error::Range { .. }) => relay_blocks(ty, relay_q4_0_wide, q4_wide, bytes, rows, cols),
            result => result,
        },
        GgmlType::Q4_1 => relay_blocks(ty, relay_q4_1, q4, bytes, rows, cols),
        GgmlType::Q8_0 => {
            let q8 = Format::Q8 { group: 32, wide: false, affine: false };
            relay_blocks(ty, relay_q8_0, q8, bytes, rows, cols)
        }
        GgmlType::Q4K => relay_blocks(ty, relay_q4_k, q4_wide, bytes, rows, cols),
        GgmlType::Q5K => {
            let q8 = Format::Q8 { group: 32, wide: true, affine: true };
            relay_blocks(ty, relay_q5_k, q8, bytes, rows, cols)
        }
        GgmlType::Q6K => {
            let q8 = Format::Q8 { group: 16, wide: true, affine: false };
            relay_blocks(ty, relay_q6_k, q8, bytes, rows, cols)
        }
    }
}

fn copy(format: Format, bytes: &[u8], rows: usize, cols: usize) -> Result<Packed> {
    const PIECE: usize = 1 << 20;
    format.check(rows, cols)?;
    let mut parts = empty_parts(format, rows, cols);
    let out = parts[0].bytes.as_mut_slice().par_chunks_mut(PIECE);
    out.zip(bytes.par_chunks(PIECE)).for_each(|(out, bytes)| out.copy_from_slice(bytes));
    Ok(Packed { format, rows, cols, parts })
}

/// The blocks of a run, and where each of its parts goes; `mins` is empty where the format has none.
struct Run<'a> {
    blocks: &'a [u8],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    mins: &'a mut [u8],
}

/// What stops a run: the number in block `block` of it that is infinite, NaN, or, when finite, beyond f16.
struct Stop {
    what: &'static str,
    block: usize,
    value: f32,
}

fn relay_blocks(
    ty: GgmlType,
    relay_run: fn(Run) -> std::result::Result<(), Stop>,
    format: Format,
    bytes: &[u8],
    rows: usize,
    cols: usize,
) -> Result<Packed> {
    format.check(rows, cols)?;
    let mut parts = empty_parts(format, rows, cols);
    let [codes, scales, mins] = &mut parts[..] else { unreachable!("q4 and q8 have three parts") };
    let blocks = rows * (cols / ty.block());
    let (codes_run, scales_run) = (codes.bytes.len() / blocks * RUN, scales.bytes.len() / blocks * RUN);
    let mut mins = mins.bytes.as_mut_slice().chunks_mut(scales_run);
    let out = codes.bytes.as_mut_slice().chunks_mut(codes_run).zip(scales.bytes.as_mut_slice().chunks_mut(scales_run));
    let runs: Vec<Run> = bytes
        .chunks(ty.block_bytes() * RUN)
        .zip(out)
        .map(|(blocks, (codes, scales))| Run { blocks, codes, scales, mins: mins.next().unwrap_or_default() })
        .collect();
    let stop = runs.into_par_iter().enumerate().find_map_first(|(at, run)| Some((at, relay_run(run).err()?)));
    let Some((at, Stop { what, block, value })) = stop else { return Ok(Packed { format, rows, cols, parts }) };
    let first = (at * RUN + block) * ty.block();
    let (row, col) = (first / cols, first % cols);
    Err(if value.is_finite() {
        Error::Range { what, row, col, value, dtype: "f16", advice: "take f32 scales (wide)" }
    } else {
        Error::NotFinite { what, row, col, value }
    })
}

/// The f16 stored in two bytes, refused when NaN or infinite.
fn finite(bytes: [u8; 2], what: &'static str, block: usize) -> std::result::Result<f32, Stop> {
    let value = f16::from_le_bytes(bytes).to_f32();
    if value.is_finite() {
        Ok(value)
    } else {
        Err(Stop { what, block, value })
    }
}

/// Of 8 bytes, the low and the high codes, each as 4 bytes with the earlier code in the low bits.
fn pair_codes(bytes: [u8; 8]) -> ([u8; 4], [u8; 4]) {
    // Four lanes of 16 bits, each two neighbouring bytes: their codes meet in the low byte of the lane.
    let word = u64::from_le_bytes(bytes);
    let low = (word & 0x000f_000f_000f_000f) | ((word >> 4) & 0x00f0_00f0_00f0_00f0);
    let high = ((word >> 4) & 0x000f_000f_000f_000f) | ((word >> 8) & 0x00f0_00f0_00f0_00f0);
    (squeeze(low), squeeze(high))
}

/// The low bytes of four 16-bit lanes.
fn squeeze(lanes: u64) -> [u8; 4] {
    let pairs = (lanes | lanes >> 8) & 0x0000_ffff_0000_ffff;
    ((pairs | pairs >> 16) as u32).to_le_bytes()
}

/// Two codes a byte, `LEN` weights apart, into neighbours: the low codes fill the first half of `out`, the high ones
/// the second.
fn relay_codes<const LEN: usize>(bytes: &[u8; LEN], out: &mut [u8; LEN]) {
    let (low_out, high_out) = out.split_at_mut(LEN / 2);
    let pairs = low_out.as_chunks_mut::<4>().0.iter_mut().zip(high_out.as_chunks_mut::<4>().0);
    for (bytes, (low, high)) in bytes.as_chunks::<8>().0.iter().zip(pairs) {
        (*low, *high) = pair_codes(*bytes);
    }
}

fn relay_q4_0(run: Run) -> std::result::Result<(), Stop> {
    let scales = run.scales.as_chunks_mut::<2>().0.iter_mut().zip(run.mins.as_chunks_mut::<2>().0);
    let blocks = run.blocks.as_chunks::<18>().0.iter().zip(run.codes.as_chunks_mut::<16>().0);
    for (at, ((block, codes), (scale, min))) in blocks.zip(scales).enumerate() {
        let [d0, d1, bytes @ ..] = block;
        let d = finite([*d0, *d1], "scale", at)?;
        let minus_8d = f16::from_f32(-8.0 * d);
        if !minus_8d.is_finite() {
            return Err(Stop { what: "minimum", block: at, value: -8.0 * d });
        }
        *scale = [*d0, *d1];
        *min = minus_8d.to_le_bytes();
        relay_codes(bytes, codes);
    }
    Ok(())
}

fn relay_q4_0_wide(run: Run) -> std::result::Result<(), Stop> {
    let scales = run.scales.as_chunks_mut::<4>().0.iter_mut().zip(run.mins.as_chunks_mut::<4>().0);
    let blocks = run.blocks.as_chunks::<18>().0.iter().zip(run.codes.as_chunks_mut::<16>().0);
    for (at, ((block, codes), (scale, min))) in blocks.zip(scales).enumerate() {
        let [d0, d1, bytes @ ..] = block;
        let d = finite([*d0, *d1], "scale", at)?;
        *scale = d.to_le_bytes();
        *min = (-8.0 * d).to_le_bytes();
        relay_codes(bytes, codes);
    }
    Ok(())
}

fn relay_q4_1(run: Run) -> std::result::Result<(), Stop> {
    let scales = run.scales.as_chunks_mut::<2>().0.iter_mut().zip(run.mins.as_chunks_mut::<2>().0);
    let blocks = run.blocks.as_chunks::<20>().0.iter().zip(run.codes.as_chunks_mut::<16>().0);
    for (at, ((block, codes), (scale, min))) in blocks.zip(scales).enumerate() {
        let [d0, d1, m0, m1, bytes @ ..] = block;
        finite([*d0, *d1], "scale", at)?;
        finite([*m0, *m1], "minimum", at)?;
        *scale = [*d0, *d1];
        *min = [*m0, *m1];
        relay_codes(bytes, codes);
    }
    Ok(())
}

fn relay_q8_0(run: Run) -> std::result::Result<(), Stop> {
    let blocks = run.blocks.as_chunks::<34>().0.iter().zip(run.codes.as_chunks_mut::<32>().0);
    for (at, ((block, codes), scale)) in blocks.zip(run.scales.as_chunks_mut::<2>().0).enumerate() {
        let [d0, d1, bytes @ ..] = block;
        finite([*d0, *d1], "scale", at)?;
        *scale = [*d0, *d1];
        *codes = *bytes;
    }
    Ok(())
}

/// The eight scales and eight mins, 6 bits each, of a block of Q4_K or Q5_K: the first four of each lie in the low
/// bits of bytes 0..4 and 4..8; of the rest, bytes 8..12 hold the low four bits and those bytes' top bits the others.
fn six_bits(s: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = s[j] & 63;
        mins[j] = s[j + 4] & 63;
        scales[j + 4] = (s[j + 8] & 15) | (s[j] >> 6) << 4;
        mins[j + 4] = (s[j + 8] >> 4) | (s[j + 4] >> 6) << 4;
    }
    (scales, mins)
}

/// The first 16 bytes of a block of Q4_K or Q5_K as eight f32 scales and mins, for block `at` of the run.
fn k_scales(
    block: &[u8],
    at: usize,
    scales: &mut [[u8; 4]; 8],
    mins: &mut [[u8; 4]; 8],
) -> std::result::Result<(), Stop> {
    let d = finite([block[0], block[1]], "scale", at)?;
    let dmin = finite([block[2], block[3]], "minimum", at)?;
    let (sc, mn) = six_bits(&block[4..16]);
    for j in 0..8 {
        scales[j] = (d * sc[j] as f32).to_le_bytes();
        mins[j] = (-(dmin * mn[j] as f32)).to_le_bytes();
    }
    Ok(())
}

fn relay_q4_k(run: Run) -> std::result::Result<(), Stop> {
    let (scales, mins) = (run.scales.as_chunks_mut::<4>().0, run.mins.as_chunks_mut::<4>().0);
    let scales = scales.as_chunks_mut::<8>().0.iter_mut().zip(mins.as_chunks_mut::<8>().0);
    let blocks = run.blocks.as_chunks::<144>().0.iter().zip(run.codes.as_chunks_mut::<128>().0);
    for (at, ((block, codes), (scales, mins))) in blocks.zip(scales).enumerate() {
        k_scales(block, at, scales, mins)?;
        // 32 bytes hold 64 weights: the low codes are the first 32 of them.
        for (bytes, codes) in block[16..].as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<32>().0) {
            relay_codes(bytes, codes);
        }
    }
    Ok(())
}

fn relay_q5_k(run: Run) -> std::result::Result<(), Stop> {
    let (scales, mins) = (run.scales.as_chunks_mut::<4>().0, run.mins.as_chunks_mut::<4>().0);
    let scales = scales.as_chunks_mut::<8>().0.iter_mut().zip(mins.as_chunks_mut::<8>().0);
    let blocks = run.blocks.as_chunks::<176>().0.iter().zip(run.codes.as_chunks_mut::<256>().0);
    for (at, ((block, codes), (scales, mins))) in blocks.zip(scales).enumerate() {
        k_scales(block, at, scales, mins)?;
        let (high, low) = block[16..].split_at(32);
        // As Q4_K, and bit g of high[j] is the fifth bit of weight 32g + j.
        for (j, (low, codes)) in low.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<64>().0).enumerate() {
            for l in 0..32 {
                codes[l] = (low[l] & 15) | (high[l] >> (2 * j) & 1) << 4;
                codes[l + 32] = (low[l] >> 4) | (high[l] >> (2 * j + 1) & 1) << 4;
            }
        }
    }
    Ok(())
}

fn relay_q6_k(run: Run) -> std::result::Result<(), Stop> {
    let scales = run.scales.as_chunks_mut::<4>().0.as_chunks_mut::<16>().0;
    let blocks = run.blocks.as_chunks::<210>().0.iter().zip(run.codes.as_chunks_mut::<256>().0);
    for (at, ((block, codes), scales)) in blocks.zip(scales).enumerate() {
        let d = finite([block[208], block[209]], "scale", at)?;
        for (scale, &sc) in scales.iter_mut().zip(&block[192..208]) {
            *scale = (d * sc as i8 as f32).to_le_bytes();
        }
        let (low, high) = block[..192].split_at(128);
        // Each half: 64 bytes of low codes and 32 of high ones for 128 weights, in four quarters of 32. A byte of low
        // holds the quarters 0 and 2, or 1 and 3; a byte of high two bits of all four. Codes are stored plus 32.
        let halves = low.as_chunks::<64>().0.iter().zip(high.as_chunks::<32>().0);
        for ((low, high), codes) in halves.zip(codes.as_chunks_mut::<128>().0) {
            for l in 0..32 {
                codes[l] = ((low[l] & 15) | (high[l] & 3) << 4).wrapping_sub(32);
                codes[l + 32] = ((low[l + 32] & 15) | (high[l] >> 2 & 3) << 4).wrapping_sub(32);
                codes[l + 64] = ((low[l] >> 4) | (high[l] >> 4 & 3) << 4).wrapping_sub(32);
                codes[l + 96] = ((low[l + 32] >> 4) | (high[l] >> 6) << 4).wrapping_sub(32);
            }
        }
    }
    Ok(())
}

/// The blocks of a q4 matrix with groups of 32 and f16 scales as GGUF Q4_1: the inverse of [`relay`], byte for byte.
/// Errors: another format, parts that do not belong together.
pub fn to_gguf_q4_1(packed: &Packed) -> Result<Vec<u8>> {
    if packed.format != (Format::Q4 { group: 32, wide: false }) {
        let wanted = "q4 with groups of 32 and f16 scales";
        return Err(Error::NotThatBlock { format: packed.format, ty: GgmlType::Q4_1, wanted });
    }
    check_parts(packed.format, packed.rows, packed.cols, &packed.parts)?;
    let [codes, scales, mins] = [0, 1, 2].map(|part| packed.parts[part].bytes.as_slice());
    let mut bytes = vec![0; GgmlType::Q4_1.matrix_bytes(packed.rows, packed.cols)?];
    let scales = scales.as_chunks::<2>().0.iter().zip(mins.as_chunks::<2>().0);
    let groups = codes.as_chunks::<16>().0.iter().zip(scales);
    for (block, (codes, (scale, min))) in bytes.as_chunks_mut::<20>().0.iter_mut().zip(groups) {
        block[0..2].copy_from_slice(scale);
        block[2..4].copy_from_slice(min);
        // Byte j of the block: weight j low, weight j + 16 high.
        for j in 0..16 {
            let code = |weight: usize| codes[weight / 2] >> (4 * (weight % 2)) & 15;
            block[4 + j] = code(j) | code(j + 16) << 4;
        }
    }
    Ok(bytes)
}

/// The blocks of a plain q8 matrix with groups of 32 and f16 scales as GGUF Q8_0: the inverse of [`relay`], byte for
/// byte. Errors: another format, parts that do not belong together.
pub fn to_gguf_q8_0(packed: &Packed) -> Result<Vec<u8>> {
    if packed.format != (Format::Q8 { group: 32, wide: false, affine: false }) {
        let wanted = "q8 with groups of 32, f16 scales and no mins";
        return Err(Error::NotThatBlock { format: packed.format, ty: GgmlType::Q8_0, wanted });
    }
    check_parts(packed.format, packed.rows, packed.cols, &packed.parts)?;
    let (codes, scales) = (packed.parts[0].bytes.as_slice(), packed.parts[1].bytes.as_slice());
    let mut bytes = vec![0; GgmlType::Q8_0.matrix_bytes(packed.rows, packed.cols)?];
    let groups = codes.as_chunks::<32>().0.iter().zip(scales.as_chunks::<2>().0);
    for (block, (codes, scale)) in bytes.as_chunks_mut::<34>().0.iter_mut().zip(groups) {
        block[0..2].copy_from_slice(scale);
        block[2..].copy_from_slice(codes);
    }
    Ok(bytes)
}
