//! Commands: their flags and what they print. Results go to stdout, everything else to stderr.

mod ab;
mod adapter;
mod ask;
mod bench;
mod compare;
mod cycle;
mod data;
mod doctor;
mod embed;
mod eval;
mod finetune;
mod generate;
mod index;
mod promote;
mod quantize;
mod recipe;
mod register;
mod registry;
mod search;
mod serve;
mod sim;
mod sim_trace;
mod stages;
mod verify;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use handmill::device::{self, Device};
use handmill::model::adapter as lora;
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::{Embedder, LanguageModel};
use handmill::model::weights::LoadOptions;
use handmill::registry::Kind;
use handmill::train::metrics::peak_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use self::register::RegisterFlag;
use self::registry::resolve;

/// Quantized language models on hand-written kernels, with the measurements beside them.
///
/// Results go to stdout, progress and timings to stderr. Exit codes: 0 done, 1 an error or a failed check, 2 wrong use,
/// 130 interrupted.
/// RUST_LOG=debug shows what the library logs.
#[derive(Parser)]
#[command(name = "handmill", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    /// The registry in which names are looked up, given where paths are [default: $HANDMILL_REGISTRY]
    #[arg(long, global = true, value_name = "DIR")]
    registry: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Doctor(doctor::Doctor),
    Verify(verify::Verify),
    Bench(Box<bench::Bench>),
    Sim(sim::Sim),
    Generate(generate::Generate),
    Eval(eval::Eval),
    Embed(embed::Embed),
    Quantize(quantize::Quantize),
    Finetune(Box<finetune::Finetune>),
    Adapter(adapter::Adapter),
    Compare(Box<compare::Compare>),
    Index(index::Index),
    Search(Box<search::Search>),
    Ask(Box<ask::Ask>),
    Serve(Box<serve::Serve>),
    Ab(ab::Ab),
    Registry(registry::Registry),
    Promote(Box<promote::Promote>),
    Rollback(promote::Rollback),
    Data(data::Data),
    Cycle(Box<cycle::Cycle>),
}

/// Flags of every command.
#[derive(Args)]
struct Common {
    /// Where to compute: a device of `handmill doctor`, or auto for the best there is
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// A command was asked for what it cannot do: exit code 2, as for flags that do not parse.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// A check found faults, which are printed already: exit code 1 and no further word.
#[derive(Debug, thiserror::Error)]
#[error("checks failed")]
struct ChecksFailed;

/// Ctrl-C: what was done is saved, and said already. Exit code 130, as shells have it.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn,lopdf=off,html5ever=error"))
        .init();
    // Mesa's layer that chooses a first adapter would look for a display and complain of none; `device::wgpu` chooses.
    std::env::set_var("NODEVICE_SELECT", "1");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => {
            // Help and version go to stdout, faults to stderr; a reader that has gone away misses nothing.
            let _ = message.print();
            return ExitCode::from(message.exit_code() as u8);
        }
    };
    registry::set(cli.registry);
    let result = match cli.command {
        Command::Doctor(command) => command.run(),
        Command::Verify(command) => command.run(),
        Command::Bench(command) => command.run(),
        Command::Sim(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Embed(command) => command.run(),
        Command::Quantize(command) => command.run(),
        Command::Finetune(command) => command.run(),
        Command::Adapter(command) => command.run(),
        Command::Compare(command) => command.run(),
        Command::Index(command) => command.run(),
        Command::Search(command) => command.run(),
        Command::Ask(command) => command.run(),
        Command::Serve(command) => command.run(),
        Command::Ab(command) => command.run(),
        Command::Registry(command) => command.run(),
        Command::Promote(command) => command.run(),
        Command::Rollback(command) => command.run(),
        Command::Data(command) => command.run(),
        Command::Cycle(command) => command.run(),
    };
    let Err(error) = result.and_then(|()| Ok(io::stdout().flush()?)) else {
        return ExitCode::SUCCESS;
    };
    // Every file's error names the file; a bare one is stdout's.
    let bare = error.downcast_ref::<io::Error>().filter(|_| error.chain().len() == 1);
    if bare.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS; // `handmill .. | head` is no fault
    }
    let place = if bare.is_some() { "stdout: " } else { "" };
    if error.is::<ChecksFailed>() {
        return ExitCode::from(1);
    }
    if error.is::<Interrupted>() {
        return ExitCode::from(130);
    }
    let _ = writeln!(io::stderr(), "error: {place}{}", chain(&error));
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

/// An error and its causes in one line; a cause whose words the error before it says already is left out.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
        }
    }
    text
}

impl Common {
    fn open_device(&self) -> Result<Arc<dyn Device>> {
        Ok(device::open(&self.device)?)
    }
}

/// Opens a decoder, saying on stderr what it does meanwhile, and puts an adapter beside its weights.
fn open_model(
    model_path: &Path,
    flag: &AdapterFlag,
    precision: &Precision,
    device: &Arc<dyn Device>,
) -> Result<LanguageModel> {
    let model_path = &resolve(Kind::Model, model_path)?;
    let adapter = flag.path()?;
    let adapter = adapter.map(|path| Ok::<_, anyhow::Error>((lora::Adapter::open(&path)?, path)));
    let adapter = adapter.transpose().context("cannot open the adapter (a PEFT directory)")?;
    let spinner = spinner(format!("loading {}", model_path.display()));
    let mut model = LanguageModel::open(
        model_path,
        device.clone(),
        &LoadOptions { bf16: precision.bf16, ..LoadOptions::default() },
    )
    .context("cannot open the model (a .gguf file or a Hugging Face directory)")?;
    if let Some((adapter, path)) = adapter {
        flag.base.check(&adapter, model_path).with_context(|| path.display().to_string())?;
        model.llama.attach(&adapter).with_context(|| path.display().to_string())?;
    }
    spinner.finish_and_clear();
    Ok(model)
}

/// Opens an embedding model, saying on stderr what it does meanwhile.
fn open_embedder(path: &Path, device: &Arc<dyn Device>) -> Result<Embedder> {
    let path = &resolve(Kind::Model, path)?;
    let spinner = spinner(format!("loading {}", path.display()));
    let embedder = Embedder::open(path, device.clone(), &LoadOptions::default())
        .context("cannot open the embedding model (the Hugging Face directory of a BERT sentence embedder)")?;
    spinner.finish_and_clear();
    Ok(embedder)
}

/// A text file, byte for byte.
fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
        anyhow::anyhow!("{}: line {line}: byte {at} is not UTF-8: convert the file, such as with iconv", path.display())
    })
}

/// Refuses to write over what is read.
fn not_over(out: &Path, read: &Path) -> Result<()> {
    match handmill::aside::same_file(out, read) {
        true => Err(Usage(format!("{} is read, and would be written over: name another file", out.display())).into()),
        false => Ok(()),
    }
}

/// A flag that the first Ctrl-C sets, for work that then saves what is done; a second one ends the process where it
/// stands.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}

/// Prints one JSON object.
fn print_json(object: &Value) -> Result<()> {
    Ok(writeln!(io::stdout(), "{object}")?)
}

/// A line for people on stderr, whose reader may have gone away.
fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Work of unknown length, shown on a terminal only.
fn spinner(what: String) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// Work of `total` `unit`s, shown on a terminal only, with the time it will take.
fn progress(total: usize, unit: &str) -> ProgressBar {
    let template = format!("{{bar:30}} {{human_pos}} of {{human_len}} {unit}, {{per_sec}}, {{eta}} left");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total as u64).with_style(style)
}

/// Bytes in the unit a person reads.
fn human_bytes(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1e3 => format!("{b} B"),
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}

/// An adapter's path as a flag.
#[derive(Args)]
struct AdapterFlag {
    /// A LoRA adapter to run beside the model's weights: a PEFT directory
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    base: BaseFlag,
}

/// Whether an adapter's base must be the model it meets.
#[derive(Args)]
struct BaseFlag {
    /// Take an adapter that was trained over another file than this model's, such as the same weights in another form
    #[arg(long)]
    any_base: bool,
}

impl AdapterFlag {
    /// Where the adapter is.
    fn path(&self) -> Result<Option<PathBuf>> {
        self.adapter.as_ref().map(|path| resolve(Kind::Adapter, path)).transpose()
    }
}

impl BaseFlag {
    /// Refuses an adapter of another base.
    fn check(&self, adapter: &lora::Adapter, model: &Path) -> Result<()> {
        if !self.any_base && adapter.base_sha256.is_some() {
            adapter.check_base(&Checkpoint::open(model)?)?;
        }
        Ok(())
    }
}

/// How exactly a model computes.
#[derive(Args)]
struct Precision {
    /// Round what meets the weights to bf16 where that is faster: on cuda and ptx-sim, for 8 rows and more
    #[arg(long)]
    bf16: bool,
}

/// A model's path as a flag.
#[derive(Args)]
struct ModelFlag {
    /// A .gguf file or a Hugging Face directory
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
}

impl ModelFlag {
    /// Where the model is.
    fn path(&self) -> Result<PathBuf> {
        resolve(Kind::Model, &self.model)
    }
}
