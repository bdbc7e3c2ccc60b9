//! Many texts in one pass: each has a range of rows of one cache, and each token its text's adapter.
//!
//! ```text
//! pass    | text 3 | text 0 | text 5: a chunk of its prompt |      tokens that continue a text, then chunks
//! cache   | text 0 ....... | text 5 .............. | free | text 3 ..... |
//! spans   token i sees the rows of its own text up to itself
//! ```

use std::ops::Range;

use super::llama::{Llama, Pass, Place};
use super::session::Workspace;
use crate::device::Buffer;
use crate::error::Error;

/// What the texts of a batch share on the device.
pub struct Batch {
    /// A layer's keys, rotated, and values: f32[cache_rows, kv_heads·head_dim] each.
    cache: Vec<(Buffer, Buffer)>,
    cache_rows: usize,
    direct: bool,
    /// f32[context, head_dim]: cosines, sines.
    table: Buffer,
    context: usize,
    work: Workspace,
    rows: usize,
    logits: Vec<f32>,
}

/// Tokens of one text in a pass.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The next tokens of the text.
    pub ids: &'a [u32],
    /// How many tokens of it the cache holds already.
    pub begin: usize,
    /// The cache's row of its first token.
    pub at: usize,
    /// The slot of its adapter ([`Llama::stack`]); none: the base model.
    pub adapter: Option<usize>,
    /// Logits of how many of its last tokens are wanted.
    pub logits: usize,
}

/// Takes logits as they come: whose they are, as part and token of the part, and f32[rows, vocab].
pub type EachLogits<'a> = &'a mut dyn FnMut(&[(usize, usize)], &[f32]) -> Result<(), Error>;

impl Llama {
    /// A batch of texts of up to `context` tokens each, with room for `cache_rows` tokens in all and passes of up to
    /// `rows`. Errors: a context beyond the model's, memory.
    pub fn batch(&self, rows: usize, cache_rows: usize, context: usize) -> Result<Batch, Error> {
        let (device, config) = (&*self.device, &self.config);
        if !(1..=config.max_positions).contains(&context) || rows == 0 || cache_rows == 0 {
            let what = format!(
                "texts of {context} tokens, passes of {rows} and a cache of {cache_rows} were asked for; this model \
                 takes texts of 1 to {} tokens, and passes and cache need one token",
                config.max_positions
            );
            return Err(Error::Request(what));
        }
        let kv = config.kv_heads * config.head_dim;
        let bytes = 4usize.checked_mul(cache_rows).and_then(|n| n.checked_mul(kv));
        let bytes = bytes.filter(|bytes| *bytes <= device.caps().max_binding && cache_rows <= u32::MAX as usize);
        let Some(bytes) = bytes else {
            let most = device.caps().max_binding / (4 * kv);
            let what = format!("a cache of {cache_rows} tokens was asked for; this device binds {most}: ask for fewer");
            return Err(Error::Request(what));
        };
        let values = self.rope_table(context);
        let table = device.alloc(4 * values.len())?;
        device.write(&table, 0, bytemuck::cast_slice(&values))?;
        let mut work = Workspace::new(device, config, rows, 0)?;
        work.widen_head(device, config)?;
        let cache = (0..config.layers).map(|_| Ok((device.alloc(bytes)?, device.alloc(bytes)?)));
        Ok(Batch {
            cache: cache.collect::<Result<_, Error>>()?,
            cache_rows,
            direct: (4 * kv).is_multiple_of(device.caps().view_alignment),
            table,
            context,
            work,
            rows,
            logits: Vec::new(),
        })
    }

    /// Runs the parts' tokens through the model at once: their keys and values are in the cache afterwards, and `each`
    /// gets the logits that were asked for, in the order of the parts. Parts of one token come first. Errors: ids,
    /// positions or rows that there are not, more tokens than a pass takes, the device.
    pub fn pass(&self, batch: &mut Batch, parts: &[Part], each: EachLogits) -> Result<(), Error> {
        let device = &*self.device;
        let m = self.check_parts(batch, parts)?;
        let mut ids = Vec::with_capacity(m);
        let (mut positions, mut spans) = (Vec::with_capacity(m), Vec::with_capacity(m));
        let (mut adapters, mut places) = (Vec::with_capacity(m), Vec::with_capacity(parts.len()));
        let mut wanted: Vec<(usize, usize, usize)> = Vec::new();
        let mut rows = 0;
        for (i, part) in parts.iter().enumerate() {
            let (row, count) = (ids.len(), part.ids.len());
            ids.extend_from_slice(part.ids);
            positions.extend((part.begin..part.begin + count).map(|at| at as u32));
            let seen = part.at + part.begin + 1..part.at + part.begin + 1 + count;
            spans.extend(seen.map(|end| [part.at as u32, end as u32]));
            adapters.extend(std::iter::repeat_n(part.adapter.map_or(-1, |slot| slot as i32), count));
            places.push(Place { row, at: part.at + part.begin, count });
            wanted.extend((count - part.logits..count).map(|token| (i, token, row + token)));
            rows = rows.max(part.at + part.begin + count);
        }
        batch.work.widen_shrunk(device, batch.rows, self.stacked_rank())?;
        device.write(&batch.work.adapter, 0, bytemuck::cast_slice(&adapters))?;

        // Single tokens of many texts, each with keys of its own, are another kernel's work than chunks are.
        let single = parts.iter().take_while(|part| part.ids.len() == 1).count();
        let row_bytes = 4 * self.config.heads * self.config.head_dim;
        let mixed = single > 0 && single < m && (single * row_bytes).is_multiple_of(device.caps().view_alignment);
        let pass = Pass {
            m,
            work: &batch.work,
            cache: &batch.cache,
            rows,
            table: &batch.table,
            positions: batch.context,
            places: &places,
            apart: if mixed { single } else { 0 },
            adapted: parts.iter().any(|part| part.adapter.is_some()),
            direct: batch.direct,
        };
        self.step(&pass, &ids, &positions, &spans, &mut |_, _| Ok(()))?;

        let vocab = self.config.vocab;
        for wanted in wanted.chunks(batch.work.head_rows) {
            let mut ranges: Vec<Range<usize>> = Vec::new();
            for &(_, _, row) in wanted {
                match ranges.last_mut() {
                    Some(last) if last.end == row => last.end += 1,
                    _ => ranges.push(row..row + 1),
                }
            }
            self.queue_head(&batch.work, &ranges)?;
            batch.logits.resize(wanted.len() * vocab, 0.0);
            device.read(&batch.work.logits, 0, bytemuck::cast_slice_mut(&mut batch.logits))?;
            let whose: Vec<(usize, usize)> = wanted.iter().map(|&(part, token, _)| (part, token)).collect();
            each(&whose, &batch.logits)?;
        }
        Ok(())
    }

    /// Checks parts against the batch; how many tokens they have together.
    fn check_parts(&self, batch: &Batch, parts: &[Part]) -> Result<usize, Error> {
        let mut m = 0;
        for part in parts {
            self.check_ids(part.ids)?;
            m += part.ids.len();
            let end = part.begin.checked_add(part.ids.len()).filter(|end| *end <= batch.context);
            if end.and_then(|end| end.checked_add(part.at)).is_none_or(|end| end > batch.cache_rows) {
                let what = format!(
                    "{} tokens after {} from row {} of the cache on do not fit texts of {} and a cache of {}",
                    part.ids.len(),
                    part.begin,
                    part.at,
                    batch.context,
                    batch.cache_rows
                );
                return Err(Error::Request(what));
            }
            if part.logits > part.ids.len() {
                let what = format!("logits of {} of {} tokens were asked for", part.logits, part.ids.len());
                return Err(Error::Request(what));
            }
        }
        if m == 0 || m > batch.rows {
            return Err(Error::Request(format!("{m} tokens were given; a pass takes 1 to {}", batch.rows)));
        }
        Ok(m)
    }
}

impl Batch {
    /// Tokens the cache has room for.
    pub fn cache_rows(&self) -> usize {
        self.cache_rows
    }

    /// The most tokens of a text.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The most tokens of a pass.
    pub fn rows(&self) -> usize {
        self.rows
    }
}
