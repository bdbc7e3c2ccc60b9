//! Sixteen f32 lanes, written once and compiled for three instruction sets: plain arrays, AVX2 (two registers) and
//! AVX-512 (one). Kernel bodies are generic over [`Vector`]; [`for_simd`] runs a body compiled for one of them.

use crate::op::Simd;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Sixteen f32 lanes. Methods that take a slice read its first elements and panic when there are too few.
pub trait Vector: Copy {
    /// Sixteen integers of which the low four bits are a code.
    type Codes: Copy;
    /// A table of sixteen values, ready to look codes up.
    type Table: Copy;

    /// True where a processor has 32 registers of this kind.
    const MANY: bool = false;

    /// All lanes `v`.
    fn splat(v: f32) -> Self;
    /// 16 values.
    fn load(from: &[f32]) -> Self;
    /// Writes 16 values.
    fn store(self, to: &mut [f32]);
    /// 16 half-precision bit patterns.
    fn load_f16(from: &[u16]) -> Self;
    /// 16 bfloat16 bit patterns.
    fn load_bf16(from: &[u16]) -> Self;
    /// 16 signed bytes.
    fn load_i8(from: &[i8]) -> Self;
    /// The low and the high nibbles of 16 bytes.
    fn load_nibbles(from: &[u8]) -> (Self::Codes, Self::Codes);
    /// Codes as numbers 0 to 15.
    fn from_codes(codes: Self::Codes) -> Self;
    /// Prepares a table.
    fn table(values: &[f32; 16]) -> Self::Table;
    /// Each code's entry.
    fn look_up(table: Self::Table, codes: Self::Codes) -> Self;
    /// a₀ b₀ a₁ b₁ …: the first eight pairs and the last eight.
    fn interleave(a: Self, b: Self) -> (Self, Self);
    /// Sum of two vectors.
    fn add(self, other: Self) -> Self;
    /// Product of two vectors.
    fn mul(self, other: Self) -> Self;
    /// self · a + b, rounded once where the instruction set can.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Sum of the lanes, in a fixed order.
    fn sum(self) -> f32;
    /// A bit for each lane, set where it is at least the other's; never for NaN.
    fn at_least(self, other: Self) -> u16;
}

/// Asks for the cache lines of `bytes` bytes from `start` on, which may lie beyond the allocation: a hint, never a read.
#[inline(always)]
pub fn prefetch<T>(start: *const T, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        // SAFETY: a prefetch of any address is no access and never faults; SSE is part of x86-64.
        unsafe {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            _mm_prefetch::<_MM_HINT_T0>(start.cast::<i8>().wrapping_add(line));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, bytes);
}

/// Work to run with one kind of vector.
pub trait Body {
    /// Runs with vectors of type `V`.
    fn run<V: Vector>(self);
}

/// Runs `body` compiled for `simd`. Panics when the processor lacks it: a kernel's `supports` has asked.
#[inline]
pub fn for_simd(simd: Simd, body: impl Body) {
    match simd {
        Simd::Portable => body.run::<Portable>(),
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => {
            assert!(
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            );
            // SAFETY: the processor has the features.
            unsafe { x86::run_avx2(body) }
        }
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Amx => {
            assert!(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"));
            assert!(is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl"));
            // SAFETY: the processor has the features.
            unsafe { x86::run_avx512(body) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        _ => panic!("{simd:?} on a processor that is not x86-64"),
    }
}

/// Plain arrays.
#[derive(Clone, Copy)]
pub struct Portable([f32; LANES]);

impl Vector for Portable {
    type Codes = [u8; LANES];
    type Table = [f32; LANES];

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Portable([v; LANES])
    }

    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Portable(*from.first_chunk().expect("16 values"))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        to[..LANES].copy_from_slice(&self.0);
    }

    #[inline(always)]
    fn load_f16(from: &[u16]) -> Self {
        Portable(from.first_chunk::<LANES>().expect("16 values").map(|v| half::f16::from_bits(v).to_f32()))
    }

    #[inline(always)]
    fn load_bf16(from: &[u16]) -> Self {
        Portable(from.first_chunk::<LANES>().expect("16 values").map(|v| f32::from_bits((v as u32) << 16)))
    }

    #[inline(always)]
    fn load_i8(from: &[i8]) -> Self {
        Portable(from.first_chunk::<LANES>().expect("16 values").map(|v| v as f32))
    }

    #[inline(always)]
    fn load_nibbles(from: &[u8]) -> (Self::Codes, Self::Codes) {
        let bytes = from.first_chunk::<LANES>().expect("16 bytes");
        (bytes.map(|b| b & 15), bytes.map(|b| b >> 4))
    }

    #[inline(always)]
    fn from_codes(codes: Self::Codes) -> Self {
        Portable(codes.map(|c| c as f32))
    }

    #[inline(always)]
    fn table(values: &[f32; 16]) -> Self::Table {
        *values
    }

    #[inline(always)]
    fn look_up(table: Self::Table, codes: Self::Codes) -> Self {
        Portable(codes.map(|c| table[c as usize & 15]))
    }

    #[inline(always)]
    fn interleave(a: Self, b: Self) -> (Self, Self) {
        let half = |start: usize| {
            Portable(std::array::from_fn(|i| if i % 2 == 0 { a.0[start + i / 2] } else { b.0[start + i / 2] }))
        };
        (half(0), half(8))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        // Two roundings: a fused one would be a library call where the processor has no such instruction.
        Portable(std::array::from_fn(|i| self.0[i] * a.0[i] + b.0[i]))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    fn at_least(self, other: Self) -> u16 {
        (0..LANES).fold(0, |bits, i| bits | u16::from(self.0[i] >= other.0[i]) << i)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Body, Vector, LANES};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run_avx2(body: impl Body) {
        body.run::<Avx2>();
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub unsafe fn run_avx512(body: impl Body) {
        body.run::<Avx512>();
    }

    /// Two registers of eight. Made only inside `run_avx2`, whose caller has checked the features.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    /// One register of sixteen. Made only inside `run_avx512`, whose caller has checked the features.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY of every block below: these methods run only inside `run_avx2` or `run_avx512`, so the processor has the
    // instructions, and each slice is checked to be long enough before it is read or written.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for Avx2 {
        type Codes = (__m256i, __m256i);
        type Table = (__m256, __m256);

        #[inline(always)]
        fn splat(v: f32) -> Self {
            unsafe { Avx2(_mm256_set1_ps(v), _mm256_set1_ps(v)) }
        }

        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            let from = &from[..LANES];
            unsafe { Avx2(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            let to = &mut to[..LANES];
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }

        #[inline(always)]
        fn load_f16(from: &[u16]) -> Self {
            let from = from[..LANES].as_ptr().cast::<__m128i>();
            unsafe { Avx2(_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))) }
        }

        #[inline(always)]
        fn load_bf16(from: &[u16]) -> Self {
            let from = from[..LANES].as_ptr().cast::<__m128i>();
            unsafe {
                let widen = |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)));
                Avx2(widen(_mm_loadu_si128(from)), widen(_mm_loadu_si128(from.add(1))))
            }
        }

        #[inline(always)]
        fn load_i8(from: &[i8]) -> Self {
            let from = from[..LANES].as_ptr();
            unsafe {
                let eight = |p: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
                Avx2(eight(from), eight(from.add(8)))
            }
        }

        #[inline(always)]
        fn load_nibbles(from: &[u8]) -> (Self::Codes, Self::Codes) {
            let from = from[..LANES].as_ptr();
            unsafe {
                let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
                let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
                ((low, high), (_mm256_srli_epi32::<4>(low), _mm256_srli_epi32::<4>(high)))
            }
        }

        #[inline(always)]
        fn from_codes(codes: Self::Codes) -> Self {
            unsafe {
                let mask = _mm256_set1_epi32(15);
                let number = |c| _mm256_cvtepi32_ps(_mm256_and_si256(c, mask));
                Avx2(number(codes.0), number(codes.1))
            }
        }

        #[inline(always)]
        fn table(values: &[f32; 16]) -> Self::Table {
            unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) }
        }

        #[inline(always)]
        fn look_up(table: Self::Table, codes: Self::Codes) -> Self {
            // A permute takes three bits of index; the fourth, moved to the sign, chooses the half.
            unsafe {
                let entry = |c| {
                    let (low, high) = (_mm256_permutevar8x32_ps(table.0, c), _mm256_permutevar8x32_ps(table.1, c));
                    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(c)))
                };
                Avx2(entry(codes.0), entry(codes.1))
            }
        }

        #[inline(always)]
        fn interleave(a: Self, b: Self) -> (Self, Self) {
            unsafe {
                let pairs = |a, b| {
                    let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                    Avx2(_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
                };
                (pairs(a.0, b.0), pairs(a.1, b.1))
            }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Avx2(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe {
                let eight = _mm256_add_ps(self.0, self.1);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }

        #[inline(always)]
        fn at_least(self, other: Self) -> u16 {
            unsafe {
                let eight = |a, b| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b)) as u16;
                eight(self.0, other.0) | eight(self.1, other.1) << 8
            }
        }
    }

    // SAFETY of every block below: as for `Avx2`.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for Avx512 {
        type Codes = __m512i;
        type Table = __m512;
        const MANY: bool = true;

        #[inline(always)]
        fn splat(v: f32) -> Self {
            unsafe { Avx512(_mm512_set1_ps(v)) }
        }

        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            unsafe { Avx512(_mm512_loadu_ps(from[..LANES].as_ptr())) }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            unsafe { _mm512_storeu_ps(to[..LANES].as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        fn load_f16(from: &[u16]) -> Self {
            unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(from[..LANES].as_ptr().cast()))) }
        }

        #[inline(always)]
        fn load_bf16(from: &[u16]) -> Self {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from[..LANES].as_ptr().cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }

        #[inline(always)]
        fn load_i8(from: &[i8]) -> Self {
            unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from[..LANES].as_ptr().cast())))) }
        }

        #[inline(always)]
        fn load_nibbles(from: &[u8]) -> (Self::Codes, Self::Codes) {
            unsafe {
                let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(from[..LANES].as_ptr().cast()));
                (wide, _mm512_srli_epi32::<4>(wide))
            }
        }

        #[inline(always)]
        fn from_codes(codes: Self::Codes) -> Self {
            // The permute looks at four bits, so it masks and converts in one instruction.
            const NUMBERS: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
            Self::look_up(Self::table(&NUMBERS), codes)
        }

        #[inline(always)]
        fn table(values: &[f32; 16]) -> Self::Table {
            unsafe { _mm512_loadu_ps(values.as_ptr()) }
        }

        #[inline(always)]
        fn look_up(table: Self::Table, codes: Self::Codes) -> Self {
            unsafe { Avx512(_mm512_permutexvar_ps(codes, table)) }
        }

        #[inline(always)]
        fn interleave(a: Self, b: Self) -> (Self, Self) {
            unsafe {
                let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
                (Avx512(_mm512_permutex2var_ps(a.0, low, b.0)), Avx512(_mm512_permutex2var_ps(a.0, high, b.0)))
            }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Avx512(_mm512_fmadd_ps(self.0, a.0, b.0)) }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }

        #[inline(always)]
        fn at_least(self, other: Self) -> u16 {
            unsafe { _mm512_cmp_ps_mask::<_CMP_GE_OQ>(self.0, other.0) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every method against the plain meaning, for each instruction set this processor has.
    struct Check<'a>(&'a str);

    impl Body for Check<'_> {
        #[inline(always)]
        fn run<V: Vector>(self) {
            let read = |v: V| {
                let mut lanes = [f32::NAN; LANES];
                v.store(&mut lanes);
                lanes
            };
            let a: [f32; LANES] = std::array::from_fn(|i| i as f32 - 7.5);
            let b: [f32; LANES] = std::array::from_fn(|i| (i * i) as f32);
            let (va, vb) = (V::load(&a), V::load(&b));

            assert_eq!(read(V::splat(3.0)), [3.0; LANES], "{} splat", self.0);
            assert_eq!(read(va.add(vb)), std::array::from_fn(|i| a[i] + b[i]), "{} add", self.0);
            assert_eq!(read(va.mul(vb)), std::array::from_fn(|i| a[i] * b[i]), "{} mul", self.0);
            assert_eq!(read(va.mul_add(vb, va)), std::array::from_fn(|i| a[i] * b[i] + a[i]), "{} mul_add", self.0);
            assert_eq!(va.sum(), a.iter().sum::<f32>(), "{} sum", self.0);
            let other: [f32; LANES] = std::array::from_fn(|i| [a[i], 0.0, f32::NAN, f32::NEG_INFINITY][i % 4]);
            let bits = (0..LANES).map(|i| u16::from(a[i] >= other[i]) << i).sum::<u16>();
            assert_eq!(va.at_least(V::load(&other)), bits, "{} at_least", self.0);

            let (low, high) = V::interleave(va, vb);
            let mixed: Vec<f32> = a.iter().zip(&b).flat_map(|(a, b)| [*a, *b]).collect();
            assert_eq!([read(low), read(high)].concat(), mixed, "{} interleave", self.0);

            let half: [u16; LANES] = a.map(|v| half::f16::from_f32(v).to_bits());
            assert_eq!(read(V::load_f16(&half)), a, "{} f16", self.0);
            let brain: [u16; LANES] = a.map(|v| half::bf16::from_f32(v).to_bits());
            assert_eq!(read(V::load_bf16(&brain)), a, "{} bf16", self.0);
            let bytes: [i8; LANES] = std::array::from_fn(|i| (i as i8 - 8) * 16);
            assert_eq!(read(V::load_i8(&bytes)), bytes.map(f32::from), "{} i8", self.0);

            let packed: [u8; LANES] = std::array::from_fn(|i| (i as u8) << 4 | (15 - i as u8));
            let (low, high) = V::load_nibbles(&packed);
            assert_eq!(read(V::from_codes(low)), std::array::from_fn(|i| 15.0 - i as f32), "{} low nibbles", self.0);
            assert_eq!(read(V::from_codes(high)), std::array::from_fn(|i| i as f32), "{} high nibbles", self.0);
            let table = V::table(&b);
            assert_eq!(read(V::look_up(table, low)), std::array::from_fn(|i| b[15 - i]), "{} table, low", self.0);
            assert_eq!(read(V::look_up(table, high)), b, "{} table, high", self.0);
        }
    }

    #[test]
    fn every_instruction_set_means_the_same() {
        let best = crate::device::Device::caps(&crate::device::cpu::Cpu::new()).simd;
        for simd in [Simd::Portable, Simd::Avx2, Simd::Avx512] {
            if simd <= best {
                for_simd(simd, Check(&format!("{simd:?}")));
            }
        }
    }
}
