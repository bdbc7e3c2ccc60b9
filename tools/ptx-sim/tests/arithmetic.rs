//! Each arithmetic instruction against an independent scalar model, over random and edge operands.

mod common;

use common::{bytes64, checked, kernel, run_with, u64s, Buf, Random};
use half::{bf16, f16};

/// Values at which instructions go wrong: in the low 16, 32 and 64 bits.
const EDGES: [u64; 40] = [
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    65,
    255,
    0x7f,
    0x80,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0xffff_fffe,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    // f32: 1, -1.5, least subnormal, largest subnormal, least normal, largest, infinity, -infinity, NaN, -0 is above.
    0x3f80_0000,
    0xbfc0_0000,
    0x0000_0001,
    0x007f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0001,
    // 2^31 and 2^63 and 65519.9 as f32, for saturation.
    0x4f00_0000,
    0x5f00_0000,
    0x477f_efff,
    // f16 pairs: (1, 65504), (subnormal, infinity), (NaN, -2).
    0x7bff_3c00,
    0x7c00_0001,
    0xc000_7e01,
    // 2.5 and 3.5 meet ties.
    0x4060_0000,
];

#[derive(Clone, Copy, PartialEq)]
enum Is {
    H,
    R,
    F,
    D,
    G,
}

impl Is {
    fn register(self, i: usize) -> String {
        match self {
            Is::H => format!("%h{i}"),
            Is::R => format!("%r{i}"),
            Is::F => format!("%f{i}"),
            Is::D => format!("%d{i}"),
            Is::G => format!("%g{i}"),
        }
    }

    fn bits(self) -> u32 {
        match self {
            Is::H => 16,
            Is::R | Is::F => 32,
            Is::D | Is::G => 64,
        }
    }

    fn ty(self) -> &'static str {
        match self {
            Is::H => "b16",
            Is::R => "b32",
            Is::F => "f32",
            Is::D => "b64",
            Is::G => "f64",
        }
    }
}

fn operand(random: &mut Random, is: Is) -> u64 {
    let r = random.bits();
    let v = match r % 4 {
        0 => EDGES[(r >> 8) as usize % EDGES.len()],
        // Near-equal exponents, so that sums cancel and round.
        1 if is == Is::F => 0x3f00_0000 + (r >> 8) % 0x0180_0000 + ((r >> 40 & 1) << 31),
        1 if is == Is::G => return 0x3fe0_0000_0000_0000 + (r >> 12),
        1 => (r >> 32) % 70,
        _ => random.bits(),
    };
    if is == Is::G && r.is_multiple_of(4) {
        return f64::from(f32::from_bits(v as u32)).to_bits();
    }
    if is == Is::H && r.is_multiple_of(8) {
        return v >> 16 & 0xffff;
    }
    v & (u64::MAX >> (64 - is.bits()))
}

/// Runs `text` (with operands `$d $a $b $c $e`) over many operands and compares bits with the model.
fn check(text: &str, dst: Is, src: &[Is], model: impl Fn(&[u64]) -> u64) {
    const N: usize = 1024;
    let mut random = Random(0x9e37_79b9 ^ text.bytes().fold(7u64, |h, b| h.wrapping_mul(31) + u64::from(b)));
    let inputs: Vec<Vec<u64>> = src.iter().map(|s| (0..N).map(|_| operand(&mut random, *s)).collect()).collect();
    let mut body = "mov.u32 %r60, %tid.x; mov.u32 %r61, %ctaid.x; mad.lo.u32 %r60, %r61, 256, %r60;\n".to_string();
    let mut line = text.replace("$d", &dst.register(9));
    for (i, s) in src.iter().enumerate() {
        body += &format!("mad.wide.u32 %d10, %r60, 8, %d2{i}; ld.global.{} {}, [%d10];\n", s.ty(), s.register(i));
        line = line.replace(["$a", "$b", "$c", "$e"][i], &s.register(i));
    }
    body += &format!("{line};\nmad.wide.u32 %d10, %r60, 8, %d2{};\n", src.len());
    body += &format!("st.global.{} [%d10], {};\nret;", dst.ty(), dst.register(9));
    // Registers 9 of each class exist: %g has 8, so f64 results use a wider file.
    let source = kernel(src.len() + 1, &body).replace("%g<8>", "%g<16>").replace("sm_80", "sm_90");
    let mut buffers: Vec<Buf> = inputs.iter().map(|v| Buf::In(bytes64(v))).collect();
    buffers.push(Buf::In(vec![0; 8 * N]));
    let ran = match run_with(&source, [4, 1, 1], [256, 1, 1], 0, &buffers, &[], &checked()) {
        Ok(r) => r,
        Err(e) => panic!("{text}: {e}"),
    };
    assert!(ran.report.findings.is_empty(), "{text}: {:?}", ran.report.findings);
    for (i, got) in u64s(&ran.buffers[src.len()]).into_iter().enumerate() {
        let args: Vec<u64> = inputs.iter().map(|v| v[i]).collect();
        let want = model(&args) & (u64::MAX >> (64 - dst.bits()));
        assert_eq!(got, want, "{text} of {args:#x?}: {got:#x} is not {want:#x}");
    }
}

fn f(v: u64) -> f32 {
    f32::from_bits(v as u32)
}

/// PTX's NaN.
fn bits(v: f32) -> u64 {
    u64::from(if v.is_nan() { 0x7fff_ffff } else { v.to_bits() })
}

#[test]
fn integer_arithmetic() {
    use Is::{D, H, R};
    let s = |v: u64| i64::from(v as i32);
    for (t, signed) in [("u32", false), ("s32", true)] {
        let w = move |v: u64| if signed { i128::from(v as i32) } else { i128::from(v as u32) };
        let (low, high) = if signed { (i128::from(i32::MIN), i128::from(i32::MAX)) } else { (0, i128::from(u32::MAX)) };
        check(&format!("add.{t} $d, $a, $b"), R, &[R, R], move |a| (w(a[0]) + w(a[1])) as u64);
        check(&format!("sub.{t} $d, $a, $b"), R, &[R, R], move |a| (w(a[0]) - w(a[1])) as u64);
        check(&format!("mul.lo.{t} $d, $a, $b"), R, &[R, R], move |a| (w(a[0]) * w(a[1])) as u64);
        check(&format!("mul.hi.{t} $d, $a, $b"), R, &[R, R], move |a| ((w(a[0]) * w(a[1])) >> 32) as u64);
        check(&format!("mul.wide.{t} $d, $a, $b"), D, &[R, R], move |a| (w(a[0]) * w(a[1])) as u64);
        check(&format!("mad.lo.{t} $d, $a, $b, $c"), R, &[R, R, R], move |a| (w(a[0]) * w(a[1]) + w(a[2])) as u64);
        check(&format!("mad.hi.{t} $d, $a, $b, $c"), R, &[R, R, R], move |a| {
            (((w(a[0]) * w(a[1])) >> 32) + w(a[2])) as u64
        });
        check(&format!("mad.wide.{t} $d, $a, $b, $c"), D, &[R, R, D], move |a| {
            (w(a[0]) * w(a[1])).wrapping_add(i128::from(a[2])) as u64
        });
        check(&format!("div.{t} $d, $a, $b"), R, &[R, R], move |a| {
            if w(a[1]) == 0 {
                u64::MAX
            } else {
                (w(a[0]) / w(a[1])) as u64
            }
        });
        check(
            &format!("rem.{t} $d, $a, $b"),
            R,
            &[R, R],
            move |a| {
                if w(a[1]) == 0 {
                    a[0]
                } else {
                    (w(a[0]) % w(a[1])) as u64
                }
            },
        );
        check(&format!("min.{t} $d, $a, $b"), R, &[R, R], move |a| w(a[0]).min(w(a[1])) as u64);
        check(&format!("max.{t} $d, $a, $b"), R, &[R, R], move |a| w(a[0]).max(w(a[1])) as u64);
        check(&format!("shr.{t} $d, $a, $b"), R, &[R, R], move |a| (w(a[0]) >> a[1].min(40)) as u64);
        check(&format!("sad.{t} $d, $a, $b, $c"), R, &[R, R, R], move |a| ((w(a[0]) - w(a[1])).abs() + w(a[2])) as u64);
        if signed {
            check("add.sat.s32 $d, $a, $b", R, &[R, R], move |a| (w(a[0]) + w(a[1])).clamp(low, high) as u64);
            check("sub.sat.s32 $d, $a, $b", R, &[R, R], move |a| (w(a[0]) - w(a[1])).clamp(low, high) as u64);
        }
    }
    check("neg.s32 $d, $a", R, &[R], |a| -s(a[0]) as u64);
    check("abs.s32 $d, $a", R, &[R], |a| s(a[0]).unsigned_abs());
    check("neg.s64 $d, $a", D, &[D], |a| (a[0] as i64).wrapping_neg() as u64);
    check("abs.s64 $d, $a", D, &[D], |a| (a[0] as i64).unsigned_abs());
    check("abs.s16 $d, $a", H, &[H], |a| u64::from((a[0] as i16).unsigned_abs()));
    check("add.u16 $d, $a, $b", H, &[H, H], |a| a[0] + a[1]);
    check("mul.lo.s16 $d, $a, $b", H, &[H, H], |a| a[0].wrapping_mul(a[1]));
    check("mul.wide.s16 $d, $a, $b", R, &[H, H], |a| (i64::from(a[0] as i16) * i64::from(a[1] as i16)) as u64);
    check("mul.wide.u16 $d, $a, $b", R, &[H, H], |a| a[0] * a[1]);
    check("max.s16 $d, $a, $b", H, &[H, H], |a| (a[0] as i16).max(a[1] as i16) as u64);
    check("shr.s16 $d, $a, $b", H, &[H, R], |a| (i64::from(a[0] as i16) >> a[1].min(20)) as u64);
    check("add.s64 $d, $a, $b", D, &[D, D], |a| a[0].wrapping_add(a[1]));
    check("sub.u64 $d, $a, $b", D, &[D, D], |a| a[0].wrapping_sub(a[1]));
    check("mul.lo.u64 $d, $a, $b", D, &[D, D], |a| a[0].wrapping_mul(a[1]));
    check("mul.hi.u64 $d, $a, $b", D, &[D, D], |a| ((u128::from(a[0]) * u128::from(a[1])) >> 64) as u64);
    check("mul.hi.s64 $d, $a, $b", D, &[D, D], |a| ((i128::from(a[0] as i64) * i128::from(a[1] as i64)) >> 64) as u64);
    check("min.s64 $d, $a, $b", D, &[D, D], |a| (a[0] as i64).min(a[1] as i64) as u64);
    check("rem.s64 $d, $a, $b", D, &[D, D], |a| {
        (a[0] as i64).checked_rem(a[1] as i64).unwrap_or(if a[1] == 0 { a[0] as i64 } else { 0 }) as u64
    });
    check("shr.s64 $d, $a, $b", D, &[D, R], |a| ((a[0] as i64) >> a[1].min(63)) as u64);
}

#[test]
fn logic_and_bits() {
    use Is::{D, H, R};
    check("and.b32 $d, $a, $b", R, &[R, R], |a| a[0] & a[1]);
    check("or.b64 $d, $a, $b", D, &[D, D], |a| a[0] | a[1]);
    check("xor.b16 $d, $a, $b", H, &[H, H], |a| a[0] ^ a[1]);
    check("not.b32 $d, $a", R, &[R], |a| !a[0]);
    check("cnot.b32 $d, $a", R, &[R], |a| u64::from(a[0] == 0));
    check("shl.b32 $d, $a, $b", R, &[R, R], |a| a[0].checked_shl(a[1].min(99) as u32).unwrap_or(0));
    check("shl.b64 $d, $a, $b", D, &[D, R], |a| if a[1] > 63 { 0 } else { a[0] << a[1] });
    check("shl.b16 $d, $a, $b", H, &[H, R], |a| if a[1] > 15 { 0 } else { a[0] << a[1] });
    check("shr.b32 $d, $a, $b", R, &[R, R], |a| if a[1] > 31 { 0 } else { a[0] >> a[1] });
    check("shr.u64 $d, $a, $b", D, &[D, R], |a| if a[1] > 63 { 0 } else { a[0] >> a[1] });
    let funnel = |a: &[u64]| u128::from(a[0] | a[1] << 32);
    check("shf.l.wrap.b32 $d, $a, $b, $c", R, &[R, R, R], move |a| ((funnel(a) << (a[2] % 32)) >> 32) as u64);
    check("shf.r.wrap.b32 $d, $a, $b, $c", R, &[R, R, R], move |a| (funnel(a) >> (a[2] % 32)) as u64);
    check("shf.l.clamp.b32 $d, $a, $b, $c", R, &[R, R, R], move |a| ((funnel(a) << a[2].min(32)) >> 32) as u64);
    check("shf.r.clamp.b32 $d, $a, $b, $c", R, &[R, R, R], move |a| (funnel(a) >> a[2].min(32)) as u64);
    check("popc.b32 $d, $a", R, &[R], |a| (0..32).map(|i| a[0] >> i & 1).sum());
    check("popc.b64 $d, $a", R, &[D], |a| (0..64).map(|i| a[0] >> i & 1).sum());
    check("clz.b32 $d, $a", R, &[R], |a| (0..32).rev().take_while(|i| a[0] >> i & 1 == 0).count() as u64);
    check("clz.b64 $d, $a", R, &[D], |a| (0..64).rev().take_while(|i| a[0] >> i & 1 == 0).count() as u64);
    check("brev.b32 $d, $a", R, &[R], |a| (0..32).map(|i| (a[0] >> i & 1) << (31 - i)).sum());
    check("bfind.u32 $d, $a", R, &[R], |a| (0..32).rev().find(|i| a[0] >> i & 1 == 1).unwrap_or(u64::MAX));
    check("bfind.s32 $d, $a", R, &[R], |a| {
        let sign = a[0] >> 31;
        (0..32).rev().find(|i| a[0] >> i & 1 != sign).unwrap_or(u64::MAX)
    });
    // The ISA's own loop, bit by bit.
    let bfe = |a: &[u64], width: u64, signed: bool| {
        let (pos, len) = (a[1] & 0xff, a[2] & 0xff);
        let sign = if !signed || len == 0 { 0 } else { a[0] >> (pos + len - 1).min(width - 1) & 1 };
        (0..width)
            .map(|i| if i < len && pos + i < width { (a[0] >> (pos + i) & 1) << i } else { sign << i })
            .fold(0, |x, y| x | y)
    };
    check("bfe.u32 $d, $a, $b, $c", R, &[R, R, R], move |a| bfe(a, 32, false));
    check("bfe.s32 $d, $a, $b, $c", R, &[R, R, R], move |a| bfe(a, 32, true));
    check("bfe.u64 $d, $a, $b, $c", D, &[D, R, R], move |a| bfe(a, 64, false));
    check("bfe.s64 $d, $a, $b, $c", D, &[D, R, R], move |a| bfe(a, 64, true));
    let bfi = |a: &[u64], width: u64| {
        let (pos, len) = (a[2] & 0xff, a[3] & 0xff);
        (0..len).filter(|i| pos + i < width).fold(a[1], |f, i| f & !(1 << (pos + i)) | (a[0] >> i & 1) << (pos + i))
    };
    check("bfi.b32 $d, $a, $b, $c, $e", R, &[R, R, R, R], move |a| bfi(a, 32));
    check("bfi.b64 $d, $a, $b, $c, $e", D, &[D, D, R, R], move |a| {
        let a = [a[0], a[1], a[2], a[3].min((a[3] & 0xff).min(64))];
        bfi(&a, 64)
    });
    check("prmt.b32 $d, $a, $b, $c", R, &[R, R, R], |a| {
        let pool = (a[0] | a[1] << 32).to_le_bytes();
        (0..4).fold(0, |d, i| {
            let n = a[2] >> (4 * i);
            let b = pool[(n & 7) as usize];
            let b = if n & 8 == 0 {
                b
            } else if b & 0x80 != 0 {
                0xff
            } else {
                0
            };
            d | u64::from(b) << (8 * i)
        })
    });
    for lut in [0xeau64, 0x80, 0xfe, 0x96, 0x1b, 0x00, 0xff] {
        check(&format!("lop3.b32 $d, $a, $b, $c, {lut}"), R, &[R, R, R], move |a| {
            (0..32).fold(0, |d, i| {
                let index = (a[0] >> i & 1) * 4 + (a[1] >> i & 1) * 2 + (a[2] >> i & 1);
                d | (lut >> index & 1) << i
            })
        });
    }
    for (ta, tb) in [("u32", "u32"), ("s32", "s32"), ("u32", "s32"), ("s32", "u32")] {
        check(&format!("dp4a.{ta}.{tb} $d, $a, $b, $c"), R, &[R, R, R], move |a| {
            let byte = |v: u64, i: usize, t: &str| match t {
                "s32" => i64::from((v >> (8 * i)) as i8),
                _ => i64::from((v >> (8 * i)) as u8),
            };
            (0..4).fold(a[2] as i64, |s, i| s + byte(a[0], i, ta) * byte(a[1], i, tb)) as u64
        });
    }
}

#[test]
fn moves_and_selection() {
    use Is::{D, F, H, R};
    check("mov.b32 $d, $a", R, &[F], |a| a[0]);
    check("mov.f32 $d, $a", F, &[F], |a| a[0]);
    check("mov.b32 $d, {$a, $b}", R, &[H, H], |a| a[0] | a[1] << 16);
    check("mov.b64 $d, {$a, $b}", D, &[R, R], |a| a[0] | a[1] << 32);
    check("mov.b32 {%h1, $d}, $a", H, &[R], |a| a[0] >> 16);
    check("mov.b64 {$d, _}, $a", R, &[D], |a| a[0]);
    check("mov.b64 {_, _, $d, _}, $a", H, &[D], |a| a[0] >> 32);
    check("setp.lt.s32 %p0, $a, $b; selp.b32 $d, $a, $b, %p0", R, &[R, R], |a| {
        if (a[0] as i32) < a[1] as i32 {
            a[0]
        } else {
            a[1]
        }
    });
    check("setp.ge.u64 %p0, $a, $b; selp.b64 $d, $a, $b, !%p0", D, &[D, D], |a| a[0].min(a[1]));
    check("cvt.u16.u32 $d, $a", H, &[R], |a| a[0]);
    check("cvt.pack.sat.s8.s32.b32 $d, $a, $b, $c", R, &[R, R, R], |a| {
        let byte = |v: u64| u64::from((v as i32).clamp(-128, 127) as u8);
        byte(a[0]) << 8 | byte(a[1]) | (a[2] & 0xffff) << 16
    });
    check("cvt.pack.sat.u16.s32 $d, $a, $b", R, &[R, R], |a| {
        let half = |v: u64| (v as i32).clamp(0, 65535) as u64;
        half(a[0]) << 16 | half(a[1])
    });
    check("slct.b32.s32 $d, $a, $b, $c", R, &[R, R, R], |a| if a[2] >> 31 == 0 { a[0] } else { a[1] });
    check("copysign.f32 $d, $a, $b", F, &[F, F], |a| a[0] & 0x8000_0000 | a[1] & 0x7fff_ffff);
}

#[test]
fn comparisons() {
    use Is::{D, F, G, H, R};
    let answer = |name: &str, order: Option<std::cmp::Ordering>| {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let unordered = name.ends_with('u') && name.len() == 3;
        match name {
            "num" => order.is_some(),
            "nan" => order.is_none(),
            _ if order.is_none() => unordered,
            _ => match &name[..2] {
                "eq" => order == Some(Equal),
                "ne" => order != Some(Equal),
                "lt" | "lo" => order == Some(Less),
                "le" | "ls" => order != Some(Greater),
                "gt" | "hi" => order == Some(Greater),
                _ => order != Some(Less),
            },
        }
    };
    let run = |name: &'static str, ty: &str, is: Is, order: &dyn Fn(u64, u64) -> Option<std::cmp::Ordering>| {
        check(&format!("setp.{name}.{ty} %p0, $a, $b; selp.u32 $d, 1, 0, %p0"), R, &[is, is], |a| {
            u64::from(answer(name, order(a[0], a[1])))
        });
    };
    for name in ["eq", "ne", "lt", "le", "gt", "ge"] {
        run(name, "u32", R, &|a, b| a.partial_cmp(&b));
        run(name, "s32", R, &|a, b| (a as i32).partial_cmp(&(b as i32)));
        run(name, "s16", H, &|a, b| (a as i16).partial_cmp(&(b as i16)));
        run(name, "u16", H, &|a, b| a.partial_cmp(&b));
        run(name, "s64", D, &|a, b| (a as i64).partial_cmp(&(b as i64)));
        run(name, "u64", D, &|a, b| a.partial_cmp(&b));
    }
    for name in ["lo", "ls", "hi", "hs"] {
        run(name, "u32", R, &|a, b| a.partial_cmp(&b));
    }
    for name in ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"] {
        run(name, "f32", F, &|a, b| f(a).partial_cmp(&f(b)));
        run(name, "f64", G, &|a, b| f64::from_bits(a).partial_cmp(&f64::from_bits(b)));
        run(name, "f16", H, &|a, b| f16::from_bits(a as u16).partial_cmp(&f16::from_bits(b as u16)));
        run(name, "bf16", H, &|a, b| bf16::from_bits(a as u16).partial_cmp(&bf16::from_bits(b as u16)));
    }
    check("setp.eq.ftz.f32 %p0, $a, $b; selp.u32 $d, 1, 0, %p0", R, &[F, F], |a| {
        u64::from(ftz(f(a[0])) == ftz(f(a[1])))
    });
    // Combination with a predicate, and the second destination.
    check(
        "setp.eq.u32 %p1, 1, 1; setp.lt.and.s32 %p0|%p2, $a, $b, !%p1; selp.u32 $d, 1, 0, %p0; @%p2 add.u32 $d, $d, 2",
        R,
        &[R, R],
        |_| 0,
    );
    check(
        "setp.eq.u32 %p1, 1, 1; setp.lt.xor.s32 %p0|%p2, $a, $b, %p1; selp.u32 $d, 1, 0, %p0; @%p2 add.u32 $d, $d, 2",
        R,
        &[R, R],
        |a| {
            if (a[0] as i32) < a[1] as i32 {
                2
            } else {
                1
            }
        },
    );
    check(
        "setp.eq.u32 %p1, 1, 2; or.pred %p0, %p1, !%p1; xor.pred %p2, %p0, %p1; and.pred %p3, %p2, %p1; \
        not.pred %p3, %p3; selp.u32 $d, $a, 0, %p3",
        R,
        &[R],
        |a| a[0],
    );
    check("setp.gt.f16x2 %p0|%p1, $a, $b; selp.u32 $d, 1, 0, %p0; @%p1 add.u32 $d, $d, 2", R, &[R, R], |a| {
        let side = |s: u32| f16::from_bits((a[0] >> s) as u16) > f16::from_bits((a[1] >> s) as u16);
        u64::from(side(0)) + 2 * u64::from(side(16))
    });
}

fn ftz(v: f32) -> f32 {
    if v.is_subnormal() {
        0f32.copysign(v)
    } else {
        v
    }
}

fn sat(v: f32) -> f32 {
    if v.is_nan() {
        0.0
    } else {
        v.clamp(0.0, 1.0) + 0.0
    }
}

#[test]
fn f32_arithmetic() {
    use Is::F;
    type Binary = fn(f32, f32) -> f32;
    let ops: [(&str, Binary); 4] =
        [("add", |a, b| a + b), ("sub.rn", |a, b| a - b), ("mul", |a, b| a * b), ("div.rn", |a, b| a / b)];
    for (name, op) in ops {
        check(&format!("{name}.f32 $d, $a, $b"), F, &[F, F], move |a| bits(op(f(a[0]), f(a[1]))));
        check(&format!("{name}.ftz.f32 $d, $a, $b"), F, &[F, F], move |a| bits(ftz(op(ftz(f(a[0])), ftz(f(a[1]))))));
        if !name.starts_with("div") {
            check(&format!("{name}.sat.f32 $d, $a, $b"), F, &[F, F], move |a| bits(sat(op(f(a[0]), f(a[1])))));
        }
    }
    check("fma.rn.f32 $d, $a, $b, $c", F, &[F, F, F], |a| bits(f(a[0]).mul_add(f(a[1]), f(a[2]))));
    check("fma.rn.ftz.f32 $d, $a, $b, $c", F, &[F, F, F], |a| {
        bits(ftz(ftz(f(a[0])).mul_add(ftz(f(a[1])), ftz(f(a[2])))))
    });
    check("mad.rn.sat.f32 $d, $a, $b, $c", F, &[F, F, F], |a| bits(sat(f(a[0]).mul_add(f(a[1]), f(a[2])))));
    check("sqrt.rn.f32 $d, $a", F, &[F], |a| bits(f(a[0]).sqrt()));
    check("rcp.rn.f32 $d, $a", F, &[F], |a| bits(1.0 / f(a[0])));
    check("abs.f32 $d, $a", F, &[F], |a| bits(f(a[0]).abs()));
    check("neg.ftz.f32 $d, $a", F, &[F], |a| bits(-ftz(f(a[0]))));
    // NaN yields to a number; -0 < +0.
    let order = |a: &[u64], max: bool| {
        let (x, y) = (f(a[0]), f(a[1]));
        if x.is_nan() || y.is_nan() {
            return bits(if x.is_nan() { y } else { x });
        }
        let first = x.total_cmp(&y).is_lt() != max;
        bits(if first { x } else { y })
    };
    check("min.f32 $d, $a, $b", F, &[F, F], move |a| order(a, false));
    check("max.f32 $d, $a, $b", F, &[F, F], move |a| order(a, true));
    check("max.NaN.f32 $d, $a, $b", F, &[F, F], move |a| {
        if f(a[0]).is_nan() || f(a[1]).is_nan() {
            0x7fff_ffff
        } else {
            order(a, true)
        }
    });
}

/// `exact` rounded to f32 by mode, from its neighbours: an f64 that the operation gives exactly.
fn directed(exact: f64, mode: &str) -> f32 {
    let near = exact as f32;
    if near.is_nan() || f64::from(near) == exact {
        return near;
    }
    let (below, above) = if f64::from(near) < exact { (near, near.next_up()) } else { (near.next_down(), near) };
    match mode {
        "rm" => below,
        "rp" => above,
        _ if exact > 0.0 => below,
        _ => above,
    }
}

#[test]
fn directed_rounding() {
    use Is::{D, F, G, R};
    for mode in ["rz", "rm", "rp"] {
        check(&format!("mul.{mode}.f32 $d, $a, $b"), F, &[F, F], move |a| {
            bits(directed(f64::from(f(a[0])) * f64::from(f(a[1])), mode))
        });
        check(&format!("cvt.{mode}.f32.f64 $d, $a"), F, &[G], move |a| bits(directed(f64::from_bits(a[0]), mode)));
        check(&format!("cvt.{mode}.f32.u32 $d, $a"), F, &[R], move |a| bits(directed(a[0] as u32 as f64, mode)));
        check(&format!("cvt.{mode}.f32.s32 $d, $a"), F, &[R], move |a| bits(directed(f64::from(a[0] as i32), mode)));
        check(&format!("cvt.{mode}.f32.u64 $d, $a"), F, &[D], move |a| {
            // 40 bits are exact in f64; the rest only says whether there is more.
            let sticky = (a[0] >> 24 << 24) | u64::from(a[0] & 0xff_ffff != 0) << 24;
            let exact = if a[0] < 1 << 53 { a[0] as f64 } else { sticky as f64 };
            let low = directed(if a[0] < 1 << 53 { exact } else { (a[0] >> 11 << 11) as f64 }, "rm");
            let up = mode == "rp" && f64::from(low) as u128 != u128::from(a[0]);
            bits(if up { low.next_up() } else { low })
        });
    }
    // Sums whose exact value fits f64: operands of like size.
    for mode in ["rz", "rm", "rp"] {
        let tame = "and.b32 %r30, $a, 0x807fffff; or.b32 %r30, %r30, 0x3f800000; mov.b32 %f20, %r30; \
                    and.b32 %r30, $b, 0x83ffffff; or.b32 %r30, %r30, 0x3c000000; mov.b32 %f21, %r30; ";
        let x = |v: u64| f(v & 0x807f_ffff | 0x3f80_0000);
        let y = |v: u64| f(v & 0x83ff_ffff | 0x3c00_0000);
        check(&format!("{tame} add.{mode}.f32 $d, %f20, %f21"), F, &[R, R], move |a| {
            let sum = f64::from(x(a[0])) + f64::from(y(a[1]));
            bits(if sum == 0.0 && mode == "rm" { -0.0 } else { directed(sum, mode) })
        });
    }
}

#[test]
fn approximations_are_close() {
    use Is::F;
    let one = |name: &str, model: fn(f64) -> f64| {
        check(&format!("{name}.f32 $d, $a"), F, &[F], move |a| bits(model(f64::from(f(a[0]))) as f32));
        check(&format!("{name}.ftz.f32 $d, $a"), F, &[F], move |a| bits(ftz(model(f64::from(ftz(f(a[0])))) as f32)));
    };
    one("ex2.approx", f64::exp2);
    one("lg2.approx", f64::log2);
    one("rsqrt.approx", |v| 1.0 / v.sqrt());
    one("sqrt.approx", f64::sqrt);
    one("rcp.approx", |v| 1.0 / v);
    one("sin.approx", f64::sin);
    one("cos.approx", f64::cos);
    check("tanh.approx.f32 $d, $a", F, &[F], |a| bits(f64::from(f(a[0])).tanh() as f32));
    check("div.full.f32 $d, $a, $b", F, &[F, F], |a| bits(f(a[0]) / f(a[1])));
    check("div.approx.f32 $d, $a, $b", F, &[F, F], |a| {
        let (x, y) = (f(a[0]), f(a[1]));
        // Beyond 2^126 the ISA gives 0, or NaN for an infinite dividend.
        if y.is_finite() && y.abs() > f32::from_bits(0x7e80_0000) {
            return bits(if x.is_finite() { 0f32.copysign(x) * y.signum() } else { f32::NAN });
        }
        bits(x / y)
    });
}

#[test]
fn f64_arithmetic() {
    use Is::{F, G};
    let v = f64::from_bits;
    // f64 keeps NaN payloads as the machine makes them; compare numbers, and NaN with NaN through f32.
    let run = |text: &str, n: usize, model: fn(&[f64]) -> f64| {
        let text = format!("{}; cvt.rn.f32.f64 $d, %g9", text.replace("$d", "%g9"));
        check(&text, F, &[G, G, G][..n], move |a| bits(model(&a.iter().map(|b| v(*b)).collect::<Vec<_>>()) as f32));
    };
    run("add.f64 $d, $a, $b", 2, |a| a[0] + a[1]);
    run("sub.rn.f64 $d, $a, $b", 2, |a| a[0] - a[1]);
    run("mul.f64 $d, $a, $b", 2, |a| a[0] * a[1]);
    run("div.rn.f64 $d, $a, $b", 2, |a| a[0] / a[1]);
    run("fma.rn.f64 $d, $a, $b, $c", 3, |a| a[0].mul_add(a[1], a[2]));
    run("sqrt.rn.f64 $d, $a", 1, |a| a[0].sqrt());
    run("neg.f64 $d, $a", 1, |a| -a[0]);
    run("min.f64 $d, $a, $b", 2, |a| {
        if a[0].is_nan() || a[1].is_nan() {
            a[0].min(a[1])
        } else if a[0].total_cmp(&a[1]).is_lt() {
            a[0]
        } else {
            a[1]
        }
    });
}
