//! A wgpu device whose workgroup memory is full of NaN before every launch. Nothing clears that memory, so a kernel that
//! reads a word it has not written gives wrong results here, and elsewhere only by chance.

use handmill::device::{wgpu::Wgpu, Buffer, Device, Result};
use handmill::op::*;
use handmill::tensor::Dtype;

/// Two kernels over 16 KiB of workgroup memory: `soil` fills it with NaN, on as many groups as keep every processor
/// busy, and `peek` tells how many of its words are NaN, a number a group.
static DIRT: OpSpec = OpSpec {
    name: "dirt",
    format: "u32",
    formula: "y[N] = words that are NaN",
    dims: &["N"],
    scalars: &[],
    args: &[output("y", ArgType::Is(Dtype::U32), &["N"])],
    oracle: |_, _| Vec::new(),
    cost: |_| Cost { flops: 0, bytes: 0 },
    tolerance: Tolerance { roundings: |_| 0.0, nmse: 0.0, why: "" },
    cases: &[],
    kernels: &[&[
        kernel("soil", &[File { path: "tests/support/soil.wgsl", text: include_str!("soil.wgsl") }]),
        kernel("peek", &[File { path: "tests/support/peek.wgsl", text: include_str!("peek.wgsl") }]),
    ]],
};
/// Words of 16 KiB.
pub const WORDS: u32 = 4096;

const fn kernel(stem: &'static str, files: &'static [File]) -> Kernel {
    let launch = |d: &Dims| Launch { grid: [d["N"] as u32, 1, 1], block: [64, 1, 1], shared_bytes: 4 * WORDS };
    Kernel { stem, source: Source::Wgsl(files), act: Dtype::F32, launch, supports: always }
}

/// The device.
pub struct Dirty {
    device: Wgpu,
    y: Buffer,
}

impl Dirty {
    pub fn new(device: Wgpu) -> Dirty {
        Dirty { y: device.alloc(4 * 64).unwrap(), device }
    }

    fn run(&self, kernel: usize) -> Result<()> {
        self.device.launch(&DIRT, &DIRT.kernels[0][kernel], &[&self.y], &DIRT.dims(&[64], &[]))
    }

    /// The most NaN a workgroup finds in its memory after one that left NaN there, of [`WORDS`]; the best of several
    /// goes, as launches of other threads may come between.
    pub fn found(&self) -> u32 {
        let go = || {
            self.run(0).unwrap();
            self.run(1).unwrap();
            let mut counts = [0u32; 64];
            self.device.read(&self.y, 0, bytemuck::cast_slice_mut(&mut counts)).unwrap();
            counts.into_iter().max().unwrap()
        };
        (0..100).map(|_| go()).find(|found| *found == WORDS).unwrap_or(0)
    }
}

impl Device for Dirty {
    fn id(&self) -> &str {
        self.device.id()
    }
    fn description(&self) -> String {
        self.device.description()
    }
    fn caps(&self) -> &Caps {
        self.device.caps()
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.device.alloc(bytes)
    }
    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        self.device.write(target, offset, source)
    }
    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        self.device.read(source, offset, target)
    }
    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        self.device.copy(from, from_offset, to, to_offset, bytes)
    }
    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        self.run(0)?;
        self.device.launch(spec, kernel, args, dims)
    }
    fn sync(&self) -> Result<()> {
        self.device.sync()
    }
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.device.time(work)
    }
}
