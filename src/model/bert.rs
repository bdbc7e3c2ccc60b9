//! The encoder: BERT, as MiniLM and other sentence embedders use it, written once over [`Device`].
//!
//! ```text
//! x = layernorm(word[ids] + type[0] + position[0..])
//! for each layer:
//!     q, k, v = x·Wqᵀ + bq, x·Wkᵀ + bk, x·Wvᵀ + bv
//!     x = layernorm(x + attention(q, k, v)·Woᵀ + bo)        every token sees its whole sentence, and no other
//!     x = layernorm(x + gelu(x·Wiᵀ + bi)·Wdᵀ + bd)
//! y = unit(mean of x over each sentence)
//! ```
//!
//! Sentences lie one after another without padding: row m belongs to the sentence whose span holds it.

use std::sync::{Arc, Mutex};

use super::checkpoint::Checkpoint;
use super::config::{Arch, Config};
use super::linear::{Embedding, Linear};
use super::weights::{LoadOptions, Loader};
use crate::device::{self, Buffer, Device};
use crate::error::Error;
use crate::op::OpSpec;
use crate::ops;

/// An encoder on a device.
pub struct Bert {
    /// Sizes and constants.
    pub config: Config,
    /// Where it lives.
    pub device: Arc<dyn Device>,
    word: Embedding,
    position: Embedding,
    token_type: Embedding,
    norm: Norm,
    layers: Vec<Layer>,
    ops: Ops,
    /// Held by the call that runs; grows to the largest batch seen.
    work: Mutex<Option<Workspace>>,
}

/// Gain and bias of a layer norm, `f32[hidden]`.
struct Norm(Buffer, Buffer);

struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    output_norm: Norm,
}

struct Ops {
    add: &'static OpSpec,
    layernorm: &'static OpSpec,
    attention: &'static OpSpec,
    gelu: &'static OpSpec,
    mean_pool: &'static OpSpec,
}

/// The buffers of a batch of up to `tokens` tokens in up to `sentences` sentences.
struct Workspace {
    tokens: usize,
    sentences: usize,
    /// u32[tokens].
    ids: Buffer,
    /// u32[tokens], counted from each sentence's begin.
    positions: Buffer,
    /// u32[tokens], all 0.
    types: Buffer,
    /// u32[tokens, 2].
    spans: Buffer,
    /// u32[sentences, 2].
    sentence_spans: Buffer,
    /// f32[tokens, hidden] each.
    x: Buffer,
    sum: Buffer,
    delta: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    attention: Buffer,
    /// f32[tokens, ffn] each.
    up: Buffer,
    activated: Buffer,
    /// f32[sentences, hidden].
    pooled: Buffer,
}

impl Bert {
    /// Brings the weights of an encoder to a device. Errors name the file and the tensor, or what the device lacks.
    pub fn load(device: Arc<dyn Device>, checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Bert, Error> {
        let mut config = checkpoint.config.clone();
        config.layers = options.layers.map_or(config.layers, |layers| layers.min(config.layers));
        if config.arch != Arch::Bert {
            let what = format!("is a {} model, a decoder: embeddings need a bert model", config.arch.name());
            return Err(Error::file(&checkpoint.files[0], what));
        }
        let loader = Loader::new(&*device, checkpoint, options);
        let table = |name: &str| loader.embedding(&format!("embeddings.{name}_embeddings.weight"));
        Ok(Bert {
            word: table("word")?,
            position: table("position")?,
            token_type: table("token_type")?,
            norm: Norm::load(&loader, "embeddings.LayerNorm")?,
            layers: (0..config.layers).map(|i| Layer::load(&loader, i)).collect::<Result<_, _>>()?,
            ops: Ops {
                add: ops::find("add", "f32"),
                layernorm: ops::find("layernorm", "f32"),
                attention: ops::find("attention", "f32"),
                gelu: ops::find("gelu", "f32"),
                mean_pool: ops::find("mean_pool", "f32"),
            },
            work: Mutex::new(None),
            config,
            device,
        })
    }

    /// The unit vectors of a batch of sentences, f32[sentences, hidden], in order. Sentences of about the same length
    /// go well together. Errors: a sentence without tokens, longer than the model's positions, or with ids beyond its
    /// vocabulary; the device.
    pub fn embed(&self, batch: &[Vec<u32>]) -> Result<Vec<f32>, Error> {
        self.check(batch)?;
        let Config { hidden, ffn, heads, head_dim, .. } = self.config;
        let tokens: usize = batch.iter().map(Vec::len).sum();
        let mut out = vec![0.0; batch.len() * hidden];
        if batch.is_empty() {
            return Ok(out);
        }
        // A call that panicked left buffers behind that the next one writes anew.
        let mut work = self.work.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let grow = work.as_ref().is_none_or(|work| work.tokens < tokens || work.sentences < batch.len());
        if grow {
            *work = None; // before the larger one is made
            *work = Some(Workspace::new(&*self.device, &self.config, tokens, batch.len())?);
        }
        let work = work.as_ref().expect("made above");
        self.write_batch(work, batch)?;

        let (device, m) = (&*self.device, tokens);
        self.word.apply(device, &work.ids, &work.x, m)?;
        self.token_type.apply(device, &work.types, &work.delta, m)?;
        self.add(&work.x, &work.delta, &work.sum, m)?;
        self.position.apply(device, &work.positions, &work.delta, m)?;
        self.add(&work.sum, &work.delta, &work.q, m)?;
        self.layernorm(&work.q, &self.norm, &work.x, m)?;
        for layer in &self.layers {
            layer.q.apply(device, &work.x, &work.q, m)?;
            layer.k.apply(device, &work.x, &work.k, m)?;
            layer.v.apply(device, &work.x, &work.v, m)?;
            let dims = self.ops.attention.dims(&[m, heads, heads, head_dim, m], &[1.0 / (head_dim as f32).sqrt()]);
            let args = [&work.q, &work.k, &work.v, &work.spans, &work.attention];
            device::run(device, self.ops.attention, &args, &dims)?;
            layer.o.apply(device, &work.attention, &work.delta, m)?;
            self.add(&work.x, &work.delta, &work.sum, m)?;
            self.layernorm(&work.sum, &layer.attention_norm, &work.x, m)?;

            layer.up.apply(device, &work.x, &work.up, m)?;
            let dims = self.ops.gelu.dims(&[m, ffn], &[]);
            device::run(device, self.ops.gelu, &[&work.up, &work.activated], &dims)?;
            layer.down.apply(device, &work.activated, &work.delta, m)?;
            self.add(&work.x, &work.delta, &work.sum, m)?;
            self.layernorm(&work.sum, &layer.output_norm, &work.x, m)?;
        }
        let dims = self.ops.mean_pool.dims(&[batch.len(), m, hidden], &[]);
        device::run(device, self.ops.mean_pool, &[&work.x, &work.sentence_spans, &work.pooled], &dims)?;
        device.read(&work.pooled, 0, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }

    fn check(&self, batch: &[Vec<u32>]) -> Result<(), Error> {
        let Config { vocab, max_positions, .. } = self.config;
        for (i, sentence) in batch.iter().enumerate() {
            let wrong = |what: String| Err(Error::Request(format!("sentence {i}: {what}")));
            if !(1..=max_positions).contains(&sentence.len()) {
                return wrong(format!("has {} tokens; this model takes 1 to {max_positions}", sentence.len()));
            }
            if let Some(id) = sentence.iter().find(|&&id| id as usize >= vocab) {
                return wrong(format!("has token id {id}; this model knows ids below {vocab}"));
            }
        }
        Ok(())
    }

    /// Writes ids, positions and spans of the sentences, one after another.
    fn write_batch(&self, work: &Workspace, batch: &[Vec<u32>]) -> Result<(), Error> {
        let mut positions: Vec<u32> = Vec::new();
        let (mut spans, mut sentence_spans): (Vec<[u32; 2]>, Vec<[u32; 2]>) = (Vec::new(), Vec::new());
        for sentence in batch {
            let (begin, count) = (positions.len() as u32, sentence.len() as u32);
            positions.extend(0..count);
            let span = [begin, begin + count];
            spans.resize(spans.len() + sentence.len(), span);
            sentence_spans.push(span);
        }
        let device = &*self.device;
        device.write(&work.ids, 0, bytemuck::cast_slice(&batch.concat()))?;
        device.write(&work.positions, 0, bytemuck::cast_slice(&positions))?;
        device.write(&work.spans, 0, bytemuck::cast_slice(&spans))?;
        device.write(&work.sentence_spans, 0, bytemuck::cast_slice(&sentence_spans))?;
        Ok(())
    }

    fn add(&self, a: &Buffer, b: &Buffer, y: &Buffer, m: usize) -> Result<(), Error> {
        let dims = self.ops.add.dims(&[m, self.config.hidden], &[]);
        Ok(device::run(&*self.device, self.ops.add, &[a, b, y], &dims)?)
    }

    fn layernorm(&self, x: &Buffer, norm: &Norm, y: &Buffer, m: usize) -> Result<(), Error> {
        let dims = self.ops.layernorm.dims(&[m, self.config.hidden], &[self.config.norm_eps]);
        Ok(device::run(&*self.device, self.ops.layernorm, &[x, &norm.0, &norm.1, y], &dims)?)
    }
}

impl Norm {
    fn load(loader: &Loader, name: &str) -> Result<Norm, Error> {
        Ok(Norm(loader.vector(&format!("{name}.weight"))?, loader.vector(&format!("{name}.bias"))?))
    }
}

impl Layer {
    fn load(loader: &Loader, layer: usize) -> Result<Layer, Error> {
        let linear = |name: &str| loader.linear(&format!("encoder.layer.{layer}.{name}"), true, true);
        let norm = |name: &str| Norm::load(loader, &format!("encoder.layer.{layer}.{name}.LayerNorm"));
        Ok(Layer {
            q: linear("attention.self.query")?,
            k: linear("attention.self.key")?,
            v: linear("attention.self.value")?,
            o: linear("attention.output.dense")?,
            attention_norm: norm("attention.output")?,
            up: linear("intermediate.dense")?,
            down: linear("output.dense")?,
            output_norm: norm("output")?,
        })
    }
}

impl Workspace {
    fn new(device: &dyn Device, config: &Config, tokens: usize, sentences: usize) -> Result<Workspace, Error> {
        let words = |columns: usize| device.alloc(4 * tokens * columns);
        let types = words(1)?;
        device.write(&types, 0, &vec![0; 4 * tokens])?;
        Ok(Workspace {
            tokens,
            sentences,
            ids: words(1)?,
            positions: words(1)?,
            types,
            spans: words(2)?,
            sentence_spans: device.alloc(8 * sentences)?,
            x: words(config.hidden)?,
            sum: words(config.hidden)?,
            delta: words(config.hidden)?,
            q: words(config.hidden)?,
            k: words(config.hidden)?,
            v: words(config.hidden)?,
            attention: words(config.hidden)?,
            up: words(config.ffn)?,
            activated: words(config.ffn)?,
            pooled: device.alloc(4 * sentences * config.hidden)?,
        })
    }
}
