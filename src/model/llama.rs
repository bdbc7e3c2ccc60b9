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

use std::ops::Range;
use std::sync::Arc;

use super::checkpoint::Checkpoint;
use super::config::{Arch, Config};
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
    /// `f32[head_dim/2]`.
    rope_frequencies: Vec<f32>,
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

/// One pass over m tokens: the buffers it works in, where its keys and values go and what its tokens see.
pub(super) struct Pass<'a> {
    /// Tokens.
    pub m: usize,
    /// Room for them.
    pub work: &'a Workspace,
    /// A layer's keys and values, f32[_, kv_heads·head_dim] each.
    pub cache: &'a [(Buffer, Buffer)],
    /// Rows of the caches that tokens see end below this.
    pub rows: usize,
    /// f32[positions, head_dim]: cosines, sines.
    pub table: &'a Buffer,
    /// Rows of the table.
    pub positions: usize,
    /// Where keys and values go, in the order of the tokens.
    pub places: &'a [Place],
    /// The tokens that attend first, apart from the others: one of many texts each; 0 where all attend together.
    pub apart: usize,
    /// Some token has an adapter of a stack.
    pub adapted: bool,
    /// Kernels may write keys and values into rows of the caches.
    pub direct: bool,
}

/// Tokens of one text: from `row` of the pass to row `at` of the caches, `count` of them.
pub(super) struct Place {
    pub row: usize,
    pub at: usize,
    pub count: usize,
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
            rope_frequencies: rope_frequencies(checkpoint)?,
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
        rope::table(positions, &self.rope_frequencies)
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
            let pass = Pass {
                m,
                work: &session.work,
                cache: &session.cache,
                rows: begin + m,
                table: &session.table,
                positions: session.capacity,
                places: &[Place { row: 0, at: begin, count: m }],
                apart: 0,
                adapted: true,
                direct: session.direct,
            };
            self.step(&pass, chunk, &positions, &spans, &mut observe)?;
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

    pub(super) fn check_ids(&self, ids: &[u32]) -> Result<(), Error> {
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

    /// Queues one pass: `positions` turn its queries and keys, keys and values go to its places in the caches, and
    /// token i attends to the cache rows `spans[i][0]..spans[i][1]`. Leaves the residual stream, before the final
    /// norm, in the workspace's `x`, and the normed one in `normed`. `observe` sees it after the embedding (0), after
    /// layer i (i), and normed after the last.
    pub(super) fn step(
        &self,
        pass: &Pass,
        ids: &[u32],
        positions: &[u32],
        spans: &[[u32; 2]],
        observe: &mut dyn FnMut(usize, &Buffer) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (device, work, m) = (&*self.device, pass.work, pass.m);
        device.write(&work.ids, 0, bytemuck::cast_slice(ids))?;
        device.write(&work.positions, 0, bytemuck::cast_slice(positions))?;
        device.write(&work.spans[0], 0, bytemuck::cast_slice(&spans[..pass.apart]))?;
        device.write(&work.spans[1], 0, bytemuck::cast_slice(&spans[pass.apart..]))?;

        self.embedding.apply(device, &work.ids, &work.x, m)?;
        observe(0, &work.x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            self.attend(pass, layer, &pass.cache[i])?;
            self.feed_forward(pass, layer)?;
            if i + 1 < self.layers.len() {
                observe(i + 1, &work.x)?;
            }
        }
        self.rmsnorm(&work.x, &self.norm, &work.normed, m, self.config.hidden)?;
        observe(self.layers.len(), &work.normed)
    }

    /// x_mid = x + attention(rmsnorm(x))·Woᵀ
    fn attend(&self, pass: &Pass, layer: &Layer, cache: &(Buffer, Buffer)) -> Result<(), Error> {
        let (device, work, m) = (&*self.device, pass.work, pass.m);
        let Config { heads, kv_heads, head_dim, hidden, .. } = self.config;
        let row = 4 * kv_heads * head_dim;
        let ([mut q, mut q_next], [mut k, mut k_next]) = (work.q.each_ref(), work.k.each_ref());
        // Where rows of the cache can be bound, rotated keys and values are written there; else they are copied.
        let direct = match pass.places {
            [Place { at, count, .. }] if pass.direct => {
                Some((cache.0.view(at * row, count * row), cache.1.view(at * row, count * row)))
            }
            _ => None,
        };

        self.rmsnorm(&work.x, &layer.attention_norm, &work.normed, m, hidden)?;
        self.linear(pass, &work.normed, &layer.q, q)?;
        self.linear(pass, &work.normed, &layer.k, k)?;
        self.linear(pass, &work.normed, &layer.v, direct.as_ref().map_or(&work.v, |direct| &direct.1))?;
        if let Some((q_norm, k_norm)) = &layer.head_norms {
            self.rmsnorm(q, q_norm, q_next, m * heads, head_dim)?;
            self.rmsnorm(k, k_norm, k_next, m * kv_heads, head_dim)?;
            ((q, q_next), (k, k_next)) = ((q_next, q), (k_next, k));
        }
        self.rope(pass, q, q_next, heads)?;
        self.rope(pass, k, direct.as_ref().map_or(k_next, |direct| &direct.0), kv_heads)?;
        if direct.is_none() {
            for place in pass.places {
                let (from, to, bytes) = (place.row * row, place.at * row, place.count * row);
                device.copy(k_next, from, &cache.0, to, bytes)?;
                device.copy(&work.v, from, &cache.1, to, bytes)?;
            }
        }

        let scale = 1.0 / (head_dim as f32).sqrt();
        for (range, spans) in [0..pass.apart, pass.apart..m].into_iter().zip(&work.spans) {
            if !range.is_empty() {
                let dims = self.ops.attention.dims(&[range.len(), heads, kv_heads, head_dim, pass.rows], &[scale]);
                let [at, bytes] = [range.start, range.len()].map(|rows| 4 * rows * heads * head_dim);
                let args = [&q_next.view(at, bytes), &cache.0, &cache.1, spans, &work.attention.view(at, bytes)];
                device::run(device, self.ops.attention, &args, &dims)?;
            }
        }
        self.linear(pass, &work.attention, &layer.o, &work.delta)?;
        self.add(&work.x, &work.delta, &work.x_mid, m)
    }

    /// x = x_mid + (silu(h·Wgateᵀ) * (h·Wupᵀ))·Wdownᵀ with h = rmsnorm(x_mid)
    fn feed_forward(&self, pass: &Pass, layer: &Layer) -> Result<(), Error> {
        let (device, work, m) = (&*self.device, pass.work, pass.m);
        self.rmsnorm(&work.x_mid, &layer.ffn_norm, &work.normed, m, self.config.hidden)?;
        self.linear(pass, &work.normed, &layer.gate, &work.gate)?;
        self.linear(pass, &work.normed, &layer.up, &work.up)?;
        let dims = self.ops.swiglu.dims(&[m, self.config.ffn], &[]);
        device::run(device, self.ops.swiglu, &[&work.gate, &work.up, &work.activated], &dims)?;
        self.linear(pass, &work.activated, &layer.down, &work.delta)?;
        self.add(&work.x_mid, &work.delta, &work.x, m)
    }

    /// y[m, n] = x[m, k]·Wᵀ + bias, and the adapters' terms: every projection goes through here.
    fn linear(&self, pass: &Pass, x: &Buffer, w: &Linear, y: &Buffer) -> Result<(), Error> {
        w.apply_adapted(&*self.device, x, &pass.work.shrunk, y, pass.m)?;
        match w.stack.as_ref().filter(|_| pass.adapted) {
            Some(stack) => stack.apply(&*self.device, &w.matrix, x, &pass.work.adapter, &pass.work.shrunk, y, pass.m),
            None => Ok(()),
        }
    }

    fn rmsnorm(&self, x: &Buffer, gain: &Buffer, y: &Buffer, m: usize, k: usize) -> Result<(), Error> {
        let dims = self.ops.rmsnorm.dims(&[m, k], &[self.config.norm_eps]);
        Ok(device::run(&*self.device, self.ops.rmsnorm, &[x, gain, y], &dims)?)
    }

    fn rope(&self, pass: &Pass, x: &Buffer, y: &Buffer, heads: usize) -> Result<(), Error> {
        let dims = self.ops.rope.dims(&[pass.m, heads, self.config.head_dim, pass.positions], &[]);
        let args = [x, &pass.work.positions, pass.table, y];
        Ok(device::run(&*self.device, self.ops.rope, &args, &dims)?)
    }

    fn add(&self, a: &Buffer, b: &Buffer, y: &Buffer, m: usize) -> Result<(), Error> {
        let dims = self.ops.add.dims(&[m, self.config.hidden], &[]);
        Ok(device::run(&*self.device, self.ops.add, &[a, b, y], &dims)?)
    }

    /// Queues the logits of `n` rows of the last pass, from `row` on, at most the head's rows.
    fn queue_logits(&self, session: &Session, row: usize, n: usize) -> Result<(), Error> {
        self.queue_head(&session.work, std::slice::from_ref(&(row..row + n)))
    }

    /// Queues the logits of these rows of the last pass, one range after the other, at most the head's rows.
    pub(super) fn queue_head(&self, work: &Workspace, rows: &[Range<usize>]) -> Result<(), Error> {
        let (device, row_bytes) = (&*self.device, 4 * self.config.hidden);
        if let [Range { start: 0, end }] = rows {
            return self.head.apply(device, &work.normed, &work.logits, *end);
        }
        let mut n = 0;
        for range in rows {
            device.copy(&work.normed, range.start * row_bytes, &work.tail, n * row_bytes, range.len() * row_bytes)?;
            n += range.len();
        }
        self.head.apply(device, &work.tail, &work.logits, n)
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

/// The rotary frequencies, scaled as the config says or by the divisors a GGUF file carries, `f32[head_dim/2]`.
fn rope_frequencies(checkpoint: &Checkpoint) -> Result<Vec<f32>, Error> {
    let config = &checkpoint.config;
    let frequencies = rope::frequencies(config.head_dim, config.rope_theta as f32, config.rope_scaling);
    if checkpoint.has("model.rope_freqs") {
        let view = checkpoint.tensor("model.rope_freqs")?;
        let divisors = view.to_f32()?;
        if let Some(divisor) = divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
            return Err(view.wrong(format!("holds {divisor}; divisors of frequencies are above 0")));
        }
        if config.rope_scaling != Scaling::None {
            return Err(view.wrong("stands beside another rope scaling; one of them is supported"));
        }
        if divisors.len() != frequencies.len() {
            let (count, pairs) = (divisors.len(), frequencies.len());
            return Err(view.wrong(format!("holds {count} divisors; a head has {pairs} pairs")));
        }
        return Ok(frequencies.iter().zip(divisors).map(|(f, divisor)| f / divisor).collect());
    }
    Ok(frequencies)
}
