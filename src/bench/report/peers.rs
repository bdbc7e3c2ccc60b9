//! What tools/peers measured of other programs: rows like ours, and records of whole tasks, read as contests.

use std::path::Path;

use serde_json::Value;

use super::super::row::{self, Row};
use crate::error::{quote, Error};

/// A task that several programs did, on the same input.
#[derive(Clone, Debug, PartialEq)]
pub struct Contest {
    /// The task.
    pub what: String,
    /// Of the medians.
    pub unit: String,
    /// True where more is better.
    pub more: bool,
    /// Processor, threads, date and load.
    pub machine: String,
    /// The programs.
    pub entries: Vec<Entry>,
}

/// A program's figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The program, and in what format it works.
    pub name: String,
    /// The median.
    pub median: f64,
    /// Least and most.
    pub range: Option<(f64, f64)>,
    /// Whether it is this tool.
    pub own: bool,
}

const FILE_BYTES: u64 = 64 << 20;
/// Names in one record.
const ENTRIES: usize = 64;

/// The rows and contests of a file that tools/peers wrote, a line of JSON each. Lines that tell of something else are
/// passed over; what is no JSON is an error with its line.
pub fn read(path: &Path) -> Result<(Vec<Row>, Vec<Contest>), Error> {
    let size = std::fs::metadata(path).map_err(|cause| Error::io(path, cause))?.len();
    if size > FILE_BYTES {
        return Err(Error::file(path, format!("has {size} bytes: more than {FILE_BYTES} are not read as a record")));
    }
    let bytes = std::fs::read(path).map_err(|cause| Error::io(path, cause))?;
    let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "is not UTF-8: give a record of tools/peers"))?;
    let (mut rows, mut contests) = (Vec::new(), Vec::new());
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value: Value = serde_json::from_str(line).map_err(|error| {
            let said = error.to_string();
            let said = said.split(" at line ").next().unwrap_or_default();
            Error::file(path, format!("line {}: column {}: {}", i + 1, error.column(), quote(said)))
        })?;
        if value.get("kernel").is_some() {
            let row: Row = serde_json::from_value(value)
                .map_err(|error| Error::file(path, format!("line {}: {}", i + 1, quote(&error.to_string()))))?;
            row.check().map_err(|fault| Error::file(path, format!("line {}: {fault}", i + 1)))?;
            rows.push(row);
        } else {
            contests.extend(record(&value));
        }
    }
    Ok((rows, contests))
}

/// The contests of one record of a peer's script.
fn record(value: &Value) -> Vec<Contest> {
    let text = |key: &str| value[key].as_str().map(clean).unwrap_or_default();
    let mut machine = vec![text("processor")];
    machine.extend(value["threads"].as_u64().map(|n| format!("{n} threads")));
    machine.extend(value["date"].as_str().map(|date| clean(date.get(..10).unwrap_or(date))));
    machine.extend(value["load_before"].as_f64().map(|load| format!("load {load:.1} before")));
    let machine = machine.join(", ");
    let contest = |what: String, unit: &str, more: bool, entries: Vec<Entry>| {
        let (unit, machine) = (unit.to_string(), machine.clone());
        (entries.len() > 1).then_some(Contest { what, unit, more, machine, entries })
    };
    let mut found = Vec::new();
    for what in ["prefill", "decode"] {
        let part = &value[what];
        let tokens = part["tokens"].as_u64().map_or(String::new(), |n| format!(" {n}"));
        let name = format!("{} {}: {what}{tokens}", text("model"), text("variant"));
        found.extend(contest(name, "tokens/s", true, entries(part)));
    }
    if value["tokens_per_s"].is_object() {
        let what = text("what");
        let name = format!("{}, {}", what.strip_suffix(", tokens/s").unwrap_or(&what), text("model"));
        found.extend(contest(name, "tokens/s", true, entries(&value["tokens_per_s"])));
    }
    if value["ms"].is_object() {
        let size = |key: &str| value[key].as_u64().map_or("?".into(), |n| n.to_string());
        let name =
            format!("exact top {} of {} rows of {}, {} queries", size("k"), size("n"), size("d"), size("queries"));
        let name = match text("corpus") {
            corpus if corpus.is_empty() => name,
            corpus => format!("{name}: {corpus}"),
        };
        found.extend(contest(name, "ms", false, entries(&value["ms"])));
    }
    found
}

/// Every key of an object that holds a median.
fn entries(value: &Value) -> Vec<Entry> {
    let Some(object) = value.as_object() else { return Vec::new() };
    let entry = |(name, value): (&String, &Value)| {
        let positive = |key: &str| value[key].as_f64().filter(|v| v.is_finite() && *v > 0.0);
        let median = positive("median")?;
        let range = positive("min").zip(positive("max"));
        // PEFT's record names our arms by their format alone.
        let own = name.starts_with("handmill") || ["as-is", "f32", "nf4"].contains(&name.as_str());
        let name = if own && !name.starts_with("handmill") { format!("handmill {name}") } else { clean(name) };
        Some(Entry { name, median, range, own })
    };
    object.iter().filter_map(entry).take(ENTRIES).collect()
}

/// Text of a record in one line of at most 200 characters.
fn clean(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl Row {
    /// An error in words where its figures cannot be.
    pub fn check(&self) -> Result<(), String> {
        row::fault(self).map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_the_peers_become_contests() {
        let line = r#"{"date":"2026-11-23T02:40:48+00:00","model":"m.gguf","variant":"as-is","processor":"P",
            "threads":2,"prefill":{"tokens":512,"handmill":{"median":900.0,"min":890.0,"max":910.0},"llama.cpp":{"median":300.0,
            "min":290.0,"max":310.0},"ratio":3.0}}"#;
        let found = record(&serde_json::from_str(line).unwrap());
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].what.as_str(), found[0].unit.as_str()), ("m.gguf as-is: prefill 512", "tokens/s"));
        assert_eq!(found[0].machine, "P, 2 threads, 2026-11-23");
        let own: Vec<_> = found[0].entries.iter().map(|entry| (entry.name.as_str(), entry.own)).collect();
        assert_eq!(own, [("handmill", true), ("llama.cpp", false)]);
        assert!(record(&serde_json::json!({"what": "doctor"})).is_empty());
        assert!(record(&serde_json::json!({"ms": {"a": {"median": -1}, "b": {"median": "x"}, "c": 7}})).is_empty());
    }
}
