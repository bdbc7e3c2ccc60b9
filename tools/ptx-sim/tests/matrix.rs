//! `mma`, `ldmatrix`, `stmatrix` and `movmatrix` against the PTX ISA's fragment tables, written here from the tables
//! anew.

mod common;

use common::{bytes32, checked, kernel, run, run_with, u32s, Buf, Random};
use half::{bf16, f16};

/// Where element `i` of a lane's A, B or C lies, as the ISA's per-shape formulae say.
type Position = fn(lane: usize, i: usize) -> (usize, usize);

struct Shape {
    name: &'static str,
    types: &'static str,
    k: usize,
    /// Elements in a register.
    pack: usize,
    a: Position,
    b: Position,
}

const SHAPES: [Shape; 9] = [
    Shape {
        name: "m16n8k16",
        types: "f32.f16.f16.f32",
        k: 16,
        pack: 2,
        a: |l, i| {
            let row = if i < 2 || (4..6).contains(&i) { l / 4 } else { l / 4 + 8 };
            (row, if i < 4 { (l % 4) * 2 + (i & 1) } else { (l % 4) * 2 + (i & 1) + 8 })
        },
        b: |l, i| (if i < 2 { (l % 4) * 2 + (i & 1) } else { (l % 4) * 2 + (i & 1) + 8 }, l / 4),
    },
    Shape {
        name: "m16n8k8",
        types: "f32.f16.f16.f32",
        k: 8,
        pack: 2,
        a: |l, i| (if i < 2 { l / 4 } else { l / 4 + 8 }, (l % 4) * 2 + (i & 1)),
        b: |l, i| ((l % 4) * 2 + i, l / 4),
    },
    Shape {
        name: "m16n8k16",
        types: "f32.bf16.bf16.f32",
        k: 16,
        pack: 2,
        a: |l, i| {
            let row = if i < 2 || (4..6).contains(&i) { l / 4 } else { l / 4 + 8 };
            (row, if i < 4 { (l % 4) * 2 + (i & 1) } else { (l % 4) * 2 + (i & 1) + 8 })
        },
        b: |l, i| (if i < 2 { (l % 4) * 2 + (i & 1) } else { (l % 4) * 2 + (i & 1) + 8 }, l / 4),
    },
    Shape {
        name: "m16n8k8",
        types: "f32.bf16.bf16.f32",
        k: 8,
        pack: 2,
        a: |l, i| (if i < 2 { l / 4 } else { l / 4 + 8 }, (l % 4) * 2 + (i & 1)),
        b: |l, i| ((l % 4) * 2 + i, l / 4),
    },
    Shape {
        name: "m16n8k8",
        types: "f32.tf32.tf32.f32",
        k: 8,
        pack: 1,
        a: |l, i| (if i == 0 || i == 2 { l / 4 } else { l / 4 + 8 }, if i < 2 { l % 4 } else { l % 4 + 4 }),
        b: |l, i| (if i == 0 { l % 4 } else { l % 4 + 4 }, l / 4),
    },
    Shape {
        name: "m16n8k4",
        types: "f32.tf32.tf32.f32",
        k: 4,
        pack: 1,
        a: |l, i| (if i == 0 { l / 4 } else { l / 4 + 8 }, l % 4),
        b: |l, _| (l % 4, l / 4),
    },
    Shape {
        name: "m16n8k32",
        types: "s32.s8.s8.s32",
        k: 32,
        pack: 4,
        a: |l, i| {
            let row = if i < 4 || (8..12).contains(&i) { l / 4 } else { l / 4 + 8 };
            (row, if i < 8 { (l % 4) * 4 + (i & 3) } else { (l % 4) * 4 + (i & 3) + 16 })
        },
        b: |l, i| (if i < 4 { (l % 4) * 4 + (i & 3) } else { (l % 4) * 4 + (i & 3) + 16 }, l / 4),
    },
    Shape {
        name: "m16n8k16",
        types: "s32.s8.s8.s32",
        k: 16,
        pack: 4,
        a: |l, i| (if i < 4 { l / 4 } else { l / 4 + 8 }, (l % 4) * 4 + (i & 3)),
        b: |l, i| ((l % 4) * 4 + i, l / 4),
    },
    Shape {
        name: "m16n8k32",
        types: "s32.u8.s8.s32",
        k: 32,
        pack: 4,
        a: |l, i| {
            let row = if i < 4 || (8..12).contains(&i) { l / 4 } else { l / 4 + 8 };
            (row, if i < 8 { (l % 4) * 4 + (i & 3) } else { (l % 4) * 4 + (i & 3) + 16 })
        },
        b: |l, i| (if i < 4 { (l % 4) * 4 + (i & 3) } else { (l % 4) * 4 + (i & 3) + 16 }, l / 4),
    },
];

/// The same for C and D of all m16n8 shapes.
fn c_position(lane: usize, i: usize) -> (usize, usize) {
    (if i < 2 { lane / 4 } else { lane / 4 + 8 }, (lane % 4) * 2 + (i & 1))
}

/// Packs a matrix into lanes' registers: `[register][lane]`.
fn fragments(registers: usize, pack: usize, at: Position, bits: &dyn Fn(usize, usize) -> u32) -> Vec<[u32; 32]> {
    let width = 32 / pack;
    (0..registers)
        .map(|r| {
            std::array::from_fn(|l| {
                (0..pack).fold(0, |v, e| {
                    let (row, col) = at(l, r * pack + e);
                    v | bits(row, col) << (width * e)
                })
            })
        })
        .collect()
}

#[test]
fn mma_fragments_follow_the_tables() {
    for (n, shape) in SHAPES.iter().enumerate() {
        let mut random = Random(77 + n as u64);
        let integer = shape.types.starts_with("s32");
        let (na, nb) = (16 * shape.k / 32 / shape.pack, 8 * shape.k / 32 / shape.pack);
        // Small integers: sums are exact in every order, so equality is the test.
        let small = |r: &mut Random, low: i64, high: i64| low + (r.bits() >> 33) as i64 % (high - low + 1);
        let (low, high) = if integer { (-128, 127) } else { (-8, 8) };
        let a_low = if shape.types.contains("u8") { 0 } else { low };
        let a_high = if shape.types.contains("u8") { 255 } else { high };
        let a: Vec<Vec<i64>> =
            (0..16).map(|_| (0..shape.k).map(|_| small(&mut random, a_low, a_high)).collect()).collect();
        let b: Vec<Vec<i64>> = (0..shape.k).map(|_| (0..8).map(|_| small(&mut random, low, high)).collect()).collect();
        let c: Vec<Vec<i64>> = (0..16).map(|_| (0..8).map(|_| small(&mut random, -1000, 1000)).collect()).collect();
        let bits = |v: i64| -> u32 {
            match shape.types {
                t if t.contains("bf16") => u32::from(bf16::from_f32(v as f32).to_bits()),
                t if t.contains(".f16") => u32::from(f16::from_f32(v as f32).to_bits()),
                t if t.contains("tf32") => (v as f32).to_bits() | 0x1fff, // low bits must not count
                _ => v as u8 as u32,
            }
        };
        let sum_bits = |v: i64| if integer { v as u32 } else { (v as f32).to_bits() };
        let fa = fragments(na, shape.pack, shape.a, &|i, j| bits(a[i][j]));
        let fb = fragments(nb, shape.pack, shape.b, &|i, j| bits(b[i][j]));
        let fc = fragments(4, 1, c_position, &|i, j| sum_bits(c[i][j]));
        let input: Vec<u32> = fa.iter().chain(&fb).chain(&fc).flatten().copied().collect();

        let sum = if integer { "%r" } else { "%f" };
        let list =
            |p: &str, from: usize, n: usize| (from..from + n).map(|i| format!("{p}{i}")).collect::<Vec<_>>().join(", ");
        let mut body =
            "mov.u32 %r60, %laneid; mad.wide.u32 %d0, %r60, 4, %d20; mad.wide.u32 %d1, %r60, 4, %d21;\n".to_string();
        for i in 0..na + nb {
            body += &format!("ld.global.b32 %r{i}, [%d0 + {}];\n", 128 * i);
        }
        for i in 0..4 {
            body += &format!("ld.global.b32 {sum}{}, [%d0 + {}];\n", 20 + i, 128 * (na + nb + i));
        }
        body += &format!(
            "mma.sync.aligned.{}.row.col.{} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n",
            shape.name,
            shape.types,
            list(sum, 24, 4),
            list("%r", 0, na),
            list("%r", na, nb),
            list(sum, 20, 4)
        );
        for i in 0..4 {
            body += &format!("st.global.b32 [%d1 + {}], {sum}{};\n", 128 * i, 24 + i);
        }
        let ran = run(&kernel(2, &(body + "ret;")), &[Buf::In(bytes32(&input)), Buf::Out(512)]);
        assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
        assert_eq!((ran.report.counts.mma, ran.report.counts.mma_macs), (1, 16 * 8 * shape.k as u64));
        let d = u32s(&ran.buffers[1]);
        for lane in 0..32 {
            for i in 0..4 {
                let (row, col) = c_position(lane, i);
                let want = c[row][col] + (0..shape.k).map(|k| a[row][k] * b[k][col]).sum::<i64>();
                assert_eq!(d[32 * i + lane], sum_bits(want), "{} {} D[{row}][{col}]", shape.name, shape.types);
            }
        }
    }
}

#[test]
fn mma_with_f16_sums_rounds_once() {
    // D = A B + C with A = I: D is B[..] + C rounded to f16.
    let mut random = Random(5);
    let b: Vec<f16> = (0..128).map(|_| f16::from_f32(random.unit() * 3.0)).collect();
    let c: Vec<f16> = (0..128).map(|_| f16::from_f32(random.unit() * 1000.0)).collect();
    let one = |i: usize, j: usize| if i == j { 0x3c00 } else { 0 };
    let fa = fragments(4, 2, SHAPES[0].a, &one);
    let fb = fragments(2, 2, SHAPES[0].b, &|i, j| u32::from(b[8 * i + j].to_bits()));
    let fc = fragments(2, 2, c_position, &|i, j| u32::from(c[8 * i + j].to_bits()));
    let input: Vec<u32> = fa.iter().chain(&fb).chain(&fc).flatten().copied().collect();
    let mut body =
        "mov.u32 %r60, %laneid; mad.wide.u32 %d0, %r60, 4, %d20; mad.wide.u32 %d1, %r60, 4, %d21;\n".to_string();
    for i in 0..8 {
        body += &format!("ld.global.b32 %r{i}, [%d0 + {}];\n", 128 * i);
    }
    body += "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r10, %r11}, {%r0, %r1, %r2, %r3}, {%r4, %r5},\n\
             {%r6, %r7};\n\
             st.global.b32 [%d1], %r10; st.global.b32 [%d1 + 128], %r11; ret;";
    let ran = run(&kernel(2, &body), &[Buf::In(bytes32(&input)), Buf::Out(256)]);
    let d = u32s(&ran.buffers[1]);
    for lane in 0..32 {
        for i in 0..4 {
            let (row, col) = c_position(lane, i);
            let exact = f64::from(b[8 * row + col]) + f64::from(c[8 * row + col]);
            let got = f16::from_bits((d[32 * (i / 2) + lane] >> (16 * (i % 2))) as u16);
            assert_eq!(got, f16::from_f64(exact), "D[{row}][{col}]");
        }
    }
}

#[test]
fn satfinite_saturates() {
    let source = |sat: &str| {
        kernel(
            1,
            &format!(
                "mov.u32 %r0, 0x7f7f7f7f; mov.u32 %r1, 0x7fffff00; mov.u32 %r60, %laneid; \
                mad.wide.u32 %d0, %r60, 4, %d20;\n\
                 mma.sync.aligned.m16n8k16.row.col{sat}.s32.s8.s8.s32 {{%r4, %r5, %r6, %r7}}, {{%r0, %r0}}, {{%r0}},\n\
                 {{%r1, %r1, %r1, %r1}};\nst.global.b32 [%d0], %r4;\nret;"
            ),
        )
    };
    let value = |sat| u32s(&run(&source(sat), &[Buf::Out(128)]).buffers[0])[9];
    assert_eq!(value(".satfinite"), i32::MAX as u32);
    assert_eq!(value(""), 0x7fff_ff00u32.wrapping_add(16 * 127 * 127));
}

/// A kernel that fills shared memory with 16-bit numbers 0, 1, .. and runs a matrix instruction.
fn matrix_kernel(op: &str) -> String {
    kernel(
        1,
        &format!(
            ".shared .align 16 .b8 s[1024];\nmov.u32 %r0, %laneid; mov.u32 %r1, 0; mov.u32 %r10, s;\nfill:\n\
             shl.b32 %r2, %r1, 5; add.u32 %r2, %r2, %r0; shl.b32 %r3, %r2, 1; shl.b32 %r4, %r2, 2; \
             add.u32 %r4, %r4, %r10;\n\
             mad.lo.u32 %r3, %r3, 65537, 65536; st.shared.u32 [%r4], %r3;\nadd.u32 %r1, %r1, 1;\n\
             setp.lt.u32 %p0, %r1, 8;\n@%p0 bra fill;\nbar.warp.sync -1;\n\
             mad.wide.u32 %d0, %r0, 4, %d20;\n{op}\nret;"
        ),
    )
}

#[test]
fn ldmatrix_rows_and_columns() {
    for (n, trans) in [(1, false), (2, false), (4, false), (1, true), (2, true), (4, true)] {
        // Lane l points at row 31 - l of the 64 rows of 8 numbers, so matrix m has rows 31 - 8m - r.
        let registers = ["%r20", "%r21", "%r22", "%r23"][..n].join(", ");
        let stores: String = (0..n).map(|i| format!("st.global.b32 [%d0 + {}], %r2{i};\n", 128 * i)).collect();
        let t = if trans { ".trans" } else { "" };
        let source = matrix_kernel(&format!(
            "sub.u32 %r5, 31, %r0; shl.b32 %r5, %r5, 4; add.u32 %r5, %r5, %r10;\n\
             ldmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16 {{{registers}}}, [%r5];\n{stores}"
        ));
        let ran = run(&source, &[Buf::Out(128 * n)]);
        assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
        let d = u32s(&ran.buffers[0]);
        for (m, lane) in (0..n).flat_map(|m| (0..32).map(move |l| (m, l))) {
            let element = |row: usize, col: usize| 8 * (31 - 8 * m - row) + col;
            let (i, j) = (lane / 4, 2 * (lane % 4));
            let (low, high) =
                if trans { (element(j, i), element(j + 1, i)) } else { (element(i, j), element(i, j + 1)) };
            assert_eq!(d[32 * m + lane], (low | high << 16) as u32, "x{n}{t} matrix {m} lane {lane}");
        }
        let line = ran.report.counts.lines.iter().find(|l| l.name.starts_with("ldmatrix")).unwrap();
        assert_eq!((line.waves, line.conflicts), (n as u64, 0));
    }
}

#[test]
fn stmatrix_undoes_ldmatrix() {
    for trans in ["", ".trans"] {
        let source = matrix_kernel(&format!(
            "shl.b32 %r5, %r0, 4; add.u32 %r5, %r5, %r10;\n\
             ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r5];\nbar.warp.sync -1;\n\
             stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5 + 512], {{%r20, %r21, %r22, %r23}};\n\
             bar.warp.sync -1;\n\
             ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r5 + 512]; mad.wide.u32 %d0, %r0, 16, %d20;\n\
             st.global.v4.b32 [%d0], {{%r30, %r31, %r32, %r33}};"
        ))
        .replace("sm_80", "sm_90");
        let ran = run(&source, &[Buf::Out(512)]);
        assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
        let want: Vec<u32> = (0..128u32).map(|i| (2 * i) | ((2 * i + 1) << 16)).collect();
        assert_eq!(u32s(&ran.buffers[0]), want);
    }
}

#[test]
fn movmatrix_transposes() {
    let source = kernel(
        1,
        "mov.u32 %r0, %laneid; shl.b32 %r1, %r0, 1; mad.lo.u32 %r1, %r1, 65537, 65536;\n\
         movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\nmad.wide.u32 %d0, %r0, 4, %d20; st.global.b32 [%d0], %r2;\n\
         ret;",
    );
    let d = u32s(&run(&source, &[Buf::Out(128)]).buffers[0]);
    for lane in 0..32u32 {
        let (row, col) = (lane / 4, 2 * (lane % 4));
        assert_eq!(d[lane as usize], (8 * col + row) | (8 * (col + 1) + row) << 16);
    }
}

#[test]
fn ldmatrix_conflicts_are_counted() {
    // Rows 128 bytes apart all start in bank 0: eight waves a matrix.
    let source = kernel(
        0,
        ".extern .shared .align 16 .b8 s[];\nmov.u32 %r0, %laneid; shl.b32 %r1, %r0, 7; mov.u32 %r2, s; \
        add.u32 %r1, %r1, %r2;\n\
         mov.b32 %r3, 0; st.shared.v4.b32 [%r1], {%r3, %r3, %r3, %r3}; bar.warp.sync -1;\n\
         ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r1];\nret;",
    );
    let ran = run_with(&source, [1; 3], [32, 1, 1], 4096, &[], &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    let line = ran.report.counts.lines.iter().find(|l| l.name.starts_with("ldmatrix")).unwrap();
    assert_eq!((line.waves, line.conflicts), (32, 28));
}
