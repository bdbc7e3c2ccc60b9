//! Each class of finding, provoked by a small kernel and reported at the right line.

mod common;

use common::{checked, found, kernel, line_of, run, run_with, unchecked, Buf};
use ptx_sim::{Error, Kind, Launch, Memory, Module, Param};

/// Runs checked: exactly one finding, of this class, on the line that holds `mark`.
fn one(source: &str, grid: u32, block: u32, buffers: &[Buf], kind: Kind, mark: &str) -> ptx_sim::Finding {
    let ran = run_with(source, [grid, 1, 1], [block, 1, 1], 0, buffers, &[], &checked()).unwrap();
    assert_eq!(found(&ran.report), [(kind, line_of(source, mark))], "{:#?}\n{source}", ran.report.findings);
    ran.report.findings[0].clone()
}

const ADDRESS: &str = "mov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 4, %d20;\n";

#[test]
fn out_of_bounds_is_exact_to_the_buffer() {
    let load = kernel(2, &format!("{ADDRESS} ld.global.u32 %r1, [%d0]; // here\nret;"));
    let f = one(&load, 1, 32, &[Buf::In(vec![0; 4 * 31]), Buf::In(vec![0; 4096])], Kind::OutOfBounds, "here");
    assert_eq!((f.place.lane, f.place.warp, f.place.block, f.count), (31, 0, [0; 3], 1));
    assert!(f.message.contains("offset 124 of argument `p0`, which has 124 bytes"), "{}", f.message);
    let short = [Buf::In(vec![0; 4 * 31]), Buf::In(vec![0; 4096])];
    let Err(Error::Fault { place, message, .. }) = run_with(&load, [1; 3], [32, 1, 1], 0, &short, &[], &unchecked())
    else {
        panic!("an unchecked launch goes on past its buffer");
    };
    assert_eq!((place.line, place.lane), (line_of(&load, "here"), 31));
    assert!(message.starts_with("out of bounds"), "{message}");

    let store = kernel(2, "mov.u32 %r0, 1; st.global.u32 [%d21 + -4], %r0; // here\nret;");
    let f = one(&store, 1, 1, &[Buf::In(vec![0; 16]), Buf::In(vec![0; 16])], Kind::OutOfBounds, "here");
    assert!(f.message.contains("offset -4 of argument `p1`"), "{}", f.message);
    let shared = kernel(0, ".shared .b8 s[64]; mov.u32 %r0, 64; st.shared.u32 [%r0], %r0; // here\nret;");
    one(&shared, 1, 1, &[], Kind::OutOfBounds, "here");
    let load = kernel(0, ".shared .b8 s[64]; mov.u32 %r0, 64; ld.shared.u32 %r1, [%r0]; // here\nret;");
    assert_eq!(one(&load, 1, 32, &[], Kind::OutOfBounds, "here").count, 32, "no lane may load");
    let null = kernel(0, "mov.u64 %d0, 0; ld.global.u32 %r0, [%d0]; // here\nret;");
    assert!(one(&null, 1, 1, &[], Kind::OutOfBounds, "here").message.contains("null pointer"));
}

#[test]
fn a_view_is_bounded_as_a_buffer_is() {
    let source =
        kernel(2, &format!("{ADDRESS} ld.global.u32 %r1, [%d0]; // load\nst.global.u32 [%d21], %r1; // store\nret;"));
    let module = Module::parse(&source, "test.ptx").unwrap();
    let mut memory = Memory::new();
    let whole = memory.alloc(1024, false).unwrap();
    memory.mark_initialised(whole, 0..384);
    let mut launch = |threads: u32, x: Param, y: Param| {
        let shape = Launch { grid: [1; 3], block: [threads, 1, 1], dynamic_shared: 0, params: vec![x, y] };
        let report = ptx_sim::launch(&module, "k", &mut memory, &shape, &checked());
        report.map(|report| (report, memory.bytes(whole).to_vec()))
    };
    // Bytes 256..384 are 32 words; the output follows at 512.
    let (x, y) = (Param::View(whole, 256, 128), Param::View(whole, 512, 4));
    let (report, _) = launch(32, x.clone(), y.clone()).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!((report.params[0].read, report.params[1].written), (128, 128));
    assert_eq!((report.counts.buffers.len(), report.params[1].read), (1, 0));

    let (report, _) = launch(33, x, y.clone()).unwrap();
    let message = &report.findings[0].message;
    assert_eq!(found(&report)[0], (Kind::OutOfBounds, line_of(&source, "load")));
    assert!(message.contains("offset 128 of argument `p0`, which has 128 bytes"), "{message}");
    let (report, bytes) = launch(1, Param::View(whole, 512, 4), Param::View(whole, 768, 0)).unwrap();
    assert_eq!(found(&report), [(Kind::OutOfBounds, line_of(&source, "store"))], "an empty view takes no store");
    assert_eq!(bytes[768..], [0xff; 256]);

    for (start, bytes) in [(128, 4), (1024, 1), (0, 1025), (256, usize::MAX)] {
        let Err(error) = launch(1, Param::View(whole, start, bytes), y.clone()) else { panic!("{start}+{bytes}") };
        assert!(error.to_string().contains("`p0` is bytes"), "{error}");
    }
}

#[test]
fn a_refused_load_gives_poison_and_a_refused_store_writes_nothing() {
    let source =
        kernel(2, "ld.global.u32 %r1, [%d20 + 8]; st.global.u32 [%d21], %r1;\nst.global.u32 [%d20 + 6], %r1; ret;");
    let ran = run_with(&source, [1; 3], [1; 3], 0, &[Buf::In(vec![7; 8]), Buf::Out(4)], &[], &checked()).unwrap();
    assert_eq!(ran.buffers, [vec![7; 8], vec![0xff; 4]]);
    assert_eq!(ran.report.findings.len(), 2);
}

#[test]
fn misalignment() {
    let source = kernel(1, "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%d20 + 8]; // here\nret;");
    let f = one(&source, 1, 1, &[Buf::In(vec![0; 64])], Kind::Misaligned, "here");
    assert!(f.message.contains("16 bytes at offset 8"), "{}", f.message);
    let shared = kernel(0, ".shared .align 16 .b8 s[64]; st.shared.u16 [s + 1], %h0; // here\nret;");
    let ran = run_with(&shared, [1; 3], [1; 3], 0, &[], &[], &checked()).unwrap();
    assert!(found(&ran.report).contains(&(Kind::Misaligned, line_of(&shared, "here"))));
}

#[test]
fn uninitialised_registers_by_lane() {
    let source = kernel(
        1,
        "mov.u32 %r0, %laneid; setp.lt.u32 %p0, %r0, 30;\n@%p0 mov.u32 %r1, 5;\nadd.u32 %r2, %r1, 1; // here\nret;",
    );
    let f = one(&source, 1, 32, &[Buf::In(vec![0; 4])], Kind::UninitialisedRegister, "here");
    assert_eq!(f.place.lane, 30);
    assert!(f.message.contains("%r1"), "{}", f.message);
    let guard = kernel(0, "@%p3 mov.u32 %r1, 5; // here\nret;");
    assert!(one(&guard, 1, 32, &[], Kind::UninitialisedRegister, "here").message.contains("%p3"));
}

#[test]
fn uninitialised_memory() {
    let shared = kernel(0, ".shared .u32 s[64];\nld.shared.u32 %r0, [s + 4]; // here\nret;");
    one(&shared, 1, 1, &[], Kind::UninitialisedShared, "here");
    // What an earlier block left behind is not written either.
    let stale = kernel(
        0,
        ".shared .u32 s[4];\nmov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 0;\n@%p0 st.shared.u32 [s], %r0;\n\
         ld.shared.u32 %r1, [s]; // here\nret;",
    );
    let f = one(&stale, 3, 1, &[], Kind::UninitialisedShared, "here");
    assert_eq!((f.place.block, f.count), ([1, 0, 0], 2));
    let global = kernel(1, "st.global.u16 [%d20], 7;\nld.global.u32 %r0, [%d20]; // here\nret;");
    let f = one(&global, 1, 1, &[Buf::Out(8)], Kind::UninitialisedGlobal, "here");
    assert!(f.message.contains("byte 2 of argument `p0`"), "{}", f.message);
    let whole = kernel(1, "st.global.u32 [%d20], 7;\nld.global.u32 %r0, [%d20];\nret;");
    assert!(run(&whole, &[Buf::Out(4)]).report.findings.is_empty());
}

/// Each thread writes its word of shared memory and reads one of the next warp.
fn neighbour(barrier: &str) -> String {
    kernel(
        0,
        &format!(
            ".shared .u32 s[64];\nmov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r3, s; add.u32 %r2, %r3, %r1;\n\
             st.shared.u32 [%r2], %r0;\n{barrier}\nxor.b32 %r1, %r1, 128; add.u32 %r2, %r3, %r1;\n\
             ld.shared.u32 %r4, [%r2]; // read\nret;"
        ),
    )
}

#[test]
fn shared_races() {
    let none = neighbour("");
    let ran = run_with(&none, [1; 3], [64, 1, 1], 0, &[], &[], &checked()).unwrap();
    let kinds: Vec<Kind> = ran.report.findings.iter().map(|f| f.kind).collect();
    assert!(kinds.contains(&Kind::UninitialisedShared) && kinds.contains(&Kind::SharedRace), "{kinds:?}");
    let with = neighbour("bar.sync 0;");
    assert!(run_with(&with, [1; 3], [64, 1, 1], 0, &[], &[], &checked()).unwrap().report.findings.is_empty());
    // A warp's own barrier orders no other warp.
    let own = neighbour("bar.warp.sync -1;");
    let ran = run_with(&own, [1; 3], [64, 1, 1], 0, &[], &[], &checked()).unwrap();
    assert!(ran.report.findings.iter().any(|f| f.kind == Kind::SharedRace));
}

#[test]
fn a_write_after_other_warps_reads_is_a_race() {
    let source = |barrier: &str| {
        kernel(
            0,
            &format!(
                ".shared .u32 s[1];\nmov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0;\n@%p0 st.shared.u32 [s], %r0;\n\
                 bar.sync 0;\nld.shared.u32 %r1, [s];\n{barrier}\n@%p0 st.shared.u32 [s], 9; // write\nret;"
            ),
        )
    };
    let racy = source("");
    let ran = run_with(&racy, [1; 3], [96, 1, 1], 0, &[], &[], &checked()).unwrap();
    // Warp 0 overtakes the others: they read late, and it wrote early.
    let lines = found(&ran.report);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(lines[1], (Kind::SharedRace, line_of(&racy, "// write")));
    let message = &ran.report.findings[1].message;
    assert!(message.contains("writes") && message.contains("read without"), "{message}");
    let safe = source("bar.sync 0;");
    assert!(run_with(&safe, [1; 3], [96, 1, 1], 0, &[], &[], &checked()).unwrap().report.findings.is_empty());
}

#[test]
fn lanes_of_a_warp_race_without_a_warp_barrier() {
    let source = |barrier: &str| {
        kernel(
            0,
            &format!(
                ".shared .u32 s[32];\nmov.u32 %r0, %laneid; shl.b32 %r1, %r0, 2; mov.u32 %r2, s; \
                add.u32 %r3, %r2, %r1;\n\
                 st.shared.u32 [%r3], %r0;\n{barrier}\nxor.b32 %r1, %r1, 4; add.u32 %r3, %r2, %r1;\n\
                 ld.shared.u32 %r4, [%r3]; // read\nret;"
            ),
        )
    };
    one(&source(""), 1, 32, &[], Kind::SharedRace, "// read");
    assert!(run(&source("bar.warp.sync -1;"), &[]).report.findings.is_empty());
}

#[test]
fn the_same_value_by_many_lanes_is_no_race_but_different_ones_are() {
    let same = kernel(0, ".shared .u32 s[1];\nst.shared.u32 [s], 5;\nret;");
    assert!(run(&same, &[]).report.findings.is_empty());
    let differ = kernel(0, ".shared .u32 s[1];\nmov.u32 %r0, %laneid;\nst.shared.u32 [s], %r0; // here\nret;");
    one(&differ, 1, 32, &[], Kind::SharedRace, "here");
}

#[test]
fn named_barriers_order_producer_and_consumer() {
    // Warp 0 writes and arrives; warp 1 waits and reads; nobody else is involved.
    let source = |arrive: &str| {
        kernel(
            0,
            &format!(
                ".shared .u32 s[32];\nmov.u32 %r0, %tid.x; and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2; mov.u32 %r2, s;\n\
                 add.u32 %r1, %r2, %r1; setp.ge.u32 %p0, %r0, 32;\n@%p0 bra reader;\n\
                 st.shared.u32 [%r1], %r0;\n{arrive}\nret;\nreader:\nbar.sync 1, 64;\n\
                 ld.shared.u32 %r3, [%r1]; // read\nret;"
            ),
        )
    };
    let ran = run_with(&source("bar.arrive 1, 64;"), [1; 3], [64, 1, 1], 0, &[], &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    let ran = run_with(&source(""), [1; 3], [64, 1, 1], 0, &[], &[], &checked());
    let Err(Error::Fault { message, .. }) = ran else { panic!("a barrier that nobody else reaches") };
    assert!(message.contains("warp 1 at barrier 1"), "{message}");
}

#[test]
fn global_races_between_blocks() {
    // Every block writes its number to the same word.
    let clash = kernel(1, "mov.u32 %r0, %ctaid.x;\nst.global.u32 [%d20], %r0; // here\nret;");
    let f = one(&clash, 4, 1, &[Buf::Out(4)], Kind::GlobalRace, "here");
    assert!(f.message.contains("offset 0 of argument `p0`"), "{}", f.message);
    let apart = kernel(1, "mov.u32 %r0, %ctaid.x; mad.wide.u32 %d0, %r0, 2, %d20;\nst.global.u16 [%d0], 1;\nret;");
    let ran = run_with(&apart, [4, 1, 1], [1; 3], 0, &[Buf::Out(8)], &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    // A reader of what another block writes.
    let read = kernel(
        1,
        "mov.u32 %r0, %ctaid.x; mad.wide.u32 %d0, %r0, 4, %d20; add.u32 %r2, %r0, 1;\nst.global.u32 [%d0], %r2;\n\
         xor.b32 %r0, %r0, 1; mad.wide.u32 %d0, %r0, 4, %d20;\nld.global.u32 %r1, [%d0];\nret;",
    );
    let ran = run_with(&read, [2, 1, 1], [1; 3], 0, &[Buf::In(vec![0; 8])], &[], &checked()).unwrap();
    // Block 1 overwrites what block 0 read, and reads what it wrote.
    let kinds: Vec<Kind> = ran.report.findings.iter().map(|f| f.kind).collect();
    assert_eq!(kinds, [Kind::GlobalRace; 2]);
    let atomics = kernel(1, "red.global.add.u32 [%d20], 1;\nret;");
    let ran = run_with(&atomics, [9, 1, 1], [32, 1, 1], 0, &[Buf::In(vec![0; 4])], &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    assert_eq!(common::u32s(&ran.buffers[0]), [9 * 32]);
}

#[test]
fn the_last_block_may_read_what_fenced_blocks_wrote() {
    // Each block stores, fences, counts itself; the last one sums.
    let source = kernel(
        3,
        "mov.u32 %r0, %ctaid.x; mad.wide.u32 %d0, %r0, 4, %d20; add.u32 %r1, %r0, 1;\nst.global.u32 [%d0], %r1;\n\
         membar.gl;\natom.global.add.u32 %r2, [%d21], 1;\nsetp.ne.u32 %p0, %r2, 3;\n@%p0 ret;\nmembar.gl;\n\
         ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d20];\nadd.u32 %r3, %r3, %r4; add.u32 %r5, %r5, %r6;\n\
         add.u32 %r3, %r3, %r5;\nst.global.u32 [%d22], %r3;\nret;",
    );
    let buffers = [Buf::Out(16), Buf::In(vec![0; 4]), Buf::Out(4)];
    let ran = run_with(&source, [4, 1, 1], [1; 3], 0, &buffers, &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    assert_eq!(common::u32s(&ran.buffers[2]), [10]);
}

#[test]
fn released_flags_are_written_without_being_read() {
    let source = kernel(
        1,
        "st.release.gpu.global.u32 [%d20], 1;\nld.acquire.gpu.global.u32 %r0, [%d20];\n\
         ld.global.u32 %r1, [%d20];\nret;",
    );
    let ran = run(&source, &[Buf::Out(4)]);
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
}

#[test]
fn barriers_in_divergent_code() {
    let guarded = kernel(0, "mov.u32 %r0, %laneid; setp.lt.u32 %p0, %r0, 7;\n@%p0 bar.sync 0; // here\nret;");
    let f = one(&guarded, 1, 32, &[], Kind::Divergence, "here");
    assert_eq!(f.place.lane, 0);
    let branch = kernel(
        0,
        "mov.u32 %r0, %laneid; setp.lt.u32 %p0, %r0, 7;\n@%p0 bra skip;\nbar.sync 0; // here\nskip:\n\
        add.u32 %r0, %r0, 1;\nret;",
    );
    one(&branch, 1, 32, &[], Kind::Divergence, "here");
    // Lanes that have exited are not waited for.
    let exited = kernel(0, "mov.u32 %r0, %laneid; setp.lt.u32 %p0, %r0, 7;\n@%p0 ret;\nbar.sync 0;\nret;");
    assert!(run(&exited, &[]).report.findings.is_empty());
    // Nor is a branch that whole warps take alike.
    let uniform = kernel(0, "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.sync 1, 32;\nbar.sync 0;\nret;");
    let ran = run_with(&uniform, [1; 3], [64, 1, 1], 0, &[], &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
}

#[test]
fn shuffles_in_divergent_code() {
    let missing = kernel(
        0,
        "mov.u32 %r0, %laneid; setp.lt.u32 %p0, %r0, 16;\n@%p0 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; // here\nret;",
    );
    one(&missing, 1, 32, &[], Kind::Divergence, "here");
    let right = kernel(
        0,
        "mov.u32 %r0, %laneid; setp.lt.u32 %p0, %r0, 16;\n@%p0 shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffff;\nret;",
    );
    assert!(run(&right, &[]).report.findings.is_empty());
    let beyond = kernel(
        0,
        "mov.u32 %r0, %laneid; setp.lt.u32 %p0, %r0, 16;\n@%p0 shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xffff; // here\n\
        ret;",
    );
    one(&beyond, 1, 32, &[], Kind::Divergence, "here");
}

#[test]
fn matrix_instructions_need_whole_warps() {
    let source = kernel(
        0,
        "mov.b32 %r0, 0; mov.u32 %r1, %laneid; setp.eq.u32 %p0, %r1, 31;\n@%p0 ret;\n\
         movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r0; // here\nret;",
    );
    one(&source, 1, 32, &[], Kind::Divergence, "here");
}

#[test]
fn missing_ret() {
    let source = kernel(0, "mov.u32 %r0, 1;\n// the end");
    let ran = run(&source, &[]);
    assert!(ran
        .report
        .findings
        .iter()
        .all(|f| f.kind == Kind::MissingReturn && f.place.line > line_of(&source, "the end")));
    assert_eq!(ran.report.findings.len(), 1);
    let Err(Error::Fault { message, .. }) = run_with(&source, [1; 3], [1; 3], 0, &[], &[], &unchecked()) else {
        panic!("an unchecked launch runs past the end");
    };
    assert!(message.contains("`ret` is missing"), "{message}");
    let guarded = kernel(0, "mov.u32 %r0, 1; setp.eq.u32 %p0, %r0, 1;\n@%p0 ret;");
    assert_eq!(run(&guarded, &[]).report.findings.len(), 1);
}

#[test]
fn resources_beyond_the_target() {
    let big = kernel(0, ".shared .b8 s[50000];\nret;");
    assert_eq!(run(&big, &[]).report.findings[0].kind, Kind::Resources);
    let dynamic = kernel(0, ".extern .shared .align 16 .b8 s[];\nret;");
    let with = |bytes| run_with(&dynamic, [1; 3], [32, 1, 1], bytes, &[], &[], &checked()).unwrap().report.findings;
    assert!(with(163 * 1024).is_empty());
    assert_eq!(with(163 * 1024 + 16)[0].kind, Kind::Resources);
    // 300 values live at once.
    let loads: String = (0..300).map(|i| format!("ld.global.u32 %x{i}, [%d20 + {}];\n", 4 * i)).collect();
    let sums: String = (1..300).map(|i| format!("add.u32 %x0, %x0, %x{i};\n")).collect();
    let many = kernel(1, &format!(".reg .b32 %x<300>;\n{loads}{sums}st.global.u32 [%d20], %x0;\nret;"));
    let ran = run_with(&many, [1; 3], [1; 3], 0, &[Buf::In(vec![0; 1200])], &[], &checked()).unwrap();
    assert_eq!(found(&ran.report)[0].0, Kind::Resources);
    assert!(ran.report.findings[0].message.contains("registers live at once"));
}

#[test]
fn copies_in_flight() {
    let source = |wait: &str, sync: &str| {
        kernel(
            2,
            &format!(
                ".shared .align 16 .b8 s[1024];\nmov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.u32 %r2, s;\n\
                 add.u32 %r3, %r2, %r1; cvt.u64.u32 %d0, %r1; add.u64 %d1, %d20, %d0;\n\
                 cp.async.cg.shared.global [%r3], [%d1], 16;\ncp.async.commit_group;\n{wait}\n{sync}\n\
                 xor.b32 %r1, %r1, 512; add.u32 %r3, %r2, %r1;\nld.shared.u32 %r4, [%r3]; // read\n\
                 mad.wide.u32 %d1, %r0, 4, %d21; st.global.u32 [%d1], %r4;\nret;"
            ),
        )
    };
    let data: Vec<u32> = (0..256).collect();
    let buffers = || [Buf::In(common::bytes32(&data)), Buf::Out(256)];
    let go = |s: &str| run_with(s, [1; 3], [64, 1, 1], 0, &buffers(), &[], &checked()).unwrap();
    let good = go(&source("cp.async.wait_group 0;", "bar.sync 0;"));
    assert!(good.report.findings.is_empty(), "{:?}", good.report.findings);
    let want: Vec<u32> = (0..64).map(|t| 4 * (t ^ 32)).collect();
    assert_eq!(common::u32s(&good.buffers[1]), want);
    // No wait: the barrier orders the threads, but the data are not there, and what is read is poison.
    let unwaited = source("", "bar.sync 0;");
    let ran = go(&unwaited);
    assert_eq!(found(&ran.report), [(Kind::CopyInFlight, line_of(&unwaited, "// read"))]);
    assert_eq!(common::u32s(&ran.buffers[1]), [u32::MAX; 64]);
    // A wait for all but one group waits for nothing here.
    let lax = source("cp.async.wait_group 1;", "bar.sync 0;");
    assert_eq!(found(&go(&lax).report), [(Kind::CopyInFlight, line_of(&lax, "// read"))]);
    // A wait without the barrier covers the thread's own copies only.
    let unsynced = source("cp.async.wait_all;", "");
    let ran = go(&unsynced);
    assert!(ran.report.findings.iter().any(|f| f.kind == Kind::SharedRace), "{:?}", ran.report.findings);
}

#[test]
fn step_limit_stops_endless_loops() {
    let source = kernel(0, "again:\nbra again; // here\n");
    let Err(Error::Fault { place, message, .. }) = run_with(&source, [1; 3], [1; 3], 0, &[], &[], &checked()) else {
        panic!("an endless loop ends");
    };
    assert_eq!(place.line, line_of(&source, "here"));
    assert!(message.contains("endless loop"), "{message}");
}

#[test]
fn findings_do_not_depend_on_threads() {
    let source = kernel(1, &format!("{ADDRESS} ld.global.u32 %r1, [%d0];\nret;"));
    let go = |threads| {
        let options = ptx_sim::Options { threads, ..checked() };
        run_with(&source, [40, 1, 1], [64, 1, 1], 0, &[Buf::In(vec![0; 4 * 40])], &[], &options)
            .unwrap()
            .report
            .findings
    };
    assert_eq!(go(1), go(4));
    assert_eq!(go(4)[0].count, 40 * 24);
}
