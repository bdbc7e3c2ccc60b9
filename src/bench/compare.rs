//! Two runs beside each other: what became slower, beyond what chance and the machine explain.

use std::collections::BTreeMap;

use serde::Serialize;

use super::row::{Kind, Row};

/// What the machine is taken to vary by where the runs do not tell how fast it copied.
const UNKNOWN_DRIFT: f64 = 0.05;
/// A difference of means counts beyond so many standard errors: of a thousand rows about one is beyond it by chance.
const ERRORS: f64 = 3.0;

/// How a row did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Slower beyond the limit.
    Slower,
    /// Faster beyond it.
    Faster,
    /// Neither.
    Same,
    /// A time or its spread is missing.
    Unknown,
}

/// A row of both runs.
#[derive(Clone, Debug, Serialize)]
pub struct Pair {
    /// The op.
    pub op: String,
    /// The kernel.
    pub kernel: String,
    /// The device.
    pub device: String,
    /// The dims.
    pub case: String,
    /// Whether operands were in no cache.
    pub cold: bool,
    /// Median of the first run in microseconds.
    pub before_us: Option<f64>,
    /// Of the second.
    pub after_us: Option<f64>,
    /// Second over first.
    pub ratio: Option<f64>,
    /// The ratio beyond which it counts.
    pub limit: f64,
    /// How it did.
    pub verdict: Verdict,
}

/// Two runs compared.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Rows that both have, on the same adapter.
    pub pairs: Vec<Pair>,
    /// How much slower or faster the machine itself copied in the second run, as a share.
    pub drift: f64,
    /// Rows of the first run alone.
    pub only_before: usize,
    /// Rows of the second run alone.
    pub only_after: usize,
    /// What a reader should know first.
    pub notes: Vec<String>,
}

impl Comparison {
    /// Rows that became slower.
    pub fn slower(&self) -> impl Iterator<Item = &Pair> {
        self.pairs.iter().filter(|pair| pair.verdict == Verdict::Slower)
    }
}

/// Compares runs row by row, by kernel, device, case and cold. Of rows that stand twice in a run the last counts.
///
/// A row is slower when the intervals p20..p80 are apart and the ratio of its medians is beyond
/// 1 + max(3 · standard error of the ratio, drift). The standard error of a median of n samples is 1.253 σ/√n, and of
/// normal samples σ = (p80 − p20) / 1.683. The drift is how far the two runs' copies of memory are apart: what the
/// machine itself does is no kernel's fault.
pub fn compare(before: &[Row], after: &[Row]) -> Comparison {
    let mut notes = Vec::new();
    let index = |rows: &'_ [Row]| -> Index {
        let own = rows.iter().filter(|row| row.kind == Kind::Kernel);
        let key = |row: &Row| (row.device.clone(), row.kernel.clone(), row.case.clone(), row.cold);
        own.map(|row| (key(row), row.clone())).collect()
    };
    let (a, b) = (index(before), index(after));
    let drift = match (copy_time(before), copy_time(after)) {
        (Some(x), Some(y)) => (y / x).max(x / y) - 1.0,
        _ => {
            notes.push(format!(
                "the runs do not both tell how fast the device copied: it is taken to vary by {:.0} %",
                100.0 * UNKNOWN_DRIFT
            ));
            UNKNOWN_DRIFT
        }
    };
    let mut pairs = Vec::new();
    let mut elsewhere: BTreeMap<String, usize> = BTreeMap::new();
    for (key, x) in &a {
        let Some(y) = b.get(key) else { continue };
        let same = x.adapter == y.adapter && x.threads == y.threads;
        if !same {
            let name = |row: &Row| {
                let threads = row.threads.map_or(String::new(), |n| format!(" with {n} threads"));
                format!("{}{threads}", row.adapter.as_deref().unwrap_or("a device without a name"))
            };
            *elsewhere.entry(format!("{} was {}, then {}", x.device, name(x), name(y))).or_default() += 1;
            continue;
        }
        pairs.push(pair(x, y, drift));
    }
    for (what, count) in &elsewhere {
        notes.push(format!("{what}: {count} rows are not compared"));
    }
    let drivers = a.iter().find_map(|(key, x)| b.get(key).filter(|y| x.driver != y.driver).map(|y| (x, y)));
    if let Some((x, y)) = drivers {
        let name = |row: &Row| row.driver.clone().unwrap_or_else(|| "unknown".into());
        notes.push(format!("the driver of {} was {}, then {}", x.device, name(x), name(y)));
    }
    let shared = a.keys().filter(|key| b.contains_key(*key)).count();
    if shared == 0 {
        notes.push(nothing_shared(&a, &b));
    } else if !pairs.is_empty() && pairs.iter().all(|pair| pair.verdict == Verdict::Unknown) {
        notes.push("no row has times, with their spread, in both runs: nothing is known of any".into());
    }
    Comparison { pairs, drift, only_before: a.len() - shared, only_after: b.len() - shared, notes }
}

/// Rows by device, kernel, case and cold.
type Index = BTreeMap<(String, String, String, bool), Row>;

/// Why two runs have no row in common.
fn nothing_shared(a: &Index, b: &Index) -> String {
    let devices = |rows: &Index| {
        let mut ids: Vec<String> = rows.keys().map(|key| key.0.clone()).collect();
        ids.dedup();
        ids
    };
    let of = |rows: &Index| match (rows.len(), devices(rows)) {
        (0, _) => "no row of a kernel".to_string(),
        (n, ids) => format!("{n} of {}", ids.join(", ")),
    };
    let said = format!("no row is in both: the first has {}, the second {}", of(a), of(b));
    if !devices(a).iter().any(|id| devices(b).contains(id)) {
        return said;
    }
    // The same device did other things.
    let place = |(_, kernel, case, cold): &(String, String, String, bool)| {
        format!("{kernel} ({case}{})", if *cold { "" } else { ", hot" })
    };
    let first = |rows: &Index| rows.keys().next().map(place).unwrap_or_default();
    let hint = "give both the same --op, --shapes, --m and --hot";
    format!("{said}; for instance {} is only in the first, {} only in the second: {hint}", first(a), first(b))
}

/// The median time that a byte's copy took; of the last such row.
fn copy_time(rows: &[Row]) -> Option<f64> {
    let row = rows.iter().rev().find(|row| row.kind == Kind::Roofline && row.kernel == "copy")?;
    row.gb_per_s.filter(|speed| *speed > 0.0).map(|speed| 1.0 / speed)
}

fn pair(x: &Row, y: &Row, drift: f64) -> Pair {
    let mut pair = Pair {
        op: x.op.clone(),
        kernel: x.kernel.clone(),
        device: x.device.clone(),
        case: x.case.clone(),
        cold: x.cold,
        before_us: x.median_us,
        after_us: y.median_us,
        ratio: None,
        limit: 1.0 + drift,
        verdict: Verdict::Unknown,
    };
    let (Some(before), Some(after)) = (x.median_us, y.median_us) else { return pair };
    let ratio = after / before;
    pair.ratio = Some(ratio);
    let (Some((low_x, high_x)), Some((low_y, high_y))) = (x.p20_us.zip(x.p80_us), y.p20_us.zip(y.p80_us)) else {
        return pair;
    };
    let error =
        |low: f64, high: f64, median: f64, n: u64| 1.253 * (high - low) / 1.683 / median / (n.max(1) as f64).sqrt();
    let error = error(low_x, high_x, before, x.n).hypot(error(low_y, high_y, after, y.n));
    pair.limit = 1.0 + drift.max(ERRORS * error);
    pair.verdict = match ratio {
        r if r > pair.limit && low_y > high_x => Verdict::Slower,
        r if r < 1.0 / pair.limit && high_y < low_x => Verdict::Faster,
        _ => Verdict::Same,
    };
    pair
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kernel: &str, times: [f64; 3]) -> Row {
        Row {
            op: "add_f32".into(),
            kernel: kernel.into(),
            device: "cpu".into(),
            adapter: Some("A".into()),
            case: "M=1".into(),
            p20_us: Some(times[0]),
            median_us: Some(times[1]),
            p80_us: Some(times[2]),
            n: 100,
            ..Row::default()
        }
    }

    fn copied(speed: f64) -> Row {
        Row { kind: Kind::Roofline, kernel: "copy".into(), gb_per_s: Some(speed), ..Row::default() }
    }

    fn verdict(before: &[Row], after: &[Row]) -> Verdict {
        compare(before, after).pairs[0].verdict
    }

    #[test]
    fn slower_is_beyond_noise_and_beyond_the_machine() {
        let base = [copied(100.0), row("x", [98.0, 100.0, 102.0])];
        assert_eq!(verdict(&base, &[copied(100.0), row("x", [108.0, 110.0, 112.0])]), Verdict::Slower);
        assert_eq!(verdict(&base, &[copied(100.0), row("x", [88.0, 90.0, 92.0])]), Verdict::Faster);
        // The intervals meet.
        assert_eq!(verdict(&base, &[copied(100.0), row("x", [101.0, 110.0, 130.0])]), Verdict::Same);
        // The machine copies slower too.
        assert_eq!(verdict(&base, &[copied(80.0), row("x", [108.0, 110.0, 112.0])]), Verdict::Same);
        // Without a copy it is taken to vary by 5 %.
        assert_eq!(verdict(&base[1..], &[row("x", [103.0, 104.0, 105.0])]), Verdict::Same);
        let untimed = Row { median_us: None, p20_us: None, p80_us: None, ..row("x", [1.0; 3]) };
        assert_eq!(verdict(&base, &[copied(100.0), untimed]), Verdict::Unknown);
    }

    #[test]
    fn other_devices_and_adapters_are_told_of() {
        let base = [row("x", [98.0, 100.0, 102.0])];
        let other = [Row { adapter: Some("B".into()), ..base[0].clone() }];
        let found = compare(&base, &other);
        assert!(found.pairs.is_empty() && found.notes.iter().any(|note| note.contains("was A, then B")), "{found:?}");
        let card = [Row { device: "cuda:0".into(), ..base[0].clone() }];
        let found = compare(&base, &card);
        assert!(found.notes.iter().any(|note| note.contains("no row is in both")), "{found:?}");
        assert_eq!((found.only_before, found.only_after), (1, 1));
    }
}
