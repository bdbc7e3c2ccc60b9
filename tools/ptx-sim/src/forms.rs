//! The arithmetic instructions, integer part: name, then what it does to one lane. See [`crate::forms_float`] for the
//! rest.
//!
//! In names, `[.x]` may be there or not and `{a,b}` stands for each; modifiers other than types may come in any order.

use std::collections::HashMap;
use std::sync::OnceLock;

use crate::lanes::{lift1, lift2, lift3, lift4, Form, Lane};
use crate::types::Type;

pub(crate) struct Forms {
    by_key: HashMap<String, Form>,
}

/// Name without regard to the order of modifiers: types keep theirs.
fn key<'a>(opcode: &str, mods: impl Iterator<Item = &'a str>) -> String {
    let (types, mut others): (Vec<&str>, Vec<&str>) = mods.partition(|m| Type::parse(m).is_some());
    others.sort_unstable();
    [&[opcode], &others[..], &types[..]].concat().join(".")
}

/// `a[.b].{c,d}` to `a.c`, `a.d`, `a.b.c`, `a.b.d`.
fn expand(pattern: &str) -> Vec<String> {
    if let Some(open) = pattern.find('[') {
        let close = open + pattern[open..].find(']').expect("bracket closes");
        let (head, middle, tail) = (&pattern[..open], &pattern[open + 1..close], &pattern[close + 1..]);
        return [format!("{head}{tail}"), format!("{head}{middle}{tail}")].iter().flat_map(|p| expand(p)).collect();
    }
    if let Some(open) = pattern.find('{') {
        let close = open + pattern[open..].find('}').expect("brace closes");
        let (head, middle, tail) = (&pattern[..open], &pattern[open + 1..close], &pattern[close + 1..]);
        return middle.split(',').flat_map(|m| expand(&format!("{head}{m}{tail}"))).collect();
    }
    vec![pattern.to_string()]
}

impl Forms {
    /// The table, made once.
    pub fn get() -> &'static Forms {
        static FORMS: OnceLock<Forms> = OnceLock::new();
        FORMS.get_or_init(|| {
            let mut forms = Forms { by_key: HashMap::new() };
            forms.integers();
            forms.floats();
            forms.halves();
            forms.conversions();
            forms
        })
    }

    pub fn find(&self, opcode: &str, mods: &[String]) -> Option<&Form> {
        self.by_key.get(&key(opcode, mods.iter().map(String::as_str)))
    }

    /// Whether some form of this opcode carries the modifier; (opcode known, modifier known with it).
    pub fn knows(&self, opcode: &str, modifier: &str) -> (bool, bool) {
        let mut known = (false, false);
        for k in self.by_key.keys() {
            let mut parts = k.split('.');
            if parts.next() == Some(opcode) {
                known.0 = true;
                known.1 |= parts.any(|p| p == modifier);
            }
        }
        known
    }

    pub fn add(&mut self, pattern: &str, form: Form) {
        for name in expand(pattern) {
            let mut parts = name.split('.');
            let opcode = parts.next().unwrap_or_default();
            self.by_key.insert(key(opcode, parts), form.clone());
        }
    }

    pub fn take(&mut self, name: &str) -> Option<Form> {
        let mut parts = name.split('.');
        let opcode = parts.next()?;
        self.by_key.remove(&key(opcode, parts))
    }

    fn integers(&mut self) {
        use Type::{B16, B32, B64, U32};
        self.arithmetic::<u16>();
        self.arithmetic::<i16>();
        self.arithmetic::<u32>();
        self.arithmetic::<i32>();
        self.arithmetic::<u64>();
        self.arithmetic::<i64>();
        self.signed::<i16>();
        self.signed::<i32>();
        self.signed::<i64>();
        self.bits::<u16>(B16);
        self.bits::<u32>(B32);
        self.bits::<u64>(B64);

        self.add("add.sat.s32", lift2(|a: i32, b: i32| a.saturating_add(b)));
        self.add("sub.sat.s32", lift2(|a: i32, b: i32| a.saturating_sub(b)));
        self.add(
            "mad.hi.sat.s32",
            lift3(|a: i32, b: i32, c: i32| (((a as i64 * b as i64) >> 32) as i32).saturating_add(c)),
        );
        self.add("mul.wide.u16", lift2(|a: u16, b: u16| a as u32 * b as u32));
        self.add("mul.wide.s16", lift2(|a: i16, b: i16| a as i32 * b as i32));
        self.add("mul.wide.u32", lift2(|a: u32, b: u32| a as u64 * b as u64));
        self.add("mul.wide.s32", lift2(|a: i32, b: i32| a as i64 * b as i64));
        self.add("mad.wide.u16", lift3(|a: u16, b: u16, c: u32| (a as u32 * b as u32).wrapping_add(c)));
        self.add("mad.wide.s16", lift3(|a: i16, b: i16, c: i32| (a as i32 * b as i32).wrapping_add(c)));
        self.add("mad.wide.u32", lift3(|a: u32, b: u32, c: u64| (a as u64 * b as u64).wrapping_add(c)));
        self.add("mad.wide.s32", lift3(|a: i32, b: i32, c: i64| (a as i64 * b as i64).wrapping_add(c)));
        self.add("sad.u32", lift3(|a: u32, b: u32, c: u32| a.abs_diff(b).wrapping_add(c)));
        self.add("sad.s32", lift3(|a: i32, b: i32, c: i32| c.wrapping_add_unsigned(a.abs_diff(b))));

        self.add("popc.b32", lift1(|a: u32| a.count_ones()).typed(U32, &[B32]));
        self.add("popc.b64", lift1(|a: u64| a.count_ones()).typed(U32, &[B64]));
        self.add("clz.b32", lift1(|a: u32| a.leading_zeros()).typed(U32, &[B32]));
        self.add("clz.b64", lift1(|a: u64| a.leading_zeros()).typed(U32, &[B64]));
        self.add("brev.b32", lift1(|a: u32| a.reverse_bits()).typed(B32, &[B32]));
        self.add("brev.b64", lift1(|a: u64| a.reverse_bits()).typed(B64, &[B64]));
        self.add("bfind.u32", lift1(|a: u32| 31u32.wrapping_sub(a.leading_zeros())));
        self.add("bfind.s32", lift1(|a: i32| 31u32.wrapping_sub((a ^ (a >> 31)).leading_zeros())));
        self.add("bfe.u32", lift3(|a: u32, b: u32, c: u32| extract(a as u64, b, c, 32, false) as u32));
        self.add("bfe.s32", lift3(|a: i32, b: u32, c: u32| extract(a as i64 as u64, b, c, 32, true) as i32));
        self.add("bfe.u64", lift3(|a: u64, b: u32, c: u32| extract(a, b, c, 64, false)));
        self.add("bfe.s64", lift3(|a: i64, b: u32, c: u32| extract(a as u64, b, c, 64, true) as i64));
        let bfi32 = lift4(|a: u32, b: u32, c: u32, d: u32| insert(a as u64, b as u64, c, d, 32) as u32);
        self.add("bfi.b32", bfi32.typed(B32, &[B32, B32, U32, U32]));
        let bfi64 = lift4(|a: u64, b: u64, c: u32, d: u32| insert(a, b, c, d, 64));
        self.add("bfi.b64", bfi64.typed(B64, &[B64, B64, U32, U32]));
        self.add("prmt.b32", lift3(permute).typed(B32, &[B32; 3]));
        self.add("lop3.b32", lift4(lop3).typed(B32, &[B32, B32, B32, U32]));

        let funnel = |a: u32, b: u32| u64::from(a) | u64::from(b) << 32;
        let form = lift3(move |a: u32, b: u32, c: u32| (funnel(a, b) << (c & 31) >> 32) as u32);
        self.add("shf.l.wrap.b32", form.typed(B32, &[B32, B32, U32]));
        let form = lift3(move |a: u32, b: u32, c: u32| (funnel(a, b) >> (c & 31)) as u32);
        self.add("shf.r.wrap.b32", form.typed(B32, &[B32, B32, U32]));
        let form = lift3(move |a: u32, b: u32, c: u32| (funnel(a, b) << c.min(32) >> 32) as u32);
        self.add("shf.l.clamp.b32", form.typed(B32, &[B32, B32, U32]));
        let form = lift3(move |a: u32, b: u32, c: u32| (funnel(a, b) >> c.min(32)) as u32);
        self.add("shf.r.clamp.b32", form.typed(B32, &[B32, B32, U32]));

        self.add("dp4a.u32.u32", lift3(|a: u32, b: u32, c: u32| c.wrapping_add(dot4(a, b, false, false) as u32)));
        self.add("dp4a.s32.s32", lift3(|a: i32, b: i32, c: i32| c.wrapping_add(dot4(a as u32, b as u32, true, true))));
        self.add("dp4a.u32.s32", lift3(|a: u32, b: i32, c: i32| c.wrapping_add(dot4(a, b as u32, false, true))));
        self.add("dp4a.s32.u32", lift3(|a: i32, b: u32, c: i32| c.wrapping_add(dot4(a as u32, b, true, false))));

        self.pack::<i8>();
        self.pack::<u8>();
        self.add("cvt.pack.sat.s16.s32", lift2(|a: i32, b: i32| joined::<i16>(a, b)).typed(B32, &[Type::S32; 2]));
        self.add("cvt.pack.sat.u16.s32", lift2(|a: i32, b: i32| joined::<u16>(a, b)).typed(B32, &[Type::S32; 2]));
        let slct = lift3(|a: u32, b: u32, c: i32| if c >= 0 { a } else { b });
        for t in [B32, U32, Type::S32, Type::F32] {
            self.add(&format!("slct.{}.s32", t.name()), slct.clone().typed(t, &[t, t, Type::S32]));
        }

        let whole = |t: Type| (t, [t]);
        for t in [B16, B32, Type::U16, Type::S16, U32, Type::S32, Type::F32] {
            let (dst, src) = whole(t);
            self.add(&format!("mov.{}", t.name()), lift1(|a: u32| a).typed(dst, &src));
        }
        for t in [B64, Type::U64, Type::S64, Type::F64] {
            let (dst, src) = whole(t);
            self.add(&format!("mov.{}", t.name()), lift1(|a: u64| a).typed(dst, &src));
        }
        for t in ["u64", "s64"] {
            // Global and generic addresses are the same; shared ones are told apart by the decoder.
            self.add(&format!("cvta[.to].global.{t}"), lift1(|a: u64| a));
        }
    }

    /// Two saturated bytes below, the low half of `c` above them.
    fn pack<T: Int>(&mut self) {
        let form = lift3(|a: i32, b: i32, c: u32| joined::<T>(a, b) | c << 16);
        let s = Type::S32;
        self.add(&format!("cvt.pack.sat.{}.s32.b32", T::TYPE.name()), form.typed(Type::B32, &[s, s, Type::B32]));
    }

    fn arithmetic<T: Int>(&mut self) {
        let t = T::TYPE.name();
        self.add(&format!("add.{t}"), lift2(|a: T, b: T| a.plus(b)));
        self.add(&format!("sub.{t}"), lift2(|a: T, b: T| a.minus(b)));
        self.add(&format!("mul.lo.{t}"), lift2(|a: T, b: T| a.times(b)));
        self.add(&format!("mad.lo.{t}"), lift3(|a: T, b: T, c: T| a.times(b).plus(c)));
        let high = |a: T, b: T| T::wrap(a.wide().wrapping_mul(b.wide()) >> T::BITS);
        self.add(&format!("mul.hi.{t}"), lift2(high));
        self.add(&format!("mad.hi.{t}"), lift3(move |a: T, b: T, c: T| high(a, b).plus(c)));
        self.add(&format!("div.{t}"), lift2(|a: T, b: T| a.over(b)));
        self.add(&format!("rem.{t}"), lift2(|a: T, b: T| a.modulo(b)));
        self.add(&format!("min.{t}"), lift2(|a: T, b: T| a.min(b)));
        self.add(&format!("max.{t}"), lift2(|a: T, b: T| a.max(b)));
        self.add(&format!("shr.{t}"), lift2(|a: T, b: u32| a.right(b)));
    }

    fn signed<T: Int>(&mut self) {
        let t = T::TYPE.name();
        self.add(&format!("neg.{t}"), lift1(|a: T| T::wrap(0).minus(a)));
        self.add(&format!("abs.{t}"), lift1(|a: T| if a < T::wrap(0) { T::wrap(0).minus(a) } else { a }));
    }

    fn bits<T: Int>(&mut self, ty: Type) {
        let t = ty.name();
        self.add(&format!("and.{t}"), lift2(|a: T, b: T| a.and(b)).typed(ty, &[ty; 2]));
        self.add(&format!("or.{t}"), lift2(|a: T, b: T| a.or(b)).typed(ty, &[ty; 2]));
        self.add(&format!("xor.{t}"), lift2(|a: T, b: T| a.xor(b)).typed(ty, &[ty; 2]));
        self.add(&format!("not.{t}"), lift1(|a: T| a.xor(T::wrap(-1))).typed(ty, &[ty]));
        self.add(&format!("cnot.{t}"), lift1(|a: T| T::wrap(i128::from(a == T::wrap(0)))).typed(ty, &[ty]));
        self.add(&format!("shl.{t}"), lift2(|a: T, b: u32| a.left(b)).typed(ty, &[ty, Type::U32]));
        self.add(&format!("shr.{t}"), lift2(|a: T, b: u32| a.right(b)).typed(ty, &[ty, Type::U32]));
    }
}

/// Integer types that arithmetic is generic over.
pub(crate) trait Int: Lane + Ord {
    const BITS: u32;
    const MIN: i128;
    const MAX: i128;
    fn wide(self) -> i128;
    fn wrap(v: i128) -> Self;
    fn plus(self, b: Self) -> Self;
    fn minus(self, b: Self) -> Self;
    fn times(self, b: Self) -> Self;
    /// A quotient; by zero, all bits set, as hardware gives (PTX leaves it open).
    fn over(self, b: Self) -> Self;
    fn modulo(self, b: Self) -> Self;
    fn and(self, b: Self) -> Self;
    fn or(self, b: Self) -> Self;
    fn xor(self, b: Self) -> Self;
    /// Shifts beyond the width give zero, or the sign.
    fn left(self, b: u32) -> Self;
    fn right(self, b: u32) -> Self;
}

macro_rules! int {
    ($($t:ty),*) => {$(
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            const MIN: i128 = <$t>::MIN as i128;
            const MAX: i128 = <$t>::MAX as i128;
            #[inline(always)]
            fn wide(self) -> i128 { self as i128 }
            #[inline(always)]
            fn wrap(v: i128) -> $t { v as $t }
            #[inline(always)]
            fn plus(self, b: $t) -> $t { self.wrapping_add(b) }
            #[inline(always)]
            fn minus(self, b: $t) -> $t { self.wrapping_sub(b) }
            #[inline(always)]
            fn times(self, b: $t) -> $t { self.wrapping_mul(b) }
            #[inline(always)]
            fn over(self, b: $t) -> $t { if b == 0 { !0 } else { self.wrapping_div(b) } }
            #[inline(always)]
            fn modulo(self, b: $t) -> $t { if b == 0 { self } else { self.wrapping_rem(b) } }
            #[inline(always)]
            fn and(self, b: $t) -> $t { self & b }
            #[inline(always)]
            fn or(self, b: $t) -> $t { self | b }
            #[inline(always)]
            fn xor(self, b: $t) -> $t { self ^ b }
            #[inline(always)]
            fn left(self, b: u32) -> $t { if b < <$t>::BITS { self << b } else { 0 } }
            #[inline(always)]
            fn right(self, b: u32) -> $t { self >> b.min(<$t>::BITS - 1) >> u32::from(b >= <$t>::BITS) }
        }
    )*};
}
int!(u8, i8, u16, i16, u32, i32, u64, i64);

/// `b` and above it `a`, both saturated to `T`.
#[inline(always)]
fn joined<T: Int>(a: i32, b: i32) -> u32 {
    let mask = (1u32 << T::BITS) - 1;
    let one = |v: i32| i128::from(v).clamp(T::MIN, T::MAX) as u32 & mask;
    one(a) << T::BITS | one(b)
}

/// `bfe`: `length` bits from `start`; the sign is the field's top bit, or the value's when the field ends beyond it.
fn extract(value: u64, start: u32, length: u32, bits: u32, signed: bool) -> u64 {
    let (start, length) = (start & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let top = (start + length - 1).min(bits - 1);
    let sign = if signed && value >> top & 1 == 1 { u64::MAX } else { 0 };
    let field = if start < bits { (value & (u64::MAX >> (64 - bits))) >> start } else { 0 };
    let kept = if start < bits { (bits - start).min(length) } else { 0 };
    let mask = if kept == 64 { u64::MAX } else { (1 << kept) - 1 };
    (field & mask) | (sign & !mask)
}

/// `bfi`: the low `length` bits of `a` into `b` at `start`.
fn insert(a: u64, b: u64, start: u32, length: u32, bits: u32) -> u64 {
    let (start, length) = (start & 0xff, (length & 0xff).min(bits));
    if start >= bits || length == 0 {
        return b;
    }
    let ones = if length == 64 { u64::MAX } else { (1 << length) - 1 };
    (b & !(ones << start)) | (a & ones) << start
}

/// `prmt`: each selector nibble names a byte of `b:a`; its top bit spreads that byte's sign.
#[inline(always)]
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = u64::from(a) | u64::from(b) << 32;
    let mut out = 0;
    for i in 0..4 {
        let s = selector >> (4 * i) & 0xf;
        let byte = (bytes >> (8 * (s & 7))) as u8;
        let byte = if s & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
        out |= u32::from(byte) << (8 * i);
    }
    out
}

/// `lop3`: the table's bit `4a + 2b + c`, bit by bit.
#[inline(always)]
fn lop3(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let mut out = 0;
    for i in 0..8 {
        let keep = 0u32.wrapping_sub(table >> i & 1);
        let pick = |v: u32, bit: u32| if i & bit != 0 { v } else { !v };
        out |= keep & pick(a, 4) & pick(b, 2) & pick(c, 1);
    }
    out
}

#[inline(always)]
fn dot4(a: u32, b: u32, a_signed: bool, b_signed: bool) -> i32 {
    let byte = |v: u32, i: u32, signed: bool| {
        let v = (v >> (8 * i)) as u8;
        if signed {
            i32::from(v as i8)
        } else {
            i32::from(v)
        }
    };
    (0..4).map(|i| byte(a, i, a_signed) * byte(b, i, b_signed)).sum()
}
