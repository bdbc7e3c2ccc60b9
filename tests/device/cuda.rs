//! The `cuda` device on a driver that runs launches on ptx-sim (`tests/fake-cuda`): each test is a run of the tool that
//! finds that driver, or none, where it looks for the real one.

use handmill::op::{DeviceKind, Kernel, Source};
use handmill::ops::OPS;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a run of the tool left, and the calls that the driver saw.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
    calls: Vec<String>,
}

/// The driver as the tests' build made it, which lies beside the tests' own program.
fn fake_driver() -> PathBuf {
    let tests = std::env::current_exe().expect("this program's path");
    let library = tests.parent().expect("a folder").join("libfake_cuda.so");
    assert!(library.exists(), "{} is missing: build all tests with `cargo test --no-run`", library.display());
    library
}

/// Runs the tool where `libcuda.so` is the fake driver, which pretends `words`; kernels come from `sources` if any.
fn with_driver(words: &str, sources: Option<&Path>, args: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(fake_driver(), folder.path().join("libcuda.so")).unwrap();
    let log = folder.path().join("calls");
    let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
    command.args(args).env_remove("RUST_LOG").env_remove("HANDMILL_SOURCES");
    command.env("LD_LIBRARY_PATH", folder.path()).env("FAKE_CUDA", words).env("FAKE_CUDA_LOG", &log);
    if let Some(sources) = sources {
        command.env("HANDMILL_SOURCES", sources);
    }
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("the tool prints UTF-8");
    let calls = std::fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_string).collect();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    Run { code: output.status.code().expect("the tool was ended by a signal"), stdout, stderr, calls }
}

impl Run {
    fn lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn calls(&self, start: &str) -> Vec<&String> {
        self.calls.iter().filter(|call| call.starts_with(start)).collect()
    }
}

const VERIFY: [&str; 6] = ["verify", "--device", "cuda", "--json", "--kernel", "rmsnorm_f32_warp"];

/// What `doctor` tells of a card whose launches do nothing: its measurements would take long.
fn doctor(words: &str) -> Value {
    let run = with_driver(&format!("{words},idle"), None, &["doctor", "--device", "auto", "--json"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

fn cuda_entries(found: &Value) -> Vec<&Value> {
    found["devices"].as_array().unwrap().iter().filter(|device| device["kind"] == "cuda").collect()
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

/// A folder with the crate's kernels, one of them changed.
fn changed_kernel(from: &str, to: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("kernels")).unwrap();
    let path = "kernels/rmsnorm_f32_warp.ptx";
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    assert!(text.contains(from), "{path} no longer has {from:?}");
    std::fs::write(folder.path().join(path), text.replacen(from, to, 1)).unwrap();
    folder
}

#[test]
fn a_card_is_found_measured_and_taken() {
    let found = doctor("two_cards");
    let cards = cuda_entries(&found);
    assert_eq!(cards.iter().map(|card| card["id"].as_str().unwrap()).collect::<Vec<_>>(), ["cuda:0", "cuda:1"]);
    assert_eq!(
        (&cards[0]["available"], &cards[0]["sm"], &cards[0]["software"]),
        (&true.into(), &80.into(), &false.into())
    );
    assert_eq!(cards[0]["shared_bytes"], 163 << 10);
    assert!(cards[0]["copy_gb_per_s"].as_f64().unwrap() > 0.0, "{}", cards[0]);
    has(cards[0]["name"].as_str().unwrap(), &["Fake card", "compute capability 8.0, 8.0 GiB, driver for CUDA 12.2"]);
    assert_eq!(found["auto"], "cuda:0");
}

#[test]
fn kernels_run_through_the_driver_and_all_is_given_back() {
    for (words, alloc, free) in [("", "cuMemAllocAsync", "cuMemFreeAsync"), ("no_pool", "cuMemAlloc ", "cuMemFree ")] {
        let run = with_driver(words, None, &VERIFY);
        assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
        let lines = run.lines();
        assert!(lines.len() >= 4 && lines.iter().all(|line| line["status"] == "ok"), "{}", run.stdout);
        assert_eq!(run.calls("cuLaunchKernel rmsnorm_f32_warp").len(), lines.len());
        assert_eq!(run.calls("cuModuleLoadDataEx").len(), 1, "a source is compiled once");
        assert_eq!(run.calls(alloc).len(), run.calls(free).len());
        let pool = run.calls("cuMemPoolSetAttribute release threshold 18446744073709551615 = 0");
        assert_eq!(pool.len(), usize::from(words.is_empty()));
        let refused: Vec<_> = run.calls.iter().filter(|call| !call.ends_with(" = 0")).collect();
        assert!(refused.is_empty(), "{refused:?}");
        let last = run.calls.last().unwrap();
        assert!(last.contains("with 0 allocations and 0 streams left"), "{last}");
    }
}

#[test]
fn every_kernel_in_ptx_runs_through_the_driver() {
    let run = with_driver("", None, &["verify", "--device", "cuda", "--json"]);
    assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
    let lines = run.lines();
    let kernels = OPS.iter().flat_map(|spec| spec.kernels()).filter(|kernel| DeviceKind::Cuda.runs(&kernel.source));
    // What is written for one kind of card runs there, and nowhere else.
    let for_hopper = |kernel: &Kernel| matches!(&kernel.source, Source::Ptx(file) if file.text.contains("sm_90a"));
    let (hopper, kernels): (Vec<&Kernel>, Vec<&Kernel>) = kernels.partition(|kernel| for_hopper(kernel));
    assert!(!hopper.is_empty());
    for kernel in hopper {
        assert!(run.calls(&format!("cuLaunchKernel {} ", kernel.stem)).is_empty(), "{}", kernel.stem);
        let run = with_driver("hopper", None, &["verify", "--device", "cuda", "--json", "--kernel", kernel.stem]);
        assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
        let ok = run.lines().iter().filter(|line| line["status"] == "ok").count();
        assert!(ok > 0, "{} ran on no case", kernel.stem);
        assert_eq!(run.calls(&format!("cuLaunchKernel {} ", kernel.stem)).len(), ok, "{}", kernel.stem);
    }
    for kernel in kernels {
        let ok = lines.iter().filter(|line| line["kernel"] == kernel.stem && line["status"] == "ok").count();
        assert!(ok > 0, "{} ran on no case", kernel.stem);
        assert_eq!(run.calls(&format!("cuLaunchKernel {} ", kernel.stem)).len(), ok, "{}", kernel.stem);
    }
    let refused: Vec<_> = run.calls.iter().filter(|call| !call.ends_with(" = 0")).collect();
    assert!(refused.is_empty(), "{refused:?}");
}

#[test]
fn what_stands_in_the_way_is_told_in_one_sentence() {
    for (words, said) in [
        ("old_driver", &["offers CUDA 11.8", "12.2", "install driver 535"][..]),
        ("no_device", &["finds no card", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
        ("broken_driver", &["does not start", "CUDA_ERROR_UNKNOWN (unknown error)", "nvidia-smi"]),
        ("old_card", &["compute capability 7.0", "8.0 (Ampere)"]),
    ] {
        let found = doctor(words);
        let card = cuda_entries(&found)[0].clone();
        has(card["reason"].as_str().unwrap(), said);
        assert_eq!((&card["available"], &found["auto"]), (&false.into(), &"cpu".into()), "{words}");
        has(found["auto_reason"].as_str().unwrap(), said);

        let run = with_driver(words, None, &VERIFY);
        assert!(run.code == 1 && run.stdout.is_empty() && run.stderr.lines().count() == 1, "{}", run.stderr);
        has(&run.stderr, said);
    }
    let run = with_driver("", None, &["verify", "--device", "cuda:1", "--op", "rmsnorm"]);
    assert_eq!(run.code, 1);
    has(&run.stderr, &["device cuda:1", "the last card here is cuda:0"]);
}

#[test]
fn without_a_driver_the_others_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let tool = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
        command.args(args).env("LD_LIBRARY_PATH", folder.path()).output().unwrap()
    };
    if Path::new("/proc/driver/nvidia/version").exists() {
        return assert!(
            tool(&["doctor"]).status.success(),
            "with a driver of its own, this machine shows nothing else"
        );
    }
    let output = tool(&["verify", "--device", "cuda", "--op", "rmsnorm"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    has(&text, &["device cuda:0", "there is no NVIDIA driver here", "install driver 535"]);
    let output = tool(&["verify", "--device", "all", "--op", "rmsnorm"]);
    has(&String::from_utf8(output.stderr).unwrap(), &["cuda is left out: there is no NVIDIA driver"]);
    assert!(output.status.success());
}

#[test]
fn memory_that_is_short_is_told_with_what_is_free() {
    let run = with_driver("bytes=100000", None, &VERIFY);
    assert_eq!(run.code, 1);
    let lines = run.lines();
    assert!(lines.iter().any(|line| line["status"] == "ok"), "the small cases fit");
    let failed = lines.iter().find(|line| line["status"] == "failed").expect("the large case does not");
    has(
        failed["failure"].as_str().unwrap(),
        &["cuda:0: cannot allocate", "bytes: the card has 0.00 of its 0.00 GiB free"],
    );
    has(run.calls.last().unwrap(), &["with 0 allocations"]);
}

#[test]
fn a_source_that_the_driver_refuses_is_named_with_its_line() {
    let sources = changed_kernel("fma.rn.f32", "fma.rn.f33");
    let run = with_driver("", Some(sources.path()), &VERIFY);
    assert_eq!(run.code, 1);
    let line =
        1 + include_str!("../../kernels/rmsnorm_f32_warp.ptx").lines().position(|l| l.contains("fma.rn")).unwrap();
    let place = format!("kernels/rmsnorm_f32_warp.ptx:{line}: error");
    let words = ["rmsnorm_f32_warp", "does not compile", "CUDA_ERROR_INVALID_PTX", &place, "f33", "assembly aborted"];
    has(run.lines()[0]["failure"].as_str().unwrap(), &words);
}

#[test]
fn a_fault_on_the_card_is_told_with_the_kernel_that_ran() {
    // Stores far outside every allocation.
    let sources = changed_kernel("st.global.f32    [%out]", "st.global.f32    [%out + 1073741824]");
    let run = with_driver("", Some(sources.path()), &VERIFY);
    assert_eq!(run.code, 1);
    let words = [
        "cuda:0: CUDA_ERROR_ILLEGAL_ADDRESS",
        "at or before the launch of rmsnorm_f32_warp",
        "--device ptx-sim --kernel",
    ];
    has(run.lines()[0]["failure"].as_str().unwrap(), &words);
}

/// Rows of `.npy`, f32[n, d]: small numbers without a pattern, none of unit norm.
fn write_rows(path: &Path, n: usize, d: usize) {
    let values: Vec<f32> = (0..n * d).map(|i| ((i * 2654435761) % 1009) as f32 - 504.0).collect();
    handmill::npy::write(path, &[n, d], &values).unwrap();
}

#[test]
fn rows_pass_through_beside_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    // 4 MiB of rows in 1 MiB of memory: slabs of 256 KiB, of which two stay.
    let (n, d) = (16384, 64);
    write_rows(Path::new(&at("x.npy")), n, d);
    write_rows(Path::new(&at("q.npy")), 3, d);
    let search = |device: &str, ids: &str, more: &[&str]| {
        let (x, q, ids) = (at("x.npy"), at("q.npy"), at(ids));
        let args = ["search", "--corpus", &x, "--queries", &q, "-k", "9", "--device", device, "--out-ids", &ids];
        let run = with_driver("", None, &[&args[..], &["--json", "--repeat", "2"], more].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        (run, std::fs::read(ids).unwrap())
    };
    let (_, expected) = search("cpu", "cpu.npy", &[]);
    let (resident, found) = search("cuda", "all.npy", &[]);
    assert!(found == expected && resident.calls("cuMemHostAlloc").is_empty(), "all rows stay");
    let (run, found) = search("cuda", "some.npy", &["--device-memory", "1"]);
    assert!(found == expected, "other rows are found where some pass through");
    let refused: Vec<_> = run.calls.iter().filter(|call| !call.ends_with(" = 0")).collect();
    assert!(refused.is_empty(), "{refused:?}");

    // Memory: the rows' 1 MiB, and what queries and lists take, which is all the same where every row stays.
    let most = |run: &Run| {
        let held = |call: &&String| call.split(", ").nth(1)?.split(' ').next()?.parse::<usize>().ok();
        run.calls("cuMemAllocAsync").iter().filter_map(held).max().unwrap()
    };
    let beside = most(&resident) - 4 * n * d;
    assert!(most(&run) <= (1 << 20) + beside, "{} bytes held, {beside} beside rows", most(&run));

    // Order: the copies of a slab are queued after the launch over the one before it and before that one's lists are
    // read, and nothing waits for them but the next launch.
    let is_scan = |call: &String| call.starts_with("cuLaunchKernel cosine_topk_");
    let is_copy = |call: &String| call.starts_with("cuMemcpyHtoDAsync") && call.contains("of another stream");
    let (mut beside, mut launches) = (0, 0);
    for after in run.calls.split(is_scan).skip(1) {
        launches += 1;
        let read = after.iter().position(|call| call.starts_with("cuMemcpyDtoHAsync")).expect("lists are read");
        let copies = after.iter().filter(|call| is_copy(call)).count();
        assert_eq!(after[..read].iter().filter(|call| is_copy(call)).count(), copies, "{after:?}");
        let waits = after[..read].iter().filter(|call| call.starts_with("cuStreamWaitEvent =")).count();
        assert_eq!(waits, 0, "{after:?}");
        beside += usize::from(copies > 0);
    }
    // Of 17 slabs two stay; in both searches each that passes comes beside the launch before it.
    let passing = launches / 2 - 2;
    assert_eq!((launches % 2, beside), (0, 2 * passing), "{launches} launches");
    assert!(passing >= 14, "{passing} slabs pass");
    assert_eq!(run.calls("cuStreamWaitEvent of another stream").len(), 0, "no copy waits for the work before it");
}

#[test]
fn gpu_check_writes_a_record_and_ends_with_a_table() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(fake_driver(), folder.path().join("libcuda.so")).unwrap();
    let check = |words: &str| {
        let output = Command::new("python3")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/gpu_check"))
            .args(["--handmill", env!("CARGO_BIN_EXE_handmill"), "--kernel", "rmsnorm_f32_warp"])
            .env("LD_LIBRARY_PATH", folder.path())
            .env("FAKE_CUDA", words)
            .env("OUT", folder.path().join("out"))
            .output()
            .expect("python3 runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, table, said) = check("only=rmsnorm_f32_warp");
    assert_eq!(code, Some(0), "{table}{said}");
    has(&table, &["Fake card", "doctor", "rmsnorm_f32_warp", "16 ok, 0 failed"]);
    let record = folder.path().join("out/record/fake-card-ptx-on-the-cpu");
    let file = record.read_dir().unwrap().next().expect("a record").unwrap().path();
    let lines: Vec<Value> =
        std::fs::read_to_string(file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["what"], &lines[0]["card"]["sm"]), (&"doctor".into(), &80.into()));
    assert_eq!((&lines[1]["kernel"], &lines[1]["failed"]), (&"rmsnorm_f32_warp".into(), &0.into()));

    let (code, table, _) = check("idle");
    assert_eq!(code, Some(1), "launches that do nothing leave the poison");
    has(&table, &["FAILED rmsnorm_f32_warp", "0 ok, 16 failed"]);
    let (code, table, said) = check("no_device");
    assert!(code == Some(1) && table.is_empty(), "{table}");
    has(&said, &["gpu_check: doctor does not find cuda:0", "finds no card"]);
}

#[test]
fn a_launch_that_the_driver_refuses_is_told_with_its_dims() {
    let run = with_driver("no_resources", None, &VERIFY);
    let words = ["rmsnorm_f32_warp (M=1 K=1", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (too many resources requested"];
    has(run.lines()[0]["failure"].as_str().unwrap(), &words);
}
