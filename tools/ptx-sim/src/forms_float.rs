//! The arithmetic instructions, float part, and conversions.
//!
//! Approximate instructions compute in f64 and round once, well inside the bounds that PTX documents; hardware may
//! differ by 1 to 2 units in the last place (`rsqrt`, `rcp`, `ex2`, `div.full`), and by 2^-11 relative (`tanh`).

use crate::float::{self, add_odd, encode, flush, narrow, saturate, Half, Round, BRAIN, DOUBLE, SINGLE, TF32};
use crate::forms::{Forms, Int};
use crate::lanes::{lift1, lift2, lift3, Bf16, Form, Lane, F16, X2};
use crate::types::Type;

impl Forms {
    /// `name[.ftz].f32` of one operand.
    fn f32_1(&mut self, name: &str, f: impl Fn(f32) -> f32 + Copy) {
        self.add(&format!("{name}.f32"), lift1(f));
        self.add(&format!("{name}.ftz.f32"), lift1(move |a| flush(f(flush(a)))));
    }

    fn f32_2(&mut self, name: &str, f: impl Fn(f32, f32) -> f32 + Copy) {
        self.add(&format!("{name}.f32"), lift2(f));
        self.add(&format!("{name}.ftz.f32"), lift2(move |a, b| flush(f(flush(a), flush(b)))));
    }

    fn f32_2_sat(&mut self, name: &str, f: impl Fn(f32, f32) -> f32 + Copy) {
        self.f32_2(name, f);
        self.f32_2(&format!("{name}.sat"), move |a, b| saturate(f(a, b)));
    }

    fn f32_3_sat(&mut self, name: &str, f: impl Fn(f32, f32, f32) -> f32 + Copy) {
        self.add(&format!("{name}.f32"), lift3(f));
        self.add(&format!("{name}.sat.f32"), lift3(move |a, b, c| saturate(f(a, b, c))));
        self.add(&format!("{name}.ftz.f32"), lift3(move |a, b, c| flush(f(flush(a), flush(b), flush(c)))));
        let both = move |a, b, c| saturate(flush(f(flush(a), flush(b), flush(c))));
        self.add(&format!("{name}.ftz.sat.f32"), lift3(both));
    }

    pub(crate) fn floats(&mut self) {
        self.f32_2_sat("add[.rn]", |a, b| a + b);
        self.f32_2_sat("sub[.rn]", |a, b| a - b);
        self.f32_2_sat("mul[.rn]", |a, b| a * b);
        self.f32_3_sat("{fma,mad}.rn", |a, b, c| a.mul_add(b, c));
        self.directed::<1>("rz");
        self.directed::<2>("rm");
        self.directed::<3>("rp");

        self.f32_2("div.rn", |a, b| a / b);
        self.f32_2("div.full", |a, b| a / b);
        self.f32_2(
            "div.approx",
            |a, b| if b.abs() > 2f32.powi(126) && b.is_finite() { far_quotient(a, b) } else { a / b },
        );
        self.f32_1("rcp.{rn,approx}", |a| 1.0 / a);
        self.f32_1("sqrt.{rn,approx}", |a| a.sqrt());
        self.f32_1("rsqrt.approx", |a| (1.0 / f64::from(a).sqrt()) as f32);
        self.f32_1("sin.approx", |a| f64::from(a).sin() as f32);
        self.f32_1("cos.approx", |a| f64::from(a).cos() as f32);
        self.f32_1("lg2.approx", |a| f64::from(a).log2() as f32);
        self.f32_1("ex2.approx", |a| f64::from(a).exp2() as f32);
        self.add("tanh.approx.f32", lift1(|a: f32| f64::from(a).tanh() as f32));
        self.f32_1("abs", f32::abs);
        self.f32_1("neg", |a| -a);
        self.f32_2("min", float::min32);
        self.f32_2("max", float::max32);
        self.f32_2("min.NaN", |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { float::min32(a, b) });
        self.f32_2("max.NaN", |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { float::max32(a, b) });
        let sign = lift2(|a: u32, b: u32| (a & 0x8000_0000) | (b & 0x7fff_ffff));
        self.add("copysign.f32", sign.typed(Type::F32, &[Type::F32; 2]));

        self.add("add[.rn].f64", lift2(|a: f64, b: f64| a + b));
        self.add("sub[.rn].f64", lift2(|a: f64, b: f64| a - b));
        self.add("mul[.rn].f64", lift2(|a: f64, b: f64| a * b));
        self.add("{fma,mad}.rn.f64", lift3(|a: f64, b: f64, c: f64| a.mul_add(b, c)));
        self.add("div.rn.f64", lift2(|a: f64, b: f64| a / b));
        self.add("rcp.rn.f64", lift1(|a: f64| 1.0 / a));
        self.add("sqrt.rn.f64", lift1(f64::sqrt));
        self.add("abs.f64", lift1(f64::abs));
        self.add("neg.f64", lift1(|a: f64| -a));
        self.add("min.f64", lift2(float::min64));
        self.add("max.f64", lift2(float::max64));
    }

    /// f32 sums and products in a directed rounding.
    fn directed<const MODE: u8>(&mut self, name: &str) {
        self.f32_2_sat(&format!("add.{name}"), |a, b| directed_sum::<MODE>(f64::from(a), f64::from(b)));
        self.f32_2_sat(&format!("sub.{name}"), |a, b| directed_sum::<MODE>(f64::from(a), -f64::from(b)));
        self.f32_2_sat(&format!("mul.{name}"), |a, b| to_f32(f64::from(a) * f64::from(b), mode::<MODE>()));
        self.f32_3_sat(&format!("{{fma,mad}}.{name}"), |a, b, c| {
            directed_sum::<MODE>(f64::from(a) * f64::from(b), f64::from(c))
        });
    }

    fn half_1<H: Half + Lane<Cell = u32>>(&mut self, name: &str, arch: u32, f: impl Fn(H) -> H + Copy)
    where
        X2<H>: Lane<Cell = u32>,
    {
        self.add(&format!("{name}.{}", H::NAME), lift1(f).arch(arch));
        self.add(&format!("{name}.{}x2", H::NAME), lift1(move |a: X2<H>| X2(f(a.0), f(a.1))).arch(arch));
    }

    fn half_2<H: Half + Lane<Cell = u32>>(&mut self, name: &str, arch: u32, f: impl Fn(H, H) -> H + Copy)
    where
        X2<H>: Lane<Cell = u32>,
    {
        self.add(&format!("{name}.{}", H::NAME), lift2(f).arch(arch));
        let pair = move |a: X2<H>, b: X2<H>| X2(f(a.0, b.0), f(a.1, b.1));
        self.add(&format!("{name}.{}x2", H::NAME), lift2(pair).arch(arch));
    }

    fn half_3<H: Half + Lane<Cell = u32>>(&mut self, name: &str, f: impl Fn(H, H, H) -> H + Copy)
    where
        X2<H>: Lane<Cell = u32>,
    {
        self.add(&format!("{name}.{}", H::NAME), lift3(f));
        let pair = move |a: X2<H>, b: X2<H>, c: X2<H>| X2(f(a.0, b.0, c.0), f(a.1, b.1, c.1));
        self.add(&format!("{name}.{}x2", H::NAME), lift3(pair));
    }

    /// Instructions that both 16-bit formats have; bf16 sums and products need sm_90.
    fn both_halves<H: Half + Lane<Cell = u32>>(&mut self, arch: u32)
    where
        X2<H>: Lane<Cell = u32>,
    {
        self.half_2::<H>("add[.rn]", arch, H::add);
        self.half_2::<H>("sub[.rn]", arch, H::sub);
        self.half_2::<H>("mul[.rn]", arch, H::mul);
        self.half_3::<H>("fma.rn", H::fma);
        self.half_3::<H>("fma.rn.relu", |a, b, c| H::fma(a, b, c).relu());
        self.half_2::<H>("min", 80, H::least);
        self.half_2::<H>("max", 80, H::largest);
        self.half_2::<H>("min.NaN", 80, |a, b| if a.is_nan() || b.is_nan() { H::of(float::NAN16) } else { a.least(b) });
        self.half_2::<H>(
            "max.NaN",
            80,
            |a, b| if a.is_nan() || b.is_nan() { H::of(float::NAN16) } else { a.largest(b) },
        );
        self.half_1::<H>("abs", 80, |a| H::of(a.bits() & 0x7fff));
        self.half_1::<H>("neg", 80, |a| H::of(a.bits() ^ 0x8000));
        self.half_1::<H>("tanh.approx", arch, |a| H::round(a.wide().tanh()));
    }

    pub(crate) fn halves(&mut self) {
        self.both_halves::<F16>(80);
        self.both_halves::<Bf16>(90);
        self.half_1::<F16>("ex2.approx", 80, |a| F16::round(a.wide().exp2()));
        self.half_1::<F16>("ex2.approx.ftz", 80, |a| F16::round(a.flush().wide().exp2()).flush());
        self.half_1::<Bf16>("ex2.approx.ftz", 90, |a| Bf16::round(a.flush().wide().exp2()).flush());
        self.half_2::<F16>("add[.rn].ftz", 80, |a, b| a.flush().add(b.flush()).flush());
        self.half_2::<F16>("sub[.rn].ftz", 80, |a, b| a.flush().sub(b.flush()).flush());
        self.half_2::<F16>("mul[.rn].ftz", 80, |a, b| a.flush().mul(b.flush()).flush());
        self.half_3::<F16>("fma.rn.ftz", |a, b, c| a.flush().fma(b.flush(), c.flush()).flush());
        self.half_2::<F16>("add[.rn].sat", 80, |a, b| a.add(b).saturate());
        self.half_2::<F16>("sub[.rn].sat", 80, |a, b| a.sub(b).saturate());
        self.half_2::<F16>("mul[.rn].sat", 80, |a, b| a.mul(b).saturate());
        self.half_3::<F16>("fma.rn.sat", |a, b, c| a.fma(b, c).saturate());
    }

    pub(crate) fn conversions(&mut self) {
        self.of_int::<u8>();
        self.of_int::<i8>();
        self.of_int::<u16>();
        self.of_int::<i16>();
        self.of_int::<u32>();
        self.of_int::<i32>();
        self.of_int::<u64>();
        self.of_int::<i64>();

        // Widening is exact.
        self.add("cvt.f32.f16", lift1(|a: F16| float::half_to_f32(a.0)));
        self.add("cvt.ftz.f32.f16", lift1(|a: F16| float::half_to_f32(a.0)));
        self.add("cvt.sat[.ftz].f32.f16", lift1(|a: F16| saturate(float::half_to_f32(a.0))));
        self.add("cvt.f32.bf16", lift1(|a: Bf16| float::brain_to_f32(a.0)));
        self.add("cvt.f64.f16", lift1(|a: F16| a.wide()));
        self.add("cvt.f64.f32", lift1(|a: f32| f64::from(a)));
        self.add("cvt.ftz.f64.f32", lift1(|a: f32| f64::from(flush(a))));

        // Narrowing, by rounding mode.
        self.narrowing::<0>("rn");
        self.narrowing::<1>("rz");
        self.narrowing::<2>("rm");
        self.narrowing::<3>("rp");
        self.add("cvt.rn.f16.f32", lift1(F16::of_f32));
        self.add("cvt.rn.bf16.f32", lift1(Bf16::of_f32));
        self.add("cvt.rz.bf16.f32", lift1(|a: f32| Bf16::round_by(f64::from(a), Round::Zero)));
        self.add("cvt.rn.relu.f16.f32", lift1(|a: f32| F16::round(f64::from(a)).relu()));
        self.add("cvt.rz.relu.f16.f32", lift1(|a: f32| F16::round_by(f64::from(a), Round::Zero).relu()));
        self.add("cvt.rn.relu.bf16.f32", lift1(|a: f32| Bf16::round(f64::from(a)).relu()));
        self.add("cvt.rz.relu.bf16.f32", lift1(|a: f32| Bf16::round_by(f64::from(a), Round::Zero).relu()));
        self.pair::<F16>();
        self.pair::<Bf16>();
        let tf32 = |a: f32| {
            let bits = narrow(f64::from(a), TF32, Round::Away) as u32;
            if a.is_nan() {
                float::NAN32
            } else {
                bits << 13
            }
        };
        self.add("cvt.rna.tf32.f32", lift1(tf32).typed(Type::Tf32, &[Type::F32]));

        // Within one format: to an integral value.
        self.f32_1("cvt.rni", |a| a.round_ties_even());
        self.f32_1("cvt.rzi", |a| a.trunc());
        self.f32_1("cvt.rmi", |a| a.floor());
        self.f32_1("cvt.rpi", |a| a.ceil());
        for mode in ["rni", "rzi", "rmi", "rpi"] {
            self.second_type(&format!("cvt.{mode}.f32"), &format!("cvt.{mode}.f32.f32"));
            self.second_type(&format!("cvt.{mode}.ftz.f32"), &format!("cvt.{mode}.ftz.f32.f32"));
        }
        self.add("cvt.sat.f32.f32", lift1(|a: f32| saturate(a)));
        self.add("cvt.ftz.f32.f32", lift1(flush));
        self.add("cvt.ftz.sat.f32.f32", lift1(|a: f32| saturate(flush(a))));

        self.rounded_to_ints::<f32>("");
        self.rounded_to_ints::<F16>("");
        self.rounded_to_ints::<f64>("");
        self.rounded_to_ints::<Flushed>(".ftz");
    }

    /// Conversions name two types: the form under its one-type name moves to its real one.
    fn second_type(&mut self, from: &str, to: &str) {
        if let Some(form) = self.take(from) {
            self.add(to, form);
        }
    }

    /// Two f32 to a packed pair: the first operand becomes the upper half.
    fn pair<H: Half>(&mut self)
    where
        X2<H>: Lane<Cell = u32>,
    {
        let typed = |f: Form| f.typed(Type::parse(&format!("{}x2", H::NAME)).unwrap_or(Type::B32), &[Type::F32; 2]);
        let round = |v: f32| H::of_f32(v);
        let cut = |v: f32| H::round_by(f64::from(v), Round::Zero);
        let n = H::NAME;
        self.add(&format!("cvt.rn.{n}x2.f32"), typed(lift2(move |a: f32, b: f32| X2(round(b), round(a)))));
        self.add(&format!("cvt.rz.{n}x2.f32"), typed(lift2(move |a: f32, b: f32| X2(cut(b), cut(a)))));
        let relu = lift2(move |a: f32, b: f32| X2(round(b).relu(), round(a).relu()));
        self.add(&format!("cvt.rn.relu.{n}x2.f32"), typed(relu));
        let relu = lift2(move |a: f32, b: f32| X2(cut(b).relu(), cut(a).relu()));
        self.add(&format!("cvt.rz.relu.{n}x2.f32"), typed(relu));
    }

    fn narrowing<const MODE: u8>(&mut self, name: &str) {
        self.add(&format!("cvt.{name}.f16.f32"), lift1(|a: f32| F16::round_by(f64::from(a), mode::<MODE>())));
        let flushed = lift1(|a: f32| F16::round_by(f64::from(flush(a)), mode::<MODE>()));
        self.add(&format!("cvt.{name}.ftz.f16.f32"), flushed);
        let sat = lift1(|a: f32| F16::round_by(f64::from(saturate(a)), mode::<MODE>()));
        self.add(&format!("cvt.{name}.sat.f16.f32"), sat);
        self.add(&format!("cvt.{name}.f16.f64"), lift1(|a: f64| F16::round_by(a, mode::<MODE>())));
        self.add(&format!("cvt.{name}.f32.f64"), lift1(|a: f64| to_f32(a, mode::<MODE>())));
        self.add(&format!("cvt.{name}.ftz.f32.f64"), lift1(|a: f64| flush(to_f32(a, mode::<MODE>()))));
    }

    fn of_int<S: Int>(&mut self) {
        let s = S::TYPE.name();
        self.int_to_int::<S, u8>();
        self.int_to_int::<S, i8>();
        self.int_to_int::<S, u16>();
        self.int_to_int::<S, i16>();
        self.int_to_int::<S, u32>();
        self.int_to_int::<S, i32>();
        self.int_to_int::<S, u64>();
        self.int_to_int::<S, i64>();
        self.int_to_float::<S, 0>("rn");
        self.int_to_float::<S, 1>("rz");
        self.int_to_float::<S, 2>("rm");
        self.int_to_float::<S, 3>("rp");
        if S::BITS <= 32 {
            // Fits f64 exactly, so the machine's own rounding is the right one.
            self.add(&format!("cvt.rn.f32.{s}"), lift1(|a: S| a.wide() as i64 as f64 as f32));
        }
    }

    fn int_to_int<S: Int, D: Int>(&mut self) {
        let (s, d) = (S::TYPE.name(), D::TYPE.name());
        self.add(&format!("cvt.{d}.{s}"), lift1(|a: S| D::wrap(a.wide())));
        self.add(&format!("cvt.sat.{d}.{s}"), lift1(|a: S| D::wrap(a.wide().clamp(D::MIN, D::MAX))));
    }

    fn int_to_float<S: Int, const MODE: u8>(&mut self, name: &str) {
        let s = S::TYPE.name();
        let of = |a: S, format| {
            let v = a.wide();
            encode(v < 0, v.unsigned_abs() as u64, 0, format, mode::<MODE>())
        };
        self.add(&format!("cvt.{name}.f32.{s}"), lift1(move |a: S| f32::from_bits(of(a, SINGLE) as u32)));
        self.add(&format!("cvt.{name}.f16.{s}"), lift1(move |a: S| F16(of(a, float::HALF) as u16)));
        self.add(&format!("cvt.{name}.bf16.{s}"), lift1(move |a: S| Bf16(of(a, BRAIN) as u16)).arch(90));
        self.add(&format!("cvt.{name}.f64.{s}"), lift1(move |a: S| f64::from_bits(of(a, DOUBLE))));
    }

    fn rounded_to_ints<S: ToInt>(&mut self, ftz: &str) {
        self.rounded_to_int::<S, u8>(ftz);
        self.rounded_to_int::<S, i8>(ftz);
        self.rounded_to_int::<S, u16>(ftz);
        self.rounded_to_int::<S, i16>(ftz);
        self.rounded_to_int::<S, u32>(ftz);
        self.rounded_to_int::<S, i32>(ftz);
        self.rounded_to_int::<S, u64>(ftz);
        self.rounded_to_int::<S, i64>(ftz);
    }

    /// Float to integer saturates; NaN gives 0, or the top bit where f64 or a 64-bit integer takes part.
    fn rounded_to_int<S: ToInt, D: Int>(&mut self, ftz: &str) {
        let finish = |v: f64| {
            if v.is_nan() {
                let top = S::TYPE == Type::F64 || D::BITS == 64;
                D::wrap(if top { 1 << (D::BITS - 1) } else { 0 })
            } else {
                D::wrap((v as i128).clamp(D::MIN, D::MAX))
            }
        };
        let name = |mode: &str| format!("cvt.{mode}{ftz}[.sat].{}.{}", D::TYPE.name(), S::TYPE.name());
        self.add(&name("rni"), lift1(move |a: S| finish(a.value().round_ties_even())));
        self.add(&name("rzi"), lift1(move |a: S| finish(a.value().trunc())));
        self.add(&name("rmi"), lift1(move |a: S| finish(a.value().floor())));
        self.add(&name("rpi"), lift1(move |a: S| finish(a.value().ceil())));
    }
}

/// Sources of float-to-integer conversions.
trait ToInt: Lane {
    fn value(self) -> f64;
}

impl ToInt for f32 {
    fn value(self) -> f64 {
        f64::from(self)
    }
}

impl ToInt for f64 {
    fn value(self) -> f64 {
        self
    }
}

impl ToInt for F16 {
    fn value(self) -> f64 {
        self.wide()
    }
}

/// An f32 whose subnormals count as zero.
#[derive(Clone, Copy)]
struct Flushed(f32);

impl Lane for Flushed {
    type Cell = u32;
    const TYPE: Type = Type::F32;
    fn get(cell: u32) -> Flushed {
        Flushed(f32::from_bits(cell))
    }
    fn put(self) -> u32 {
        self.0.to_bits()
    }
}

impl ToInt for Flushed {
    fn value(self) -> f64 {
        f64::from(flush(self.0))
    }
}

/// `div.approx` beyond 2^126: the reciprocal underflows.
fn far_quotient(a: f32, b: f32) -> f32 {
    if a.is_nan() || a.is_infinite() {
        f32::NAN
    } else if a.is_sign_negative() == b.is_sign_negative() {
        0.0
    } else {
        -0.0
    }
}

const fn mode<const MODE: u8>() -> Round {
    match MODE {
        0 => Round::Near,
        1 => Round::Zero,
        2 => Round::Down,
        _ => Round::Up,
    }
}

fn to_f32(v: f64, round: Round) -> f32 {
    if v.is_nan() {
        return f32::NAN;
    }
    f32::from_bits(narrow(v, SINGLE, round) as u32)
}

/// An exact zero sum of unlike signs is −0 when rounding down.
fn directed_sum<const MODE: u8>(a: f64, b: f64) -> f32 {
    let sum = add_odd(a, b);
    if sum == 0.0 && mode::<MODE>() == Round::Down && (a != 0.0 || a.is_sign_negative() != b.is_sign_negative()) {
        return -0.0;
    }
    to_f32(sum, mode::<MODE>())
}
