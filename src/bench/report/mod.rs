//! What is made of the rows: `bench.md` and `bench.html`, a page that needs nothing but itself. The rows are the truth;
//! both can be made again from them.

mod charts;
mod html;
mod invariance;
mod markdown;
mod peers;

use std::path::Path;

use super::row::{Kind, Row};
use crate::aside;
use crate::error::Error;

pub use html::page;
pub use markdown::text;
pub use peers::{read as read_peers, Contest};

/// A limit of the device, or what a launch costs, in a sentence.
pub fn facts(row: &Row) -> String {
    markdown::limits(&[row]).join("; ")
}

/// Writes both files.
pub fn write(out: &Path, rows: &[Row], contests: &[Contest]) -> Result<(), Error> {
    aside::folder(out)?;
    aside::write(&out.join("bench.md"), text(rows, contests).as_bytes())?;
    aside::write(&out.join("bench.html"), page(rows, contests).as_bytes())
}

/// The rows of one device, in the order they came.
struct OnDevice<'a> {
    id: &'a str,
    adapter: &'a str,
    rows: Vec<&'a Row>,
}

/// Rows by device and adapter; a peer's rows stand with those of its device.
fn devices(rows: &[Row]) -> Vec<OnDevice<'_>> {
    let mut found: Vec<OnDevice<'_>> = Vec::new();
    for row in rows {
        let (id, adapter) = (row.device.as_str(), row.adapter.as_deref().unwrap_or("unknown"));
        let same =
            |device: &&mut OnDevice<'_>| device.id == id && (device.adapter == adapter || row.kind == Kind::Peer);
        match found.iter_mut().find(same) {
            Some(device) => device.rows.push(row),
            None => found.push(OnDevice { id, adapter, rows: vec![row] }),
        }
    }
    found
}

/// A shape's kernels and peers, slowest rung first, as the table has them.
struct Group<'a> {
    op: &'a str,
    case: &'a str,
    shape: &'a str,
    rows: Vec<&'a Row>,
}

/// Rows of kernels by op and case. A peer's op may be one word of ours: `qmatmul` stands with every format.
fn groups<'a>(rows: &[&'a Row]) -> Vec<Group<'a>> {
    let mut found: Vec<Group<'a>> = Vec::new();
    for &row in rows.iter().filter(|row| row.kind == Kind::Kernel) {
        match found.iter_mut().find(|group| group.op == row.op && group.case == row.case) {
            Some(group) => group.rows.push(row),
            None => found.push(Group {
                op: &row.op,
                case: &row.case,
                shape: row.shape.as_deref().unwrap_or_default(),
                rows: vec![row],
            }),
        }
    }
    for &row in rows.iter().filter(|row| row.kind == Kind::Peer) {
        for group in found.iter_mut().filter(|group| group.op == row.op && group.case == row.case) {
            group.rows.push(row);
        }
    }
    found
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.01 || v == 0.0 => format!("{v:.2}"),
        v => format!("{v:.1e}"),
    }
}

fn known(value: Option<f64>) -> String {
    value.map_or("–".into(), number)
}

fn percent(value: Option<f64>) -> String {
    value.map_or("–".into(), |value| format!("{:.0} %", 100.0 * value))
}

/// The error as a share of what it may be.
fn share(row: &Row) -> String {
    match (row.error, row.tolerance) {
        (Some(error), Some(tolerance)) if tolerance > 0.0 => format!("{:.2}", error / tolerance),
        _ => "–".into(),
    }
}

/// Microseconds in the unit a person reads.
fn time(us: f64) -> String {
    match us {
        t if t < 1e3 => format!("{} µs", number(t)),
        t if t < 1e6 => format!("{} ms", number(t / 1e3)),
        t => format!("{} s", number(t / 1e6)),
    }
}

/// `41.2 µs (40.9 to 41.8)`
fn spread(row: &Row) -> String {
    let Some(median) = row.median_us else { return "–".into() };
    let (unit, by) = match median {
        t if t < 1e3 => ("µs", 1.0),
        t if t < 1e6 => ("ms", 1e3),
        _ => ("s", 1e6),
    };
    match row.p20_us.zip(row.p80_us) {
        Some((low, high)) => format!("{} ({} to {}) {unit}", number(median / by), number(low / by), number(high / by)),
        None => format!("{} {unit}", number(median / by)),
    }
}

/// What a reader must know of a row beside its figures.
fn remarks(row: &Row) -> String {
    let mut found = Vec::new();
    if row.noisy {
        found.push("noisy".to_string());
    }
    if !row.cold && row.median_us.is_some() && row.kind == Kind::Kernel {
        found.push("hot".to_string());
    }
    if let Some((cost, free)) = row.invariant_cost.zip(row.free_kernel.as_ref()) {
        found.push(match *free == row.kernel {
            true => "batch-invariant as it is".to_string(),
            false => format!("batch-invariant: {cost:.2} times {free}"),
        });
    }
    found.extend(row.note.clone());
    found.join("; ")
}
