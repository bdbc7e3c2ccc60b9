//! `qmatmul` of codes for few rows of x with AVX-512 VNNI: 64 products of bytes an instruction, sums in i32.
//!
//! ```text
//! once a launch, for 32 columns of x (16 in q8):    x = unit · (65536·h + 256·m + l)      a power of two, three bytes
//! for n in 0..N, threads side by side
//!     for 16 bytes of codes, four times side by side
//!         whole[lane] = 65536·Σ code·h + 256·Σ code·m + Σ code·l      of a lane's 8 codes; 4 in q8
//!         acc[lane] += (scale[n,g] · unit) · whole[lane]
//!     y[m,n] = Σ lanes of acc + Σ over g of min[n,g] · xsum[m,g]
//! ```
//!
//! 1. Three bytes hold 23 bits and a sign: no column is off by more than 2^-23 of the largest of its 32, twice what
//!    rounding that one to f32 costs. Sums of codes are exact until they become f32, once for 8 codes, where sums of f32
//!    round for each. Measured on random numbers: 1.1 to 1.5 times the errors of `rows`.
//! 2. Even columns are the low halves of bytes, odd ones the high halves: both fall to the same lanes, so that a step of
//!    128 columns turns one vector into f32. `rows` turns eight.
//! 3. In q8 a sum of four takes 33 bits: h and m go to one vector, l to another. The instruction multiplies unsigned by
//!    signed bytes, so codes have 128 added; `take` takes it away again.

use super::args::{arguments, Args};
use super::cpu::{rows_of_part, AHEAD};
use crate::op::*;
use crate::ops::team;
use crate::ops::vector::{for_simd, prefetch, Body, Vector, LANES};
use crate::ops::weights::{Weights, SCALE_ROWS};
use std::arch::x86_64::*;

/// Tasks for each thread. With sixteen, as `rows` has, a task ends soon after what it asked for ahead arrives: of one
/// token's time in SmolLM2-135M that costs a tenth.
const TASKS: usize = 4;
/// Bytes of codes that a step takes, and those of them that share a scale.
const STEP: usize = 64;
const PIECE: usize = 16;
/// Steps whose scales are one vector.
const STEPS: usize = LANES * PIECE / STEP;

/// Groups are whole pieces: 32 columns of 4-bit codes, 16 of bytes. Of q4 it takes half of the time of `rows` for up to
/// 16 rows of x, with one thread on 1536×576; of q8 half for one, two thirds for two, as much from four on.
pub fn supports(d: &Dims, caps: &Caps) -> bool {
    let whole_pieces_and_few_rows = match d.get("AFFINE") {
        Some(_) => d["M"] <= 8,
        None => d["M"] <= 16 && d["G"].is_multiple_of(32),
    };
    caps.simd >= Simd::Avx512 && is_x86_feature_detected!("avx512vnni") && whole_pieces_and_few_rows
}

/// Runs a launch.
pub fn launch(word: &str, d: &Dims, args: &mut [Slice<'_>]) {
    let a = arguments(word, d, args);
    match a.w {
        Weights::Q4 { codes, group, .. } => stream::<4>(&a, codes, group),
        Weights::Q8 { codes, group, .. } => stream::<8>(&a, bytemuck::cast_slice(codes), group),
        _ => unreachable!("a kernel of codes"),
    }
}

/// Divides the rows of W among the threads.
fn stream<const BITS: usize>(a: &Args<'_>, codes: &[u8], group: usize) {
    let row = Row::new::<BITS>(a.k, group);
    assert!(codes.len() == a.n * row.bytes && a.x.len() == a.m * a.k);
    // SAFETY: the table offers this kernel only where `supports` found the instructions.
    let x = unsafe { Activations::new::<BITS>(a.x, a.k, row) };
    let per_part = rows_of_part(a, TASKS);
    team::run(a.n.div_ceil(per_part), &|part| {
        let rows = part * per_part..((part + 1) * per_part).min(a.n);
        for_simd(Simd::Avx512, Share::<BITS> { a, x: &x, codes, row, rows });
    });
}

/// What a row of W consists of.
#[derive(Clone, Copy)]
struct Row {
    /// Bytes of codes.
    bytes: usize,
    /// Vectors of them, the last one perhaps in part.
    steps: usize,
    /// Pieces, up to a multiple of 16: whole vectors of their units.
    pieces: usize,
    /// Scales.
    groups: usize,
    /// Pieces of a group are two to this power.
    shift: u32,
}

impl Row {
    fn new<const BITS: usize>(k: usize, group: usize) -> Row {
        let bytes = k * BITS / 8;
        let shift = (group * BITS / 8 / PIECE).ilog2();
        Row {
            bytes,
            steps: bytes.div_ceil(STEP),
            pieces: (bytes / PIECE).next_multiple_of(LANES),
            groups: k / group,
            shift,
        }
    }
}

/// x as the products take it.
struct Activations {
    /// For each row of x and step of columns: in q4 h, m and l, each of even and of odd columns; in q8 h, m, l and
    /// `take` of both sums.
    digits: Vec<__m512i>,
    /// What a piece's whole numbers count [M, pieces up to a multiple of 16]; 0 past the last column.
    units: Vec<f32>,
    /// Sums of each group's columns [M,K/G].
    sums: Vec<f32>,
}

/// Vectors of [`Activations::digits`] for a step.
const fn vectors(bits: usize) -> usize {
    if bits == 4 {
        6
    } else {
        5
    }
}

impl Activations {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn new<const BITS: usize>(x: &[f32], k: usize, row: Row) -> Activations {
        let m = x.len() / k.max(1);
        let mut digits = vec![_mm512_setzero_si512(); m * row.steps * vectors(BITS)];
        let mut units = vec![0.0; m * row.pieces];
        let mut sums = vec![0.0; m * row.groups];
        for (m, x) in x.chunks_exact(k.max(1)).enumerate() {
            let digits = &mut digits[m * row.steps * vectors(BITS)..(m + 1) * row.steps * vectors(BITS)];
            for (piece, x) in x.chunks_exact(PIECE * 8 / BITS).enumerate() {
                let step: &mut [__m512i] = &mut digits[piece / 4 * vectors(BITS)..][..vectors(BITS)];
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(step);
                let (unit, sum) = split::<BITS>(x, &mut bytes[piece % 4 * PIECE..]);
                units[m * row.pieces + piece] = unit;
                sums[m * row.groups + (piece >> row.shift)] += sum;
            }
            if BITS == 8 {
                for step in digits.chunks_exact_mut(vectors(BITS)) {
                    let sum = |digit| _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), digit);
                    let high = _mm512_add_epi32(_mm512_slli_epi32::<8>(sum(step[0])), sum(step[1]));
                    step[3] = _mm512_slli_epi32::<7>(high);
                    step[4] = _mm512_slli_epi32::<7>(sum(step[2]));
                }
            }
        }
        Activations { digits, units, sums }
    }
}

/// A piece's columns as three bytes each, 16 of a kind every [`STEP`] bytes of `to`. Returns what they count, NaN where
/// a column is not finite, and the columns' sum.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn split<const BITS: usize>(x: &[f32], to: &mut [u8]) -> (f32, f32) {
    /// 2^23 over 127·65536: no number up to the latter has a byte of more than 127.
    const ROOM: f32 = 128.0 / 127.0;
    let load = |from: &[f32]| {
        let from: &[f32; LANES] = from.first_chunk().expect("16 columns");
        // SAFETY: 16 numbers.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    };
    let parts: [__m512; 2] = if BITS == 4 {
        let (a, b) = (load(x), load(&x[LANES..]));
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        [_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)]
    } else {
        [load(x), _mm512_setzero_ps()]
    };
    const NOT_FINITE: i32 = 0x01 | 0x08 | 0x10 | 0x80;
    let lost = parts.map(|part| _mm512_fpclass_ps_mask::<NOT_FINITE>(part));
    let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(parts[0]), _mm512_abs_ps(parts[1])));
    let sum = _mm512_reduce_add_ps(_mm512_add_ps(parts[0], parts[1]));
    // The largest column lies in 2^22..2^23 of these, or close below. They are never subnormal, nor their inverses.
    let size = largest * (-22f32).exp2() * ROOM;
    let unit = f32::from_bits(size.to_bits() & 0xff << 23).max(f32::MIN_POSITIVE);
    for (odd, part) in parts.into_iter().take(8 / BITS).enumerate() {
        let whole = _mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(1.0 / unit)));
        // The low byte as a signed number, and what is left without it.
        let rest = |v| _mm512_srai_epi32::<8>(_mm512_add_epi32(v, _mm512_set1_epi32(128)));
        for (digit, v) in [rest(rest(whole)), rest(whole), whole].into_iter().enumerate() {
            let at = (digit * (8 / BITS) + odd) * STEP;
            let to: &mut [u8; LANES] = to[at..].first_chunk_mut().expect("a piece of each vector");
            // SAFETY: 16 bytes.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v)) };
        }
    }
    (if lost == [0, 0] { unit } else { f32::NAN }, sum)
}

/// Rows of W for one thread.
struct Share<'a, const BITS: usize> {
    a: &'a Args<'a>,
    x: &'a Activations,
    codes: &'a [u8],
    row: Row,
    rows: std::ops::Range<usize>,
}

impl<const BITS: usize> Body for Share<'_, BITS> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let groups = self.row.groups;
        let mut scales = vec![0.0; SCALE_ROWS * groups];
        let mut mins = vec![0.0; SCALE_ROWS * groups];
        for first in self.rows.clone().step_by(SCALE_ROWS) {
            let rows = first..(first + SCALE_ROWS).min(self.rows.end);
            let used = rows.len() * groups;
            self.a.w.read_scales::<V>(first, groups, &mut scales[..used], &mut mins[..used]);
            for m in (0..self.a.m).step_by(2) {
                // SAFETY: the table offers this kernel only where `supports` found the instructions.
                unsafe {
                    match self.a.m - m {
                        1 => self.strip::<1>(rows.clone(), m, &scales, &mins),
                        _ => self.strip::<2>(rows.clone(), m, &scales, &mins),
                    }
                }
            }
        }
    }
}

impl<const BITS: usize> Share<'_, BITS> {
    /// y[m..m+T, rows], four rows of W at a time, the last ones singly.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn strip<const T: usize>(&self, rows: std::ops::Range<usize>, m: usize, scales: &[f32], mins: &[f32]) {
        let groups = self.row.groups;
        let fours = rows.len() / 4 * 4;
        for i in (0..fours).step_by(4) {
            self.tile::<4, T>(rows.start + i, m, &scales[i * groups..], &mins[i * groups..]);
        }
        for i in fours..rows.len() {
            self.tile::<1, T>(rows.start + i, m, &scales[i * groups..], &mins[i * groups..]);
        }
    }

    /// y[m..m+T, n..n+R]. Closures that return vectors would not be compiled for these instructions: loops.
    #[allow(clippy::needless_range_loop)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn tile<const R: usize, const T: usize>(&self, n: usize, m: usize, scales: &[f32], mins: &[f32]) {
        let Row { bytes, steps, pieces, groups, shift } = self.row;
        let codes = &self.codes[n * bytes..(n + R) * bytes];
        let digits = &self.x.digits[m * steps * vectors(BITS)..(m + T) * steps * vectors(BITS)];
        let units = &self.x.units[m * pieces..(m + T) * pieces];
        let x_sums = &self.x.sums[m * groups..(m + T) * groups];
        let (scales, mins) = (&scales[..R * groups], &mins[..R * groups]);
        prefetch(codes.as_ptr().wrapping_add(AHEAD), codes.len());

        // A piece's scale is that of its group, which is one piece or more.
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let group_of_piece = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift as i32));
        let mut sums = [[_mm512_setzero_ps(); R]; T];
        for first in (0..steps).step_by(STEPS) {
            let (piece, group) = (first * STEP / PIECE, (first * STEP / PIECE) >> shift);
            let mask = u16::MAX >> (LANES - (groups - group).min(LANES));
            let mut factors = [[_mm512_setzero_ps(); R]; T];
            for r in 0..R {
                // SAFETY: of the `groups` scales of row n + r, those from `group` on that exist.
                let scales = unsafe { _mm512_maskz_loadu_ps(mask, scales.as_ptr().add(r * groups + group)) };
                let scales = _mm512_permutexvar_ps(group_of_piece, scales);
                for t in 0..T {
                    let units: &[f32; LANES] = units[t * pieces + piece..].first_chunk().expect("whole vectors");
                    // SAFETY: 16 numbers.
                    factors[t][r] = _mm512_mul_ps(scales, unsafe { _mm512_loadu_ps(units.as_ptr()) });
                }
            }
            let mut piece_of_lane = _mm512_srli_epi32::<2>(lanes);
            for step in first..(first + STEPS).min(steps) {
                let at = step * STEP;
                let mask = u64::MAX >> (STEP - (bytes - at).min(STEP));
                for r in 0..R {
                    // SAFETY: of the `bytes` bytes of row n + r, those from `at` on that exist.
                    let codes = unsafe { _mm512_maskz_loadu_epi8(mask, codes.as_ptr().add(r * bytes + at).cast()) };
                    for t in 0..T {
                        let x = &digits[(t * steps + step) * vectors(BITS)..][..vectors(BITS)];
                        let factor = _mm512_permutexvar_ps(piece_of_lane, factors[t][r]);
                        sums[t][r] = _mm512_fmadd_ps(products::<BITS>(codes, x), factor, sums[t][r]);
                    }
                }
                piece_of_lane = _mm512_add_epi32(piece_of_lane, _mm512_set1_epi32((STEP / PIECE) as i32));
            }
        }
        if self.a.w.has_mins() {
            for group in (0..groups).step_by(LANES) {
                let mask = u16::MAX >> (LANES - (groups - group).min(LANES));
                for r in 0..R {
                    // SAFETY: of `groups` numbers a row, those from `group` on that exist.
                    let min = unsafe { _mm512_maskz_loadu_ps(mask, mins.as_ptr().add(r * groups + group)) };
                    for t in 0..T {
                        // SAFETY: the same.
                        let x = unsafe { _mm512_maskz_loadu_ps(mask, x_sums.as_ptr().add(t * groups + group)) };
                        sums[t][r] = _mm512_fmadd_ps(min, x, sums[t][r]);
                    }
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            for (r, sum) in totals(sums).into_iter().enumerate() {
                // SAFETY: column n + r is this task's alone.
                unsafe { self.a.y.set(m + t, n + r, sum + self.a.extra.at(m + t, n + r)) };
            }
        }
    }
}

/// The sum of each vector's lanes: of four side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn totals<const R: usize>(sums: &[__m512; R]) -> [f32; R] {
    let mut totals = [0.0; R];
    let (fours, rest) = sums.as_chunks::<4>();
    for (four, to) in fours.iter().zip(totals.as_chunks_mut::<4>().0) {
        let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (ab, cd) = (_mm512_castps_pd(pair(four[0], four[1])), _mm512_castps_pd(pair(four[2], four[3])));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let all = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
        let quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        // SAFETY: four numbers.
        unsafe { _mm_storeu_ps(to.as_mut_ptr(), quarter) };
    }
    for (sum, to) in rest.iter().zip(totals.as_chunks_mut::<4>().1) {
        *to = _mm512_reduce_add_ps(*sum);
    }
    totals
}

/// Σ code · x of each lane's columns, in units of x.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn products<const BITS: usize>(codes: __m512i, x: &[__m512i]) -> __m512 {
    let zero = _mm512_setzero_si512();
    if BITS == 4 {
        let half = _mm512_set1_epi8(15);
        let (even, odd) = (_mm512_and_si512(codes, half), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), half));
        let both = |sum, digit: usize| {
            _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, even, x[2 * digit]), odd, x[2 * digit + 1])
        };
        let high = _mm512_slli_epi32::<8>(both(zero, 0));
        let high = _mm512_slli_epi32::<8>(both(high, 1));
        _mm512_cvtepi32_ps(both(high, 2))
    } else {
        let codes = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
        let high = _mm512_slli_epi32::<8>(_mm512_dpbusd_epi32(zero, codes, x[0]));
        let high = _mm512_sub_epi32(_mm512_dpbusd_epi32(high, codes, x[1]), x[3]);
        let low = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, codes, x[2]), x[4]);
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha12Rng;

    /// A piece's columns as its three bytes say, and what they count.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn and_back<const BITS: usize>(x: &[f32]) -> (Vec<f64>, f32) {
        let mut bytes = [0; vectors(4) * STEP];
        let (unit, _) = split::<BITS>(x, &mut bytes);
        let halves = 8 / BITS;
        let of_column = |i: usize| {
            let digit = |d: usize| i64::from(bytes[(d * halves + i % halves) * STEP + i / halves] as i8);
            (65_536 * digit(0) + 256 * digit(1) + digit(2)) as f64 * f64::from(unit)
        };
        ((0..x.len()).map(of_column).collect(), unit)
    }

    fn check<const BITS: usize>(x: &[f32]) {
        // SAFETY: the test has asked the processor.
        let (back, unit) = unsafe { and_back::<BITS>(x) };
        assert!(unit.is_normal() && (1.0 / unit).is_normal(), "{unit:e}");
        let largest = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        // 128/127 of 2^-22 of the largest, and the roundings of finding it.
        let most = largest * (-22f32).exp2() * 1.0079;
        assert!(unit <= most.max(f32::MIN_POSITIVE), "{unit:e} beside {largest:e}");
        for (back, x) in back.iter().zip(x) {
            assert!((back - f64::from(*x)).abs() <= f64::from(unit) / 2.0, "{back:e} for {x:e}, unit {unit:e}");
        }
    }

    #[test]
    fn three_bytes_hold_a_column() {
        if !is_x86_feature_detected!("avx512vnni") {
            return;
        }
        let mut random = ChaCha12Rng::seed_from_u64(7);
        for largest in [1.0, 127.0 / 128.0, 0.992, 0.9921875, 1.9999999, 6.5e4, 1e30, f32::MAX, 1e-30, 1e-37, 1e-40] {
            for _ in 0..50 {
                // Columns of many sizes beside the largest one, of either sign.
                let mut x: [f32; 32] = std::array::from_fn(|_| {
                    largest * random.random_range(-1.0..1.0f32) * random.random_range(-30.0..0.0f32).exp2()
                });
                let at = random.random_range(0..16);
                x[at] = if random.random() { largest } else { -largest };
                check::<4>(&x);
                check::<8>(&x[..16]);
            }
        }
        check::<4>(&[0.0; 32]);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        if !is_x86_feature_detected!("avx512vnni") {
            return;
        }
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 1, 15] {
                let mut x = [1.0; 32];
                x[at] = bad;
                // SAFETY: just detected.
                let units = unsafe { [and_back::<4>(&x).1, and_back::<8>(&x[..16]).1] };
                assert!(units.iter().all(|unit| unit.is_nan()), "{units:?}");
            }
        }
    }
}
