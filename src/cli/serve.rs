//! `handmill serve`: the flags, opening what they name, and the way up and down.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use handmill::device::invariant::invariant;
use handmill::device::Device;
use handmill::model::adapter::{model_sha256, sha256};
use handmill::model::checkpoint::Checkpoint;
use handmill::registry::Kind;
use handmill::retrieve::index::Index;
use handmill::retrieve::prompt::special_tokens;
use handmill::serve::canary::{AliasSpec, Canary};
use handmill::serve::capture::{with_end, Capture};
use handmill::serve::engine::{Engine, Options};
use handmill::serve::http::metrics::Metrics;
use handmill::serve::http::routes::{is_name, models};
use handmill::serve::http::{listen, Arm, Limits, Recent, Server};
use handmill::serve::retrieval::Retrieval;
use handmill::serve::tally::Bounds;
use handmill::serve::watch::Watch;
use regex::Regex;
use serde_json::{json, Value};

use super::{
    note, open_embedder, open_model, print_json, resolve, stop_on_interrupt, BaseFlag, Common, ModelFlag, Precision,
    Usage,
};

/// The least score of a passage worth giving, as for `handmill ask`.
const MIN_SCORE: f32 = 0.3;
/// Connections at once.
const CONNECTIONS: usize = 1024;
/// Threads that prepare prompts and search.
const BLOCKING: usize = 16;
/// How often Ctrl-C is looked for.
const LOOK: Duration = Duration::from_millis(20);

/// Serve a model with many adapters and indexes, as OpenAI's interface has it
///
/// The model's name is its file's, or --name; each adapter is a model of its own; NAME+INDEX answers from an index, with
/// citations. GET / is a page to try it on, GET /metrics tells Prometheus. With --json one line when it is ready: address,
/// models. Ctrl-C or SIGTERM finishes what is being answered and exits 0.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    model: ModelFlag,
    /// The base model's name [default: its file's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// An adapter and its name; may be given more than once
    #[arg(long, value_name = "NAME=DIR", value_parser = pair)]
    adapter: Vec<(String, PathBuf)>,
    #[command(flatten)]
    base: BaseFlag,
    /// An index and its name; may be given more than once
    #[arg(long, value_name = "NAME=IDX", value_parser = pair, requires = "embed_model")]
    index: Vec<(String, PathBuf)>,
    /// The embedding model of the indexes and of /v1/embeddings
    #[arg(long, value_name = "EMB")]
    embed_model: Option<PathBuf>,
    /// Passages for a question
    #[arg(short, value_name = "K", default_value_t = 5)]
    k: usize,
    /// The least score of a passage worth giving: cosine, -1 to 1
    #[arg(long, value_name = "SCORE", default_value_t = MIN_SCORE)]
    min_score: f32,
    /// Where to listen; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = address)]
    listen: SocketAddr,
    /// A file of tokens, one a line, one of which each request must bear; needed to listen to other machines
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Requests worked on together
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_running: usize,
    /// Requests that may wait for that; more are told to try again
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_waiting: usize,
    /// Tokens that a prompt and its answer may have together, at most --cache-tokens [default: the model's context]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens that all requests worked on may have together, whose keys and values are kept; /metrics and the page tell
    /// how many there are
    #[arg(long, value_name = "N", default_value_t = Options::default().cache_tokens)]
    cache_tokens: usize,
    /// New tokens of a chat's answer whose request does not say how many
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Bytes of a request's body at most
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20)]
    max_body: usize,
    /// Seconds from a request to the end of its answer at most
    #[arg(long, value_name = "S", default_value_t = 120.0)]
    timeout: f64,
    /// Seconds that a client may take to send a request's head, to send its body, or to read something of its answer;
    /// then it loses its connection
    #[arg(long, value_name = "S", default_value_t = 30.0)]
    client_timeout: f64,
    /// Load and unload adapters on request, from below --adapter-root: POST /v1/adapters {"name", "path"}, with
    /// "replace": true also in the place of one that is loaded; DELETE /v1/adapters/NAME
    #[arg(long, requires = "adapter_root")]
    allow_admin: bool,
    /// The only directory that adapters are loaded from on request
    #[arg(long, value_name = "DIR")]
    adapter_root: Option<PathBuf>,
    /// Record questions, answers and ratings in this file, as JSON Lines
    #[arg(long, value_name = "FILE")]
    capture: Option<PathBuf>,
    /// Drop recorded lines after so many days
    #[arg(long, value_name = "N", requires = "capture")]
    retention_days: Option<f64>,
    /// Record [redacted] for what this pattern matches; may be given more than once
    #[arg(long, value_name = "REGEX", requires = "capture")]
    redact: Vec<String>,
    /// A name whose requests are split by weight, the champion first; may be given more than once
    #[arg(long, value_name = "NAME=MODEL:WEIGHT,..", value_parser = alias)]
    alias: Vec<AliasSpec>,
    /// An arm of an alias that also answers what the others are asked, for the record alone
    #[arg(long, value_name = "MODEL", requires = "alias")]
    shadow: Option<String>,
    /// Where rollbacks and the salt of the split are kept [default: beside --capture; else they end with the server]
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Roll nothing back before so many answers, or ratings, of both arms; 5 or more
    #[arg(long, value_name = "N", default_value_t = Bounds::default().least)]
    rollback_least: u64,
    /// Roll an arm back when more than this share of its answers fail
    #[arg(long, value_name = "SHARE", default_value_t = Bounds::default().errors)]
    rollback_errors: f64,
    /// .. when its answers take more than this many times as long as the champion's
    #[arg(long, value_name = "RATIO", default_value_t = Bounds::default().latency)]
    rollback_latency: f64,
    /// .. when its share of good ratings is more than this below the champion's
    #[arg(long, value_name = "SHARE", default_value_t = Bounds::default().feedback)]
    rollback_feedback: f64,
    /// Questions that a model was trained on: a .npy of --embed-model's vectors, or a .jsonl of training rows; how far
    /// the questions of late are from them stands in /metrics and on the page
    #[arg(long, value_name = "FILE", requires = "embed_model")]
    drift_reference: Option<PathBuf>,
    /// Take the fastest kernels for each batch: the last bits of an answer may then depend on what else is asked
    #[arg(long)]
    any_batch: bool,
    #[command(flatten)]
    precision: Precision,
    #[command(flatten)]
    common: Common,
}

/// An address and a port; localhost is 127.0.0.1.
fn address(text: &str) -> Result<SocketAddr, String> {
    let numbers = text.strip_prefix("localhost:").map_or(text.to_string(), |port| format!("127.0.0.1:{port}"));
    numbers.parse().map_err(|_| "is no address and port, such as 127.0.0.1:8080, [::1]:8080 or 0.0.0.0:8080".into())
}

/// `NAME=PATH`.
fn pair(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').filter(|(_, path)| !path.is_empty()).ok_or("is not NAME=PATH")?;
    match is_name(name) {
        true => Ok((name.into(), path.into())),
        false => Err(format!("{name:?} is no name: up to 64 of a-z, A-Z, 0-9, '.', '_', '-'")),
    }
}

/// `NAME=MODEL:WEIGHT,MODEL:WEIGHT`.
fn alias(text: &str) -> Result<AliasSpec, String> {
    let (name, arms) = text.split_once('=').ok_or("is not NAME=MODEL:WEIGHT,..")?;
    if !is_name(name) {
        return Err(format!("{name:?} is no name"));
    }
    let arm = |text: &str| {
        let (model, weight) = text.rsplit_once(':').ok_or(format!("{text:?} is not MODEL:WEIGHT"))?;
        let weight: f64 = weight.parse().map_err(|_| format!("{weight:?} is no weight"))?;
        match (0.0..=1e9).contains(&weight) {
            true => Ok((model.to_string(), weight)),
            false => Err(format!("{weight} is no weight: 0 or more")),
        }
    };
    let arms: Vec<(String, f64)> = arms.split(',').map(arm).collect::<Result<_, String>>()?;
    if !(2..=16).contains(&arms.len()) || arms.iter().map(|(_, weight)| weight).sum::<f64>() <= 0.0 {
        return Err("an alias has 2 to 16 arms, not all of weight 0".into());
    }
    if arms.iter().enumerate().any(|(i, (model, _))| arms[..i].iter().any(|(other, _)| other == model)) {
        return Err("an arm is named twice".into());
    }
    Ok(AliasSpec { name: name.into(), arms, shadow: None })
}

impl Serve {
    pub fn run(&self) -> Result<()> {
        self.check()?;
        let tokens = self.token_file.as_deref().map(read_tokens).transpose()?.unwrap_or_default();
        let loopback = self.listen.ip().is_loopback();
        if !loopback && tokens.is_empty() {
            let what =
                format!("{} can be reached by other machines: give --token-file, or listen to 127.0.0.1", self.listen);
            return Err(Usage(what).into());
        }
        let patterns = self.redact.iter().map(|pattern| {
            Regex::new(pattern).map_err(|error| Usage(format!("--redact {pattern:?} is no pattern: {error}")))
        });
        let patterns = patterns.collect::<Result<Vec<_>, _>>()?;
        // Taken before anything is loaded: a port in use is told at once.
        let listener = std::net::TcpListener::bind(self.listen);
        let listener = listener.map_err(|cause| match cause.kind() {
            std::io::ErrorKind::AddrInUse => anyhow::anyhow!(
                "cannot listen to {}: something else does already; name another port with --listen, or 0 for a free one",
                self.listen
            ),
            _ => anyhow::anyhow!("cannot listen to {}: {cause}", self.listen),
        })?;
        listener.set_nonblocking(true).context("cannot listen")?;
        let address = listener.local_addr().context("cannot listen")?;

        let device = self.common.open_device()?;
        let server = self.open(&device, tokens, patterns, loopback)?;
        let stop = stop_on_interrupt()?;
        let server = Arc::new(server);
        let names: Vec<String> = models(&server).into_iter().map(|(name, _)| name).collect();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(BLOCKING)
            .enable_all()
            .build()
            .context("cannot start the server's threads")?;
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).context("cannot listen")?;
            if self.common.json {
                print_json(&json!({"address": address.to_string(), "models": names, "device": device.id()}))?;
                std::io::Write::flush(&mut std::io::stdout())?;
            } else {
                note(&format!("http://{address}/ is ready, on {}: {}", device.id(), names.join(", ")));
            }
            listen::serve(server, listener, interrupted(stop)).await.context("cannot serve")
        })?;
        runtime.shutdown_timeout(Duration::from_secs(1));
        note("the server is down; every request it took is answered");
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let usage = |what: String| Err(Usage(what).into());
        if self.max_running == 0 || self.max_tokens == 0 || self.max_body == 0 {
            return usage("--max-running, --max-tokens and --max-body are 1 or more".into());
        }
        if ![self.timeout, self.client_timeout].iter().all(|&seconds| seconds > 0.0 && seconds <= 86_400.0) {
            return usage("--timeout and --client-timeout are more than 0 seconds, and a day at most".into());
        }
        if !self.min_score.is_finite() || self.k == 0 {
            return usage("--min-score is a number, such as 0.3, and -k is 1 or more".into());
        }
        if self.retention_days.is_some_and(|days| !(days > 0.0 && days < 1e6)) {
            return usage("--retention-days is a number of days, such as 30".into());
        }
        if self.adapter_root.is_some() && !self.allow_admin {
            return usage("--adapter-root is for --allow-admin".into());
        }
        if let Some(shadow) = &self.shadow {
            if !self.alias.iter().any(|alias| alias.arms.iter().any(|(model, _)| model == shadow)) {
                return usage(format!("--shadow {shadow} is no arm of an --alias"));
            }
        }
        let rates = [self.rollback_errors, self.rollback_feedback];
        if rates.iter().any(|rate| !(0.0..=1.0).contains(rate)) || self.rollback_latency.is_nan() {
            return usage("--rollback-errors and --rollback-feedback are shares, 0 to 1".into());
        }
        Ok(())
    }

    /// Everything that answers need.
    fn open(
        &self,
        device: &Arc<dyn Device>,
        tokens: Vec<[u8; 32]>,
        patterns: Vec<Regex>,
        loopback: bool,
    ) -> Result<Server> {
        let base = match &self.name {
            Some(name) if is_name(name) => name.clone(),
            Some(name) => return Err(Usage(format!("--name {name:?} is no name")).into()),
            None => name_of(&self.model.model),
        };
        let mut names = vec![base.clone()];
        let embedding = self.embed_model.as_deref().map(name_of);
        let adapters = self.adapter.iter().map(|(name, _)| name);
        let aliases = self.alias.iter().map(|alias| &alias.name);
        for name in adapters.chain(aliases).chain(&embedding) {
            if names.contains(name) {
                return Err(Usage(format!("two models are called {name}: see also --name")).into());
            }
            names.push(name.clone());
        }
        let retrieval = self.open_retrieval(device, embedding)?.map(Arc::new);
        let drift = self.open_drift(retrieval.as_deref())?.map(Arc::new);
        let engine = self.open_engine(device)?;
        let special = special_tokens(&engine.text().tokenizer);
        let known = engine.adapters();
        let sha256_of = |model: &str| {
            let name = model.split('+').next().unwrap_or_default();
            known.iter().find(|adapter| adapter.name == name).map_or(String::new(), |adapter| adapter.sha256.clone())
        };
        let shadowed = self.alias.iter().map(|alias| {
            let shadow = self.shadow.clone().filter(|shadow| alias.arms.iter().any(|(model, _)| model == shadow));
            AliasSpec { shadow, ..alias.clone() }
        });
        let state = self.state.clone().or(self.capture.as_deref().map(|path| with_end(path, ".state.json")));
        let bounds = Bounds {
            least: self.rollback_least.max(5),
            errors: self.rollback_errors,
            latency: self.rollback_latency,
            feedback: self.rollback_feedback,
        };
        let canary = Canary::open(&shadowed.collect::<Vec<_>>(), bounds, state.as_deref(), &sha256_of)?;
        let recent = Recent::default();
        let retention = self.retention_days.map(|days| Duration::from_secs_f64(days * 86_400.0));
        let mut each = |line: &Value| remember(line, &canary, &recent);
        let open = |path: &PathBuf| Capture::open(path, patterns, retention, &mut each);
        let capture = self.capture.as_ref().map(open).transpose().context("cannot record (--capture)")?;
        let root = self
            .adapter_root
            .as_ref()
            .map(|root| root.canonicalize().with_context(|| format!("--adapter-root {}", root.display())));
        let server = Server {
            metrics: Metrics::new(&base),
            engine,
            base,
            special,
            retrieval,
            canary,
            capture,
            limits: Limits {
                max_body: self.max_body,
                timeout: Duration::from_secs_f64(self.timeout),
                client: Duration::from_secs_f64(self.client_timeout),
                default_tokens: self.max_tokens,
                connections: CONNECTIONS,
            },
            tokens,
            adapter_root: root.transpose()?.filter(|_| self.allow_admin),
            loopback,
            recent,
            began: Instant::now(),
            draining: AtomicBool::new(false),
            active: Arc::new(AtomicUsize::new(0)),
            drift,
        };
        for (model, _) in self.alias.iter().flat_map(|alias| &alias.arms) {
            if server.target(model).is_none() {
                return Err(Usage(format!("an alias names {model}, which is no model here")).into());
            }
        }
        Ok(server)
    }

    fn open_retrieval(&self, device: &Arc<dyn Device>, name: Option<String>) -> Result<Option<Retrieval>> {
        let (Some(path), Some(name)) = (&self.embed_model, name) else { return Ok(None) };
        let embedder = open_embedder(path, device)?;
        let mut indexes = BTreeMap::new();
        for (name, dir) in &self.index {
            if indexes.insert(name.clone(), Index::open(&resolve(Kind::Index, dir)?, &embedder)?).is_some() {
                return Err(Usage(format!("two indexes are called {name}")).into());
            }
        }
        let (k, min_score, device) = (self.k, self.min_score, device.clone());
        Ok(Some(Retrieval { name, embedder, device, indexes, k, min_score, turn: Mutex::new(()) }))
    }

    fn open_engine(&self, device: &Arc<dyn Device>) -> Result<Engine> {
        let flag = super::AdapterFlag { adapter: None, base: BaseFlag { any_base: self.base.any_base } };
        let device = if self.any_batch { device.clone() } else { invariant(device.clone()) };
        let path = self.model.path()?;
        let model = open_model(&path, &flag, &self.precision, &device)?;
        // Reading the model's files whole is for those who load adapters.
        let asked = !self.base.any_base && (!self.adapter.is_empty() || self.allow_admin);
        let base = asked.then(|| model_sha256(&Checkpoint::open(&path)?)).transpose()?;
        let options = Options {
            max_running: self.max_running,
            max_waiting: self.max_waiting,
            cache_tokens: self.cache_tokens,
            context: self.context.unwrap_or(0),
            base_sha256: base,
            ..Options::default()
        };
        let engine = Engine::start(model, options)?;
        for (name, path) in &self.adapter {
            let path = resolve(Kind::Adapter, path)?;
            engine.load_adapter(name, &path).with_context(|| format!("adapter {name}: {}", path.display()))?;
        }
        Ok(engine)
    }

    /// The questions that others are compared with: unit vectors of a `.npy`, or texts of a `.jsonl`.
    fn open_drift(&self, retrieval: Option<&Retrieval>) -> Result<Option<Watch>> {
        let (Some(path), Some(retrieval)) = (&self.drift_reference, retrieval) else { return Ok(None) };
        let path = &resolve(Kind::Dataset, path)?;
        let d = retrieval.embedder.width();
        let place = || format!("--drift-reference {}", path.display());
        let rows = match path.extension().is_some_and(|end| end == "npy") {
            true => {
                let array = handmill::npy::Array::open::<f32>(path).with_context(place)?;
                if array.shape.len() != 2 || array.shape[1] != d {
                    anyhow::bail!("{}: has the shape {:?}; vectors of {d} numbers are wanted", place(), array.shape);
                }
                array.to_vec::<f32>()
            }
            false => {
                let (text, mut questions) = (super::read_text(path)?, Vec::new());
                for (row, line) in (1..).zip(text.lines().filter(|line| !line.trim().is_empty())) {
                    let object: Value = serde_json::from_str(line).with_context(|| format!("{}: #{row}", place()))?;
                    let question = question_of(&object);
                    questions.push(question.with_context(|| format!("{}: #{row} asks nothing", place()))?);
                }
                retrieval.embedder.embed_lines(&questions)?
            }
        };
        match rows.len() / d {
            0 | 1 => Err(Usage(format!("{} holds fewer than two questions", place())).into()),
            _ => Ok(Some(Watch::new(rows, d))),
        }
    }
}

/// What a training row asks.
fn question_of(row: &Value) -> Option<String> {
    let text = |key: &str| row.get(key).and_then(Value::as_str).map(str::to_string);
    let said = row.get("messages").and_then(Value::as_array).and_then(|messages| {
        messages.iter().find(|message| message["role"] == "user")?.get("content")?.as_str().map(str::to_string)
    });
    said.or(text("question")).or(text("prompt")).or(text("instruction")).or(text("text"))
}

/// Comes back when the process is asked to end.
async fn interrupted(stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::SeqCst) {
        tokio::time::sleep(LOOK).await;
    }
}

/// A model's name: its file's or directory's, with what no name may hold left out.
fn name_of(path: &Path) -> String {
    // A link is called by its own name; `.` has none.
    let full = if path.file_name().is_some() { Some(path.to_path_buf()) } else { path.canonicalize().ok() };
    let name =
        full.as_deref().and_then(Path::file_name).map_or(String::new(), |name| name.to_string_lossy().into_owned());
    let name = name.strip_suffix(".gguf").unwrap_or(&name);
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect();
    let name = name.trim_start_matches(['.', '_', '-']);
    if name.is_empty() {
        "model".into()
    } else {
        name.chars().take(64).collect()
    }
}

/// SHA-256 of each token of a file.
fn read_tokens(path: &Path) -> Result<Vec<[u8; 32]>> {
    let text = super::read_text(path)?;
    let tokens: Vec<[u8; 32]> =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| sha256(line.as_bytes())).collect();
    match tokens.is_empty() {
        true => Err(Usage(format!("{} holds no token: write one a line", path.display())).into()),
        false => Ok(tokens),
    }
}

/// What a line of the log tells of an earlier run.
fn remember(line: &Value, canary: &Canary, recent: &Recent) {
    let text = |key: &str| line.get(key).and_then(Value::as_str);
    let Some(id) = text("id") else { return };
    if let Some(rating) = line.get("feedback").and_then(|feedback| feedback.get("rating")?.as_i64()) {
        let before = recent.rate(id, rating > 0);
        if let Some(Some(arm)) = recent.arm(id) {
            canary.remember(&arm.alias, &arm.model, |tally| tally.rating(before, rating > 0));
        }
        return;
    }
    let shadow = line.get("shadow").and_then(Value::as_bool).unwrap_or(false);
    let arm = text("arm").zip(text("model")).map(|(arm, alias)| Arm { alias: alias.into(), model: arm.into() });
    if let Some(arm) = &arm {
        let seconds = line.get("seconds").and_then(Value::as_f64);
        let failed = line.get("error").is_some();
        canary.remember(&arm.alias, &arm.model, |tally| match (shadow, failed || seconds.is_some()) {
            (false, true) => tally.answer(failed, seconds.unwrap_or(0.0)),
            (true, true) => tally.shadow(failed, seconds.unwrap_or(0.0)),
            _ => {}
        });
    }
    if !shadow && line.get("answer").is_some() {
        recent.add(id, arm);
    }
}
