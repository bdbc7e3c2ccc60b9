//! PEFT directories in and out, adapters beside weights of every kind of file, merged, and as GGUF.

use super::reference::{decoder, Weights};
use super::tiny_models::{self as tiny, Blocks, LLAMA};
use super::{handmill, json as tool_json, write_tiny};
use handmill::device::cpu::Cpu;
use handmill::model::adapter::{weight_name, Adapter, LoraConfig, Module, TARGETS};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::gguf::Gguf;
use handmill::model::llama::{Llama, Want};
use handmill::model::weights::LoadOptions;
use handmill::train::parameters;
use handmill::verify::normal;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{json, Value};
use std::path::Path;
use std::sync::Arc;

const IDS: [u32; 9] = [1, 99, 0, 42, 7, 7, 63, 12, 88];

fn adapter(dir: &Path) -> Adapter {
    let targets = TARGETS.iter().map(|target| target.0).collect();
    let config = LoraConfig { r: 3, alpha: 6.0, rslora: false, dropout: 0.0, targets, base: Some("tiny".into()) };
    let mut adapter = parameters::fresh(&Checkpoint::open(dir).unwrap().config, config, 1);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for value in adapter.modules.iter_mut().flat_map(|module| &mut module.b) {
        *value = 0.1 * normal(&mut rng) as f32;
    }
    adapter
}

fn merged(weights: &Weights, adapter: &Adapter) -> Weights {
    let mut merged = weights.clone();
    let (r, scale) = (adapter.config.r, f64::from(adapter.config.scale()));
    for Module { layer, target, k, a, b, .. } in &adapter.modules {
        for (at, value) in merged.get_mut(&weight_name(*layer, target)).unwrap().1.iter_mut().enumerate() {
            let (i, j) = (at / k, at % k);
            let sum: f64 = (0..r).map(|l| f64::from(b[i * r + l]) * f64::from(a[l * k + j])).sum();
            *value = (f64::from(*value) + scale * sum) as f32;
        }
    }
    merged
}

fn logits(llama: &Llama) -> Vec<f32> {
    let mut all = Vec::new();
    let mut each = |_: usize, rows: &[f32]| {
        all.extend_from_slice(rows);
        Ok(())
    };
    llama.forward(&mut llama.session(IDS.len()).unwrap(), &IDS, Want::All(&mut each)).unwrap();
    all
}

/// Largest |got − expected| over the largest |expected|.
fn worst(got: &[f32], expected: &[f64]) -> f64 {
    let scale = expected.iter().fold(0.0f64, |max, v| max.max(v.abs()));
    got.iter().zip(expected).fold(0.0, |max: f64, (&got, e)| max.max((f64::from(got) - e).abs() / scale))
}

#[test]
fn an_adapter_beside_weights_is_one_in_them() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path());
    let adapter = adapter(dir.path());
    let weights = tiny::random(&LLAMA, 8);
    let gguf = dir.path().join("tiny.gguf");
    let held = tiny::write_gguf(&gguf, &LLAMA, &weights, Blocks::Q8);
    for (path, weights) in [(dir.path(), &weights), (&gguf, &held)] {
        let mut llama =
            Llama::load(Arc::new(Cpu::new()), &Checkpoint::open(path).unwrap(), &LoadOptions::default()).unwrap();
        let plain = logits(&llama);
        llama.attach(&adapter).unwrap();
        let (_, expected) = decoder(&LLAMA, &merged(weights, &adapter), &IDS);
        // f32 against f64 as for decoders without one.
        let error = worst(&logits(&llama), &expected);
        assert!(error < 1e-5, "{}: off by {error:e}", path.display());
        assert!(worst(&plain, &expected) > 1e-2, "the adapter changes something");
        llama.detach();
        assert_eq!(logits(&llama), plain);
    }
}

#[test]
fn peft_directories_go_out_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path());
    let mut adapter = adapter(dir.path());
    adapter.base_sha256 = Some("00ff".into());
    let out = dir.path().join("adapter");
    adapter.save(&out).unwrap();
    assert_eq!(Adapter::open(&out).unwrap(), adapter);
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    for (key, value) in
        [("peft_type", json!("LORA")), ("r", json!(3)), ("lora_alpha", json!(6)), ("bias", json!("none"))]
    {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 7);

    // Only some layers and projections, which the config says.
    adapter.modules.retain(|module| module.layer == 1 && module.target == "v_proj");
    adapter.config.targets = vec!["v_proj"];
    adapter.save(&out).unwrap();
    assert_eq!(Adapter::open(&out).unwrap(), adapter);
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["layers_to_transform"], json!([1]));
}

#[test]
fn what_cannot_be_run_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path());
    let good = adapter(dir.path());
    let out = dir.path().join("adapter");
    good.save(&out).unwrap();
    let path = out.join("adapter_config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        Adapter::open(&out).map_err(|error| error.to_string())
    };
    with("a_field_of_tomorrow", json!({"x": [1]})).unwrap();
    assert_eq!(with("use_rslora", true.into()).unwrap().config.scale(), (6.0 / 3f64.sqrt()) as f32);
    for (key, value, what) in [
        ("use_dora", Value::Bool(true), "use_dora is true"),
        ("bias", "all".into(), "bias is"),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save"),
        ("rank_pattern", json!({"q_proj": 4}), "rank_pattern"),
        ("peft_type", "IA3".into(), "only LORA"),
        ("r", 4.into(), "has rank 3"),
        ("r", 0.into(), "r must be a rank"),
    ] {
        let said = with(key, value).unwrap_err();
        assert!(said.contains(what), "{key}: {said}");
    }
    std::fs::write(&path, config.to_string()).unwrap();

    let base = Checkpoint::open(dir.path()).unwrap().config;
    let check = |change: &dyn Fn(&mut Adapter)| {
        let mut adapter = good.clone();
        change(&mut adapter);
        adapter.check(&base).unwrap_err().to_string()
    };
    assert!(check(&|adapter| adapter.modules.clear()).contains("no module"));
    assert!(check(&|adapter| adapter.modules[3].layer = 2).contains("2 layers"));
    assert!(check(&|adapter| adapter.modules[3].k = 63).contains("made for another model"));

    // Files: names that mean nothing here, half a module, numbers that are none, and every byte of a header damaged.
    let weights = out.join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let replaced = |from: &str, to: &str| {
        let text = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = bytes.clone();
        bytes[text..text + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&weights, bytes).unwrap();
        Adapter::open(&out).unwrap_err().to_string()
    };
    assert!(replaced("lora_A", "lora_C").contains("no lora_A or lora_B"));
    assert!(replaced("layers.0.self_attn.q_proj", "layers.9.self_attn.q_proj").contains("only one of"));
    let mut broken = bytes.clone();
    let last = broken.len() - 4;
    broken[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, broken).unwrap();
    assert!(Adapter::open(&out).unwrap_err().to_string().contains("NaN"));
    for at in (0..bytes.len().min(4000)).step_by(13) {
        let mut broken = bytes.clone();
        broken[at] = broken[at].wrapping_add(101);
        std::fs::write(&weights, broken).unwrap();
        let _ = Adapter::open(&out); // an error or an adapter, never a panic
    }
    for length in (0..bytes.len()).step_by(bytes.len() / 50) {
        std::fs::write(&weights, &bytes[..length]).unwrap();
        assert!(Adapter::open(&out).is_err(), "{length} bytes");
    }
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(out.join("adapter_model.bin"), "pickle").unwrap();
    assert!(Adapter::open(&out).unwrap_err().to_string().contains("safe_serialization"));
}

#[test]
fn gguf_adapters_have_their_words_and_the_row_order_of_gguf() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path());
    let mut adapter = adapter(dir.path());
    adapter.config.rslora = true;
    let peft = dir.path().join("adapter");
    adapter.save(&peft).unwrap();
    let path = dir.path().join("adapter.gguf");
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let args =
        ["adapter", "export", "--model", &text(dir.path()), "--adapter", &text(&peft), "--out", &text(&path), "--json"];
    assert_eq!(tool_json(&args)["modules"], 14);
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.str("general.type").unwrap(), "adapter");
    assert_eq!(gguf.str("adapter.type").unwrap(), "lora");
    assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
    // alpha/r is all that its readers know: 6·sqrt(3) / 3 = 6 / sqrt(3).
    let alpha = gguf.f32("adapter.lora.alpha").unwrap();
    assert!((alpha - 6.0 * 3f32.sqrt()).abs() < 1e-5, "{alpha}");
    assert_eq!(gguf.tensors.len(), 28);
    let values = |name: &str| {
        let stored = gguf.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let bytes = &gguf.mmap[stored.offset..stored.offset + stored.len];
        bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<f32>>()
    };
    let module = |target: &str| adapter.modules.iter().find(|m| m.layer == 0 && m.target == target).unwrap();
    assert_eq!(values("blk.0.attn_q.weight.lora_a"), module("q_proj").a);
    assert_eq!(values("blk.0.ffn_down.weight.lora_b"), module("down_proj").b);
    // Heads of 16: stored row 2i+j of a head is row 8j+i.
    let (stored, plain) = (values("blk.0.attn_q.weight.lora_b"), &module("q_proj").b);
    for (row, values) in stored.chunks(3).enumerate() {
        let from = row / 16 * 16 + row % 16 % 2 * 8 + row % 16 / 2;
        assert_eq!(values, &plain[3 * from..3 * from + 3], "row {row}");
    }
}

#[test]
fn a_merged_model_says_what_the_adapter_says() {
    let dir = tempfile::tempdir().unwrap();
    let (base, peft, out) = (dir.path().join("base"), dir.path().join("adapter"), dir.path().join("merged"));
    std::fs::create_dir(&base).unwrap();
    write_tiny(&base);
    let adapter = adapter(&base);
    adapter.save(&peft).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let (base, peft, out) = (text(&base), text(&peft), text(&out));
    let report = tool_json(&["adapter", "merge", "--model", &base, "--adapter", &peft, "--out", &out, "--json"]);
    assert_eq!(report["modules"], 14);
    assert!(report["max_logit_diff"].as_f64().unwrap() < 1e-4, "{report}");
    assert!(report["kl_mean"].as_f64().unwrap() < 1e-8, "{report}");
    assert!(report.get("requantized").is_none(), "the base is not quantized");
    let merged_weights = merged(&tiny::random(&LLAMA, 8), &adapter);
    let llama = Llama::load(Arc::new(Cpu::new()), &Checkpoint::open(Path::new(&out)).unwrap(), &LoadOptions::default());
    let (_, expected) = decoder(&LLAMA, &merged_weights, &IDS);
    assert!(worst(&logits(&llama.unwrap()), &expected) < 1e-5);

    let info = tool_json(&["adapter", "info", &peft, "--model", &base, "--json"]);
    assert_eq!((&info["r"], &info["modules"], &info["layers"]), (&json!(3), &json!(14), &json!(2)));
    let module = adapter.modules.iter().find(|m| m.layer == 0 && m.target == "q_proj").unwrap();
    assert!(info["norms"]["q_proj"].as_f64().unwrap() > 0.0 && module.n == 64);
    let generated = tool_json(&[
        "generate",
        "--model",
        &base,
        "--adapter",
        &peft,
        "--prompt",
        "abc",
        "--max-tokens",
        "4",
        "--json",
    ]);
    let again = tool_json(&["generate", "--model", &out, "--prompt", "abc", "--max-tokens", "4", "--json"]);
    assert_eq!(generated["ids"], again["ids"]);

    let line = base.replace("base", "line.txt");
    std::fs::write(&line, "a mill grinds grain: 1, 2, 3").unwrap();
    let nll = |more: &[&str]| {
        let report = tool_json(&[&["eval", "--text", &line, "--json"], more].concat());
        report["mean_nll"].as_f64().unwrap()
    };
    let (beside, within) = (nll(&["--model", &base, "--adapter", &peft]), nll(&["--model", &out]));
    assert!((beside - within).abs() < 1e-5, "{beside} beside the weights, {within} in them");
    assert!((beside - nll(&["--model", &base])).abs() > 1e-3, "the adapter changes something");

    // Into a quantized model: what is written is exact, and what quantizing it again would cost is told.
    let (nf4, merged) = (base.replace("base", "nf4"), base.replace("base", "nf4-merged"));
    tool_json(&["quantize", "--model", &base, "--format", "nf4", "--out", &nf4, "--json"]);
    let report = tool_json(&["adapter", "merge", "--model", &nf4, "--adapter", &peft, "--out", &merged, "--json"]);
    assert!(report["max_logit_diff"].as_f64().unwrap() < 1e-4, "{report}");
    assert_eq!(report["requantized"]["format"], "nf4");
    let again = report["requantized"]["kl_mean"].as_f64().unwrap();
    assert!(again > report["kl_mean"].as_f64().unwrap() && again < 1.0, "{report}");

    // From an adapter's directory there is no way into another model, nor over the base.
    let wrong = handmill(&["adapter", "merge", "--model", &base, "--adapter", &peft, "--out", &base]);
    assert!(wrong.code == 1 && wrong.stderr.contains("holds the model itself"), "{}", wrong.stderr);
    let wrong = handmill(&["generate", "--model", &base, "--adapter", &base, "--prompt", "a"]);
    assert!(wrong.code == 1 && wrong.stderr.contains("adapter_config.json"), "{}", wrong.stderr);
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    for name in ["base", "other"] {
        std::fs::create_dir(path(name)).unwrap();
        write_tiny(Path::new(&path(name)));
    }
    // The same sizes, but not the same file.
    let config = Path::new(&path("other")).join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}\n")).unwrap();
    std::fs::write(path("text.txt"), "some text").unwrap();
    std::fs::write(path("rows.jsonl"), "{\"text\": \"abcd\"}\n").unwrap();
    let (base, other, out) = (path("base"), path("other"), path("out"));
    tool_json(&["finetune", "--model", &base, "--data", &path("rows.jsonl"), "--out", &out, "--json"]);

    let (merged, gguf, more) = (path("merged"), path("a.gguf"), path("more"));
    let (rows, text) = (path("rows.jsonl"), path("text.txt"));
    let commands: [&[&str]; 5] = [
        &["generate", "--adapter", &out, "--prompt", "ab", "--max-tokens", "0"],
        &["eval", "--adapter", &out, "--text", &text],
        &["adapter", "merge", "--adapter", &out, "--out", &merged],
        &["adapter", "export", "--adapter", &out, "--out", &gguf],
        &["finetune", "--adapter-init", &out, "--data", &rows, "--out", &more],
    ];
    for command in commands {
        let said = handmill(&[command, &["--model", &other]].concat());
        let refused = said.stderr.contains("another base") && said.stderr.contains("--any-base");
        assert!(said.code == 1 && refused, "{command:?}: {}", said.stderr);
        for taken in [&["--model", &base[..]][..], &["--model", &other, "--any-base"]] {
            for made in [&merged, &more] {
                let _ = std::fs::remove_dir_all(made);
            }
            let said = handmill(&[command, taken].concat());
            assert_eq!(said.code, 0, "{command:?} {taken:?}: {}", said.stderr);
        }
    }
    let said = handmill(&["adapter", "info", &out, "--model", &other]);
    assert!(said.code == 1 && said.stderr.contains("another base"), "{}", said.stderr);
}
