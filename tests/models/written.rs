//! Models that were quantized and written: tiny decoders of every architecture, read back, against a directory that
//! holds the same values as f32.

use super::reference::{Shape, Weights};
use super::tiny::{self, LLAMA};
use super::{device, worst};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::LanguageModel;
use handmill::model::llama::{Llama, Want};
use handmill::model::weights::LoadOptions;
use handmill::model::write::{self, Quantized, Target};
use handmill::quant::{self, Format};
use handmill::tensor::Dtype;
use serde_json::{json, Value};
use std::fs;
use std::path::Path;

const IDS: [u32; 9] = [1, 99, 0, 42, 7, 7, 63, 12, 88];

/// A byte-level BPE tokenizer of a few tokens, split as SmolLM2 splits.
fn tokenizer() -> Value {
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(0, "</s>"), special(1, "<s>")],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": {"</s>": 0, "<s>": 1, "a": 2, "l": 3, "o": 4, "Ġ": 5, "lo": 6, "1": 7, "x": 9},
                  "merges": [["l", "o"]]}
    })
}

/// Writes a Hugging Face directory; `scaling` replaces what its config says of rotary embeddings.
fn write_dir(dir: &Path, shape: &Shape, weights: &Weights, scaling: Option<&Value>) {
    tiny::write_hf(dir, shape, weights, Dtype::F32);
    if let Some(scaling) = scaling {
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["rope_scaling"] = scaling.clone();
        fs::write(path, config.to_string()).unwrap();
    }
    fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), r#"{"add_bos_token": true, "chat_template": "{{ bos_token }}"}"#)
        .unwrap();
    fs::write(dir.join("generation_config.json"), r#"{"bos_token_id": 1, "eos_token_id": [0]}"#).unwrap();
}

fn logits(path: &Path) -> Vec<f32> {
    let llama = Llama::load(device(), &Checkpoint::open(path).unwrap(), &LoadOptions::default()).unwrap();
    let mut all = Vec::new();
    let mut each = |_: usize, rows: &[f32]| {
        all.extend_from_slice(rows);
        Ok(())
    };
    llama.forward(&mut llama.session(IDS.len()).unwrap(), &IDS, Want::All(&mut each)).unwrap();
    all
}

/// The weights as the report says they are stored.
fn stored(weights: &Weights, report: &Quantized) -> Weights {
    let mut weights = weights.clone();
    for tensor in &report.tensors {
        let (dims, values) = weights.get_mut(&tensor.name).expect("a tensor of the source");
        assert_eq!(&tensor.shape, dims);
        if let &mut [n, k] = &mut dims[..] {
            *values = quant::decode(&quant::encode(tensor.format, n, k, values).unwrap());
        }
    }
    weights
}

fn quantize(from: &Path, target: Target, out: &Path) -> Quantized {
    let (mut last, mut steps) = ((0, 1), 0);
    let mut on_progress = |done: usize, total: usize| {
        assert!(done > last.0 && done <= total);
        (last, steps) = ((done, total), steps + 1);
    };
    let report = write::quantize(&Checkpoint::open(from).unwrap(), target, out, &mut on_progress).unwrap();
    assert_eq!((last.0, steps), (last.1, 2 * report.tensors.len()));
    report
}

/// Holds a written model against a directory with the same values: f32 sums in other orders.
fn check(written: &Path, shape: &Shape, weights: &Weights, scaling: Option<&Value>) {
    let same = tempfile::tempdir().unwrap();
    write_dir(same.path(), shape, weights, scaling);
    let expected: Vec<f64> = logits(same.path()).iter().map(|&l| l as f64).collect();
    let error = worst(&logits(written), &expected);
    assert!(error < 1e-5, "{} {}: logits are off by {error:e}", shape.arch, written.display());

    let model = LanguageModel::open(written, device(), &LoadOptions::default()).unwrap();
    assert_eq!(model.prompt_ids("lo 1a<s>").unwrap(), [1, 6, 5, 7, 2, 1]);
    assert_eq!((model.stop_ids(), model.chat_template.as_deref()), (vec![0], Some("{{ bos_token }}")));
    assert_eq!(model.chat_ids(&[]).unwrap(), [1]);
}

#[test]
fn every_architecture_goes_to_gguf_and_on_to_nf4() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 16});
    let stretched = Shape { stretch: 4.0, tied: true, ..LLAMA };
    let biased = Shape { bias: true, ..LLAMA };
    for (shape, scaling) in [
        (LLAMA, None),
        (LLAMA, Some(&llama3)),
        (stretched, None),
        (biased, None),
        (tiny::qwen2(), None),
        (tiny::qwen3(), None),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let weights = tiny::random(&shape, 5);
        fs::create_dir(path("source")).unwrap();
        write_dir(&path("source"), &shape, &weights, scaling);
        let mut eight_bits = None;
        for target in [Target::Q8, Target::Q4] {
            let out = path(&format!("{target:?}"));
            let report = quantize(&path("source"), target, &out);
            let weights = stored(&weights, &report);
            check(&report.path, &shape, &weights, scaling);
            // Rows that are no whole blocks stay in f16.
            let whole = (shape.heads * shape.head_dim) % 32 == 0;
            let o_proj = report.tensors.iter().find(|t| t.name.ends_with("0.self_attn.o_proj.weight")).unwrap();
            assert_eq!(o_proj.format, if whole { target.format() } else { Format::F16 });
            eight_bits.get_or_insert((report.path, weights));
        }
        let (gguf, weights) = eight_bits.unwrap();
        for target in [Target::Nf4, Target::Nf4Dq] {
            let out = path(&format!("{target:?}"));
            if (shape.heads * shape.head_dim) % 64 != 0 || scaling.is_some() {
                // Rows that are no whole blocks, or a scaling that a GGUF file only has the effect of.
                let error = write::quantize(&Checkpoint::open(&gguf).unwrap(), target, &out, &mut |_, _| {});
                let error = error.unwrap_err().to_string();
                assert!(error.contains("multiple of 64") || error.contains("rotary frequencies"), "{error}");
                assert!(!out.exists());
                continue;
            }
            let report = quantize(&gguf, target, &out);
            check(&report.path, &shape, &stored(&weights, &report), scaling);
        }
    }
}

#[test]
fn a_tokenizer_that_gguf_cannot_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    fs::create_dir(&source).unwrap();
    write_dir(&source, &LLAMA, &tiny::random(&LLAMA, 5), None);
    let refused = |tokenizer: Value, word: &str| {
        fs::write(source.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let error = write::quantize(&Checkpoint::open(&source).unwrap(), Target::Q8, &out, &mut |_, _| {});
        let error = error.unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains(word), "{error}");
        assert!(!out.exists(), "nothing stays behind");
    };
    let with = |pointer: &str, value: Value| {
        let mut tokenizer = tokenizer();
        *tokenizer.pointer_mut(pointer).unwrap() = value;
        tokenizer
    };
    refused(with("/pre_tokenizer/pretokenizers/0", json!({"type": "Punctuation"})), "Punctuation");
    refused(with("/normalizer", json!({"type": "Lowercase"})), "Lowercase");
    refused(with("/model/vocab/x", json!(100)), "100 rows");
}

#[test]
fn what_a_killed_run_left_is_cleared_and_a_live_one_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    fs::create_dir(&source).unwrap();
    write_dir(&source, &LLAMA, &tiny::random(&LLAMA, 5), None);
    let staging = out.join(".handmill.partial");
    fs::create_dir_all(&staging).unwrap();
    fs::write(staging.join("model.gguf"), b"half a mod").unwrap();

    let live = fs::File::create(staging.join("lock")).unwrap();
    live.lock().unwrap();
    let busy = write::quantize(&Checkpoint::open(&source).unwrap(), Target::Q8, &out, &mut |_, _| {});
    let error = busy.unwrap_err().to_string();
    assert!(error.contains("another run") && staging.join("model.gguf").exists(), "{error}");

    drop(live);
    quantize(&source, Target::Q8, &out);
    let left: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["model.gguf"]);
}
