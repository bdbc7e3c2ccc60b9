//! `handmill sim`: one PTX kernel on the executor, counted and checked.

use std::io::{self, Write};

use anyhow::Result;
use clap::Args;
use handmill::device::ptx_sim::{PtxSim, Ran};
use handmill::device::{Buffer, Device};
use handmill::op::{Arg, Dims, Kernel, OpSpec, Role, Source};
use handmill::ops::OPS;
use handmill::verify;
use ptx_sim::{Finding, Kind, Options, TraceStep, TraceWarp};
use serde_json::{json, Value};

use super::sim_trace;
use super::{human_bytes, print_json, spinner, ChecksFailed, Usage};

/// Most that a dim may be, and most bytes of all arguments together: beyond it the executor takes hours.
const LARGEST_DIM: usize = 1 << 20;
const LARGEST_BYTES: usize = 1 << 30;
/// Mnemonics and source lines that are shown; --json has all.
const SHOWN: usize = 12;
/// Bytes of a sector of global memory, and of the line that a warp's 32 words fill.
const SECTOR: u64 = 32;

/// Run one PTX kernel on the CPU, every access checked: what it does, and what is wrong with it
///
/// Dims are those of the op's last case unless --dim says otherwise; a y that is as wide as N stays so. Counts are
/// exact; there is no timing, for no card is involved. With --json: kernel, case, thread_instructions, warp_instructions, mix,
/// global_requests, global_sectors, shared_requests, shared_waves, bank_conflicts, mma, flops, arguments, lines, races,
/// uninitialised_reads, out_of_bounds, findings, registers, shared_bytes, grid, block, least, trace. Exit code 1 when
/// something is found.
#[derive(Args)]
pub struct Sim {
    /// A PTX kernel, such as rmsnorm_f32_warp
    kernel: String,
    /// A dim or scalar of its op
    #[arg(long, value_name = "NAME=VALUE")]
    dim: Vec<String>,
    /// Count only: faster, and what is wrong goes unseen
    #[arg(long)]
    unchecked: bool,
    /// Show each instruction of one warp and what it wrote: the block's number, then the warp's
    #[arg(long, value_name = "BLOCK,WARP")]
    trace: Option<String>,
    /// How many instructions --trace shows
    #[arg(long, value_name = "N", default_value_t = 200, requires = "trace")]
    trace_steps: usize,
    /// The seed of the inputs
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

impl Sim {
    pub fn run(&self) -> Result<()> {
        let (spec, kernel, file) = self.select()?;
        let device = PtxSim::new();
        let dims = self.dims(spec, kernel, &device)?;
        let trace = self.trace(kernel, &dims)?;
        let spinner = spinner(format!("{} ({dims})", kernel.stem));
        let buffers = upload(&device, spec, kernel, &dims, self.seed)?;
        let args: Vec<&Buffer> = buffers.iter().collect();
        let options = Options { checked: !self.unchecked, count: true, trace, ..Options::default() };
        let ran = device.run(spec, kernel, &args, &dims, &options)?;
        spinner.finish_and_clear();
        let Some(ran) = ran else {
            return Err(Usage(format!("{} ({dims}): every output is empty, so nothing runs", kernel.stem)).into());
        };
        let source = file.read()?;
        let seen = Seen { spec, kernel, dims: &dims, ran: &ran, source: &source, checked: !self.unchecked };
        match self.json {
            true => print_json(&seen.json())?,
            false => {
                seen.print(&mut io::stdout())?;
                if self.trace.is_some() {
                    let names = spec.args.iter().map(|arg| arg.name);
                    let args: Vec<_> = names.zip(ran.report.addresses.iter().copied()).collect();
                    sim_trace::print(&ran.report.trace, self.trace_steps, &args, &mut io::stdout())?;
                }
            }
        }
        match ran.report.findings.is_empty() {
            true => Ok(()),
            false => Err(ChecksFailed.into()),
        }
    }

    fn select(&self) -> Result<(&'static OpSpec, &'static Kernel, handmill::op::File)> {
        let all = || OPS.iter().flat_map(|&spec| spec.kernels().map(move |kernel| (spec, kernel)));
        let ptx = |(spec, kernel): (&'static OpSpec, &'static Kernel)| match kernel.source {
            Source::Ptx(file) => Some((spec, kernel, file)),
            _ => None,
        };
        let found = all().filter_map(ptx).find(|(_, kernel, _)| kernel.stem == self.kernel);
        found.ok_or_else(|| {
            let other = all().any(|(_, kernel)| kernel.stem == self.kernel);
            let what = if other { "is not in PTX" } else { "does not exist" };
            let stems: Vec<_> = all().filter_map(ptx).map(|(_, kernel, _)| kernel.stem).collect();
            Usage(format!("the kernel {} {what}; those in PTX are {}", self.kernel, stems.join(", "))).into()
        })
    }

    /// The last case that the kernel supports, changed as `--dim` says.
    fn dims(&self, spec: &'static OpSpec, kernel: &Kernel, device: &PtxSim) -> Result<Dims> {
        let fits = |dims: &Dims| (kernel.supports)(dims, device.caps());
        let last = spec.cases.iter().map(|case| spec.case_dims(case)).rfind(&fits);
        let Some(last) = last else {
            return Err(Usage(format!("{}: no case of its op runs on ptx-sim", kernel.stem)).into());
        };
        let mut dims: Vec<usize> = spec.dims.iter().map(|name| last[name]).collect();
        let mut scalars: Vec<f32> = spec.scalars.iter().map(|name| last.scalar(name)).collect();
        let place = |name: &str| spec.dims.iter().position(|dim| *dim == name);
        let mut given = Vec::new();
        for option in &self.dim {
            let usage = |what: String| Usage(format!("--dim {option}: {what}"));
            let (name, value) = option.split_once('=').ok_or_else(|| usage("give NAME=VALUE".into()))?;
            if let Some(i) = place(name) {
                let least = usize::from(!spec.cases.iter().any(|case| case.dims[i] == 0));
                let number = value.parse().ok().filter(|n| (least..=LARGEST_DIM).contains(n));
                dims[i] = number.ok_or_else(|| usage(format!("{name} is from {least} to {LARGEST_DIM}")))?;
                given.push(name);
            } else if let Some(i) = spec.scalars.iter().position(|scalar| *scalar == name) {
                scalars[i] = value.parse().map_err(|_| usage(format!("{name} is a number")))?;
            } else {
                let names = [spec.dims, spec.scalars].concat().join(", ");
                return Err(usage(format!("{} has {names}", spec.id())).into());
            }
        }
        if let (Some(n), Some(width)) = (place("N"), place("LDY")) {
            let was_n = last["LDY"] == last["N"];
            if was_n && !given.contains(&"LDY") {
                dims[width] = dims[n];
            }
        }
        let dims = spec.dims(&dims, &scalars);
        if !fits(&dims) {
            return Err(Usage(format!("{} does not take {dims}", kernel.stem)).into());
        }
        let bytes: usize = spec.args.iter().map(|arg| arg.bytes(&dims, kernel.act)).sum();
        if bytes > LARGEST_BYTES {
            let (needs, most) = (human_bytes(bytes as u64), human_bytes(LARGEST_BYTES as u64));
            return Err(Usage(format!("{dims} needs {needs} of operands; at most {most} here")).into());
        }
        Ok(dims)
    }

    fn trace(&self, kernel: &Kernel, dims: &Dims) -> Result<Option<TraceWarp>> {
        let Some(text) = &self.trace else { return Ok(None) };
        let launch = (kernel.launch)(dims);
        let [gx, gy, gz] = launch.grid.map(u64::from);
        let warps = launch.block.iter().product::<u32>().div_ceil(32);
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let parsed = text.split_once(',').and_then(|(block, warp)| Some((number(block)?, number(warp)?)));
        let (block, warp) = match parsed {
            Some((block, warp)) if block < gx * gy * gz && warp < u64::from(warps) => (block, warp as u32),
            _ => {
                let blocks = gx * gy * gz;
                let what = format!("--trace {text}: give BLOCK,WARP; {dims} has {blocks} blocks of {warps} warps");
                return Err(Usage(what).into());
            }
        };
        let block = [block % gx, block / gx % gy, block / gx / gy].map(|n| n as u32);
        Ok(Some(TraceWarp { block, warp, steps: self.trace_steps }))
    }
}

/// The operands of a seed on the device.
fn upload(device: &PtxSim, spec: &OpSpec, kernel: &Kernel, dims: &Dims, seed: u64) -> Result<Vec<Buffer>> {
    let place = |tensor: &handmill::tensor::HostTensor| {
        let buffer = device.alloc(tensor.bytes.len())?;
        device.write(&buffer, 0, tensor.bytes.as_slice())?;
        Ok(buffer)
    };
    verify::fill(spec, dims, kernel.act, seed).iter().map(place).collect()
}

/// A launch, to be shown.
struct Seen<'a> {
    spec: &'a OpSpec,
    kernel: &'a Kernel,
    dims: &'a Dims,
    ran: &'a Ran,
    source: &'a str,
    checked: bool,
}

/// An argument's traffic in bytes: what it must be, what threads asked for, and what that is in sectors: all of them,
/// those that go on to the second-level cache, and the different ones, which memory must move at least.
struct Traffic {
    least: u64,
    read: u64,
    written: u64,
    sectors: u64,
    l2: u64,
    distinct: u64,
}

impl Seen<'_> {
    fn traffic(&self) -> Vec<(&Arg, Traffic)> {
        let of = |(arg, seen): (&'static Arg, &ptx_sim::BufferCount)| {
            let times = if arg.role == Role::InOut { 2 } else { 1 };
            let least = times * arg.bytes(self.dims, self.kernel.act) as u64;
            let sectors = seen.sector_read + seen.sector_written;
            let (l2, distinct) = (seen.missed + seen.sector_written, seen.distinct_read + seen.distinct_written);
            (arg, Traffic { least, read: seen.read, written: seen.written, sectors, l2, distinct })
        };
        self.spec.args.iter().zip(&self.ran.report.params).map(of).collect()
    }

    /// Floating-point operations done: of threads, and in `mma`.
    fn flops(&self) -> (u64, u64) {
        let of = |(name, _, threads): &(String, u64, u64)| {
            let float = [".f32", ".f16", ".bf16", ".f64"].iter().any(|ty| name.contains(ty));
            let wide = if name.ends_with("x2") { 2 } else { 1 };
            match name.split('.').next() {
                Some("fma") => 2 * wide * threads,
                Some("add" | "sub" | "mul" | "div" | "sqrt" | "rcp" | "rsqrt" | "ex2" | "lg2" | "tanh") if float => {
                    wide * threads
                }
                _ => 0,
            }
        };
        let counts = &self.ran.report.counts;
        (counts.mix().iter().map(of).sum(), 2 * counts.mma_macs)
    }

    fn found(&self, kinds: &[Kind]) -> u64 {
        let of_kind = |finding: &&Finding| kinds.contains(&finding.kind);
        self.ran.report.findings.iter().filter(of_kind).map(|finding| finding.count).sum()
    }

    fn json(&self) -> Value {
        let (counts, ran) = (&self.ran.report.counts, self.ran);
        let cost = (self.spec.cost)(self.dims);
        let argument = |(arg, t): (&Arg, Traffic)| {
            json!({ "name": arg.name, "least_bytes": t.least, "read": t.read, "written": t.written,
                    "sector_bytes": t.sectors, "l2_bytes": t.l2, "distinct_bytes": t.distinct })
        };
        let line = |l: &ptx_sim::LineCount| {
            json!({ "line": l.line, "name": l.name, "warps": l.warps, "threads": l.threads, "sectors": l.sectors,
                    "waves": l.waves, "conflicts": l.conflicts })
        };
        let finding = |f: &Finding| {
            json!({ "kind": f.kind.to_string(), "line": f.place.line, "block": f.place.block, "warp": f.place.warp,
                    "lane": f.place.lane, "message": f.message, "count": f.count })
        };
        let mix =
            |(name, warps, threads): (String, u64, u64)| json!({ "name": name, "warps": warps, "threads": threads });
        let (flops, mma_flops) = self.flops();
        json!({
            "kernel": self.kernel.stem,
            "case": self.dims.to_string(),
            "checked": self.checked,
            "thread_instructions": counts.thread_instructions,
            "warp_instructions": counts.warp_instructions,
            "mix": counts.mix().into_iter().map(mix).collect::<Vec<_>>(),
            "global_requests": counts.global.requests,
            "global_sectors": counts.global.sectors,
            "global_bytes": counts.global.bytes,
            "shared_requests": counts.shared.requests,
            "shared_waves": counts.shared.waves,
            "bank_conflicts": counts.shared.conflicts,
            "mma": counts.mma,
            "flops": flops + mma_flops,
            "arguments": self.traffic().into_iter().map(argument).collect::<Vec<_>>(),
            "lines": counts.lines.iter().map(line).collect::<Vec<_>>(),
            "races": self.found(&[Kind::SharedRace, Kind::GlobalRace, Kind::CopyInFlight]),
            "uninitialised_reads":
                self.found(&[Kind::UninitialisedRegister, Kind::UninitialisedShared, Kind::UninitialisedGlobal]),
            "out_of_bounds": self.found(&[Kind::OutOfBounds]),
            "findings": ran.report.findings.iter().map(finding).collect::<Vec<_>>(),
            "registers": ran.entry.live_registers,
            "shared_bytes": ran.shared_bytes,
            "grid": ran.grid,
            "block": ran.block,
            "least": { "flops": cost.flops, "bytes": cost.bytes },
            "trace": ran.report.trace.iter().map(TraceStep::json).collect::<Vec<_>>(),
        })
    }

    fn print(&self, out: &mut impl Write) -> Result<()> {
        let ran = self.ran;
        let ([gx, gy, gz], [bx, by, bz]) = (ran.grid, ran.block);
        let warps = (bx * by * bz).div_ceil(32);
        writeln!(out, "{}: {}", self.kernel.stem, self.spec.formula)?;
        writeln!(out, "{}", self.dims)?;
        writeln!(
            out,
            "grid {gx} x {gy} x {gz}, block {bx} x {by} x {bz} ({warps} warps), shared memory {} B, about {} \
                       registers live",
            ran.shared_bytes, ran.entry.live_registers
        )?;
        self.print_roofline(out)?;
        self.print_mix(out)?;
        self.print_memory(out)?;
        match (self.checked, &ran.report.findings[..]) {
            (false, _) => writeln!(out, "\nfindings: not looked for (--unchecked)")?,
            (true, []) => writeln!(out, "\nfindings: none")?,
            (true, findings) => {
                writeln!(out, "\nfindings: {}", findings.len())?;
                for f in findings {
                    writeln!(out, "  {}: {}, {} times from {}", f.kind, f.message, f.count, f.place)?;
                    writeln!(out, "      {}", self.line(f.place.line))?;
                }
            }
        }
        Ok(())
    }

    /// The contract's least work beside what was done.
    fn print_roofline(&self, out: &mut impl Write) -> Result<()> {
        let cost = (self.spec.cost)(self.dims);
        let (flops, mma_flops) = self.flops();
        let traffic = self.traffic();
        let sum = |of: fn(&Traffic) -> u64| traffic.iter().map(|(_, t)| of(t)).sum::<u64>();
        let by_mma = if mma_flops > 0 { format!(", {} of them by mma", grouped(mma_flops)) } else { String::new() };
        let intensity = cost.flops as f64 / cost.bytes.max(1) as f64;
        writeln!(
            out,
            "\nroofline   the contract's least: {} flops, {} bytes, {intensity:.2} flops a byte",
            grouped(cost.flops),
            grouped(cost.bytes)
        )?;
        writeln!(
            out,
            "           done: {} flops{by_mma}\n           in sectors: {} bytes asked for, {} of L2 where each block has an \
             L1 of {} KiB, {} of DRAM at least",
            grouped(flops + mma_flops),
            grouped(sum(|t| t.sectors)),
            grouped(sum(|t| t.l2)),
            Options::default().l1_bytes >> 10,
            grouped(sum(|t| t.distinct))
        )?;
        writeln!(
            out,
            "\n{:<10} {:>14} {:>14} {:>14} {:>14} {:>8} {:>14} {:>14}",
            "argument", "least bytes", "read", "written", "in sectors", "x least", "of L2", "of DRAM, least"
        )?;
        for (arg, t) in &traffic {
            let ratio =
                if t.least == 0 { "-".to_string() } else { format!("{:.2}", t.sectors as f64 / t.least as f64) };
            writeln!(
                out,
                "{:<10} {:>14} {:>14} {:>14} {:>14} {ratio:>8} {:>14} {:>14}",
                arg.name,
                grouped(t.least),
                grouped(t.read),
                grouped(t.written),
                grouped(t.sectors),
                grouped(t.l2),
                grouped(t.distinct)
            )?;
        }
        Ok(())
    }

    fn print_mix(&self, out: &mut impl Write) -> Result<()> {
        let counts = &self.ran.report.counts;
        let mix = counts.mix();
        let wide = mix.iter().take(SHOWN).map(|m| m.0.len()).max().unwrap_or(0).max(28);
        let (threads, warps) = (counts.thread_instructions, counts.warp_instructions);
        let lanes = threads as f64 / warps.max(1) as f64;
        writeln!(out, "\n{:<wide$} {:>14} {:>14} {:>6} {:>6}", "instructions", "warps", "threads", "lanes", "share")?;
        let row = |name: &str, w: u64, t: u64| {
            let (lanes, share) = (t as f64 / w.max(1) as f64, 100.0 * t as f64 / threads.max(1) as f64);
            format!("{name:<wide$} {:>14} {:>14} {lanes:>6.1} {share:>5.1}%", grouped(w), grouped(t))
        };
        for (name, w, t) in mix.iter().take(SHOWN) {
            writeln!(out, "{}", row(name, *w, *t))?;
        }
        if mix.len() > SHOWN {
            let rest = mix[SHOWN..].iter().fold((0, 0), |sum, m| (sum.0 + m.1, sum.1 + m.2));
            writeln!(out, "{}", row(&format!("{} others", mix.len() - SHOWN), rest.0, rest.1))?;
        }
        Ok(writeln!(out, "{:<wide$} {:>14} {:>14} {lanes:>6.1}", "all", grouped(warps), grouped(threads))?)
    }

    /// Requests, sectors and waves; then the lines they come from, the costliest first.
    fn print_memory(&self, out: &mut impl Write) -> Result<()> {
        let counts = &self.ran.report.counts;
        let (global, shared) = (counts.global, counts.shared);
        let per = |a: u64, b: u64| a as f64 / b.max(1) as f64;
        writeln!(
            out,
            "\nglobal     {} requests, {} sectors: {:.2} a request; {:.0} % of the bytes moved were asked for",
            grouped(global.requests),
            grouped(global.sectors),
            per(global.sectors, global.requests),
            100.0 * per(global.bytes, SECTOR * global.sectors)
        )?;
        if shared.requests > 0 {
            let (requests, waves, conflicts) = (shared.requests, shared.waves, shared.conflicts);
            let each = per(waves, requests);
            let (requests, waves, conflicts) = (grouped(requests), grouped(waves), grouped(conflicts));
            writeln!(
                out,
                "shared     {requests} requests, {waves} waves: {each:.2} a request; {conflicts} are conflicts"
            )?;
        }
        if counts.mma > 0 {
            let (mma, macs) = (grouped(counts.mma), grouped(counts.mma_macs));
            writeln!(out, "mma        {mma} warp instructions, {macs} multiply-adds")?;
        }
        let mut lines: Vec<_> = counts.lines.iter().filter(|l| l.sectors + l.waves > 0).collect();
        lines.sort_by_key(|l| (std::cmp::Reverse(l.sectors + l.waves), l.line));
        if !lines.is_empty() {
            writeln!(
                out,
                "\n{:>5} {:>12} {:>9} {:>9} {:>10}  source",
                "line", "requests", "sectors/", "waves/", "conflicts"
            )?;
        }
        for l in lines.iter().take(SHOWN) {
            let each = |n: u64| if n == 0 { "-".to_string() } else { format!("{:.2}", per(n, l.warps)) };
            writeln!(
                out,
                "{:>5} {:>12} {:>9} {:>9} {:>10}  {}",
                l.line,
                grouped(l.warps),
                each(l.sectors),
                each(l.waves),
                grouped(l.conflicts),
                self.line(l.line)
            )?;
        }
        Ok(())
    }

    /// A line of the source, without its comment.
    fn line(&self, number: u32) -> &str {
        let line = self.source.lines().nth(number as usize - 1).unwrap_or_default();
        line.split("//").next().unwrap_or_default().trim()
    }
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

trait Json {
    fn json(&self) -> Value;
}

impl Json for TraceStep {
    fn json(&self) -> Value {
        let results: Vec<_> =
            self.results.iter().map(|r| json!({ "name": r.name, "type": r.ty, "bits": r.bits.to_vec() })).collect();
        json!({ "line": self.line, "text": self.text, "lanes": self.lanes, "results": results })
    }
}
