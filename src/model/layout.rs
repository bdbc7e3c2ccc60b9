//! Which tensors an architecture is made of: their Hugging Face names, their shapes, and their names in GGUF.

use std::collections::BTreeSet;

use super::checkpoint::{Checkpoint, Encoding, Source};
use super::config::{Arch, Config};
use crate::error::Error;

/// GGUF and Hugging Face names of what stands outside the layers.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// GGUF names after `blk.{i}.`, and Hugging Face names after `model.layers.{i}.`.
const INSIDE: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The Hugging Face name of a tensor in a GGUF file; a name that is not known is kept.
pub(crate) fn name_from_gguf(stored: &str) -> String {
    known_gguf_name(stored).unwrap_or_else(|| stored.to_string())
}

/// The name in a GGUF file of a decoder's tensor, by its Hugging Face name.
pub(crate) fn name_to_gguf(name: &str) -> Option<String> {
    if name == "model.rope_freqs" {
        return Some("rope_freqs.weight".to_string());
    }
    let (stem, kind) = name.rsplit_once('.')?;
    let find = |table: &[(&'static str, &str)], stem: &str| table.iter().find(|row| row.1 == stem).map(|row| row.0);
    match stem.strip_prefix("model.layers.") {
        None => find(&OUTSIDE, stem).map(|stored| format!("{stored}.{kind}")),
        Some(inside) => {
            let (layer, part) = inside.split_once('.')?;
            find(&INSIDE, part).map(|stored| format!("blk.{layer}.{stored}.{kind}"))
        }
    }
}

fn known_gguf_name(stored: &str) -> Option<String> {
    if stored == "rope_freqs.weight" {
        return Some("model.rope_freqs".to_string());
    }
    let (stem, kind) = stored.rsplit_once('.')?;
    if kind != "weight" && kind != "bias" {
        return None;
    }
    let find = |table: &[(&str, &'static str)], stem: &str| table.iter().find(|row| row.0 == stem).map(|row| row.1);
    let Some(inside) = stem.strip_prefix("blk.") else {
        return find(&OUTSIDE, stem).map(|name| format!("{name}.{kind}"));
    };
    let (layer, part) = inside.split_once('.')?;
    find(&INSIDE, part).map(|name| format!("model.layers.{layer}.{name}.{kind}"))
}

/// The name a Hugging Face tensor goes by. BERT's may stand behind `bert.` (a model saved with a task head), and have
/// norms in the older words gamma and beta.
pub(crate) fn name_from_hf(arch: Arch, stored: &str) -> String {
    if arch != Arch::Bert {
        return stored.to_string();
    }
    let name = stored.strip_prefix("bert.").unwrap_or(stored);
    match name.rsplit_once('.') {
        Some((stem, "gamma")) => format!("{stem}.weight"),
        Some((stem, "beta")) => format!("{stem}.bias"),
        _ => name.to_string(),
    }
}

/// GGUF's `llama` stores the rows of q and k in the order of interleaved rotary embeddings; the others do not.
pub(crate) fn is_rope_permuted(config: &Config, name: &str) -> bool {
    let permuted = [".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias"];
    config.arch == Arch::Llama && permuted.iter().any(|end| name.ends_with(end))
}

/// Checks that every tensor the architecture needs is there with the shape the config implies: matrices as floats,
/// ggml blocks or bitsandbytes' 4 bits, vectors as floats. In a GGUF file nothing else may be there, since its header
/// cannot say that, for instance, a layer has biases: their presence does.
pub(crate) fn validate(checkpoint: &Checkpoint) -> Result<(), Error> {
    let mut known = BTreeSet::new();
    for_each(&checkpoint.config, &mut |name, shape| {
        check(checkpoint, &name, shape)?;
        known.insert(name);
        Ok(())
    })?;
    let optional = [("model.rope_freqs", vec![checkpoint.config.head_dim / 2])];
    for (name, shape) in optional {
        if checkpoint.has(name) {
            check(checkpoint, name, &shape)?;
            known.insert(name.to_string());
        }
    }
    if matches!(checkpoint.source, Source::Gguf(_)) {
        if let Some(name) = checkpoint.names().find(|&name| !known.contains(name)) {
            let what = format!(
                "is no part of a {} model of {} layers as its header describes it",
                checkpoint.config.arch.name(),
                checkpoint.config.layers
            );
            return Err(checkpoint.tensor(name)?.wrong(what));
        }
    }
    Ok(())
}

/// One tensor.
fn check(checkpoint: &Checkpoint, name: &str, expected: &[usize]) -> Result<(), Error> {
    let tensor = checkpoint.tensor(name)?;
    let matrix = expected.len() == 2;
    if let Some(packed) = checkpoint.bnb4(name).filter(|_| matrix) {
        let found = packed?.shape;
        return match found == expected {
            true => Ok(()),
            false => Err(tensor.wrong(format!("has shape {found:?} inside its 4 bits; {expected:?} is expected"))),
        };
    }
    match tensor.encoding {
        Encoding::F32 | Encoding::F16 | Encoding::BF16 => {}
        Encoding::Ggml(_) if matrix => {}
        other => {
            return Err(tensor.wrong(format!("is stored as {}, which no weight of this kind can be", other.name())))
        }
    }
    if tensor.shape != expected {
        let found = &tensor.shape;
        return Err(tensor.wrong(format!("has shape {found:?}; the config asks for {expected:?} (outermost first)")));
    }
    Ok(())
}

type Each<'a> = &'a mut dyn FnMut(String, &[usize]) -> Result<(), Error>;

/// Calls `each` with the name and shape of every tensor the architecture needs, until an error.
pub(crate) fn for_each(config: &Config, each: Each) -> Result<(), Error> {
    let Config { hidden, ffn, head_dim, vocab, .. } = *config;
    if config.arch == Arch::Bert {
        return for_each_bert(config, each);
    }
    let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
    each("model.embed_tokens.weight".into(), &[vocab, hidden])?;
    for layer in 0..config.layers {
        let mut each = |name: &str, shape: &[usize]| each(format!("model.layers.{layer}.{name}"), shape);
        each("input_layernorm.weight", &[hidden])?;
        each("self_attn.q_proj.weight", &[q, hidden])?;
        each("self_attn.k_proj.weight", &[kv, hidden])?;
        each("self_attn.v_proj.weight", &[kv, hidden])?;
        each("self_attn.o_proj.weight", &[hidden, q])?;
        if config.attention_bias {
            each("self_attn.q_proj.bias", &[q])?;
            each("self_attn.k_proj.bias", &[kv])?;
            each("self_attn.v_proj.bias", &[kv])?;
        }
        if config.output_bias {
            each("self_attn.o_proj.bias", &[hidden])?;
        }
        if config.arch == Arch::Qwen3 {
            each("self_attn.q_norm.weight", &[head_dim])?;
            each("self_attn.k_norm.weight", &[head_dim])?;
        }
        each("post_attention_layernorm.weight", &[hidden])?;
        each("mlp.gate_proj.weight", &[ffn, hidden])?;
        each("mlp.up_proj.weight", &[ffn, hidden])?;
        each("mlp.down_proj.weight", &[hidden, ffn])?;
    }
    each("model.norm.weight".into(), &[hidden])?;
    match config.tie_embeddings {
        true => Ok(()),
        false => each("lm_head.weight".into(), &[vocab, hidden]),
    }
}

fn for_each_bert(config: &Config, each: Each) -> Result<(), Error> {
    let Config { hidden, ffn, .. } = *config;
    let mut pair = |name: String, shape: &[usize]| {
        each(format!("{name}.weight"), shape)?;
        each(format!("{name}.bias"), &shape[..1])
    };
    pair("embeddings.LayerNorm".into(), &[hidden])?;
    for layer in 0..config.layers {
        let mut pair = |name: &str, shape: &[usize]| pair(format!("encoder.layer.{layer}.{name}"), shape);
        pair("attention.self.query", &[hidden, hidden])?;
        pair("attention.self.key", &[hidden, hidden])?;
        pair("attention.self.value", &[hidden, hidden])?;
        pair("attention.output.dense", &[hidden, hidden])?;
        pair("attention.output.LayerNorm", &[hidden])?;
        pair("intermediate.dense", &[ffn, hidden])?;
        pair("output.dense", &[hidden, ffn])?;
        pair("output.LayerNorm", &[hidden])?;
    }
    each("embeddings.word_embeddings.weight".into(), &[config.vocab, hidden])?;
    each("embeddings.position_embeddings.weight".into(), &[config.max_positions, hidden])?;
    each("embeddings.token_type_embeddings.weight".into(), &[config.type_vocab, hidden])
}
