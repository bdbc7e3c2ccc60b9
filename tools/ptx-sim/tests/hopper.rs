//! What sm_90 and sm_90a added: mbarriers, bulk copies, proxy fences and `wgmma`; each right use, and each misuse found.

mod common;

use common::{checked, f32s, found, kernel, line_of, run_with, u32s, unchecked, Buf, Ran, Random};
use half::bf16;
use ptx_sim::{Error, Kind, Module, Options};

fn hopper(pointers: usize, body: &str) -> String {
    kernel(pointers, body).replace(".version 7.8", ".version 8.0").replace(".target sm_80", ".target sm_90a")
}

fn go(source: &str, threads: u32, buffers: &[Buf]) -> Result<Ran, Error> {
    run_with(source, [1; 3], [threads, 1, 1], 0, buffers, &[], &checked())
}

fn clean(source: &str, threads: u32, buffers: &[Buf]) -> Ran {
    let ran = go(source, threads, buffers).unwrap_or_else(|e| panic!("{e}\n{source}"));
    assert!(ran.report.findings.is_empty(), "{:#?}\n{source}", ran.report.findings);
    ran
}

/// A finding of this class on the line with `// here`.
fn caught(source: &str, threads: u32, buffers: &[Buf], kind: Kind) -> String {
    let ran = go(source, threads, buffers).unwrap_or_else(|e| panic!("{e}\n{source}"));
    let here = (kind, line_of(source, "// here"));
    assert!(found(&ran.report).contains(&here), "{here:?} is not among {:#?}\n{source}", ran.report.findings);
    ran.report.findings.iter().find(|f| f.kind == kind).map(|f| f.message.clone()).unwrap_or_default()
}

fn words(n: u32) -> Buf {
    Buf::In((0..n).flat_map(|i| (1000 + i).to_le_bytes()).collect())
}

/// Two warps: thread 0 asks for 256 bytes, all wait for them, each writes one word of them.
const COPY: &str = ".shared .align 16 .b8 s[256]; .shared .align 8 .b64 bar;
    mov.u32 %r0, %tid.x; mul.lo.u32 %r1, %r0, 4; setp.ne.u32 %p0, %r0, 0;
    @%p0 bra made;
    mbarrier.init.shared::cta.b64 [bar], 1;
    fence.mbarrier_init.release.cluster;
made:
    bar.sync 0;
    @%p0 bra asked;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%d20], 256, [bar]; // copy
asked:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; // wait
    @!%p1 bra asked;
    mov.u32 %r3, s; add.u32 %r3, %r3, %r1;
    ld.shared.u32 %r2, [%r3]; // here
    cvt.u64.u32 %d0, %r1; add.u64 %d0, %d0, %d21;
    st.global.u32 [%d0], %r2;
    ret;";

#[test]
fn a_bulk_copy_is_there_after_the_wait() {
    let source = hopper(2, COPY);
    let ran = clean(&source, 64, &[words(64), Buf::Out(256)]);
    assert_eq!(u32s(&ran.buffers[1]), (1000..1064).collect::<Vec<_>>());
    let read = ran.report.params[0];
    assert_eq!((read.read, read.sector_read), (256, 256));
    // A wait that has to wait costs one instruction all the same.
    let waits = ran.report.counts.lines.iter().find(|l| l.line == line_of(&source, "// wait")).map(|l| l.warps);
    assert_eq!(waits, Some(2));
    let same = run_with(&source, [1; 3], [64, 1, 1], 0, &[words(64), Buf::Out(256)], &[], &unchecked()).unwrap();
    assert_eq!(same.buffers[1], ran.buffers[1]);
}

#[test]
fn a_wait_that_times_out_is_to_be_asked_again() {
    let buffers = [words(64), Buf::Out(256)];
    let impatient = Options { impatient: true, ..checked() };
    let run = |source: &str| run_with(source, [1; 3], [64, 1, 1], 0, &buffers, &[], &impatient).unwrap();
    let source = hopper(2, COPY);
    let ran = run(&source);
    assert!(ran.report.findings.is_empty(), "{:#?}", ran.report.findings);
    assert_eq!(u32s(&ran.buffers[1]), (1000..1064).collect::<Vec<_>>());

    // Asked once: nothing is said as long as the executor waits, but it need not.
    let once = source.replace("@!%p1 bra asked;", "");
    clean(&once, 64, &buffers);
    assert!(found(&run(&once).report).contains(&(Kind::CopyInFlight, line_of(&once, "// here"))));
}

#[test]
fn bulk_copies_misused() {
    let buffers = || [words(64), Buf::Out(256)];
    let wait = "mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; // wait\n    @!%p1 bra asked;";
    // Nobody waits; then only the second warp does.
    caught(&hopper(2, &COPY.replace(wait, "")), 64, &buffers(), Kind::CopyInFlight);
    let one =
        format!("setp.lt.u32 %p2, %r0, 32;\n@%p2 bra unready;\n again: {}\nunready:", wait.replace("asked", "again"));
    let first_goes_on = hopper(2, &COPY.replace(wait, &one));
    let ran = go(&first_goes_on, 64, &buffers()).unwrap();
    assert!(ran.report.findings.iter().any(|f| f.place.line == line_of(&first_goes_on, "// here")));
    // Without expect_tx the phase ends before the bytes have come.
    let unexpected = COPY
        .replace("mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256", "mbarrier.arrive.shared::cta.b64 _, [bar]");
    caught(&hopper(2, &unexpected), 64, &buffers(), Kind::CopyInFlight);
    // Too many bytes expected, or no arrival: nobody can go on, and it is said what is missing.
    for (from, to, word) in
        [("[bar], 256;", "[bar], 272;", "16 bytes"), (".b64 [bar], 1;", ".b64 [bar], 2;", "1 arrivals")]
    {
        let Err(error) = go(&hopper(2, &COPY.replacen(from, to, 1)), 64, &buffers()) else { panic!("went on: {to}") };
        assert!(error.to_string().contains(word), "{error}");
    }
    let here = |body: String| hopper(2, &body.replace("// here", "").replace("// copy", "// here"));
    caught(&here(COPY.replace("fence.mbarrier_init.release.cluster;", "")), 64, &buffers(), Kind::Proxy);
    caught(&here(COPY.replace("[s], [%d20]", "[s + 8], [%d20]")), 64, &buffers(), Kind::Misaligned);
    caught(&here(COPY.replace("[%d20], 256", "[%d20 + 16], 256")), 64, &buffers(), Kind::OutOfBounds);
    let odd = COPY.replace("[bar], 256;", "[bar], 0;").replace("[%d20], 256", "[%d20], 250");
    caught(&here(odd), 64, &buffers(), Kind::Misaligned);
    let written = COPY
        .replace("@%p0 bra made;", "mov.u32 %r4, s; add.u32 %r4, %r4, %r1; st.shared.u32 [%r4], %r0;\n@%p0 bra made;");
    caught(&here(written.clone()), 64, &buffers(), Kind::Proxy);
    let fenced = written.replace("bar.sync 0;", "fence.proxy.async.shared::cta;\nbar.sync 0;");
    clean(&hopper(2, &fenced), 64, &buffers());
}

#[test]
fn mbarriers_misused() {
    let none = ".shared .align 8 .b64 bar; mbarrier.arrive.shared.b64 _, [bar]; // here\nret;";
    caught(&hopper(0, none), 1, &[], Kind::Mbarrier);
    let made = ".shared .align 8 .b64 bar; mbarrier.init.shared.b64 [bar], 1;\n";
    let twice = format!("{made} mbarrier.arrive.shared.b64 _, [bar], 2; // here\nret;");
    assert!(caught(&hopper(0, &twice), 1, &[], Kind::Mbarrier).contains("2 arrivals"));
    let again = format!("{made} mbarrier.init.shared.b64 [bar], 1; // here\nret;");
    caught(&hopper(0, &again), 1, &[], Kind::Mbarrier);
    let gone = format!("{made} mbarrier.inval.shared.b64 [bar]; mbarrier.arrive.shared.b64 _, [bar]; // here\nret;");
    caught(&hopper(0, &gone), 1, &[], Kind::Mbarrier);
    // Made by the first warp, used by the second without a barrier between.
    let racing = ".shared .align 8 .b64 bar; mov.u32 %r0, %tid.x; setp.ne.u32 %p0, %r0, 0; @%p0 bra on;
        mbarrier.init.shared.b64 [bar], 64;\non: mbarrier.arrive.shared.b64 _, [bar]; // here\nret;";
    caught(&hopper(0, racing), 64, &[], Kind::SharedRace);
    let tested = format!(
        "{made} mbarrier.test_wait.parity.shared.b64 %p0, [bar], 0; selp.u32 %r0, 1, 2, %p0;
        mbarrier.arrive.shared.b64 _, [bar];
        mbarrier.test_wait.parity.shared.b64 %p0, [bar], 0; selp.u32 %r1, 4, 8, %p0; add.u32 %r0, %r0, %r1;
        st.global.u32 [%d20], %r0; ret;"
    );
    assert_eq!(u32s(&clean(&hopper(1, &tested), 1, &[Buf::Out(4)]).buffers[0]), [2 + 4]);
}

/// Warp 0 fills a place four times, warp 1 adds up what it finds: two mbarriers, `full` and `empty`.
const RING: &str = ".shared .align 16 .b8 s[128]; .shared .align 8 .b64 full; .shared .align 8 .b64 empty;
    mov.u32 %r0, %tid.x; setp.ne.u32 %p0, %r0, 0;
    @!%p0 mbarrier.init.shared.b64 [full], 32;
    @!%p0 mbarrier.init.shared.b64 [empty], 1;
    bar.sync 0;
    and.b32 %r1, %r0, 31; mov.u32 %r2, s; mad.lo.u32 %r2, %r1, 4, %r2;
    mov.u32 %r3, 0; mov.u32 %r4, 0; mov.u32 %r6, 0;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra consume;
produce:
    xor.b32 %r5, %r3, 1; and.b32 %r5, %r5, 1;
free:
    mbarrier.try_wait.parity.shared.b64 %p2, [empty], %r5; // empty
    @!%p2 bra free;
    add.u32 %r7, %r3, %r1; st.shared.u32 [%r2], %r7; // here
    mbarrier.arrive.shared.b64 _, [full];
    add.u32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, 4;
    @%p3 bra produce;
    ret;
consume:
    and.b32 %r5, %r3, 1;
there:
    mbarrier.try_wait.parity.shared.b64 %p2, [full], %r5;
    @!%p2 bra there;
    ld.shared.u32 %r7, [%r2]; add.u32 %r6, %r6, %r7;
    bar.warp.sync -1; // agreed
    setp.eq.u32 %p4, %r1, 0;
    @%p4 mbarrier.arrive.shared.b64 _, [empty];
    add.u32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, 4;
    @%p3 bra consume;
    mad.wide.u32 %d0, %r1, 4, %d20; st.global.u32 [%d0], %r6; ret;";

#[test]
fn a_ring_of_two_mbarriers() {
    let ran = clean(&hopper(1, RING), 64, &[Buf::Out(128)]);
    assert_eq!(u32s(&ran.buffers[0]), (0..32).map(|l| 6 + 4 * l).collect::<Vec<_>>());
    // The producer does not wait for the place; a lane speaks for others that have not said they are done.
    let hasty =
        RING.replace("mbarrier.try_wait.parity.shared.b64 %p2, [empty], %r5; // empty\n    @!%p2 bra free;", "");
    assert!(go(&hopper(1, &hasty), 64, &[Buf::Out(128)]).is_err_and(|e| e.to_string().contains("no warp can go on")));
    caught(&hopper(1, &RING.replace("bar.warp.sync -1; // agreed", "")), 64, &[Buf::Out(128)], Kind::SharedRace);
}

/// A [64][16] in registers or shared memory, B [16 columns][16] in shared memory; the layouts are the host's.
fn product(a: &str, descriptor: u64, before: &str, after: &str) -> String {
    let sums: Vec<String> = (0..8).map(|i| format!("%f{i}")).collect();
    let store: String = (0..8)
        .map(|i| {
            let (row, column) = (8 * (i / 2 % 2), 8 * (i / 4) + i % 2);
            format!("st.global.f32 [%d3 + {}], %f{i};\n", (row * 16 + column) * 4)
        })
        .collect();
    hopper(
        3,
        &format!(
            ".shared .align 1024 .b8 s[6144];
    mov.u32 %r0, %tid.x; mov.u32 %r9, s;
    // 48 bytes a thread into shared memory
    mul.lo.u32 %r1, %r0, 48; cvt.u64.u32 %d0, %r1; add.u64 %d0, %d0, %d21; add.u32 %r2, %r1, %r9;
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.u32 [%r2], {{%r4, %r5, %r6, %r7}};
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0 + 16]; st.shared.v4.u32 [%r2 + 16], {{%r4, %r5, %r6, %r7}};
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0 + 32]; st.shared.v4.u32 [%r2 + 32], {{%r4, %r5, %r6, %r7}};
    {before}
    bar.sync 0;
    // row g and columns 2t of the warp's 16 rows
    and.b32 %r3, %r0, 31; shr.u32 %r8, %r0, 5; shr.u32 %r10, %r3, 2; mad.lo.u32 %r8, %r8, 16, %r10; and.b32 %r11, %r3, 3;
    mul.lo.u32 %r12, %r8, 32; mad.lo.u32 %r12, %r11, 4, %r12; cvt.u64.u32 %d1, %r12; add.u64 %d1, %d1, %d20;
    ld.global.u32 %r13, [%d1]; ld.global.u32 %r14, [%d1 + 256]; ld.global.u32 %r15, [%d1 + 16];
    ld.global.u32 %r16, [%d1 + 272];
    mul.lo.u32 %r12, %r8, 64; mad.lo.u32 %r12, %r11, 8, %r12; cvt.u64.u32 %d3, %r12; add.u64 %d3, %d3, %d22;
    mov.u64 %d5, {descriptor}; mov.u64 %d6, {}; setp.ne.u32 %p0, %r0, %r0; setp.eq.u32 %p1, %r0, %r0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, {a}, %d5, %p0, 1, 1, 0{zeros}; // here
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, {a}, %d5, %p1, 1, -1, 0{zeros};
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, {a}, %d5, %p1, 1, 1, 0{zeros};
    wgmma.commit_group.sync.aligned;
    {after}
    wgmma.wait_group.sync.aligned 0;
    {store}
    ret;",
            describe(2048, 128, 256, 0),
            sums = sums.join(", "),
            zeros = if a.starts_with('{') { "" } else { ", 0" },
        ),
    )
}

fn describe(start: u64, leading: u64, stride: u64, swizzle: u64) -> u64 {
    start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62
}

const IN_REGISTERS: &str = "{%r13, %r14, %r15, %r16}";
const PLAIN: (u64, u64, u64, u64) = (0, 128, 256, 0);

/// A row-major, the shared memory's image, and the product.
fn operands(swizzled: bool) -> (Vec<u8>, Vec<u8>, Vec<f32>) {
    let mut random = Random(7);
    let mut draw = |n: usize| -> Vec<bf16> { (0..n).map(|_| bf16::from_f32(random.unit())).collect() };
    let (a, b) = (draw(64 * 16), draw(16 * 16));
    let mut image = vec![0u8; 6144];
    let mut put = |at: usize, v: bf16| image[at..at + 2].copy_from_slice(&v.to_le_bytes());
    for n in 0..16 {
        for k in 0..16 {
            let at = if swizzled {
                // Columns 16 to 31 of a row of 64, so that the start is 32 bytes into the pattern.
                let linear = n * 128 + (16 + k) * 2;
                linear ^ (linear >> 7 & 7) << 4
            } else {
                n / 8 * 256 + k / 8 * 128 + n % 8 * 16 + k % 8 * 2
            };
            put(at, b[n * 16 + k]);
        }
    }
    for m in 0..64 {
        for k in 0..16 {
            put(2048 + m / 8 * 256 + k / 8 * 128 + m % 8 * 16 + k % 8 * 2, a[m * 16 + k]);
        }
    }
    let dot = |m: usize, n: usize| (0..16).map(|k| f64::from(a[m * 16 + k]) * f64::from(b[n * 16 + k])).sum::<f64>();
    let d = (0..64 * 16).map(|i| dot(i / 16, i % 16) as f32).collect();
    (a.iter().flat_map(|v| v.to_le_bytes()).collect(), image, d)
}

fn check_product(source: &str, swizzled: bool) {
    let (a, image, d) = operands(swizzled);
    let ran = clean(source, 128, &[Buf::In(a), Buf::In(image), Buf::Out(64 * 16 * 4)]);
    for (i, (got, want)) in f32s(&ran.buffers[2]).iter().zip(&d).enumerate() {
        assert!((got - want).abs() < 1e-5, "element {i}: {got}, not {want}");
    }
    assert_eq!((ran.report.counts.mma, ran.report.counts.mma_macs), (3 * 4, 3 * 64 * 16 * 16));
}

const FENCE: &str = "fence.proxy.async.shared::cta;";

#[test]
fn products_of_every_layout() {
    let (start, leading, stride, mode) = PLAIN;
    let plain = describe(start, leading, stride, mode);
    check_product(&product(IN_REGISTERS, plain, FENCE, ""), false);
    check_product(&product("%d6", plain, FENCE, ""), false);
    check_product(&product(IN_REGISTERS, describe(32, 16, 1024, 1), FENCE, ""), true);
    // The fence may also stand with who reads, behind the barrier.
    check_product(
        &product(IN_REGISTERS, plain, "", "").replace("bar.sync 0;", "bar.sync 0;\nfence.proxy.async;"),
        false,
    );
}

#[test]
fn products_misused() {
    let plain = describe(0, 128, 256, 0);
    let (a, image, _) = operands(false);
    let misused = |source: &str, kind: Kind| {
        caught(source, 128, &[Buf::In(a.clone()), Buf::In(image.clone()), Buf::Out(64 * 16 * 4)], kind)
    };
    misused(&product(IN_REGISTERS, plain, "", ""), Kind::Proxy);
    let good = product(IN_REGISTERS, plain, FENCE, "");
    misused(&good.replace("wgmma.fence.sync.aligned;", ""), Kind::AsyncRegister);
    let moved =
        |what: &str, line: &str| good.replace("// here", "").replacen(what, &format!("{what} {line} // here"), 1);
    misused(&moved("wgmma.commit_group.sync.aligned;", "mov.f32 %f9, %f3;"), Kind::AsyncRegister);
    misused(&moved("wgmma.commit_group.sync.aligned;", "mov.u32 %r13, 0;"), Kind::AsyncRegister);
    let unwaited = good.replace("wgmma.wait_group.sync.aligned 0;", "").replace("// here", "");
    misused(&unwaited.replace("%f0;\n", "%f0; // here\n"), Kind::AsyncRegister);
    let uncommitted = good.replace("wgmma.commit_group.sync.aligned;", "").replace("// here", "");
    misused(&uncommitted.replace("%f0;\n", "%f0; // here\n"), Kind::AsyncRegister);
    // Written by another warp while the tensor cores may still read it: found at the wait.
    let early = product(IN_REGISTERS, plain, FENCE, "st.shared.u32 [s + 64], %r0;").replace("// here", "");
    misused(&early.replace("wait_group.sync.aligned 0;", "wait_group.sync.aligned 0; // here"), Kind::SharedRace);
    // Accumulators that hold nothing are not to be added to.
    misused(&good.replacen("%p0, 1, 1, 0", "%p1, 1, 1, 0", 1), Kind::UninitialisedRegister);
    for (descriptor, word) in [
        (describe(0x2000, 128, 256, 0), "ends at"),
        (describe(128, 16, 1024, 1), "other than the first"),
        (describe(112, 16, 1024, 1), "cross the end"),
        (describe(0, 16, 512, 1), "1024"),
        (describe(0, 128, 256, 2), "swizzle mode 2"),
        (describe(0, 128, 256, 0) | 1 << 49, "base offset"),
        (describe(0, 128, 256, 0) | 1 << 14, "none belong"),
    ] {
        let message = misused(&product(IN_REGISTERS, descriptor, FENCE, ""), Kind::Descriptor);
        assert!(message.contains(word), "{message}");
    }
    let part = good
        .replace("mov.u32 %r0, %tid.x; mov.u32 %r9, s;", "mov.u32 %r0, %tid.x; mov.u32 %r9, s; add.u32 %r0, %r0, 0;");
    assert!(go(&part, 96, &[Buf::In(a.clone()), Buf::In(image.clone()), Buf::Out(4096)]).is_err());
}

#[test]
fn what_is_not_supported_is_refused() {
    let plain = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, ";
    for (statement, word) in [
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%f0}, %d0, %d1, %p0, 1, 1, 0, 0;".into(), "shape"),
        (format!("{plain} %d0, %d1, %p0, 1, 1, 0, 1;"), "K-major"),
        (format!("{plain} %d0, %d1, %p0, 1, 2, 0, 0;"), "imm-scale"),
        (format!("{plain} {{%r0, %r1}}, %d1, %p0, 1, 1, 0;"), "4 registers"),
        ("setmaxnreg.inc.sync.aligned.u32 30;".into(), "multiple of 8"),
        ("mbarrier.try_wait.shared.b64 %p0, [%r0], %d0;".into(), "parity"),
        ("mbarrier.arrive.shared.b64 %d0, [%r0];".into(), "parity"),
        (
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%d0], [%r1];".into(),
            "tensor map",
        ),
    ] {
        let Err(e) = Module::parse(&hopper(0, &format!("{statement}\nret;")), "k").map(|_| ()) else {
            panic!("accepted: {statement}");
        };
        assert!(e.to_string().contains(word), "{e}");
    }
    let Err(e) = Module::parse(&kernel(0, "wgmma.fence.sync.aligned; ret;"), "k").map(|_| ()) else {
        panic!("accepted")
    };
    assert!(e.to_string().contains("sm_90a"), "{e}");
    Module::parse(&hopper(0, "setmaxnreg.dec.sync.aligned.u32 40; ret;"), "k").unwrap();
}
