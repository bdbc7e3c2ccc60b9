//! Fine-tuning: against PEFT on a real model, against f64 on tiny ones, and through the tool.

#[path = "train/adapters.rs"]
mod adapters;
#[path = "train/data.rs"]
mod data;
#[path = "train/devices.rs"]
mod devices;
#[path = "train/peft.rs"]
mod peft;
#[path = "models/reference.rs"]
#[allow(dead_code)] // the encoder is tests/models'
mod reference;
#[path = "train/runs.rs"]
mod runs;
#[path = "train/tiny.rs"]
mod tiny;
#[path = "models/tiny.rs"]
#[allow(dead_code)] // some writers are tests/models'
mod tiny_models;

use std::path::PathBuf;

/// A model of the folder HANDMILL_MODELS, or of its default place.
pub fn model(name: &str) -> PathBuf {
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
        cache.unwrap_or_else(|| home().join(".cache")).join("handmill/models")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run tools/fetch_models, or set HANDMILL_MODELS", path.display());
    path
}

/// True when there is an adapter for WGSL; a machine need not have one unless HANDMILL_REQUIRE_WGPU is set.
pub fn has_adapter() -> bool {
    match handmill::device::open("wgpu") {
        Ok(_) => true,
        Err(reason) if std::env::var_os("HANDMILL_REQUIRE_WGPU").is_some() => panic!("{reason}"),
        Err(reason) => {
            eprintln!("not tested: {reason}");
            false
        }
    }
}

/// SmolLM2-135M.
pub fn smollm2() -> PathBuf {
    model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// A file of tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name].iter().collect()
}

/// Writes a tiny Llama with random weights, a tokenizer of single characters and a chat template.
pub fn write_tiny(dir: &std::path::Path) {
    use handmill::tensor::Dtype;
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

/// What a run of the tool left.
pub struct Run {
    /// Exit code.
    pub code: i32,
    /// Results.
    pub stdout: String,
    /// Everything else.
    pub stderr: String,
}

/// Runs the tool with these arguments.
pub fn handmill(args: &[&str]) -> Run {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_handmill"));
    let output = command.args(args).env_remove("RUST_LOG").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the tool prints UTF-8");
    let run = Run {
        code: output.status.code().expect("the tool was ended by a signal"),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    };
    assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
    run
}

/// The JSON object that a run which must succeed prints.
pub fn json(args: &[&str]) -> serde_json::Value {
    let run = handmill(args);
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {}", run.stdout))
}
