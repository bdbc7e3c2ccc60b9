//! The least bytes and operations of the contracts: a share of a roofline says something only where no launch can do
//! with less.

use handmill::bench::inputs::Inputs;
use handmill::bench::shapes::Select;
use handmill::op::{ArgType, DeviceKind, Dims, OpSpec, Role, Source};
use handmill::ops::{self, OPS};
use handmill::tensor::Dtype;
use ptx_sim::{launch, Launch, Memory, Module, Options, Param};

/// A launch touches no more than all its arguments, what it updates twice.
#[test]
fn least_bytes_are_no_more_than_the_arguments_have() {
    let mut all: Vec<(&OpSpec, Dims)> = Vec::new();
    for spec in OPS {
        all.extend(spec.cases.iter().map(|case| (*spec, spec.case_dims(case))));
    }
    let shapes = Select::default().shapes(DeviceKind::Cuda);
    all.extend(shapes.into_iter().map(|shape| (shape.spec, shape.dims)));
    for (spec, dims) in all {
        let bytes = |arg: &handmill::op::Arg| {
            let times = if arg.role == Role::InOut { 2 } else { 1 };
            times * arg.bytes(&dims, Dtype::F32) as u64
        };
        let most: u64 = spec.args.iter().map(bytes).sum();
        let least = (spec.cost)(&dims).bytes;
        assert!(
            0 < least && least <= most,
            "{} ({dims}): {least} bytes are the least, all arguments {most}",
            spec.id()
        );
    }
}

/// Small shapes in which nothing is left out, of each op whose inputs say which rows the others are read by: an index
/// or a span that points elsewhere, or to the same row again, would let a launch do with less.
const POINTING: [(&str, &[(&str, usize)]); 11] = [
    ("embedding", &[("M", 40), ("N", 96), ("N0", 0)]),
    ("gather_rows", &[("N", 40), ("M", 33), ("K", 64)]),
    ("rope", &[("M", 33), ("C", 64)]),
    ("rope_backward", &[("M", 33), ("C", 64)]),
    ("mean_pool", &[("S", 5), ("M", 67), ("K", 64)]),
    ("cross_entropy", &[("M", 14), ("V", 1024)]),
    ("lora_shrink", &[("M", 3), ("K", 64), ("R", 8), ("T", 64), ("L", 8), ("IDS", 1)]),
    ("lora_expand", &[("M", 3), ("N", 64), ("R", 8), ("T", 64), ("L", 8), ("LDY", 64), ("Y0", 0)]),
    ("attention", &[("M", 48), ("C", 48), ("H", 4), ("KV", 2), ("D", 64)]),
    ("attention_stats", &[("M", 48), ("C", 48), ("H", 4), ("KV", 2), ("D", 64)]),
    ("attention_backward", &[("M", 48), ("C", 48), ("H", 4), ("KV", 2), ("D", 64)]),
];

#[test]
fn kernels_move_at_least_the_least_bytes_of_what_is_measured() {
    for (name, sizes) in POINTING {
        let spec = OPS.iter().copied().find(|spec| spec.name == name).expect("an op of the table");
        let last = spec.case_dims(spec.cases.last().expect("an op has cases"));
        let dims = sizes.iter().fold(last, |dims, &(dim, size)| dims.with(dim, size));
        let (moved, computed) = count(spec, &dims);
        let least = (spec.cost)(&dims);
        assert!(moved >= least.bytes, "{name} ({dims}): moves {moved} bytes, the least are {}", least.bytes);
        // An instruction of a thread is at most a multiply-add of two halves.
        assert!(computed >= least.flops, "{name} ({dims}): computes {computed}, the least are {}", least.flops);
    }
}

/// Bytes of the sectors that a launch moves, and the most operations that its instructions can be: by the fastest
/// kernel in PTX with f32 activations, on the inputs that are measured.
fn count(spec: &OpSpec, dims: &Dims) -> (u64, u64) {
    let device = handmill::device::ptx_sim::PtxSim::new();
    let caps = handmill::device::Device::caps(&device);
    let kernel = spec.choose(dims, Dtype::F32, caps).expect("a kernel in PTX");
    let Source::Ptx(file) = kernel.source else { unreachable!("the executor runs PTX") };
    let module = Module::parse(&file.read().expect("the kernel's file"), file.path).expect("PTX");
    let inputs = Inputs::new(spec, dims, kernel.act);
    let mut memory = Memory::new();
    let arg = |i| Param::Buffer(memory.alloc_from(&inputs.bytes(spec, i)).expect("memory"));
    let mut params: Vec<Param> = (0..spec.args.len()).map(arg).collect();
    params.push(Param::Bytes(dims.params().to_vec()));
    let work = (kernel.launch)(dims);
    let shape = Launch { grid: work.grid, block: work.block, dynamic_shared: work.shared_bytes, params };
    let options = Options { count: true, ..Options::default() };
    let counts = launch(&module, kernel.stem, &mut memory, &shape, &options).expect("a run").counts;
    let moved = counts.buffers.iter().map(|buffer| buffer.sector_read + buffer.sector_written).sum();
    (moved, 4 * counts.thread_instructions + 2 * counts.mma_macs)
}

/// What one launch does must be known of the type that it multiplies: codes are no f32.
#[test]
fn limits_are_of_the_type_that_is_multiplied() {
    use handmill::bench::roofline::factors;
    assert_eq!(factors(ops::find("cosine_topk", "i8"), Dtype::F32), Dtype::I8);
    assert_eq!(factors(ops::find("cosine_topk", "f16"), Dtype::BF16), Dtype::BF16);
    assert_eq!(factors(ops::find("cosine_topk", "f32"), Dtype::F16), Dtype::BF16);
    assert_eq!(factors(ops::find("qmatmul", "q4"), Dtype::F32), Dtype::F32);
    let codes = OPS.iter().filter(|spec| spec.args[0].dtype == ArgType::Is(Dtype::I8));
    assert_eq!(codes.count(), 1, "another op multiplies codes: see which limit it has");
}
