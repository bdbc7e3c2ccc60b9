//! The gradients of one step on every device that needs no hardware, against the CPU's.

use super::peft;
use super::reference::Shape;
use super::tiny::{adapter, batch, documents, ALL};
use super::tiny_models::{self as tiny, Blocks, LLAMA};
use super::{has_adapter, smollm2};
use handmill::device::profile::Profiled;
use handmill::device::{self, Device};
use handmill::model::adapter::Adapter;
use handmill::model::checkpoint::Checkpoint;
use handmill::model::llama::Llama;
use handmill::model::weights::LoadOptions;
use handmill::quant::Format;
use handmill::tensor::Dtype;
use handmill::train::backward::{Dropout, Passes};
use handmill::train::parameters::Parameters;
use std::path::Path;
use std::sync::Arc;

/// A model and how it is loaded.
struct Model<'a> {
    path: &'a Path,
    quant: Option<Format>,
}

/// The loss and the gradients of a batch, added up over two passes of it, the second with other masks.
fn gradients(model: &Model<'_>, device: &str, dropout: bool) -> (f64, Vec<f32>) {
    let options = LoadOptions { quant: model.quant, ..LoadOptions::default() };
    gradients_on(model, device::open(device).unwrap(), &options, dropout)
}

fn gradients_on(model: &Model<'_>, device: Arc<dyn Device>, options: &LoadOptions, dropout: bool) -> (f64, Vec<f32>) {
    let mut llama = Llama::load(device, &Checkpoint::open(model.path).unwrap(), options).unwrap();
    let start = adapter(&llama, &ALL, 5);
    let parameters = Parameters::new(&mut llama, &start).unwrap();
    let mut passes = Passes::new(&llama, &parameters, 20, 13, 1, dropout).unwrap();
    let mut loss = 0.0;
    for pass in 0..2 {
        let dropout = dropout.then_some(Dropout { p: 0.25, seed: 3, step: 2, row0: 20 * pass });
        loss += passes.gradients(&llama, &parameters, &batch(&documents()), 0.05, dropout, pass > 0).unwrap();
    }
    // Padding between the modules is left out.
    let gradients = parameters.adapter(&parameters.gradients, None).unwrap();
    (loss, gradients.modules.into_iter().flat_map(|module| [module.a, module.b]).flatten().collect())
}

fn check(model: &Model<'_>, device: &str, dropout: bool) {
    let (loss, on_cpu) = gradients(model, "cpu", dropout);
    let (got_loss, got) = gradients(model, device, dropout);
    let what = format!("{device}, {:?}, dropout {dropout}", model.quant);
    assert!((got_loss - loss).abs() < 2e-5 * loss, "{what}: loss {got_loss}, {loss} on the CPU");
    // An op of these sizes errs by some sqrt(128) + 8 roundings of 6e-8: 1.2e-6 of its result. A gradient has some 60 of
    // them behind it, independent of each other: 1e-5, and so for either device.
    let largest = on_cpu.iter().fold(0f32, |max, g| max.max(g.abs()));
    let worst = got.iter().zip(&on_cpu).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(got.iter().all(|g| g.is_finite()) && largest > 0.0, "{what}: largest {largest}");
    assert!(worst < 2e-5 * largest, "{what}: off by {worst:e}, the largest is {largest:e}");
    println!("{what}: off by {:e} of the largest", worst / largest);
    assert_eq!(gradients(model, device, dropout), (got_loss, got), "{what}: not the same bits again");
}

/// A plain model with and without dropout, GGUF blocks, and what a run quantizes.
fn check_all(device: &str) {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { bias: true, ..LLAMA };
    let weights = tiny::random(&shape, 11);
    tiny::write_hf(dir.path(), &shape, &weights, Dtype::BF16);
    for dropout in [false, true] {
        check(&Model { path: dir.path(), quant: None }, device, dropout);
    }
    for format in [Format::Nf4, Format::Nf4Dq, Format::parse("q8").unwrap()] {
        check(&Model { path: dir.path(), quant: Some(format) }, device, false);
    }
    let path = dir.path().join("tiny.gguf");
    tiny::write_gguf(&path, &LLAMA, &tiny::random(&LLAMA, 12), Blocks::Q4);
    check(&Model { path: &path, quant: None }, device, false);
}

#[test]
fn gradients_on_an_adapter_are_those_of_the_cpu() {
    if has_adapter() {
        check_all("wgpu");
    }
}

#[test]
fn gradients_in_ptx_are_those_of_the_cpu() {
    check_all("ptx-sim");
}

#[test]
fn plain_weights_meet_bf16_on_tensor_cores() {
    let dir = tempfile::tempdir().unwrap();
    // Rows of the head's dy begin at multiples of 16 bytes.
    let shape = Shape { vocab: 104, ..LLAMA };
    for (dtype, word) in [(Dtype::BF16, "bf16"), (Dtype::F16, "f16")] {
        tiny::write_hf(dir.path(), &shape, &tiny::random(&shape, 13), dtype);
        let model = Model { path: dir.path(), quant: None };
        let [(exact_loss, exact), (loss, rounded)] = [false, true].map(|bf16| {
            let device = Arc::new(Profiled::new(device::open("ptx-sim").unwrap()));
            let options = LoadOptions { bf16, ..LoadOptions::default() };
            let found = gradients_on(&model, device.clone(), &options, false);
            // 20 tokens, of which 13 are predicted: the layers have more rows than `splitk` takes, the head has fewer.
            let mut kernels: Vec<String> = device.take().into_iter().map(|(stem, _)| stem).collect();
            kernels.retain(|stem| stem.starts_with("qmatmul"));
            kernels.sort();
            let expected = match bf16 {
                false => ["qmatmul_@_warp", "qmatmul_t_@_tiled"].as_slice(),
                true => &["qmatmul_@_mma", "qmatmul_@_splitk", "qmatmul_t_@_mma"],
            };
            assert_eq!(kernels, expected.iter().map(|stem| stem.replace('@', word)).collect::<Vec<_>>());
            found
        });
        // x and dy are off by 0.8·2^-9 of themselves in the mean square, weights of f16 by as much: independently, so
        // that a sum errs by sqrt(2)·0.8·2^-9 = 2.2e-3 of its usual size at most. A gradient has some 30 such products
        // behind it: 1.2e-2 of its norm, and the loss, a mean of 13 logarithms, less. Rounding must also be seen, or it
        // was not done.
        let apart = apart(&rounded, &exact);
        println!("{word}: loss off by {:e}, gradients by {apart:e} of their norm", loss / exact_loss - 1.0);
        assert!((1e-4..1.2e-2).contains(&apart), "{word}: gradients are off by {apart:e} of their norm");
        assert!((loss / exact_loss - 1.0).abs() < 1.2e-2, "{word}: loss {loss}, {exact_loss} with x in f32");
    }
}

/// Layers of SmolLM2-135M, tokens of a text and those of them that are predicted: few, as the executor takes a third of
/// a second for the head of each.
const LAYERS: usize = 2;
const TOKENS: usize = 24;
const PREDICTED: usize = 3;

/// Loss and gradients of the first layers of SmolLM2-135M with the adapter that PEFT's reference began with.
fn of_smollm2(device: &str) -> (f64, Adapter) {
    let options = LoadOptions { layers: Some(LAYERS), ..LoadOptions::default() };
    let device = device::open(device).unwrap();
    let mut llama = Llama::load(device, &Checkpoint::open(&smollm2()).unwrap(), &options).unwrap();
    let start = peft::initial(&llama.config);
    let parameters = Parameters::new(&mut llama, &start).unwrap();
    let mut passes = Passes::new(&llama, &parameters, TOKENS, TOKENS, LAYERS, false).unwrap();
    let batch = peft::part(0, TOKENS, TOKENS - PREDICTED);
    let loss = passes.gradients(&llama, &parameters, &batch, 1.0 / PREDICTED as f32, None, false).unwrap();
    (loss / PREDICTED as f64, parameters.adapter(&parameters.gradients, None).unwrap())
}

/// The norm of the difference as a share of the norm.
fn apart(got: &[f32], expected: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut expected.iter().map(|&v| f64::from(v)))
}

/// PEFT's fixture is held against the CPU over all layers; here other devices are held against the CPU over two.
fn check_smollm2(device: &str) {
    let (loss, on_cpu) = of_smollm2("cpu");
    let (got_loss, got) = of_smollm2(device);
    // A product of K numbers errs by some sqrt(K) + 8 roundings of 6e-8: with 1536 by 2.8e-6 of its result. The loss has
    // 30 such results behind it and a gradient 60, independent of each other: 2.2e-5, on either device: 3.1e-5.
    let bound = 3.1e-5;
    assert!((got_loss - loss).abs() < bound * loss, "{device}: loss {got_loss}, {loss} on the CPU");
    assert_eq!((got.modules.len(), on_cpu.modules.len()), (7 * LAYERS, 7 * LAYERS));
    let mut worst = (0.0, String::new());
    for (module, expected) in got.modules.iter().zip(&on_cpu.modules) {
        for (half, got, expected) in [("A", &module.a, &expected.a), ("B", &module.b, &expected.b)] {
            let what = format!("layer {}, {half} of {}", module.layer, module.target);
            let apart = apart(got, expected);
            assert!(apart < bound, "{device}: {what}: off by {apart:e} of its norm");
            if apart > worst.0 {
                worst = (apart, what);
            }
        }
    }
    println!("{device}: loss off by {:e}, gradients by {:e} at most, {}", got_loss - loss, worst.0, worst.1);
}

#[test]
fn gradients_of_smollm2_on_an_adapter_are_those_of_the_cpu() {
    if has_adapter() {
        check_smollm2("wgpu");
    }
}

#[test]
fn gradients_of_smollm2_in_ptx_are_those_of_the_cpu() {
    check_smollm2("ptx-sim");
}
