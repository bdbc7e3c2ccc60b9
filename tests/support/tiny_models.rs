//! Writers of tiny models: GGUF files and Hugging Face directories, whole or with any field set to anything.

use std::fs;
use std::path::Path;

use serde_json::{json, Value};

/// One tensor: name, type (`F32`, `Q8_0`, ...), shape outermost first.
#[derive(Clone)]
pub struct Tensor(pub String, pub &'static str, pub Vec<u64>);

impl Tensor {
    /// The byte that fills it, so that a view of the wrong place shows.
    pub fn fill(&self) -> u8 {
        self.0.bytes().fold(7, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte))
    }

    pub fn size(&self) -> u64 {
        let (values, bytes) = match self.1 {
            "F32" => (1, 4),
            "F16" | "BF16" => (1, 2),
            "U8" => (1, 1),
            "Q8_0" => (32, 34),
            other => panic!("the writer does not know {other}"),
        };
        self.2.iter().product::<u64>() / values * bytes
    }
}

/// A GGUF file, every field of which a test may set to anything.
#[derive(Clone)]
pub struct GgufFile {
    pub version: u32,
    pub counts: Option<(u64, u64)>,
    pub alignment: u64,
    pub pairs: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Row>,
}

/// A row of the tensor table; `dims` innermost first.
#[derive(Clone)]
pub struct Row {
    pub tensor: Tensor,
    pub dims: Vec<u64>,
    pub kind: u32,
    pub offset: Option<u64>,
}

pub fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

pub fn value(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), bytes].concat()
}

pub fn u32v(x: u32) -> Vec<u8> {
    value(4, &x.to_le_bytes())
}

pub fn f32v(x: f32) -> Vec<u8> {
    value(6, &x.to_le_bytes())
}

pub fn strv(s: &str) -> Vec<u8> {
    value(8, &text(s))
}

pub fn arrayv(kind: u32, count: u64, items: &[u8]) -> Vec<u8> {
    value(9, &[&kind.to_le_bytes()[..], &count.to_le_bytes(), items].concat())
}

impl GgufFile {
    pub fn set(&mut self, key: &str, value: Vec<u8>) {
        self.pairs.retain(|pair| pair.0 != key);
        self.pairs.push((key.to_string(), value));
    }

    pub fn row(&mut self, name: &str) -> &mut Row {
        self.tensors.iter_mut().find(|row| row.tensor.0 == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (tensors, pairs) = self.counts.unwrap_or((self.tensors.len() as u64, self.pairs.len() as u64));
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend([tensors.to_le_bytes(), pairs.to_le_bytes()].concat());
        for (key, value) in &self.pairs {
            out.extend([text(key), value.clone()].concat());
        }
        let mut data: Vec<u8> = Vec::new();
        for row in &self.tensors {
            out.extend(text(&row.tensor.0));
            out.extend((row.dims.len() as u32).to_le_bytes());
            row.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(row.kind.to_le_bytes());
            out.extend(row.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.resize(data.len() + row.tensor.size() as usize, row.tensor.fill());
            data.resize(data.len().next_multiple_of(self.alignment as usize), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out.extend(data);
        out
    }
}

/// hidden 32, ffn 64, 4 heads and 2 kv heads of 8 (16 for qwen3), vocab 6, 2 layers; matrices of type `kind`.
pub fn decoder(arch: &str, kind: &'static str, tied: bool, gguf: bool) -> Vec<Tensor> {
    let width = if arch == "qwen3" { 16 } else { 8 };
    let (q, kv) = (4 * width, 2 * width);
    let mut list = vec![("model.embed_tokens.weight".to_string(), vec![6, 32])];
    for layer in 0..2 {
        let mut add = |name: &str, shape: &[u64]| list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        for (name, shape) in [
            ("input_layernorm.weight", &[32][..]),
            ("self_attn.q_proj.weight", &[q, 32]),
            ("self_attn.k_proj.weight", &[kv, 32]),
            ("self_attn.v_proj.weight", &[kv, 32]),
            ("self_attn.o_proj.weight", &[32, q]),
            ("post_attention_layernorm.weight", &[32]),
            ("mlp.gate_proj.weight", &[64, 32]),
            ("mlp.up_proj.weight", &[64, 32]),
            ("mlp.down_proj.weight", &[32, 64]),
        ] {
            add(name, shape);
        }
        if arch == "qwen2" {
            add("self_attn.q_proj.bias", &[q]);
            add("self_attn.k_proj.bias", &[kv]);
            add("self_attn.v_proj.bias", &[kv]);
        }
        if arch == "qwen3" {
            add("self_attn.q_norm.weight", &[width]);
            add("self_attn.k_norm.weight", &[width]);
        }
    }
    list.push(("model.norm.weight".to_string(), vec![32]));
    if !tied {
        list.push(("lm_head.weight".to_string(), vec![6, 32]));
    }
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("_proj", ""),
        ("mlp.", "ffn_"),
    ];
    let mut tensors = Vec::new();
    for (name, shape) in list {
        let kind = if shape.len() == 1 { "F32" } else { kind };
        let name = if gguf { names.iter().fold(name, |name, (from, to)| name.replace(from, to)) } else { name };
        tensors.push(Tensor(name, kind, shape));
    }
    tensors
}

pub fn gguf_file(arch: &str, tied: bool) -> GgufFile {
    let tensors = decoder(arch, "Q8_0", tied, true);
    let row = |tensor: Tensor| Row {
        dims: tensor.2.iter().rev().copied().collect(),
        kind: if tensor.1 == "F32" { 0 } else { 8 },
        offset: None,
        tensor,
    };
    let mut file = GgufFile {
        version: 3,
        counts: None,
        alignment: 32,
        pairs: Vec::new(),
        tensors: tensors.into_iter().map(row).collect(),
    };
    file.set("general.architecture", strv(arch));
    for (key, size) in [
        ("block_count", 2),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("context_length", 128),
    ] {
        file.set(&format!("{arch}.{key}"), u32v(size));
    }
    if arch == "qwen3" {
        file.set("qwen3.attention.key_length", u32v(16));
        file.set("qwen3.attention.value_length", u32v(16));
    }
    file.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), f32v(1e-5));
    file.set(&format!("{arch}.rope.freq_base"), f32v(5e5));
    let tokens: Vec<u8> = ["<s>", "</s>", "a", "b", "é", ""].iter().flat_map(|token| text(token)).collect();
    file.set("tokenizer.ggml.tokens", arrayv(8, 6, &tokens));
    let types: Vec<u8> = [3i32, 3, 1, 1, 1, 1].iter().flat_map(|kind| kind.to_le_bytes()).collect();
    file.set("tokenizer.ggml.token_type", arrayv(5, 6, &types));
    file.set("tokenizer.ggml.scores", arrayv(6, 2, &[0.5f32.to_le_bytes(), (-1f32).to_le_bytes()].concat()));
    file.set("tokenizer.ggml.bos_token_id", u32v(0));
    file.set("tokenizer.ggml.eos_token_id", u32v(1));
    file.set("tokenizer.ggml.eot_token_id", u32v(2));
    file.set("tokenizer.ggml.add_bos_token", value(7, &[1]));
    file
}

/// A safetensors file whose tensors are filled with their bytes; `header` changes the JSON before it is written.
pub fn safetensors(tensors: &[Tensor], header: impl Fn(String) -> String) -> Vec<u8> {
    let filled = |tensor: &Tensor| (tensor.clone(), vec![tensor.fill(); tensor.size() as usize]);
    safetensors_of(&tensors.iter().map(filled).collect::<Vec<_>>(), header)
}

/// A safetensors file of tensors and their bytes.
pub fn safetensors_of(tensors: &[(Tensor, Vec<u8>)], header: impl Fn(String) -> String) -> Vec<u8> {
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut data = Vec::new();
    for (Tensor(name, kind, shape), bytes) in tensors {
        let begin = data.len();
        data.extend(bytes);
        let info = json!({"dtype": kind, "shape": shape, "data_offsets": [begin, data.len()]});
        json += &format!(",{}:{info}", json!(name));
    }
    let json = header(json + "}");
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &data].concat()
}

/// A Llama whose first gate projection is in bitsandbytes' 4 bits, its scales quantized again when `nested`.
pub fn bnb4(nested: bool) -> Vec<(Tensor, Vec<u8>)> {
    let mut list = Vec::new();
    for tensor in decoder("llama", "BF16", false, false) {
        let name = tensor.0.clone();
        if name != "model.layers.0.mlp.gate_proj.weight" {
            let bytes = vec![tensor.fill(); tensor.size() as usize];
            list.push((tensor, bytes));
            continue;
        }
        let mut state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 32]});
        let mut parts = vec![("", "U8", vec![1024, 1]), (".quant_map", "F32", vec![16])];
        match nested {
            false => parts.push((".absmax", "F32", vec![32])),
            true => {
                parts.push((".absmax", "U8", vec![32]));
                parts.push((".nested_absmax", "F32", vec![1]));
                parts.push((".nested_quant_map", "F32", vec![256]));
                state["nested_blocksize"] = json!(256);
                state["nested_dtype"] = json!("float32");
                state["nested_offset"] = json!(0.25);
            }
        }
        for (part, kind, shape) in parts {
            let tensor = Tensor(format!("{name}{part}"), kind, shape);
            let bytes = vec![tensor.fill(); tensor.size() as usize];
            list.push((tensor, bytes));
        }
        list.push(quant_state(&state));
    }
    list
}

/// The tensor that describes the one of [`bnb4`].
pub fn quant_state(state: &Value) -> (Tensor, Vec<u8>) {
    let name = "model.layers.0.mlp.gate_proj.weight.quant_state.bitsandbytes__nf4".to_string();
    let bytes = state.to_string().into_bytes();
    (Tensor(name, "U8", vec![bytes.len() as u64]), bytes)
}

pub fn hf_config(arch: &str) -> Value {
    match arch {
        "bert" => json!({"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "vocab_size": 6, "max_position_embeddings": 16, "type_vocab_size": 2,
            "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}),
        _ => json!({"model_type": arch, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 6, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 500000, "hidden_act": "silu", "tie_word_embeddings": false,
            "head_dim": if arch == "qwen3" { 16 } else { 8 }, "bos_token_id": 0, "eos_token_id": [1, 2]}),
    }
}

pub fn bert(prefix: &str, gain: &str, shift: &str) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    let mut add = |name: &str, shape: &[u64]| tensors.push(Tensor(format!("{prefix}{name}"), "F32", shape.to_vec()));
    add("embeddings.word_embeddings.weight", &[6, 32]);
    add("embeddings.position_embeddings.weight", &[16, 32]);
    add("embeddings.token_type_embeddings.weight", &[2, 32]);
    for (name, out, inside) in [
        ("attention.self.query", 32, 32),
        ("attention.self.key", 32, 32),
        ("attention.self.value", 32, 32),
        ("attention.output.dense", 32, 32),
        ("intermediate.dense", 64, 32),
        ("output.dense", 32, 64),
    ] {
        add(&format!("encoder.layer.0.{name}.weight"), &[out, inside]);
        add(&format!("encoder.layer.0.{name}.bias"), &[out]);
    }
    for name in ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"] {
        add(&format!("{name}.LayerNorm.{gain}"), &[32]);
        add(&format!("{name}.LayerNorm.{shift}"), &[32]);
    }
    tensors
}

pub fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    fs::write(path, bytes).unwrap();
}

pub const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// A Llama directory in two shards.
pub fn write_sharded(dir: &Path) {
    let tensors = decoder("llama", "BF16", false, false);
    let (first, second) = tensors.split_at(9);
    write(&dir.join("config.json"), hf_config("llama").to_string());
    write(&dir.join("generation_config.json"), r#"{"eos_token_id": [2, 3], "pad_token_id": 5}"#);
    write(&dir.join("tokenizer_config.json"), r#"{"add_bos_token": true, "added_tokens_decoder": {"0": {}}}"#);
    let mut map = serde_json::Map::new();
    for (part, file) in [first, second].into_iter().zip(SHARDS) {
        write(&dir.join(file), safetensors(part, |header| header));
        map.extend(part.iter().map(|tensor| (tensor.0.clone(), json!(file))));
    }
    write(&dir.join("model.safetensors.index.json"), json!({"metadata": {}, "weight_map": map}).to_string());
}

/// A directory with one safetensors file.
pub fn write_single(dir: &Path, config: &Value, weights: &[u8]) {
    write(&dir.join("config.json"), config.to_string());
    write(&dir.join("model.safetensors"), weights);
}
