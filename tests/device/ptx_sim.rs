//! The executor as a device.

use super::*;
use handmill::device::ptx_sim::PtxSim;
use handmill::device::{Device, Error};
use handmill::verify;

/// What a launch of one of the kernels over 33 elements says.
fn launch_error(kernel: usize) -> Option<String> {
    let check = verify::check(&PtxSim::new(), &DOUBLE, &DOUBLE.kernels[0][kernel], &DOUBLE.dims(&[33], &[]), 1);
    match check {
        Ok(outcome) => outcome.failure,
        Err(error) => Some(error.to_string()),
    }
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

#[test]
fn a_right_kernel_passes() {
    assert_eq!(launch_error(RIGHT), None);
}

#[test]
fn one_element_past_a_view_is_found_and_its_argument_named() {
    // The views lie between margins of one larger buffer: the byte past them exists.
    let error = launch_error(PAST).expect("33 elements, 34 threads");
    has(&error, &["double_f32_past (N=33)", "2 findings", "line 27, block (1,0,0), warp 0, lane 1"]);
    has(
        &error,
        &["4 bytes at offset 132 of argument `x`, which has 132 bytes", "of argument `y`, which has 132 bytes"],
    );
}

#[test]
fn an_error_lists_five_findings_and_counts_the_rest() {
    let error = launch_error(MANY).expect("loads outside");
    has(&error, &["7 findings", "and 2 more"]);
    assert_eq!(error.matches("out of bounds").count(), 5, "{error}");
}

#[test]
fn what_cannot_be_launched_is_refused_in_words() {
    for (kernel, words) in [
        (SYNTAX, &["double_f32_syntax", "tests/device.ptx:28", "add.f33"][..]),
        (GRID, &["a grid of [70000, 70000, 1]", "65535"]),
        (BLOCK, &["a block of [2048, 1, 1]", "1024 threads"]),
        (SHARED, &["1048576 bytes of shared memory", "232448"]),
    ] {
        has(&launch_error(kernel).expect("a refusal"), words);
    }
    let sim = PtxSim::new();
    let (x, y) = (sim.alloc(1024).unwrap(), sim.alloc(1024).unwrap());
    let launch = |n: usize, x: &_, y: &_| {
        sim.launch(&DOUBLE, &DOUBLE.kernels[0][RIGHT], &[x, y], &DOUBLE.dims(&[n], &[])).map_err(|e| e.to_string())
    };
    sim.write(&x, 0, &[0; 512]).unwrap();
    assert_eq!(launch(33, &x, &y), Ok(()));
    assert_eq!(launch(0, &x, &y), Ok(()), "nothing to do");
    has(&launch(33, &x.view(4, 132), &y).unwrap_err(), &["x begins at byte 4", "multiple of 256"]);
    has(&launch(33, &x.view(512, 132), &y).unwrap_err(), &["uninitialised global memory", "argument `x`"]);
    assert!(matches!(sim.copy(&x, 0, &y, 2, 4), Err(Error::Invalid { .. })), "copies go by words");
    assert!(matches!(sim.copy(&x, 1020, &y, 0, 8), Err(Error::Invalid { .. })), "past the end");
}

#[test]
fn counts_are_there_for_whoever_asks() {
    let (sim, dims) = (PtxSim::new(), DOUBLE.dims(&[33], &[]));
    let (x, y) = (sim.alloc(132).unwrap(), sim.alloc(132).unwrap());
    sim.write(&x, 0, &[0; 132]).unwrap();
    let options = ::ptx_sim::Options { checked: true, count: true, ..Default::default() };
    let ran = sim.run(&DOUBLE, &DOUBLE.kernels[0][RIGHT], &[&x, &y], &dims, &options).unwrap().expect("it ran");
    assert!(ran.report.findings.is_empty());
    assert_eq!((ran.grid, ran.block, ran.shared_bytes), ([2, 1, 1], [32, 1, 1], 0));
    let [x, y, params] = &ran.report.params[..] else { panic!("three parameters") };
    assert_eq!((x.read, x.written, y.read, y.written, params.read), (132, 0, 0, 132, 0));
    assert_eq!(ran.report.counts.global.requests, 4);
}
