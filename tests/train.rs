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
#[path = "support/tiny_chat.rs"]
mod tiny_chat;
#[path = "models/tiny.rs"]
#[allow(dead_code)] // some writers are tests/models'
mod tiny_models;

pub use tiny_chat::write_tiny;

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
