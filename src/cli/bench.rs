//! `handmill bench`: times that can be checked; its pages; two runs beside each other.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::Result;
use clap::{Args, Subcommand};
use handmill::bench::compare::{compare, Comparison, Pair, Verdict};
use handmill::bench::report::{self, Contest};
use handmill::bench::row::{self, Kind, Log, Row};
use handmill::bench::shapes::{Select, MODELS};
use handmill::bench::{Bench as Measurements, Options};
use handmill::op::DeviceKind;
use handmill::ops::OPS;
use serde_json::json;

use super::{note, print_json, progress, stop_on_interrupt, ChecksFailed, Common, Interrupted, Usage};

/// Time kernels on real models' shapes, beside the device's measured limits and their errors
///
/// Operands lie in no cache: as many sets of buffers are taken in turn as outlast it (--hot: one set). Times are the
/// device's own where it has a clock: the median, with what a fifth of the samples lies below and above. The roofline
/// is measured in the same run. Every kernel's results are held against the f64 oracle. Exit code 1 when one is wrong.
/// Ctrl-C ends with what was measured so far. RAYON_NUM_THREADS sets the threads of the CPU.
///
/// With --json, one line a row: kind (kernel, roofline, launch), op, kernel, device, adapter, driver, case, shape, m,
/// cold, median_us, p20_us, p80_us, n, launches, gb_per_s, tflop_per_s, roofline_fraction, bound, datasheet_fraction,
/// error, tolerance, error_of, peer, free_kernel, free_us, invariant_cost, noisy, note, software, act, bytes, flops,
/// sets, cache_bytes, threads, load, version, commit, unix_time. What is not known is null.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Bench {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    common: Common,
    /// Only this op, such as rmsnorm or qmatmul_q4
    #[arg(long, value_name = "OP")]
    op: Option<String>,
    /// Only this kernel, such as qmatmul_q4_mma
    #[arg(long, value_name = "STEM")]
    kernel: Option<String>,
    /// A small set that takes about a minute: few shapes, and of each only the kernels that would be taken
    #[arg(long)]
    quick: bool,
    /// Only the kernels that would be taken
    #[arg(long)]
    best: bool,
    /// What batch invariance costs: the kernels that a batch-invariant device takes (serve's), each after the one that
    /// is taken without; invariant_cost is the ratio of their medians
    #[arg(long, conflicts_with_all = ["kernel", "best"])]
    batch_invariant: bool,
    /// One set of buffers, which stays in the caches if it fits
    #[arg(long)]
    hot: bool,
    /// Whose shapes, with commas: smollm2-135m, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b (default: what suits the
    /// device)
    #[arg(long, value_name = "MODELS", value_delimiter = ',')]
    shapes: Vec<String>,
    /// Rows of activations, with commas (default: 1 to 4096)
    #[arg(long, value_name = "M", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=65536))]
    m: Vec<u32>,
    /// Seconds of samples for each row (default 0.5, with --quick 0.25)
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Leave out launches that would take longer (default 5, with --quick 1)
    #[arg(long, value_name = "S")]
    longest: Option<f64>,
    /// Where bench.jsonl, bench.md and bench.html go
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Records of tools/peers to show on the page
    #[arg(long, value_name = "FILE", requires = "out")]
    peers: Vec<PathBuf>,
    /// Write each case's inputs for another program: inputs.jsonl and files of bytes
    #[arg(long, value_name = "DIR")]
    save_inputs: Option<PathBuf>,
    /// Do not measure the device's limits
    #[arg(long, hide = true)]
    no_limits: bool,
    /// Stop after so many rows
    #[arg(long, value_name = "N", hide = true)]
    rows: Option<usize>,
}

#[derive(Subcommand)]
enum Command {
    Report(Report),
    Compare(Compare),
}

/// Make the Markdown and the page again from rows
#[derive(Args)]
pub struct Report {
    /// Files of rows: bench.jsonl, or what --json printed
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Records of tools/peers
    #[arg(long, value_name = "FILE", num_args = 1..)]
    peers: Vec<PathBuf>,
    /// Where bench.md and bench.html go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Say what became slower between two runs; exit code 1 when something did, or nothing could be compared
///
/// Rows are matched by kernel, device, case and cold. Slower means that p20 to p80 of both are apart and the ratio of
/// the medians is beyond three standard errors and beyond what the machine's own copy changed by.
/// With --json: pairs (op, kernel, device, case, cold, before_us, after_us, ratio, limit, verdict), drift, only_before,
/// only_after, notes.
#[derive(Args)]
pub struct Compare {
    /// Rows of the first run
    #[arg(value_name = "A.jsonl")]
    before: PathBuf,
    /// Rows of the second
    #[arg(value_name = "B.jsonl")]
    after: PathBuf,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

impl Bench {
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Some(Command::Report(command)) => return command.run(),
            Some(Command::Compare(command)) => return command.run(),
            None => {}
        }
        let options = self.options()?;
        // A record that cannot be read is told before the measurements, not after.
        let (mut peers, mut contests) = (Vec::new(), Vec::new());
        for path in &self.peers {
            let (rows, found) = report::read_peers(path)?;
            peers.extend(rows);
            contests.extend(found);
        }
        let device = self.common.open_device()?;
        if device.caps().kind == DeviceKind::PtxSim {
            let why = "ptx-sim counts and checks, it has no times: `handmill sim KERNEL` shows what it counts";
            return Err(Usage(why.into()).into());
        }
        let mut bench = Measurements::new(&*device, &options)?;
        let mut log = self.out.as_deref().map(Log::create).transpose()?;
        let bar = progress(bench.len(), "rows");
        let mut out = io::stdout();
        let mut rows: Vec<Row> = Vec::new();
        let stop = stop_on_interrupt()?;
        let done = bench.run(&mut |row: &Row| -> Result<()> {
            if let Some(log) = &mut log {
                log.push(row)?;
            }
            if row.kind == Kind::Kernel {
                bar.inc(1);
            }
            match self.common.json {
                true => bar.suspend(|| writeln!(out, "{}", row.line()))?,
                false => bar.suspend(|| print(&mut out, row, rows.last()))?,
            }
            rows.push(row.clone());
            match stop.load(Ordering::SeqCst) {
                true => Err(Interrupted.into()),
                false => Ok(()),
            }
        });
        bar.finish_and_clear();
        // What was measured counts, however the run ended.
        if let Some(folder) = &self.out {
            let all = [rows.clone(), peers].concat();
            report::write(folder, &all, &contests)?;
            note(&format!("{}, bench.md and bench.html", folder.join(row::FILE).display()));
        }
        done?;
        let is_wrong = |row: &&Row| row.note.as_ref().is_some_and(|said| said.starts_with("WRONG"));
        let wrong: Vec<&Row> = rows.iter().filter(is_wrong).collect();
        for row in &wrong {
            note(&format!("{} ({}): {}", row.kernel, row.case, row.note.as_deref().unwrap_or_default()));
        }
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(ChecksFailed.into())
        }
    }

    fn options(&self) -> Result<Options> {
        let usage = |what: String| -> Result<Options> { Err(Usage(what).into()) };
        if let Some(name) = self.shapes.iter().find(|name| MODELS.iter().all(|model| model.name != **name)) {
            let known: Vec<_> = MODELS.iter().map(|model| model.name).collect();
            return usage(format!("there are no shapes of {name}; give some of {}", known.join(", ")));
        }
        if let Some(op) = self.op.as_ref().filter(|op| OPS.iter().all(|spec| spec.name != **op && spec.id() != **op)) {
            let mut names: Vec<_> = OPS.iter().map(|spec| spec.name).collect();
            names.dedup();
            return usage(format!("there is no op {op}; ops are {}", names.join(", ")));
        }
        let known = |stem: &String| OPS.iter().any(|spec| spec.kernels().any(|kernel| kernel.stem == *stem));
        if let Some(stem) = self.kernel.as_ref().filter(|stem| !known(stem)) {
            return usage(format!("there is no kernel {stem}; `handmill verify` lists them"));
        }
        let plain = Options::default();
        let seconds = self.seconds.unwrap_or(if self.quick { 0.25 } else { plain.seconds });
        let longest = self.longest.unwrap_or(if self.quick { 1.0 } else { plain.longest });
        if !(seconds > 0.0 && seconds <= 60.0 && longest > 0.0 && longest <= 3600.0) {
            return usage("--seconds is above 0 and at most 60, --longest at most 3600".into());
        }
        let tokens = self.m.iter().map(|&m| m as usize).collect();
        Ok(Options {
            select: Select { models: self.shapes.clone(), tokens, quick: self.quick },
            op: self.op.clone(),
            kernel: self.kernel.clone(),
            best_only: self.quick || self.best,
            batch_invariant: self.batch_invariant,
            hot: self.hot,
            seconds,
            longest,
            limits: !self.no_limits,
            most_rows: self.rows.unwrap_or(usize::MAX),
            save_inputs: self.save_inputs.clone(),
        })
    }
}

/// A row for a person, under a head where the device or the op is another than the last row's.
fn print(out: &mut impl Write, row: &Row, last: Option<&Row>) -> io::Result<()> {
    if last.is_none() {
        let driver = row.driver.as_ref().map_or(String::new(), |driver| format!(", driver {driver}"));
        writeln!(out, "{}: {}{driver}", row.device, row.adapter.as_deref().unwrap_or_default())?;
        if row.software {
            writeln!(out, "software: correctness only; its times rank nothing")?;
        }
        writeln!(out)?;
    }
    match row.kind {
        Kind::Roofline | Kind::Launch => {
            let facts = report::facts(row);
            return writeln!(out, "{facts}");
        }
        Kind::Kernel | Kind::Peer => {}
    }
    if last.is_none_or(|last| last.op != row.op) {
        writeln!(
            out,
            "\n{:<36} {:<32} {:>10} {:>17} {:>7} {:>8} {:>7} {:>7}",
            row.op, "case", "median us", "p20 to p80", "GB/s", "GFLOP/s", "of roof", "error"
        )?;
    }
    let known = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    let range = match row.p20_us.zip(row.p80_us) {
        Some((low, high)) => format!("{low:.1} to {high:.1}"),
        None => "-".into(),
    };
    let share = row.error.zip(row.tolerance).filter(|(_, most)| *most > 0.0).map(|(error, most)| error / most);
    let mut remark = match (&row.note, row.noisy) {
        (Some(note), _) if !row.software => format!("  {note}"),
        (_, true) => "  noisy".into(),
        _ => String::new(),
    };
    if let Some((cost, free)) = row.invariant_cost.zip(row.free_kernel.as_ref()).filter(|_| !row.software) {
        remark += &match *free == row.kernel {
            true => "  batch-invariant as it is".to_string(),
            false => format!("  batch-invariant: {cost:.2} times {free}"),
        };
    }
    writeln!(
        out,
        "{:<36} {:<32} {:>10} {range:>17} {:>7} {:>8} {:>7} {:>7}{remark}",
        row.kernel,
        row.case,
        known(row.median_us, 1),
        known(row.gb_per_s, 1),
        known(row.tflop_per_s.map(|speed| 1e3 * speed), 1),
        row.roofline_fraction.map_or("-".into(), |fraction| format!("{:.0} %", 100.0 * fraction)),
        known(share, 3),
    )
}

impl Report {
    fn run(&self) -> Result<()> {
        if self.files.is_empty() && self.peers.is_empty() {
            return Err(Usage("give files of rows, or --peers with records of tools/peers".into()).into());
        }
        let (mut rows, mut contests): (Vec<Row>, Vec<Contest>) = (Vec::new(), Vec::new());
        for path in &self.files {
            rows.extend(row::read(path)?);
        }
        for path in &self.peers {
            let (more, found) = report::read_peers(path)?;
            rows.extend(more);
            contests.extend(found);
        }
        if rows.is_empty() && contests.is_empty() {
            anyhow::bail!("the files hold no row: there is nothing to show");
        }
        report::write(&self.out, &rows, &contests)?;
        let (rows, contests) = (rows.len(), contests.len());
        note(&format!("{}: bench.md and bench.html of {rows} rows and {contests} contests", self.out.display()));
        Ok(())
    }
}

impl Compare {
    fn run(&self) -> Result<()> {
        let found = compare(&row::read(&self.before)?, &row::read(&self.after)?);
        match self.json {
            true => print_json(&json!(found))?,
            false => show(&found)?,
        }
        for said in &found.notes {
            note(said);
        }
        if found.pairs.iter().all(|pair| pair.verdict == Verdict::Unknown) {
            anyhow::bail!("the two runs have no row to compare");
        }
        if found.slower().next().is_some() {
            return Err(ChecksFailed.into());
        }
        Ok(())
    }
}

/// What changed, for a person.
fn show(found: &Comparison) -> io::Result<()> {
    let mut out = io::stdout();
    for (verdict, word) in [(Verdict::Slower, "slower"), (Verdict::Faster, "faster")] {
        let mut pairs: Vec<&Pair> = found.pairs.iter().filter(|pair| pair.verdict == verdict).collect();
        pairs.sort_by(|a, b| b.ratio.unwrap_or(1.0).total_cmp(&a.ratio.unwrap_or(1.0)));
        for pair in pairs {
            let time = |time: Option<f64>| time.map_or("-".into(), |us| format!("{us:.1}"));
            writeln!(
                out,
                "{word} {:<30} {:<30} {:>10} us, then {:>10} us: {:.3} times, beyond {:.3}",
                pair.kernel,
                pair.case,
                time(pair.before_us),
                time(pair.after_us),
                pair.ratio.unwrap_or(1.0),
                pair.limit
            )?;
        }
    }
    let count = |verdict: Verdict| found.pairs.iter().filter(|pair| pair.verdict == verdict).count();
    writeln!(
        out,
        "{} rows: {} slower, {} faster, {} the same, {} without times; {} only in the first run, {} only in the \
         second; the machine's copy changed by {:.1} %",
        found.pairs.len(),
        count(Verdict::Slower),
        count(Verdict::Faster),
        count(Verdict::Same),
        count(Verdict::Unknown),
        found.only_before,
        found.only_after,
        100.0 * found.drift
    )
}
