//! The page: what the device can do, every measurement under that roof, the ladders, peers, and every figure.

use std::fmt::Write as _;

use super::super::row::{Kind, Row};
use super::{charts, devices, groups, invariance, known, markdown, number, percent, remarks, share, spread, time};
use super::{Contest, Group, OnDevice};

pub use crate::compare::report::escape;

/// The family's plain style, then what is this page's own.
const CSS: &str = concat!(include_str!("../../compare/report/page.css"), include_str!("bench.css"));
/// Shapes whose ladders are drawn, at most two of an op; all stand in the tables.
const LADDERS_IN_ALL: usize = 24;

/// The page of some rows and of contests with other programs.
pub fn page(rows: &[Row], contests: &[Contest]) -> String {
    let devices = devices(rows);
    let title = match devices.first() {
        Some(device) => format!("Kernels on {}", device.adapter),
        None => "Beside others".to_string(),
    };
    let kernels = rows.iter().filter(|row| row.median_us.is_some() && row.error.is_some()).count();
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">\
         <title>{0}</title><style>{CSS}</style></head><body><main><header><p class=\"kicker\">Speed you can check: \
         {kernels} times, each with its error against an f64 oracle</p><h1>{0}</h1></header>",
        escape(&title)
    );
    for device in &devices {
        html += &of_device(device, devices.len() > 1);
    }
    if !contests.is_empty() {
        html += &beside(contests);
    }
    html + "</main></body></html>\n"
}

fn of_device(device: &OnDevice<'_>, named: bool) -> String {
    let mut html = String::from("<section>");
    if named {
        let _ = write!(html, "<h2>{}: {}</h2>", escape(device.id), escape(device.adapter));
    }
    let wrong: Vec<&&Row> = device.rows.iter().filter(|row| is_wrong(row)).collect();
    if !wrong.is_empty() {
        html += "<aside class=\"warn\"><h3>Wrong results</h3><ul>";
        for row in wrong {
            let _ = write!(html, "<li>{} ({}): {}</li>", escape(&row.kernel), escape(&row.case), escape(&remarks(row)));
        }
        html += "</ul></aside>";
    }
    html += "<ul class=\"facts\">";
    for fact in markdown::limits(&device.rows) {
        let _ = write!(html, "<li>{}</li>", escape(&fact));
    }
    html += "</ul></section>";
    if let Some(svg) = charts::roofline(&device.rows) {
        let _ = write!(
            html,
            "<section><h2>Under the roof</h2><p class=\"note\">A dot is a kernel on a shape, by the least bytes and \
             operations of its contract. The lines are what this device did in the same run: it copied, read or \
             updated along the slope, whatever was fastest, and a level is its fastest product of a type.</p>\
             <div class=\"scroll\">{svg}</div>{}</section>",
            legend(&device.rows, "measured limit")
        );
    }
    if let Some(svg) = charts::bandwidth(&device.rows) {
        let _ = write!(
            html,
            "<section><h2>Waiting for memory</h2><p class=\"note\">Least bytes over time of every launch that has more \
             to move than to compute.</p><div class=\"scroll\">{svg}</div>{}</section>",
            legend(&device.rows, "memory's measured limit")
        );
    }
    html += &invariance::html(&device.rows);
    let groups = groups(&device.rows);
    html += &ladders(&groups);
    html + &tables(&groups)
}

fn is_wrong(row: &Row) -> bool {
    row.note.as_ref().is_some_and(|note| note.starts_with("WRONG"))
}

fn legend(rows: &[&Row], line: &str) -> String {
    let mut html = String::from("<p class=\"legend\">");
    let there = |i: usize| rows.iter().any(|row| row.kind == Kind::Kernel && charts::family(&row.op) == i);
    for (i, (name, _)) in charts::FAMILIES.iter().enumerate().filter(|(i, _)| there(*i)) {
        let _ = write!(html, "<span style=\"--c:var(--f{i})\"><span class=\"dot\"></span>{name}</span>");
    }
    let _ = write!(html, "<span><span class=\"key\"></span>{line}</span></p>");
    html
}

/// The shapes of each op on which most kernels ran, as bars.
fn ladders(groups: &[Group<'_>]) -> String {
    let timed = |group: &Group<'_>| group.rows.iter().filter(|row| row.median_us.is_some()).count();
    let work = |group: &Group<'_>| group.rows.iter().filter_map(|row| row.flops).max().unwrap_or(0);
    let mut chosen: Vec<&Group<'_>> = Vec::new();
    let mut ops: Vec<&str> = groups.iter().map(|group| group.op).collect();
    ops.dedup();
    for op in ops {
        let mut of_op: Vec<&Group<'_>> = groups.iter().filter(|g| g.op == op && timed(g) > 1).collect();
        of_op.sort_by_key(|group| std::cmp::Reverse((timed(group), work(group))));
        // One row and many want different kernels: the second has another number of rows.
        let rows = |group: &&Group<'_>| group.rows.first().and_then(|row| row.m);
        let first = of_op.first().copied();
        let second = of_op.iter().find(|group| first.is_some_and(|first| rows(&first) != rows(group)));
        chosen.extend(first.into_iter().chain(second.copied()));
    }
    chosen.truncate(LADDERS_IN_ALL);
    if chosen.is_empty() {
        return String::new();
    }
    let mut html = String::from(
        "<section><h2>Ladders</h2><p class=\"note\">Kernels of one shape, slowest rung first, by speed; longer is \
         faster. Grey is another program.</p><div class=\"ladders\">",
    );
    for group in chosen {
        let fastest = group.rows.iter().filter_map(|row| row.median_us).fold(f64::INFINITY, f64::min);
        let _ = write!(html, "<div><h3>{}</h3><p>{}</p>", escape(group.op), escape(&place(group)));
        for row in &group.rows {
            let Some(median) = row.median_us else { continue };
            let name = row.peer.as_deref().unwrap_or(row.kernel.strip_prefix(group.op).unwrap_or(&row.kernel));
            let class = if row.peer.is_some() { "peer" } else { "own" };
            html += &step(name.trim_start_matches('_'), class, fastest / median, &time(median));
        }
        html += "</div>";
    }
    html + "</div></section>"
}

fn place(group: &Group<'_>) -> String {
    match group.shape {
        "" => group.case.to_string(),
        shape => format!("{}, {shape}", group.case),
    }
}

/// A bar of `share` of the longest.
fn step(name: &str, class: &str, share: f64, said: &str) -> String {
    format!(
        "<div class=\"step {class}\"><code>{}</code><div class=\"meter\"><i style=\"width:{:.1}%\"></i></div>\
         <span>{}</span></div>",
        escape(name),
        (100.0 * share).clamp(0.3, 100.0),
        escape(said)
    )
}

fn tables(groups: &[Group<'_>]) -> String {
    let mut html = String::from(
        "<section><h2>Every figure</h2><p class=\"note\">Medians with the values that a fifth of the samples lie below \
         and above. Bytes and operations are the least that the contract asks for. The roofline is the one measured in \
         the same run; the error is the largest share of its derived bound.</p>",
    );
    let known_card = groups.iter().flat_map(|group| &group.rows).any(|row| row.datasheet_fraction.is_some());
    let datasheet = |cell: &str| if known_card { cell.to_string() } else { String::new() };
    let mut op = "";
    for group in groups {
        if group.op != op {
            if !op.is_empty() {
                html += "</tbody></table></div></details>";
            }
            op = group.op;
            let _ = write!(
                html,
                "<details class=\"op\"><summary><code>{}</code></summary><div class=\"scroll\"><table><thead><tr>\
                 <th scope=\"col\">kernel</th><th scope=\"col\">median (p20 to p80)</th><th scope=\"col\">GB/s</th>\
                 <th scope=\"col\">GFLOP/s</th><th scope=\"col\">of roofline</th>{}<th scope=\"col\">error / bound</th>\
                 <th scope=\"col\"></th></tr></thead><tbody>",
                escape(op),
                datasheet("<th scope=\"col\">of datasheet</th>")
            );
        }
        let columns = if known_card { 8 } else { 7 };
        let _ = write!(
            html,
            "<tr class=\"case\"><th scope=\"rowgroup\" colspan=\"{columns}\"><b>{}</b> {}</th></tr>",
            escape(group.case),
            escape(group.shape)
        );
        for row in &group.rows {
            let name = row.peer.as_deref().map_or(String::new(), |peer| format!("<small>{}</small>", escape(peer)));
            let _ = write!(
                html,
                "<tr><th scope=\"row\"><code>{}</code>{name}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td>{}<td>{}\
                 </td><td>{}</td></tr>",
                escape(&row.kernel),
                spread(row),
                known(row.gb_per_s),
                known(row.tflop_per_s.map(|speed| 1e3 * speed)),
                percent(row.roofline_fraction),
                datasheet(&format!("<td>{}</td>", percent(row.datasheet_fraction))),
                share(row),
                escape(&remarks(row))
            );
        }
    }
    if !op.is_empty() {
        html += "</tbody></table></div></details>";
    }
    html + "</section>"
}

fn beside(contests: &[Contest]) -> String {
    let mut html = String::from(
        "<section><h2>Beside others</h2><p class=\"note\">Whole tasks, the same input in one run, results compared \
         before times. Longer is faster.</p><div class=\"ladders\">",
    );
    for contest in contests {
        let _ = write!(html, "<div><h3>{}</h3><p>{}</p>", escape(&contest.what), escape(&contest.machine));
        let medians = || contest.entries.iter().map(|entry| entry.median);
        let (least, most) = (medians().fold(f64::INFINITY, f64::min), medians().fold(0.0, f64::max));
        for entry in &contest.entries {
            let share = if contest.more { entry.median / most } else { least / entry.median };
            let class = if entry.own { "own" } else { "peer" };
            html += &step(&entry.name, class, share, &format!("{} {}", number(entry.median), contest.unit));
        }
        html += "</div>";
    }
    html + "</div></section>"
}
