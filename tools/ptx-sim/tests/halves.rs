//! 16-bit arithmetic and conversions against the `half` crate and plain Rust, over all or many operands.

mod common;

use common::{bytes32, checked, kernel, run_with, u32s, Buf, Random};
use half::{bf16, f16};

/// Runs `text` on 32-bit `$a $b $c` to a 32-bit `$d` (registers `%r`; `%f` for f32 operands named `$x`).
fn go(text: &str, inputs: &[Vec<u32>]) -> Vec<u32> {
    let n = inputs[0].len().next_multiple_of(256);
    let mut body = "mov.u32 %r60, %tid.x; mov.u32 %r61, %ctaid.x; mad.lo.u32 %r60, %r61, 256, %r60;\n".to_string();
    let mut line = text.replace("$d", "%r9");
    for i in 0..inputs.len() {
        body += &format!("mad.wide.u32 %d10, %r60, 4, %d2{i}; ld.global.b32 %r{i}, [%d10]; mov.b32 %f{i}, %r{i};\n");
        body += &format!("cvt.u16.u32 %h{i}, %r{i};\n");
        line = line.replace(["$a", "$b", "$c"][i], &format!("%r{i}"));
        line = line.replace(["$x", "$y", "$z"][i], &format!("%f{i}")).replace(["$h", "$i", "$j"][i], &format!("%h{i}"));
    }
    body += &format!("{line};\nmad.wide.u32 %d10, %r60, 4, %d2{}; st.global.b32 [%d10], %r9;\nret;", inputs.len());
    let mut buffers: Vec<Buf> =
        inputs.iter().map(|v| Buf::In(bytes32(&[&v[..], &vec![0; n - v.len()]].concat()))).collect();
    buffers.push(Buf::Out(4 * n));
    let source = kernel(inputs.len() + 1, &body).replace("sm_80", "sm_90");
    let ran = match run_with(&source, [n as u32 / 256, 1, 1], [256, 1, 1], 0, &buffers, &[], &checked()) {
        Ok(r) => r,
        Err(e) => panic!("{text}: {e}"),
    };
    assert!(ran.report.findings.is_empty(), "{text}: {:?}", ran.report.findings);
    let mut out = u32s(&ran.buffers[inputs.len()]);
    out.truncate(inputs[0].len());
    out
}

/// Halves where roundings, ties and limits lie, and random ones.
fn pairs(seed: u64) -> Vec<u32> {
    let edges =
        [0u16, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x3c00, 0xbc00, 0x3c01, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00];
    let mut random = Random(seed);
    let mut half =
        |r: u64| if r.is_multiple_of(4) { edges[(r >> 8) as usize % edges.len()] } else { random.bits() as u16 };
    (0..4096u64).map(|i| u32::from(half(i)) | u32::from(half(i * 7 + 1)) << 16).collect()
}

fn both(v: u32, f: impl Fn(u16) -> u16) -> u32 {
    u32::from(f(v as u16)) | u32::from(f((v >> 16) as u16)) << 16
}

fn both2(v: u32, w: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    u32::from(f(v as u16, w as u16)) | u32::from(f((v >> 16) as u16, (w >> 16) as u16)) << 16
}

/// The f16 nearest to `v`, ties to even. `half` converts an f64 from its upper 32 bits only, so its neighbours compete
/// too.
fn nearest16(v: f64) -> f16 {
    let near = f16::from_f64(v);
    let bits = near.to_bits();
    let value = |h: u16| f16::from_bits(h).to_f64();
    let finite = [bits.saturating_sub(1), bits, bits.saturating_add(1)].into_iter().filter(|h| value(*h).is_finite());
    if !near.is_finite() || v == 0.0 {
        return near;
    }
    let key = |h: &u16| ((value(*h) - v).abs(), h & 1);
    f16::from_bits(finite.min_by(|x, y| key(x).partial_cmp(&key(y)).unwrap()).unwrap())
}

fn b16(v: f16) -> u16 {
    if v.is_nan() {
        0x7fff
    } else {
        v.to_bits()
    }
}

fn bb16(v: bf16) -> u16 {
    if v.is_nan() {
        0x7fff
    } else {
        v.to_bits()
    }
}

#[test]
fn f16x2_arithmetic_rounds_once() {
    let (a, b, c) = (pairs(1), pairs(2), pairs(3));
    type Op = fn(f64, f64) -> f64;
    // Sums and products of two f16 are exact in f64.
    let ops: [(&str, Op); 3] = [("add", |x, y| x + y), ("sub", |x, y| x - y), ("mul", |x, y| x * y)];
    for (name, op) in ops {
        let d = go(&format!("{name}.f16x2 $d, $a, $b"), &[a.clone(), b.clone()]);
        for i in 0..a.len() {
            let one = |x: u16, y: u16| b16(nearest16(op(f16::from_bits(x).to_f64(), f16::from_bits(y).to_f64())));
            assert_eq!(d[i], both2(a[i], b[i], one), "{name} of {:#x} and {:#x}", a[i], b[i]);
        }
    }
    let d = go("fma.rn.f16x2 $d, $a, $b, $c", &[a.clone(), b.clone(), c.clone()]);
    for i in 0..a.len() {
        for s in [0, 16] {
            let v = |x: u32| f16::from_bits((x >> s) as u16).to_f64();
            let want = b16(nearest16(v(a[i]) * v(b[i]) + v(c[i])));
            assert_eq!((d[i] >> s) as u16, want, "{} * {} + {}", v(a[i]), v(b[i]), v(c[i]));
        }
    }
    let d = go("fma.rn.relu.f16x2 $d, $a, $b, $c", &[a.clone(), b.clone(), c.clone()]);
    let plain = go("fma.rn.f16x2 $d, $a, $b, $c", &[a.clone(), b.clone(), c.clone()]);
    for i in 0..a.len() {
        assert_eq!(d[i], both(plain[i], |h| if h & 0x8000 != 0 { 0 } else { h }));
    }
    let d = go("min.f16x2 $d, $a, $b", &[a.clone(), b.clone()]);
    for i in 0..a.len() {
        let one = |x: u16, y: u16| {
            let (p, q) = (f16::from_bits(x), f16::from_bits(y));
            if p.is_nan() {
                b16(q)
            } else if q.is_nan() || p.total_cmp(&q).is_lt() {
                x
            } else {
                y
            }
        };
        assert_eq!(d[i], both2(a[i], b[i], one));
    }
    assert_eq!(go("neg.f16x2 $d, $a", &[vec![0x0000_3c00]]), [0x8000_bc00]);
    assert_eq!(go("abs.f16x2 $d, $a", &[vec![0x8000_bc00]]), [0x0000_3c00]);
    // Flushing: the least normal times a half is a subnormal; a subnormal operand is zero.
    assert_eq!(go("mul.ftz.f16x2 $d, $a, $b", &[vec![0x0400_0200], vec![0x3800_3c00]]), [0]);
    assert_eq!(go("add.sat.f16x2 $d, $a, $b", &[vec![0xbc00_3c00], vec![0x3800_3c00]]), [0x0000_3c00]);
}

#[test]
fn bf16x2_arithmetic_rounds_once() {
    // Operands of any size: the model's f64 sum may round, so keep exponents near one another.
    let tame = |seed| -> Vec<u32> { pairs(seed).into_iter().map(|v| both(v, |h| h & 0x87ff | 0x3c00)).collect() };
    let (a, b, c) = (tame(4), tame(5), tame(6));
    let d = go("fma.rn.bf16x2 $d, $a, $b, $c", &[a.clone(), b.clone(), c.clone()]);
    for i in 0..a.len() {
        for s in [0, 16] {
            let v = |x: u32| bf16::from_bits((x >> s) as u16).to_f64();
            assert_eq!((d[i] >> s) as u16, bb16(bf16::from_f64(v(a[i]) * v(b[i]) + v(c[i]))));
        }
    }
    for (name, op) in [("add", (|x, y| x + y) as fn(f64, f64) -> f64), ("mul", |x, y| x * y)] {
        let d = go(&format!("{name}.bf16x2 $d, $a, $b"), &[a.clone(), b.clone()]);
        for i in 0..a.len() {
            let one =
                |x: u16, y: u16| bb16(bf16::from_f64(op(bf16::from_bits(x).to_f64(), bf16::from_bits(y).to_f64())));
            assert_eq!(d[i], both2(a[i], b[i], one), "{name} of {:#x} and {:#x}", a[i], b[i]);
        }
    }
    // A tie that only a far smaller addend breaks: 1 + 2^-8 is half way, 2^-100 decides.
    assert_eq!(
        go("fma.rn.bf16x2 $d, $a, $b, $c", &[vec![0x3f81_3f81], vec![0x3f80_3f81], vec![0x0d80_0d80]])[0] >> 16,
        0x3f81
    );
    let tie = [vec![0x3f80], vec![0x3f80], vec![0x3b80]]; // 1 * 1 + 2^-8
    assert_eq!(go("fma.rn.bf16x2 $d, $a, $b, $c", &tie)[0] & 0xffff, 0x3f80);
    // 1.9921875^2 = 3.96881103515625 = tie-free; (1 + 2^-4)^2 = 1.12890625 lies half way between two bf16 values.
    let (x, tiny) = (0x3f88, 0x0d80);
    assert_eq!(go("fma.rn.bf16x2 $d, $a, $b, $c", &[vec![x], vec![x], vec![0]])[0], 0x3f90);
    assert_eq!(go("fma.rn.bf16x2 $d, $a, $b, $c", &[vec![x], vec![x], vec![tiny]])[0], 0x3f91);
    assert_eq!(go("fma.rn.bf16x2 $d, $a, $b, $c", &[vec![x], vec![x], vec![tiny | 0x8000]])[0], 0x3f90);
}

#[test]
fn every_half_widens_exactly() {
    let all: Vec<u32> = (0..=0xffff).collect();
    let d = go("cvt.f32.f16 %f9, $h; mov.b32 $d, %f9", std::slice::from_ref(&all));
    for (h, got) in all.iter().zip(&d) {
        let want = f16::from_bits(*h as u16).to_f32();
        assert!(f32::from_bits(*got).to_bits() == want.to_bits() || (want.is_nan() && *got == 0x7fff_ffff), "{h:#x}");
    }
    let d = go("cvt.f32.bf16 %f9, $h; mov.b32 $d, %f9", std::slice::from_ref(&all));
    for (h, got) in all.iter().zip(&d) {
        assert!(*got == h << 16 || (bf16::from_bits(*h as u16).is_nan() && *got == 0x7fff_ffff), "{h:#x}");
    }
}

/// f32 values around every kind of f16 and bf16 limit.
fn singles() -> Vec<u32> {
    let mut random = Random(8);
    let mut v: Vec<u32> = (0..3000).map(|_| random.bits() as u32).collect();
    // Near ties of f16 and bf16, in and below the normal range.
    for h in (0..0x7c00u32).step_by(97) {
        let x = f16::from_bits(h as u16).to_f32().to_bits();
        v.extend([x, x + 0x1000, x + 0x0fff, x + 0x1001, x | 0x8000_0000, (x + 0x1000) | 0x8000_0000]);
    }
    for h in (0..0x7f80u32).step_by(211) {
        v.extend([h << 16, (h << 16) + 0x8000, (h << 16) + 0x7fff, (h << 16) + 0x8001]);
    }
    v.extend([
        0x477f_efff,
        0x477f_f000,
        0x7f7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x3300_0000,
        0x3300_0001,
        0x3280_0000,
    ]);
    v
}

#[test]
fn narrowing_to_halves() {
    let x = singles();
    let d = go("cvt.rn.f16.f32 %h9, $x; mov.b32 $d, {%h9, 0}", std::slice::from_ref(&x));
    let z = go("cvt.rz.f16.f32 %h9, $x; mov.b32 $d, {%h9, 0}", std::slice::from_ref(&x));
    let e = go("cvt.rn.bf16.f32 %h9, $x; mov.b32 $d, {%h9, 0}", std::slice::from_ref(&x));
    for i in 0..x.len() {
        let v = f32::from_bits(x[i]);
        assert_eq!(d[i], u32::from(b16(f16::from_f32(v))), "{v:e}");
        assert_eq!(e[i], u32::from(bb16(bf16::from_f32(v))), "{v:e}");
        // Toward zero: the nearest, or the one below it in magnitude.
        let near = f16::from_f32(v);
        let want = if v.is_nan() || v.is_infinite() || near.to_f32().abs() <= v.abs() {
            b16(near)
        } else {
            near.to_bits() - 1
        };
        assert_eq!(z[i], u32::from(want), "{v:e}");
    }
    // Pairs: the first operand goes up.
    let pair = go("cvt.rn.f16x2.f32 $d, $x, $y", &[vec![0x3f80_0000], vec![0x4000_0000]]);
    assert_eq!(pair, [0x3c00_4000]);
    let pair = go("cvt.rn.bf16x2.f32 $d, $x, $y", &[vec![0x3f80_0000], vec![0x4000_0000]]);
    assert_eq!(pair, [0x3f80_4000]);
    let relu = go("cvt.rn.relu.f16x2.f32 $d, $x, $y", &[vec![0xbf80_0000], vec![0x7fc0_0000]]);
    assert_eq!(relu, [0x0000_7fff]);
    assert_eq!(go("cvt.rn.sat.f16.f32 %h9, $x; mov.b32 $d, {%h9, 0}", &[vec![0x4000_0000]]), [0x3c00]);
}

#[test]
fn tf32_rounds_ties_away() {
    let x = singles();
    let d = go("cvt.rna.tf32.f32 $d, $x", std::slice::from_ref(&x));
    for (x, d) in x.iter().zip(&d) {
        let v = f32::from_bits(*x);
        let want = if v.is_nan() {
            0x7fff_ffff
        } else if v.is_infinite() {
            *x
        } else {
            (x + 0x1000) & !0x1fff
        };
        assert_eq!(*d, want, "{v:e}");
    }
}

#[test]
fn float_to_integer_saturates() {
    let x = singles();
    type Rounding = fn(f64) -> f64;
    let modes: [(&str, Rounding); 4] =
        [("rni", f64::round_ties_even), ("rzi", f64::trunc), ("rmi", f64::floor), ("rpi", f64::ceil)];
    for (mode, round) in modes {
        for (ty, low, high) in [("s32", -2147483648.0, 2147483647.0), ("u32", 0.0, 4294967295.0)] {
            let d = go(&format!("cvt.{mode}.{ty}.f32 $d, $x"), std::slice::from_ref(&x));
            for (x, d) in x.iter().zip(&d) {
                let v = f64::from(f32::from_bits(*x));
                let want = if v.is_nan() { 0 } else { round(v).clamp(low, high) as i64 as u32 };
                assert_eq!(*d, want, "{mode} {ty} {v:e}");
            }
        }
        let d = go(&format!("cvt.{mode}.f32.f32 %f9, $x; mov.b32 $d, %f9"), std::slice::from_ref(&x));
        for (x, d) in x.iter().zip(&d) {
            let v = round(f64::from(f32::from_bits(*x))) as f32;
            assert!(*d == v.to_bits() || (v.is_nan() && *d == 0x7fff_ffff), "{mode} {v:e} {d:#x}");
        }
        let d = go(&format!("cvt.{mode}.s8.f32 $d, $x"), std::slice::from_ref(&x));
        for (x, d) in x.iter().zip(&d) {
            let v = f64::from(f32::from_bits(*x));
            let want = if v.is_nan() { 0 } else { round(v).clamp(-128.0, 127.0) as i32 as u32 };
            assert_eq!(*d, want, "{mode} s8 {v:e}");
        }
    }
    // NaN to 64 bits is the top bit alone.
    let d = go("cvt.rzi.s64.f32 %d9, $x; mov.b64 {_, $d}, %d9", &[vec![0x7fc0_0000, 0x3f80_0000]]);
    assert_eq!(d, [0x8000_0000, 0]);
}

#[test]
fn integers_convert_and_widen() {
    let mut random = Random(21);
    let a: Vec<u32> = (0..2000).map(|_| random.bits() as u32 >> (random.bits() % 32)).collect();
    let one = |text: &str, model: fn(u32) -> u32| {
        for (x, d) in a.iter().zip(go(text, std::slice::from_ref(&a))) {
            assert_eq!(d, model(*x), "{text} {x:#x}");
        }
    };
    one("cvt.rn.f32.u32 %f9, $a; mov.b32 $d, %f9", |v| (v as f32).to_bits());
    one("cvt.rn.f32.s32 %f9, $a; mov.b32 $d, %f9", |v| (v as i32 as f32).to_bits());
    one("cvt.rn.f32.s8 %f9, $a; mov.b32 $d, %f9", |v| (v as i8 as f32).to_bits());
    one("cvt.rn.f32.u8 %f9, $a; mov.b32 $d, %f9", |v| (v as u8 as f32).to_bits());
    one("cvt.rn.f16.s8 %h9, $a; mov.b32 $d, {%h9, 0}", |v| u32::from(f16::from_f32(v as i8 as f32).to_bits()));
    one("cvt.rn.f16.u32 %h9, $a; mov.b32 $d, {%h9, 0}", |v| u32::from(nearest16(v as f64).to_bits()));
    one("cvt.s32.s8 $d, $a", |v| v as i8 as i32 as u32);
    one("cvt.u32.u8 $d, $a", |v| v & 0xff);
    one("cvt.s32.s16 $d, $h", |v| v as i16 as i32 as u32);
    one("cvt.sat.s8.s32 $d, $a", |v| (v as i32).clamp(-128, 127) as u32);
    one("cvt.sat.u8.s32 $d, $a", |v| (v as i32).clamp(0, 255) as u32);
    one("cvt.sat.u16.u32 %h9, $a; mov.b32 $d, {%h9, 0}", |v| v.min(65535));
    one("cvt.s64.s32 %d9, $a; mov.b64 {_, $d}, %d9", |v| ((v as i32) >> 31) as u32);
    one("cvt.u64.u32 %d9, $a; mov.b64 {_, $d}, %d9", |_| 0);
    one("cvt.s64.s8 %d9, $a; cvt.u32.u64 $d, %d9", |v| v as i8 as i32 as u32);
    one("cvt.rn.f64.u32 %g0, $a; cvt.rn.f32.f64 %f9, %g0; mov.b32 $d, %f9", |v| (v as f32).to_bits());
}

#[test]
fn half_approximations() {
    let all: Vec<u32> = (0..=0xffff).collect();
    for (name, model) in [("ex2.approx.f16", f64::exp2 as fn(f64) -> f64), ("tanh.approx.f16", f64::tanh)] {
        let d = go(&format!("{name} %h9, $h; mov.b32 $d, {{%h9, 0}}"), std::slice::from_ref(&all));
        for (h, got) in all.iter().zip(&d) {
            let want = b16(nearest16(model(f16::from_bits(*h as u16).to_f64())));
            assert_eq!(*got, u32::from(want), "{name} {h:#x}");
        }
    }
}
