//! Runs the built tool on real models and on bad input. Needs the models: run `tools/fetch_models` once, or set
//! HANDMILL_MODELS.

#[path = "cli/quantize.rs"]
mod quantize;
#[path = "cli/sim.rs"]
mod sim;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use handmill::model::hf::Shard;
use handmill::npy;
use serde_json::Value;

/// What a run of the tool left.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs the tool with these arguments.
fn handmill(args: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_handmill")).args(args).env_remove("RUST_LOG").output().unwrap();
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
fn json(args: &[&str]) -> Value {
    let run = handmill(args);
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {}", run.stdout))
}

fn has_keys(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(object.get(key).is_some(), "no key {key} in {object}");
    }
}

/// A model of the folder HANDMILL_MODELS, or of its default place.
fn model(name: &str) -> String {
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
        cache.unwrap_or_else(|| home().join(".cache")).join("handmill/models")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run tools/fetch_models, or set HANDMILL_MODELS", path.display());
    path.to_str().expect("a path in UTF-8").to_string()
}

fn smollm2() -> String {
    model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn minilm() -> String {
    model("minilm")
}

/// The text that perplexity is measured on.
fn text() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/ppl_text.txt").to_string()
}

fn join(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().expect("a path in UTF-8").to_string()
}

#[test]
fn doctor_lists_the_devices_and_measures_them() {
    let found = json(&["doctor", "--json"]);
    has_keys(&found, &["devices", "auto"]);
    let devices = found["devices"].as_array().unwrap();
    for device in devices {
        has_keys(device, &["id", "name", "kind", "software", "available", "reason"]);
        let measured = device["software"] == false && device["available"] == true;
        assert!(measured || device["copy_gb_per_s"].is_null(), "{device}");
        assert_eq!(device["available"] == true, device["reason"].is_null(), "{device}");
        if measured {
            assert!(device["copy_gb_per_s"].as_f64().unwrap() > 0.1, "{device}");
            assert!(device["matmul_gflop_per_s"].as_f64().unwrap() > 0.1, "{device}");
        }
    }
    assert!(devices.iter().any(|device| device["id"] == found["auto"] && device["available"] == true));
    let run = handmill(&["doctor", "--device", "cpu"]);
    assert!(run.code == 0 && run.stdout.contains("--device auto takes "), "{}", run.stdout);
}

#[test]
fn verify_prints_a_line_a_check() {
    let run = handmill(&["verify", "--op", "rmsnorm", "--seeds", "2", "--json"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let lines: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 8, "{}", run.stdout);
    for line in &lines {
        has_keys(line, &["op", "kernel", "device", "case", "status", "error", "tolerance", "worst_index"]);
        assert_eq!(line["op"], "rmsnorm_f32");
        if line["status"] == "ok" {
            assert!(line["error"].as_f64().unwrap() <= line["tolerance"].as_f64().unwrap(), "{line}");
        }
    }
    assert!(lines.iter().any(|line| line["seed"] == 2 && line["status"] == "ok"));

    let kernel = lines[0]["kernel"].as_str().unwrap();
    let run = handmill(&["verify", "--device", "all", "--kernel", kernel]);
    assert!(run.code == 0 && run.stdout.contains(kernel) && run.stdout.contains(" 0 failed"), "{}", run.stdout);
}

#[test]
fn verify_runs_on_an_adapter_where_there_is_one() {
    let adapter = handmill::device::wgpu::list().into_iter().next();
    let run = handmill(&["verify", "--device", "wgpu", "--op", "add"]);
    match adapter {
        Some(adapter) => {
            assert_eq!(run.code, 0, "{}", run.stderr);
            assert!(run.stdout.contains(&adapter.name) && run.stdout.contains("add_f32_vec4"), "{}", run.stdout);
            // What it cannot be given is said in words.
            let run = handmill(&["verify", "--device", "wgpu:99", "--op", "add"]);
            assert!(run.code == 1 && run.stderr.contains("there is no such adapter"), "{}", run.stderr);
        }
        None => {
            assert!(run.code == 1 && run.stderr.contains("no adapter found"), "{}", run.stderr);
            assert!(std::env::var_os("HANDMILL_REQUIRE_WGPU").is_none(), "{}", run.stderr);
        }
    }
}

#[test]
fn generate_is_deterministic_and_lean() {
    let model = smollm2();
    let args = ["generate", "--model", &model, "--prompt", "The capital of France is", "--max-tokens", "12", "--json"];
    let first = json(&[&args[..], &["--top-logits", "10"]].concat());
    has_keys(&first, &["prompt_ids", "ids", "text", "prompt_tokens_per_s", "tokens_per_s", "device", "top_logits"]);
    assert!(first["text"].as_str().unwrap().starts_with(" Paris"), "{first}");
    assert_eq!(first["ids"].as_array().unwrap().len(), 12);
    let top = first["top_logits"].as_array().unwrap();
    assert_eq!(top.len(), 10);
    assert_eq!(top[0][0], first["ids"][0], "greedy takes the largest logit");
    assert!(top.windows(2).all(|pair| pair[0][1].as_f64() >= pair[1][1].as_f64()));

    let second = json(&args);
    assert_eq!((&first["ids"], &first["text"]), (&second["ids"], &second["text"]));
    assert!(second.get("top_logits").is_none());
    // The text streamed to a person is the same.
    let person = handmill(&args[..args.len() - 1]);
    assert_eq!(person.stdout, format!("{}\n", first["text"].as_str().unwrap()));
    assert!(person.stderr.contains("12 new tokens"), "{}", person.stderr);

    if let Some(peak) = second["peak_bytes"].as_u64() {
        let most = std::fs::metadata(&model).unwrap().len() + (200 << 20);
        assert!(peak < most, "{peak} bytes resident; at most {most} are expected");
    }
}

#[test]
fn generate_draws_by_seed_and_ends_before_a_stop_text() {
    let model = smollm2();
    let draw = |seed: &str| {
        let args = ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--seed", seed];
        let base = ["generate", "--model", &model, "--prompt", "Once upon", "--max-tokens", "16", "--json"];
        json(&[&base[..], &args].concat())["ids"].clone()
    };
    assert_eq!(draw("7"), draw("7"));
    assert_ne!(draw("7"), draw("8"));

    let base = ["generate", "--model", &model, "--prompt", "The capital of France is", "--json"];
    let stopped = json(&[&base[..], &["--stop", "aris"]].concat());
    assert_eq!((&stopped["text"], &stopped["ending"]), (&" P".into(), &"a stop text".into()), "{stopped}");
}

#[test]
fn prompts_are_taken_byte_for_byte() {
    let (model, folder) = (smollm2(), tempfile::tempdir().unwrap());
    let file = join(folder.path(), "prompt.txt");
    std::fs::write(&file, "Hello  \r\n<|im_end|>\n").unwrap();
    let ids = |args: &[&str]| {
        let base = ["generate", "--model", &model, "--max-tokens", "0", "--json"];
        json(&[&base[..], args].concat())["prompt_ids"].clone()
    };
    let from_file = ids(&["--prompt-file", &file]);
    assert_eq!(from_file, ids(&["--prompt", "Hello  \r\n<|im_end|>\n"]));
    assert!(from_file.as_array().unwrap().contains(&2.into()), "<|im_end|> is recognised: {from_file}");
    assert_eq!(ids(&["--prompt", ""]), Value::Array(vec![]));

    let chat = ids(&["--chat", "--system", "Be brief.", "--prompt", "Hi"]);
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(chat, ids(&["--prompt", text]));
}

#[test]
fn eval_measures_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let out = join(folder.path(), "logprobs.safetensors");
    let found =
        json(&["eval", "--model", &smollm2(), "--text", &text(), "--max-tokens", "64", "--logprobs", &out, "--json"]);
    has_keys(&found, &["tokens", "mean_nll", "perplexity", "tokens_per_s"]);
    let (nll, perplexity) = (found["mean_nll"].as_f64().unwrap(), found["perplexity"].as_f64().unwrap());
    assert!(found["tokens"] == 64 && nll.is_finite() && (perplexity / nll.exp() - 1.0).abs() < 1e-12, "{found}");

    let shard = Shard::open(Path::new(&out)).unwrap();
    let [tensor] = &shard.tensors[..] else { panic!("one tensor is expected") };
    assert_eq!((tensor.name.as_str(), &tensor.shape[..]), ("logprobs", &[63][..]));
    let bytes = &shard.mmap[tensor.offset..tensor.offset + tensor.len];
    let logprobs: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
    let mean = -logprobs.iter().map(|&l| l as f64).sum::<f64>() / 63.0;
    assert!((mean - nll).abs() < 1e-6, "{mean} and {nll}");
}

#[test]
fn embed_writes_a_unit_vector_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let (lines, out) = (join(folder.path(), "lines.txt"), join(folder.path(), "x.npy"));
    std::fs::write(&lines, "A man is eating food.\n\nA man eats something.\r\nThe moon is far away.").unwrap();
    let found = json(&["embed", "--model", &minilm(), "--lines", &lines, "--out", &out, "--json"]);
    assert_eq!((&found["n"], &found["d"]), (&4.into(), &384.into()));
    let array = npy::Array::open::<f32>(Path::new(&out)).unwrap();
    assert_eq!(array.shape, [4, 384]);
    let values: Vec<f32> = array.to_vec();
    let rows: Vec<&[f32]> = values.chunks(384).collect();
    let dot = |a: usize, b: usize| rows[a].iter().zip(rows[b]).map(|(a, b)| (a * b) as f64).sum::<f64>();
    for row in 0..4 {
        assert!((dot(row, row) - 1.0).abs() < 1e-5, "row {row} has the norm {}", dot(row, row).sqrt());
    }
    assert!(dot(0, 2) > 0.7 && dot(0, 3) < 0.3, "{} {}", dot(0, 2), dot(0, 3));
}

#[test]
fn bad_input_is_told_in_words_with_the_right_exit_code() {
    let (model, folder) = (smollm2(), tempfile::tempdir().unwrap());
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.path().join(name), bytes).unwrap();
        join(folder.path(), name)
    };
    let whole = std::fs::read(&model).unwrap();
    let truncated = file("truncated.gguf", &whole[..4 << 20]);
    let garbage = file("garbage.gguf", b"hello, this is no model");
    let binary = file("binary.txt", b"fine so far\n\xff\xfe");
    let lines = file("lines.txt", b"one\ntwo\n");
    let empty = join(folder.path(), "empty");
    std::fs::create_dir(&empty).unwrap();
    let (missing, out) = (join(folder.path(), "missing.gguf"), join(folder.path(), "out"));
    let nowhere = join(folder.path(), "nowhere/x.npy");
    let minilm = minilm();

    // Arguments, exit code, words of the message.
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["generate", "--model", &missing, "--prompt", "x"], 1, &["missing.gguf", "No such file"]),
        (&["generate", "--model", &empty, "--prompt", "x"], 1, &["empty", "config.json"]),
        (&["generate", "--model", &truncated, "--prompt", "x"], 1, &["truncated.gguf", "fetch it again"]),
        (&["generate", "--model", &garbage, "--prompt", "x"], 1, &["garbage.gguf", "not a GGUF file"]),
        (&["generate", "--model", &model, "--prompt", ""], 1, &["no tokens", "give a prompt"]),
        (&["generate", "--model", &model, "--prompt-file", &binary], 1, &["binary.txt", "line 2", "UTF-8"]),
        (&["generate", "--model", &minilm, "--prompt", "x"], 1, &["minilm", "encoder"]),
        (&["generate", "--model", &model, "--prompt", "x", "--device", "abacus"], 1, &["abacus", "doctor"]),
        (&["generate", "--model", &model, "--prompt", "x", "--temperature=-1"], 2, &["temperature", "-1"]),
        (&["generate", "--model", &model, "--prompt", "x", "--frobnicate"], 2, &["--frobnicate", "Usage"]),
        (&["generate", "--model", &model], 2, &["--prompt"]),
        (&["generate", "--model", &model, "--prompt", "x", "--prompt-file", &lines], 2, &["cannot be used with"]),
        (&["generate", "--model", &model, "--prompt", "x", "--system", "y"], 2, &["--chat"]),
        (&["eval", "--model", &model, "--text", &binary], 1, &["binary.txt", "UTF-8"]),
        (&["eval", "--model", &model, "--text", &file("one.txt", b"a")], 1, &["one.txt", "at least 2"]),
        (&["eval", "--model", &model, "--text", &missing], 1, &["missing.gguf"]),
        (&["eval", "--model", &model, "--text", &lines, "--max-tokens", "1"], 2, &["--max-tokens"]),
        (&["embed", "--model", &model, "--lines", &lines, "--out", &out], 1, &["Q4_1.gguf", "Hugging Face directory"]),
        (&["embed", "--model", &minilm, "--lines", &lines, "--out", &nowhere], 1, &["nowhere/x.npy"]),
        (&["embed", "--model", &minilm, "--lines", &lines, "--out", &lines], 2, &["written over"]),
        (&["eval", "--model", &model, "--text", &lines, "--logprobs", &lines], 2, &["written over"]),
        (&["embed", "--model", &minilm, "--lines", &lines, "--out", &empty], 1, &["empty", "is a directory"]),
        (&["quantize", "--model", &truncated, "--format", "q8", "--out", &out], 1, &["truncated.gguf"]),
        (&["quantize", "--model", &minilm, "--format", "q8", "--out", &out], 1, &["minilm", "encoder"]),
        (&["quantize", "--model", &model, "--format", "q3", "--out", &out], 2, &["q3", "nf4"]),
        (&["quantize", "--model", &model, "--format", "q8", "--double-quant", "--out", &out], 2, &["nf4"]),
        (&["verify", "--op", "sorting"], 2, &["sorting", "rmsnorm"]),
        (&["verify", "--kernel", "sorting"], 2, &["sorting", "rmsnorm_f32"]),
        (&["verify", "--device", "abacus"], 1, &["abacus"]),
        (&["doctor", "--device", "abacus"], 1, &["abacus"]),
        (&["sim", "sorting"], 2, &["sorting does not exist", "rmsnorm_f32_warp"]),
        (&["sim", "rmsnorm_f32_rows"], 2, &["rmsnorm_f32_rows is not in PTX"]),
        (&["sim", "rmsnorm_f32_warp", "--dim", "K"], 2, &["--dim K", "NAME=VALUE"]),
        (&["sim", "rmsnorm_f32_warp", "--dim", "Q=1"], 2, &["--dim Q=1", "M, K, eps"]),
        (&["sim", "rmsnorm_f32_warp", "--dim", "K=0"], 2, &["K is from 1 to 1048576"]),
        (&["sim", "rmsnorm_f32_warp", "--dim", "eps=small"], 2, &["eps is a number"]),
        (&["sim", "rmsnorm_f32_warp", "--dim", "M=1000000", "--dim", "K=1000000"], 2, &["at most 1.07 GB"]),
        (&["sim", "rmsnorm_f32_warp", "--trace", "32,0"], 2, &["--trace 32,0", "32 blocks of 4 warps"]),
        (&["frobnicate"], 2, &["frobnicate"]),
        (&[], 2, &["Usage"]),
    ];
    for (args, code, words) in cases {
        let run = handmill(args);
        assert_eq!(run.code, *code, "{args:?}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{args:?} prints {}", run.stdout);
        for word in *words {
            assert!(run.stderr.contains(word), "{args:?}: no {word} in {}", run.stderr);
        }
    }
    assert!(!Path::new(&out).exists(), "nothing is written where nothing could be");
    assert_eq!(handmill(&["--help"]).code, 0);
    assert_eq!(handmill(&["--version"]).code, 0);
}

#[test]
fn a_reader_that_goes_away_is_no_fault() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_handmill"))
        .args(["verify", "--op", "rmsnorm", "--seeds", "200", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    reader.read_line(&mut line).unwrap();
    drop(reader);
    let output = child.wait_with_output().unwrap();
    assert!(line.starts_with('{'));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{:?}: {stderr}", output.status);
}
