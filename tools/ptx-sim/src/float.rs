//! Float arithmetic as PTX defines it: single rounding in every format and mode, flushing, saturation, NaN rules.

use crate::lanes::{Bf16, F16};

/// PTX gives one NaN for every f32 result that is not a number.
pub(crate) const NAN32: u32 = 0x7fff_ffff;
pub(crate) const NAN16: u16 = 0x7fff;

/// The bits of a result. Judged as an integer: the compiler may take one NaN for another.
#[inline(always)]
pub(crate) fn canonical(v: f32) -> u32 {
    let bits = v.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        NAN32
    } else {
        bits
    }
}

/// `.ftz`: subnormals become zero of the same sign.
#[inline(always)]
pub(crate) fn flush(v: f32) -> f32 {
    if v.to_bits() & 0x7f80_0000 == 0 {
        f32::from_bits(v.to_bits() & 0x8000_0000)
    } else {
        v
    }
}

/// `.sat`: clamped to 0..=1, NaN to +0.
#[inline(always)]
pub(crate) fn saturate(v: f32) -> f32 {
    if v > 0.0 {
        v.min(1.0)
    } else {
        0.0
    }
}

/// The smaller operand; −0 lies below +0; a NaN yields to a number.
#[inline(always)]
pub(crate) fn min32(a: f32, b: f32) -> f32 {
    let (smaller, both) = (if a < b { a } else { b }, f32::from_bits(a.to_bits() | b.to_bits()));
    pick(a, b, if a == b { both } else { smaller })
}

/// The larger operand; −0 lies below +0; a NaN yields to a number.
#[inline(always)]
pub(crate) fn max32(a: f32, b: f32) -> f32 {
    let (larger, both) = (if a > b { a } else { b }, f32::from_bits(a.to_bits() & b.to_bits()));
    pick(a, b, if a == b { both } else { larger })
}

#[inline(always)]
fn pick(a: f32, b: f32, ordered: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else {
        ordered
    }
}

#[inline(always)]
pub(crate) fn min64(a: f64, b: f64) -> f64 {
    if a.is_nan() || (a == b && b.is_sign_negative()) || b < a {
        b
    } else {
        a
    }
}

#[inline(always)]
pub(crate) fn max64(a: f64, b: f64) -> f64 {
    if a.is_nan() || (a == b && b.is_sign_positive()) || b > a {
        b
    } else {
        a
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Round {
    /// To nearest, ties to even.
    Near,
    /// To nearest, ties away from zero.
    Away,
    Zero,
    Down,
    Up,
}

/// A binary interchange format: stored mantissa bits and exponent bits.
#[derive(Clone, Copy)]
pub(crate) struct Format {
    pub mantissa: u32,
    pub exponent: u32,
}

pub(crate) const HALF: Format = Format { mantissa: 10, exponent: 5 };
pub(crate) const BRAIN: Format = Format { mantissa: 7, exponent: 8 };
pub(crate) const TF32: Format = Format { mantissa: 10, exponent: 8 };
pub(crate) const SINGLE: Format = Format { mantissa: 23, exponent: 8 };
pub(crate) const DOUBLE: Format = Format { mantissa: 52, exponent: 11 };

/// `±m · 2^e` rounded once into the format; its bits.
pub(crate) fn encode(negative: bool, m: u64, e: i32, format: Format, round: Round) -> u64 {
    let Format { mantissa, exponent } = format;
    let sign = u64::from(negative) << (mantissa + exponent);
    if m == 0 {
        return sign;
    }
    let least = 2 - (1 << (exponent - 1)) - mantissa as i32; // exponent of the smallest subnormal
    let top = e + 63 - m.leading_zeros() as i32;
    let unit = (top - mantissa as i32).max(least); // exponent of the result's last bit
    let shift = unit - e;
    let n = if shift <= 0 {
        m << -shift
    } else {
        let (kept, rest) = if shift < 64 { (m >> shift, m << (64 - shift)) } else { (0, u64::from(shift == 64) * m) };
        let sticky = shift > 64 || rest != 0;
        let half = 1 << 63;
        let up = match round {
            Round::Near => rest > half || (rest == half && kept & 1 == 1),
            Round::Away => rest >= half,
            Round::Zero => false,
            Round::Down => sticky && negative,
            Round::Up => sticky && !negative,
        };
        kept + u64::from(up)
    };
    // A carry out of the mantissa moves into the exponent field by itself.
    let bits = (((unit - least) as u64) << mantissa) + n;
    let infinity = ((1 << exponent) - 1) << mantissa;
    if bits >= infinity {
        let toward = match round {
            Round::Near | Round::Away => true,
            Round::Zero => false,
            Round::Down => negative,
            Round::Up => !negative,
        };
        return sign | if toward { infinity } else { infinity - 1 };
    }
    sign | bits
}

/// An f64 rounded once into the format; NaN gives all mantissa bits.
pub(crate) fn narrow(v: f64, format: Format, round: Round) -> u64 {
    let bits = v.to_bits();
    let negative = bits >> 63 == 1;
    let field = (bits >> 52 & 0x7ff) as i32;
    let fraction = bits & ((1 << 52) - 1);
    if field == 0x7ff {
        let infinity = ((1u64 << format.exponent) - 1) << format.mantissa;
        let sign = u64::from(negative) << (format.mantissa + format.exponent);
        return if fraction == 0 { sign | infinity } else { infinity | ((1 << format.mantissa) - 1) };
    }
    let m = if field == 0 { fraction } else { fraction | 1 << 52 };
    encode(negative, m, field.max(1) - 1075, format, round)
}

/// `a + b` rounded to odd: a later rounding to at most 51 bits is then the only one.
pub(crate) fn add_odd(a: f64, b: f64) -> f64 {
    let s = a + b;
    if !s.is_finite() {
        return s;
    }
    let t = s - a;
    let error = (a - (s - t)) + (b - t);
    if error == 0.0 || s.to_bits() & 1 == 1 {
        return s;
    }
    // The sum lies between s and its neighbour on the error's side; one of the two is odd.
    let away = (error > 0.0) == (s > 0.0);
    f64::from_bits(if away { s.to_bits() + 1 } else { s.to_bits() - 1 })
}

/// f16 to f32, exact; branch-free so that loops over it vectorise.
#[inline(always)]
pub(crate) fn half_to_f32(h: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(h & 0x7fff) << 13) * f32::from_bits(0x7780_0000); // · 2^112
    let special = if h & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | u32::from(h & 0x8000) << 16)
}

/// f32 to f16, to nearest even; NaN canonical. Branch-free, for vector loops.
#[inline(always)]
pub(crate) fn half_of_f32(v: f32) -> u16 {
    let bits = v.to_bits();
    let a = bits & 0x7fff_ffff;
    // Below 2^-14, adding 1/2 leaves multiples of 2^-24: the sum rounds as the subnormal must.
    let small = (f32::from_bits(a) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let normal = a.wrapping_add(0xfff + (a >> 13 & 1)).wrapping_sub(0x3800_0000) >> 13;
    let finite = if a < 0x3880_0000 { small } else { normal };
    let bounded = if a >= 0x477f_f000 { 0x7c00 } else { finite };
    let signed = bounded | bits >> 16 & 0x8000;
    (if a > 0x7f80_0000 { u32::from(NAN16) } else { signed }) as u16
}

/// f32 to bf16, to nearest even; NaN canonical.
#[inline(always)]
pub(crate) fn brain_of_f32(v: f32) -> u16 {
    let bits = v.to_bits();
    let near = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { u32::from(NAN16) } else { near }) as u16
}

/// `a + b` in f32 rounded to odd, as [`add_odd`]; for operands of f16 range.
#[inline(always)]
fn add_odd_f32(a: f32, b: f32) -> f32 {
    let s = a + b;
    let t = s - a;
    let error = (a - (s - t)) + (b - t);
    let away = (error > 0.0) == (s > 0.0);
    let odd = if away { s.to_bits().wrapping_add(1) } else { s.to_bits().wrapping_sub(1) };
    // An infinite or NaN sum has a NaN error, which is neither above nor below 0.
    let inexact = (error > 0.0) | (error < 0.0);
    if inexact & (s.to_bits() & 1 == 0) {
        f32::from_bits(odd)
    } else {
        s
    }
}

/// bf16 to f32, exact.
#[inline(always)]
pub(crate) fn brain_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// The two 16-bit formats, so that one text serves both.
pub(crate) trait Half: Copy {
    const NAME: &'static str;
    const FORMAT: Format;
    fn of(bits: u16) -> Self;
    fn bits(self) -> u16;
    fn wide(self) -> f64;
    fn of_f32(v: f32) -> Self;

    fn round(v: f64) -> Self {
        Self::round_by(v, Round::Near)
    }

    fn round_by(v: f64, round: Round) -> Self {
        if v.is_nan() {
            return Self::of(NAN16);
        }
        Self::of(narrow(v, Self::FORMAT, round) as u16)
    }

    fn is_nan(self) -> bool {
        self.wide().is_nan()
    }

    /// Subnormals to zero.
    fn flush(self) -> Self {
        let field = ((1u16 << Self::FORMAT.exponent) - 1) << Self::FORMAT.mantissa;
        Self::of(if self.bits() & field == 0 { self.bits() & 0x8000 } else { self.bits() })
    }

    fn saturate(self) -> Self {
        Self::round(f64::from(saturate(self.wide() as f32)))
    }

    /// `.relu`: negative values to +0, NaN canonical.
    fn relu(self) -> Self {
        if self.is_nan() {
            Self::of(NAN16)
        } else if self.bits() & 0x8000 != 0 {
            Self::of(0)
        } else {
            self
        }
    }

    fn least(self, other: Self) -> Self {
        Self::round(f64::from(min32(self.wide() as f32, other.wide() as f32)))
    }

    fn largest(self, other: Self) -> Self {
        Self::round(f64::from(max32(self.wide() as f32, other.wide() as f32)))
    }

    fn add(self, other: Self) -> Self {
        Self::round(add_odd(self.wide(), other.wide()))
    }

    fn sub(self, other: Self) -> Self {
        Self::round(add_odd(self.wide(), -other.wide()))
    }

    fn mul(self, other: Self) -> Self {
        Self::round(self.wide() * other.wide())
    }

    /// The product is exact in f64, the sum rounded to odd, so one rounding is left.
    fn fma(self, b: Self, c: Self) -> Self {
        Self::round(add_odd(self.wide() * b.wide(), c.wide()))
    }
}

impl Half for F16 {
    const NAME: &'static str = "f16";
    const FORMAT: Format = HALF;
    // Two f16 make an f32 sum, difference or product whose second rounding is innocent: 24 bits are twice 11 and 2
    // more.
    #[inline(always)]
    fn add(self, b: F16) -> F16 {
        F16(half_of_f32(half_to_f32(self.0) + half_to_f32(b.0)))
    }
    #[inline(always)]
    fn sub(self, b: F16) -> F16 {
        F16(half_of_f32(half_to_f32(self.0) - half_to_f32(b.0)))
    }
    #[inline(always)]
    fn mul(self, b: F16) -> F16 {
        F16(half_of_f32(half_to_f32(self.0) * half_to_f32(b.0)))
    }
    /// The product is exact in f32 too.
    #[inline(always)]
    fn fma(self, b: F16, c: F16) -> F16 {
        F16(half_of_f32(add_odd_f32(half_to_f32(self.0) * half_to_f32(b.0), half_to_f32(c.0))))
    }
    #[inline(always)]
    fn of_f32(v: f32) -> F16 {
        F16(half_of_f32(v))
    }
    fn of(bits: u16) -> F16 {
        F16(bits)
    }
    fn bits(self) -> u16 {
        self.0
    }
    fn wide(self) -> f64 {
        f64::from(half_to_f32(self.0))
    }
}

impl Half for Bf16 {
    const NAME: &'static str = "bf16";
    const FORMAT: Format = BRAIN;
    #[inline(always)]
    fn of_f32(v: f32) -> Bf16 {
        Bf16(brain_of_f32(v))
    }
    fn of(bits: u16) -> Bf16 {
        Bf16(bits)
    }
    fn bits(self) -> u16 {
        self.0
    }
    fn wide(self) -> f64 {
        f64::from(brain_to_f32(self.0))
    }
}
