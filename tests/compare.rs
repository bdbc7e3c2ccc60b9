//! `handmill compare` on a tiny model: what it leaves, that it repeats itself, that it can be cut off anywhere, and what
//! it says of input that is not what it should be.

#[path = "models/reference.rs"]
#[allow(dead_code)] // the encoder is tests/models'
mod reference;
#[path = "support/tiny_chat.rs"]
mod tiny_chat;
#[path = "models/tiny.rs"]
#[allow(dead_code)] // some writers are tests/models'
mod tiny_models;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use handmill::compare::arms::{self, Answered};
use handmill::compare::questions::Question;
use handmill::compare::stages::Records;
use handmill::model::generate::LanguageModel;
use handmill::model::weights::LoadOptions;
use serde_json::{json, Value};

/// MiniLM, of the folder HANDMILL_MODELS or of its default place.
fn minilm() -> PathBuf {
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
        cache.unwrap_or_else(|| home().join(".cache")).join("handmill/models")
    });
    let path = folder.join("minilm");
    assert!(path.exists(), "{} is missing: run tools/fetch_models, or set HANDMILL_MODELS", path.display());
    path
}

const THINGS: [(&str, &str, &str); 8] = [
    ("mill", "river", "north"),
    ("inn", "bridge", "south"),
    ("forge", "wood", "east"),
    ("barn", "field", "west"),
    ("tower", "hill", "north"),
    ("dam", "lake", "south"),
    ("school", "square", "east"),
    ("church", "market", "west"),
];

/// A folder with a model, documents, training rows and questions.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(place.path("model")).unwrap();
        tiny_chat::write_tiny(&place.path("model"));
        fs::create_dir(place.path("docs")).unwrap();
        for (thing, at, side) in THINGS {
            let text = format!("# The {thing}\n\n## Place\n\nThe {thing} stands at the {at}, in the {side}.\n");
            fs::write(place.path(&format!("docs/{thing}.md")), text).unwrap();
        }
        let lines = |rows: Vec<Value>| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
        let train = THINGS[4..].iter().flat_map(|(thing, at, side)| {
            [("Where is", at), ("On which side is", side)].map(|(ask, answer)| {
                json!({"question": format!("{ask} the {thing}?"), "answer": answer, "topic": "place",
                    "format": "{answer} [{topic}]"})
            })
        });
        fs::write(place.path("train.jsonl"), lines(train.collect())).unwrap();
        let questions = THINGS[..4].iter().flat_map(|(thing, at, side)| {
            [("At what stands", at, "at"), ("In which part is", side, "<script>alert(1)</script>")].map(
                |(ask, answer, kind)| {
                    json!({"question": format!("{ask} the {thing}?"), "answer": answer, "topic": "place",
                        "kind": kind, "group": thing, "format": "{answer} [{topic}]"})
                },
            )
        });
        fs::write(place.path("questions.jsonl"), lines(questions.collect())).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command that compares into `out`; later flags go before earlier ones.
    fn command(&self, out: &str, more: &[&str]) -> Command {
        let mut flags: Vec<(String, String)> = vec![
            ("--model".into(), self.path("model").display().to_string()),
            ("--embed-model".into(), minilm().display().to_string()),
            ("--train".into(), self.path("train.jsonl").display().to_string()),
            ("--docs".into(), self.path("docs").display().to_string()),
            ("--questions".into(), self.path("questions.jsonl").display().to_string()),
            ("--out".into(), self.path(out).display().to_string()),
            ("--device".into(), "cpu".into()),
        ];
        for (name, value) in
            [("--steps", "12"), ("--batch", "2"), ("--lr", "1e-2"), ("--max-tokens", "6"), ("--shots", "1")]
        {
            flags.push((name.into(), value.into()));
        }
        for pair in more.chunks(2) {
            flags.retain(|flag| flag.0 != pair[0]);
            flags.push((pair[0].into(), pair[1].into()));
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
        command.arg("compare").arg("--json").env_remove("RUST_LOG").env_remove("HANDMILL_REGISTRY");
        flags.into_iter().for_each(|(name, value)| {
            command.arg(name).arg(value);
        });
        command
    }

    fn ends(&self, out: &str, more: &[&str]) -> (i32, String, String) {
        let output = self.command(out, more).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the tool prints UTF-8");
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        assert!(!stderr.contains("panicked"), "{stderr}");
        (output.status.code().expect("the tool was ended by a signal"), stdout, stderr)
    }

    fn json(&self, out: &str, more: &[&str]) -> Value {
        let (code, stdout, stderr) = self.ends(out, more);
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
    }

    /// The error of a run that must fail.
    fn fails(&self, more: &[&str]) -> String {
        let (code, stdout, stderr) = self.ends("failed", more);
        assert!(code == 1 || code == 2, "{code} {stdout} {stderr}");
        let error = stderr.split_once("error: ").map_or(String::new(), |(_, error)| error.to_string());
        assert!(!error.is_empty() && stdout.is_empty(), "{stderr}");
        error
    }
}

/// What two runs must have in common: everything but times and memory.
fn judged(report: &Value) -> Value {
    let arms = report["arms"].as_object().unwrap().iter().map(|(name, arm)| {
        let keys = ["exact_match", "f1", "answer_present", "form", "strict", "answer_nll", "reply_nll", "intervals"];
        let mut kept: serde_json::Map<String, Value> =
            keys.map(|key| (key.into(), arm[key].clone())).into_iter().collect();
        kept.insert("kinds".into(), arm["kinds"].clone());
        kept.insert("prompt_tokens".into(), arm["prompt_tokens"].clone());
        (name.clone(), Value::Object(kept))
    });
    json!({"arms": arms.collect::<serde_json::Map<_, _>>(), "pairs": report["pairs"], "losses": report["losses"],
        "forgetting": report["forgetting"], "retrieval": report["retrieval"], "choice": report["choice"]})
}

/// When each file below a folder was last written.
fn written(dir: &Path) -> Vec<(PathBuf, SystemTime)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => found.extend(written(&entry)),
            false => found.push((entry.clone(), fs::metadata(&entry).unwrap().modified().unwrap())),
        }
    }
    found.sort();
    found
}

#[test]
fn a_comparison_leaves_its_files_and_a_second_one_does_nothing_anew() {
    let place = Place::new();
    let report = place.json("out", &[]);
    for key in ["recommendation", "train_s", "index_s", "reasons", "would_change", "warnings", "provenance"] {
        assert!(!report[key].is_null(), "no {key} in {report}");
    }
    for arm in ["base", "lora", "rag", "lora_rag"] {
        for key in ["exact_match", "f1", "answer_nll", "tokens_per_s", "prompt_tokens"] {
            assert!(report["arms"][arm][key].is_number(), "no {key} in {arm}: {report}");
        }
        assert_eq!(report["arms"][arm]["intervals"]["n"], 8);
    }
    for key in ["text", "base_nll", "lora_nll", "delta"] {
        assert!(!report["forgetting"][key].is_null(), "no {key}: {report}");
    }
    assert_eq!(report["losses"].as_array().unwrap().len(), 12);
    // Eight questions are too few for any advice, and each passage names its thing.
    assert_eq!(report["choice"], Value::Null);
    assert_eq!(report["retrieval"]["hit_at_k"], 1.0, "{report}");
    let rag = report["arms"]["rag"]["prompt_tokens"].as_f64().unwrap();
    assert!(rag > report["arms"]["base"]["prompt_tokens"].as_f64().unwrap(), "passages are in the prompt");
    // Trained on replies of this form, the adapter must find the expected ones likelier than the base does.
    let reply = |arm: &str| report["arms"][arm]["reply_nll"].as_f64().unwrap();
    assert!(reply("lora") < reply("base") && reply("lora_rag") < reply("rag"), "{report}");

    let page = fs::read_to_string(place.path("out/report.html")).unwrap();
    assert!(!page.contains("<script>alert") && page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    for outside in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the page asks for {outside}");
    }
    let stored: Value = serde_json::from_slice(&fs::read(place.path("out/compare.json")).unwrap()).unwrap();
    assert_eq!(stored, report);

    let before: Vec<_> = [written(&place.path("out/state")), written(&place.path("out/adapter"))].concat();
    let again = place.json("out", &[]);
    assert_eq!(again, report, "times are those of the first run, as nothing was done again");
    let after: Vec<_> = [written(&place.path("out/state")), written(&place.path("out/adapter"))].concat();
    let changed: Vec<_> = after.iter().filter(|file| !before.contains(file) && !file.0.ends_with(".lock")).collect();
    assert!(changed.is_empty(), "{changed:?}");

    // The same, registered: adapter and figures, with what they were made from.
    let registry = place.path("registry");
    let mut command = place.command("out", &["--register", "places"]);
    let output = command.env("HANDMILL_REGISTRY", &registry).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("registered: places@1, places-evaluation@1, compare@1"), "{said}");
    let show = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
        let output = command.args(["registry", "show", name, "--json"]).env("HANDMILL_REGISTRY", &registry).output();
        serde_json::from_slice::<Value>(&output.unwrap().stdout).unwrap()
    };
    let roles = |entry: &Value| {
        let parents = entry["parents"].as_array().unwrap().iter();
        parents.map(|parent| parent["role"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let (adapter, figures) = (show("places"), show("places-evaluation"));
    assert_eq!((&adapter["kind"], &figures["kind"]), (&json!("adapter"), &json!("evaluation")), "{adapter} {figures}");
    assert_eq!(roles(&adapter), ["base", "data", "run"], "{adapter}");
    assert!(["adapter", "questions"].iter().all(|role| roles(&figures).iter().any(|r| r == role)), "{figures}");
    let (mine, of) = (&adapter["identity"], figures["parents"].as_array().unwrap());
    assert!(of.iter().any(|parent| parent["role"] == "adapter" && parent["sha256"] == *mine), "{adapter} {figures}");
    let (code, _, error) = place.ends("out", &["--register", "places"]);
    assert!(code == 2 && error.contains("HANDMILL_REGISTRY"), "{code} {error}");

    // Other questions: neither index nor adapter is made anew, and the tables are within a screen.
    let text = fs::read_to_string(place.path("questions.jsonl")).unwrap();
    let fewer: String = text.lines().take(6).map(|line| format!("{line}\n")).collect();
    fs::write(place.path("fewer.jsonl"), fewer).unwrap();
    let fewer = place.json("out", &["--questions", place.path("fewer.jsonl").to_str().unwrap()]);
    assert_eq!(fewer["arms"]["base"]["intervals"]["n"], 6);
    assert_eq!([&fewer["index_s"], &fewer["train_s"]], [&report["index_s"], &report["train_s"]]);
    let mut command = place.command("out", &["--questions", place.path("fewer.jsonl").to_str().unwrap()]);
    let args: Vec<String> = command.get_args().map(|arg| arg.to_str().unwrap().to_string()).collect();
    command = Command::new(env!("CARGO_BIN_EXE_handmill"));
    command.env_remove("HANDMILL_REGISTRY");
    let output = command.args(args.iter().filter(|arg| *arg != "--json")).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.lines().count() <= 26 && table.lines().all(|line| line.chars().count() <= 100), "{table}");
    for word in ["base", "LoRA + RAG", "right and in form", "report.html"] {
        assert!(table.contains(word), "no {word} in {table}");
    }
}

#[test]
fn a_run_that_is_killed_goes_on_to_the_same_figures() {
    let place = Place::new();
    let more = ["--steps", "40"];
    let whole = judged(&place.json("whole", &more));
    // Killed while the first arm answers, in training, and after it.
    for (i, sign) in
        ["state/answers-base.jsonl", "adapter/metrics.jsonl", "state/answers-lora.jsonl"].iter().enumerate()
    {
        let out = format!("cut{i}");
        let mut child = place.command(&out, &more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let (sign, begun) = (place.path(&out).join(sign), Instant::now());
        while fs::read(&sign).map_or(0, |text| text.iter().filter(|&&byte| byte == b'\n').count()) < 3 {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
            assert!(begun.elapsed() < Duration::from_secs(120), "{} did not come", sign.display());
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(judged(&place.json(&out, &more)), whole, "killed at {}", sign.display());
    }
}

#[test]
fn the_gate_on_forgetting_closes() {
    let place = Place::new();
    let (code, stdout, stderr) = place.ends("out", &["--max-forgetting", "-9"]);
    assert_eq!(code, 1, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["forgetting"]["kept"], false);
    assert!(stderr.contains("-9 are allowed"), "{stderr}");
    assert_eq!(place.json("out", &["--max-forgetting", "9"])["forgetting"]["kept"], true);
}

#[test]
fn input_that_is_not_what_it_should_be_is_told() {
    let place = Place::new();
    let file = |name: &str, text: &str| {
        fs::write(place.path(name), text).unwrap();
        place.path(name).to_str().unwrap().to_string()
    };
    for (name, text, words) in [
        ("empty.jsonl", "\n\n", vec!["empty.jsonl", "is empty"]),
        ("keys.jsonl", "{\"q\":\"x\",\"a\":\"y\"}\n", vec!["#1", "has no question", "its keys: q, a"]),
        ("answers.jsonl", "{\"question\":\"x\"}\n", vec!["#1", "has no answer"]),
        ("bad.jsonl", "{\"question\":\"x\",\"answer\":\"y\"}\n{\"question\":\n", vec!["#2", "is not JSON"]),
        ("form.jsonl", "{\"question\":\"x\",\"answer\":\"y\",\"format\":\"{answer} {unit}\"}", vec!["#1", "unit"]),
    ] {
        let path = file(name, text);
        let error = place.fails(&["--questions", &path]);
        assert!(words.iter().all(|word| error.contains(word)), "{name}: {error}");
    }
    let error = place.fails(&["--docs", "/no/such/docs"]);
    assert!(error.contains("/no/such/docs"), "{error}");
    fs::create_dir(place.path("nothing")).unwrap();
    let error = place.fails(&["--docs", place.path("nothing").to_str().unwrap()]);
    assert!(error.contains("nothing") && error.contains("no document"), "{error}");
    let error = place.fails(&["--model", "/no/such/model.gguf"]);
    assert!(error.contains("/no/such/model.gguf"), "{error}");
    let error = place.fails(&["--train", &file("train-empty.jsonl", "")]);
    assert!(error.contains("train-empty.jsonl"), "{error}");
    for (flag, value) in [("--format-regex", "("), ("--format", "[{topic}]"), ("--context-share", "2"), ("--lr", "0")] {
        let error = place.fails(&[flag, value]);
        assert!(error.contains(flag), "{error}");
    }
}

#[test]
fn one_question_and_leaks_are_warned_of() {
    let place = Place::new();
    let row = "{\"question\":\"Where is the tower?\",\"answer\":\"hill\"}\n";
    fs::write(place.path("one.jsonl"), row).unwrap();
    let one = place.path("one.jsonl");
    let report = place.json("out", &["--questions", one.to_str().unwrap(), "--steps", "2", "--dev-questions", "0"]);
    let warnings = report["warnings"].to_string();
    for word in ["1 of 1 questions are asked in the training rows", "too few", "nothing to choose prompts on"] {
        assert!(warnings.contains(word), "no {word} in {warnings}");
    }
    assert_eq!(report["choice"], Value::Null);
}

#[test]
fn the_loss_of_an_answer_is_that_of_a_plain_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    tiny_chat::write_tiny(dir.path());
    fs::create_dir(dir.path().join("state")).unwrap();
    let device = handmill::device::open("cpu").unwrap();
    let model = LanguageModel::open(dir.path(), device, &LoadOptions::default()).unwrap();
    let questions = ["Where is it?", "Who is it, and where?", "W?"].map(|text| {
        Question::parse(&json!({"question": text, "answer": "near", "format": "{answer} [it]"}).to_string()).unwrap()
    });
    let prompts: Vec<arms::Prompt> = (questions.iter())
        .map(|q| arms::prompt(&model, &[], q, "near [it]", &[], &["a note".into()], Some("Say."), 5).unwrap())
        .collect();
    let mut records = Records::<Answered>::open(dir.path(), "answers", "key").unwrap();
    arms::answer(&model, &prompts, 5, &mut records, &mut |_| true).unwrap();
    for (prompt, answered) in prompts.iter().zip(&records.done) {
        let evaluate = |text: &[u32]| {
            let ids = [&prompt.ids[..], text].concat();
            let logprobs = model.evaluate(&ids).unwrap().logprobs;
            -logprobs[prompt.ids.len() - 1..].iter().map(|&p| f64::from(p)).sum::<f64>() / text.len() as f64
        };
        // Sums in f32 go in another order where other rows are in the pass: some 1e-6 of logits of order 1.
        assert!((answered.answer_nll - evaluate(&prompt.answer)).abs() < 1e-4, "{answered:?}");
        assert!((answered.reply_nll - evaluate(&prompt.reply)).abs() < 1e-4, "{answered:?}");
        assert!(answered.tokens <= 5 && answered.prompt_tokens == prompt.ids.len());
    }
}
