//! Forward and backward through a decoder with adapters, written once over [`Device`]. What is kept of a forward pass:
//! the residual stream before every layer, and everything else of as many layers, the last ones, as there is room for;
//! the others are computed once more on the way back.
//!
//! ```text
//! forward of layer i, x = stream[i]                         backward, d = gradient of stream[i+1]
//!   h = rmsnorm(x)                                          d += rmsnorm'(x)·(dq·Wq + dk·Wk + dv·Wv)
//!   q, k, v = rope(h·Wqᵀ), rope(h·Wkᵀ), h·Wvᵀ               dq, dk, dv = attention'(d·Wo), rotated back
//!   x_mid = x + attention(q, k, v)·Woᵀ
//!   g = rmsnorm(x_mid)                                      d += rmsnorm'(x_mid)·(dgate·Wgate + dup·Wup)
//!   stream[i+1] = x_mid + swiglu(g·Wgateᵀ, g·Wupᵀ)·Wdownᵀ   dgate, dup = swiglu'(d·Wdown)
//! ```
//!
//! Each projection is y = x·Wᵀ + s·S·Bᵀ with S = x·Aᵀ, so backward dS = s·dy·B, dB += s·dyᵀ·S, dA += dSᵀ·x and
//! dx = dy·W + dS·A. The output head and the loss take a chunk of rows at a time, only rows that predict something, and
//! leave the gradient of the logits in their place: logits never exist whole.

use std::sync::Arc;

use super::batch::{Batch, NONE};
use super::parameters::{Parameters, Place};
use crate::device::{self, Buffer, Device};
use crate::error::Error;
use crate::model::adapter::TARGETS;
use crate::model::config::{Arch, Config};
use crate::model::linear::Linear;
use crate::model::llama::{Layer, Llama};
use crate::op::OpSpec;
use crate::ops::{self, dropout};

/// Bytes that the logits of a chunk of rows take at most, unless 64 rows take more.
const LOGITS_BYTES: usize = 32 << 20;
/// Rows of a chunk come in multiples of this, so that views of four-byte elements are aligned on every device.
const ROW_UNIT: usize = 64;

// Indices in TARGETS.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// Zeroing a share of the adapter's inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The share.
    pub p: f64,
    /// Seeds the masks.
    pub seed: u32,
    /// The step they are for.
    pub step: u32,
    /// Rows of the step that went before this pass.
    pub row0: usize,
}

/// What one layer computes: f32[m, ..] each.
struct Saved {
    /// The stream, normed: [m, hidden].
    normed: Buffer,
    /// Queries and keys before the norms of their heads (Qwen 3), else empty.
    q_plain: Buffer,
    k_plain: Buffer,
    /// Rotated queries, [m, heads·head_dim], and keys, [m, kv_heads·head_dim].
    q: Buffer,
    k: Buffer,
    /// [m, kv_heads·head_dim].
    v: Buffer,
    /// [m, heads·head_dim].
    attention: Buffer,
    /// The stream after attention, and normed: [m, hidden].
    x_mid: Buffer,
    ffn_normed: Buffer,
    /// [m, ffn].
    gate: Buffer,
    up: Buffer,
    activated: Buffer,
    /// x·Aᵀ of each projection: [m, r].
    shrunk: [Buffer; 7],
}

/// The buffers of passes of up to `rows` tokens over one model.
pub struct Passes {
    device: Arc<dyn Device>,
    ops: Ops,
    config: Config,
    /// Tokens of a pass.
    rows: usize,
    /// Rows of a chunk of logits.
    head_rows: usize,
    /// Positions of the table of cosines and sines.
    positions: usize,
    /// A layer and the place of its module for each projection.
    places: Vec<[Option<Place>; 7]>,
    /// The first layer with a module: nothing below it needs gradients.
    lowest: usize,
    rank: usize,
    saved: Vec<Saved>,
    stream: Vec<Buffer>,
    table: Buffer,
    ids: Buffer,
    position: Buffer,
    span: Buffer,
    /// The rows that predict something, where each row stands among them, and what they are to predict.
    kept: Buffer,
    place_of: Buffer,
    label: Buffer,
    loss: Buffer,
    normed: Buffer,
    tail: Buffer,
    logits: Buffer,
    d_kept: Buffer,
    /// Gradient of the residual stream.
    d: Buffer,
    d_normed: Buffer,
    d_activated: Buffer,
    d_gate: Buffer,
    d_up: Buffer,
    d_attention: Buffer,
    dq: [Buffer; 2],
    dk: [Buffer; 2],
    dv: Buffer,
    stats: Buffer,
    ds: Buffer,
    /// Inputs of an adapter after dropout, and their gradient before it; empty without dropout.
    dropped: [Buffer; 2],
}

struct Ops {
    rmsnorm: &'static OpSpec,
    rmsnorm_backward: &'static OpSpec,
    rope: &'static OpSpec,
    rope_backward: &'static OpSpec,
    attention: &'static OpSpec,
    attention_stats: &'static OpSpec,
    attention_backward: &'static OpSpec,
    swiglu: &'static OpSpec,
    swiglu_backward: &'static OpSpec,
    add: &'static OpSpec,
    gather_rows: &'static OpSpec,
    cross_entropy: &'static OpSpec,
    lora_backward: &'static OpSpec,
    lora_backward_a: &'static OpSpec,
    dropout: &'static OpSpec,
    qmatmul_t: &'static OpSpec,
}

/// Bytes of what is kept of one layer for `rows` tokens.
pub fn layer_bytes(config: &Config, rank: usize, rows: usize) -> usize {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let plain = if config.arch == Arch::Qwen3 { q + kv } else { 0 };
    4 * rows * (3 * config.hidden + plain + 2 * q + 2 * kv + 3 * config.ffn + 7 * rank)
}

/// Bytes of everything else that passes need, the stream between layers included.
pub fn fixed_bytes(config: &Config, rank: usize, rows: usize, dropout: bool) -> usize {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let widest = if dropout { 2 * config.ffn.max(config.hidden).max(q) } else { 0 };
    let width =
        (config.layers + 5) * config.hidden + 3 * config.ffn + 3 * q + 3 * kv + 2 * config.heads + rank + widest;
    4 * (rows * (width + 8) + head_rows(config) * (config.hidden + config.vocab))
}

/// Rows whose logits are there at once.
fn head_rows(config: &Config) -> usize {
    (LOGITS_BYTES / (4 * config.vocab) / ROW_UNIT * ROW_UNIT).clamp(ROW_UNIT, 1024)
}

impl Passes {
    /// Buffers for passes of up to `rows` tokens in documents of up to `longest`, keeping `kept` layers (1 or more).
    pub fn new(
        llama: &Llama,
        parameters: &Parameters,
        rows: usize,
        longest: usize,
        kept: usize,
        dropout: bool,
    ) -> Result<Passes, Error> {
        let (device, config) = (llama.device.clone(), llama.config.clone());
        let (rank, rows) = (parameters.config.r, rows.next_multiple_of(ROW_UNIT));
        let words = |columns: usize| Ok::<_, Error>(device.alloc(4 * rows * columns)?);
        let Config { hidden, ffn, heads, layers, .. } = config;
        let (q, kv) = (heads * config.head_dim, config.kv_heads * config.head_dim);
        let plain = config.arch == Arch::Qwen3;
        let saved = || -> Result<Saved, Error> {
            let shrunk = [0; 7].map(|_| words(rank));
            let [a, b, c, d, e, f, g] = shrunk;
            Ok(Saved {
                normed: words(hidden)?,
                q_plain: words(if plain { q } else { 0 })?,
                k_plain: words(if plain { kv } else { 0 })?,
                q: words(q)?,
                k: words(kv)?,
                v: words(kv)?,
                attention: words(q)?,
                x_mid: words(hidden)?,
                ffn_normed: words(hidden)?,
                gate: words(ffn)?,
                up: words(ffn)?,
                activated: words(ffn)?,
                shrunk: [a?, b?, c?, d?, e?, f?, g?],
            })
        };
        let mut places = vec![[const { None }; 7]; layers];
        for place in &parameters.places {
            places[place.layer][place.target] = Some(place.clone());
        }
        let table = llama.rope_table(longest);
        let table_buffer = device.alloc(4 * table.len())?;
        device.write(&table_buffer, 0, bytemuck::cast_slice(&table))?;
        let widest = if dropout { ffn.max(hidden).max(q) } else { 0 };
        let head_rows = head_rows(&config).min(rows);
        Ok(Passes {
            ops: Ops::find(),
            rows,
            head_rows,
            positions: longest,
            lowest: parameters.places.iter().map(|place| place.layer).min().unwrap_or(0),
            places,
            rank,
            saved: (0..kept.clamp(1, layers)).map(|_| saved()).collect::<Result<_, _>>()?,
            stream: (0..layers + 1).map(|_| words(hidden)).collect::<Result<_, _>>()?,
            table: table_buffer,
            ids: words(1)?,
            position: words(1)?,
            span: words(2)?,
            kept: words(1)?,
            place_of: words(1)?,
            label: words(1)?,
            loss: words(1)?,
            normed: words(hidden)?,
            tail: device.alloc(4 * head_rows * hidden)?,
            logits: device.alloc(4 * head_rows * config.vocab)?,
            d_kept: words(hidden)?,
            d: words(hidden)?,
            d_normed: words(hidden)?,
            d_activated: words(ffn)?,
            d_gate: words(ffn)?,
            d_up: words(ffn)?,
            d_attention: words(q)?,
            dq: [words(q)?, words(q)?],
            dk: [words(kv)?, words(kv)?],
            dv: words(kv)?,
            stats: words(2 * heads)?,
            ds: words(rank)?,
            dropped: [words(widest)?, words(widest)?],
            device,
            config,
        })
    }

    /// The sum of the losses of a batch, in nats.
    pub fn evaluate(&mut self, llama: &Llama, batch: &Batch) -> Result<f64, Error> {
        self.forward(llama, batch, None)?;
        self.head(llama, batch, 0.0)
    }

    /// The sum of the losses of a batch, in nats, and the gradients of `scale` times that sum: added to the parameters'
    /// gradients where `add`, else in their place.
    pub fn gradients(
        &mut self,
        llama: &Llama,
        parameters: &Parameters,
        batch: &Batch,
        scale: f32,
        dropout: Option<Dropout>,
        add: bool,
    ) -> Result<f64, Error> {
        self.forward(llama, batch, dropout)?;
        let loss = self.head(llama, batch, scale)?;
        let (m, last) = (batch.len(), self.config.layers - 1);
        let eps = self.config.norm_eps;
        let hidden = self.config.hidden;

        let dims = self.ops.gather_rows.dims(&[m, hidden, batch.predicted()], &[]);
        self.run(self.ops.gather_rows, &[&self.d_kept, &self.place_of, &self.d_normed], &dims)?;
        let dims = self.ops.rmsnorm_backward.dims(&[m, hidden, 0], &[eps]);
        let args = [&self.stream[last + 1], &llama.norm, &self.d_normed, &self.d];
        self.run(self.ops.rmsnorm_backward, &args, &dims)?;
        for i in (self.lowest..=last).rev() {
            if i + self.saved.len() <= last {
                self.layer(&llama.layers[i], i, m, dropout, false)?;
            }
            self.layer_backward(&llama.layers[i], parameters, i, m, dropout, add)?;
        }
        Ok(loss)
    }

    /// Where a layer keeps what it computes: the last ones have a place each, those before share the first.
    fn saved(&self, layer: usize) -> &Saved {
        &self.saved[(layer + self.saved.len()).saturating_sub(self.config.layers)]
    }

    fn run(&self, op: &OpSpec, args: &[&Buffer], dims: &crate::op::Dims) -> Result<(), Error> {
        Ok(device::run(&*self.device, op, args, dims)?)
    }

    /// Fills the stream.
    fn forward(&mut self, llama: &Llama, batch: &Batch, dropout: Option<Dropout>) -> Result<(), Error> {
        let m = batch.len();
        if m == 0 || m > self.rows {
            return Err(Error::Request(format!("a pass takes 1 to {} tokens, not {m}", self.rows)));
        }
        if let Some(&at) = batch.positions.iter().find(|&&at| at as usize >= self.positions) {
            let what = format!("a document has a token at position {at}; passes were made for {}", self.positions);
            return Err(Error::Request(what));
        }
        if let Some(id) = batch.ids.iter().find(|&&id| id as usize >= self.config.vocab) {
            return Err(Error::Request(format!("token {id}; this model knows ids below {}", self.config.vocab)));
        }
        self.device.write(&self.ids, 0, bytemuck::cast_slice(&batch.ids))?;
        self.device.write(&self.position, 0, bytemuck::cast_slice(&batch.positions))?;
        self.device.write(&self.span, 0, bytemuck::cast_slice(&batch.spans))?;
        llama.embedding.apply(&*self.device, &self.ids, &self.stream[0], m)?;
        for (i, layer) in llama.layers.iter().enumerate() {
            self.layer(layer, i, m, dropout, true)?;
        }
        self.rmsnorm(&self.stream[self.config.layers], &llama.norm, &self.normed, m, self.config.hidden)
    }

    /// One layer; its last product only where the stream after it is wanted.
    fn layer(&self, layer: &Layer, i: usize, m: usize, dropout: Option<Dropout>, whole: bool) -> Result<(), Error> {
        let Config { heads, kv_heads, head_dim, hidden, ffn, .. } = self.config;
        let (saved, x) = (self.saved(i), &self.stream[i]);
        let project = |target: usize, linear: &Linear, x: &Buffer, y: &Buffer| {
            let drop = dropout.map(|dropout| (dropout, self.stream_of(dropout, i, target)));
            self.shrink(linear, x, &saved.shrunk[target], m, drop)?;
            let adapter = linear.lora.as_ref().map(|lora| (lora, &saved.shrunk[target]));
            linear.queue(&*self.device, x, adapter, y, m)
        };
        self.rmsnorm(x, &layer.attention_norm, &saved.normed, m, hidden)?;
        // The gradients' buffers are free now.
        let ([mut q, q_next], [mut k, k_next]) = (self.dq.each_ref(), self.dk.each_ref());
        if layer.head_norms.is_some() {
            (q, k) = (&saved.q_plain, &saved.k_plain);
        }
        project(Q, &layer.q, &saved.normed, q)?;
        project(K, &layer.k, &saved.normed, k)?;
        project(V, &layer.v, &saved.normed, &saved.v)?;
        if let Some((q_norm, k_norm)) = &layer.head_norms {
            self.rmsnorm(q, q_norm, q_next, m * heads, head_dim)?;
            self.rmsnorm(k, k_norm, k_next, m * kv_heads, head_dim)?;
            (q, k) = (q_next, k_next);
        }
        self.rope(self.ops.rope, q, &saved.q, m, heads)?;
        self.rope(self.ops.rope, k, &saved.k, m, kv_heads)?;
        let dims = self.ops.attention.dims(&[m, heads, kv_heads, head_dim, m], &[1.0 / (head_dim as f32).sqrt()]);
        self.run(self.ops.attention, &[&saved.q, &saved.k, &saved.v, &self.span, &saved.attention], &dims)?;
        project(O, &layer.o, &saved.attention, &self.d_normed)?;
        self.add(x, &self.d_normed, &saved.x_mid, m)?;

        self.rmsnorm(&saved.x_mid, &layer.ffn_norm, &saved.ffn_normed, m, hidden)?;
        project(GATE, &layer.gate, &saved.ffn_normed, &saved.gate)?;
        project(UP, &layer.up, &saved.ffn_normed, &saved.up)?;
        let dims = self.ops.swiglu.dims(&[m, ffn], &[]);
        self.run(self.ops.swiglu, &[&saved.gate, &saved.up, &saved.activated], &dims)?;
        if whole {
            project(DOWN, &layer.down, &saved.activated, &self.d_normed)?;
            return self.add(&saved.x_mid, &self.d_normed, &self.stream[i + 1], m);
        }
        let drop = dropout.map(|dropout| (dropout, self.stream_of(dropout, i, DOWN)));
        self.shrink(&layer.down, &saved.activated, &saved.shrunk[DOWN], m, drop)
    }

    /// From the gradient of stream[i+1] in `d` to that of stream[i] in `d`, and the gradients of the layer's modules.
    fn layer_backward(
        &self,
        layer: &Layer,
        parameters: &Parameters,
        i: usize,
        m: usize,
        dropout: Option<Dropout>,
        add: bool,
    ) -> Result<(), Error> {
        let Config { heads, kv_heads, head_dim, hidden, ffn, norm_eps, .. } = self.config;
        let saved = self.saved(i);
        // The gradients of a projection's module, and where `dx` is given that of its input.
        let back = |target: usize, linear: &Linear, x: &Buffer, dy: &Buffer, dx: Option<(&Buffer, bool)>| {
            let drop = dropout.map(|dropout| (dropout, self.stream_of(dropout, i, target)));
            if let Some(place) = &self.places[i][target] {
                self.module_backward(parameters, place, x, &saved.shrunk[target], dy, m, drop, add)?;
            }
            let Some((dx, add)) = dx else { return Ok(()) };
            let Some(lora) = &linear.lora else {
                return linear.apply_transposed(&*self.device, dy, None, dx, m, add);
            };
            let Some((dropout, stream)) = drop else {
                return linear.apply_transposed(&*self.device, dy, Some((lora, &self.ds)), dx, m, add);
            };
            linear.apply_transposed(&*self.device, dy, None, dx, m, add)?;
            let k = linear.matrix.k;
            let dims = self.ops.qmatmul_t.dims(&[m, lora.r, k, lora.r, 0, 0, 0], &[]);
            let (none, before) = (self.ds.view(0, 0), &self.dropped[1]);
            self.run(self.ops.qmatmul_t, &[&self.ds, &lora.a, &none, &none, before], &dims)?;
            self.drop(before, dx, m, k, dropout, stream, true)
        };
        let rmsnorm_backward = |x: &Buffer, gain: &Buffer, dy: &Buffer, dx: &Buffer, m: usize, k: usize, add: bool| {
            let dims = self.ops.rmsnorm_backward.dims(&[m, k, add as usize], &[norm_eps]);
            self.run(self.ops.rmsnorm_backward, &[x, gain, dy, dx], &dims)
        };

        back(DOWN, &layer.down, &saved.activated, &self.d, Some((&self.d_activated, false)))?;
        let dims = self.ops.swiglu_backward.dims(&[m, ffn], &[]);
        let args = [&saved.gate, &saved.up, &self.d_activated, &self.d_gate, &self.d_up];
        self.run(self.ops.swiglu_backward, &args, &dims)?;
        back(GATE, &layer.gate, &saved.ffn_normed, &self.d_gate, Some((&self.d_normed, false)))?;
        back(UP, &layer.up, &saved.ffn_normed, &self.d_up, Some((&self.d_normed, true)))?;
        rmsnorm_backward(&saved.x_mid, &layer.ffn_norm, &self.d_normed, &self.d, m, hidden, true)?;

        back(O, &layer.o, &saved.attention, &self.d, Some((&self.d_attention, false)))?;
        let dims = [m, heads, kv_heads, head_dim, m];
        let scale = [1.0 / (head_dim as f32).sqrt()];
        let args = [&saved.q, &saved.k, &self.span, &saved.attention, &self.d_attention, &self.stats];
        self.run(self.ops.attention_stats, &args, &self.ops.attention_stats.dims(&dims, &scale))?;
        let ([mut dq, mut dq_next], [mut dk, mut dk_next]) = (self.dq.each_ref(), self.dk.each_ref());
        let inputs = [&saved.q, &saved.k, &saved.v, &self.span, &self.d_attention, &self.stats];
        let args = [&inputs[..], &[dq, dk, &self.dv]].concat();
        self.run(self.ops.attention_backward, &args, &self.ops.attention_backward.dims(&dims, &scale))?;
        self.rope(self.ops.rope_backward, dq, dq_next, m, heads)?;
        self.rope(self.ops.rope_backward, dk, dk_next, m, kv_heads)?;
        if let Some((q_norm, k_norm)) = &layer.head_norms {
            ((dq, dq_next), (dk, dk_next)) = ((dq_next, dq), (dk_next, dk));
            rmsnorm_backward(&saved.q_plain, q_norm, dq, dq_next, m * heads, head_dim, false)?;
            rmsnorm_backward(&saved.k_plain, k_norm, dk, dk_next, m * kv_heads, head_dim, false)?;
        }
        // Nothing below the first module needs a gradient.
        let into = |add: bool| (i > self.lowest).then_some((&self.d_normed, add));
        back(Q, &layer.q, &saved.normed, dq_next, into(false))?;
        back(K, &layer.k, &saved.normed, dk_next, into(true))?;
        back(V, &layer.v, &saved.normed, &self.dv, into(true))?;
        if i == self.lowest {
            return Ok(());
        }
        rmsnorm_backward(&self.stream[i], &layer.attention_norm, &self.d_normed, &self.d, m, hidden, true)
    }

    /// dS, dB and dA of a module.
    #[allow(clippy::too_many_arguments)]
    fn module_backward(
        &self,
        parameters: &Parameters,
        place: &Place,
        x: &Buffer,
        shrunk: &Buffer,
        dy: &Buffer,
        m: usize,
        drop: Option<(Dropout, u32)>,
        add: bool,
    ) -> Result<(), Error> {
        let Place { n, k, .. } = *place;
        let b = parameters.b(&parameters.values, place);
        let db = parameters.b(&parameters.gradients, place);
        let dims = self.ops.lora_backward.dims(&[m, n, self.rank, n, 0, add as usize], &[parameters.config.scale()]);
        self.run(self.ops.lora_backward, &[dy, &b, shrunk, &self.ds, &db], &dims)?;
        let mut x = x;
        if let Some((dropout, stream)) = drop {
            self.drop(x, &self.dropped[0], m, k, dropout, stream, false)?;
            x = &self.dropped[0];
        }
        let da = parameters.a(&parameters.gradients, place);
        let dims = self.ops.lora_backward_a.dims(&[m, k, self.rank, add as usize], &[]);
        self.run(self.ops.lora_backward_a, &[x, &self.ds, &da], &dims)
    }

    /// S = x·Aᵀ of a projection that has an adapter, its input dropped out first.
    fn shrink(
        &self,
        linear: &Linear,
        x: &Buffer,
        shrunk: &Buffer,
        m: usize,
        drop: Option<(Dropout, u32)>,
    ) -> Result<(), Error> {
        let Some(lora) = &linear.lora else { return Ok(()) };
        let k = linear.matrix.k;
        let mut x = x;
        if let Some((dropout, stream)) = drop {
            self.drop(x, &self.dropped[0], m, k, dropout, stream, false)?;
            x = &self.dropped[0];
        }
        lora.shrink(&*self.device, x, shrunk, m, k)
    }

    /// Which masks a projection uses in a step: none are used twice in 2^32 / modules steps.
    fn stream_of(&self, dropout: Dropout, layer: usize, target: usize) -> u32 {
        let modules = (self.config.layers * TARGETS.len()) as u32;
        dropout.step.wrapping_mul(modules).wrapping_add((layer * TARGETS.len() + target) as u32)
    }

    #[allow(clippy::too_many_arguments)]
    fn drop(
        &self,
        x: &Buffer,
        y: &Buffer,
        m: usize,
        k: usize,
        dropout: Dropout,
        stream: u32,
        add: bool,
    ) -> Result<(), Error> {
        let (threshold, scale) = dropout::threshold(dropout.p);
        let own = [m, k, dropout.row0, dropout.seed as usize, stream as usize, threshold, add as usize];
        self.run(self.ops.dropout, &[x, y], &self.ops.dropout.dims(&own, &[scale]))
    }

    /// The losses of the rows that predict something, summed, and in `d_kept` the gradients of `scale` times the sum
    /// with respect to their normed rows.
    fn head(&mut self, llama: &Llama, batch: &Batch, scale: f32) -> Result<f64, Error> {
        let Config { hidden, vocab, .. } = self.config;
        let (mut kept, mut labels) = (Vec::new(), Vec::new());
        let mut place_of = vec![NONE; batch.len()];
        for (row, &target) in batch.targets.iter().enumerate().filter(|(_, &target)| target != NONE) {
            place_of[row] = kept.len() as u32;
            kept.push(row as u32);
            labels.push(target);
        }
        let count = kept.len();
        self.device.write(&self.kept, 0, bytemuck::cast_slice(&kept))?;
        self.device.write(&self.place_of, 0, bytemuck::cast_slice(&place_of))?;
        self.device.write(&self.label, 0, bytemuck::cast_slice(&labels))?;
        for row in (0..count).step_by(self.head_rows) {
            let n = self.head_rows.min(count - row);
            let view = |buffer: &Buffer, columns: usize| buffer.view(4 * row * columns, 4 * n * columns);
            let dims = self.ops.gather_rows.dims(&[n, hidden, batch.len()], &[]);
            self.run(self.ops.gather_rows, &[&self.normed, &view(&self.kept, 1), &self.tail], &dims)?;
            llama.head.queue(&*self.device, &self.tail, None, &self.logits, n)?;
            let dims = self.ops.cross_entropy.dims(&[n, vocab], &[scale]);
            self.run(self.ops.cross_entropy, &[&self.logits, &view(&self.label, 1), &view(&self.loss, 1)], &dims)?;
            if scale != 0.0 {
                let d = view(&self.d_kept, hidden);
                llama.head.apply_transposed(&*self.device, &self.logits, None, &d, n, false)?;
            }
        }
        let mut losses = vec![0f32; count];
        self.device.read(&self.loss, 0, bytemuck::cast_slice_mut(&mut losses))?;
        Ok(losses.iter().map(|&loss| f64::from(loss)).sum())
    }

    fn rmsnorm(&self, x: &Buffer, gain: &Buffer, y: &Buffer, m: usize, k: usize) -> Result<(), Error> {
        self.run(self.ops.rmsnorm, &[x, gain, y], &self.ops.rmsnorm.dims(&[m, k], &[self.config.norm_eps]))
    }

    fn rope(&self, op: &OpSpec, x: &Buffer, y: &Buffer, m: usize, heads: usize) -> Result<(), Error> {
        let dims = op.dims(&[m, heads, self.config.head_dim, self.positions], &[]);
        self.run(op, &[x, &self.position, &self.table, y], &dims)
    }

    fn add(&self, a: &Buffer, b: &Buffer, y: &Buffer, m: usize) -> Result<(), Error> {
        self.run(self.ops.add, &[a, b, y], &self.ops.add.dims(&[m, self.config.hidden], &[]))
    }
}

impl Ops {
    fn find() -> Ops {
        let find = |name| ops::find(name, "f32");
        Ops {
            rmsnorm: find("rmsnorm"),
            rmsnorm_backward: find("rmsnorm_backward"),
            rope: find("rope"),
            rope_backward: find("rope_backward"),
            attention: find("attention"),
            attention_stats: find("attention_stats"),
            attention_backward: find("attention_backward"),
            swiglu: find("swiglu"),
            swiglu_backward: find("swiglu_backward"),
            add: find("add"),
            gather_rows: find("gather_rows"),
            cross_entropy: find("cross_entropy"),
            lora_backward: find("lora_backward"),
            lora_backward_a: find("lora_backward_a"),
            dropout: find("dropout"),
            qmatmul_t: find("qmatmul_t"),
        }
    }
}
