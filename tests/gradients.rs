//! What training rests on: every backward op is the derivative of its forward op, and every run gives the same bits.
//!
//! Derivatives: the oracles are f64 functions of f32 inputs. Inputs lie on a grid coarse enough that input ± step is
//! exact in f32, so central differences of the forward oracle, extrapolated once, err by the fifth derivative times
//! step⁴.

use handmill::device::{cpu::Cpu, Buffer, Device};
use handmill::op::{Dims, Kernel, OpSpec, Role};
use handmill::ops::{self, adamw, dropout, OPS};
use handmill::tensor::{Dtype, HostTensor};
use handmill::verify;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Steps of the differences; inputs are multiples of GRID.
const STEP: f64 = 1.0 / 256.0;
const GRID: f64 = 1.0 / 64.0;

/// Random multiples of the grid in [−2, 2).
fn grid(rng: &mut ChaCha8Rng, shape: &[usize]) -> HostTensor {
    let count: usize = shape.iter().product();
    HostTensor::from_f64(
        Dtype::F32,
        shape,
        &(0..count).map(|_| rng.random_range(-128..128) as f64 * GRID).collect::<Vec<_>>(),
    )
}

fn oracle(spec: &OpSpec, dims: &Dims, args: &[&HostTensor]) -> Vec<Vec<f64>> {
    let args: Vec<HostTensor> = args.iter().map(|&t| t.clone()).collect();
    (spec.oracle)(dims, &args).into_iter().map(|e| e.value).collect()
}

/// An output of the oracle as an input of the next: rounded to f32.
fn f32s(shape: &[usize], values: &[f64]) -> HostTensor {
    HostTensor::from_f64(Dtype::F32, shape, values)
}

fn dot(a: &[f64], b: &HostTensor) -> f64 {
    a.iter().zip(b.to_f64()).map(|(a, b)| a * b).sum()
}

/// Compares `gradient` with differences of `loss` over each element of `x`; `tolerance` is relative to the largest.
fn compare(what: &str, x: &HostTensor, gradient: &[f64], tolerance: f64, loss: impl Fn(&HostTensor) -> f64) {
    let values = x.to_f64();
    assert_eq!(values.len(), gradient.len(), "{what}");
    let largest = gradient.iter().fold(0.0f64, |max, g| max.max(g.abs()));
    assert!(largest > 0.0, "{what}: a gradient of zeros says nothing");
    for i in 0..values.len() {
        let moved = |by: f64| {
            let mut values = values.clone();
            values[i] += by;
            loss(&HostTensor::from_f64(x.dtype, &x.shape, &values))
        };
        let slope = |step: f64| (moved(step) - moved(-step)) / (2.0 * step);
        let expected = (4.0 * slope(STEP / 2.0) - slope(STEP)) / 3.0;
        let error = (gradient[i] - expected).abs();
        assert!(error <= tolerance * largest, "{what}[{i}]: {} but differences say {expected}", gradient[i]);
    }
}

#[test]
fn rmsnorm_backward_is_the_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (m, k) in [(3, 7), (2, 33)] {
        let (x, gain, dy) = (grid(&mut rng, &[m, k]), grid(&mut rng, &[k]), grid(&mut rng, &[m, k]));
        let before = grid(&mut rng, &[m, k]);
        let (forward, backward) = (ops::find("rmsnorm", "f32"), ops::find("rmsnorm_backward", "f32"));
        let dims = forward.dims(&[m, k], &[1e-3]);
        let y = HostTensor::zeros(Dtype::F32, &[m, k]);
        let loss = |x: &HostTensor| dot(&oracle(forward, &dims, &[x, &gain, &y])[0], &dy);
        let gradient = |acc: usize| oracle(backward, &backward.dims(&[m, k, acc], &[1e-3]), &[&x, &gain, &dy, &before]);
        compare("rmsnorm dx", &x, &gradient(0)[0], 1e-7, loss);
        for ((sum, dx), before) in gradient(1)[0].iter().zip(&gradient(0)[0]).zip(before.to_f64()) {
            assert!((sum - dx - before).abs() < 1e-12, "ACC adds");
        }
    }
}

#[test]
fn rope_backward_is_the_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (m, h, d, c) = (3, 2, 6, 5);
    let (forward, backward) = (ops::find("rope", "f32"), ops::find("rope_backward", "f32"));
    let dims = forward.dims(&[m, h, d, c], &[]);
    let inputs = verify::fill(forward, &dims, Dtype::F32, 3);
    let (x, dy) = (grid(&mut rng, &[m, h * d]), grid(&mut rng, &[m, h * d]));
    let loss = |x: &HostTensor| dot(&oracle(forward, &dims, &[x, &inputs[1], &inputs[2], &inputs[3]])[0], &dy);
    let gradient = oracle(backward, &backward.dims(&[m, h, d, c], &[]), &[&dy, &inputs[1], &inputs[2], &inputs[3]]);
    compare("rope dx", &x, &gradient[0], 1e-10, loss);
}

#[test]
fn swiglu_backward_is_the_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let shape = [3, 33];
    let [gate, up, dy] = [0; 3].map(|_| grid(&mut rng, &shape));
    let y = HostTensor::zeros(Dtype::F32, &shape);
    let (forward, backward) = (ops::find("swiglu", "f32"), ops::find("swiglu_backward", "f32"));
    let dims = forward.dims(&shape, &[]);
    let loss = |gate: &HostTensor, up: &HostTensor| dot(&oracle(forward, &dims, &[gate, up, &y])[0], &dy);
    let gradient = oracle(backward, &backward.dims(&shape, &[]), &[&gate, &up, &dy, &y, &y]);
    compare("swiglu dgate", &gate, &gradient[0], 1e-8, |gate| loss(gate, &up));
    compare("swiglu dup", &up, &gradient[1], 1e-8, |up| loss(&gate, up));
}

#[test]
fn attention_backward_is_the_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (forward, stats, backward) =
        (ops::find("attention", "f32"), ops::find("attention_stats", "f32"), ops::find("attention_backward", "f32"));
    // Packed documents with shared key heads, an encoder's sentences with padding, a causal end of a longer text.
    for sizes in [[7, 4, 2, 5, 7], [9, 2, 2, 3, 9], [3, 3, 1, 4, 6]] {
        let [m, h, kv, d, c] = sizes;
        let dims = forward.dims(&sizes, &[0.5]);
        let span = verify::fill(forward, &dims, Dtype::F32, 5).swap_remove(3);
        let (q, dy) = (grid(&mut rng, &[m, h * d]), grid(&mut rng, &[m, h * d]));
        let (k, v) = (grid(&mut rng, &[c, kv * d]), grid(&mut rng, &[c, kv * d]));
        let y =
            |q: &HostTensor, k: &HostTensor, v: &HostTensor| oracle(forward, &dims, &[q, k, v, &span, &dy]).remove(0);
        let loss = |q: &HostTensor, k: &HostTensor, v: &HostTensor| dot(&y(q, k, v), &dy);

        let y0 = f32s(&[m, h * d], &y(&q, &k, &v));
        let of_stats = oracle(stats, &stats.dims(&sizes, &[0.5]), &[&q, &k, &span, &y0, &dy, &y0]);
        let stats0 = f32s(&[m * h, 2], &of_stats[0]);
        let gradient = oracle(backward, &backward.dims(&sizes, &[0.5]), &[&q, &k, &v, &span, &dy, &stats0, &q, &k, &v]);
        // y and stats pass through f32.
        compare("attention dq", &q, &gradient[0], 1e-6, |q| loss(q, &k, &v));
        compare("attention dk", &k, &gradient[1], 1e-6, |k| loss(&q, k, &v));
        compare("attention dv", &v, &gradient[2], 1e-6, |v| loss(&q, &k, v));
    }
}

/// y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ through `lora_shrink` and `qmatmul`; back through `lora_backward`, `lora_backward_a` and
/// `qmatmul_t`, in every format of W. The function is linear in each input, and the grid keeps S and dS exact.
#[test]
fn an_adapted_projection_has_these_gradients() {
    for forward in OPS.iter().filter(|op| op.name == "qmatmul") {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let backward = ops::find("qmatmul_t", forward.format);
        let (m, n, k, r, s, ldy, y0) = (3, 5, 64, 2, 0.5f32, 9, 2);
        let values = |dim: &&str| match *dim {
            "M" => m,
            "N" => n,
            "K" => k,
            "R" => r,
            "LDY" => ldy,
            "Y0" => y0,
            "G" => 32,
            _ => 0,
        };
        let dims = forward.dims(&forward.dims.iter().map(values).collect::<Vec<_>>(), &[s]);
        let back = backward.dims(&backward.dims.iter().map(values).collect::<Vec<_>>(), &[]);
        let weights: Vec<HostTensor> =
            verify::fill(forward, &dims, Dtype::F32, 6).drain(1..forward.args.len() - 4).collect();
        let (x, dy) = (grid(&mut rng, &[m, k]), grid(&mut rng, &[m, ldy]));
        let (a, b) = (grid(&mut rng, &[r, k]), grid(&mut rng, &[n, r]));
        let none = HostTensor::zeros(Dtype::F32, &[0]);

        let shrink = ops::find("lora_shrink", "f32");
        let shrink_dims = shrink.dims(&[m, k, r, r, 0, 0], &[]);
        let ids = [HostTensor::zeros(Dtype::I32, &[0]), HostTensor::zeros(Dtype::U32, &[0, 2])];
        let project = |x: &HostTensor, a: &HostTensor, b: &HostTensor| {
            let low = f32s(&[m, r], &oracle(shrink, &shrink_dims, &[x, a, &ids[0], &ids[1], &none])[0]);
            let mut args = vec![x];
            args.extend(&weights);
            args.extend([&none, &low, b, &dy]);
            (oracle(forward, &dims, &args).remove(0), low)
        };
        let loss = |x: &HostTensor, a: &HostTensor, b: &HostTensor| {
            // The columns of y beside Y0..Y0+N are not written.
            let y: Vec<f64> = project(x, a, b).0.iter().map(|y| if y.is_nan() { 0.0 } else { *y }).collect();
            dot(&y, &dy)
        };

        let low = project(&x, &a, &b).1;
        let (lora, lora_a) = (ops::find("lora_backward", "f32"), ops::find("lora_backward_a", "f32"));
        let of_b = oracle(lora, &lora.dims(&[m, n, r, ldy, y0, 0], &[s]), &[&dy, &b, &low, &low, &b]);
        let ds = f32s(&[m, r], &of_b[0]);
        let of_a = oracle(lora_a, &lora_a.dims(&[m, k, r, 0], &[]), &[&x, &ds, &a]);
        let mut args = vec![&dy];
        args.extend(&weights);
        args.extend([&ds, &a, &x]);
        let dx = oracle(backward, &back, &args);

        let what = |name: &str| format!("{} {name}", forward.id());
        compare(&what("dx"), &x, &dx[0], 1e-9, |x| loss(x, &a, &b));
        compare(&what("dA"), &a, &of_a[0], 1e-9, |a| loss(&x, a, &b));
        compare(&what("dB"), &b, &of_b[1], 1e-9, |b| loss(&x, &a, b));
    }
}

#[test]
fn cross_entropy_is_its_own_derivative() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (m, v, scale) = (5, 33, 0.25);
    let spec = ops::find("cross_entropy", "f32");
    let dims = spec.dims(&[m, v], &[scale]);
    let logits = grid(&mut rng, &[m, v]);
    let labels = HostTensor::from_u32(&[m], &[0, 32, u32::MAX, 7, 33]);
    let none = HostTensor::zeros(Dtype::F32, &[m]);
    let run = |logits: &HostTensor| oracle(spec, &dims, &[logits, &labels, &none]);
    compare("cross_entropy", &logits, &run(&logits)[0], 1e-8, |x| run(x)[1].iter().sum::<f64>() * scale as f64);
    assert_eq!((run(&logits)[1][2], run(&logits)[1][4]), (0.0, 0.0), "labels left out");
}

#[test]
fn dropout_and_gathered_rows_go_back_where_they_came_from() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let (m, k) = (6, 33);
    let (x, dy, none) = (grid(&mut rng, &[m, k]), grid(&mut rng, &[m, k]), HostTensor::zeros(Dtype::F32, &[m, k]));
    let spec = ops::find("dropout", "f32");
    let (drop, scale) = dropout::threshold(0.5);
    let dims = spec.dims(&[m, k, 3, 11, 2, drop, 0], &[scale]);
    let run = |x: &HostTensor| oracle(spec, &dims, &[x, &none]).remove(0);
    compare("dropout", &x, &run(&dy), 1e-10, |x| dot(&run(x), &dy));

    // Rows 4, 0 and 3 are kept; the inverse names each row's place among them, or 3 for none.
    let spec = ops::find("gather_rows", "f32");
    let (keep, inverse) = (HostTensor::from_u32(&[3], &[4, 0, 3]), HostTensor::from_u32(&[m], &[1, 3, 3, 2, 0, 3]));
    let dy = grid(&mut rng, &[3, k]);
    let gather = |x: &HostTensor| oracle(spec, &spec.dims(&[3, k, m], &[]), &[x, &keep, &none]).remove(0);
    let back = oracle(spec, &spec.dims(&[m, k, 3], &[]), &[&dy, &inverse, &none]).remove(0);
    compare("gather_rows", &x, &back, 1e-10, |x| dot(&gather(x), &dy));
}

/// Against PyTorch's documented recurrence, written out for one parameter over ten steps.
#[test]
fn adamw_follows_its_recurrence_and_clips_by_the_global_norm() {
    let settings = adamw::Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.01, max_norm: 1.0 };
    let (spec, norm) = (ops::find("adamw", "f32"), ops::find("squared_norm", "f32"));
    let lr = 1e-2;
    let (mut p, mut m, mut v) = (vec![0.5f64, -2.0, 3.0], vec![0.0; 3], vec![0.0; 3]);
    let mut state = [&p, &m, &v].map(|t| f32s(&[3], t));
    for step in 1..=10 {
        let g: Vec<f64> = (0..3).map(|i| ((step * (i + 2)) as f64).sin() * if step > 5 { 4.0 } else { 0.1 }).collect();
        let g32 = f32s(&[3], &g);
        let none = HostTensor::zeros(Dtype::F32, &[2]);
        let part = f32s(&[2], &oracle(norm, &norm.dims(&[3, 2], &[]), &[&g32, &none])[0]);
        let dims = spec.dims(&[3, 2], &settings.scalars(lr, step as u64));
        let [p32, m32, v32] = &state;
        let next = oracle(spec, &dims, &[&g32, &part, p32, m32, v32]);
        state = [0, 1, 2].map(|i| f32s(&[3], &next[i]));

        let size = g.iter().map(|g| g * g).sum::<f64>().sqrt();
        let clip = (1.0 / (size + 1e-6)).min(1.0);
        for i in 0..3 {
            let g = g[i] * clip;
            p[i] *= 1.0 - lr * 0.01;
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let (hat_m, hat_v) = (m[i] / (1.0 - 0.9f64.powi(step)), v[i] / (1.0 - 0.999f64.powi(step)));
            p[i] -= lr * hat_m / (hat_v.sqrt() + 1e-8);
            let got = state[0].to_f64()[i];
            assert!((got - p[i]).abs() < 1e-5 * lr + 1e-6 * p[i].abs(), "step {step}, parameter {i}: {got}, {}", p[i]);
        }
    }
}

/// The ops of a training step that sum over tokens, rows or keys, on shapes large enough to be divided among threads.
const DIVIDED: &[(&str, &str, &[usize], &[f32])] = &[
    ("lora_shrink", "f32", &[256, 576, 8, 8, 0, 0], &[]),
    ("lora_backward", "f32", &[300, 1536, 8, 1536, 0, 1], &[2.0]),
    ("lora_backward_a", "f32", &[300, 1536, 8, 1], &[]),
    ("qmatmul_t", "q4", &[64, 1536, 576, 1536, 0, 8, 1, 32, 0], &[]),
    ("qmatmul_t", "q8", &[64, 4000, 576, 4000, 0, 0, 0, 32, 0, 0], &[]),
    ("qmatmul_t", "nf4", &[64, 576, 1536, 576, 0, 8, 0], &[]),
    ("rmsnorm_backward", "f32", &[256, 576, 1], &[1e-5]),
    ("rope_backward", "f32", &[256, 9, 64, 256], &[]),
    ("swiglu_backward", "f32", &[256, 1536], &[]),
    ("attention_stats", "f32", &[200, 9, 3, 64, 200], &[0.125]),
    ("attention_backward", "f32", &[200, 9, 3, 64, 200], &[0.125]),
    ("cross_entropy", "f32", &[16, 49152], &[0.01]),
    ("dropout", "f32", &[256, 576, 0, 1, 2, 1 << 30, 1], &[1.5]),
    ("gather_rows", "f32", &[256, 576, 200], &[]),
    ("squared_norm", "f32", &[300_001, 64], &[]),
    ("adamw", "f32", &[300_001, 64], &[1e-3, 0.1, 1e-3, 1e-8, 0.01, 0.5, 0.02, 1.0]),
];

#[test]
fn every_run_gives_the_same_bits_on_any_number_of_threads() {
    let device = Cpu::new();
    for (name, format, sizes, scalars) in DIVIDED {
        let spec = ops::find(name, format);
        let dims = spec.dims(sizes, scalars);
        let tensors = verify::fill(spec, &dims, Dtype::F32, 9);
        for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source)) {
            if !(kernel.supports)(&dims, device.caps()) {
                continue;
            }
            let mut first: Option<Vec<Vec<u8>>> = None;
            for threads in [1, 2, 3, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let outputs = pool.install(|| launch(&device, spec, kernel, &dims, &tensors));
                let first = first.get_or_insert_with(|| outputs.clone());
                assert!(*first == outputs, "{} ({dims}): other bits on {threads} threads", kernel.stem);
            }
        }
    }
}

/// The outputs' bytes.
fn launch(device: &Cpu, spec: &OpSpec, kernel: &'static Kernel, dims: &Dims, tensors: &[HostTensor]) -> Vec<Vec<u8>> {
    let upload = |tensor: &HostTensor| {
        let buffer = device.alloc(tensor.bytes.len()).unwrap();
        device.write(&buffer, 0, tensor.bytes.as_slice()).unwrap();
        buffer
    };
    let buffers: Vec<Buffer> = tensors.iter().map(upload).collect();
    device.launch(spec, kernel, &buffers.iter().collect::<Vec<_>>(), dims).unwrap();
    let outputs = spec.args.iter().zip(&buffers).filter(|(arg, _)| arg.role != Role::In);
    let read = |buffer: &Buffer| {
        let mut bytes = vec![0; buffer.bytes()];
        device.read(buffer, 0, &mut bytes).unwrap();
        bytes
    };
    outputs.map(|(_, buffer)| read(buffer)).collect()
}
