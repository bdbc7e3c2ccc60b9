//! The rows as Markdown, and as the table that the tool prints.

use std::fmt::Write as _;

use super::super::row::{Kind, Row};
use super::{devices, groups, invariance, known, percent, remarks, share, spread, time, Contest};

/// Everything, for a repository or a mail.
pub fn text(rows: &[Row], contests: &[Contest]) -> String {
    let mut out = String::from("# Benchmark\n");
    for device in devices(rows) {
        let _ = write!(out, "\n## {}: {}\n\n", device.id, line(device.adapter));
        for fact in limits(&device.rows) {
            let _ = writeln!(out, "- {fact}");
        }
        out += &invariance::markdown(&device.rows);
        let mut op = "";
        for group in groups(&device.rows) {
            if group.op != op {
                op = group.op;
                let _ = write!(
                    out,
                    "\n### {}\n\n| case | kernel | median (p20 to p80) | GB/s | GFLOP/s | of roofline | error / bound \
                     | |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n",
                    line(op)
                );
            }
            for row in &group.rows {
                let name = row.peer.as_deref().map_or(row.kernel.clone(), |peer| format!("{} ({peer})", row.kernel));
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {} | {} | {} | {} | {} |",
                    line(group.case),
                    line(&name),
                    spread(row),
                    known(row.gb_per_s),
                    known(row.tflop_per_s.map(|speed| 1e3 * speed)),
                    percent(row.roofline_fraction),
                    share(row),
                    line(&remarks(row))
                );
            }
        }
    }
    if !contests.is_empty() {
        out += "\n## Beside others\n";
    }
    for contest in contests {
        let _ = write!(
            out,
            "\n{} ({}), {}\n\n| | median (least to most) |\n| --- | --- |\n",
            line(&contest.what),
            line(&contest.unit),
            line(&contest.machine)
        );
        for entry in &contest.entries {
            let range = match entry.range {
                Some((low, high)) => format!(" ({} to {})", super::number(low), super::number(high)),
                None => String::new(),
            };
            let _ = writeln!(out, "| {} | {}{range} |", line(&entry.name), super::number(entry.median));
        }
    }
    out
}

/// What the device can do at most, a sentence each.
pub fn limits(rows: &[&Row]) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(row) = rows.iter().find(|row| row.software && row.kind == Kind::Kernel) {
        facts.push(format!("{}: its times rank nothing", row.note.as_deref().unwrap_or("software: correctness only")));
    }
    let of = |share: Option<f64>| share.map_or(String::new(), |f| format!(", {:.0} % of the datasheet", 100.0 * f));
    for row in rows.iter().filter(|row| row.kind == Kind::Roofline) {
        if let Some(speed) = row.gb_per_s {
            let (what, case) = (line(&row.kernel), line(&row.case));
            facts.push(format!("{what} of {case}: {} GB/s{}", super::number(speed), of(row.datasheet_fraction)));
        }
        if let Some(speed) = row.tflop_per_s {
            let (case, kernel) = (line(&row.case), line(&row.kernel));
            let share = of(row.datasheet_fraction);
            let speed = match speed < 1.0 {
                true => format!("{} GFLOP/s", super::number(1e3 * speed)),
                false => format!("{} TFLOP/s", super::number(speed)),
            };
            facts.push(match row.kernel.as_str() {
                "tiles" => format!("products of tiles in {case}: {speed}{share}"),
                _ => format!("fastest product, {case}: {speed} by {kernel}{share}"),
            });
        }
    }
    for row in rows.iter().filter(|row| row.kind == Kind::Launch) {
        if let Some(median) = row.median_us {
            facts.push(format!("a launch that does nothing: {}", time(median)));
        }
    }
    let first = rows.iter().find(|row| row.kind == Kind::Kernel);
    if let Some(row) = first {
        let mut about = Vec::new();
        about.extend(row.driver.as_ref().map(|driver| format!("driver {}", line(driver))));
        about.extend(row.threads.map(|threads| format!("{threads} threads")));
        about.extend(row.cache_bytes.map(|bytes| format!("last-level cache {:.1} MiB", bytes as f64 / 1048576.0)));
        about.extend(row.load.map(|load| format!("load {load:.2} when it began")));
        about.extend(row.version.as_ref().map(|version| format!("Handmill {}", line(version))));
        about.extend(row.commit.as_ref().map(|commit| format!("commit {}", line(commit))));
        facts.push(about.join(", "));
    }
    facts
}

/// Text of any origin in one line of a table.
pub(super) fn line(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(clean).collect::<String>().replace('|', "\\|").replace('<', "&lt;")
}
