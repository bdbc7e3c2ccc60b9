//! A tiny embedding model: words are random vectors and a sentence is about their mean, so texts that share words are
//! near each other.

use std::collections::BTreeMap;
use std::path::Path;

use handmill::verify::normal;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{json, Value};

const HIDDEN: usize = 32;
const FFN: usize = 64;
const POSITIONS: usize = 256;

/// Writes the model's directory. It knows the words of `text`, and every other one by its letters.
pub fn write(dir: &Path, text: &str, seed: u64) {
    let mut vocab: BTreeMap<String, u32> = BTreeMap::new();
    let mut add = |token: String| {
        let next = vocab.len() as u32;
        vocab.entry(token).or_insert(next);
    };
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].iter().for_each(|token| add(token.to_string()));
    for c in (33u8..127).map(char::from).filter(|c| !c.is_ascii_uppercase()) {
        add(c.to_string());
        add(format!("##{c}"));
    }
    let lower = text.to_lowercase();
    lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).for_each(|word| add(word.into()));

    std::fs::create_dir_all(dir).unwrap();
    let special = |id: u32, token: &str| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let frame = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let named = |id: u32, token: &str| json!({"id": token, "ids": [id], "tokens": [token]});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "[PAD]"), special(1, "[UNK]"), special(2, "[CLS]"), special(3, "[SEP]"),
            special(4, "[MASK]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [frame("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, frame("[SEP]")],
            "pair": [frame("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, frame("[SEP]")],
            "special_tokens": {"[CLS]": named(2, "[CLS]"), "[SEP]": named(3, "[SEP]")}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"model_type": "bert", "num_hidden_layers": 1, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_attention_heads": 4, "vocab_size": vocab.len(),
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
        "pad_token_id": 0});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors"), weights(vocab.len(), seed)).unwrap();
}

/// Weights: words of length one, everything else too small to change much.
fn weights(vocab: usize, seed: u64) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut header: BTreeMap<String, Value> = BTreeMap::new();
    let mut data: Vec<u8> = Vec::new();
    let mut add = |name: &str, shape: &[usize], mean: f64, scale: f64| {
        let begin = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            data.extend(((mean + scale * normal(&mut rng)) as f32).to_le_bytes());
        }
        let info = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert(name.to_string(), info);
    };
    add("embeddings.word_embeddings.weight", &[vocab, HIDDEN], 0.0, 1.0);
    add("embeddings.position_embeddings.weight", &[POSITIONS, HIDDEN], 0.0, 0.02);
    add("embeddings.token_type_embeddings.weight", &[2, HIDDEN], 0.0, 0.02);
    for (name, out, inside) in [
        ("attention.self.query", HIDDEN, HIDDEN),
        ("attention.self.key", HIDDEN, HIDDEN),
        ("attention.self.value", HIDDEN, HIDDEN),
        ("attention.output.dense", HIDDEN, HIDDEN),
        ("intermediate.dense", FFN, HIDDEN),
        ("output.dense", HIDDEN, FFN),
    ] {
        add(&format!("encoder.layer.0.{name}.weight"), &[out, inside], 0.0, 0.02);
        add(&format!("encoder.layer.0.{name}.bias"), &[out], 0.0, 0.02);
    }
    for name in ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"] {
        add(&format!("{name}.LayerNorm.weight"), &[HIDDEN], 1.0, 0.0);
        add(&format!("{name}.LayerNorm.bias"), &[HIDDEN], 0.0, 0.02);
    }
    let header = json!(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}
