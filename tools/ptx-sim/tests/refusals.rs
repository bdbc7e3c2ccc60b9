//! What is not PTX, or not supported, is refused by name and line; hostile text never panics.

mod common;

use common::{kernel, line_of, Random};
use ptx_sim::{launch, Error, Launch, Memory, Module, Options, Param};

#[test]
fn unknown_things_are_named_with_their_line() {
    for (statement, word) in [
        ("frobnicate.u32 %r0, %r1;", "frobnicate"),
        ("add.foo.f32 %f0, %f1, %f2;", ".foo"),
        ("add.u32 %r0, %r1;", "3 operands"),
        ("add.f32 %r0, %f1, %f2, %f3;", "3 operands"),
        ("add.f32 %f0, %d1, %f2;", "%d1"),
        ("add.f32 %f0, %f1, 2;", "constant"),
        ("mov.u32 %r0, 1.5;", "constant"),
        ("cvt.f32.u32 %f0, %r0;", "combination"),
        ("ld.global.f32 %f0, [%r0];", "64-bit"),
        ("ld.global.f32 %f0, [%d0 - 4];", "negative offset"),
        ("ld.global.v4.b64 {%d0, %d1, %d2, %d3}, [%d4];", "16 bytes"),
        ("ld.global.u32 %nope, [%d0];", "%nope"),
        ("ld.param.u32 %r0, [p0 + 8];", "beyond the parameter"),
        ("ld.global.hot.u32 %r0, [%d0];", ".hot"),
        ("bra nowhere;", "nowhere"),
        ("@%r0 ret;", "%r0"),
        ("setp.lo.s32 %p0, %r0, %r1;", ".lo"),
        ("setp.lt.b32 %p0, %r0, %r1;", ".lt"),
        ("shfl.bfly.b32 %r0, %r1, 1, 31;", "sync"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%f0}, {%r0}, {%r1}, {%f1};", "multiplicand"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r1}, {%f1};", "4 registers"),
        ("cp.async.cg.shared.global [%r0], [%d0], 8;", "16"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%r2];", "4 registers"),
        ("wgmma.fence.sync.aligned;", "wgmma"),
        ("call foo;", "call"),
        ("add.bf16 %h0, %h1, %h2;", "sm_90"),
        ("neg.u32 %r0, %r1;", ".u32"),
        ("add.u32 %r0, %tid.x, 1;", "special registers"),
        ("mov.u32 %r0, %clock;", "%clock"),
        (".local .b8 x[4];", ".local"),
        ("mov.b32 %r0, {%r1, %r2};", "%r1"),
        ("atom.global.mul.u32 %r0, [%d0], 1;", "operation"),
        ("add.u32 %r0, %r1, %r2 %r3;", "expected"),
        ("add.u32 %r0, %r1, (1 + ;", "operand"),
        ("mov.u32 %r0, 1/0;", "zero"),
    ] {
        let source = kernel(1, &format!("{statement} // here\nret;"));
        let Err(Error::Parse { file, line, message }) = Module::parse(&source, "k.ptx").map(|_| ()) else {
            panic!("accepted: {statement}");
        };
        assert_eq!((file.as_str(), line), ("k.ptx", line_of(&source, "here")), "{statement}: {message}");
        assert!(message.contains(word), "{statement}: {message}");
    }
}

#[test]
fn modules_are_checked() {
    let good = kernel(0, "ret;");
    for (from, to, word) in [
        (".target sm_80", ".target sm_70", "sm_80"),
        (".version 7.8\n", "", ".version"),
        (".address_size 64", ".address_size 32", "64"),
        (".visible .entry", ".func", ".func"),
        ("ret;", "ret; // \u{e9}", "ASCII"),
        ("ret;\n}", "ret;\n", "closing brace"),
        (".entry k", ".entry", "name"),
    ] {
        let Err(e) = Module::parse(&good.replace(from, to), "m").map(|_| ()) else { panic!("accepted without {from}") };
        assert!(e.to_string().contains(word), "{e}");
    }
    assert!(Module::parse("", "empty").is_err());
}

#[test]
fn constant_expressions_scopes_and_general_parameters() {
    let source = ".version 7.8\n.target sm_80\n.address_size 64\n\
        .const .align 4 .u32 table[2][2] = {{1, 2}, {3, 0x10}};\n\
        .visible .entry k(.param .u32 n, .param .u64 .ptr .global .align 16 out,\n\
        .param .align 8 .b8 s[12], .param .u16 h)\n\
        .maxntid 64 .minnctapersm 1 {\n\
        .reg .b32 x, %y<3>; .reg .b64 %o; .reg .b16 %h;\n.pragma \"nounroll\";\n\
        ld.param.u32 x, [n]; ld.param.u64 %o, [out]; ld.param.u32 %y0, [s + 2*4]; ld.param.u16 %h, [h];\n\
        { .reg .b32 x; mov.u32 x, (3 + 4) * 2 - (1 << 2) % 3; st.global.u32 [%o + 4], x; }\n\
        st.global.u32 [%o], x; st.global.u32 [%o + 32 / 4], %y0; st.global.u16 [%o + 12], %h;\n\
        ld.const.u32 %y1, [table + 12]; st.global.u32 [%o + 16], %y1;\n\
        mov.u32 %y2, 0xF ? ~0 & 077 : 5; st.global.u32 [%o + 20], %y2;\n\
        ret; }";
    let module = Module::parse(source, "k").unwrap();
    let entry = &module.entries()[0];
    let shapes: Vec<_> =
        entry.params.iter().map(|p| (p.name.as_str(), p.offset, p.size, p.align, p.is_pointer)).collect();
    assert_eq!(
        shapes,
        [("n", 0, 4, 4, false), ("out", 8, 8, 8, true), ("s", 16, 12, 8, false), ("h", 28, 2, 2, false)]
    );
    let mut memory = Memory::new();
    let out = memory.alloc(64, false).unwrap();
    let mut s = vec![0; 8];
    s.extend(77u32.to_le_bytes());
    let params =
        vec![Param::Bytes(vec![9, 0, 0, 0]), Param::Offset(out, 32), Param::Bytes(s), Param::Bytes(vec![0x34, 0x12])];
    let shape = Launch { grid: [1; 3], block: [1; 3], dynamic_shared: 0, params };
    let report = launch(&module, "k", &mut memory, &shape, &Options { checked: true, ..Options::default() }).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    let words = common::u32s(&memory.bytes(out)[32..56]);
    assert_eq!(words, [9, 13, 77, 0xffff_1234, 16, 63]);
}

#[test]
fn launches_must_fit() {
    let module = Module::parse(&kernel(1, "ret;").replace(") {", ")\n.reqntid 32 {"), "k").unwrap();
    let mut memory = Memory::new();
    let id = memory.alloc(4, true).unwrap();
    let good = Launch { grid: [1; 3], block: [32, 1, 1], dynamic_shared: 0, params: vec![Param::Buffer(id)] };
    let go = |memory: &mut Memory, name: &str, l: &Launch| launch(&module, name, memory, l, &Options::default());
    assert!(go(&mut memory, "k", &good).is_ok());
    for (bad, word) in [
        (Launch { block: [64, 1, 1], ..good.clone() }, "reqntid"),
        (Launch { block: [2048, 1, 1], ..good.clone() }, "1024"),
        (Launch { grid: [0, 1, 1], ..good.clone() }, "empty"),
        (Launch { grid: [1, 70000, 1], ..good.clone() }, "65535"),
        (Launch { params: vec![], ..good.clone() }, "0 arguments"),
        (Launch { params: vec![Param::Bytes(vec![1])], ..good.clone() }, "8 bytes"),
        (Launch { dynamic_shared: 1 << 30, ..good.clone() }, "shared memory"),
    ] {
        let e = go(&mut memory, "k", &bad).unwrap_err();
        assert!(e.to_string().contains(word), "{e}");
    }
    assert!(go(&mut memory, "other", &good).unwrap_err().to_string().contains("k"));
    memory.free(id);
    assert!(go(&mut memory, "k", &good).is_err());
}

/// Damaged sources are refused or run to some end; nothing panics.
#[test]
fn damaged_sources_never_panic() {
    let source = include_str!("ptx/mean_square.ptx");
    let mut random = Random(11);
    for _ in 0..2000 {
        let mut text: Vec<u8> = source.bytes().collect();
        for _ in 0..1 + random.bits() % 3 {
            let at = random.bits() as usize % text.len();
            match random.bits() % 3 {
                0 => text[at] = b" .,;:{}[]()<>%@!-+*/0123456789abcxyz_"[random.bits() as usize % 37],
                1 => drop(text.remove(at)),
                _ => {
                    let end = (at + random.bits() as usize % 40).min(text.len());
                    text.drain(at..end);
                }
            }
        }
        let text = String::from_utf8(text).unwrap();
        let Ok(module) = Module::parse(&text, "damaged") else { continue };
        let entry = module.entries()[0].clone();
        let mut memory = Memory::new();
        let ids: Vec<_> = (0..3).map(|_| memory.alloc(260, true).unwrap()).collect();
        let mut dims = common::bytes32(&[1, 65, 0x3727_c5ac]);
        dims.resize(64, 0);
        let params = ids.iter().map(|i| Param::Buffer(*i)).chain([Param::Bytes(dims)]).collect();
        let shape = Launch { grid: [2, 1, 1], block: [64, 1, 1], dynamic_shared: 0, params };
        let options = Options { checked: true, step_limit: 5000, threads: 1, ..Options::default() };
        let _ = launch(&module, &entry.name, &mut memory, &shape, &options); // any result, no panic
    }
}

#[test]
fn deep_nesting_is_refused() {
    let parens = kernel(0, &format!("mov.u32 %r0, {}1{};\nret;", "(".repeat(100_000), ")".repeat(100_000)));
    assert!(Module::parse(&parens, "deep").is_err());
    for prefix in ["-", "(.u64)", "1 ? 1 : "] {
        let source = kernel(0, &format!("mov.u32 %r0, {}1;\nret;", prefix.repeat(100_000)));
        assert!(Module::parse(&source, "deep").is_err());
    }
    assert!(
        Module::parse(&kernel(0, &format!("{}{}\nret;", "{".repeat(100_000), "}".repeat(100_000))), "deep").is_err()
    );
}
