//! Runs through the tool on a tiny model: what they leave, that they repeat themselves, and that they can be cut off.

use super::{fixture, handmill, has_adapter, json, write_tiny};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A folder with a model, rows to train on and rows held out.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(place.path("model")).unwrap();
        write_tiny(&place.path("model"));
        let row = |a: usize, b: usize| format!("{{\"prompt\": \"{a} + {b} = \", \"completion\": \"{}\"}}\n", a + b);
        let all = || (0..6).flat_map(|a| (0..6).map(move |b| (a, b)));
        let pick = |held: bool| all().filter(move |(a, b)| ((a * 5 + b) % 7 == 0) == held);
        fs::write(place.path("train.jsonl"), pick(false).map(|(a, b)| row(a, b)).collect::<String>()).unwrap();
        fs::write(place.path("eval.jsonl"), pick(true).map(|(a, b)| row(a, b)).collect::<String>()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    /// The arguments of a run into `out`.
    fn args(&self, out: &str, more: &[&str]) -> Vec<String> {
        let mut args = vec!["finetune".to_string(), "--model".into(), self.text("model"), "--data".into()];
        args.extend([self.text("train.jsonl"), "--out".into(), self.text(out), "--json".into()]);
        args.extend(more.iter().map(|arg| arg.to_string()));
        args
    }

    fn run(&self, out: &str, more: &[&str]) -> Value {
        let args = self.args(out, more);
        json(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn fails(&self, out: &str, more: &[&str]) -> (i32, String) {
        let args = self.args(out, more);
        let run = handmill(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_ne!(run.code, 0, "{args:?}");
        (run.code, run.stderr)
    }

    fn adapter(&self, out: &str) -> Vec<u8> {
        fs::read(self.path(out).join("adapter_model.safetensors")).unwrap()
    }

    fn metrics(&self, out: &str) -> Vec<Value> {
        lines(&self.path(out))
    }
}

fn lines(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What two runs must have in common: everything but times.
fn losses(lines: &[Value]) -> Vec<(u64, f64, f64, f64)> {
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
    lines
        .iter()
        .map(|line| {
            (line["step"].as_u64().unwrap(), number(line, "loss"), number(line, "lr"), number(line, "grad_norm"))
        })
        .collect()
}

const SETTINGS: [&str; 14] = [
    "--r",
    "4",
    "--lr",
    "2e-2",
    "--schedule",
    "cosine",
    "--warmup",
    "5",
    "--batch",
    "2",
    "--accumulate",
    "2",
    "--dropout",
    "0.1",
];

#[test]
fn a_run_learns_and_leaves_its_files() {
    let place = Place::new();
    let more = ["--steps", "40", "--eval-data", &place.text("eval.jsonl"), "--eval-every", "10", "--grad-clip", "1"];
    let report = place.run("out", &[&SETTINGS[..], &more].concat());
    assert_eq!((&report["steps"], &report["status"]), (&Value::from(40), &Value::from("finished")));
    let number = |key: &str| report[key].as_f64().unwrap();
    assert!(number("loss_last") < 0.7 * number("loss_first"), "{report}");
    assert!(number("eval_loss_best") < 0.7 * number("eval_loss_before"), "{report}");

    let metrics = place.metrics("out");
    assert_eq!(metrics.len(), 40);
    for (i, line) in metrics.iter().enumerate() {
        assert_eq!(line["step"], i + 1);
        for key in ["loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_bytes"] {
            assert!(line.get(key).is_some(), "no {key} in {line}");
        }
        assert_eq!(line.get("eval_loss").is_some(), (i + 1) % 10 == 0, "{line}");
    }
    let run: Value = serde_json::from_slice(&fs::read(place.path("out/run.json")).unwrap()).unwrap();
    for key in [
        "seed",
        "base_sha256",
        "data_sha256",
        "prepared_sha256",
        "flags",
        "versions",
        "schedule",
        "device",
        "parameters",
    ] {
        assert!(!run[key].is_null(), "no {key} in {run}");
    }
    assert_eq!(run["adapter_sha256"], report["adapter_sha256"]);
    assert!(fs::read_to_string(place.path("out/loss.svg")).unwrap().ends_with("</svg>\n"));
    assert!(place.path("out/last/adapter_model.safetensors").exists());
    // The adapter is the best of those evaluated.
    let best = report["best_step"].as_u64().unwrap() as usize;
    assert_eq!(metrics[best - 1]["eval_loss"], report["eval_loss_best"]);

    // It runs beside the model, and the second run finds its data prepared and gives the same bytes.
    let adapter = place.adapter("out");
    let text = ["generate", "--model", &place.text("model"), "--adapter", &place.text("out"), "--prompt", "2 + 3 = "];
    json(&[&text[..], &["--max-tokens", "2", "--json"]].concat());
    let stamp = fs::metadata(place.path("out/train.tokens")).unwrap().modified().unwrap();
    let again = place.run("out", &[&SETTINGS[..], &more].concat());
    assert_eq!(place.adapter("out"), adapter);
    assert_eq!(again["adapter_sha256"], report["adapter_sha256"]);
    assert_eq!(fs::metadata(place.path("out/train.tokens")).unwrap().modified().unwrap(), stamp);
    // A run without held-out data has no other adapter than its last, and says what it takes the place of.
    fs::write(place.path("out/handmill_prompt.json"), "{}").unwrap();
    let args = place.args("out", &["--steps", "1"]);
    let run = handmill(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(run.code == 0 && run.stderr.contains("held a finished run"), "{}", run.stderr);
    assert!(!place.path("out/handmill_prompt.json").exists());
    assert!(!place.path("out/last").exists());
    let other = place.run("other", &[&SETTINGS[..], &more, &["--seed", "1"]].concat());
    assert_ne!(other["adapter_sha256"], report["adapter_sha256"]);
}

#[test]
fn a_run_on_an_adapter_follows_that_of_the_cpu() {
    if !has_adapter() {
        return;
    }
    let place = Place::new();
    let more = ["--steps", "8", "--eval-data", &place.text("eval.jsonl"), "--grad-clip", "1"];
    let run = |out: &str, device: &str| place.run(out, &[&SETTINGS[..], &more, &["--device", device]].concat());
    let (report, on_cpu) = (run("wgpu", "wgpu"), run("cpu", "cpu"));
    assert_eq!(report["status"], "finished");
    let number = |report: &Value, key: &str| report[key].as_f64().unwrap();
    assert!(number(&report, "eval_loss_best") < number(&report, "eval_loss_before"), "{report}");
    // The loss before any step errs by the logits' 1e-5. AdamW divides a gradient by its own size, so small ones of
    // uncertain sign move parameters by as much as large ones do: later losses drift apart.
    for (i, (got, expected)) in place.metrics("wgpu").iter().zip(&place.metrics("cpu")).enumerate() {
        let off = (number(got, "loss") - number(expected, "loss")).abs();
        assert!(off < if i == 0 { 1e-5 } else { 5e-3 } * number(expected, "loss"), "step {i}: {got}, {expected}");
    }
    assert_eq!(number(&report, "steps"), number(&on_cpu, "steps"));
    // The same run gives the same bytes.
    run("again", "wgpu");
    assert_eq!(place.adapter("again"), place.adapter("wgpu"));
}

/// Starts a run and waits until it has told of `steps` steps.
fn start(place: &Place, out: &str, more: &[&str], steps: usize) -> std::process::Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
    let child = command.args(place.args(out, more)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while lines(&place.path(out)).len() < steps {
        assert!(began.elapsed() < Duration::from_secs(60), "no {steps} steps in a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

#[test]
fn a_run_that_is_cut_off_goes_on_to_the_same_bytes() {
    let place = Place::new();
    let settings = [&SETTINGS[..], &["--steps", "300"]].concat();
    place.run("whole", &settings);

    // Killed, without a word.
    let mut child = start(&place, "killed", &settings, 7);
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());
    let (code, said) = place.fails("killed", &settings);
    assert!(code == 1 && said.contains("--resume"), "{said}");
    let (code, said) = place.fails("killed", &[&settings[..], &["--resume", "--lr", "1e-2"]].concat());
    assert!(code != 0 && (said.contains("lr was") || said.contains("cannot be used multiple times")), "{said}");
    let report = place.run("killed", &[&settings[..], &["--resume"]].concat());
    assert_eq!(report["steps"], 300);
    assert!(place.adapter("killed") == place.adapter("whole"), "the adapters differ");
    assert_eq!(losses(&place.metrics("killed")), losses(&place.metrics("whole")));

    // Interrupted, and what was done is saved.
    let mut child = start(&place, "stopped", &settings, 9);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let run: Value = serde_json::from_slice(&fs::read(place.path("stopped/run.json")).unwrap()).unwrap();
    assert_eq!(run["status"], "interrupted");
    let done = run["steps_done"].as_u64().unwrap();
    assert_eq!(lines(&place.path("stopped")).len() as u64, done);
    assert!(place.path(&format!("stopped/checkpoint-{done:06}")).is_dir());
    assert!(!place.adapter("stopped").is_empty());
    place.run("stopped", &[&settings[..], &["--resume"]].concat());
    assert!(place.adapter("stopped") == place.adapter("whole"), "the adapters differ");
}

#[test]
fn a_damaged_checkpoint_is_not_gone_on_from() {
    let place = Place::new();
    let settings = ["--steps", "12", "--r", "2"];
    place.run("whole", &settings);
    let mut child = start(&place, "cut", &["--steps", "4000", "--r", "2"], 11);
    child.kill().unwrap();
    child.wait().unwrap();
    let checkpoint = fs::read_dir(place.path("cut")).unwrap().flatten().map(|entry| entry.path());
    let checkpoint = checkpoint.filter(|path| path.is_dir()).find(|path| path.join("state.json").exists()).unwrap();
    let file = checkpoint.join("optimizer.bin");
    let mut bytes = fs::read(&file).unwrap();
    bytes[9] ^= 1;
    fs::write(&file, bytes).unwrap();
    // There is no other one, so the run starts over; the schedule is constant, so another number of steps is no fault.
    let report = place.run("cut", &[&settings[..], &["--resume"]].concat());
    assert_eq!(report["steps"], 12);
    assert!(place.adapter("cut") == place.adapter("whole"));
}

#[test]
fn an_early_end_keeps_the_best() {
    let place = Place::new();
    let eval = place.text("eval.jsonl");
    // So large a rate that the held-out loss gets worse.
    let more = [
        "--steps",
        "200",
        "--lr",
        "0.5",
        "--grad-clip",
        "1",
        "--eval-data",
        &eval,
        "--eval-every",
        "2",
        "--patience",
        "2",
    ];
    let report = place.run("out", &more);
    assert_eq!(report["status"], "early stop");
    let (steps, best) = (report["steps"].as_u64().unwrap(), report["best_step"].as_u64().unwrap());
    assert_eq!(steps, best + 4, "two evaluations after the best, two steps apart");
    // There is nothing to go on with, but by more patience.
    let adapter = place.adapter("out");
    let again = place.run("out", &[&more[..], &["--resume"]].concat());
    assert_eq!((&again["status"], &again["steps"]), (&report["status"], &report["steps"]));
    assert!(place.adapter("out") == adapter);
    let patient = [&more[..more.len() - 1], &["3", "--resume"]].concat();
    assert_eq!(place.run("out", &patient)["steps"], steps + 2);
}

#[test]
fn a_run_that_fails_or_makes_things_worse_says_so() {
    let place = Place::new();
    let (code, said) = place.fails("out", &["--lr", "1e30", "--steps", "5"]);
    assert!(code == 1 && said.contains("lower --lr"), "{said}");
    let run: Value = serde_json::from_slice(&fs::read(place.path("out/run.json")).unwrap()).unwrap();
    assert_eq!(run["status"], "failed");
    let args = place.args("worse", &["--lr", "3", "--steps", "1", "--eval-data", &place.text("eval.jsonl")]);
    let run = handmill(&args.iter().map(String::as_str).filter(|&arg| arg != "--json").collect::<Vec<_>>());
    assert!(run.code == 0 && run.stderr.contains("do not use it"), "{}", run.stderr);
}

#[test]
fn a_dry_run_tells_the_plan_and_writes_nothing() {
    let place = Place::new();
    let plan = place.run("out", &["--dry-run", "--r", "4", "--targets", "q_proj,v_proj"]);
    // A and B of q (64 x 64) and v (32 x 64), two layers.
    assert_eq!(plan["trainable"], 2 * 4 * (64 + 64 + 32 + 64));
    assert_eq!(plan["modules"], 4);
    assert_eq!(plan["first"]["line"], 1);
    assert!(plan["memory"]["total"].as_u64().unwrap() > 0);
    assert_eq!(plan["data"]["rows"].as_u64().unwrap(), plan["steps"].as_u64().unwrap());
    assert!(!place.path("out").exists());
    let args = place.args("out", &["--dry-run"]);
    let shown: Vec<&str> = args.iter().map(String::as_str).filter(|&arg| arg != "--json").collect();
    let run = handmill(&shown);
    assert!(run.code == 0 && run.stdout.contains("[[") && run.stdout.contains("<|im_end|>]]"), "{}", run.stdout);
}

#[test]
fn wrong_use_and_bad_data_are_told_before_the_first_step() {
    let place = Place::new();
    for (more, code, what) in [
        (&["--targets", "q_proj,x_proj"][..], 2, "no projection x_proj"),
        (&["--double-quant"], 2, "--quant nf4"),
        (&["--dropout", "1"], 2, "--dropout"),
        (&["--schedule", "triangle"], 2, "triangle"),
        (&["--adapter-init", &place.text("none")], 1, "none"),
    ] {
        let (found, said) = place.fails("out", more);
        assert!(found == code && said.contains(what), "{more:?}: {found} {said}");
    }
    fs::copy(place.path("train.jsonl"), place.path("leak.jsonl")).unwrap();
    let leak = place.text("leak.jsonl");
    let (code, said) = place.fails("out", &["--eval-data", &leak]);
    assert!(code == 1 && said.contains("--allow-leaks") && said.contains("#1 (#1"), "{said}");
    place.run("out", &["--eval-data", &leak, "--allow-leaks", "--steps", "2"]);

    fs::write(place.path("train.jsonl"), "{\"text\": \"ok\"}\n{\"text\": 1}\nnonsense\n").unwrap();
    let (code, said) = place.fails("bad", &[]);
    assert!(code == 1 && said.contains("2 of 3 rows") && said.contains("#2 ") && said.contains("#3 "), "{said}");
    assert!(!place.path("bad/adapter_model.safetensors").exists());
    // The faults of both files are told at once.
    fs::write(place.path("leak.jsonl"), "{\"text\": \"\"}\n").unwrap();
    let (_, said) = place.fails("bad", &["--eval-data", &leak]);
    assert!(said.contains("2 of 3 rows") && said.contains("leak.jsonl: 1 of 1 rows"), "{said}");
    fs::write(place.path("train.jsonl"), "").unwrap();
    let (_, said) = place.fails("bad", &[]);
    assert!(said.contains("holds no row"), "{said}");
}

#[test]
fn every_kind_of_base_is_trained_over() {
    let place = Place::new();
    let steps = ["--steps", "6", "--lr", "1e-2", "--batch", "4", "--no-shuffle", "--pack", "--max-len", "48"];
    let last = |out: &str, more: &[&str]| {
        let report = place.run(out, &[&steps[..], more].concat());
        let (first, last) = (report["loss_first"].as_f64().unwrap(), report["loss_last"].as_f64().unwrap());
        assert!(last < first, "{out}: {report}");
        last
    };
    let plain = last("plain", &[]);
    for (out, more) in [
        ("q8", &["--quant", "q8"][..]),
        ("q4", &["--quant", "q4"]),
        ("nf4", &["--quant", "nf4"]),
        ("nf4dq", &["--quant", "nf4", "--double-quant"]),
        ("rslora", &["--rslora", "--alpha", "4"]),
    ] {
        assert_ne!(last(out, more), plain);
    }
    // From an adapter on: its config stands, and its loss where it was left.
    let init = place.text("plain");
    let report = place.run("more", &[&steps[..], &["--adapter-init", &init]].concat());
    assert!(report["loss_first"].as_f64().unwrap() < plain + 0.3, "{report}, left at {plain}");
    let (code, said) = place.fails("more", &["--adapter-init", &init, "--r", "5"]);
    assert!(code == 2 && said.contains("leave them out"), "{said}");
}

#[test]
fn the_first_loss_is_that_of_peft() {
    // Through the tool, from the tokens as they are: the base model's losses of four windows.
    let reference: Value = serde_json::from_slice(&fs::read(fixture("lora_peft_fp32.json")).unwrap()).unwrap();
    let shard = handmill::model::hf::Shard::open(&fixture("smollm2_transformers_fp32.safetensors")).unwrap();
    let stored = shard.tensors.iter().find(|tensor| tensor.name == "ppl.ids").unwrap();
    let bytes = &shard.mmap[stored.offset..stored.offset + stored.len];
    let ids: Vec<i32> = bytes.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
    let dir = tempfile::tempdir().unwrap();
    let labels: Vec<i32> = (0..256).map(|i| if i < 32 { -100 } else { ids[i] }).collect();
    let data = dir.path().join("window.jsonl");
    fs::write(&data, serde_json::json!({"input_ids": &ids[..256], "labels": labels}).to_string()).unwrap();
    let (model, out) = (super::smollm2(), dir.path().join("out"));
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let args =
        ["finetune", "--model", &text(&model), "--data", &text(&data), "--out", &text(&out), "--steps", "1", "--json"];
    let report = json(&args);
    // B is zero, so the adapter changes nothing yet.
    let expected = reference["base_losses_4_windows"][0].as_f64().unwrap();
    let found = report["loss_first"].as_f64().unwrap();
    assert!((found - expected).abs() < 5e-5, "{found}, PEFT has {expected}");
    if let Some(peak) = report["peak_bytes"].as_u64() {
        assert!(peak < 900_000_000, "{peak} bytes resident");
    }
}
