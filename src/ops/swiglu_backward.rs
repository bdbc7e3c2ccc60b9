//! `swiglu_backward`: the gradients of [`swiglu`](super::swiglu), y = gate · σ(gate) · up, from its inputs alone
//!
//! dgate = dy · up · σ · (1 + gate · (1 − σ)) and dup = dy · gate · σ, with σ = 1 / (1 + exp(−gate)).

use super::simd;
use crate::op::*;
use crate::tensor::HostTensor;
use crate::verify::normal;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Gradients of SiLU of one projection times another.
pub static SWIGLU_BACKWARD: OpSpec = OpSpec {
    name: "swiglu_backward",
    format: "f32",
    formula: "dgate = dy·up·σ·(1 + gate·(1 − σ)); dup = dy·gate·σ; σ = 1/(1 + exp(−gate)), all [M,F]",
    dims: &["M", "F"],
    scalars: &[],
    args: &[
        input("gate", ArgType::Act, &["M", "F"], Fill::With(gates_near_and_far)),
        input("up", ArgType::Act, &["M", "F"], Fill::Normal),
        input("dy", ArgType::Act, &["M", "F"], Fill::Normal),
        output("dgate", ArgType::Act, &["M", "F"]),
        output("dup", ArgType::Act, &["M", "F"]),
    ],
    oracle,
    // An exp counts as one operation.
    cost: |d| Cost { flops: (10 * d["M"] * d["F"]) as u64, bytes: (20 * d["M"] * d["F"]) as u64 },
    tolerance: Tolerance {
        roundings: |_| 10.0,
        nmse: 1e-12,
        why: "σ errs by exp's 1.1 ulp (2.2 u), and where exp is made of 2^x by |gate| roundings more, of which it \
              keeps the share 1 − σ; the sum and the quotient round once each. 1 − σ cancels, so its error is one of \
              1; it and the rest of the second factor are relative to 1 + |gate|. Five products and sums round once \
              each. Results under 1e-30 of dy may be flushed to zero",
    },
    cases: &[
        case(&[1, 1], "the smallest"),
        case(&[7, 33], "both odd: tails of a warp and of a vec4"),
        case(&[65, 257], "more than one chunk, the last one short"),
        case(&[256, 1536], "SmolLM2-135M"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    rust("swiglu_backward_f32_chunks", |d, args| in_chunks(d, args, chunk::<{ simd::FMA }>), always),
    #[cfg(target_arch = "x86_64")]
    rust("swiglu_backward_f32_chunks_avx2", |d, args| in_chunks(d, args, chunk_avx2), has_avx2),
];

const PTX: &[Kernel] = &[ptx!("swiglu_backward_f32_vec4", four_elements_a_thread, always)];

/// A block of 256 threads takes 1024 elements.
fn four_elements_a_thread(d: &Dims) -> Launch {
    Launch { grid: [(d["M"] * d["F"]).div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

const WGSL: &[Kernel] = &[wgsl!("swiglu_backward_f32_flat" + "exact", |d| flat(d["M"] * d["F"]), always)];

/// Normal of standard deviation 1, 5 and 40 in turn, no farther than 100 from zero: sigmoid's slope and both its ends.
fn gates_near_and_far(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let shape = [d["M"], d["F"]];
    let gate = |i: usize| (normal(rng) * [1.0, 5.0, 40.0][i % 3]).clamp(-100.0, 100.0) as f32;
    HostTensor::from_f32(&shape, &(0..shape[0] * shape[1]).map(gate).collect::<Vec<_>>())
}

/// The definition in f64.
fn oracle(_: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let [gate, up, dy] = [0, 1, 2].map(|i| args[i].to_f64());
    let mut dgate = Expected { value: Vec::new(), magnitude: Vec::new() };
    let mut dup = Expected { value: Vec::new(), magnitude: Vec::new() };
    for ((g, u), dy) in gate.iter().zip(&up).zip(&dy) {
        let sigmoid = 1.0 / (1.0 + (-g).exp());
        let doubt = 1.0 + g.abs() * (1.0 - sigmoid);
        let factor = 1.0 + g * (1.0 - sigmoid);
        dgate.value.push(dy * u * sigmoid * factor);
        dgate.magnitude.push((dy * u).abs() * (sigmoid * (doubt * factor.abs() + 1.0 + g.abs()) + 1e-30));
        dup.value.push(dy * g * sigmoid);
        dup.magnitude.push(dy.abs() * ((g * sigmoid).abs() * doubt + 1e-30));
    }
    vec![dgate, dup]
}

/// CPU: runs of elements in parallel.
fn in_chunks(_: &Dims, args: &mut [Slice<'_>], body: fn([&[f32]; 3], [&mut [f32]; 2])) {
    const CHUNK: usize = 2048;
    let [gate, up, dy, dgate, dup] = args else { unreachable!("five arguments") };
    let inputs = gate.f32().par_chunks(CHUNK).zip(up.f32().par_chunks(CHUNK)).zip(dy.f32().par_chunks(CHUNK));
    let outputs = dgate.f32_mut().par_chunks_mut(CHUNK).zip(dup.f32_mut().par_chunks_mut(CHUNK));
    let work = outputs.zip(inputs).with_min_len(simd::grain(0.8 * CHUNK as f64));
    work.for_each(|((dgate, dup), ((gate, up), dy))| body([gate, up, dy], [dgate, dup]));
}

/// One run. Where exp(−gate) overflows σ is 0, its limit.
#[inline(always)]
fn chunk<const FMA: bool>([gate, up, dy]: [&[f32]; 3], [dgate, dup]: [&mut [f32]; 2]) {
    let inputs = gate.iter().zip(up).zip(dy);
    for ((dgate, dup), ((g, u), dy)) in dgate.iter_mut().zip(dup).zip(inputs) {
        let sigmoid = 1.0 / (1.0 + simd::exp::<FMA>(-g));
        *dgate = dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        *dup = dy * (g * sigmoid);
    }
}

/// One run with AVX2.
#[cfg(target_arch = "x86_64")]
fn chunk_avx2(inputs: [&[f32]; 3], outputs: [&mut [f32]; 2]) {
    #[target_feature(enable = "avx2,fma")]
    fn body(inputs: [&[f32]; 3], outputs: [&mut [f32]; 2]) {
        chunk::<true>(inputs, outputs);
    }
    // SAFETY: the table offers this kernel only to processors with AVX2 and FMA.
    unsafe { body(inputs, outputs) }
}
