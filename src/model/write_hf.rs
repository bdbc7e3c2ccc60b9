//! Writes a model as a Hugging Face directory whose layers are in bitsandbytes' NF4, as transformers saves and loads
//! it: see [`super::bnb4`] for the names of the parts.
//!
//! From a Hugging Face directory `config.json` is kept with a `quantization_config` added, and the tokenizer's files
//! are copied. From a GGUF file they are made of its header.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{json, Map, Value};

use super::checkpoint::{Checkpoint, Source};
use super::config::{Arch, Config};
use super::generate::{open_chat_template, open_tokenizer};
use super::gguf::Gguf;
use super::hf::HfDir;
use super::weights::part_range;
use super::write::{encode, encode_changed, Item, Sums, Target};
use crate::error::Error;
use crate::ops::rope::Scaling;
use crate::quant::{self, nf4, Format, Packed};

/// Everything such a directory may hold.
pub(super) const FILES: &[&str] = &[
    WEIGHTS,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];
const WEIGHTS: &str = "model.safetensors";
/// Files that are copied as they are, where the source has them.
const COPIED: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];
/// The longest of them that is copied, in bytes.
const MAX_COPY: u64 = 256 << 20;
/// Bytes of a matrix's JSON, which ends in blanks: the offset in it is known only when the matrix is done.
const STATE_BYTES: usize = 256;
/// Tensors begin at multiples of this, so that mapped weights of any type are aligned.
const ALIGN: usize = 64;

/// A tensor of the file: name, element type, shape, bytes.
struct Entry {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
}

/// Writes the directory `dir`; tells `on_item` of each tensor done and gives how far each is from the source.
pub(super) fn write(
    dir: &Path,
    checkpoint: &Checkpoint,
    items: &[Item],
    target: Target,
    on_item: &mut dyn FnMut(&Item),
) -> Result<Vec<Sums>, Error> {
    let quantization = Some(quantization_config(target == Target::Nf4Dq));
    write_files(dir, checkpoint, quantization)?;
    let path = dir.join(WEIGHTS);
    let fail = |cause| Error::io(&path, cause);
    let (header, places) = lay_out(items);
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(&path).map_err(fail)?);
    file.write_all(&header).map_err(fail)?;
    let mut put = |name: &str, offset: usize, bytes: &[u8]| {
        let at = SeekFrom::Start((places[name] + offset) as u64);
        file.seek(at).and_then(|_| file.write_all(bytes)).map_err(fail)
    };
    let mut all_sums = Vec::with_capacity(items.len());
    for item in items {
        let name = &item.name;
        let (n, k) = item.dims();
        let names = part_names(item);
        let whole = item.format.parts(n, k);
        let mut offset = 0.0;
        let sums = encode(checkpoint, item, &mut |row0, packed: &Packed| {
            for ((part, spec), name) in packed.parts.iter().zip(&whole).zip(&names) {
                put(name, part_range(spec, k, row0, packed.rows).start, part.bytes.as_slice())?;
            }
            if packed.format == Format::Nf4Dq {
                offset = packed.parts[4].f32()[0];
            }
            Ok(())
        })?;
        if matches!(item.format, Format::Nf4 | Format::Nf4Dq) {
            put(&format!("{name}.quant_map"), 0, bytemuck::cast_slice(&nf4::LEVELS))?;
            put(&state_name(name), 0, &state(item, offset))?;
        }
        all_sums.push(sums);
        on_item(item);
    }
    file.flush().map_err(fail)?;
    Ok(all_sums)
}

/// Writes `dir` with plain values, `change` told the name and the first row of each block of them.
pub(super) fn write_plain(
    dir: &Path,
    checkpoint: &Checkpoint,
    items: &[Item],
    change: &dyn Fn(&str, usize, &mut [f32]) -> bool,
    on_item: &mut dyn FnMut(&Item),
) -> Result<(), Error> {
    write_files(dir, checkpoint, None)?;
    let path = dir.join(WEIGHTS);
    let fail = |cause| Error::io(&path, cause);
    let (header, places) = lay_out(items);
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(&path).map_err(fail)?);
    file.write_all(&header).map_err(fail)?;
    for item in items {
        file.seek(SeekFrom::Start(places[&item.name] as u64)).map_err(fail)?;
        encode_changed(checkpoint, item, &|row0, values| change(&item.name, row0, values), &mut |_, packed| {
            file.write_all(packed.parts[0].bytes.as_slice()).map_err(fail)
        })?;
        on_item(item);
    }
    file.flush().map_err(fail)
}

/// Everything but the weights.
fn write_files(dir: &Path, checkpoint: &Checkpoint, quantization: Option<Value>) -> Result<(), Error> {
    match &checkpoint.source {
        Source::Hf(source) => copy_files(dir, source, quantization),
        Source::Gguf(gguf) => make_files(dir, checkpoint, gguf, quantization),
    }
}

/// The names of the parts of [`Format::parts`]; the offset, the last of nf4dq's, is in the JSON.
fn part_names(item: &Item) -> Vec<String> {
    let ends: &[&str] = match item.format {
        Format::Nf4 => &["", ".absmax"],
        Format::Nf4Dq => &["", ".absmax", ".nested_quant_map", ".nested_absmax"],
        _ => &[""],
    };
    ends.iter().map(|end| format!("{}{end}", item.name)).collect()
}

fn state_name(name: &str) -> String {
    format!("{name}.quant_state.bitsandbytes__nf4")
}

/// What bitsandbytes needs to know of a matrix, in [`STATE_BYTES`] bytes.
fn state(item: &Item, offset: f32) -> Vec<u8> {
    let mut state = json!({
        "quant_type": "nf4",
        "blocksize": quant::NF4_BLOCK,
        "dtype": "float32",
        "shape": item.shape,
    });
    if item.format == Format::Nf4Dq {
        state["nested_blocksize"] = quant::NF4_NESTED_BLOCK.into();
        state["nested_dtype"] = "float32".into();
        state["nested_offset"] = f64::from(offset).into();
    }
    let mut bytes = state.to_string().into_bytes();
    debug_assert!(bytes.len() <= STATE_BYTES);
    bytes.resize(STATE_BYTES, b' ');
    bytes
}

/// The file's header, and where in the file each tensor begins. Wider types come first, so that all are aligned.
fn lay_out(items: &[Item]) -> (Vec<u8>, BTreeMap<String, usize>) {
    let mut entries: Vec<Entry> = items.iter().flat_map(entries).collect();
    entries.sort_by_key(|entry| std::cmp::Reverse(width(entry.dtype)));
    let mut table = Map::new();
    table.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut begin = 0;
    for Entry { name, dtype, shape, bytes } in &entries {
        let end = begin + bytes;
        table.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
        begin = end;
    }
    let mut text = Value::Object(table).to_string().into_bytes();
    text.resize((8 + text.len()).next_multiple_of(ALIGN) - 8, b' ');
    let header = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
    let mut at = header.len();
    let mut places = BTreeMap::new();
    for entry in entries {
        places.insert(entry.name, at);
        at += entry.bytes;
    }
    (header, places)
}

fn width(dtype: &str) -> usize {
    match dtype {
        "F32" => 4,
        "U8" => 1,
        _ => 2,
    }
}

/// The tensors that an item becomes.
fn entries(item: &Item) -> Vec<Entry> {
    let name = &item.name;
    let entry = |end: &str, dtype: &'static str, shape: Vec<usize>| Entry {
        name: format!("{name}{end}"),
        dtype,
        bytes: shape.iter().product::<usize>() * width(dtype),
        shape,
    };
    let (n, k) = item.dims();
    let blocks = n * k / quant::NF4_BLOCK;
    let mut list = match item.format {
        Format::F16 => return vec![entry("", "F16", item.shape.clone())],
        Format::BF16 => return vec![entry("", "BF16", item.shape.clone())],
        Format::Nf4 => vec![entry(".absmax", "F32", vec![blocks])],
        Format::Nf4Dq => vec![
            entry(".absmax", "U8", vec![blocks]),
            entry(".nested_absmax", "F32", vec![blocks.div_ceil(quant::NF4_NESTED_BLOCK)]),
            entry(".nested_quant_map", "F32", vec![256]),
        ],
        _ => return vec![entry("", "F32", item.shape.clone())],
    };
    list.push(entry("", "U8", vec![n * k / 2, 1]));
    list.push(entry(".quant_map", "F32", vec![nf4::LEVELS.len()]));
    list.push(entry(".quant_state.bitsandbytes__nf4", "U8", vec![STATE_BYTES]));
    list
}

/// What transformers' BitsAndBytesConfig saves.
fn quantization_config(double: bool) -> Value {
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "load_in_8bit": false,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
    })
}

fn copy_files(dir: &Path, source: &HfDir, quantization: Option<Value>) -> Result<(), Error> {
    let config: Option<Map<String, Value>> = source.json("config.json")?;
    let mut config = config.unwrap_or_default(); // the checkpoint was opened with one
    match quantization {
        Some(quantization) => config.insert("quantization_config".into(), quantization),
        None => config.shift_remove("quantization_config"),
    };
    write_json(&dir.join("config.json"), &config.into())?;
    for name in COPIED {
        let from = source.path.join(name);
        let Ok(meta) = std::fs::metadata(&from) else { continue };
        if !meta.is_file() || meta.len() > MAX_COPY {
            return Err(Error::file(&from, format!("is no file of at most {MAX_COPY} bytes")));
        }
        std::fs::copy(&from, dir.join(name)).map_err(|cause| Error::io(&from, cause))?;
    }
    Ok(())
}

fn make_files(dir: &Path, checkpoint: &Checkpoint, gguf: &Gguf, quantization: Option<Value>) -> Result<(), Error> {
    let mut config = config_json(&checkpoint.config).map_err(|what| Error::file(&gguf.path, what))?;
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    write_json(&dir.join("config.json"), &config)?;

    let tokenizer = open_tokenizer(checkpoint)?;
    let path = dir.join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_json()?).map_err(|cause| Error::io(&path, cause))?;

    let Config { bos, eos, pad, max_positions, .. } = &checkpoint.config;
    let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos(),
        "bos_token": token(*bos),
        "eos_token": token(eos.first().copied()),
        "pad_token": token(*pad),
        "clean_up_tokenization_spaces": false,
        "model_max_length": max_positions,
        "chat_template": open_chat_template(checkpoint)?,
    });
    write_json(&dir.join("tokenizer_config.json"), &tokenizer_config)?;
    let ids = json!({ "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad });
    write_json(&dir.join("generation_config.json"), &ids)
}

fn config_json(config: &Config) -> Result<Value, String> {
    let class = match config.arch {
        Arch::Llama => "LlamaForCausalLM",
        Arch::Qwen2 => "Qwen2ForCausalLM",
        Arch::Qwen3 => "Qwen3ForCausalLM",
        Arch::Bert => return Err("is a bert model, which GGUF files are not read as".into()),
    };
    let scaling = match config.rope_scaling {
        Scaling::None => Value::Null,
        Scaling::Linear { factor } => json!({ "rope_type": "linear", "factor": decimal(factor) }),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => json!({
            "rope_type": "llama3",
            "factor": decimal(factor),
            "low_freq_factor": decimal(low_freq_factor),
            "high_freq_factor": decimal(high_freq_factor),
            "original_max_position_embeddings": original_max,
        }),
    };
    Ok(json!({
        "architectures": [class],
        "model_type": config.arch.name(),
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": decimal(config.norm_eps),
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias && config.arch != Arch::Qwen2,
        "bos_token_id": config.bos,
        "eos_token_id": config.eos,
        "pad_token_id": config.pad,
    }))
}

/// The shortest decimal that is this f32, as an f64: 1e-5 and not 9.999999747378752e-6.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    let text = format!("{value:#}\n");
    std::fs::write(path, text).map_err(|cause| Error::io(path, cause))
}
