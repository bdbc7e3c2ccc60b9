//! Gradients of tiny decoders against differences of f64 losses, and passes against each other.

use super::reference::{decoder, Shape, Weights};
use super::tiny_models::{self as tiny, Blocks, LLAMA};
use handmill::device::cpu::Cpu;
use handmill::model::adapter::{weight_name, Adapter, LoraConfig, Module, TARGETS};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::llama::Llama;
use handmill::model::weights::LoadOptions;
use handmill::quant::Format;
use handmill::tensor::Dtype;
use handmill::train::backward::{Dropout, Passes};
use handmill::train::batch::Batch;
use handmill::train::parameters::{self, Parameters};
use handmill::verify::normal;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use std::sync::Arc;

/// Two documents and their labels; -100 is not predicted.
pub fn documents() -> Vec<(Vec<u32>, Vec<i32>)> {
    let first = [1, 99, 0, 42, 7, 7, 63, 12, 5, 88, 31, 2, 77];
    let second = [9, 14, 60, 3, 3, 71, 20];
    let labels = |ids: &[u32], masked: usize| {
        ids.iter().enumerate().map(|(i, &id)| if i < masked { -100 } else { id as i32 }).collect::<Vec<_>>()
    };
    vec![(first.to_vec(), labels(&first, 4)), (second.to_vec(), labels(&second, 0))]
}

/// Documents side by side.
pub fn batch(documents: &[(Vec<u32>, Vec<i32>)]) -> Batch {
    let mut batch = Batch::default();
    documents.iter().for_each(|(ids, labels)| batch.push(ids, labels));
    batch
}

/// An adapter of rank 4 with both factors other than zero.
pub fn adapter(llama: &Llama, targets: &[&str], seed: u64) -> Adapter {
    let targets: Vec<&'static str> = TARGETS.iter().map(|t| t.0).filter(|t| targets.contains(t)).collect();
    let config = LoraConfig { r: 4, alpha: 6.0, rslora: true, dropout: 0.0, targets, base: None };
    let mut adapter = parameters::fresh(&llama.config, config, seed);
    let mut rng = ChaCha8Rng::seed_from_u64(seed + 1);
    for value in adapter.modules.iter_mut().flat_map(|module| &mut module.b) {
        *value = 0.1 * normal(&mut rng) as f32;
    }
    adapter
}

fn load(path: &Path, options: &LoadOptions) -> Llama {
    Llama::load(Arc::new(Cpu::new()), &Checkpoint::open(path).unwrap(), options).unwrap()
}

/// The sum of the losses in f64, of documents one by one, the adapter added into the weights.
fn loss(shape: &Shape, weights: &Weights, adapter: &Adapter) -> f64 {
    let mut merged = weights.clone();
    let (r, scale) = (adapter.config.r, f64::from(adapter.config.scale()));
    for Module { layer, target, n, k, a, b } in &adapter.modules {
        let values = &mut merged.get_mut(&weight_name(*layer, target)).unwrap().1;
        for i in 0..*n {
            for j in 0..*k {
                let sum: f64 = (0..r).map(|l| f64::from(b[i * r + l]) * f64::from(a[l * k + j])).sum();
                values[i * k + j] = (f64::from(values[i * k + j]) + scale * sum) as f32;
            }
        }
    }
    let mut total = 0.0;
    for (ids, labels) in documents() {
        let (_, logits) = decoder(shape, &merged, &ids);
        for (row, &label) in logits.chunks(shape.vocab).zip(&labels[1..]).filter(|(_, &label)| label >= 0) {
            total += row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[label as usize];
        }
    }
    total
}

/// Holds loss and gradients against f64: along each factor's own gradient, where the slope is its norm, and along a
/// direction drawn at random.
fn check(path: &Path, shape: &Shape, weights: &Weights, options: &LoadOptions, targets: &[&str]) {
    let mut llama = load(path, options);
    let start = adapter(&llama, targets, 5);
    let parameters = Parameters::new(&mut llama, &start).unwrap();
    let mut passes = Passes::new(&llama, &parameters, 20, 13, 1, false).unwrap();
    let got = passes.gradients(&llama, &parameters, &batch(&documents()), 1.0, None, false).unwrap();
    let expected = loss(shape, weights, &start);
    // As for logits of tiny decoders: 1e-5 of the largest value.
    assert!((got - expected).abs() < 1e-5 * expected, "loss {got}, in f64 {expected}");

    let gradients = parameters.adapter(&parameters.gradients, None).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    for (m, module) in gradients.modules.iter().enumerate() {
        for half in 0..2 {
            let gradient = if half == 0 { &module.a } else { &module.b };
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let along: Vec<f64> = gradient.iter().map(|&g| f64::from(g) / norm).collect();
            let random: Vec<f64> = gradient.iter().map(|_| normal(&mut rng) / (gradient.len() as f64).sqrt()).collect();
            for direction in [along, random] {
                // Merged weights are rounded to f32, which moves the loss by some 1e-7: over a distance of 2e-2 a
                // slope by 1e-5. The third derivative adds about as much; a thousandth of the norm is far above both.
                let h = 1e-2;
                let moved = |sign: f64| {
                    let mut moved = start.clone();
                    let values = &mut moved.modules[m];
                    let values = if half == 0 { &mut values.a } else { &mut values.b };
                    values.iter_mut().zip(&direction).for_each(|(v, d)| *v += (sign * h * d) as f32);
                    loss(shape, weights, &moved)
                };
                let slope = (moved(1.0) - moved(-1.0)) / (2.0 * h);
                let expected: f64 = gradient.iter().zip(&direction).map(|(&g, d)| f64::from(g) * d).sum();
                let what = ["A", "B"][half];
                assert!(
                    (slope - expected).abs() < 2e-3 * norm.max(0.05),
                    "{} {what} of {} in layer {}: slope {slope}, gradient {expected}, norm {norm}",
                    shape.arch,
                    module.target,
                    module.layer
                );
            }
        }
    }
}

/// Every projection.
pub const ALL: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

#[test]
fn gradients_of_every_architecture() {
    let biased = Shape { bias: true, ..LLAMA };
    for shape in [LLAMA, biased, tiny::qwen2(), tiny::qwen3()] {
        let dir = tempfile::tempdir().unwrap();
        let weights = tiny::random(&shape, 1);
        tiny::write_hf(dir.path(), &shape, &weights, Dtype::F32);
        check(dir.path(), &shape, &weights, &LoadOptions::default(), &ALL);
    }
}

#[test]
fn gradients_of_some_projections() {
    let dir = tempfile::tempdir().unwrap();
    let weights = tiny::random(&LLAMA, 2);
    tiny::write_hf(dir.path(), &LLAMA, &weights, Dtype::BF16);
    let weights = tiny::rounded(weights, Dtype::BF16);
    tiny::write_hf(dir.path(), &LLAMA, &weights, Dtype::BF16);
    check(dir.path(), &LLAMA, &weights, &LoadOptions::default(), &["q_proj", "v_proj"]);
    check(dir.path(), &LLAMA, &weights, &LoadOptions::default(), &["down_proj"]);
}

#[test]
fn gradients_through_quantized_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let weights = tiny::random(&LLAMA, 3);
    // The blocks of a GGUF file as they are: q and k in its own order of rows.
    let held = tiny::write_gguf(&path, &LLAMA, &weights, Blocks::Q4);
    check(&path, &LLAMA, &held, &LoadOptions::default(), &ALL);
    tiny::write_hf(dir.path(), &LLAMA, &weights, Dtype::F32);
    for format in [Format::Nf4, Format::Nf4Dq, Format::parse("q8").unwrap(), Format::parse("q4").unwrap()] {
        let options = LoadOptions { quant: Some(format), ..LoadOptions::default() };
        check(dir.path(), &LLAMA, &tiny::through(&weights, format), &options, &["q_proj", "up_proj"]);
    }
}

/// The gradients of a pass, bit by bit.
fn bits(kept: usize, batches: &[Batch], dropout: Option<Dropout>) -> (f64, Vec<f32>) {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { layers: 5, ..LLAMA };
    tiny::write_hf(dir.path(), &shape, &tiny::random(&shape, 4), Dtype::F32);
    let mut llama = load(dir.path(), &LoadOptions::default());
    let start = adapter(&llama, &ALL, 6);
    let parameters = Parameters::new(&mut llama, &start).unwrap();
    let mut passes = Passes::new(&llama, &parameters, 20, 13, kept, dropout.is_some()).unwrap();
    let (mut loss, mut row0) = (0.0, 0);
    for (i, batch) in batches.iter().enumerate() {
        let dropout = dropout.map(|dropout| Dropout { row0, ..dropout });
        loss += passes.gradients(&llama, &parameters, batch, 0.125, dropout, i > 0).unwrap();
        row0 += batch.len();
    }
    (loss, parameters.read(&parameters.gradients).unwrap())
}

#[test]
fn what_is_computed_twice_is_the_same() {
    let together = [batch(&documents())];
    for dropout in [None, Some(Dropout { p: 0.25, seed: 3, step: 2, row0: 0 })] {
        let expected = bits(5, &together, dropout);
        assert!(expected.1.iter().any(|&g| g != 0.0));
        for kept in [1, 2, 4] {
            assert_eq!(bits(kept, &together, dropout), expected, "{kept} layers kept");
        }
    }
}

#[test]
fn packed_documents_count_as_if_alone() {
    // Sums are cut elsewhere, so rounding differs: 1e-5 of the largest gradient.
    let close = |a: &(f64, Vec<f32>), b: &(f64, Vec<f32>)| {
        let largest = a.1.iter().fold(0f32, |max, g| max.max(g.abs()));
        (a.0 - b.0).abs() < 1e-5 * a.0 && a.1.iter().zip(&b.1).all(|(a, b)| (a - b).abs() < 1e-5 * largest)
    };
    let apart: Vec<Batch> = documents().iter().map(|document| batch(std::slice::from_ref(document))).collect();
    for dropout in [None, Some(Dropout { p: 0.25, seed: 3, step: 2, row0: 0 })] {
        let together = bits(1, &[batch(&documents())], dropout);
        assert!(close(&together, &bits(1, &apart, dropout)), "dropout {dropout:?}");
    }
    let other = Some(Dropout { p: 0.25, seed: 3, step: 3, row0: 0 });
    let before = Some(Dropout { p: 0.25, seed: 3, step: 2, row0: 0 });
    assert!(!close(&bits(1, &apart, other), &bits(1, &apart, before)), "another step has other masks");
}

#[test]
fn dropout_keeps_the_gradient_on_average() {
    // With masks of many steps the mean gradient comes near that without: its error falls with their number, and the
    // gradient of a loss that curves stays a little off it.
    let together = [batch(&documents())];
    let expected = bits(1, &together, None).1;
    let mut mean = vec![0f64; expected.len()];
    let steps = 64;
    for step in 0..steps {
        let found = bits(1, &together, Some(Dropout { p: 0.1, seed: 9, step, row0: 0 })).1;
        mean.iter_mut().zip(&found).for_each(|(mean, &g)| *mean += f64::from(g) / f64::from(steps));
    }
    let dot: f64 = mean.iter().zip(&expected).map(|(a, &b)| a * f64::from(b)).sum();
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let cosine = dot / norm(&mut mean.iter().copied()) / norm(&mut expected.iter().map(|&v| f64::from(v)));
    assert!(cosine > 0.95, "cosine {cosine}");
}
