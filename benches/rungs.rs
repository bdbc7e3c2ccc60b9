//! Every rung of `qmatmul` and `qmatmul_t` on a device, on SmolLM2-135M's shapes: median time, speed, and its error
//! beside it.
//!
//! `cargo bench --bench rungs -- [--device wgpu] [--tokens 128] [qmatmul_q4]`. Rungs of a shape take turns, so that other
//! work on the machine troubles them alike. The error is the worst share of the contract's tolerance. Weights stay in the
//! caches from one launch to the next. A device that is a processor says so in the first line: its speeds tell which rung
//! suits it, and nothing of graphics cards.

use anyhow::{Context, Result};
use clap::Parser;
use handmill::device::{self, Buffer, Device};
use handmill::op::{Dims, Kernel, OpSpec};
use handmill::ops::OPS;
use handmill::verify;

/// N and K of a layer's matrices: queries and output, keys and values, gate and up, down.
const SHAPES: [(usize, usize); 4] = [(576, 576), (192, 576), (1536, 576), (576, 1536)];
/// Above so many operations the rung meant for reading, `naive`, would take longer than all others together.
const NAIVE_FLOPS: u64 = 10_000_000;
/// Measurements of a rung, and the least time of one in seconds.
const ROUNDS: usize = 5;
const ROUND_SECONDS: f64 = 0.02;

/// Rungs of qmatmul and qmatmul_t on a device
#[derive(Parser)]
#[command(name = "rungs", max_term_width = 100)]
struct Options {
    /// Part of the rungs' names
    #[arg(default_value = "qmatmul")]
    name: String,
    /// Where to run: cpu, wgpu, wgpu:1, wgpu:0:unchecked
    #[arg(long, default_value = "wgpu")]
    device: String,
    /// Rows of x
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = device::open(&options.device)?;
    println!("{}\n", device.description());
    println!("{:<28} {:>16} {:>10} {:>9} {:>8} {:>6}", "rung", "M x N x K", "ms", "GFLOP/s", "GB/s", "error");
    for &spec in OPS.iter().filter(|spec| ["qmatmul", "qmatmul_t"].contains(&spec.name)) {
        for (n, k) in SHAPES {
            let dims = shape(spec, options.tokens, n, k);
            let flops = (spec.cost)(&dims).flops;
            let fits = |kernel: &Kernel| {
                device.caps().kind.runs(&kernel.source)
                    && (kernel.supports)(&dims, device.caps())
                    && !(kernel.stem.ends_with("_naive") && flops > NAIVE_FLOPS)
            };
            let named = spec.kernels().filter(|kernel| kernel.stem.contains(&options.name));
            rows(&*device, spec, &named.filter(|&kernel| fits(kernel)).collect::<Vec<_>>(), &dims)?;
        }
    }
    Ok(())
}

/// The last case's dims with another shape, without what is added to the product.
fn shape(spec: &OpSpec, m: usize, n: usize, k: usize) -> Dims {
    let last = spec.case_dims(spec.cases.last().expect("an op has cases"));
    let changed = [("M", m), ("N", n), ("K", k), ("LDY", n), ("Y0", 0), ("BIAS", 0), ("R", 0), ("ACC", 0)];
    let there = changed.iter().filter(|(name, _)| last.get(name).is_some());
    there.fold(last.clone(), |dims, &(name, value)| dims.with(name, value))
}

/// A kernel ready to run.
struct Rung {
    kernel: &'static Kernel,
    buffers: Vec<Buffer>,
    /// The worst share of the tolerance, and what is wrong.
    error: (f64, Option<String>),
    /// Launches of a measurement.
    launches: usize,
    seconds: Vec<f64>,
}

impl Rung {
    fn time(&self, device: &dyn Device, spec: &OpSpec, dims: &Dims, launches: usize) -> Result<f64> {
        let args: Vec<&Buffer> = self.buffers.iter().collect();
        let mut work = || (0..launches).try_for_each(|_| device.launch(spec, self.kernel, &args, dims));
        Ok(device.time(&mut work)? / launches as f64)
    }
}

fn rows(device: &dyn Device, spec: &'static OpSpec, kernels: &[&'static Kernel], dims: &Dims) -> Result<()> {
    let mut rungs = Vec::new();
    for &kernel in kernels {
        let outcome =
            verify::check(device, spec, kernel, dims, 1).with_context(|| format!("{} ({dims})", kernel.stem))?;
        let mut buffers: Vec<Buffer> = Vec::new();
        for tensor in verify::fill(spec, dims, kernel.act, 1) {
            let buffer = device.alloc(tensor.bytes.len())?;
            device.write(&buffer, 0, tensor.bytes.as_slice())?;
            buffers.push(buffer);
        }
        let mut rung =
            Rung { kernel, buffers, error: (outcome.share, outcome.failure), launches: 1, seconds: Vec::new() };
        rung.launches = (ROUND_SECONDS / rung.time(device, spec, dims, 1)?.max(1e-7)).ceil() as usize;
        rungs.push(rung);
    }
    for _ in 0..ROUNDS {
        for rung in &mut rungs {
            let seconds = rung.time(device, spec, dims, rung.launches)?;
            rung.seconds.push(seconds);
        }
    }
    let cost = (spec.cost)(dims);
    for Rung { kernel, error, mut seconds, .. } in rungs {
        seconds.sort_by(f64::total_cmp);
        let median = seconds[ROUNDS / 2];
        println!(
            "{:<28} {:>16} {:>10.3} {:>9.1} {:>8.2} {:>6.3}{}",
            kernel.stem,
            format!("{} x {} x {}", dims["M"], dims["N"], dims["K"]),
            median * 1e3,
            cost.flops as f64 / median / 1e9,
            cost.bytes as f64 / median / 1e9,
            error.0,
            error.1.map_or(String::new(), |reason| format!(" WRONG: {reason}")),
        );
    }
    Ok(())
}
