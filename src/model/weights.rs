//! Weights on a device: matrices in the formats kernels take, cut by rows into shards that a device can bind.
//!
//! ```text
//! in the file                     on the device
//! F32 F16 BF16                    the same bytes; a device that can read the mapping takes no copy
//! GGUF blocks                     q4 or q8, re-laid without a change of value
//! bitsandbytes' 4 bits            nf4 or nf4dq, the same bytes
//! any of them, `LoadOptions::quant` set   decoded, then encoded: layers' projections only
//! ```
//!
//! Tensors are read a block of rows at a time, and the pages of the file that were read are given back, so loading
//! needs little more memory than the weights themselves.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

use super::bnb4::{Absmax, Bnb4View};
use super::checkpoint::{Checkpoint, Encoding, TensorView};
use super::linear::{Embedding, Linear, Matrix, Shard};
use crate::device::{Buffer, Device};
use crate::error::Error;
use crate::quant::gguf_blocks::{self, GgmlType};
use crate::quant::{self, Format, Packed, PartSpec};
use crate::tensor::{Bytes, HostTensor};

/// How weights are brought to a device.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Quantize the projections of the layers to this format; embeddings, output head, norms and biases stay as they
    /// are. `None` keeps the file's values exactly.
    pub quant: Option<Format>,
    /// Bind at most this many bytes at once, where the device would allow more: weights split into more shards.
    pub max_binding: Option<usize>,
    /// Round what meets the weights to bf16 where the device multiplies it faster, on tensor cores and for many rows.
    pub bf16: bool,
    /// Take this many layers, from the first on, as if the model had no more; `None` takes all.
    pub layers: Option<usize>,
}

/// Values decoded at once while a tensor is read, which bounds the memory that takes: 64 MiB of f32.
pub(super) const BLOCK_VALUES: usize = 16 << 20;
/// Blocks and shards begin at multiples of this row, so that offsets into every part are multiples of 4 bytes.
const ROW_UNIT: usize = 4;

/// Brings the tensors of a checkpoint to a device.
pub struct Loader<'a> {
    device: &'a dyn Device,
    checkpoint: &'a Checkpoint,
    quant: Option<Format>,
    bf16: bool,
    max_binding: usize,
}

impl<'a> Loader<'a> {
    /// A loader of `checkpoint`'s tensors.
    pub fn new(device: &'a dyn Device, checkpoint: &'a Checkpoint, options: &LoadOptions) -> Loader<'a> {
        let limit = device.caps().max_binding;
        let max_binding = options.max_binding.map_or(limit, |lower| lower.min(limit));
        Loader { device, checkpoint, quant: options.quant, bf16: options.bf16, max_binding }
    }

    /// A vector as f32: a norm's gain or bias.
    pub fn vector(&self, name: &str) -> Result<Buffer, Error> {
        self.upload(bytemuck::cast_slice(&self.values(name)?))
    }

    /// The projection `{name}.weight`, with `{name}.bias` if `bias`. `quantize` lets [`LoadOptions::quant`] apply.
    pub fn linear(&self, name: &str, bias: bool, quantize: bool) -> Result<Linear, Error> {
        let quant = self.quant.filter(|_| quantize);
        let mut linear = Linear::new(self.device, self.matrix(&format!("{name}.weight"), quant)?)?;
        linear.bf16 = self.bf16;
        if bias {
            let values = self.values(&format!("{name}.bias"))?;
            let shards = linear.matrix.shards.iter();
            let cut = shards.map(|s| self.upload(bytemuck::cast_slice(&values[s.y0..s.y0 + s.n])));
            linear.bias = Some(cut.collect::<Result<_, _>>()?);
        }
        Ok(linear)
    }

    /// The table `name`, in the file's own format.
    pub fn embedding(&self, name: &str) -> Result<Embedding, Error> {
        Ok(Embedding::new(self.matrix(name, None)?))
    }

    /// The values of a vector, those of permuted heads in Hugging Face's order.
    fn values(&self, name: &str) -> Result<Vec<f32>, Error> {
        let view = self.checkpoint.tensor(name)?;
        let values = view.to_f32()?;
        give_back(&view);
        Ok(match view.rope_permuted {
            true => unpermute(bytemuck::cast_slice(&values), 4, self.checkpoint.config.head_dim),
            false => values,
        })
    }

    fn upload(&self, bytes: &[u8]) -> Result<Buffer, Error> {
        let buffer = self.device.alloc(bytes.len())?;
        self.device.write(&buffer, 0, bytes)?;
        Ok(buffer)
    }

    /// The matrix `name`, quantized to `quant` unless it is of that format already.
    pub fn matrix(&self, name: &str, quant: Option<Format>) -> Result<Matrix, Error> {
        let source = Source::open(self.checkpoint, name)?;
        let format = quant.unwrap_or(source.format);
        let Source { n, k, .. } = source;
        format.check(n, k).map_err(|error| source.wrong(error))?;

        let per_shard = self.rows_per_shard(&source, format)?;
        let rows = (0..n).step_by(per_shard).map(|y0| (y0, per_shard.min(n - y0)));
        let shards = match &source.values {
            Values::Plain(view) if format == source.format && !view.rope_permuted => rows
                .map(|(y0, n)| {
                    let row = view.bytes.len() / source.n;
                    let range = view.offset + y0 * row..view.offset + (y0 + n) * row;
                    Ok(Shard { y0, n, parts: vec![self.device.import(view.mmap, range)?] })
                })
                .collect::<Result<_, Error>>()?,
            _ => {
                let shards = rows.map(|(y0, n)| self.empty_shard(format, y0, n, k)).collect::<Result<Vec<_>, _>>()?;
                self.fill(&source, format, &shards)?;
                shards
            }
        };
        source.give_back();
        Ok(Matrix { n, k, format, shards })
    }

    /// Rows whose largest part still fits a binding.
    fn rows_per_shard(&self, source: &Source, format: Format) -> Result<usize, Error> {
        let Source { n, k, .. } = *source;
        let parts = format.parts(n, k);
        let row = parts.iter().map(|part| part_range(part, k, 0, n).len().div_ceil(n)).max().unwrap_or(1);
        let unit = shard_unit(format, k);
        let rows = self.max_binding / row;
        match (rows >= n, rows / unit * unit) {
            (true, _) => Ok(n),
            (false, 0) => Err(source.wrong(format!(
                "{unit} rows take {} bytes in one part; the device binds at most {}",
                unit * row,
                self.max_binding
            ))),
            (false, rows) => Ok(rows),
        }
    }

    fn empty_shard(&self, format: Format, y0: usize, n: usize, k: usize) -> Result<Shard, Error> {
        let parts = format.parts(n, k);
        let alloc = |part: &PartSpec| self.device.alloc(part_range(part, k, 0, n).len());
        Ok(Shard { y0, n, parts: parts.iter().map(alloc).collect::<Result<_, _>>()? })
    }

    /// Reads the matrix block by block and writes each where its shards have it.
    fn fill(&self, source: &Source, format: Format, shards: &[Shard]) -> Result<(), Error> {
        let Source { n, k, .. } = *source;
        // One offset stands for a whole nf4dq matrix, so making one takes all of it at once.
        let whole = format != source.format && format == Format::Nf4Dq;
        let unit = source.unit(self.checkpoint.config.head_dim);
        let per_block = if whole { n } else { (BLOCK_VALUES / k).next_multiple_of(unit).max(unit) };
        for row0 in (0..n).step_by(per_block) {
            let count = per_block.min(n - row0);
            let mut block = source.rows(row0, count, self.checkpoint.config.head_dim)?;
            if block.format != format {
                block = quant::encode(format, count, k, &quant::decode(&block)).map_err(|error| source.wrong(error))?;
            }
            for shard in shards {
                let (begin, end) = (row0.max(shard.y0), (row0 + count).min(shard.y0 + shard.n));
                if begin >= end {
                    continue;
                }
                for ((spec, part), target) in format.parts(n, k).iter().zip(&block.parts).zip(&shard.parts) {
                    let from = part_range(spec, k, begin - row0, end - begin);
                    let to = part_range(spec, k, begin - shard.y0, end - begin);
                    self.device.write(target, to.start, &part.bytes.as_slice()[from])?;
                }
            }
        }
        Ok(())
    }
}

/// Bytes of a part that belong to rows `row0..row0 + n` of a matrix with `k` columns, where row 0 begins the part.
pub(super) fn part_range(part: &PartSpec, k: usize, row0: usize, n: usize) -> Range<usize> {
    let size = part.dtype.size();
    match (part.name, part.shape) {
        (_, (0, _)) => 0..0,
        (_, (_, Some(columns))) => row0 * columns * size..(row0 + n) * columns * size,
        ("absmax2", _) => {
            let nested = |row: usize| (row * (k / quant::NF4_BLOCK)).div_ceil(quant::NF4_NESTED_BLOCK);
            nested(row0) * size..nested(row0 + n) * size
        }
        (_, (len, None)) => 0..len * size,
    }
}

/// Shards of a format begin at multiples of this many rows: nested blocks of nf4dq run through the rows and must not
/// be cut.
fn shard_unit(format: Format, k: usize) -> usize {
    match format {
        Format::Nf4Dq => lcm(ROW_UNIT, quant::NF4_NESTED_BLOCK / gcd(quant::NF4_NESTED_BLOCK, k / quant::NF4_BLOCK)),
        _ => ROW_UNIT,
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 {
        a
    } else {
        gcd(b, a % b)
    }
}

pub(super) fn lcm(a: usize, b: usize) -> usize {
    a / gcd(a, b) * b
}

/// A matrix in its file.
pub(super) struct Source<'a> {
    pub(super) n: usize,
    pub(super) k: usize,
    /// The format its bytes become without a change of value.
    pub(super) format: Format,
    values: Values<'a>,
}

enum Values<'a> {
    Plain(TensorView<'a>),
    Blocks(TensorView<'a>, GgmlType),
    Bnb4(Box<Bnb4View<'a>>),
}

impl<'a> Source<'a> {
    pub(super) fn open(checkpoint: &'a Checkpoint, name: &str) -> Result<Source<'a>, Error> {
        if let Some(view) = checkpoint.bnb4(name) {
            let view = view?;
            let [n, k] = view.shape;
            let levels = view.quant_map.to_f32()?;
            if levels != quant::nf4::LEVELS {
                return Err(view.quant_map.wrong("holds other levels than NF4's: quantize again"));
            }
            let format = match view.absmax {
                Absmax::Plain(_) => Format::Nf4,
                Absmax::Nested { .. } => Format::Nf4Dq,
            };
            return Ok(Source { n, k, format, values: Values::Bnb4(Box::new(view)) });
        }
        let view = checkpoint.tensor(name)?;
        let &[n, k] = &view.shape[..] else {
            return Err(view.wrong("is not a matrix"));
        };
        let plain = |format, view| Ok(Source { n, k, format, values: Values::Plain(view) });
        match view.encoding {
            Encoding::F32 => plain(Format::F32, view),
            Encoding::F16 => plain(Format::F16, view),
            Encoding::BF16 => plain(Format::BF16, view),
            Encoding::Ggml(id) => {
                let wrong = |error: quant::Error| view.wrong(error.to_string());
                let kind = GgmlType::from_id(id).map_err(wrong)?;
                let row = kind.matrix_bytes(1, k).map_err(wrong)?;
                if Some(view.bytes.len()) != row.checked_mul(n) || n == 0 {
                    return Err(view.wrong(format!("has {} bytes; {n} rows of {row} are expected", view.bytes.len())));
                }
                let format = gguf_blocks::relay(kind, &view.bytes[..row], 1, k).map_err(wrong)?.format;
                Ok(Source { n, k, format, values: Values::Blocks(view, kind) })
            }
            other => Err(view.wrong(format!("is stored as {}, which no matrix can be", other.name()))),
        }
    }

    fn view(&self) -> &TensorView<'a> {
        match &self.values {
            Values::Plain(view) | Values::Blocks(view, _) => view,
            Values::Bnb4(view) => &view.codes,
        }
    }

    pub(super) fn wrong(&self, what: impl ToString) -> Error {
        self.view().wrong(what.to_string())
    }

    /// Blocks of rows begin at multiples of this many.
    pub(super) fn unit(&self, head_dim: usize) -> usize {
        let unit = shard_unit(self.format, self.k);
        if self.view().rope_permuted {
            lcm(unit, head_dim)
        } else {
            unit
        }
    }

    /// Rows `row0..row0 + n` in the source's format, a multiple of [`Source::unit`] first, in Hugging Face's order.
    pub(super) fn rows(&self, row0: usize, n: usize, head_dim: usize) -> Result<Packed, Error> {
        let mut packed = match &self.values {
            Values::Plain(view) => {
                let row = view.bytes.len() / self.n;
                let spec = &self.format.parts(n, self.k)[0];
                let part = tensor(spec, &view.bytes[row0 * row..(row0 + n) * row]);
                Packed { format: self.format, rows: n, cols: self.k, parts: vec![part] }
            }
            Values::Blocks(view, kind) => {
                let row = view.bytes.len() / self.n;
                gguf_blocks::relay(*kind, &view.bytes[row0 * row..(row0 + n) * row], n, self.k)
                    .map_err(|error| self.wrong(error))?
            }
            Values::Bnb4(view) => self.bnb4_rows(view, row0, n),
        };
        if packed.format != self.format {
            return Err(self.wrong("changes its format from row to row"));
        }
        if self.view().rope_permuted {
            for part in packed.parts.iter_mut().filter(|part| !part.is_empty()) {
                let row = part.bytes.len() / n;
                part.bytes = Bytes::from_slice(&unpermute::<u8>(part.bytes.as_slice(), row, head_dim));
            }
        }
        Ok(packed)
    }

    fn bnb4_rows(&self, view: &Bnb4View, row0: usize, n: usize) -> Packed {
        let offset_bytes;
        let mut parts = vec![view.codes.bytes];
        match &view.absmax {
            Absmax::Plain(absmax) => parts.push(absmax.bytes),
            Absmax::Nested { codes, absmax, quant_map, offset } => {
                offset_bytes = offset.to_le_bytes();
                parts.extend([codes.bytes, quant_map.bytes, absmax.bytes, &offset_bytes]);
            }
        }
        let of_matrix = self.format.parts(self.n, self.k);
        let of_rows = self.format.parts(n, self.k);
        let cut = of_matrix.iter().zip(&of_rows).zip(parts);
        let parts = cut.map(|((whole, spec), bytes)| tensor(spec, &bytes[part_range(whole, self.k, row0, n)]));
        Packed { format: self.format, rows: n, cols: self.k, parts: parts.collect() }
    }

    pub(super) fn give_back(&self) {
        match &self.values {
            Values::Plain(view) | Values::Blocks(view, _) => give_back(view),
            Values::Bnb4(view) => {
                give_back(&view.codes);
                match &view.absmax {
                    Absmax::Plain(absmax) => give_back(absmax),
                    Absmax::Nested { codes, absmax, .. } => [codes, absmax].into_iter().for_each(give_back),
                }
            }
        }
    }
}

/// A part's bytes as a tensor.
fn tensor(spec: &PartSpec, bytes: &[u8]) -> HostTensor {
    HostTensor { dtype: spec.dtype, shape: spec.dims(), bytes: Bytes::from_slice(bytes) }
}

/// Rows of `row` bytes in GGUF's order to Hugging Face's, head by head: of a head's stored rows, 2i+j becomes row
/// j·head_dim/2 + i.
pub(super) fn unpermute<T: bytemuck::Pod>(bytes: &[u8], row: usize, head_dim: usize) -> Vec<T> {
    let mut out = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    let target: &mut [u8] = bytemuck::cast_slice_mut(&mut out);
    for (head, target) in bytes.chunks(head_dim * row).zip(target.chunks_mut(head_dim * row)) {
        for (stored, source) in head.chunks(row).enumerate() {
            let at = (stored % 2 * (head_dim / 2) + stored / 2) * row;
            target[at..at + row].copy_from_slice(source);
        }
    }
    out
}

/// Tells the system that the pages of a tensor need not stay in memory: it reads them again where they are used.
fn give_back(view: &TensorView) {
    give_back_range(view.mmap, view.offset..view.offset + view.bytes.len());
}

#[cfg(unix)]
fn give_back_range(map: &Arc<Mmap>, range: Range<usize>) {
    use memmap2::UncheckedAdvice;
    if range.is_empty() {
        return;
    }
    // SAFETY: the mapping is of a file and is never written, so a page dropped comes back with the same bytes.
    let done = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
    if let Err(error) = done {
        log::debug!("pages of a mapped file stay in memory: {error}");
    }
}

#[cfg(not(unix))]
fn give_back_range(_: &Arc<Mmap>, _: Range<usize>) {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;

    #[test]
    fn heads_come_back_in_hugging_face_order() {
        // Two heads of 4 rows; row 2i+j of a head holds Hugging Face's row j*2 + i.
        let stored: Vec<u8> = vec![0, 2, 1, 3, 4, 6, 5, 7];
        let rows: Vec<u8> = stored.iter().flat_map(|&row| [row, 100 + row]).collect();
        let expected: Vec<u8> = (0..8).flat_map(|row| [row, 100 + row]).collect();
        assert_eq!(unpermute::<u8>(&rows, 2, 4), expected);
    }

    #[test]
    fn shards_of_nested_nf4_begin_where_nested_blocks_do() {
        for k in [64, 192, 576, 4096, 64 * 256] {
            let unit = shard_unit(Format::Nf4Dq, k);
            assert_eq!(unit * (k / 64) % 256, 0, "k {k}");
            assert_eq!(unit % ROW_UNIT, 0, "k {k}");
        }
        assert_eq!(shard_unit(Format::Nf4, 64), ROW_UNIT);
    }

    #[test]
    fn ranges_of_parts_tile_them() {
        let (n, k) = (24, 192);
        let formats = [
            Format::F16,
            Format::Q4 { group: 32, wide: true },
            Format::Q8 { group: 16, wide: false, affine: false },
            Format::Nf4,
        ];
        for format in formats {
            for part in format.parts(n, k) {
                let (a, b) = (part_range(&part, k, 0, 8), part_range(&part, k, 8, 16));
                assert_eq!(
                    (a.start, a.end, Some(b.end)),
                    (0, b.start, part.bytes()),
                    "{} {}",
                    format.name(),
                    part.name
                );
            }
        }
        let absmax2 = Format::Nf4Dq.parts(1024, k)[3];
        assert_eq!(absmax2.dtype, Dtype::F32);
        assert_eq!(part_range(&absmax2, k, 256, 256), 3 * 4..6 * 4);
    }
}
