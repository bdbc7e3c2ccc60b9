//! What `handmill finetune` shows: the plan, progress, and what came of it.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use handmill::device::profile::Profiled;
use handmill::train::data::MASKED;
use handmill::train::prepared::TokenSet;
use handmill::train::run::{Event, Outcome};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::super::{human_bytes, note, peak_bytes, print_json};
use super::{Finetune, Job};

impl Finetune {
    /// What was found in a data file that is no fault.
    pub(super) fn tell_notes(&self, path: &Path, set: &TokenSet) {
        let (notes, path) = (&set.notes, path.display());
        let first = |lines: &[u32]| {
            let shown: Vec<String> = lines.iter().take(5).map(|line| format!("#{line}")).collect();
            format!("{}{}", shown.join(", "), if lines.len() > 5 { ", .." } else { "" })
        };
        if notes.truncated_count > 0 {
            let (count, max) = (notes.truncated_count, self.max_len);
            note(&format!("{path}: rows cut to {max} tokens: {count}, {}", first(&notes.truncated)));
        }
        if let Some((later, earlier)) = notes.duplicates.first() {
            let count = notes.duplicate_count;
            note(&format!("{path}: rows that equal an earlier one: {count}, such as #{later} and #{earlier}"));
        }
    }

    pub(super) fn show_plan(&self, job: &Job) -> Result<()> {
        let Job { model, train, plan, adapter, options, .. } = job;
        let s = train.statistics();
        let (ids, labels) = train.row(0);
        if self.common.json {
            let statistics = |set: &TokenSet| {
                let s = set.statistics();
                json!({ "rows": s.rows, "tokens": s.tokens, "predicted": s.predicted, "shortest": s.shortest,
                    "median": s.median, "p95": s.p95, "longest": s.longest, "truncated": set.notes.truncated_count,
                    "duplicates": set.notes.duplicate_count })
            };
            return print_json(&json!({
                "trainable": adapter.parameters(),
                "modules": adapter.modules.len(),
                "steps": options.steps,
                "rows_per_step": options.rows,
                "memory": {
                    "total": plan.bytes(), "weights": plan.weight_bytes, "parameters": plan.parameter_bytes,
                    "activations": plan.kept_layers * plan.layer_bytes, "pass": plan.pass_bytes,
                    "kept_layers": plan.kept_layers, "pass_tokens": plan.pass_tokens,
                },
                "data": statistics(train),
                "eval_data": job.held_out.as_ref().map(statistics),
                "first": { "line": train.lines()[0], "input_ids": ids, "labels": labels },
                "base_sha256": job.base_sha256,
            }));
        }
        let mut out = io::stdout();
        let all = (model.llama.layers.iter().flat_map(|layer| layer.projections()))
            .map(|(_, linear)| linear.matrix.n * linear.matrix.k)
            .sum::<usize>()
            + model.llama.embedding.matrix.n * model.llama.embedding.matrix.k;
        let share = 100.0 * adapter.parameters() as f64 / all as f64;
        writeln!(
            out,
            "trainable   {} in {} modules ({share:.2}% of the model)",
            adapter.parameters(),
            adapter.modules.len()
        )?;
        writeln!(out, "data        {} rows, {} tokens, {} predicted", s.rows, s.tokens, s.predicted)?;
        writeln!(out, "row tokens  {} to {}, median {}, 95% up to {}", s.shortest, s.longest, s.median, s.p95)?;
        if let Some(held) = job.held_out.as_ref().map(TokenSet::statistics) {
            writeln!(out, "held out    {} rows, {} tokens, {} predicted", held.rows, held.tokens, held.predicted)?;
        }
        writeln!(
            out,
            "steps       {} of {} rows, {} tokens at most in a pass",
            options.steps, options.rows, plan.pass_tokens
        )?;
        writeln!(out, "\nmemory      {}", human_bytes(plan.bytes() as u64))?;
        let kept = format!("activations of {} of {} layers", plan.kept_layers, model.llama.layers.len());
        for (what, bytes) in [
            ("weights", plan.weight_bytes),
            ("parameters, gradients, optimizer", plan.parameter_bytes),
            (&kept, plan.kept_layers * plan.layer_bytes),
            ("one pass", plan.pass_bytes),
        ] {
            writeln!(out, "  {what:<34} {:>10}", human_bytes(bytes as u64))?;
        }
        writeln!(out, "\nrow #{}, what is predicted in [[ ]]:\n", train.lines()[0])?;
        let (mut text, mut at) = (String::new(), 0);
        while at < ids.len() {
            let predicted = at > 0 && labels[at] != MASKED;
            let end = (at + 1..ids.len()).find(|&i| (labels[i] != MASKED) != predicted).unwrap_or(ids.len());
            let piece = model.tokenizer.decode(&ids[at..end], false)?;
            text += &if predicted { format!("[[{piece}]]") } else { piece };
            at = end;
        }
        Ok(writeln!(out, "{text}")?)
    }

    pub(super) fn report(&self, outcome: &Outcome) -> Result<()> {
        let out = self.out.display();
        if let (Some(before), Some((_, best))) = (outcome.eval_before, outcome.best) {
            if best >= before {
                note(&format!(
                    "{out}: the held-out loss was {before:.4} without the adapter and is {best:.4} with the best one: do \
                     not use it; lower --lr, or give more examples"
                ));
            }
        }
        let first = outcome.losses.map(|losses| losses.0);
        let last = outcome.losses.map(|losses| losses.1);
        if self.common.json {
            return print_json(&json!({
                "out": out.to_string(),
                "status": outcome.ending.name(),
                "steps": outcome.steps,
                "loss_first": first,
                "loss_last": last,
                "eval_loss_before": outcome.eval_before,
                "eval_loss_best": outcome.best.map(|best| best.1),
                "best_step": outcome.best.map(|best| best.0),
                "seconds": outcome.seconds,
                "peak_bytes": peak_bytes(),
                "adapter_sha256": outcome.adapter_sha256,
            }));
        }
        let (number, seconds) =
            (|loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{loss:.4}")), outcome.seconds);
        let mut stdout = io::stdout();
        writeln!(stdout, "{}: {} steps in {seconds:.1} s", outcome.ending.name(), outcome.steps)?;
        writeln!(stdout, "loss        {} -> {}", number(first), number(last))?;
        if let Some((step, loss)) = outcome.best {
            writeln!(stdout, "held out    {} -> {loss:.4} (best, step {step})", number(outcome.eval_before))?;
        }
        let peak = peak_bytes().map_or("unknown".into(), human_bytes);
        note(&format!("{out}: the adapter, metrics.jsonl, loss.svg, run.json; peak memory {peak}"));
        Ok(())
    }
}

/// Progress: a bar on a terminal, else a line now and then.
pub(super) struct Display {
    pub(super) bar: ProgressBar,
    steps: usize,
    held_out: usize,
    told: usize,
    start: std::time::Instant,
    begun: usize,
}

impl Display {
    pub(super) fn new(steps: usize, done: usize, held_out: usize) -> Display {
        let template = "{bar:30} step {human_pos} of {human_len}, {eta} left, {msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(steps as u64).with_style(style).with_position(done as u64);
        bar.reset_eta();
        Display { bar, steps, held_out, told: 0, start: std::time::Instant::now(), begun: done }
    }

    pub(super) fn show(&mut self, event: Event) {
        match event {
            Event::Step(line) => {
                let message = format!("loss {:.4}, {:.0} tokens/s", line.loss, line.tokens_per_s);
                self.bar.set_position(line.step as u64);
                let tenth = 10 * line.step / self.steps;
                if self.bar.is_hidden() && (tenth > self.told || line.step == self.begun + 1) {
                    self.told = tenth;
                    let per_step = self.start.elapsed().as_secs_f64() / (line.step - self.begun) as f64;
                    let left = per_step * (self.steps - line.step) as f64;
                    note(&format!("step {} of {}: {message}, {left:.0} s left", line.step, self.steps));
                }
                self.bar.set_message(message);
            }
            Event::Evaluating(rows) => self.bar.set_message(format!("{rows} of {} held-out rows", self.held_out)),
            Event::Evaluated(step, loss, best) => {
                let best = if best { ", the best so far" } else { "" };
                let line = format!("step {step}: held-out loss {loss:.4}{best}");
                self.bar.suspend(|| note(&line));
            }
        }
    }
}

/// A line a kernel, the slowest first, on stderr.
pub(super) fn show_profile(profiled: &Profiled, steps: usize) -> Result<()> {
    let rows = profiled.take();
    let total: f64 = rows.iter().map(|(_, row)| row.seconds).sum();
    let per_step = 1e3 / steps.max(1) as f64;
    let mut out = io::stderr();
    writeln!(out, "{:<36} {:>9} {:>10} {:>7} {:>9}", "kernel", "launches", "ms a step", "share", "GFLOP/s")?;
    for (stem, row) in &rows {
        writeln!(
            out,
            "{stem:<36} {:>9} {:>10.2} {:>6.1}% {:>9.1}",
            row.launches,
            row.seconds * per_step,
            100.0 * row.seconds / total.max(1e-9),
            row.flops as f64 / row.seconds.max(1e-9) / 1e9
        )?;
    }
    Ok(writeln!(out, "{:<36} {:>9} {:>10.2}", "all kernels", "", total * per_step)?)
}
