//! What the engine makes of many texts at once, as JSON Lines: tokens a second by batch, with adapters and without, with
//! and without batch invariance, all in one run, and the processor's time for a token, which other work on the machine
//! moves less (with RAYON_NUM_THREADS=1 no thread waits for another in it). Medians of the rounds, with what a fifth of
//! them lies below and above; then ratios of rows, round by round: what eight texts at once give of one, and eight
//! adapters of one.
//!
//! `cargo bench --bench serve -- --quick` takes one round instead of five; `--profile` tells where the time of a pass
//! over eight texts goes, by kernel; `--record FILE` appends all of it as one line.
//!
//! The model is SmolLM2-135M of HANDMILL_MODELS, or of its default folder; the adapters are made here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use handmill::bench::{measure::quantile, roofline};
use handmill::device::{cpu::Cpu, invariant::invariant, profile::Profiled, Device};
use handmill::model::adapter::{LoraConfig, TARGETS};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::LanguageModel;
use handmill::model::sampler::SamplerSettings;
use handmill::model::weights::LoadOptions;
use handmill::serve::engine::{Engine, Options};
use handmill::serve::job::{Event, Job};
use handmill::train::parameters;
use handmill::verify::normal;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{json, Value};
use tokio::sync::mpsc::unbounded_channel;

/// Tokens a second of many texts at once
#[derive(Parser)]
#[command(name = "serve", max_term_width = 100)]
struct Arguments {
    /// One round instead of five
    #[arg(long)]
    quick: bool,
    /// Rounds that count
    #[arg(long, default_value_t = 5, conflicts_with = "quick", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Tell where the time of a pass goes, by kernel, instead
    #[arg(long)]
    profile: bool,
    /// Append what was measured to this file, a line of JSON
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "profile")]
    record: Option<PathBuf>,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// New tokens of a text.
const NEW: usize = 48;
/// Rank of the adapters.
const RANK: usize = 8;

/// One kind of work.
struct Row {
    name: &'static str,
    /// The prompt's tokens and the new ones.
    tokens: (usize, usize),
    /// The adapter of each text.
    adapters: Vec<Option<usize>>,
}

fn rows() -> Vec<Row> {
    let decode = |name, adapters| Row { name, tokens: (16, NEW), adapters };
    let mut rows: Vec<Row> = [1, 2, 4, 8, 16].map(|batch| decode("decode", vec![None; batch])).into();
    rows.push(decode("decode, one adapter", vec![Some(0); 8]));
    rows.push(decode("decode, eight adapters", (0..8).map(Some).collect()));
    rows.push(decode("decode, seven adapters and the base", (0..8).map(|i| (i > 0).then_some(i)).collect()));
    rows.push(Row { name: "prompt", tokens: (512, 1), adapters: vec![None] });
    rows
}

/// A text's prompt: other tokens for each, none special.
fn prompt(text: usize, count: usize) -> Vec<u32> {
    (0..count).map(|i| 1000 + ((text * 131 + i * 37) % 20_000) as u32).collect()
}

/// Seconds of processors that this process has used.
fn cpu_seconds() -> f64 {
    // SAFETY: `getrusage` fills the struct it is given, of which all zeros is a value.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + 1e-6 * time.tv_usec as f64;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// A moment: by the clock, and by the processors.
type Moment = (Instant, f64);

fn now() -> Moment {
    (Instant::now(), cpu_seconds())
}

/// Tokens a second, and processors' seconds a token: of new ones while every text of the row goes on, or of the prompt's
/// where there is one new token.
fn measure(engine: &Engine, row: &Row) -> (f64, f64) {
    let (prompt_tokens, new_tokens) = row.tokens;
    let begun = now();
    let listeners: Vec<_> = row
        .adapters
        .iter()
        .enumerate()
        .map(|(i, adapter)| {
            let (events, listener) = unbounded_channel();
            let job = Job {
                prompt: prompt(i, prompt_tokens),
                adapter: adapter.map(|adapter| adapter.to_string()),
                sampler: SamplerSettings::default(),
                max_tokens: new_tokens,
                stop: Vec::new(),
                logprobs: None,
                echo: false,
                deadline: None,
                events,
            };
            engine.submit(job).expect("room for it");
            listener
        })
        .collect();
    let hear = |mut listener: tokio::sync::mpsc::UnboundedReceiver<Event>| {
        let mut times = Vec::new();
        while let Some(event) = listener.blocking_recv() {
            match event {
                Event::Token(_) => times.push(now()),
                Event::Failed(what) => panic!("{what}"),
                _ => {}
            }
        }
        times
    };
    let times: Vec<Vec<Moment>> = std::thread::scope(|scope| {
        let threads: Vec<_> = listeners.into_iter().map(|listener| scope.spawn(move || hear(listener))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let (start, end, count) = if new_tokens == 1 {
        (begun, times[0][0], prompt_tokens)
    } else {
        let start = times.iter().map(|times| times[0]).max_by_key(|time| time.0).expect("a text");
        let end = times.iter().map(|times| times[times.len() - 1]).min_by_key(|time| time.0).expect("a text");
        let within = |time: &&Moment| time.0 > start.0 && time.0 <= end.0;
        (start, end, times.iter().flatten().filter(within).count())
    };
    (count as f64 / end.0.duration_since(start.0).as_secs_f64(), (end.1 - start.1) / count as f64)
}

/// Eight adapters for every projection.
fn write_adapters(model: &Path, dir: &Path) -> Vec<PathBuf> {
    let base = Checkpoint::open(model).expect("the model opens").config;
    let write = |i: usize| {
        let targets = TARGETS.iter().map(|target| target.0).collect();
        let config = LoraConfig { r: RANK, alpha: 8.0, rslora: false, dropout: 0.0, targets, base: None };
        let mut adapter = parameters::fresh(&base, config, i as u64);
        let mut rng = ChaCha8Rng::seed_from_u64(i as u64);
        adapter.modules.iter_mut().flat_map(|m| &mut m.b).for_each(|b| *b = 0.01 * normal(&mut rng) as f32);
        let path = dir.join(i.to_string());
        adapter.save(&path).expect("a temporary folder takes files");
        path
    };
    (0..8).map(write).collect()
}

fn engine(model: &Path, device: Arc<dyn Device>, adapters: &[PathBuf]) -> Engine {
    let model = LanguageModel::open(model, device, &LoadOptions::default()).expect("the model opens");
    let engine = Engine::start(model, Options { cache_tokens: 4096, ..Options::default() }).expect("an engine");
    for (i, path) in adapters.iter().enumerate() {
        engine.load_adapter(&i.to_string(), path).expect("the adapter fits");
    }
    engine
}

/// The median of some rounds, and what a fifth of them lies below and above.
#[derive(Clone, Copy)]
struct Spread {
    median: f64,
    p20: f64,
    p80: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |share| quantile(&values, share);
        Spread { median: at(0.5), p20: at(0.2), p80: at(0.8) }
    }

    fn json(self) -> Value {
        json!({"median": self.median, "p20": self.p20, "p80": self.p80})
    }
}

/// What each round measured of a row: by engine, tokens a second and the processor's seconds a token.
type Rounds = [Vec<(f64, f64)>; 2];

/// A row, by its work and batch.
type Which = (&'static str, usize);

/// Two rows beside each other: what that tells, the upper one, the lower one.
const RATIOS: [(&str, Which, Which); 3] = [
    ("eight texts at once / one", ("decode", 8), ("decode", 1)),
    ("sixteen texts at once / one", ("decode", 16), ("decode", 1)),
    ("eight adapters / one", ("decode, eight adapters", 8), ("decode, one adapter", 8)),
];

/// Tokens a second of one row over another's in the same round, for each engine.
fn ratio(rows: &[Row], rates: &[Rounds], upper: Which, lower: Which) -> [Spread; 2] {
    let find = |(name, batch): Which| {
        let at = rows.iter().position(|row| row.name == name && row.adapters.len() == batch);
        &rates[at.expect("a row that is measured")]
    };
    let (upper, lower) = (find(upper), find(lower));
    [0, 1].map(|engine| Spread::of(upper[engine].iter().zip(&lower[engine]).map(|(above, below)| above.0 / below.0)))
}

/// All of a run as one line.
fn record(rows: &[Row], rates: &[Rounds], ratios: &[Value], load: Option<f64>, device: &dyn Device) -> Value {
    let rounds = rates[0][0].len();
    let tenths = |rates: &[(f64, f64)]| rates.iter().map(|rate| (10.0 * rate.0).round() / 10.0).collect::<Vec<f64>>();
    let of_row = |(row, rates): (&Row, &Rounds)| {
        json!({
            "work": row.name, "batch": row.adapters.len(), "prompt_tokens": row.tokens.0, "new_tokens": row.tokens.1,
            "tokens_per_s": tenths(&rates[0]), "invariant_tokens_per_s": tenths(&rates[1]),
        })
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    json!({
        "date": date(now),
        "what": "serving engine, tokens/s: batches, adapters, batch invariance",
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "processor": device.description(),
        "threads": rayon::current_num_threads(),
        "load_before": load,
        "command": format!("cargo bench --bench serve -- --rounds {rounds}"),
        "rows": rows.iter().zip(rates).map(of_row).collect::<Vec<_>>(),
        "ratios": ratios,
    })
}

/// Seconds since 1970 as `2026-11-23T12:24:30+00:00` (days to dates after Hinnant, "chrono-compatible low-level date
/// algorithms").
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}+00:00", year + 400 * era + later)
}

fn main() {
    let arguments = Arguments::parse();
    let load = roofline::load();
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
        cache.unwrap_or_else(|| home().join(".cache")).join("handmill/models")
    });
    let model = folder.join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let adapters = write_adapters(&model, dir.path());
    let cpu: Arc<dyn Device> = Arc::new(Cpu::new());

    if arguments.profile {
        for device in [cpu.clone(), invariant(cpu.clone())] {
            let profiled = Arc::new(Profiled::new(device));
            let engine = engine(&model, profiled.clone(), &adapters);
            for row in rows().iter().filter(|row| [1, 8].contains(&row.adapters.len())) {
                profiled.take();
                let (rate, _) = measure(&engine, row);
                let kernel = |(stem, row): (String, handmill::device::profile::Row)| {
                    let ms = 1e3 * row.seconds;
                    json!({"kernel": stem, "launches": row.launches, "ms": ms})
                };
                let kernels: Vec<_> = profiled.take().into_iter().map(kernel).collect();
                let batch = row.adapters.len();
                println!("{}", json!({"work": row.name, "batch": batch, "tokens_per_s": rate, "kernels": kernels}));
            }
        }
        return;
    }

    let engines = [engine(&model, cpu.clone(), &adapters), engine(&model, invariant(cpu.clone()), &adapters)];
    let rounds = if arguments.quick { 1 } else { arguments.rounds };
    let rows = rows();
    // Row, then engine, then round; one round is not counted.
    let mut rates: Vec<Rounds> = vec![Default::default(); rows.len()];
    for round in 0..=rounds {
        for (row, rates) in rows.iter().zip(&mut rates) {
            for (engine, rates) in engines.iter().zip(rates) {
                let measured = measure(engine, row);
                if round > 0 {
                    rates.push(measured);
                }
            }
        }
    }
    for (row, rates) in rows.iter().zip(&rates) {
        let middle = |of: fn(&(f64, f64)) -> f64| rates.each_ref().map(|rates| Spread::of(rates.iter().map(of)));
        let ([free, fixed], [free_cpu, fixed_cpu]) = (middle(|rate| rate.0), middle(|rate| 1e3 * rate.1));
        let line = json!({
            "work": row.name, "batch": row.adapters.len(), "prompt_tokens": row.tokens.0, "new_tokens": row.tokens.1,
            "tokens_per_s": free.median, "invariant_tokens_per_s": fixed.median, "ratio": fixed.median / free.median,
            "p20": free.p20, "p80": free.p80, "invariant_p20": fixed.p20, "invariant_p80": fixed.p80,
            "cpu_ms_per_token": free_cpu.median, "invariant_cpu_ms_per_token": fixed_cpu.median, "rounds": rounds,
            "device": cpu.description(),
        });
        println!("{line}");
    }
    let beside = |(name, upper, lower)| {
        let [free, fixed] = ratio(&rows, &rates, upper, lower).map(Spread::json);
        json!({"ratio_of": name, "any_kernel": free, "invariant": fixed, "rounds": rounds})
    };
    let ratios: Vec<Value> = RATIOS.into_iter().map(beside).collect();
    ratios.iter().for_each(|line| println!("{line}"));
    if let Some(path) = &arguments.record {
        let line = format!("{}\n", record(&rows, &rates, &ratios, load, &*cpu));
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).expect("the record opens");
        std::io::Write::write_all(&mut file, line.as_bytes()).expect("the record takes a line");
    }
}
