//! `handmill serve` as clients meet it: a process of its own, asked over TCP. Models are tiny and made here.

#[path = "serve/canary.rs"]
mod canary;
#[path = "serve/capture.rs"]
mod capture;
#[path = "serve/drift.rs"]
mod drift;
#[path = "index/tiny.rs"]
mod embedder;
#[path = "serve/limits.rs"]
mod limits;
#[path = "serve/load.rs"]
mod load;
#[path = "serve/openai.rs"]
mod openai;
#[path = "serve/patience.rs"]
mod patience;
#[path = "models/reference.rs"]
#[allow(dead_code)] // the encoder is tests/models'
mod reference;
#[path = "support/tiny_chat.rs"]
mod tiny_chat;
#[path = "models/tiny.rs"]
#[allow(dead_code)] // some writers are tests/models'
mod tiny_models;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use handmill::model::adapter::{LoraConfig, TARGETS};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::Embedder;
use handmill::model::weights::LoadOptions;
use handmill::retrieve::index;
use handmill::train::parameters;
use handmill::verify::normal;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{json, Value};

const DOCS: [(&str, &str); 3] = [
    ("mill.md", "# The mill\n\nThe mill grinds wheat beside the river.\n"),
    ("inn.md", "# The inn\n\nThe inn serves beer near the bridge.\n"),
    ("<b>forge.md", "# The forge\n\nThe forge makes <script>nails</script> from iron.\n"),
];

/// Models, adapters and an index that all tests share.
fn files() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("tiny")).unwrap();
        tiny_chat::write_tiny(&at("tiny"));
        std::fs::create_dir(at("docs")).unwrap();
        for (name, text) in DOCS {
            std::fs::write(at("docs").join(name), text).unwrap();
        }
        let words: Vec<&str> = DOCS.iter().map(|doc| doc.1).collect();
        embedder::write(&at("words"), &words.join(" "), 1);
        let device = handmill::device::open("cpu").unwrap();
        let model = Embedder::open(&at("words"), device, &LoadOptions::default()).unwrap();
        index::build(&at("idx"), &[at("docs")], &model, &index::Options::default(), &mut |_| true).unwrap();
        index::build(&at("idx2"), &[at("docs").join("mill.md")], &model, &index::Options::default(), &mut |_| true)
            .unwrap();
        // `ill` overflows: whatever it answers fails.
        let more = ["three", "four", "five", "six", "seven", "eight"];
        let more = (5..).zip(more).map(|(seed, name)| (seed, name, 0.3));
        for (seed, name, size) in [(2, "one", 0.3), (3, "two", 0.3), (4, "ill", 3e38)].into_iter().chain(more) {
            let targets = TARGETS.iter().map(|target| target.0).collect();
            let config = LoraConfig { r: 3, alpha: 6.0, rslora: false, dropout: 0.0, targets, base: None };
            let mut adapter = parameters::fresh(&Checkpoint::open(&at("tiny")).unwrap().config, config, seed);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            for value in adapter.modules.iter_mut().flat_map(|module| &mut module.b) {
                *value = if size > 1.0 { size } else { size * normal(&mut rng) as f32 };
            }
            adapter.save(&at("adapters").join(name)).unwrap();
        }
        folder
    };
    DIR.get_or_init(make).path()
}

fn path(name: &str) -> String {
    files().join(name).to_str().unwrap().to_string()
}

/// A server, ended when it goes.
struct Running {
    child: Child,
    address: String,
    models: Vec<String>,
    token: Option<String>,
}

/// An answer: status, head, body.
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// An error's status, param and code.
    fn fault(&self) -> (u16, String, String) {
        let error = &self.json()["error"];
        assert!(error["message"].as_str().is_some_and(|text| text.len() > 5), "{}", self.body);
        assert!(error["type"].is_string(), "{}", self.body);
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_string();
        (self.status, text("param"), text("code"))
    }

    /// The objects of a stream that came to its end.
    fn events(&self) -> Vec<Value> {
        let mut events: Vec<&str> = self.body.split("\n\n").filter(|event| !event.is_empty()).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }

    /// The text of a chat, whole or in pieces.
    fn chat(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.body);
        if self.body.starts_with("data: ") {
            let text = |event: &Value| event["choices"][0]["delta"]["content"].as_str().unwrap_or("").to_string();
            return self.events().iter().map(text).collect();
        }
        self.json()["choices"][0]["message"]["content"].as_str().unwrap().to_string()
    }
}

impl Running {
    /// The tiny model with its adapters and index, and what more is asked for.
    fn start(more: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
        command.args(["serve", "--model", &path("tiny"), "--listen", "127.0.0.1:0", "--device", "cpu", "--json"]);
        for name in ["one", "two", "ill"] {
            command.args(["--adapter", &format!("{name}={}", path(&format!("adapters/{name}")))]);
        }
        command.args(["--embed-model", &path("words"), "--index", &format!("docs={}", path("idx"))]);
        let mut child = command.args(more).env("RUST_LOG", "off").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{more:?}: {error}: {line}"));
        let models = ready["models"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_string());
        let address = ready["address"].as_str().unwrap().to_string();
        Running { child, address, models: models.collect(), token: None }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request as it stands; HTTP/1.0, so that the body ends with the connection.
    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let token = self.token.as_ref().map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {length}\r\n{token}{headers}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let _ = stream.write_all(body); // refused before it was all sent: the answer tells
        stream
    }

    fn call(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        receive(self.send(method, path, headers, body))
    }

    fn get(&self, path: &str) -> Reply {
        self.call("GET", path, "", b"")
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.call("POST", path, "Content-Type: application/json\r\n", body.to_string().as_bytes())
    }

    fn chat(&self, body: &Value) -> Reply {
        self.post("/v1/chat/completions", body)
    }

    fn status(&self) -> Value {
        self.get("/v1/status").json()
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    /// Tries until it holds.
    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        for _ in 0..4000 {
            if holds() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{what} within 20 s");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn receive(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert!(!bytes.is_empty(), "no answer: {error}");
    }
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head: head.to_ascii_lowercase(), body: body.to_string() }
}

/// A question to a model.
fn question(model: &str, text: &str, more: Value) -> Value {
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 12,
        "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn join(folder: &tempfile::TempDir, name: &str) -> PathBuf {
    folder.path().join(name)
}
