//! What `handmill compare` shows: the outcome within a screen.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use handmill::compare::outcome::{ArmOutcome, Outcome, Summary};
use handmill::compare::recommend::{duration, percent};

use super::super::human_bytes;

/// Characters of a line of text.
const WIDTH: usize = 92;
/// Kinds of questions that are shown.
const KINDS: usize = 4;

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
