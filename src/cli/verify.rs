//! `handmill verify`: every kernel against its f64 oracle.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use handmill::device::{self, Device};
use handmill::op::{Case, Kernel, OpSpec};
use handmill::ops::OPS;
use handmill::verify::{self, Outcome};
use serde_json::{json, Value};

use super::doctor::device_ids;
use super::{note, progress, ChecksFailed, Common, Usage};

/// Check every kernel on every case against its f64 oracle
///
/// Outputs are poisoned before a launch, sentinel bytes lie round every buffer, and inputs are compared afterwards. An
/// element's tolerance is derived in the op's contract; the share printed is |got - expected| over it, so that 1 is
/// the limit. With --json, one line a check: op, kernel, device, case, seed, status (ok, failed, unsupported),
/// error and tolerance of the worst element, worst_index, share, nmse, failure. Exit code 1 when a check fails.
#[derive(Args)]
pub struct Verify {
    #[command(flatten)]
    common: Common,
    /// Check only this op, such as rmsnorm or qmatmul_q4
    #[arg(long, value_name = "OP")]
    op: Option<String>,
    /// Check only this kernel, such as rmsnorm_f32_naive
    #[arg(long, value_name = "STEM")]
    kernel: Option<String>,
    /// How many seeds to draw inputs from
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seeds: u64,
    /// The first seed
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
}

/// A kernel's checks on a device, summed up.
#[derive(Default)]
struct Row {
    ok: usize,
    failed: usize,
    unsupported: usize,
    share: f64,
    /// Where the share is worst.
    at: String,
}

impl Verify {
    pub fn run(&self) -> Result<()> {
        let selected = self.select()?;
        let ids = match self.common.device.as_str() {
            "all" => device_ids(),
            id => vec![id.to_string()],
        };
        let cases: usize = selected.iter().map(|(spec, _)| spec.cases.len()).sum();
        let bar = progress(cases * self.seeds as usize * ids.len(), "checks");
        let (start, mut totals, mut failures) = (Instant::now(), Row::default(), Vec::new());
        let mut out = io::stdout();
        for id in &ids {
            let device = device::open(id)?;
            if !self.common.json {
                writeln!(out, "{}: {}\n", device.id(), device.description())?;
                writeln!(out, "{:<30} {:>6} {:>12}  at", "kernel", "cases", "worst share")?;
            }
            for &(spec, kernel) in &selected {
                if !device.caps().kind.runs(&kernel.source) {
                    continue;
                }
                let mut row = Row::default();
                for case in spec.cases {
                    for seed in self.seed..self.seed.saturating_add(self.seeds) {
                        let line = check(&*device, spec, kernel, case, seed, &mut row);
                        if self.common.json {
                            writeln!(out, "{line}")?;
                        } else if line["status"] == "failed" {
                            failures.push(describe(&line));
                        }
                        bar.inc(1);
                        if line["status"] == "unsupported" {
                            break; // whatever the seed
                        }
                    }
                }
                if !self.common.json {
                    bar.suspend(|| row.print(&mut out, kernel))?;
                }
                totals.ok += row.ok;
                totals.failed += row.failed;
                totals.unsupported += row.unsupported;
            }
        }
        bar.finish_and_clear();
        let Row { ok, failed, unsupported, .. } = totals;
        let seconds = start.elapsed().as_secs_f64();
        let summary = format!("{ok} ok, {failed} failed, {unsupported} unsupported in {seconds:.1} s");
        match self.common.json {
            true => note(&summary),
            false => {
                for failure in &failures {
                    writeln!(out, "\n{failure}")?;
                }
                writeln!(out, "\n{summary}")?;
            }
        }
        if failed > 0 {
            return Err(ChecksFailed.into());
        }
        Ok(())
    }

    /// The kernels asked for; wrong use where there is none of that name.
    fn select(&self) -> Result<Vec<(&'static OpSpec, &'static Kernel)>> {
        let kernels = OPS.iter().flat_map(|&spec| spec.kernels().map(move |kernel| (spec, kernel)));
        let of_op = |spec: &OpSpec| self.op.as_ref().is_none_or(|op| op == spec.name || *op == spec.id());
        let by_op: Vec<_> = kernels.filter(|(spec, _)| of_op(spec)).collect();
        if by_op.is_empty() {
            let mut names: Vec<_> = OPS.iter().map(|spec| spec.name).collect();
            names.dedup();
            let op = self.op.as_deref().unwrap_or_default();
            return Err(Usage(format!("there is no op {op}; ops are {}", names.join(", "))).into());
        }
        let wanted = |kernel: &Kernel| self.kernel.as_ref().is_none_or(|stem| stem == kernel.stem);
        let found: Vec<_> = by_op.iter().copied().filter(|(_, kernel)| wanted(kernel)).collect();
        if found.is_empty() {
            let stems: Vec<_> = by_op.iter().map(|(_, kernel)| kernel.stem).collect();
            let stem = self.kernel.as_deref().unwrap_or_default();
            return Err(Usage(format!("there is no kernel {stem}; kernels are {}", stems.join(", "))).into());
        }
        Ok(found)
    }
}

/// One check as its JSON line, added to the kernel's row.
fn check(device: &dyn Device, spec: &OpSpec, kernel: &'static Kernel, case: &Case, seed: u64, row: &mut Row) -> Value {
    let dims = spec.case_dims(case);
    let mut line = json!({
        "op": spec.id(),
        "kernel": kernel.stem,
        "device": device.id(),
        "case": dims.to_string(),
        "why": case.why,
        "seed": seed,
        "status": "unsupported",
        "error": null,
        "tolerance": null,
        "worst_index": null,
    });
    if !(kernel.supports)(&dims, device.caps()) {
        row.unsupported += 1;
        return line;
    }
    let outcome = verify::check(device, spec, kernel, &dims, seed).unwrap_or_else(|error| Outcome {
        share: f64::INFINITY,
        nmse: f64::INFINITY,
        worst: None,
        failure: Some(error.to_string()),
    });
    line["status"] = if outcome.failure.is_none() { "ok" } else { "failed" }.into();
    line["share"] = outcome.share.into();
    line["nmse"] = outcome.nmse.into();
    line["failure"] = outcome.failure.clone().into();
    if let Some(worst) = &outcome.worst {
        line["arg"] = worst.arg.into();
        line["worst_index"] = worst.index.clone().into();
        line["got"] = worst.got.into();
        line["expected"] = worst.expected.into();
        line["error"] = (worst.got - worst.expected).abs().into();
        line["tolerance"] = worst.bound.into();
    }
    match outcome.failure {
        None => row.ok += 1,
        Some(_) => row.failed += 1,
    }
    if outcome.share > row.share || row.at.is_empty() {
        row.share = row.share.max(outcome.share);
        row.at = dims.to_string();
    }
    line
}

/// What went wrong, for a person.
fn describe(line: &Value) -> String {
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    format!("FAILED {} ({}; seed {}): {}", text("kernel"), text("case"), line["seed"], text("failure"))
}

impl Row {
    fn print(&self, out: &mut impl Write, kernel: &Kernel) -> io::Result<()> {
        let checked = self.ok + self.failed;
        let status = match (checked, self.failed) {
            (0, _) => "unsupported on this device".to_string(),
            (_, 0) => self.at.clone(),
            (_, failed) => format!("{}  {failed} FAILED", self.at),
        };
        writeln!(out, "{:<30} {:>6} {:>12.4}  {status}", kernel.stem, checked, self.share)
    }
}
