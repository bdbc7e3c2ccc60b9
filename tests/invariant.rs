//! Kernels that are marked as row-invariant are: a row's bits are the same alone, among few and among many, first or
//! last.

use handmill::device::{self, Buffer, Device};
use handmill::op::{row_invariant, Caps, Dims, Kernel, OpSpec, Role};
use handmill::ops::OPS;
use handmill::tensor::HostTensor;
use handmill::verify;

/// Rows of the whole.
const ROWS: usize = 40;
/// Numbers of rows that are taken out of it, from the front and from the back.
const TAKEN: [usize; 12] = [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 39];
const SEED: u64 = 3;

/// Rows `first..first + count` of each argument that has a row for each of `ROWS`.
fn cut(spec: &OpSpec, dims: &Dims, tensors: &[HostTensor], first: usize, count: usize) -> Vec<(Vec<u8>, bool)> {
    let fewer = dims.clone().with("M", ROWS - 1);
    let of_rows = |i: usize| spec.args[i].shape(dims) != spec.args[i].shape(&fewer);
    let cut = |(i, tensor): (usize, &HostTensor)| {
        let bytes = tensor.bytes.as_slice();
        match of_rows(i) {
            true => (bytes[bytes.len() / ROWS * first..][..bytes.len() / ROWS * count].to_vec(), true),
            false => (bytes.to_vec(), false),
        }
    };
    tensors.iter().enumerate().map(cut).collect()
}

/// The outputs of a launch on these arguments.
fn outputs(device: &dyn Device, spec: &OpSpec, kernel: &'static Kernel, dims: &Dims, args: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let buffer = |bytes: &Vec<u8>| {
        let mut bytes = bytes.clone();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let buffer = device.alloc(bytes.len()).unwrap();
        device.write(&buffer, 0, &bytes).unwrap();
        buffer
    };
    let buffers: Vec<Buffer> = args.iter().map(buffer).collect();
    device.launch(spec, kernel, &buffers.iter().collect::<Vec<_>>(), dims).unwrap();
    let written = spec.args.iter().zip(&buffers).zip(args).filter(|((arg, _), _)| arg.role != Role::In);
    let read = |((_, buffer), bytes): ((_, &Buffer), &Vec<u8>)| {
        let mut out = vec![0; buffer.bytes()];
        device.read(buffer, 0, &mut out).unwrap();
        out.truncate(bytes.len());
        out
    };
    written.map(read).collect()
}

/// What is wrong with a kernel on one shape.
fn fault(device: &dyn Device, spec: &OpSpec, kernel: &'static Kernel, dims: &Dims, taken: &[usize]) -> Option<String> {
    let tensors = verify::fill(spec, dims, kernel.act, SEED);
    let whole: Vec<Vec<u8>> = tensors.iter().map(|tensor| tensor.bytes.as_slice().to_vec()).collect();
    let expected = outputs(device, spec, kernel, dims, &whole);
    for &count in taken {
        for first in [0, ROWS - count] {
            let (args, _): (Vec<_>, Vec<_>) = cut(spec, dims, &tensors, first, count).into_iter().unzip();
            let got = outputs(device, spec, kernel, &dims.clone().with("M", count), &args);
            for (expected, got) in expected.iter().zip(&got) {
                let row = expected.len() / ROWS;
                if expected[row * first..][..row * count] != got[..] {
                    return Some(format!("{} ({dims}): rows {first}+{count} have other bits alone", kernel.stem));
                }
            }
        }
    }
    None
}

/// Every marked kernel of a device, on up to `most` of its op's cases, the largest of at most `work` operations; how
/// many kernels there are.
fn check(device: &dyn Device, taken: &[usize], most: usize, work: u64) -> usize {
    // What `invariant` makes of it: there a kernel may take a single row that is another's where any kernel runs.
    let caps = Caps { batch_invariant: true, ..device.caps().clone() };
    let mut found = 0;
    let mut faults = Vec::new();
    for spec in OPS {
        for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source) && row_invariant(spec, k)) {
            found += 1;
            let of_rows = |dims: Dims| match spec.name {
                // Longer than a range of keys.
                "attention" => dims.with("M", ROWS).with("C", 600),
                _ => dims.with("M", ROWS),
            };
            let mut cases: Vec<Dims> = spec.cases.iter().map(|case| of_rows(spec.case_dims(case))).collect();
            cases.retain(|dims| (kernel.supports)(&dims.clone().with("M", 1), &caps));
            cases.sort_by_key(|dims| (spec.cost)(dims).flops);
            assert!(!cases.is_empty(), "{}: no case runs on {}", kernel.stem, device.id());
            let end = cases.partition_point(|dims| (spec.cost)(dims).flops <= work).max(1);
            for dims in &cases[end.saturating_sub(most)..end] {
                faults.extend(fault(device, spec, kernel, dims, taken));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    found
}

/// Marked kernels of attention give a row the same bits wherever in the cache its keys lie.
fn check_places(device: &dyn Device) {
    let spec = handmill::ops::find("attention", "f32");
    let (kv, columns) = (3, 64);
    let (rows, before) = (300, 37);
    for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source) && row_invariant(spec, k)) {
        let dims = spec.dims(&[3, 9, kv, columns, rows], &[0.125]);
        let tensors = verify::fill(spec, &dims, kernel.act, SEED);
        let mut args: Vec<Vec<u8>> = tensors.iter().map(|tensor| tensor.bytes.as_slice().to_vec()).collect();
        let expected = outputs(device, spec, kernel, &dims, &args);
        for cache in &mut args[1..3] {
            // What lies before belongs to another text.
            cache.splice(0..0, 9f32.to_le_bytes().repeat(before * kv * columns));
        }
        args[3] = tensors[3].u32().iter().flat_map(|end| (end + before as u32).to_le_bytes()).collect();
        let moved = dims.with("C", rows + before);
        assert!(outputs(device, spec, kernel, &moved, &args) == expected, "{} on {}", kernel.stem, device.id());
    }
}

#[test]
fn marked_kernels_of_the_cpu_are_invariant() {
    let device = device::cpu::Cpu::new();
    assert!(check(&device, &TAKEN, 6, 40_000_000) > 30);
    check_places(&device);
}

#[test]
fn marked_kernels_in_ptx_are_invariant() {
    let device = device::ptx_sim::PtxSim::new();
    assert!(check(&device, &[1, 3, 17], 2, 4_000_000) > 20);
    check_places(&device);
}

#[test]
fn marked_kernels_in_wgsl_are_invariant() {
    let adapter = match device::open("wgpu") {
        Ok(adapter) => adapter,
        Err(error) if std::env::var_os("HANDMILL_REQUIRE_WGPU").is_some() => panic!("{error}"),
        Err(error) => return eprintln!("the kernels in WGSL are not tested: {error}"),
    };
    assert!(check(&*adapter, &[1, 3, 17], 2, 4_000_000) > 20);
    check_places(&*adapter);
}

#[test]
fn the_choice_does_not_depend_on_the_number_of_rows() {
    let devices: [std::sync::Arc<dyn Device>; 2] =
        [std::sync::Arc::new(device::cpu::Cpu::new()), std::sync::Arc::new(device::ptx_sim::PtxSim::new())];
    for (device, spec) in devices
        .into_iter()
        .map(device::invariant::invariant)
        .flat_map(|device| OPS.iter().map(move |spec| (device.clone(), spec)))
    {
        let marked = spec.kernels().any(|k| device.caps().kind.runs(&k.source) && row_invariant(spec, k));
        for case in spec.cases.iter().filter(|_| marked) {
            let chosen = |m: usize| {
                let dims = spec.case_dims(case).with("M", m);
                spec.choose(&dims, handmill::tensor::Dtype::F32, device.caps()).map(|kernel| kernel.stem)
            };
            assert!(chosen(1).is_some(), "{}", spec.id());
            assert!((2..600).step_by(7).all(|m| chosen(m) == chosen(1)), "{}", spec.id());
        }
    }
}
