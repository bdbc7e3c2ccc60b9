//! Every CPU kernel of the table on real models' shapes, by criterion.
//!
//! `cargo bench --bench ops` takes some minutes; `cargo bench --bench ops -- qmatmul_q4` runs what is named so. A row is
//! `<stem>/<dims>`. Its throughput is GiB/s of the least traffic where a product reads few rows, and elsewhere
//! floating-point operations per second, written as elements. Operands stay in the caches from one launch to the next;
//! `benches/model.rs` shows what weights cost that do not fit them.

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use handmill::device::cpu::{work_on_this_thread, Cpu};
use handmill::device::{Buffer, Device};
use handmill::op::{Dims, Kernel, OpSpec};
use handmill::ops::OPS;
use handmill::verify;
use std::time::Duration;

/// N and K of SmolLM2-135M's feed-forward matrices: up and down.
const LAYER: [(usize, usize); 2] = [(1536, 576), (576, 1536)];
/// N and K of its output head, which is read whole for every token.
const HEAD: (usize, usize) = (49152, 576);
/// Tokens at once: one chat's next, a few chats', a prompt.
const TOKENS: [usize; 3] = [1, 8, 512];
/// Tokens of a step of training.
const TRAINED: usize = 256;
/// Above so many operations the rung meant for reading, `naive`, would take longer than all others together.
const NAIVE_FLOPS: u64 = 100_000_000;
/// From so many operations a byte on, arithmetic is what a kernel waits for.
const COMPUTE_BOUND: u64 = 16;

fn ops(criterion: &mut Criterion) {
    work_on_this_thread();
    let device = Cpu::new();
    for &spec in OPS {
        for dims in shapes(spec) {
            for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source)) {
                let too_slow = kernel.stem.ends_with("_naive") && (spec.cost)(&dims).flops > NAIVE_FLOPS;
                if (kernel.supports)(&dims, device.caps()) && !too_slow {
                    bench(criterion, &device, spec, kernel, &dims);
                }
            }
        }
    }
}

/// The shapes an op is timed on: its real model's, the last of its cases, and for products SmolLM2-135M's.
fn shapes(spec: &OpSpec) -> Vec<Dims> {
    let last = spec.cases.last().map(|case| spec.case_dims(case)).expect("an op has cases");
    match spec.name {
        "qmatmul" => {}
        "qmatmul_t" => return LAYER.map(|shape| of_training(spec, shape)).into(),
        "attention_backward" | "attention_stats" => return vec![last.with("M", TRAINED).with("C", TRAINED)],
        _ => return vec![last],
    }
    let product = |m: usize, (n, k): (usize, usize)| {
        let plain = ["BIAS", "R", "Y0", "WIDE", "AFFINE"].iter().filter(|&&dim| last.get(dim).is_some());
        let shape = [("M", m), ("N", n), ("K", k), ("LDY", n)];
        let dims = plain.fold(last.clone(), |dims, dim| dims.with(dim, 0));
        shape.iter().fold(dims, |dims, &(dim, value)| dims.with(dim, value))
    };
    let layers = TOKENS.iter().flat_map(|&m| LAYER.map(|shape| product(m, shape)));
    let head = (spec.format == "q8").then(|| product(1, HEAD));
    layers.chain(head).collect()
}

/// A step of training's tokens through a projection and an adapter of rank 8.
fn of_training(spec: &OpSpec, (n, k): (usize, usize)) -> Dims {
    let last = spec.cases.last().map(|case| spec.case_dims(case)).expect("an op has cases");
    let shape = [("M", TRAINED), ("N", n), ("K", k), ("LDY", n), ("R", 8), ("ACC", 0)];
    shape.iter().fold(last, |dims, &(dim, value)| dims.with(dim, value))
}

fn bench(criterion: &mut Criterion, device: &dyn Device, spec: &OpSpec, kernel: &'static Kernel, dims: &Dims) {
    let cost = (spec.cost)(dims);
    let mut group = criterion.benchmark_group(kernel.stem);
    group.throughput(match cost.flops / cost.bytes.max(1) {
        COMPUTE_BOUND.. => Throughput::Elements(cost.flops),
        _ => Throughput::Bytes(cost.bytes),
    });
    // Made when the filter lets the first iteration through.
    let mut buffers: Option<Vec<Buffer>> = None;
    group.bench_function(BenchmarkId::from_parameter(label(dims)), |bencher| {
        let buffers = buffers.get_or_insert_with(|| inputs(device, spec, kernel, dims));
        let args: Vec<&Buffer> = buffers.iter().collect();
        bencher.iter(|| device.launch(spec, kernel, &args, dims).expect("a launch of the table"));
    });
    group.finish();
}

fn inputs(device: &dyn Device, spec: &OpSpec, kernel: &Kernel, dims: &Dims) -> Vec<Buffer> {
    let upload = |tensor: &handmill::tensor::HostTensor| {
        let buffer = device.alloc(tensor.bytes.len())?;
        device.write(&buffer, 0, tensor.bytes.as_slice())?;
        Ok(buffer)
    };
    let buffers: Result<_, handmill::device::Error> =
        verify::fill(spec, dims, kernel.act, 1).iter().map(upload).collect();
    buffers.expect("memory for the operands")
}

/// The dims that say something: not the zeros, and not y's width where it is N.
fn label(dims: &Dims) -> String {
    let text = dims.to_string();
    let words = text.split(' ').filter(|word| !word.ends_with("=0") && !word.starts_with("LDY="));
    words.collect::<Vec<_>>().join(" ")
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500));
    targets = ops
}
criterion_main!(benches);
