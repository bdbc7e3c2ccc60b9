//! A tiny model that talks: random weights, single characters for tokens, a chat template.

use std::path::Path;

use handmill::tensor::Dtype;

use super::tiny_models;

/// Writes a tiny Llama with random weights, a tokenizer of single characters and a chat template.
pub fn write_tiny(dir: &Path) {
    let shape = tiny_models::LLAMA;
    tiny_models::write_hf(dir, &shape, &tiny_models::random(&shape, 8), Dtype::F32);
    let mut vocab = serde_json::Map::new();
    for token in ["<|im_end|>", "<|im_start|>", "Ġ", "Ċ"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    for token in ('a'..='z').chain('A'..='Z').chain('0'..='9').chain(".,:;!?'-#[]{}()/".chars()) {
        vocab.insert(token.to_string(), vocab.len().into());
    }
    assert!(vocab.len() <= shape.vocab);
    let special = |id: usize, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let bytes =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(0, "<|im_end|>"), special(1, "<|im_start|>")],
        "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []}
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                    '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
                    {% endif %}";
    let config = serde_json::json!({ "add_bos_token": false, "chat_template": template });
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}
