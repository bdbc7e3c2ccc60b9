//! The registry and what leans on it, through the library and the tool, on tiny models made here: what is kept and
//! found again, many processes at once, what a process that was killed leaves, and a candidate's way to champion; of a
//! real model too, which needs `tools/fetch_models` and `tools/fetch_data`.

#[path = "registry/cycle.rs"]
mod cycle;
#[path = "registry/gate.rs"]
mod gate;
#[path = "registry/keep.rs"]
mod keep;
#[path = "registry/killed.rs"]
mod killed;
#[cfg(unix)] // signals
#[path = "support/place.rs"]
mod place;
#[path = "registry/real.rs"]
mod real;
#[path = "models/reference.rs"]
#[allow(dead_code)] // the encoder is tests/models'
mod reference;
#[path = "index/tiny.rs"]
mod tiny;
#[path = "support/tiny_chat.rs"]
mod tiny_chat;
#[path = "models/tiny.rs"]
#[allow(dead_code)] // some writers are tests/models'
mod tiny_models;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// The tiny model that talks, in a folder that lives as long as the process.
fn model() -> &'static Path {
    static DIR: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        fs::create_dir(&path).unwrap();
        tiny_chat::write_tiny(&path);
        (folder, path)
    };
    &DIR.get_or_init(make).1
}

/// A folder with a registry in it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn registry(&self) -> PathBuf {
        self.path("registry")
    }

    /// Writes a file below the folder.
    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
        command.args(args).env("HANDMILL_REGISTRY", self.registry()).env_remove("RUST_LOG");
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        let output = self.command(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the tool prints UTF-8");
        let code = output.status.code().expect("the tool was ended by a signal");
        let run = Run { code, stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
        run
    }

    /// The JSON object of a run that must succeed.
    fn json(&self, args: &[&str]) -> Value {
        let run = self.run(&[args, &["--json"]].concat());
        assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
        run.object()
    }

    /// The JSON lines of a run that must succeed.
    fn lines(&self, args: &[&str]) -> Vec<Value> {
        let run = self.run(&[args, &["--json"]].concat());
        assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
        run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The error of a run that must fail.
    fn fails(&self, args: &[&str]) -> String {
        let run = self.run(args);
        assert!(run.code == 1 || run.code == 2, "{args:?}: {} {}", run.stdout, run.stderr);
        let error = run.stderr.split_once("error: ").map_or(String::new(), |(_, error)| error.to_string());
        assert!(!error.is_empty(), "{args:?}: {}", run.stderr);
        error
    }

    fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    }
}

/// What a run of the tool left.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Run {
    fn object(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {} {}", self.stdout, self.stderr))
    }
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}
