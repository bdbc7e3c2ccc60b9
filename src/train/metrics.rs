//! What a run tells: a line of JSON a step, and the curve of its losses as an SVG.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::aside;
use crate::error::Error;

/// The file's name.
pub const FILE: &str = "metrics.jsonl";

/// A step's line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// From 1.
    pub step: usize,
    /// Mean loss of the tokens predicted, in nats, before the step's change.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens read.
    pub tokens: usize,
    /// Of them predicted.
    pub predicted: usize,
    /// Tokens read in a second.
    pub tokens_per_s: f64,
    /// The most memory this process has had resident, in bytes; none where the system does not tell.
    pub peak_bytes: Option<u64>,
    /// Mean held-out loss after the step's change, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_loss: Option<f64>,
}

/// The file, open to append.
pub struct Metrics {
    path: PathBuf,
    file: File,
    /// Every line so far.
    pub lines: Vec<Line>,
}

impl Metrics {
    /// Opens `run`'s file, of which the lines of the first `steps` steps are kept.
    pub fn open(run: &Path, steps: usize) -> Result<Metrics, Error> {
        let path = run.join(FILE);
        let fail = |cause| Error::io(&path, cause);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) if steps > 0 => text,
            _ => String::new(),
        };
        let mut lines: Vec<Line> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        lines.retain(|line| line.step <= steps);
        let mut kept = String::new();
        for line in &lines {
            kept += &serde_json::to_string(line).map_err(|error| Error::json(&path, &error))?;
            kept.push('\n');
        }
        aside::write(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(fail)?;
        Ok(Metrics { file, lines, path })
    }

    /// Appends a line.
    pub fn push(&mut self, line: Line) -> Result<(), Error> {
        let mut text = serde_json::to_string(&line).map_err(|error| Error::json(&self.path, &error))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|cause| Error::io(&self.path, cause))?;
        self.lines.push(line);
        Ok(())
    }
}

/// The most memory this process has had resident, in bytes; none where the system does not tell.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Lets [`peak_bytes`] count from here on, where the system can: it then is the most since.
pub fn reset_peak() {
    if let Err(cause) = std::fs::write("/proc/self/clear_refs", "5") {
        log::debug!("the peak of memory counts from the beginning: {cause}");
    }
}

/// Losses over steps: each step's, their running mean, and the held-out ones as dots. `before` is the held-out loss
/// before the first step.
pub fn curve(lines: &[Line], before: Option<f64>) -> String {
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 320.0;
    const LEFT: f64 = 56.0;
    const TOP: f64 = 16.0;
    const RIGHT: f64 = 16.0;
    const BOTTOM: f64 = 40.0;
    let held_out: Vec<(usize, f64)> = before
        .map(|loss| (0, loss))
        .into_iter()
        .chain(lines.iter().filter_map(|l| Some((l.step, l.eval_loss?))))
        .collect();
    let all = || lines.iter().map(|line| line.loss).chain(held_out.iter().map(|point| point.1));
    let (mut low, mut high) = all().fold((f64::INFINITY, 0f64), |(low, high), loss| (low.min(loss), high.max(loss)));
    if !low.is_finite() {
        (low, high) = (0.0, 1.0);
    }
    let margin = (0.05 * (high - low)).max(0.01);
    (low, high) = ((low - margin).max(0.0), high + margin);
    let steps = lines.last().map_or(1, |line| line.step).max(1) as f64;
    let x = |step: f64| LEFT + (WIDTH - LEFT - RIGHT) * step / steps;
    let y = |loss: f64| TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    // Writing to a String cannot fail.
    for i in 0..=4 {
        let (loss, step) = (low + (high - low) * f64::from(i) / 4.0, steps * f64::from(i) / 4.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {0:.1}H{1}\" stroke=\"#ddd\"/><text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{loss:.2}\
             </text><text x=\"{4:.1}\" y=\"{5}\" text-anchor=\"middle\">{step:.0}</text>",
            y(loss),
            WIDTH - RIGHT,
            LEFT - 6.0,
            y(loss) + 4.0,
            x(step),
            HEIGHT - BOTTOM + 18.0,
        );
    }
    let path = |points: &mut dyn Iterator<Item = (f64, f64)>| {
        let mut path = String::new();
        for (step, loss) in points {
            let _ = write!(path, "{}{:.1} {:.1}", if path.is_empty() { 'M' } else { 'L' }, x(step), y(loss));
        }
        path
    };
    let mut mean = lines.first().map_or(0.0, |line| line.loss);
    let mut smooth = lines.iter().map(|line| {
        mean += 0.1 * (line.loss - mean);
        (line.step as f64, mean)
    });
    let raw = path(&mut lines.iter().map(|line| (line.step as f64, line.loss)));
    let _ = writeln!(svg, "<path d=\"{raw}\" fill=\"none\" stroke=\"#9bb7d4\"/>");
    let _ = writeln!(svg, "<path d=\"{}\" fill=\"none\" stroke=\"#1f5a96\" stroke-width=\"2\"/>", path(&mut smooth));
    if !held_out.is_empty() {
        let held = path(&mut held_out.iter().map(|&(step, loss)| (step as f64, loss)));
        let _ = writeln!(svg, "<path d=\"{held}\" fill=\"none\" stroke=\"#b5482a\" stroke-dasharray=\"4 3\"/>");
        for &(step, loss) in &held_out {
            let (x, y) = (x(step as f64), y(loss));
            let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"#b5482a\"/>");
        }
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">step: <tspan fill=\"#1f5a96\">training loss</tspan>{}\
         </text>\n</svg>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 6.0,
        if held_out.is_empty() { "" } else { ", <tspan fill=\"#b5482a\">held-out loss</tspan>" },
    );
    svg
}
