//! What `handmill compare` shows: progress, and the outcome within a screen.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use handmill::compare::outcome::{ArmOutcome, Outcome, Summary};
use handmill::compare::recommend::{duration, percent};
use handmill::compare::Progress;
use indicatif::{ProgressBar, ProgressStyle};

use super::super::{human_bytes, note};

/// Characters of a line of text.
const WIDTH: usize = 92;
/// Kinds of questions that are shown.
const KINDS: usize = 4;

/// Progress: a bar a stage on a terminal, else a line now and then.
#[derive(Default)]
pub(super) struct Display {
    stage: String,
    bar: Option<ProgressBar>,
    /// Since when, and how much was done then.
    since: Option<(Instant, usize)>,
    told: usize,
}

impl Display {
    pub(super) fn show(&mut self, progress: &Progress) {
        let Progress { stage, done, total, what } = progress;
        // Answers are a stage an arm: their number begins anew.
        let name = if *stage == "answering" { format!("{stage} {what}") } else { stage.to_string() };
        let new = name != self.stage;
        if new {
            self.finish();
            self.stage = name;
            self.since = Some((Instant::now(), done.saturating_sub(1)));
            self.told = 0;
            if io::stderr().is_terminal() {
                let template = match total {
                    0 => "{prefix:>17} {spinner} {msg}",
                    _ => "{prefix:>17} {bar:24} {human_pos} of {human_len} {msg}, {eta} left",
                };
                let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = ProgressBar::new(*total as u64).with_style(style).with_prefix(stage.to_string());
                self.bar = Some(bar.with_position(done.saturating_sub(1) as u64));
            }
        }
        if let Some(bar) = &self.bar {
            bar.set_length(*total as u64);
            bar.set_position(*done as u64);
            bar.set_message(what.clone());
            return;
        }
        if *total == 0 {
            if new {
                note(&format!("{stage}: {what}"));
            }
            return;
        }
        let fifth = 5 * done / total;
        if let Some((since, begun)) = self.since.filter(|_| fifth > self.told || new) {
            self.told = fifth.max(self.told);
            let rate = since.elapsed().as_secs_f64() / done.saturating_sub(begun).max(1) as f64;
            let left = rate * (total - done) as f64;
            let left = if new { String::new() } else { format!(", {} left", duration(left)) };
            note(&format!("{stage}: {done} of {total} {what}{left}"));
        }
    }

    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.stage.clear();
    }
}

/// Text in lines of at most [`WIDTH`] characters.
fn wrapped(text: &str, indent: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let room = WIDTH - indent.chars().count();
        let line = lines.last_mut().expect("there is one from the start");
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > room {
            lines.push(word.to_string());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.join(&format!("\n{indent}"))
}

/// `85 [78, 91]`, in percent.
fn share(summary: &Summary, key: &str) -> String {
    summary
        .get(key)
        .map_or("-".into(), |i| format!("{:.0} [{:.0}, {:.0}]", 100.0 * i.mean, 100.0 * i.low, 100.0 * i.high))
}

/// The outcome in at most 24 lines, unless there is more to warn of.
pub(super) fn table(out: &Path, outcome: &Outcome) -> Result<()> {
    let mut to = io::stdout().lock();
    let r = &outcome.recommendation;
    writeln!(to, "{}", r.headline)?;
    writeln!(to, "{}\n", wrapped(&r.sentence, ""))?;
    let mut row = |name: &str, cell: &dyn Fn(&ArmOutcome) -> String| {
        let cells: String = outcome.arms.iter().map(|arm| format!("{:>17}", cell(arm))).collect();
        writeln!(to, "{}", format!("{name:<22}{cells}").trim_end())
    };
    row(&format!("{} questions, %", outcome.questions.len()), &|arm| arm.arm.name().to_string())?;
    let form = outcome.has_form();
    if form {
        row("right and in form", &|arm| share(&arm.all, "strict"))?;
    }
    row("exact match", &|arm| share(&arm.all, "exact_match"))?;
    row("token F1", &|arm| share(&arm.all, "f1"))?;
    row("answer present", &|arm| share(&arm.all, "answer_present"))?;
    if form {
        row("form", &|arm| share(&arm.all, "form"))?;
    }
    let kinds = if outcome.kinds.len() > 1 { outcome.kinds.len().min(KINDS) } else { 0 };
    for (i, kind) in outcome.kinds.iter().take(kinds).enumerate() {
        let n = outcome.arms[0].kinds[i].n;
        let kind: String = kind.chars().take(12).collect();
        row(&format!("  right, {kind} ({n})"), &|arm| share(&arm.kinds[i], "strict"))?;
    }
    row("answer loss, nats", &|arm| format!("{:.2}", arm.all.mean("answer_nll")))?;
    row("prompt tokens", &|arm| format!("{:.0}", arm.prompt_tokens()))?;
    row("time a question", &|arm| duration(arm.seconds()))?;
    row("peak memory", &|arm| arm.peak_bytes.map_or("-".into(), human_bytes))?;
    let (costs, f, hits) = (&outcome.costs, &outcome.forgetting, &outcome.hits);
    let found = match hits.n {
        0 => String::new(),
        _ => format!(
            "; the {} found hold the answer for {}, the first for {}",
            hits.k,
            percent(hits.at_k),
            percent(hits.at_1)
        ),
    };
    writeln!(to, "\nindex       {} for {} passages{found}", duration(costs.index_s), costs.chunks)?;
    writeln!(
        to,
        "training    {} for {} steps; adapter {}, forgets {:+.3} nats [{:+.3}, {:+.3}]",
        duration(costs.train_s),
        costs.steps,
        human_bytes(costs.adapter_bytes),
        f.delta.mean,
        f.delta.low,
        f.delta.high
    )?;
    for warning in outcome.warnings.iter().take(2) {
        writeln!(to, "warning     {}", wrapped(warning, "            "))?;
    }
    let more = outcome.warnings.len().saturating_sub(2);
    let more = if more > 0 { format!(" ({more} more warnings there)") } else { String::new() };
    writeln!(to, "page        {}{more}", out.join("report.html").display())?;
    Ok(())
}
