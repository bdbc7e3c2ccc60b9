//! Tiny random decoders, and writers of the files they come in.

use super::reference::{Shape, Weights};
use half::{bf16, f16};
use handmill::quant::{self, gguf_blocks, Format, Packed};
use handmill::tensor::{Dtype, HostTensor};
use handmill::verify::normal;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::path::Path;

/// The decoder most tests use: rows of its caches can be bound.
pub const LLAMA: Shape = Shape {
    arch: "llama",
    layers: 2,
    hidden: 64,
    ffn: 128,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    vocab: 100,
    eps: 1e-5,
    theta: 10_000.0,
    stretch: 1.0,
    bias: false,
    tied: false,
};

/// Biases on q, k and v, tied; rows of its caches begin where no view may.
pub fn qwen2() -> Shape {
    Shape { arch: "qwen2", heads: 6, head_dim: 6, bias: true, tied: true, ..LLAMA }
}

/// Norms on q and k, heads wider than hidden / heads.
pub fn qwen3() -> Shape {
    Shape { arch: "qwen3", head_dim: 20, tied: true, eps: 1e-6, theta: 1e6, ..LLAMA }
}

/// Weights of order one in every product, the same for the same seed.
pub fn random(shape: &Shape, seed: u64) -> Weights {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut weights = Weights::new();
    let mut put = |name: String, dims: &[usize], mean: f64, scale: f64| {
        let count = dims.iter().product();
        let values = (0..count).map(|_| (mean + scale * normal(&mut rng)) as f32).collect();
        weights.insert(name, (dims.to_vec(), values));
    };
    let Shape { hidden, ffn, head_dim, vocab, .. } = *shape;
    let (q, kv) = (shape.heads * head_dim, shape.kv_heads * head_dim);
    put("model.embed_tokens.weight".into(), &[vocab, hidden], 0.0, 1.0);
    put("model.norm.weight".into(), &[hidden], 1.0, 0.3);
    if !shape.tied {
        put("lm_head.weight".into(), &[vocab, hidden], 0.0, 0.1);
    }
    for layer in 0..shape.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(name(&format!("{norm}.weight")), &[hidden], 1.0, 0.3);
        }
        for (part, n, k) in [
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ] {
            put(name(&format!("{part}.weight")), &[n, k], 0.0, 1.0 / (k as f64).sqrt());
            let biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].contains(&part)
                || part == "self_attn.o_proj" && shape.arch == "llama";
            if shape.bias && biased {
                put(name(&format!("{part}.bias")), &[n], 0.0, 0.5);
            }
        }
        if shape.arch == "qwen3" {
            put(name("self_attn.q_norm.weight"), &[head_dim], 1.0, 0.3);
            put(name("self_attn.k_norm.weight"), &[head_dim], 1.0, 0.3);
        }
    }
    weights
}

/// True for the projections inside the layers, which quantization is for.
pub fn is_projection(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// The weights with the projections as `format` gives them back.
pub fn through(weights: &Weights, format: Format) -> Weights {
    let mut weights = weights.clone();
    for (_, (shape, values)) in weights.iter_mut().filter(|(name, _)| is_projection(name)) {
        *values = quant::decode(&quant::encode(format, shape[0], shape[1], values).unwrap());
    }
    weights
}

/// Writes `config.json`.
fn write_config(dir: &Path, shape: &Shape) {
    let config = json!({
        "model_type": shape.arch,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 1024,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "rope_scaling": (shape.stretch > 1.0).then(|| json!({"rope_type": "linear", "factor": shape.stretch})),
        "tie_word_embeddings": shape.tied,
        "attention_bias": shape.bias,
        "hidden_act": "silu",
        "eos_token_id": 0,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Name, type, shape and bytes of a stored tensor.
type Stored = (String, safetensors::Dtype, Vec<usize>, Vec<u8>);

fn write_safetensors(dir: &Path, tensors: &[Stored]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// Writes a Hugging Face directory, matrices in `dtype`, which the values must fit exactly.
pub fn write_hf(dir: &Path, shape: &Shape, weights: &Weights, dtype: Dtype) {
    write_config(dir, shape);
    let stored = weights.iter().map(|(name, (dims, values))| {
        let (dtype, bytes): (_, Vec<u8>) = match dtype {
            Dtype::F16 => {
                (safetensors::Dtype::F16, values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect())
            }
            Dtype::BF16 => {
                (safetensors::Dtype::BF16, values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect())
            }
            _ => (safetensors::Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        };
        (name.clone(), dtype, dims.clone(), bytes)
    });
    write_safetensors(dir, &stored.collect::<Vec<_>>());
}

/// Rounds every value to `dtype`.
pub fn rounded(mut weights: Weights, dtype: Dtype) -> Weights {
    for value in weights.values_mut().flat_map(|(_, values)| values) {
        *value = match dtype {
            Dtype::F16 => f16::from_f32(*value).to_f32(),
            Dtype::BF16 => bf16::from_f32(*value).to_f32(),
            _ => *value,
        };
    }
    weights
}

/// Writes a Hugging Face directory whose projections bitsandbytes would have made: NF4, nested or not.
pub fn write_bnb4(dir: &Path, shape: &Shape, weights: &Weights, nested: bool) {
    write_config(dir, shape);
    let mut stored: Vec<Stored> = Vec::new();
    for (name, (dims, values)) in weights {
        let bytes = |part: &HostTensor| part.bytes.as_slice().to_vec();
        let mut put = |suffix: &str, dtype, shape: &[usize], bytes| {
            stored.push((format!("{name}{suffix}"), dtype, shape.to_vec(), bytes));
        };
        let f32_bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        if !is_projection(name) {
            put("", safetensors::Dtype::F32, dims, f32_bytes(values));
            continue;
        }
        let format = if nested { Format::Nf4Dq } else { Format::Nf4 };
        let Packed { parts, .. } = quant::encode(format, dims[0], dims[1], values).unwrap();
        let blocks = dims[0] * dims[1] / 64;
        let mut state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": dims});
        put("", safetensors::Dtype::U8, &[blocks * 32, 1], bytes(&parts[0]));
        put(".quant_map", safetensors::Dtype::F32, &[16], f32_bytes(&quant::nf4::LEVELS));
        if nested {
            state["nested_blocksize"] = 256.into();
            state["nested_dtype"] = "float32".into();
            state["nested_offset"] = (parts[4].f32()[0] as f64).into();
            put(".absmax", safetensors::Dtype::U8, &[blocks], bytes(&parts[1]));
            put(".nested_quant_map", safetensors::Dtype::F32, &[256], bytes(&parts[2]));
            put(".nested_absmax", safetensors::Dtype::F32, &[blocks.div_ceil(256)], bytes(&parts[3]));
        } else {
            put(".absmax", safetensors::Dtype::F32, &[blocks], bytes(&parts[1]));
        }
        let state = state.to_string().into_bytes();
        put(".quant_state.bitsandbytes__nf4", safetensors::Dtype::U8, &[state.len()], state.clone());
    }
    write_safetensors(dir, &stored);
}

/// How a GGUF file stores the matrices.
#[derive(Clone, Copy, PartialEq)]
pub enum Blocks {
    F32,
    Q8,
    Q4,
}

/// Writes a GGUF file without tokenizer, q and k of `llama` in its row order. Gives the weights it holds.
pub fn write_gguf(path: &Path, shape: &Shape, weights: &Weights, blocks: Blocks) -> Weights {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat();
    let key = |name: &str, kind: u32, value: &[u8]| [&text(name)[..], &kind.to_le_bytes(), value].concat();
    let own = |name: &str| format!("{}.{name}", shape.arch);
    let size = |name: &str, value: usize| key(&own(name), 4, &(value as u32).to_le_bytes());
    let pairs = [
        key("general.architecture", 8, &text(shape.arch)),
        size("block_count", shape.layers),
        size("embedding_length", shape.hidden),
        size("feed_forward_length", shape.ffn),
        size("attention.head_count", shape.heads),
        size("attention.head_count_kv", shape.kv_heads),
        size("attention.key_length", shape.head_dim),
        size("attention.value_length", shape.head_dim),
        size("context_length", 1024),
        key(&own("attention.layer_norm_rms_epsilon"), 6, &(shape.eps as f32).to_le_bytes()),
        key(&own("rope.freq_base"), 6, &(shape.theta as f32).to_le_bytes()),
    ];

    let (mut table, mut data, mut held) = (Vec::new(), Vec::new(), Weights::new());
    for (name, (dims, values)) in weights {
        let turned = shape.arch == "llama" && (name.contains("q_proj") || name.contains("k_proj"));
        let values = if turned { permuted(values, values.len() / dims[0], shape.head_dim) } else { values.clone() };
        let f32_bytes = || values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let (kind, bytes, back): (u32, Vec<u8>, Vec<f32>) = match blocks {
            Blocks::F32 => (0, f32_bytes(), values.clone()),
            _ if dims.len() == 1 => (0, f32_bytes(), values.clone()),
            Blocks::Q8 => {
                let packed = quant::encode(Format::parse("q8").unwrap(), dims[0], dims[1], &values).unwrap();
                (8, gguf_blocks::to_gguf_q8_0(&packed).unwrap(), quant::decode(&packed))
            }
            Blocks::Q4 => {
                let packed = quant::encode(Format::parse("q4").unwrap(), dims[0], dims[1], &values).unwrap();
                (3, gguf_blocks::to_gguf_q4_1(&packed).unwrap(), quant::decode(&packed))
            }
        };
        let back = if turned { unpermuted(&back, back.len() / dims[0], shape.head_dim) } else { back };
        held.insert(name.clone(), (dims.clone(), back));
        table.extend(text(&gguf_name(name)));
        table.extend((dims.len() as u32).to_le_bytes());
        table.extend(dims.iter().rev().flat_map(|&dim| (dim as u64).to_le_bytes()));
        table.extend(kind.to_le_bytes());
        table.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((weights.len() as u64).to_le_bytes());
    file.extend((pairs.len() as u64).to_le_bytes());
    file.extend(pairs.concat());
    file.extend(table);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(path, file).unwrap();
    held
}

/// reshape(heads, 2, head_dim/2, width).swapaxes(1, 2): GGUF's order of the rows of q and k.
fn permuted(values: &[f32], width: usize, head_dim: usize) -> Vec<f32> {
    let row = |at: usize| {
        let (head, stored) = (at / head_dim * head_dim, at % head_dim);
        let from = head + stored % 2 * (head_dim / 2) + stored / 2;
        &values[from * width..(from + 1) * width]
    };
    (0..values.len() / width).flat_map(row).copied().collect()
}

/// reshape(heads, head_dim/2, 2, width).swapaxes(1, 2): back.
fn unpermuted(values: &[f32], width: usize, head_dim: usize) -> Vec<f32> {
    let row = |at: usize| {
        let (head, wanted) = (at / head_dim * head_dim, at % head_dim);
        let from = head + wanted % (head_dim / 2) * 2 + wanted / (head_dim / 2);
        &values[from * width..(from + 1) * width]
    };
    (0..values.len() / width).flat_map(row).copied().collect()
}

fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.rope_freqs", "rope_freqs.weight"),
    ];
    pairs.iter().fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf))
}
