//! What one running text keeps on the device: the keys and values of its tokens so far, and the buffers a pass writes.

use super::config::Config;
use crate::device::{Buffer, Device};
use crate::error::Error;

/// Tokens of one pass: longer prompts go through in chunks of this many.
pub const CHUNK: usize = 512;
/// Bytes that logits of many rows may take at once.
const LOGITS_BYTES: usize = 16 << 20;

/// A text in progress: up to `capacity` tokens, of which `len` are there. Made by [`super::llama::Llama::session`].
pub struct Session {
    pub(super) capacity: usize,
    pub(super) len: usize,
    /// Tokens of one pass.
    pub(super) chunk: usize,
    /// A layer's keys, rotated, and values: f32[capacity, kv_heads·head_dim] each.
    pub(super) cache: Vec<(Buffer, Buffer)>,
    /// Rows of the caches begin where a view may: kernels write into them.
    pub(super) direct: bool,
    /// f32[capacity, head_dim]: cosines, sines.
    pub(super) table: Buffer,
    pub(super) work: Workspace,
    /// The last logits read.
    pub(super) logits: Vec<f32>,
}

/// The buffers of one pass over m tokens, m at most the session's chunk.
pub(super) struct Workspace {
    /// u32[m].
    pub ids: Buffer,
    /// u32[m].
    pub positions: Buffer,
    /// u32[m, 2], twice: of the tokens that attend together, and of those that do apart from them.
    pub spans: [Buffer; 2],
    /// i32[m]: each token's adapter among those stacked beside the weights; all the first one's in a session.
    pub adapter: Buffer,
    /// f32[m, hidden]: the residual stream.
    pub x: Buffer,
    /// f32[m, hidden]: the residual stream after attention.
    pub x_mid: Buffer,
    /// f32[m, hidden]: what a block reads, and in the end the head: the stream, normed.
    pub normed: Buffer,
    /// f32[m, hidden]: what a block adds.
    pub delta: Buffer,
    /// f32[m, heads·head_dim], twice: a step reads one and writes the other.
    pub q: [Buffer; 2],
    /// f32[m, kv_heads·head_dim], twice.
    pub k: [Buffer; 2],
    /// f32[m, kv_heads·head_dim].
    pub v: Buffer,
    /// f32[m, heads·head_dim].
    pub attention: Buffer,
    /// f32[m, ffn].
    pub gate: Buffer,
    /// f32[m, ffn].
    pub up: Buffer,
    /// f32[m, ffn].
    pub activated: Buffer,
    /// f32[m, r]: x·Aᵀ of the projection at work.
    pub shrunk: Buffer,
    /// f32[head_rows, hidden]: normed rows on their way to the output head.
    pub tail: Buffer,
    /// f32[head_rows, vocab].
    pub logits: Buffer,
    /// Rows the output head takes at once; 1 until logits of every row are asked for.
    pub head_rows: usize,
}

impl Session {
    pub(super) fn new(
        device: &dyn Device,
        config: &Config,
        capacity: usize,
        table: &[f32],
        lora_rank: usize,
    ) -> Result<Session, Error> {
        let chunk = capacity.min(CHUNK);
        let kv = config.kv_heads * config.head_dim;
        let floats = |count: usize| device.alloc(4 * count);
        let cache = (0..config.layers).map(|_| Ok((floats(capacity * kv)?, floats(capacity * kv)?)));
        let cache = cache.collect::<Result<_, Error>>()?;
        let table_buffer = device.alloc(4 * table.len())?;
        device.write(&table_buffer, 0, bytemuck::cast_slice(table))?;
        Ok(Session {
            capacity,
            len: 0,
            chunk,
            cache,
            direct: (4 * kv).is_multiple_of(device.caps().view_alignment),
            table: table_buffer,
            work: Workspace::new(device, config, chunk, lora_rank)?,
            logits: vec![0.0; config.vocab],
        })
    }

    /// Tokens it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` tokens, so that another continuation can follow them.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// An error in words where `count` more tokens do not fit.
    pub(super) fn check_room(&self, count: usize) -> Result<(), Error> {
        if count <= self.capacity - self.len {
            return Ok(());
        }
        Err(Error::Request(format!(
            "the context is full: it holds {} of {} tokens and {count} more were given; shorten the text or open a \
             larger session",
            self.len, self.capacity
        )))
    }
}

impl Workspace {
    /// For passes over up to m tokens.
    pub fn new(device: &dyn Device, config: &Config, m: usize, lora_rank: usize) -> Result<Workspace, Error> {
        let words = |columns: usize| device.alloc(4 * m * columns);
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        Ok(Workspace {
            ids: words(1)?,
            positions: words(1)?,
            spans: [words(2)?, words(2)?],
            adapter: words(1)?,
            x: words(hidden)?,
            x_mid: words(hidden)?,
            normed: words(hidden)?,
            delta: words(hidden)?,
            q: [words(q)?, words(q)?],
            k: [words(kv)?, words(kv)?],
            v: words(kv)?,
            attention: words(q)?,
            gate: words(ffn)?,
            up: words(ffn)?,
            activated: words(ffn)?,
            shrunk: words(lora_rank)?,
            tail: device.alloc(4 * hidden)?,
            logits: device.alloc(4 * config.vocab)?,
            head_rows: 1,
        })
    }

    /// Makes room for x·Aᵀ of `m` tokens and this rank.
    pub fn widen_shrunk(&mut self, device: &dyn Device, m: usize, rank: usize) -> Result<(), Error> {
        if self.shrunk.bytes() < 4 * m * rank {
            self.shrunk = device.alloc(4 * m * rank)?;
        }
        Ok(())
    }

    /// Makes room for the logits of many rows at once, on the first call for them.
    pub fn widen_head(&mut self, device: &dyn Device, config: &Config) -> Result<(), Error> {
        let limit = device.caps().max_binding.min(LOGITS_BYTES);
        let rows = (limit / (4 * config.vocab)).clamp(1, CHUNK);
        if rows > self.head_rows {
            self.tail = device.alloc(4 * rows * config.hidden)?;
            self.logits = device.alloc(4 * rows * config.vocab)?;
            self.head_rows = rows;
        }
        Ok(())
    }
}
