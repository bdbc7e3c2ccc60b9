//! Every CPU kernel of the table on real models' shapes, by criterion.
//!
//! `cargo bench --bench ops` takes some minutes; `cargo bench --bench ops -- qmatmul_q4` runs what is named so. A row is
//! `<stem>/<dims>`. Its throughput is GiB/s of the least traffic where a product reads few rows, and elsewhere
//! floating-point operations per second, written as elements. Operands stay in the caches from one launch to the next;
//! `handmill bench` times them in none, beside the machine's limits and their errors.

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use handmill::bench::inputs::Inputs;
use handmill::bench::shapes::{label, Select, Shape};
use handmill::device::cpu::{work_on_this_thread, Cpu};
use handmill::device::{Buffer, Device};
use handmill::op::{DeviceKind, Dims, Kernel, OpSpec};
use std::time::Duration;

/// Tokens at once: one chat's next, a few chats', a step of training or a prompt.
const TOKENS: [usize; 3] = [1, 8, 256];
/// Above so many operations the rung meant for reading, `naive`, would take longer than all others together.
const NAIVE_FLOPS: u64 = 100_000_000;
/// From so many operations a byte on, arithmetic is what a kernel waits for.
const COMPUTE_BOUND: u64 = 16;

fn ops(criterion: &mut Criterion) {
    work_on_this_thread();
    let device = Cpu::new();
    let select = Select { models: vec!["smollm2-135m".into()], tokens: TOKENS.into(), quick: false };
    // The smaller matrices of a layer tell nothing that its larger ones do not.
    let small = |shape: &Shape| shape.of.ends_with("k, v") || shape.of.ends_with("q, o");
    for Shape { spec, dims, .. } in select.shapes(DeviceKind::Cpu).into_iter().filter(|shape| !small(shape)) {
        for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source)) {
            let too_slow = kernel.stem.ends_with("_naive") && (spec.cost)(&dims).flops > NAIVE_FLOPS;
            if (kernel.supports)(&dims, device.caps()) && !too_slow {
                bench(criterion, &device, spec, kernel, &dims);
            }
        }
    }
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
    let inputs = Inputs::new(spec, dims, kernel.act);
    let upload = |arg| {
        let bytes = inputs.bytes(spec, arg);
        let buffer = device.alloc(bytes.len())?;
        device.write(&buffer, 0, &bytes)?;
        Ok(buffer)
    };
    let buffers: Result<_, handmill::device::Error> = (0..spec.args.len()).map(upload).collect();
    buffers.expect("memory for the operands")
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
