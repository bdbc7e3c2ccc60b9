//! The check itself: it must fail a wrong kernel, a stray write and a changed input, and pass a right one.

use handmill::device::{cpu::Cpu, Buffer, Device, Result};
use handmill::op::*;
use handmill::tensor::{Dtype, HostTensor};
use handmill::verify;
use std::sync::Mutex;

/// y = 2x, and the last element must stay as it was.
static DOUBLE: OpSpec = OpSpec {
    name: "double",
    format: "f32",
    formula: "y[N] = 2 · x[N], but for the last",
    dims: &["N"],
    scalars: &[],
    args: &[input("x", ArgType::Act, &["N"], Fill::Normal), output("y", ArgType::Act, &["N"])],
    oracle: |_, args| {
        let mut y: Vec<f64> = args[0].to_f64().iter().map(|x| 2.0 * x).collect();
        *y.last_mut().unwrap() = f64::NAN;
        vec![Expected { magnitude: y.iter().map(|v| v.abs()).collect(), value: y }]
    },
    cost: |_| Cost { flops: 0, bytes: 0 },
    tolerance: Tolerance { roundings: |_| 1.0, nmse: 1e-12, why: "one product" },
    cases: &[],
    kernels: &[&[
        kernel("double_f32_right", |_, args| write(args, |i, x, n| (i + 1 < n).then_some(2.0 * x))),
        kernel("double_f32_off", |_, args| write(args, |i, x, n| (i + 1 < n).then_some(2.0 * x * (1.0 + 4e-7)))),
        kernel("double_f32_hole", |_, args| write(args, |i, x, n| (i + 1 < n && i != 5).then_some(2.0 * x))),
        kernel("double_f32_stray", |_, args| write(args, |_, x, _| Some(2.0 * x))),
    ]],
};

const fn kernel(stem: &'static str, body: fn(&Dims, &mut [Slice<'_>])) -> Kernel {
    Kernel { stem, source: Source::Rust(body), act: Dtype::F32, launch: no_grid, supports: always }
}

fn write(args: &mut [Slice<'_>], value: fn(usize, f32, usize) -> Option<f32>) {
    let [x, y] = args else { unreachable!() };
    let (x, y) = (x.f32(), y.f32_mut());
    for i in 0..x.len() {
        if let Some(v) = value(i, x[i], x.len()) {
            y[i] = v;
        }
    }
}

fn failure(device: &dyn Device, kernel: usize) -> Option<String> {
    verify::check(device, &DOUBLE, &DOUBLE.kernels[0][kernel], &DOUBLE.dims(&[33], &[]), 1).unwrap().failure
}

#[test]
fn a_right_kernel_passes() {
    assert_eq!(failure(&Cpu::new(), 0), None);
}

#[test]
fn a_wrong_value_fails_and_is_named() {
    let reason = failure(&Cpu::new(), 1).expect("seven times the unit roundoff is too much");
    assert!(reason.contains("y[") && reason.contains("times the tolerance"), "{reason}");
}

#[test]
fn an_element_left_poisoned_fails() {
    let reason = failure(&Cpu::new(), 2).expect("a hole");
    assert!(reason.contains("y[5]") && reason.contains("NaN"), "{reason}");
}

#[test]
fn a_write_where_nothing_may_change_fails() {
    let reason = failure(&Cpu::new(), 3).expect("the last element was written");
    assert!(reason.contains("y[32]") && reason.contains("must stay"), "{reason}");
}

/// A CPU whose launches also write one byte where they must not: beside a buffer or into an input.
struct Leaky {
    cpu: Cpu,
    allocated: Mutex<Vec<Buffer>>,
    /// Which allocation, and which byte of it.
    leak: (usize, usize),
}

impl Device for Leaky {
    fn id(&self) -> &str {
        "leaky"
    }
    fn description(&self) -> String {
        "a CPU that writes beside its buffers".into()
    }
    fn caps(&self) -> &Caps {
        self.cpu.caps()
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.cpu.alloc(bytes)?;
        self.allocated.lock().unwrap().push(buffer.clone());
        Ok(buffer)
    }
    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        self.cpu.write(target, offset, source)
    }
    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        self.cpu.read(source, offset, target)
    }
    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        self.cpu.copy(from, from_offset, to, to_offset, bytes)
    }
    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        self.cpu.launch(spec, kernel, args, dims)?;
        self.cpu.write(&self.allocated.lock().unwrap()[self.leak.0], self.leak.1, &[0])
    }
    fn sync(&self) -> Result<()> {
        self.cpu.sync()
    }
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.cpu.time(work)
    }
}

#[test]
fn stray_writes_fail_wherever_they_land() {
    let margin = 64;
    assert_eq!(Cpu::new().caps().view_alignment, margin);
    // Buffer 0 holds x, buffer 1 holds y, each of 33 elements between two margins.
    for (buffer, byte, expected) in [
        (0, margin - 1, "outside"),
        (1, margin + 33 * 4, "outside"),
        (1, 0, "outside"),
        (0, margin + 7, "input was changed"),
    ] {
        let device = Leaky { cpu: Cpu::new(), allocated: Mutex::default(), leak: (buffer, byte) };
        let reason = failure(&device, 0).expect("a stray write");
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn a_launch_that_does_not_fit_its_contract_is_refused() {
    let (cpu, dims) = (Cpu::new(), DOUBLE.dims(&[33], &[]));
    let (x, y, short) = (cpu.alloc(132).unwrap(), cpu.alloc(132).unwrap(), cpu.alloc(131).unwrap());
    let launch = |args: &[&Buffer]| cpu.launch(&DOUBLE, &DOUBLE.kernels[0][0], args, &dims).map_err(|e| e.to_string());
    assert_eq!(launch(&[&x, &y]), Ok(()));
    for (args, reason) in [
        (&[&x][..], "takes 2 buffers, got 1"),
        (&[&x, &short], "y needs 132 bytes, its buffer has 131"),
        (&[&x, &x], "output y shares memory with x"),
    ] {
        let error = launch(args).expect_err(reason);
        assert!(error.contains(reason) && error.contains("double_f32_right"), "{error}");
    }
    assert!(cpu.read(&x, 129, &mut [0; 4]).is_err() && cpu.write(&x, usize::MAX, &[0]).is_err());
    assert!(cpu.copy(&x, 0, &y, 2, 4).is_err(), "an offset that is no multiple of 4");
}

#[test]
fn shapes_are_read_from_left_to_right_and_divide_up() {
    let args =
        [input("a", ArgType::Act, &["N*3/2", "7"], Fill::Normal), input("b", ArgType::Act, &["N/64/2"], Fill::Normal)];
    let dims = DOUBLE.dims(&[65], &[]);
    assert_eq!(args[0].shape(&dims), [98, 7]);
    assert_eq!(args[1].shape(&dims), [1]);
    assert_eq!(HostTensor::zeros(Dtype::F16, &args[0].shape(&dims)).bytes.len(), 98 * 7 * 2);
}

#[test]
fn params_are_dims_then_scalars_then_zeros() {
    let spec = handmill::ops::find("rmsnorm", "f32");
    let block = spec.dims(&[7, 33], &[1e-5]).params();
    assert_eq!(block[..4], 7u32.to_le_bytes());
    assert_eq!(block[4..8], 33u32.to_le_bytes());
    assert_eq!(block[8..12], 1e-5f32.to_le_bytes());
    assert_eq!(block[12..], [0; 52]);
}
