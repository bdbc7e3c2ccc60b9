//! What training changes: the factors of every module, their gradients and the optimizer's means, each in one buffer on
//! the device, so that a norm, a step or a copy is one launch.
//!
//! ```text
//! A of module 0 | pad | B of module 0 | pad | A of module 1 | ..        f32, each beginning where a view may
//! ```
//!
//! Padding is zero, has zero gradients, and so stays zero.

use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::device::{Buffer, Device};
use crate::error::Error;
use crate::model::adapter::{shape_of, Adapter, LoraConfig, Module, TARGETS};
use crate::model::config::Config;
use crate::model::linear::Lora;
use crate::model::llama::Llama;

/// One module's places in the buffers.
#[derive(Clone)]
pub struct Place {
    /// Layer.
    pub layer: usize,
    /// Index in [`TARGETS`].
    pub target: usize,
    /// Out features.
    pub n: usize,
    /// In features.
    pub k: usize,
    /// First float of A.
    a: usize,
    /// First float of B.
    b: usize,
}

/// The buffers, all of `len` floats.
pub struct Parameters {
    /// What the adapter is.
    pub config: LoraConfig,
    /// Its modules, by layer and in the order of [`TARGETS`].
    pub places: Vec<Place>,
    /// Floats of each buffer, padding included.
    pub len: usize,
    /// The factors.
    pub values: Buffer,
    /// Their gradients.
    pub gradients: Buffer,
    /// Means of the gradients.
    pub mean: Buffer,
    /// Means of their squares.
    pub square: Buffer,
    device: Arc<dyn Device>,
}

/// A new adapter for a model: A uniform within ±1/sqrt(k), which is PEFT's Kaiming initialization with a = sqrt(5),
/// and B zero, so that it changes nothing yet. The same seed gives the same adapter.
pub fn fresh(base: &Config, config: LoraConfig, seed: u64) -> Adapter {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut modules = Vec::new();
    for layer in 0..base.layers {
        for &target in &config.targets {
            let [n, k] = shape_of(base, target);
            let bound = 1.0 / (k as f32).sqrt();
            let a = (0..config.r * k).map(|_| rng.random_range(-bound..bound)).collect();
            modules.push(Module { layer, target, n, k, a, b: vec![0.0; n * config.r] });
        }
    }
    Adapter { config, modules, base_sha256: None }
}

impl Parameters {
    /// Brings an adapter to the model's device and puts it beside its weights, there to be changed in place.
    pub fn new(llama: &mut Llama, adapter: &Adapter) -> Result<Parameters, Error> {
        adapter.check(&llama.config)?;
        llama.detach();
        let device = llama.device.clone();
        let unit = device.caps().view_alignment.div_ceil(4).max(1);
        let (r, scale) = (adapter.config.r, adapter.config.scale());
        let mut len = 0;
        let mut take = |count: usize| {
            let at = len;
            len = (at + count).next_multiple_of(unit);
            at
        };
        let mut places = Vec::with_capacity(adapter.modules.len());
        for Module { layer, target, n, k, .. } in &adapter.modules {
            let target = TARGETS.iter().position(|row| row.0 == *target).expect("modules name known projections");
            places.push(Place { layer: *layer, target, n: *n, k: *k, a: take(r * k), b: take(n * r) });
        }
        let zeros = vec![0u8; 4 * len];
        let buffer = || {
            let buffer = device.alloc(4 * len)?;
            device.write(&buffer, 0, &zeros)?;
            Ok::<_, Error>(buffer)
        };
        let parameters = Parameters {
            config: adapter.config.clone(),
            len,
            values: buffer()?,
            gradients: buffer()?,
            mean: buffer()?,
            square: buffer()?,
            places,
            device: device.clone(),
        };
        for (place, module) in parameters.places.iter().zip(&adapter.modules) {
            device.write(&parameters.values, 4 * place.a, bytemuck::cast_slice(&module.a))?;
            device.write(&parameters.values, 4 * place.b, bytemuck::cast_slice(&module.b))?;
            let linear = llama.layers[place.layer].projection_mut(TARGETS[place.target].0);
            let mut cut = Vec::with_capacity(linear.matrix.shards.len());
            for shard in &linear.matrix.shards {
                let start = 4 * (place.b + shard.y0 * r);
                if !start.is_multiple_of(device.caps().view_alignment) {
                    return Err(Error::Request(format!(
                        "rank {r} puts rows of an adapter where device {} cannot begin a view: take a rank that is a \
                         multiple of {unit}",
                        device.id()
                    )));
                }
                cut.push(parameters.values.view(start, 4 * shard.n * r));
            }
            let a = parameters.values.view(4 * place.a, 4 * r * place.k);
            linear.lora = Some(Lora { r, scale, a, b: cut });
        }
        llama.set_lora_rank(r);
        Ok(parameters)
    }

    /// A of a module in one of the buffers.
    pub fn a(&self, of: &Buffer, place: &Place) -> Buffer {
        of.view(4 * place.a, 4 * self.config.r * place.k)
    }

    /// B of a module in one of the buffers.
    pub fn b(&self, of: &Buffer, place: &Place) -> Buffer {
        of.view(4 * place.b, 4 * self.config.r * place.n)
    }

    /// A buffer's floats, padding included.
    pub fn read(&self, of: &Buffer) -> Result<Vec<f32>, Error> {
        let mut host = vec![0.0; self.len];
        self.device.read(of, 0, bytemuck::cast_slice_mut(&mut host))?;
        Ok(host)
    }

    /// The modules of a buffer as an adapter: of the values, or of their gradients.
    pub fn adapter(&self, of: &Buffer, base_sha256: Option<String>) -> Result<Adapter, Error> {
        let host = self.read(of)?;
        let r = self.config.r;
        let module = |place: &Place| Module {
            layer: place.layer,
            target: TARGETS[place.target].0,
            n: place.n,
            k: place.k,
            a: host[place.a..place.a + r * place.k].to_vec(),
            b: host[place.b..place.b + r * place.n].to_vec(),
        };
        let modules = self.places.iter().map(module).collect();
        Ok(Adapter { config: self.config.clone(), modules, base_sha256 })
    }

    /// Numbers that training changes.
    pub fn count(&self) -> usize {
        self.places.iter().map(|place| self.config.r * (place.n + place.k)).sum()
    }
}
