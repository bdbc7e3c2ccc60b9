//! Where a work of many stages stands: what `compare`, `promote` and `cycle` show while they work.

use std::io::{self, IsTerminal};
use std::time::Instant;

use handmill::compare::recommend::duration;
use handmill::compare::{Halt, Progress};
use indicatif::{ProgressBar, ProgressStyle};

use super::{note, Interrupted};

/// A bar a stage on a terminal, else a line now and then.
#[derive(Default)]
pub struct Stages {
    stage: String,
    bar: Option<ProgressBar>,
    /// Since when, and how much was done then.
    since: Option<(Instant, usize)>,
    told: usize,
}

impl Stages {
    /// Shows where the work stands.
    pub fn show(&mut self, progress: &Progress) {
        let Progress { stage, done, total, what } = progress;
        // Answers are a stage an arm: their number begins anew. What has no number is told each time.
        let name = if *stage == "answering" || *total == 0 { format!("{stage} {what}") } else { stage.to_string() };
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

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.stage.clear();
    }
}

/// What stopped the work, in the tool's terms; `what` is said of an interruption.
pub fn halted(halt: Halt, what: &str) -> anyhow::Error {
    match halt {
        Halt::Error(error) => error.into(),
        Halt::Interrupted => {
            note(what);
            Interrupted.into()
        }
    }
}
