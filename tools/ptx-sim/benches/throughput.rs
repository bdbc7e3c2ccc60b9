//! Thread-instructions per second on one core: `cargo bench -p ptx-sim`.
//!
//! Each kernel is a loop over its mix; figures count every lane of every instruction, the loop's own included.

use std::time::Instant;

use ptx_sim::{launch, Launch, Memory, Module, Options, Param};

struct Case {
    name: &'static str,
    /// Statements of the loop's body.
    body: String,
}

fn source(body: &str) -> String {
    format!(
        ".version 7.8\n.target sm_80\n.address_size 64\n.visible .entry bench (.param .u64 in, .param .u64 out) {{\n\
         .reg .pred %p; .reg .b32 %i, %t, %s, %r<32>; .reg .f32 %f<32>; .reg .b64 %in, %out;\n\
         .shared .align 16 .b8 tile[8192];\n\
         ld.param.u64 %in, [in]; ld.param.u64 %out, [out];\n\
         mov.u32 %t, %tid.x; shl.b32 %t, %t, 2; mov.u32 %s, tile; add.u32 %s, %s, %t;\n\
         cvt.u64.u32 %out, %t; add.u64 %in, %in, %out; ld.param.u64 %out, [out];\n\
         st.shared.f32 [%s], 1.0; st.shared.f32 [%s + 4096], 0.5; st.shared.f32 [%s + 1024], 0.5;\n\
         mov.f32 %f0, 0.5; mov.f32 %f1, 0.25; mov.f32 %f2, 0.0; mov.f32 %f3, 0.0; mov.f32 %f4, 0.0; mov.f32 %f5, 0.0;\n\
         mov.f32 %f6, 0.0; mov.f32 %f7, 0.0;\n\
         mov.u32 %r0, 0x3c003c00; mov.u32 %r1, 0x2c002c00; mov.u32 %r2, 0x64006400; mov.u32 %r3, 0x12345678;\n\
         bar.sync 0;\n\
         mov.u32 %i, 0;\nloop:\n{body}\n\
         add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 2000; @%p bra loop;\n\
         mov.u32 %t, %tid.x; mad.wide.u32 %out, %t, 4, %out; st.global.f32 [%out], %f2;\nret;\n}}\n"
    )
}

fn main() {
    let repeat = |s: &str, n: usize| vec![s; n].join("\n");
    let cases = [
        Case { name: "fma", body: repeat("fma.rn.f32 %f2, %f0, %f1, %f2;", 8) },
        Case {
            name: "2 ld.shared + fma",
            body: repeat("ld.shared.f32 %f0, [%s]; ld.shared.f32 %f1, [%s + 4096]; fma.rn.f32 %f2, %f0, %f1, %f2;", 4),
        },
        Case {
            name: "ld.shared.v4 + 4 fma",
            body: repeat(
                "ld.shared.v4.f32 {%f8, %f9, %f10, %f11}, [tile];\n\
                 fma.rn.f32 %f2, %f8, %f0, %f2; fma.rn.f32 %f3, %f9, %f0, %f3;\n\
                 fma.rn.f32 %f4, %f10, %f0, %f4; fma.rn.f32 %f5, %f11, %f0, %f5;",
                2,
            ),
        },
        Case {
            name: "2 ld.global + fma",
            body: repeat(
                "ld.global.f32 %f0, [%in]; ld.global.f32 %f1, [%in + 4096]; fma.rn.f32 %f2, %f0, %f1, %f2;",
                4,
            ),
        },
        Case {
            name: "dequantize f16x2",
            body: repeat(
                "lop3.b32 %r4, %r3, 0x000f000f, %r2, 0xEA; lop3.b32 %r5, %r3, 0x00f000f0, %r2, 0xEA;\n\
                 sub.f16x2 %r4, %r4, %r2; fma.rn.f16x2 %r5, %r5, %r1, %r0;",
                2,
            ),
        },
        Case {
            name: "mma m16n8k16",
            body: repeat(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5}, {%r0, %r1, %r0, %r1},\n\
                 {%r0, %r1}, {%f2, %f3, %f4, %f5};",
                4,
            ),
        },
    ];
    println!("{:<22} {:>14} {:>14}   G thread-instructions/s, one core", "mix", "unchecked", "checked");
    for case in &cases {
        let module = match Module::parse(&source(&case.body), case.name) {
            Ok(m) => m,
            Err(e) => panic!("{e}"),
        };
        let rate = |checked: bool| -> f64 {
            let mut best = 0f64;
            for _ in 0..3 {
                let mut memory = Memory::new();
                let (Ok(a), Ok(b)) = (memory.alloc(1 << 16, true), memory.alloc(4096, true)) else { return 0.0 };
                let params = vec![Param::Buffer(a), Param::Buffer(b)];
                let shape = Launch { grid: [8, 1, 1], block: [128, 1, 1], dynamic_shared: 0, params };
                let options = Options { checked, threads: 1, ..Options::default() };
                let start = Instant::now();
                match launch(&module, "bench", &mut memory, &shape, &options) {
                    Ok(r) => best = best.max(r.counts.thread_instructions as f64 / start.elapsed().as_secs_f64() / 1e9),
                    Err(e) => panic!("{e}"),
                }
            }
            best
        };
        println!("{:<22} {:>14.2} {:>14.2}", case.name, rate(false), rate(true));
    }
    tile();
}

/// A whole kernel: the q4 tensor-core tile of the tests over 64 x 256 x 256.
fn tile() {
    let source = include_str!("../tests/ptx/tile_q4.ptx");
    let start = Instant::now();
    let module = match Module::parse(source, "tile_q4.ptx") {
        Ok(m) => m,
        Err(e) => panic!("{e}"),
    };
    let parse = start.elapsed().as_secs_f64() * 1e3;
    let (m, n, k) = (64, 256, 256);
    let time = |checked: bool| -> f64 {
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let mut memory = Memory::new();
            let sizes = [2 * m * k, n * k / 2, 4 * n, 4 * m * n];
            let mut params: Vec<Param> =
                sizes.iter().filter_map(|s| memory.alloc(*s, true).ok()).map(Param::Buffer).collect();
            let mut dims = vec![0; 64];
            dims[..4].copy_from_slice(&(n as u32).to_le_bytes());
            dims[4..8].copy_from_slice(&(k as u32).to_le_bytes());
            params.push(Param::Bytes(dims));
            let grid = [n as u32 / 32, m as u32 / 16, 1];
            let shape = Launch { grid, block: [64, 1, 1], dynamic_shared: 0, params };
            let options = Options { checked, threads: 1, ..Options::default() };
            let start = Instant::now();
            if let Err(e) = launch(&module, "tile_q4", &mut memory, &shape, &options) {
                panic!("{e}");
            }
            best = best.min(start.elapsed().as_secs_f64() * 1e3);
        }
        best
    };
    println!("tile_q4 {m}x{n}x{k}: parse {parse:.2} ms, run {:.2} ms, checked {:.2} ms", time(false), time(true));
}
