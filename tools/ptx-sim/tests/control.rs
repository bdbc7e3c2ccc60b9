//! Divergence and reconvergence, barriers, and what a warp does together.

mod common;

use common::{checked, kernel, run, run_with, u32s, unchecked, Buf};
use ptx_sim::Options;

/// Runs one warp whose lanes store `%r9`, checked and unchecked; the 32 results.
fn lanes(body: &str) -> Vec<u32> {
    let source = kernel(
        1,
        &format!(
            "mov.u32 %r0, %laneid;\n{body}\nend:\nmad.wide.u32 %d0, %r0, 4, %d20;\nst.global.u32 [%d0], %r9;\nret;"
        ),
    );
    let ran = run(&source, &[Buf::Out(128)]);
    assert!(ran.report.findings.is_empty(), "{:?}\n{source}", ran.report.findings);
    let fast = run_with(&source, [1; 3], [32, 1, 1], 0, &[Buf::Out(128)], &[], &unchecked()).unwrap();
    assert_eq!(ran.buffers, fast.buffers);
    u32s(&ran.buffers[0])
}

fn each(f: impl Fn(u32) -> u32) -> Vec<u32> {
    (0..32).map(f).collect()
}

#[test]
fn nested_conditions() {
    let out = lanes(
        "mov.u32 %r9, 0;\nand.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 0;\n@%p0 bra even;\n\
         setp.lt.u32 %p1, %r0, 9;\n@%p1 bra small;\nadd.u32 %r9, %r9, 1;\nbra odd_done;\nsmall:\nadd.u32 %r9, %r9, 2;\n\
         odd_done:\nadd.u32 %r9, %r9, 10;\nbra done;\neven:\nadd.u32 %r9, %r9, 3;\ndone:\nadd.u32 %r9, %r9, 100;\n\
         activemask.b32 %r2; setp.ne.u32 %p2, %r2, -1;\n@%p2 add.u32 %r9, %r9, 1000;",
    );
    assert_eq!(
        out,
        each(|l| 100
            + if l % 2 == 0 {
                3
            } else if l < 9 {
                12
            } else {
                11
            })
    );
}

#[test]
fn loops_of_different_length_meet_again() {
    // Lane l runs l turns; afterwards all lanes stand together.
    let out = lanes(
        "mov.u32 %r9, 0; mov.u32 %r1, 0;\nloop:\nsetp.ge.u32 %p0, %r1, %r0;\n@%p0 bra out;\nadd.u32 %r9, %r9, %r1;\n\
         add.u32 %r1, %r1, 1;\nbra loop;\nout:\nactivemask.b32 %r2; add.u32 %r9, %r9, %r2;",
    );
    assert_eq!(out, each(|l| (l * l.wrapping_sub(1) / 2).wrapping_add(u32::MAX)));
}

#[test]
fn a_branch_to_text_behind_the_meeting_point() {
    // The `else` part lies after the join: the barrier-like shuffle must wait for it.
    let out = lanes(
        "mov.u32 %r9, %r0; setp.lt.u32 %p0, %r0, 16;\n@%p0 bra far;\nadd.u32 %r9, %r9, 100;\njoin:\n\
         shfl.sync.idx.b32 %r9, %r9, 3, 31, -1;\nbra end;\nfar:\nadd.u32 %r9, %r9, 200;\nbra join;",
    );
    assert_eq!(out, each(|_| 203));
}

#[test]
fn early_exit_leaves_the_rest() {
    let source = kernel(
        1,
        "mov.u32 %r0, %laneid; setp.ge.u32 %p0, %r0, 5;\n@%p0 ret;\nvote.sync.ballot.b32 %r1, !%p0, 0x1f;\n\
         mad.wide.u32 %d0, %r0, 4, %d20;\nst.global.u32 [%d0], %r1;\nret;",
    );
    let ran = run(&source, &[Buf::In(vec![0; 128])]);
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    assert_eq!(u32s(&ran.buffers[0]), each(|l| if l < 5 { 0x1f } else { 0 }));
}

#[test]
fn partial_warps_and_odd_blocks() {
    let source = kernel(
        1,
        "mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mad.lo.u32 %r0, %r1, %r2, %r0;\n\
         mov.u32 %r3, %ctaid.y; mad.lo.u32 %r3, %r3, 42, %r0;\nmov.u32 %r4, %warpid; shl.b32 %r4, %r4, 8;\n\
         mov.u32 %r5, %laneid; add.u32 %r4, %r4, %r5;\nmad.wide.u32 %d0, %r3, 4, %d20;\nst.global.u32 [%d0], %r4;\n\
         ret;",
    );
    let ran = run_with(&source, [1, 2, 1], [7, 6, 1], 0, &[Buf::Out(4 * 84)], &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    let want: Vec<u32> = (0..84).map(|i| (i % 42) / 32 * 256 + (i % 42) % 32).collect();
    assert_eq!(u32s(&ran.buffers[0]), want);
}

#[test]
fn shuffles_follow_the_isa() {
    // (mode, b, c) against the ISA's text, with the predicate in bit 8.
    for (mode, b, c) in [
        ("up", 3, 0),
        ("up", 1, 0x1800),
        ("down", 5, 31),
        ("down", 2, 0x181f),
        ("bfly", 16, 31),
        ("bfly", 7, 0x1f),
        ("bfly", 9, 0x0f),
        ("idx", 6, 31),
        ("idx", 3, 0x181f),
    ] {
        let out = lanes(&format!(
            "mul.lo.u32 %r1, %r0, 3;\nshfl.sync.{mode}.b32 %r9|%p0, %r1, {b}, {c}, -1;\n@%p0 add.u32 %r9, %r9, 256;"
        ));
        let want = each(|lane| {
            let (b, c) = (b & 31, c as u32);
            let segment = (c >> 8 & 31) as i32;
            let lane = lane as i32;
            let clamp = (c & 31) as i32;
            let max = (lane & segment) | (clamp & !segment & 31);
            let (j, inside) = match mode {
                "up" => (lane - b, lane - b >= max),
                "down" => (lane + b, lane + b <= max),
                "bfly" => (lane ^ b, lane ^ b <= max),
                _ => ((lane & segment) | (b & !segment), (lane & segment) | (b & !segment) <= max),
            };
            let inside = if mode == "idx" { ((lane & segment) | (b & !segment & 31)) <= max } else { inside };
            3 * if inside { j } else { lane } as u32 + if inside { 256 } else { 0 }
        });
        assert_eq!(out, want, "{mode} {b} {c:#x}");
    }
}

#[test]
fn votes_matches_reductions() {
    let odd = "and.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 1;\n";
    assert_eq!(lanes(&format!("{odd}vote.sync.ballot.b32 %r9, %p0, -1;")), each(|_| 0xaaaa_aaaa));
    let flags = "vote.sync.any.pred %p1, %p0, -1; vote.sync.all.pred %p2, %p0, -1; vote.sync.uni.pred %p3, %p0, -1;\n\
                 vote.sync.all.pred %p4, !%p0, -1;\nselp.u32 %r9, 1, 0, %p1; @%p2 add.u32 %r9, %r9, 2;\n\
                 @%p3 add.u32 %r9, %r9, 4; @%p4 add.u32 %r9, %r9, 8;";
    assert_eq!(lanes(&format!("{odd}{flags}")), each(|_| 1));
    assert_eq!(lanes(&format!("setp.eq.u32 %p0, 1, 2;\n{flags}")), each(|_| 12));
    let third = "rem.u32 %r1, %r0, 3;\n";
    let group = |l: u32| (0..32).filter(|i| i % 3 == l % 3).fold(0, |m, i| m | 1 << i);
    assert_eq!(lanes(&format!("{third}match.any.sync.b32 %r9, %r1, -1;")), each(group));
    assert_eq!(lanes(&format!("{third}match.all.sync.b32 %r9|%p0, %r1, -1;\n@%p0 add.u32 %r9, %r9, 1;")), each(|_| 0));
    assert_eq!(lanes("match.all.sync.b32 %r9|%p0, 7, -1;\n@!%p0 mov.u32 %r9, 0;"), each(|_| u32::MAX));
    assert_eq!(lanes("redux.sync.add.u32 %r9, %r0, -1;"), each(|_| 496));
    assert_eq!(lanes("sub.u32 %r1, %r0, 5; redux.sync.min.s32 %r9, %r1, -1;"), each(|_| (-5i32) as u32));
    assert_eq!(lanes("sub.u32 %r1, %r0, 5; redux.sync.min.u32 %r9, %r1, -1;"), each(|_| 0));
    assert_eq!(lanes("redux.sync.xor.b32 %r9, %r0, -1;"), each(|_| 0));
    assert_eq!(lanes("redux.sync.or.b32 %r9, %r0, -1;"), each(|_| 31));
}

#[test]
fn lane_masks() {
    let out = lanes("mov.u32 %r9, %lanemask_lt; mov.u32 %r1, %lanemask_ge; add.u32 %r9, %r9, %r1;");
    assert_eq!(out, each(|_| u32::MAX));
    assert_eq!(lanes("mov.u32 %r9, %lanemask_le;"), each(|l| u32::MAX >> (31 - l)));
    assert_eq!(lanes("mov.u32 %r9, %lanemask_gt;"), each(|l| if l == 31 { 0 } else { u32::MAX << (l + 1) }));
}

#[test]
fn barrier_reductions() {
    let source = kernel(
        1,
        "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 40;\nbar.red.popc.u32 %r1, 0, %p0;\n\
         bar.red.and.pred %p1, 0, %p0;\nbar.red.or.pred %p2, 0, %p0;\nselp.u32 %r2, 100, 0, %p1;\n\
         selp.u32 %r3, 1000, 0, %p2;\nadd.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3;\nmad.wide.u32 %d0, %r0, 4, %d20;\n\
         st.global.u32 [%d0], %r1;\nret;",
    );
    let ran = run_with(&source, [1; 3], [96, 1, 1], 0, &[Buf::Out(4 * 96)], &[], &checked()).unwrap();
    assert!(ran.report.findings.is_empty(), "{:?}", ran.report.findings);
    assert_eq!(u32s(&ran.buffers[0]), [1040; 96]);
}

#[test]
fn warps_pass_a_value_round_by_spinning() {
    // Warp w waits until shared memory holds w, then stores w + 1: needs fair turns.
    let source = kernel(
        1,
        ".shared .u32 s[1];\nmov.u32 %r0, %tid.x; shr.u32 %r1, %r0, 5; setp.eq.u32 %p0, %r0, 0;\n\
         @%p0 st.shared.u32 [s], 3;\nbar.sync 0;\nsub.u32 %r5, 3, %r1;\nspin:\nld.volatile.shared.u32 %r2, [s];\n\
         setp.ne.u32 %p1, %r2, %r5;\n@%p1 bra spin;\nbar.warp.sync -1;\nsub.u32 %r5, %r5, 1;\n\
         st.volatile.shared.u32 [s], %r5;\nst.global.u32 [%d20], %r5;\nret;",
    );
    let options = ptx_sim::Options { checked: false, ..unchecked() };
    let ran = run_with(&source, [1; 3], [128, 1, 1], 0, &[Buf::Out(4)], &[], &options).unwrap();
    assert_eq!(u32s(&ran.buffers[0]), [u32::MAX]);
}

#[test]
fn traces_are_annotated() {
    let source =
        kernel(1, "mov.u32 %r0, %laneid; // first\nadd.u32 %r1, %r0, 5; // second\nsetp.gt.u32 %p0, %r1, 9;\nret;");
    let trace = Some(ptx_sim::TraceWarp { block: [1, 0, 0], warp: 0, steps: 100 });
    let options = ptx_sim::Options { trace, ..checked() };
    let ran = run_with(&source, [2, 1, 1], [32, 1, 1], 0, &[Buf::Out(4)], &[], &options).unwrap();
    let steps = &ran.report.trace;
    assert_eq!(steps.len(), 5);
    assert!(steps[1].text.contains("// first") && steps[2].text.contains("// second"));
    let [second] = &steps[2].results[..] else { panic!("one register") };
    assert_eq!((second.name.as_str(), second.ty, second.bits[6], second.bits[31]), ("%r1", "b32", 11, 36));
    let [third] = &steps[3].results[..] else { panic!("one predicate") };
    assert_eq!((third.name.as_str(), third.ty, third.bits[4], third.bits[5]), ("%p0", "pred", 0, 1));
    assert_eq!(steps[1].line, common::line_of(&source, "// first"));
    assert_eq!(steps[4].lanes, u32::MAX);
}

#[test]
fn counts_of_a_small_kernel() {
    let source = kernel(
        1,
        ".shared .u32 s[1024];\nmov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 8, %d20;\nld.global.u32 %r1, [%d0]; \
        // load\n\
         shl.b32 %r2, %r0, 7; mov.u32 %r3, s; add.u32 %r2, %r2, %r3;\nst.shared.u32 [%r2], %r1; // store\nret;",
    );
    let ran = run(&source, &[Buf::In(vec![0; 256])]);
    let counts = &ran.report.counts;
    let line = |mark: &str| {
        let n = common::line_of(&source, mark);
        counts.lines.iter().rfind(|l| l.line == n).unwrap().clone()
    };
    assert_eq!((line("// load").sectors, counts.global.requests, counts.global.bytes), (8, 1, 128));
    assert_eq!((line("// store").waves, line("// store").conflicts), (32, 31));
    assert_eq!(counts.buffers[0].sector_read, 256);
    assert_eq!(counts.thread_instructions, 9 * 32);
    assert_eq!(counts.mix()[0].2, 64);
}

#[test]
fn what_a_first_level_cache_lets_pass() {
    // A warp loads 128 bytes twice, 128 others past the cache twice, and stores the first; two blocks do the same.
    let source = kernel(
        1,
        "mov.u32 %r0, %tid.x; mad.wide.u32 %d0, %r0, 4, %d20;\nld.global.u32 %r1, [%d0];\nld.global.nc.u32 %r2, [%d0];\n\
         ld.global.cg.u32 %r3, [%d0 + 128];\nld.global.cg.u32 %r4, [%d0 + 128];\nst.global.u32 [%d0], %r1;\nret;",
    );
    let of = |l1_bytes| {
        let options = Options { count: true, l1_bytes, ..Options::default() };
        let ran = run_with(&source, [2, 1, 1], [32, 1, 1], 0, &[Buf::In(vec![0; 512])], &[], &options).unwrap();
        ran.report.counts.buffers[0]
    };
    let seen = of(128 << 10);
    assert_eq!((seen.sector_read, seen.sector_written), (2 * 4 * 128, 2 * 128));
    assert_eq!(seen.missed, 2 * (128 + 2 * 128), "each block's cache begins empty");
    assert_eq!((seen.distinct_read, seen.distinct_written), (2 * 128, 128));
    assert_eq!(of(0).missed, seen.sector_read, "no cache");
}
