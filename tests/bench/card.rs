//! The script that checks a card: what fails or hangs loses itself alone, and the table comes last however it ends.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// In the tool's place: `verify` tells of one case, then hangs with a process of its own that holds its stderr;
/// `search` fails; the rest does as it should.
const TOOL: &str = r#"#!/bin/sh
case "$1" in
doctor)
    echo '{"version": "0", "devices": [{"name": "A card", "copy_gb_per_s": 1, "matmul_gflop_per_s": 1}]}'
    ;;
verify)
    echo '{"device": "ptx-sim", "kernel": "k", "op": "o", "case": "c", "seed": 1, "status": "ok", "share": 0.5}'
    case "$*" in *--seed*) exit 0 ;; esac
    sleep 300 &
    sleep 300
    ;;
finetune)
    while [ $# -gt 0 ]; do
        [ "$1" = --out ] && mkdir -p "$2" && echo '{"loss": 1.0, "tokens_per_s": 5.0}' >"$2/metrics.jsonl"
        shift
    done
    ;;
*)
    echo "cannot $1" >&2
    exit 9
    ;;
esac
"#;

fn script(folder: &Path) -> Command {
    let tool = folder.join("handmill");
    std::fs::write(&tool, TOOL).unwrap();
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("python3");
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tools/gpu_check"));
    command.arg("--handmill").arg(tool).arg("--out").arg(folder.join("out"));
    command.args([
        "--device",
        "ptx-sim",
        "--kernel",
        "rope_f32_warp",
        "--stages",
        "doctor,verify,search,fine-tune,more-seeds",
    ]);
    command.stdin(Stdio::null());
    command
}

/// The table's row of a stage.
fn word<'a>(table: &'a str, stage: &str) -> &'a str {
    let row = table.lines().find(|line| line.starts_with(&format!("{stage} ")));
    row.unwrap_or_else(|| panic!("no stage {stage}:\n{table}"))
}

#[test]
fn a_stage_that_hangs_or_fails_loses_itself_alone() {
    let folder = tempfile::tempdir().unwrap();
    let began = Instant::now();
    // A thirtieth of every limit: `verify` has five seconds.
    let done = script(folder.path()).args(["--hurry", "30"]).output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(60), "what a stage starts must end with it");
    let (table, said) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    assert_eq!(done.status.code(), Some(1), "{table}{said}");
    assert!(word(&table, "verify").contains("stopped after 5 s"), "{table}");
    assert!(
        word(&table, "search f32 on ptx-sim").ends_with("exit code 9") && said.contains("cannot search"),
        "{table}"
    );
    for stage in ["doctor", "fine-tune on ptx-sim", "fine-tune on cpu", "more-seeds"] {
        assert!(word(&table, stage).ends_with("  ok"), "{table}");
    }
    // What verify told before it hung counts.
    let last = table.lines().last().unwrap();
    assert!(last.starts_with("2 ok, 0 failed; stages that failed: verify, search"), "{table}");
    let record = table.lines().find_map(|line| line.strip_prefix("record: ")).unwrap();
    assert!(std::fs::read_to_string(record).unwrap().contains("\"kernel\": \"k\""), "{record}");
}

#[test]
fn told_to_stop_it_tells_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let running = script(folder.path()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    let verified = || std::fs::metadata(folder.path().join("out/verify.jsonl")).is_ok_and(|file| file.len() > 0);
    while !verified() {
        assert!(began.elapsed() < Duration::from_secs(60), "verify is not begun");
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = Command::new("kill").arg("-TERM").arg(running.id().to_string()).status().unwrap();
    assert!(told.success());
    let done = running.wait_with_output().unwrap();
    let table = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.code() == Some(1) && word(&table, "the rest").contains("told to stop"), "{table}");
    assert!(table.lines().last().unwrap().starts_with("1 ok, 0 failed; stages that failed: the rest"), "{table}");
}

#[test]
fn what_cannot_be_done_is_told_before_anything_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("file"), "x").unwrap();
    let ended = |command: &mut Command| {
        let done = command.stdin(Stdio::null()).output().unwrap();
        let told = [done.stdout, done.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        (done.status.code(), told)
    };
    for (more, code, words) in [
        (["--kernel", "rope_f32_wrap"], 2, "there is no such PTX kernel, but rope_f32_warp"),
        (["--stages", "doctr"], 2, "give some of doctor"),
        (["--out", at("file").to_str().unwrap()], 1, "is a file: name a folder"),
    ] {
        let (found, told) = ended(script(folder.path()).args(more));
        assert!(found == Some(code) && told.contains(words), "{more:?}: {told}");
    }
    // Nothing was to be verified, and nothing was.
    let (code, told) = ended(script(folder.path()).args(["--stages", "doctor"]));
    assert!(code == Some(0) && told.contains("0 ok, 0 failed\n"), "{told}");

    // The bundle is put where it is asked for from, and never over what is not its own.
    let bundle = |name: &str| {
        let tool = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tools/gpu_bundle");
        ended(Command::new("bash").arg(tool).arg(name).current_dir(folder.path()))
    };
    std::fs::create_dir(at("mine")).unwrap();
    std::fs::write(at("mine/x"), "x").unwrap();
    for (name, words) in [("mine", "holds something that is not from here"), ("file", "is a file")] {
        let (code, told) = bundle(name);
        assert!(code == Some(1) && told.contains(words) && told.contains(at(name).to_str().unwrap()), "{told}");
    }
    assert_eq!(std::fs::read_to_string(at("mine/x")).unwrap(), "x");
}
