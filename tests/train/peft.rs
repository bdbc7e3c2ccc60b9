//! Loss, gradients and twenty steps against PEFT over transformers in f32, on SmolLM2-135M. The reference started
//! from an adapter drawn by PyTorch's generator, which is drawn here again.

use super::{fixture, smollm2};
use handmill::device::cpu::Cpu;
use handmill::device::Device;
use handmill::model::adapter::{shape_of, Adapter, LoraConfig, Module, TARGETS};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::config::Config;
use handmill::model::hf::Shard;
use handmill::model::llama::Llama;
use handmill::model::weights::LoadOptions;
use handmill::ops::adamw::Settings;
use handmill::train::backward::Passes;
use handmill::train::batch::Batch;
use handmill::train::optimizer::Optimizer;
use handmill::train::parameters::Parameters;
use serde_json::Value;
use std::sync::Arc;

/// PyTorch's generator on a CPU: MT19937.
struct Twister {
    state: [u32; 624],
    at: usize,
}

impl Twister {
    fn new(seed: u32) -> Twister {
        let mut state = [seed; 624];
        for i in 1..624 {
            let before = state[i - 1];
            state[i] = (before ^ (before >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Twister { state, at: 624 }
    }

    fn next(&mut self) -> u32 {
        if self.at == 624 {
            for i in 0..624 {
                let y = self.state[i] & 0x8000_0000 | self.state[(i + 1) % 624] & 0x7fff_ffff;
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ (y >> 1) ^ twist;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `tensor.normal_(0, std)` of a multiple of 16 elements: Box and Muller's transform of 8 pairs at a time.
    fn normal(&mut self, count: usize, std: f64) -> Vec<f32> {
        assert_eq!(count % 16, 0);
        let mut values = Vec::with_capacity(count);
        for _ in 0..count / 16 {
            let uniform: [f64; 16] = std::array::from_fn(|_| f64::from(self.next() & 0xff_ffff) / f64::from(1 << 24));
            let polar = |i: usize| ((-2.0 * (1.0 - uniform[i]).ln()).sqrt(), std::f64::consts::TAU * uniform[i + 8]);
            values.extend((0..8).map(polar).map(|(radius, angle)| (std * radius * angle.cos()) as f32));
            values.extend((0..8).map(polar).map(|(radius, angle)| (std * radius * angle.sin()) as f32));
        }
        values
    }
}

/// The adapter that the reference began with: A of standard deviation 1/sqrt(in), B of 0.01, module by module.
pub fn initial(base: &Config) -> Adapter {
    let mut generator = Twister::new(1234);
    let targets: Vec<&'static str> = TARGETS.iter().map(|target| target.0).collect();
    let mut modules = Vec::new();
    for layer in 0..base.layers {
        for &target in &targets {
            let [n, k] = shape_of(base, target);
            let a = generator.normal(8 * k, 1.0 / (k as f64).sqrt());
            modules.push(Module { layer, target, n, k, a, b: generator.normal(8 * n, 0.01) });
        }
    }
    let config = LoraConfig { r: 8, alpha: 16.0, rslora: false, dropout: 0.0, targets, base: None };
    Adapter { config, modules, base_sha256: None }
}

fn reference() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("lora_peft_fp32.json")).unwrap()).unwrap()
}

/// Window k of the text: 256 tokens, the first 32 not predicted.
fn window(k: usize) -> Batch {
    part(256 * k, 256, 32)
}

/// `count` tokens of the text from token `first` on, of which the first `masked` are not predicted.
pub fn part(first: usize, count: usize, masked: usize) -> Batch {
    let shard = Shard::open(&fixture("smollm2_transformers_fp32.safetensors")).unwrap();
    let stored = shard.tensors.iter().find(|tensor| tensor.name == "ppl.ids").unwrap();
    let bytes = &shard.mmap[stored.offset..stored.offset + stored.len];
    let all: Vec<i32> = bytes.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
    let ids = &all[first..][..count];
    let labels: Vec<i32> = ids.iter().enumerate().map(|(i, &id)| if i < masked { -100 } else { id }).collect();
    let mut batch = Batch::default();
    batch.push(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>(), &labels);
    batch
}

fn open(kept: usize) -> (Llama, Parameters, Passes) {
    let device: Arc<dyn Device> = Arc::new(Cpu::new());
    let checkpoint = Checkpoint::open(&smollm2()).unwrap();
    let mut llama = Llama::load(device, &checkpoint, &LoadOptions::default()).unwrap();
    let parameters = Parameters::new(&mut llama, &initial(&checkpoint.config)).unwrap();
    let passes = Passes::new(&llama, &parameters, 256, 256, kept, false).unwrap();
    (llama, parameters, passes)
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
}

#[test]
fn loss_and_gradients_are_those_of_peft() {
    let reference = reference();
    let (llama, parameters, mut passes) = open(1);
    let batch = window(0);
    let count = batch.predicted() as f64;
    let scale = (1.0 / count) as f32;
    let loss = passes.gradients(&llama, &parameters, &batch, scale, None, false).unwrap() / count;
    // Both sides sum in f32; the mean of 224 losses of 4 nats moves by less than a part in 1e5.
    let expected = reference["loss0"].as_f64().unwrap();
    assert!((loss - expected).abs() < 5e-5, "loss {loss}, PEFT has {expected}");

    let gradients = parameters.adapter(&parameters.gradients, None).unwrap();
    let full = Shard::open(&fixture("lora_peft_fp32_grads.safetensors")).unwrap();
    let (mut norms, mut compared) = (0, 0);
    for module in &gradients.modules {
        let part = TARGETS.iter().find(|row| row.0 == module.target).unwrap().1;
        let stem = format!("base_model.model.model.layers.{}.{part}.{}", module.layer, module.target);
        for (half, got) in [("lora_A", &module.a), ("lora_B", &module.b)] {
            // 30 layers of f32 in another order: a thousandth is a hundred times what both sides' roundings make.
            let name = format!("{stem}.{half}.default.weight");
            let expected = reference["grad_norms"][&name].as_f64().unwrap();
            let error = (norm(got) - expected).abs() / expected;
            assert!(error < 1e-3, "{name}: norm {}, PEFT has {expected}", norm(got));
            norms += 1;
            let Some(stored) =
                full.tensors.iter().find(|tensor| tensor.name.starts_with(&format!("grad.{stem}.{half}")))
            else {
                continue;
            };
            let bytes = &full.mmap[stored.offset..stored.offset + stored.len];
            let expected: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let difference: Vec<f32> = got.iter().zip(&expected).map(|(got, expected)| got - expected).collect();
            let error = norm(&difference) / norm(&expected);
            assert!(error < 1e-3, "{}: off by {error:e} of its norm", stored.name);
            compared += 1;
        }
    }
    assert_eq!((norms, compared), (420, 6));
    let total = norm(&parameters.read(&parameters.gradients).unwrap());
    let expected = reference["grad_norm_total"].as_f64().unwrap();
    assert!((total - expected).abs() < 1e-3 * expected, "{total}, PEFT has {expected}");
}

#[test]
fn twenty_steps_follow_peft() {
    let reference = reference();
    let (llama, parameters, mut passes) = open(30);
    let settings = Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.01, max_norm: 0.0 };
    let optimizer = Optimizer::new(llama.device.clone(), settings, parameters.len).unwrap();
    let windows: Vec<Batch> = (0..4).map(window).collect();
    for (step, expected) in reference["loss_curve"].as_array().unwrap().iter().enumerate() {
        let (batch, expected) = (&windows[step % 4], expected.as_f64().unwrap());
        let count = batch.predicted() as f64;
        let scale = (1.0 / count) as f32;
        let loss = passes.gradients(&llama, &parameters, batch, scale, None, false).unwrap() / count;
        // AdamW divides a gradient by its own size, so small ones of uncertain sign move parameters by as much as large
        // ones do: differences grow from step to step.
        assert!((loss - expected).abs() < 5e-3, "step {step}: loss {loss}, PEFT has {expected}");
        optimizer.step(&parameters, 1e-3, step as u64 + 1).unwrap();
    }
}
