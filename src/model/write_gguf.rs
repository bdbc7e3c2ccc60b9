//! Writes a model as one GGUF file: the source's header with another file type, or one made from a Hugging Face
//! directory in the words that llama.cpp reads.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::checkpoint::{Checkpoint, Source};
use super::config::Config;
use super::generate::{open_chat_template, open_tokenizer};
use super::gguf::Gguf;
use super::hf::HfDir;
use super::write::{encode, Item, Sums, Target};
use super::{layout, write_vocab};
use crate::aside::Aside;
use crate::error::Error;
use crate::ops::rope::{self, Scaling};
use crate::quant::gguf_blocks::{self, GgmlType};
use crate::quant::{Format, Packed};

/// The file's name.
pub(super) const FILE: &str = "model.gguf";
/// Tensors begin at multiples of this.
const ALIGN: usize = 32;
/// The version of the quantized blocks' layouts that files of today name.
const QUANTIZATION_VERSION: u32 = 2;

/// A row of the tensor table.
struct Row {
    name: String,
    shape: Vec<usize>,
    kind: GgmlType,
    bytes: usize,
}

/// Writes the file; tells `on_item` of each tensor done and gives how far each is from the source.
pub(super) fn write(
    path: &Path,
    checkpoint: &Checkpoint,
    items: &[Item],
    target: Target,
    on_item: &mut dyn FnMut(&Item),
) -> Result<Vec<Sums>, Error> {
    let file_type: u32 = if target == Target::Q8 { 7 } else { 3 }; // llama.cpp's "mostly Q8_0", "mostly Q4_1"
    let mut pairs = match &checkpoint.source {
        Source::Gguf(gguf) => copied(gguf),
        Source::Hf(dir) => made(checkpoint, dir)?,
    };
    pairs.push(("general.file_type".into(), u32_value(file_type)));
    pairs.push(("general.quantization_version".into(), u32_value(QUANTIZATION_VERSION)));
    // The architecture first, as other writers have it.
    pairs.sort_by_key(|(key, _)| (key != "general.architecture", !key.starts_with("general."), key.clone()));

    let divisors = rope_divisors(&checkpoint.config);
    let mut rows = items.iter().map(|item| row(checkpoint, item)).collect::<Result<Vec<_>, _>>()?;
    if let Some(divisors) = &divisors {
        let name = "rope_freqs.weight".to_string();
        rows.push(Row { name, shape: vec![divisors.len()], kind: GgmlType::F32, bytes: 4 * divisors.len() });
    }

    let fail = |cause| Error::io(path, cause);
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(fail)?);
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(fail);
    let header = header(&pairs, &rows);
    put(&header)?;
    put(&vec![0; padding(header.len())])?;
    let head_dim = checkpoint.config.head_dim;
    let mut all_sums = Vec::with_capacity(items.len());
    for (item, row) in items.iter().zip(&rows) {
        let permuted = layout::is_rope_permuted(&checkpoint.config, &item.name);
        let sums = encode(checkpoint, item, &mut |_, packed| {
            let bytes = stored(packed).map_err(|error| Error::tensor(path, &row.name, error.to_string()))?;
            match permuted {
                // A vector is one row of single values.
                true if item.shape.len() == 1 => put(&permute(&bytes, 4, head_dim)),
                true => put(&permute(&bytes, bytes.len() / packed.rows, head_dim)),
                false => put(&bytes),
            }
        })?;
        put(&vec![0; padding(row.bytes)])?;
        all_sums.push(sums);
        on_item(item);
    }
    if let Some(divisors) = divisors {
        put(bytemuck::cast_slice(&divisors))?;
        put(&vec![0; padding(4 * divisors.len())])?;
    }
    file.flush().map_err(fail)?;
    Ok(all_sums)
}

/// A plain f32 matrix of an adapter's file.
pub(super) struct Plain<'a> {
    /// Its name in the file.
    pub name: String,
    /// Rows, columns.
    pub shape: [usize; 2],
    /// Its values, rows in Hugging Face's order.
    pub values: &'a [f32],
    /// Width of a head where rows are stored in the order of interleaved rotary embeddings.
    pub head_dim: Option<usize>,
}

/// Writes a LoRA adapter, whole or not at all.
pub(super) fn write_adapter(path: &Path, arch: &str, alpha: f32, tensors: &[Plain]) -> Result<(), Error> {
    let pairs = [
        ("general.architecture".to_string(), string_value(arch)),
        ("general.type".to_string(), string_value("adapter")),
        ("general.quantization_version".to_string(), u32_value(QUANTIZATION_VERSION)),
        ("adapter.type".to_string(), string_value("lora")),
        ("adapter.lora.alpha".to_string(), f32_value(alpha)),
    ];
    let row = |tensor: &Plain| Row {
        name: tensor.name.clone(),
        shape: tensor.shape.to_vec(),
        kind: GgmlType::F32,
        bytes: 4 * tensor.values.len(),
    };
    let header = header(&pairs, &tensors.iter().map(row).collect::<Vec<_>>());
    let mut file = Aside::create(path)?;
    file.write(&header)?;
    file.write(&vec![0; padding(header.len())])?;
    for Plain { shape, values, head_dim, .. } in tensors {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        match head_dim {
            Some(head_dim) => file.write(&permute(bytes, 4 * shape[1], *head_dim))?,
            None => file.write(bytes)?,
        }
        file.write(&vec![0; padding(bytes.len())])?;
    }
    file.commit()
}

fn padding(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN) - bytes
}

fn row(checkpoint: &Checkpoint, item: &Item) -> Result<Row, Error> {
    let wrong = |what: String| Error::tensor(&checkpoint.files[0], &item.name, what);
    let name = layout::name_to_gguf(&item.name).ok_or_else(|| wrong("has no name in GGUF".into()))?;
    let kind = match item.format {
        Format::F32 => GgmlType::F32,
        Format::Q4 { .. } => GgmlType::Q4_1,
        Format::Q8 { .. } => GgmlType::Q8_0,
        _ => GgmlType::F16,
    };
    let (n, k) = item.dims();
    let bytes = kind.matrix_bytes(n, k).map_err(|error| wrong(error.to_string()))?;
    Ok(Row { name, shape: item.shape.clone(), kind, bytes })
}

/// Everything before the tensors' data.
fn header(pairs: &[(String, Vec<u8>)], rows: &[Row]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((rows.len() as u64).to_le_bytes());
    out.extend((pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        put_string(&mut out, key);
        out.extend(value);
    }
    let mut offset = 0u64;
    for row in rows {
        put_string(&mut out, &row.name);
        out.extend((row.shape.len() as u32).to_le_bytes());
        for &dim in row.shape.iter().rev() {
            out.extend((dim as u64).to_le_bytes());
        }
        out.extend(row.kind.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (row.bytes + padding(row.bytes)) as u64;
    }
    out
}

/// The bytes of rows as GGUF has them.
fn stored(packed: &Packed) -> Result<Cow<'_, [u8]>, crate::quant::Error> {
    match packed.format {
        Format::Q4 { .. } => gguf_blocks::to_gguf_q4_1(packed).map(Cow::Owned),
        Format::Q8 { .. } => gguf_blocks::to_gguf_q8_0(packed).map(Cow::Owned),
        _ => Ok(Cow::Borrowed(packed.parts[0].bytes.as_slice())),
    }
}

/// Rows of `row` bytes in Hugging Face's order to GGUF's, head by head: row j·head_dim/2 + i of a head becomes 2i+j.
fn permute(bytes: &[u8], row: usize, head_dim: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    for (head, out) in bytes.chunks(head_dim * row).zip(out.chunks_mut(head_dim * row)) {
        for (stored, out) in out.chunks_mut(row).enumerate() {
            let at = (stored % 2 * (head_dim / 2) + stored / 2) * row;
            out.copy_from_slice(&head[at..at + row]);
        }
    }
    out
}

/// What Llama 3's scaling divides each frequency by: GGUF carries it as a tensor.
fn rope_divisors(config: &Config) -> Option<Vec<f32>> {
    if !matches!(config.rope_scaling, Scaling::Llama3 { .. }) {
        return None;
    }
    let frequencies = |scaling| rope::frequencies(config.head_dim, config.rope_theta as f32, scaling);
    let (plain, scaled) = (frequencies(Scaling::None), frequencies(config.rope_scaling));
    Some(plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect())
}

/// The source's pairs, but those that are about its own tensors.
fn copied(gguf: &Gguf) -> Vec<(String, Vec<u8>)> {
    let own = ["general.file_type", "general.quantization_version", "general.alignment"];
    let kept = gguf.keys().filter(|key| !own.contains(key) && !key.starts_with("split."));
    kept.filter_map(|key| Some((key.to_string(), gguf.stored(key)?.to_vec()))).collect()
}

/// The pairs that say what a Hugging Face directory says. An error where GGUF has no word for its tokenizer.
fn made(checkpoint: &Checkpoint, dir: &HfDir) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let config = &checkpoint.config;
    let arch = config.arch.name();
    let folder = dir.path.canonicalize().unwrap_or_else(|_| dir.path.clone());
    let name = folder.file_name().map_or("model".into(), |name| name.to_string_lossy());
    let mut pairs = vec![
        ("general.architecture".to_string(), string_value(arch)),
        ("general.type".to_string(), string_value("model")),
        ("general.name".to_string(), string_value(&name)),
    ];
    let mut own = |key: &str, value: Vec<u8>| pairs.push((format!("{arch}.{key}"), value));
    for (key, size) in [
        ("block_count", config.layers),
        ("context_length", config.max_positions),
        ("embedding_length", config.hidden),
        ("feed_forward_length", config.ffn),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab),
    ] {
        own(key, u32_value(size as u32)); // sizes were checked to be below 2^26
    }
    own("attention.layer_norm_rms_epsilon", f32_value(config.norm_eps));
    own("rope.freq_base", f32_value(config.rope_theta as f32));
    if let Scaling::Linear { factor } = config.rope_scaling {
        own("rope.scaling.type", string_value("linear"));
        own("rope.scaling.factor", f32_value(factor));
    }

    let vocab = write_vocab::Vocab::open(dir, config.vocab)?;
    let tokenizer = open_tokenizer(checkpoint)?;
    let mut put = |key: &str, value: Vec<u8>| pairs.push((format!("tokenizer.ggml.{key}"), value));
    put("model", string_value("gpt2"));
    put("pre", string_value(vocab.pre));
    put("tokens", strings_value(&vocab.tokens));
    put("merges", strings_value(&vocab.merges));
    put("token_type", i32s_value(&vocab.types));
    let ids = [("bos", tokenizer.bos()), ("eos", tokenizer.eos()), ("eot", tokenizer.eot()), ("padding", config.pad)];
    for (key, id) in ids.into_iter().filter_map(|(key, id)| Some((key, id?))) {
        put(&format!("{key}_token_id"), u32_value(id));
    }
    put("add_bos_token", [&7u32.to_le_bytes()[..], &[tokenizer.add_bos() as u8]].concat());
    if let Some(template) = open_chat_template(checkpoint)? {
        pairs.push(("tokenizer.chat_template".into(), string_value(&template)));
    }
    Ok(pairs)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn u32_value(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

fn f32_value(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

fn string_value(text: &str) -> Vec<u8> {
    let mut out = 8u32.to_le_bytes().to_vec();
    put_string(&mut out, text);
    out
}

fn strings_value(texts: &[String]) -> Vec<u8> {
    let mut out = [9u32.to_le_bytes(), 8u32.to_le_bytes()].concat();
    out.extend((texts.len() as u64).to_le_bytes());
    texts.iter().for_each(|text| put_string(&mut out, text));
    out
}

fn i32s_value(values: &[i32]) -> Vec<u8> {
    let mut out = [9u32.to_le_bytes(), 5u32.to_le_bytes()].concat();
    out.extend((values.len() as u64).to_le_bytes());
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::unpermute;

    #[test]
    fn rows_of_heads_go_there_and_back() {
        let (head_dim, row) = (6, 5);
        let bytes: Vec<u8> = (0..2 * head_dim * row).map(|i| i as u8).collect();
        let there = permute(&bytes, row, head_dim);
        assert_ne!(there, bytes);
        assert_eq!(unpermute::<u8>(&there, row, head_dim), bytes);
    }
}
