//! Kernels that are marked as row-invariant are: a row's bits are the same alone, among few and among many, first or
//! last.

use handmill::device::{self, Buffer, Device};
use handmill::op::{row_invariant, Dims, Kernel, OpSpec, Role};
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

/// Every marked kernel of a device, on the shapes of its op's cases; how many there are.
fn check(device: &dyn Device, taken: &[usize], most_work: u64) -> usize {
    let mut found = 0;
    let mut faults = Vec::new();
    for spec in OPS {
        for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source) && row_invariant(spec, k)) {
            found += 1;
            let mut tested = 0;
            for case in spec.cases {
                let mut dims = spec.case_dims(case).with("M", ROWS);
                if spec.name == "attention" {
                    // Longer than a range of keys.
                    dims = dims.with("C", 600);
                }
                if !(kernel.supports)(&dims.clone().with("M", 1), device.caps()) || (spec.cost)(&dims).flops > most_work
                {
                    continue;
                }
                tested += 1;
                faults.extend(fault(device, spec, kernel, &dims, taken));
            }
            assert!(tested > 0, "{}: no case runs on {}", kernel.stem, device.id());
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    found
}

#[test]
fn marked_kernels_of_the_cpu_are_invariant() {
    let device = device::cpu::Cpu::new();
    assert!(check(&device, &TAKEN, 200_000_000) > 30);
}

#[test]
fn the_choice_does_not_depend_on_the_number_of_rows() {
    let device = device::invariant::invariant(std::sync::Arc::new(device::cpu::Cpu::new()));
    for spec in OPS {
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
