//! Helpers for the executor's tests: one kernel, its buffers, one launch.
#![allow(dead_code)] // each test file uses some of them

use ptx_sim::{launch, BufferId, Error, Kind, Launch, Memory, Module, Options, Param, Report};

pub fn checked() -> Options {
    Options { checked: true, count: true, step_limit: 1 << 20, threads: 1, ..Options::default() }
}

pub fn unchecked() -> Options {
    Options { step_limit: 1 << 20, threads: 1, ..Options::default() }
}

/// A kernel over pointer parameters `p0, p1, ..` around the given declarations and statements.
pub fn kernel(pointers: usize, body: &str) -> String {
    let params: Vec<String> = (0..pointers).map(|i| format!("    .param .u64 p{i}")).collect();
    let regs = "    .reg .pred %p<8>;  .reg .b16 %h<16>;  .reg .b32 %r<64>;  .reg .f32 %f<32>;\n    \
                .reg .b64 %d<32>;  .reg .f64 %g<8>;";
    let loads: String = (0..pointers).map(|i| format!("    ld.param.u64 %d{}, [p{i}];\n", 20 + i)).collect();
    format!(
        ".version 7.8\n.target sm_80\n.address_size 64\n.visible .entry k (\n{}\n) {{\n{regs}\n{loads}{body}\n}}\n",
        params.join(",\n")
    )
}

/// Line of the first source line that contains the text, from 1.
pub fn line_of(source: &str, text: &str) -> u32 {
    1 + source.lines().position(|l| l.contains(text)).unwrap_or_else(|| panic!("no line has {text:?}")) as u32
}

pub fn u32s(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub fn u64s(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
}

pub fn f32s(bytes: &[u8]) -> Vec<f32> {
    u32s(bytes).into_iter().map(f32::from_bits).collect()
}

pub fn bytes32(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn bytes64(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn bytes_f32(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Buffers to launch with: given bytes, or room for outputs.
pub enum Buf {
    In(Vec<u8>),
    Out(usize),
}

pub struct Ran {
    pub report: Report,
    pub buffers: Vec<Vec<u8>>,
}

/// Launches the module's first entry; arguments behind the buffers are bytes.
pub fn run_with(
    source: &str,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    buffers: &[Buf],
    rest: &[Vec<u8>],
    options: &Options,
) -> Result<Ran, Error> {
    let module = Module::parse(source, "test.ptx")?;
    let name = module.entries()[0].name.clone();
    let mut memory = Memory::new();
    let mut ids: Vec<BufferId> = Vec::new();
    for b in buffers {
        ids.push(match b {
            Buf::In(bytes) => memory.alloc_from(bytes)?,
            Buf::Out(n) => memory.alloc(*n, false)?,
        });
    }
    let mut params: Vec<Param> = ids.iter().map(|id| Param::Buffer(*id)).collect();
    params.extend(rest.iter().map(|b| Param::Bytes(b.clone())));
    let report = launch(&module, &name, &mut memory, &Launch { grid, block, dynamic_shared, params }, options)?;
    Ok(Ran { report, buffers: ids.iter().map(|id| memory.bytes(*id).to_vec()).collect() })
}

/// One block of 32 threads, checked; panics on a fault.
pub fn run(source: &str, buffers: &[Buf]) -> Ran {
    match run_with(source, [1; 3], [32, 1, 1], 0, buffers, &[], &checked()) {
        Ok(ran) => ran,
        Err(e) => panic!("{e}\n{source}"),
    }
}

/// The classes and lines found.
pub fn found(report: &Report) -> Vec<(Kind, u32)> {
    report.findings.iter().map(|f| (f.kind, f.place.line)).collect()
}

/// A small generator for test operands: xorshift, so that every run is the same.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in −1..1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
