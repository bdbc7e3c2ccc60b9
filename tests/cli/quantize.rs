//! `handmill quantize` on a real model, there and back.

use std::path::Path;
use std::sync::Arc;

use handmill::device::cpu::Cpu;
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::LanguageModel;
use handmill::model::gguf::Gguf;
use handmill::model::weights::LoadOptions;
use handmill::quant::Format;
use serde_json::Value;

use super::{handmill, has_keys, join, json, smollm2, text};

const TOKENS: usize = 128;

fn quantize(model: &str, out: &str, format: &[&str]) -> Value {
    let base = ["quantize", "--model", model, "--out", out, "--json", "--format"];
    let report = json(&[&base[..], format].concat());
    has_keys(&report, &["bytes_before", "bytes_after", "tensors"]);
    report["tensors"].as_array().unwrap().iter().for_each(|t| has_keys(t, &["name", "format", "nmse", "max_abs"]));
    report
}

fn mean_nll(model: &str) -> f64 {
    let count = TOKENS.to_string();
    let found = json(&["eval", "--model", model, "--text", &text(), "--max-tokens", &count, "--json"]);
    found["mean_nll"].as_f64().unwrap()
}

/// The model's mean nll when its layers are quantized on loading.
fn mean_nll_as(format: Format) -> f64 {
    let options = LoadOptions { quant: Some(format), ..LoadOptions::default() };
    let model = LanguageModel::open(Path::new(&smollm2()), Arc::new(Cpu::new()), &options).unwrap();
    let ids = model.tokenizer.encode(&std::fs::read_to_string(text()).unwrap()).unwrap();
    model.evaluate(&ids[..TOKENS]).unwrap().mean_nll
}

/// The largest nmse of the tensors of a format, and how many there are.
fn worst(report: &Value, format: &str) -> (f64, usize) {
    let tensors = report["tensors"].as_array().unwrap();
    let of_format: Vec<_> = tensors.iter().filter(|t| t["format"] == format).collect();
    (of_format.iter().map(|t| t["nmse"].as_f64().unwrap()).fold(0.0, f64::max), of_format.len())
}

#[test]
fn q8_and_q4_write_gguf() {
    let (model, folder) = (smollm2(), tempfile::tempdir().unwrap());
    let (q8, q4) = (join(folder.path(), "q8"), join(folder.path(), "q4"));
    let report = quantize(&model, &q8, &["q8"]);
    // 210 projections, and the embedding, which is Q8_0 in the source. A weight errs by half a step, absmax/254, at
    // most; 32 of them together have at least the square of absmax. Rounding the scale to f16 adds a little.
    let (nmse, count) = worst(&report, "q8");
    assert!(count == 211 && nmse > 0.0 && nmse < 32.0 / 254f64.powi(2) * 1.01, "{count} {nmse}");
    assert_eq!(worst(&report, "f32"), (0.0, 61));
    let report = quantize(&model, &q4, &["q4"]);
    assert_eq!(worst(&report, "q4"), (0.0, 210), "the source is Q4_1 already");

    let (q8, q4) = (join(Path::new(&q8), "model.gguf"), join(Path::new(&q4), "model.gguf"));
    let bytes = |path: &str| std::fs::metadata(path).unwrap().len();
    assert_eq!(report["bytes_before"], bytes(&model));
    assert_eq!(report["bytes_after"], bytes(&q4));

    // Every tensor of q4 has the source's bytes; every pair of the header is the source's.
    let (source, written) = (Gguf::open(Path::new(&model)).unwrap(), Gguf::open(Path::new(&q4)).unwrap());
    assert_eq!(source.tensors.len(), written.tensors.len());
    for tensor in &source.tensors {
        let other = written.tensor(&tensor.name).unwrap();
        assert_eq!((tensor.encoding, &tensor.shape), (other.encoding, &other.shape), "{}", tensor.name);
        let same = source.mmap[tensor.offset..][..tensor.len] == written.mmap[other.offset..][..other.len];
        assert!(same, "{} has other bytes", tensor.name);
    }
    assert_eq!(source.keys().collect::<Vec<_>>(), written.keys().collect::<Vec<_>>());
    source.keys().for_each(|key| assert_eq!(source.stored(key), written.stored(key), "{key}"));
    assert_eq!(Gguf::open(Path::new(&q8)).unwrap().u32("general.file_type").unwrap(), 7);

    assert_eq!(mean_nll(&q4), mean_nll(&model));
    let found = mean_nll(&q8);
    let expected = mean_nll_as(Format::Q8 { group: 32, wide: false, affine: false });
    assert!((found - expected).abs() < 1e-6, "{found}, and {expected} quantized on loading");
    // Adding 3e-5 of noise to weights of 7e-3 cannot be seen.
    assert!((found - mean_nll(&model)).abs() < 0.03, "{found}");

    let args = ["generate", "--model", &q8, "--prompt", "The capital of France is", "--max-tokens", "4", "--json"];
    assert!(json(&args)["text"].as_str().unwrap().starts_with(" Paris"));
}

#[test]
fn nf4_writes_a_directory_that_goes_back_to_gguf() {
    let (model, folder) = (smollm2(), tempfile::tempdir().unwrap());
    let (plain, double) = (join(folder.path(), "nf4"), join(folder.path(), "nf4dq"));
    let report = quantize(&model, &plain, &["nf4"]);
    // Of 1.28 million normal numbers in blocks of 64 the nmse is 0.0085; weights are nearly normal.
    let (nmse, count) = worst(&report, "nf4");
    assert!(count == 210 && nmse > 0.005 && nmse < 0.015, "{count} {nmse}");
    // f16 errs by 2^-11 of a value at most.
    let (nmse, count) = worst(&report, "f16");
    assert!(count == 1 && nmse < 2f64.powi(-22), "{count} {nmse}");
    let smaller = quantize(&model, &double, &["nf4", "--double-quant"]);
    assert!(smaller["bytes_after"].as_u64() < report["bytes_after"].as_u64());

    // The names transformers looks for.
    let config: Value =
        serde_json::from_slice(&std::fs::read(join(Path::new(&double), "config.json")).unwrap()).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "bitsandbytes");
    assert_eq!(quantization["load_in_4bit"], true);
    assert_eq!(quantization["bnb_4bit_quant_type"], "nf4");
    assert_eq!(quantization["bnb_4bit_use_double_quant"], true);
    let checkpoint = Checkpoint::open(Path::new(&double)).unwrap();
    for end in [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"] {
        assert!(checkpoint.has(&format!("model.layers.29.mlp.down_proj.weight{end}")), "{end}");
    }
    let codes = checkpoint.tensor("model.layers.0.mlp.down_proj.weight").unwrap();
    assert_eq!(codes.shape, [576 * 1536 / 2, 1]);

    for (dir, format) in [(&plain, Format::Nf4), (&double, Format::Nf4Dq)] {
        let (found, expected) = (mean_nll(dir), mean_nll_as(format));
        // The embedding, which is the head too, went from Q8_0 to f16: 2^-11 of logits that reach some 20.
        assert!((found - expected).abs() < 20.0 * 2f64.powi(-11), "{found}, and {expected} quantized on loading");
    }

    let (back, again) = (join(folder.path(), "back"), join(folder.path(), "again"));
    let report = quantize(&plain, &again, &["nf4"]);
    assert_eq!(worst(&report, "nf4"), (0.0, 210));
    let bytes = |dir: &str| std::fs::read(join(Path::new(dir), "model.safetensors")).unwrap();
    assert!(bytes(&plain) == bytes(&again), "nf4 of nf4 is the same file");

    quantize(&plain, &back, &["q8"]);
    let back = join(Path::new(&back), "model.gguf");
    let gguf = Gguf::open(Path::new(&back)).unwrap();
    let source = Gguf::open(Path::new(&model)).unwrap();
    assert_eq!(gguf.str("tokenizer.ggml.pre").unwrap(), "smollm");
    for key in ["tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "add_bos_token", "padding_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        assert_eq!(source.stored(&key), gguf.stored(&key), "{key}");
    }
    assert_eq!(source.stored("tokenizer.chat_template"), gguf.stored("tokenizer.chat_template"));
    let (found, expected) = (mean_nll(&back), mean_nll(&plain));
    assert!((found - expected).abs() < 0.03, "{found} and {expected}");
}

#[test]
fn nothing_is_overwritten_that_is_not_the_same_kind_of_model() {
    let (model, folder) = (smollm2(), tempfile::tempdir().unwrap());
    let out = join(folder.path(), "out");
    let refused = |model: &str, out: &str, word: &str| {
        let run = handmill(&["quantize", "--model", model, "--format", "q4", "--out", out]);
        assert!(run.code == 1 && run.stderr.contains(word), "{}", run.stderr);
    };
    std::fs::create_dir(&out).unwrap();
    let notes = join(Path::new(&out), "notes.txt");
    std::fs::write(&notes, "precious").unwrap();
    refused(&model, &out, "notes.txt");
    assert_eq!(std::fs::read(&notes).unwrap(), b"precious");
    refused(&model, &notes, "notes.txt");

    // A GGUF in its place is replaced, unless it is the source.
    std::fs::remove_file(&notes).unwrap();
    let written = join(Path::new(&out), "model.gguf");
    std::fs::write(&written, "an older model").unwrap();
    quantize(&model, &out, &["q4"]);
    assert!(Checkpoint::open(Path::new(&written)).is_ok());
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1, "no leftovers");
    refused(&written, &out, "holds the model itself");
    let run = handmill(&["quantize", "--model", &model, "--format", "nf4", "--out", &out]);
    assert!(run.code == 1 && run.stderr.contains("model.gguf"), "{}", run.stderr);
}
