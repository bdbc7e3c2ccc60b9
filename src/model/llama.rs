//! The decoder: Llama and what shares its layout (Qwen 2, Qwen 3), written once over [`Device`].
//!
//! ```text
//! x = embedding[ids]
//! for each layer:
//!     h = rmsnorm(x)
//!     q, k, v = h·Wqᵀ, h·Wkᵀ, h·Wvᵀ             (+ biases: Qwen 2)
//!     q, k = rmsnorm of each head                (Qwen 3)
//!     cache += rope(k), v
//!     x = x + attention(rope(q), cache)·Woᵀ
//!     h = rmsnorm(x)
//!     x = x + (silu(h·Wgateᵀ) * (h·Wupᵀ))·Wdownᵀ
//! logits = rmsnorm(x)·Wheadᵀ                     (Whead may be the embedding)
//! ```
//!
//! Work is only queued here; the host waits where logits or hidden states are read.

use std::sync::Arc;

use super::checkpoint::Checkpoint;
use super::config::{Arch, Config, RopeScaling};
use super::linear::{Embedding, Linear};
use super::session::{Session, Workspace};
use super::weights::{LoadOptions, Loader};
use crate::device::{self, Buffer, Device};
use crate::error::Error;
use crate::op::OpSpec;
use crate::ops::{self, rope, rope::Scaling};

/// A decoder on a device.
pub struct Llama {
    /// Sizes and constants.
    pub config: Config,
    /// Where it lives.
    pub device: Arc<dyn Device>,
    /// Token embedding, [vocab, hidden].
    pub embedding: Embedding,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// Gain of the last norm, `f32[hidden]`.
    pub norm: Buffer,
    /// Output head, [vocab, hidden]; shares the embedding's memory where the two are tied.
    pub head: Linear,
    /// The rank of the adapter beside the weights; 0 where there is none.
    pub(super) lora_rank: usize,
    rope_scaling: Scaling,
    ops: Ops,
}

/// The weights of one layer.
pub struct Layer {
    /// Gain of the norm before attention, `f32[hidden]`.
    pub attention_norm: Buffer,
    /// Queries, [heads·head_dim, hidden].
    pub q: Linear,
    /// Keys, [kv_heads·head_dim, hidden].
    pub k: Linear,
    /// Values, [kv_heads·head_dim, hidden].
    pub v: Linear,
    /// Attention's output, [hidden, heads·head_dim].
    pub o: Linear,
    /// Gains of the norms of each head of q and of k, `f32[head_dim]` (Qwen 3).
    pub head_norms: Option<(Buffer, Buffer)>,
    /// Gain of the norm before the feed-forward part, `f32[hidden]`.
    pub ffn_norm: Buffer,
    /// [ffn, hidden].
    pub gate: Linear,
    /// [ffn, hidden].
    pub up: Linear,
    /// [hidden, ffn].
    pub down: Linear,
}

struct Ops {
    rmsnorm: &'static OpSpec,
    rope: &'static OpSpec,
    attention: &'static OpSpec,
    swiglu: &'static OpSpec,
    add: &'static OpSpec,
}

/// Takes rows of results as they come: the first row's index and the rows, one after the other.
pub type EachRows<'a> = &'a mut dyn FnMut(usize, &[f32]) -> Result<(), Error>;
/// Takes hidden states as they come: the layer, the first row's index and the rows.
pub type EachHidden<'a> = &'a mut dyn FnMut(usize, usize, &[f32]) -> Result<(), Error>;

/// What a forward pass is for.
pub enum Want<'a> {
    /// Filling the cache.
    None,
    /// The logits of the last token, `f32[vocab]`.
    Last,
    /// The logits of every token, f32[rows, vocab] at a time; row 0 is the first token of the call.
    All(EachRows<'a>),
    /// The residual stream, f32[rows, hidden] at a time: 0 after the embedding, i after layer i, the last one after
    /// the final norm.
    Hidden(EachHidden<'a>),
}

impl Llama {
    /// Brings the weights of a decoder to a device. Errors name the file and the tensor, or what the device lacks.
    pub fn load(device: Arc<dyn Device>, checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Llama, Error> {
        let mut config = checkpoint.config.clone();
        config.layers = options.layers.map_or(config.layers, |layers| layers.min(config.layers));
        if config.arch == Arch::Bert {
            let what = "is a bert model, an encoder: name a llama, qwen2 or qwen3 model, or use it for embeddings";
            return Err(Error::file(&checkpoint.files[0], what));
        }
        let loader = Loader::new(&*device, checkpoint, options);
        let embedding = loader.embedding("model.embed_tokens.weight")?;
        let head = match config.tie_embeddings {
            true => Linear::new(&*device, embedding.matrix.clone())?,
            false => loader.linear("lm_head", false, false)?,
        };
        Ok(Llama {
            embedding,
            layers: (0..config.layers).map(|i| Layer::load(&loader, &config, i)).collect::<Result<_, _>>()?,
            norm: loader.vector("model.norm.weight")?,
            head,
            lora_rank: 0,
            rope_scaling: rope_scaling(checkpoint)?,
            ops: Ops {
                rmsnorm: ops::find("rmsnorm", "f32"),
                rope: ops::find("rope", "f32"),
                attention: ops::find("attention", "f32"),
                swiglu: ops::find("swiglu", "f32"),
                add: ops::find("add", "f32"),
            },
            config,
            device,
        })
    }

    /// A session for texts of up to `capacity` tokens. Errors: none or more tokens than the model was made for, memory.
    pub fn session(&self, capacity: usize) -> Result<Session, Error> {
        let max = self.config.max_positions;
        if !(1..=max).contains(&capacity) {
            let what = format!("a context of {capacity} tokens was asked for; this model takes 1 to {max}");
            return Err(Error::Request(what));
        }
        Session::new(&*self.device, &self.config, capacity, &self.rope_table(capacity), self.lora_rank)
    }

    /// Says which rank the adapter beside the weights has: sessions make room for it.
    pub(crate) fn set_lora_rank(&mut self, rank: usize) {
        self.lora_rank = rank;
    }

    /// Cosines and sines of the first `positions` positions, f32[positions, head_dim].
    pub fn rope_table(&self, positions: usize) -> Vec<f32> {
        rope::table(positions, self.config.head_dim, self.config.rope_theta as f32, &self.rope_scaling)
    }

    /// Appends `ids` to the session's text and gives the logits of the last one for [`Want::Last`], else nothing.
    /// Errors: no or unknown ids, more than fit, the device. After an error the session holds the chunks of 512 tokens
    /// that were finished before it.
    pub fn forward<'s>(&self, session: &'s mut Session, ids: &[u32], mut want: Want) -> Result<&'s [f32], Error> {
        self.check_ids(ids)?;
        session.check_room(ids.len())?;
        let width = self.config.hidden;
        let mut host = Vec::new();
        for (i, chunk) in ids.chunks(session.chunk).enumerate() {
            let (row0, begin, m) = (i * session.chunk, session.len, chunk.len());
            let positions: Vec<u32> = (begin..begin + m).map(|at| at as u32).collect();
            let spans: Vec<[u32; 2]> = positions.iter().map(|at| [0, at + 1]).collect();
            let mut observe = |layer: usize, x: &Buffer| match &mut want {
                Want::Hidden(each) => {
                    host.resize(m * width, 0.0);
                    self.device.read(x, 0, bytemuck::cast_slice_mut(&mut host))?;
                    each(layer, row0, &host)
                }
                _ => Ok(()),
            };
            self.step(session, chunk, &positions, &spans, begin, &mut observe)?;
            if let Want::All(each) = &mut want {
                self.all_logits(session, m, row0, each)?;
            }
            session.len += m;
        }
        if !matches!(want, Want::Last) {
            return Ok(&[]);
        }
        self.queue_logits(session, (ids.len() - 1) % session.chunk, 1)?;
        self.device.read(&session.work.logits, 0, bytemuck::cast_slice_mut(&mut session.logits))?;
        Ok(&session.logits)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), Error> {
        if ids.is_empty() {
            return Err(Error::Request("there are no tokens: give at least one".into()));
        }
        match ids.iter().position(|&id| id as usize >= self.config.vocab) {
            Some(i) => Err(Error::Request(format!(
                "token {i} has id {}; this model knows ids below {}: was it tokenized for another model?",
                ids[i], self.config.vocab
            ))),
            None => Ok(()),
        }
    }

    /// Queues one pass over m tokens, at most a chunk: `positions` turn their queries and keys, their keys and values
    /// go to rows `row0..row0 + m` of the caches, and token i attends to the cache rows `spans[i][0]..spans[i][1]`.
    /// Leaves the residual stream, before the final norm, in the workspace's `x`. `observe` sees it after the
    /// embedding (0), after layer i (i), and normed after the last.
    pub(super) fn step(
        &self,
        session: &Session,
        ids: &[u32],
        positions: &[u32],
        spans: &[[u32; 2]],
        row0: usize,
        observe: &mut dyn FnMut(usize, &Buffer) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (device, work, m) = (&*self.device, &session.work, ids.len());
        device.write(&work.ids, 0, bytemuck::cast_slice(ids))?;
        device.write(&work.positions, 0, bytemuck::cast_slice(positions))?;
        device.write(&work.spans, 0, bytemuck::cast_slice(spans))?;

        self.embedding.apply(device, &work.ids, &work.x, m)?;
        observe(0, &work.x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            self.attend(session, layer, &session.cache[i], m, row0)?;
            self.feed_forward(session, layer, m)?;
            if i + 1 < self.layers.len() {
                observe(i + 1, &work.x)?;
            }
        }
        self.rmsnorm(&work.x, &self.norm, &work.normed, m, self.config.hidden)?;
        observe(self.layers.len(), &work.normed)
    }

    /// x_mid = x + attention(rmsnorm(x))·Woᵀ
    fn attend(
        &self,
        session: &Session,
        layer: &Layer,
        cache: &(Buffer, Buffer),
        m: usize,
        row0: usize,
    ) -> Result<(), Error> {
        let (device, work) = (&*self.device, &session.work);
        let Config { heads, kv_heads, head_dim, hidden, .. } = self.config;
        let (rows, bytes) = (row0 + m, 4 * m * kv_heads * head_dim);
        let at = 4 * row0 * kv_heads * head_dim;
        let ([mut q, mut q_next], [mut k, mut k_next]) = (work.q.each_ref(), work.k.each_ref());
        // Where rows of the cache can be bound, rotated keys and values are written there; else they are copied.
        let direct = session.direct.then(|| (cache.0.view(at, bytes), cache.1.view(at, bytes)));

        self.rmsnorm(&work.x, &layer.attention_norm, &work.normed, m, hidden)?;
        self.linear(work, &work.normed, &layer.q, q, m)?;
        self.linear(work, &work.normed, &layer.k, k, m)?;
        self.linear(work, &work.normed, &layer.v, direct.as_ref().map_or(&work.v, |direct| &direct.1), m)?;
        if let Some((q_norm, k_norm)) = &layer.head_norms {
            self.rmsnorm(q, q_norm, q_next, m * heads, head_dim)?;
            self.rmsnorm(k, k_norm, k_next, m * kv_heads, head_dim)?;
            ((q, q_next), (k, k_next)) = ((q_next, q), (k_next, k));
        }
        self.rope(session, q, q_next, m, heads)?;
        self.rope(session, k, direct.as_ref().map_or(k_next, |direct| &direct.0), m, kv_heads)?;
        if direct.is_none() {
            device.copy(k_next, 0, &cache.0, at, bytes)?;
            device.copy(&work.v, 0, &cache.1, at, bytes)?;
        }

        let scale = 1.0 / (head_dim as f32).sqrt();
        let dims = self.ops.attention.dims(&[m, heads, kv_heads, head_dim, rows], &[scale]);
        let args = [q_next, &cache.0, &cache.1, &work.spans, &work.attention];
        device::run(device, self.ops.attention, &args, &dims)?;
        self.linear(work, &work.attention, &layer.o, &work.delta, m)?;
        self.add(&work.x, &work.delta, &work.x_mid, m)
    }

    /// x = x_mid + (silu(h·Wgateᵀ) * (h·Wupᵀ))·Wdownᵀ with h = rmsnorm(x_mid)
    fn feed_forward(&self, session: &Session, layer: &Layer, m: usize) -> Result<(), Error> {
        let (device, work) = (&*self.device, &session.work);
        self.rmsnorm(&work.x_mid, &layer.ffn_norm, &work.normed, m, self.config.hidden)?;
        self.linear(work, &work.normed, &layer.gate, &work.gate, m)?;
        self.linear(work, &work.normed, &layer.up, &work.up, m)?;
        let dims = self.ops.swiglu.dims(&[m, self.config.ffn], &[]);
        device::run(device, self.ops.swiglu, &[&work.gate, &work.up, &work.activated], &dims)?;
        self.linear(work, &work.activated, &layer.down, &work.delta, m)?;
        self.add(&work.x_mid, &work.delta, &work.x, m)
    }

    /// y[m, n] = x[m, k]·Wᵀ + bias, and the adapter's term: every projection goes through here.
    fn linear(&self, work: &Workspace, x: &Buffer, w: &Linear, y: &Buffer, m: usize) -> Result<(), Error> {
        w.apply_adapted(&*self.device, x, &work.shrunk, y, m)
    }

    fn rmsnorm(&self, x: &Buffer, gain: &Buffer, y: &Buffer, m: usize, k: usize) -> Result<(), Error> {
        let dims = self.ops.rmsnorm.dims(&[m, k], &[self.config.norm_eps]);
        Ok(device::run(&*self.device, self.ops.rmsnorm, &[x, gain, y], &dims)?)
    }

    fn rope(&self, session: &Session, x: &Buffer, y: &Buffer, m: usize, heads: usize) -> Result<(), Error> {
        let dims = self.ops.rope.dims(&[m, heads, self.config.head_dim, session.capacity], &[]);
        let args = [x, &session.work.positions, &session.table, y];
        Ok(device::run(&*self.device, self.ops.rope, &args, &dims)?)
    }

    fn add(&self, a: &Buffer, b: &Buffer, y: &Buffer, m: usize) -> Result<(), Error> {
        let dims = self.ops.add.dims(&[m, self.config.hidden], &[]);
        Ok(device::run(&*self.device, self.ops.add, &[a, b, y], &dims)?)
    }

    /// Queues the logits of `n` rows of the last pass, from `row` on, at most the head's rows.
    fn queue_logits(&self, session: &Session, row: usize, n: usize) -> Result<(), Error> {
        let (work, row_bytes) = (&session.work, 4 * self.config.hidden);
        if row == 0 {
            return self.linear(work, &work.normed, &self.head, &work.logits, n);
        }
        self.device.copy(&work.normed, row * row_bytes, &work.tail, 0, n * row_bytes)?;
        self.linear(work, &work.tail, &self.head, &work.logits, n)
    }

    /// Reads the logits of all m rows of the last pass, the head's rows at a time; `row0` is the first one's index in
    /// the call.
    fn all_logits(&self, session: &mut Session, m: usize, row0: usize, each: EachRows) -> Result<(), Error> {
        session.work.widen_head(&*self.device, &self.config)?;
        let step = session.work.head_rows;
        for row in (0..m).step_by(step) {
            let n = step.min(m - row);
            self.queue_logits(session, row, n)?;
            session.logits.resize(n * self.config.vocab, 0.0);
            self.device.read(&session.work.logits, 0, bytemuck::cast_slice_mut(&mut session.logits))?;
            each(row0 + row, &session.logits)?;
        }
        session.logits.resize(self.config.vocab, 0.0);
        Ok(())
    }
}

impl Layer {
    fn load(loader: &Loader, config: &Config, layer: usize) -> Result<Layer, Error> {
        let vector = |name: &str| loader.vector(&format!("model.layers.{layer}.{name}.weight"));
        let linear = |name: &str, bias| loader.linear(&format!("model.layers.{layer}.{name}"), bias, true);
        let head_norms = match config.arch {
            Arch::Qwen3 => Some((vector("self_attn.q_norm")?, vector("self_attn.k_norm")?)),
            _ => None,
        };
        Ok(Layer {
            attention_norm: vector("input_layernorm")?,
            q: linear("self_attn.q_proj", config.attention_bias)?,
            k: linear("self_attn.k_proj", config.attention_bias)?,
            v: linear("self_attn.v_proj", config.attention_bias)?,
            o: linear("self_attn.o_proj", config.output_bias)?,
            head_norms,
            ffn_norm: vector("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj", false)?,
            up: linear("mlp.up_proj", false)?,
            down: linear("mlp.down_proj", false)?,
        })
    }

    /// The projections under the names adapters know them by.
    pub fn projections(&self) -> [(&'static str, &Linear); 7] {
        [
            ("q_proj", &self.q),
            ("k_proj", &self.k),
            ("v_proj", &self.v),
            ("o_proj", &self.o),
            ("gate_proj", &self.gate),
            ("up_proj", &self.up),
            ("down_proj", &self.down),
        ]
    }

    /// One of them by its name; the last for any other.
    pub fn projection_mut(&mut self, name: &str) -> &mut Linear {
        match name {
            "q_proj" => &mut self.q,
            "k_proj" => &mut self.k,
            "v_proj" => &mut self.v,
            "o_proj" => &mut self.o,
            "gate_proj" => &mut self.gate,
            "up_proj" => &mut self.up,
            _ => &mut self.down,
        }
    }
}

/// How the config, or the divisors a GGUF file carries, stretch the rotary frequencies.
fn rope_scaling(checkpoint: &Checkpoint) -> Result<Scaling, Error> {
    let scaling = checkpoint.config.rope_scaling;
    if checkpoint.has("model.rope_freqs") {
        let view = checkpoint.tensor("model.rope_freqs")?;
        let divisors = view.to_f32()?;
        if let Some(divisor) = divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
            return Err(view.wrong(format!("holds {divisor}; divisors of frequencies are above 0")));
        }
        if scaling != RopeScaling::None {
            return Err(view.wrong("stands beside another rope scaling; one of them is supported"));
        }
        return Ok(Scaling::Divisors(divisors));
    }
    Ok(match scaling {
        RopeScaling::None => Scaling::None,
        RopeScaling::Linear { factor } => Scaling::Linear { factor },
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position: original_max as u32 }
        }
    })
}
