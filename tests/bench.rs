//! `handmill bench`: what it measures is right and told in full, its files are read as anything may stand in them, and
//! the script for a card runs with the executor in the card's place. No speed is asserted.

#[cfg(unix)]
#[path = "bench/card.rs"]
mod card;
#[path = "bench/compare.rs"]
mod compare;
#[path = "bench/cost.rs"]
mod cost;

use std::path::{Path, PathBuf};
use std::process::Command;

use handmill::bench::inputs::Inputs;
use handmill::bench::row::Row;
use handmill::bench::shapes::Select;
use handmill::bench::{Bench, Options};
use handmill::device::cpu::Cpu;
use handmill::device::{self, Buffer, Device};
use handmill::ops;
use handmill::tensor::Dtype;
use serde_json::Value;

struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

fn run(command: &mut Command) -> Run {
    let output = command.env_remove("RUST_LOG").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(!stderr.contains("panicked"), "{stderr}");
    Run { code: output.status.code().expect("not ended by a signal"), stdout, stderr }
}

fn bench(args: &[&str]) -> Run {
    run(Command::new(env!("CARGO_BIN_EXE_handmill")).arg("bench").args(args))
}

fn file(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_string()
}

/// The keys that cli.md fixes.
const KEYS: [&str; 16] = [
    "op",
    "kernel",
    "device",
    "adapter",
    "driver",
    "case",
    "cold",
    "median_us",
    "p20_us",
    "p80_us",
    "n",
    "gb_per_s",
    "tflop_per_s",
    "roofline_fraction",
    "error",
    "peer",
];

#[test]
fn rows_have_every_key_and_pages_need_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let run = bench(&[
        "--device",
        "cpu",
        "--quick",
        "--op",
        "qmatmul_q4",
        "--m",
        "1",
        "--seconds",
        "0.01",
        "--rows",
        "2",
        "--json",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let rows: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for row in &rows {
        for key in KEYS {
            assert!(row.get(key).is_some(), "no {key} in {row}");
        }
        assert!(row["median_us"].as_f64().unwrap() > 0.0 && row["n"].as_u64().unwrap() > 0, "{row}");
    }
    let mut told: Vec<&str> = rows.iter().map(|row| row["kind"].as_str().unwrap()).collect();
    let limits: Vec<&str> =
        rows.iter().filter(|row| row["kind"] == "roofline").map(|row| row["kernel"].as_str().unwrap()).collect();
    assert_eq!(limits[..3], ["copy", "read", "update"]);
    // Where the processor has tiles, they are limits too.
    assert!(limits.len() > 3 && limits[4..].iter().all(|what| *what == "tiles"), "{limits:?}");
    told.dedup();
    assert_eq!(told, ["roofline", "launch", "kernel"]);
    let of_kernels: Vec<&Value> = rows.iter().filter(|row| row["kind"] == "kernel").collect();
    assert_eq!(of_kernels.len(), 2);
    let row = of_kernels[0];
    assert_eq!((row["cold"].as_bool(), row["bound"].as_str()), (Some(true), Some("memory")), "{row}");
    let share = row["error"].as_f64().unwrap() / row["tolerance"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&share), "{row}");
    assert!(row["roofline_fraction"].as_f64().unwrap() > 0.0 && row["peer"].is_null(), "{row}");

    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(read("bench.jsonl"), run.stdout, "the file is what was printed");
    let page = read("bench.html");
    for outside in ["<script", "<link", "<img", "@import", "url(", "src=", "https://"] {
        assert!(!page.contains(outside), "the page asks for {outside}");
    }
    assert_eq!(page.matches("http://").count(), page.matches("http://www.w3.org/2000/svg").count());
    assert!(page.contains("qmatmul_q4_") && page.matches("<svg").count() == 2);

    // Both are made again from the rows alone.
    let again = folder.path().join("again");
    let (rows, to) = (out.join("bench.jsonl"), again.to_str().unwrap());
    let made = bench(&["report", rows.to_str().unwrap(), "--out", to]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    for name in ["bench.html", "bench.md"] {
        assert_eq!(std::fs::read_to_string(again.join(name)).unwrap(), read(name), "{name}");
    }
    // What the peers' scripts recorded stands on it too.
    let record = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/record/cpu/2026-11-23.jsonl");
    let made = bench(&["report", rows.to_str().unwrap(), "--peers", record, "--out", to]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let page = std::fs::read_to_string(again.join("bench.html")).unwrap();
    for peer in ["llama.cpp", "PEFT", "faiss f32"] {
        assert!(page.contains(peer), "no {peer}");
    }
}

/// Each shape with the kernel that is taken and the one whose rows have the same bits in every batch, and their ratio.
#[test]
fn batch_invariance_has_its_price_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let of = ["--device", "cpu", "--op", "attention", "--shapes", "smollm2-135m", "--m", "64", "--no-limits", "--hot"];
    let run = bench(&[&of[..], &["--batch-invariant", "--seconds", "0.01", "--out", out.to_str().unwrap()]].concat());
    assert_eq!(run.code, 0, "{}", run.stderr);
    let rows = handmill::bench::row::read(&out.join("bench.jsonl")).unwrap();
    let rows: Vec<&Row> = rows.iter().filter(|row| row.kind == handmill::bench::row::Kind::Kernel).collect();
    let spec = ops::find("attention", "f32");
    let mut pairs = 0;
    for (i, row) in rows.iter().enumerate() {
        let Some(free) = &row.free_kernel else { continue };
        let kernel = spec.kernels().find(|kernel| kernel.stem == row.kernel).unwrap();
        assert!(handmill::op::row_invariant(spec, kernel), "{row:?}");
        if *free == row.kernel {
            assert_eq!((row.free_us, row.invariant_cost), (row.median_us, Some(1.0)), "{row:?}");
            continue;
        }
        pairs += 1;
        let before = rows[i - 1];
        assert_eq!((&before.kernel, &before.case, before.median_us), (free, &row.case, row.free_us), "{row:?}");
        assert!(before.free_kernel.is_none() && before.invariant_cost.is_none(), "{before:?}");
        let cost = row.invariant_cost.unwrap();
        assert!((cost - row.median_us.unwrap() / row.free_us.unwrap()).abs() < 1e-9, "{row:?}");
        assert!(run.stdout.contains(&format!("batch-invariant: {cost:.2} times {free}")), "{}", run.stdout);
        for (name, what) in [("bench.md", format!("| {cost:.2} |")), ("bench.html", format!("<td>{cost:.2}</td>"))] {
            let page = std::fs::read_to_string(out.join(name)).unwrap();
            assert!(page.contains("What batch invariance costs") && page.contains(&what), "{name}: no {what}");
        }
    }
    assert!(pairs > 0, "a prompt takes another kernel than single rows: {rows:?}");
    let with = bench(&["--batch-invariant", "--kernel", "attention_f32_naive"]);
    assert!(with.code == 2 && with.stderr.contains("--kernel"), "{}", with.stderr);
}

/// Every op's quick shapes, the kernels that would be taken, right and with times; top-k's corpus takes longer to make
/// than all the others.
#[test]
fn every_op_is_measured_and_right() {
    let device = Cpu::new();
    let mut names: Vec<&str> = ops::OPS.iter().map(|spec| spec.name).filter(|name| *name != "cosine_topk").collect();
    names.dedup();
    for name in names {
        let select = Select { tokens: vec![1, 64], quick: true, ..Select::default() };
        let options = Options {
            select,
            op: Some(name.into()),
            best_only: true,
            hot: true,
            limits: false,
            seconds: 1e-4,
            ..Options::default()
        };
        let mut rows: Vec<Row> = Vec::new();
        let mut measured = Bench::new(&device, &options).unwrap();
        let planned = measured.len();
        let mut keep = |row: &Row| {
            rows.push(row.clone());
            Ok::<(), device::Error>(())
        };
        measured.run(&mut keep).unwrap();
        assert_eq!(rows.len(), planned, "{name}");
        for row in rows {
            let (error, most) = (row.error.expect("known on the CPU"), row.tolerance.unwrap());
            assert!(row.note.is_none() && error <= most, "{row:?}");
            assert!(row.median_us.unwrap() > 0.0 && row.roofline_fraction.is_none(), "{row:?}");
        }
    }
}

#[test]
fn one_wrong_element_far_from_the_first_period_is_seen() {
    let device = Cpu::new();
    let spec = ops::find("qmatmul", "q4");
    let last = spec.case_dims(spec.cases.last().unwrap());
    let dims = last.with("M", 20).with("N", 700).with("K", 64).with("LDY", 700);
    let inputs = Inputs::new(spec, &dims, Dtype::F32);
    let upload = |arg| {
        let bytes = inputs.bytes(spec, arg);
        assert_eq!(bytes.len(), spec.args[arg].bytes(&dims, Dtype::F32), "{}", spec.args[arg].name);
        let buffer = device.alloc(bytes.len()).unwrap();
        device.write(&buffer, 0, &bytes).unwrap();
        buffer
    };
    let buffers: Vec<Buffer> = (0..spec.args.len()).map(upload).collect();
    let kernel = spec.choose(&dims, Dtype::F32, device.caps()).unwrap();
    device.launch(spec, kernel, &buffers.iter().collect::<Vec<_>>(), &dims).unwrap();
    let error = || inputs.error(&device, spec, kernel, &buffers).unwrap().unwrap();
    let right = error();
    assert!(right.failure.is_none() && right.error <= right.tolerance, "{right:?}");
    assert!(right.how.contains("repeat"), "{right:?}");

    // Row 19, column 690.
    for value in [1e6f32, f32::NAN] {
        device.write(buffers.last().unwrap(), 4 * (19 * 700 + 690), &value.to_le_bytes()).unwrap();
        let wrong = error();
        assert!(wrong.failure.is_some(), "{value}: {wrong:?}");
    }
}

#[test]
fn software_is_labelled_and_ranks_nothing() {
    let software = device::list().into_iter().find(|entry| entry.id.starts_with("wgpu:") && entry.software);
    let Some(software) = software else {
        assert!(std::env::var_os("HANDMILL_REQUIRE_WGPU").is_none(), "no software adapter: install Mesa's lavapipe");
        return;
    };
    let args = ["--quick", "--op", "add", "--m", "1", "--seconds", "0.001", "--json", "--device", &software.id];
    let run = bench(&args);
    assert_eq!(run.code, 0, "{}", run.stderr);
    for line in run.stdout.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert!(row["note"].as_str().unwrap().contains("software: correctness only"), "{row}");
        for speed in ["gb_per_s", "tflop_per_s", "roofline_fraction"] {
            assert!(row[speed].is_null(), "{row}");
        }
    }
}

/// A row of a run, as text.
fn line(kernel: &str, times: [f64; 3], adapter: &str) -> String {
    let [p20, median, p80] = times;
    format!(
        r#"{{"op":"add_f32","kernel":"{kernel}","device":"cpu","adapter":"{adapter}","driver":null,"case":"M=1 K=8",
        "cold":true,"median_us":{median},"p20_us":{p20},"p80_us":{p80},"n":50,"gb_per_s":null,"tflop_per_s":null,
        "roofline_fraction":null,"error":0.0,"peer":null}}"#
    )
    .replace('\n', "")
        + "\n"
}

#[test]
fn compare_tells_what_became_slower_by_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| file(folder.path(), name, &text);
    let before = write("a", line("x", [98.0, 100.0, 102.0], "A") + &line("y", [9.0, 10.0, 11.0], "A"));
    let same = write("b", line("x", [99.0, 101.0, 103.0], "A") + &line("y", [8.0, 9.9, 11.0], "A"));
    let slower = write("c", line("x", [140.0, 150.0, 160.0], "A") + &line("y", [8.0, 9.9, 11.0], "A"));
    let other = write("d", line("x", [99.0, 101.0, 103.0], "B"));

    let run = bench(&["compare", &before, &same]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stdout.contains("2 rows: 0 slower, 0 faster, 2 the same"), "{}", run.stdout);
    let run = bench(&["compare", &before, &slower]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stdout.contains("slower x "), "{}", run.stdout);
    let run = bench(&["compare", "--json", &before, &slower]);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    let slow: Vec<&Value> = found["pairs"].as_array().unwrap().iter().filter(|p| p["verdict"] == "slower").collect();
    assert_eq!((run.code, slow.len()), (1, 1));
    assert_eq!((slow[0]["kernel"].as_str(), slow[0]["ratio"].as_f64()), (Some("x"), Some(1.5)));
    assert_eq!(bench(&["compare", &slower, &before]).code, 0, "what became faster is no fault");
    let run = bench(&["compare", &before, &other]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("was A, then B") && run.stderr.contains("no row to compare"), "{}", run.stderr);
}

#[test]
fn rows_from_anywhere_are_refused_with_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let good = line("x", [1.0, 2.0, 3.0], "A");
    let cases = [
        ("{\"op\":\n", "is no row"),
        ("[1, 2]\n", "is no row"),
        ("{\"op\": \"x\"}\n", "is no row"),
        (&good.replace("2", "-2"), "above zero"),
        (&good.replace("\"median_us\":2", "\"median_us\":9"), "not in order"),
        (&good.replace("\"median_us\":2", "\"median_us\":1e999"), "is no row"),
        (&good.replace("\"gb_per_s\":null", "\"gb_per_s\":-1.0"), "from zero on"),
        (&good.replace("\"kernel\":\"x\"", "\"kernel\":\"\""), "must be named"),
        (&good.replace("\"n\":50", "\"n\":-1"), "is no row"),
        (&format!("{}\n", "[".repeat(60_000)), "is no row"),
        (&format!("{}\n", "x".repeat(100_000)), "has 100001 bytes"),
    ];
    for (i, (bad, word)) in cases.into_iter().enumerate() {
        let path = file(folder.path(), &format!("{i}.jsonl"), &format!("{good}{bad}{good}"));
        let out = folder.path().join("out");
        for run in [bench(&["compare", &path, &path]), bench(&["report", &path, "--out", out.to_str().unwrap()])] {
            assert_eq!(run.code, 1, "{bad:.60}");
            let said = &run.stderr;
            assert!(said.contains(&path) && said.contains("line 2: ") && said.contains(word), "{bad:.60}: {said}");
            assert!(said.len() < 1000, "{said}");
        }
        assert!(!out.exists(), "nothing is written of a file that is refused");
    }
    // A run that was killed leaves half a line, and what was whole counts.
    let half = file(folder.path(), "half", &format!("{good}{}", &good[..40]));
    assert_eq!(bench(&["compare", &half, &half]).code, 0);
    // Names from a file stay text on the page.
    let hostile = good.replace("\"x\"", "\"<script>alert(1)</script>\"");
    let path = file(folder.path(), "hostile", &hostile);
    let out = folder.path().join("page");
    assert_eq!(bench(&["report", &path, "--out", out.to_str().unwrap()]).code, 0);
    for name in ["bench.html", "bench.md"] {
        assert!(!std::fs::read_to_string(out.join(name)).unwrap().contains("<script"), "{name}");
    }
    let record = file(folder.path(), "record", "{}\n{\"ms\": {\"a\": {\"median\": 1}}\n");
    let run = bench(&["report", "--peers", &record, "--out", out.to_str().unwrap()]);
    assert!(run.code == 1 && run.stderr.contains("line 2"), "{}", run.stderr);
}

#[test]
fn wrong_use_is_told_in_a_sentence() {
    for (args, word) in [
        (&["--device", "ptx-sim"][..], "handmill sim"),
        (&["--op", "nonesuch"], "there is no op nonesuch"),
        (&["--kernel", "nonesuch"], "there is no kernel nonesuch"),
        (&["--shapes", "nonesuch"], "there are no shapes of nonesuch"),
        (&["--m", "0"], "--m"),
        (&["--seconds", "0"], "--seconds"),
        (&["--seconds", "nan"], "--seconds"),
        (&["report", "--out", "x"], "give files"),
    ] {
        let run = bench(args);
        assert_eq!(run.code, 2, "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{args:?}: {}", run.stderr);
    }
    let run = bench(&["--device", "cpu", "--kernel", "add_f32_vec4"]);
    assert!(run.code == 1 && run.stderr.contains("runs on cpu"), "{}", run.stderr);
}

/// What another program is given to time itself on, and the script that does so where it finds torch and a card.
#[test]
fn inputs_are_written_for_torch() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, record) = (folder.path().join("inputs"), folder.path().join("peers.jsonl"));
    let to = inputs.to_str().unwrap();
    let of = ["--device", "cpu", "--op", "qmatmul_q4", "--kernel", "qmatmul_q4_naive", "--m", "1", "--shapes"];
    let quick = ["smollm2-135m", "--seconds", "0.0001", "--no-limits", "--hot", "--rows", "1", "--save-inputs", to];
    let made = bench(&[&of[..], &quick].concat());
    assert_eq!(made.code, 0, "{}", made.stderr);
    let text = std::fs::read_to_string(inputs.join("inputs.jsonl")).unwrap();
    let case: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    for arg in case["args"].as_array().unwrap() {
        let bytes = std::fs::metadata(inputs.join(arg["file"].as_str().unwrap())).unwrap().len();
        let count: u64 = arg["period"].as_array().unwrap().iter().map(|size| size.as_u64().unwrap()).product();
        let size = [("f64", 8), ("f32", 4), ("f16", 2), ("u8", 1)].into_iter().find(|(name, _)| arg["dtype"] == *name);
        assert_eq!(bytes, count * size.unwrap().1, "{arg}");
    }
    let script = |args: &[&str]| {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tools/peers/torch_cuda.py");
        run(Command::new("python3").arg(path).args(args))
    };
    let dry = script(&["--dry-run", "--inputs", to]);
    assert!(dry.code == 0 && dry.stdout.contains("dequantize + torch.matmul bf16"), "{}{}", dry.stdout, dry.stderr);
    let there = script(&["--inputs", to, "--record", record.to_str().unwrap()]);
    assert_eq!(there.code, 0, "{}", there.stderr);
    assert!(record.is_file() || there.stderr.contains("nothing is compared"), "{}", there.stderr);
    let nothing = script(&["--inputs", folder.path().to_str().unwrap()]);
    assert!(nothing.code == 1 && nothing.stderr.contains("inputs.jsonl"), "{}", nothing.stderr);
}

/// The script that checks a card, with the executor in its place and one kernel: every stage is told, none is lost.
#[cfg(unix)]
#[test]
fn the_cards_script_runs_with_the_executor() {
    let folder = tempfile::tempdir().unwrap();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let out = folder.path().to_str().unwrap();
    let mut command = Command::new("python3");
    command.arg(root.join("tools/gpu_check")).args(["--handmill", env!("CARGO_BIN_EXE_handmill"), "--out", out]);
    command.args(["--device", "ptx-sim", "--kernel", "add_f32_vec4"]);
    let run = run(command.args(["--stages", "doctor,verify,bench,search,fine-tune,more-seeds"]));
    assert_eq!(run.code, 0, "{}\n{}", run.stdout, run.stderr);
    for stage in ["doctor", "verify", "bench", "search", "fine-tune", "more-seeds"] {
        let row = run.stdout.lines().find(|line| line.starts_with(stage));
        assert!(row.is_some(), "no stage {stage}:\n{}", run.stdout);
    }
    assert!(run.stdout.contains("ptx-sim has no times"), "{}", run.stdout);
    assert!(run.stdout.lines().last().unwrap().contains(" ok, 0 failed"), "{}", run.stdout);
    let records: Vec<PathBuf> = walk(&folder.path().join("record"));
    let text = std::fs::read_to_string(&records[0]).unwrap();
    let whats: Vec<String> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["what"].as_str().unwrap_or_default().to_string())
        .collect();
    assert!(
        ["doctor", "verify", "search", "fine-tune"].iter().all(|what| whats.iter().any(|w| w == what)),
        "{whats:?}"
    );
}

#[cfg(unix)]
fn walk(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
