//! SmolLM2-135M from prompt to text: tokens per second of prefill and decode, and the most memory resident.
//!
//! `cargo bench --bench model [-- --json]`. Prefill reads the first 512 tokens of tests/fixtures/ppl_text.txt in one
//! window; decode begins with its first token alone and chooses 128 more, the most probable one each time. Both are run
//! once to warm up, then ROUNDS times in turn. `RAYON_NUM_THREADS` sets the threads.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use clap::Parser;
use handmill::device;
use handmill::model::generate::{GenerateOptions, Generated, LanguageModel};
use handmill::model::sampler::{self, SamplerSettings};
use handmill::model::weights::LoadOptions;
use serde_json::{json, Value};

/// Logits of the first new position that --json reports, so that another program's can be compared.
const TOP: usize = 10;

/// Tokens per second of a model's prefill and decode
#[derive(Parser)]
#[command(name = "model", max_term_width = 100)]
struct Options {
    /// A .gguf file or a Hugging Face directory; SmolLM2-135M-Instruct of tools/fetch_models, if not given
    #[arg(long)]
    model: Option<PathBuf>,
    /// Where to compute: a device of `handmill doctor`, or auto for the best there is
    #[arg(long, default_value = "auto")]
    device: String,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Tokens chosen after one token
    #[arg(long, default_value_t = 128)]
    decode: usize,
    /// How often each is timed
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Print one JSON object: model, device, threads, prefill and decode with samples in tokens/s, ids, top, peak_bytes
    #[arg(long)]
    json: bool,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    handmill::device::cpu::work_on_this_thread();
    let options = Options::parse();
    ensure!(options.rounds > 0 && options.prefill > 0 && options.decode > 0, "rounds and tokens begin at 1");
    let path = options.model.clone().map_or_else(smollm2, Ok)?;
    let device = device::open(&options.device)?;
    let model = LanguageModel::open(&path, device.clone(), &LoadOptions::default())
        .context("cannot open the model (run tools/fetch_models, or give --model)")?;
    let text_path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ppl_text.txt");
    let text = std::fs::read_to_string(&text_path).with_context(|| text_path.display().to_string())?;
    let mut ids = model.tokenizer.encode(&text)?;
    ensure!(ids.len() >= options.prefill, "the text has {} tokens: give a shorter --prefill", ids.len());
    ids.truncate(options.prefill);

    let mut top = Vec::new();
    let mut prefill = || generate(&model, &ids, 1, &mut |logits| top = sampler::top(logits, TOP));
    // One more than is timed: the first new token comes of the prompt.
    let decode = || generate(&model, &ids[..1], options.decode + 1, &mut |_| ());
    prefill()?;
    let chosen = decode()?.ids;
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        prefills.push(prefill()?.prompt_tokens_per_s());
        decodes.push(decode()?.tokens_per_s());
    }

    let threads = rayon::current_num_threads();
    let mut out = io::stdout();
    if options.json {
        let object = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": path.file_name().unwrap_or_default().to_string_lossy(),
            "device": device.description(),
            "threads": threads,
            "prefill": row(options.prefill, &prefills),
            "decode": row(options.decode, &decodes),
            "ids": ids,
            "top": top,
            "chosen": chosen,
            "peak_bytes": peak_bytes(),
        });
        return Ok(writeln!(out, "{object}")?);
    }
    writeln!(out, "{} on {}\n", path.display(), device.description())?;
    writeln!(out, "{:<12} {:>10} {:>10} {:>10}   tokens/s, {} rounds", "", "median", "min", "max", options.rounds)?;
    for (name, count, samples) in [("prefill", options.prefill, &prefills), ("decode", options.decode, &decodes)] {
        let (median, min, max) = spread(samples);
        writeln!(out, "{:<12} {median:>10.1} {min:>10.1} {max:>10.1}", format!("{name} {count}"))?;
    }
    let peak = peak_bytes().map_or("unknown".to_string(), |bytes| format!("{:.1} MB", bytes as f64 / 1e6));
    Ok(writeln!(out, "\npeak memory {peak}, the model's mapped pages included")?)
}

/// Continues `prompt` greedily in a session of its own, past any token that would end the text. `first` gets the logits
/// of the first new position.
fn generate(model: &LanguageModel, prompt: &[u32], tokens: usize, first: &mut dyn FnMut(&[f32])) -> Result<Generated> {
    let settings = SamplerSettings::default();
    let options = GenerateOptions { sampler: settings, max_tokens: tokens, stop: Vec::new() };
    let mut session = model.session(prompt.len(), tokens)?;
    let mut count = 0;
    let mut on_token = |_: u32, logits: &[f32]| {
        if count == 0 {
            first(logits);
        }
        count += 1;
        ControlFlow::Continue(())
    };
    Ok(model.generate(&mut session, prompt, &options, &mut on_token)?)
}

fn row(tokens: usize, samples: &[f64]) -> Value {
    let (median, min, max) = spread(samples);
    json!({ "tokens": tokens, "median": median, "min": min, "max": max, "samples": samples })
}

/// Median, least and largest.
fn spread(samples: &[f64]) -> (f64, f64, f64) {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    ((sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0, sorted[0], sorted[n - 1])
}

/// Where tools/fetch_models puts it.
fn smollm2() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let root = variable("HANDMILL_MODELS").or_else(|| Some(cache()?.join("handmill/models")));
    let root = root.context("neither HANDMILL_MODELS nor HOME is set: give --model")?;
    Ok(root.join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// The most memory this process has had resident, in bytes; none where the system does not tell.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
