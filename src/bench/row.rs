//! A line of `bench.jsonl`: one measurement with all that it needs to be believed. What is not known is null.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The file's name below `--out`.
pub const FILE: &str = "bench.jsonl";
/// Longest file and line that are read, and most lines: a page of more is no use to anyone.
const FILE_BYTES: u64 = 64 << 20;
const LINE_BYTES: usize = 64 << 10;
const LINES: usize = 100_000;

/// What a line tells of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A kernel on a case.
    #[default]
    Kernel,
    /// A limit of the device: `copy`, or the fastest product.
    Roofline,
    /// The cost of a launch that does next to nothing.
    Launch,
    /// Another program on the same case.
    Peer,
}

/// One measurement. Times are microseconds a launch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What the line tells of.
    #[serde(default)]
    pub kind: Kind,
    /// The op and its format, such as `qmatmul_q4`.
    pub op: String,
    /// The kernel's stem; of a peer, what it calls.
    pub kernel: String,
    /// The device's id.
    pub device: String,
    /// The processor or card.
    pub adapter: Option<String>,
    /// Its driver's version.
    pub driver: Option<String>,
    /// The dims.
    pub case: String,
    /// Whose shape that is.
    #[serde(default)]
    pub shape: Option<String>,
    /// Rows of activations.
    #[serde(default)]
    pub m: Option<u64>,
    /// Whether the operands were in no cache.
    pub cold: bool,
    /// Median time.
    pub median_us: Option<f64>,
    /// A fifth of the samples is below.
    pub p20_us: Option<f64>,
    /// A fifth of the samples is above.
    pub p80_us: Option<f64>,
    /// Samples.
    pub n: u64,
    /// Launches in each.
    #[serde(default)]
    pub launches: Option<u64>,
    /// The least bytes over the median, in 10^9 a second.
    pub gb_per_s: Option<f64>,
    /// The least operations over the median, in 10^12 a second.
    pub tflop_per_s: Option<f64>,
    /// The least time by the measured roofline over the median.
    pub roofline_fraction: Option<f64>,
    /// The limit of that time: `memory` or `compute`.
    #[serde(default)]
    pub bound: Option<String>,
    /// The least time by the card's datasheet over the median.
    #[serde(default)]
    pub datasheet_fraction: Option<f64>,
    /// |got − expected| of the element that is the largest share of what it may be.
    pub error: Option<f64>,
    /// What it may be.
    #[serde(default)]
    pub tolerance: Option<f64>,
    /// Which elements were compared with the oracle.
    #[serde(default)]
    pub error_of: Option<String>,
    /// Another program and its version; null for Handmill's own rows.
    pub peer: Option<String>,
    /// Of a kernel that a batch-invariant device takes: the one that is taken without that, which may be the same.
    #[serde(default)]
    pub free_kernel: Option<String>,
    /// That one's median time in the same run.
    #[serde(default)]
    pub free_us: Option<f64>,
    /// How many times as long the batch-invariant one takes.
    #[serde(default)]
    pub invariant_cost: Option<f64>,
    /// The samples spread over 10 % of their median, twice.
    #[serde(default)]
    pub noisy: bool,
    /// Why there is no time, or what else there is to know.
    #[serde(default)]
    pub note: Option<String>,
    /// A processor standing in for a graphics card.
    #[serde(default)]
    pub software: bool,
    /// Type of the activations.
    #[serde(default)]
    pub act: Option<String>,
    /// Least bytes.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Least operations.
    #[serde(default)]
    pub flops: Option<u64>,
    /// Sets of buffers taken in turn.
    #[serde(default)]
    pub sets: Option<u64>,
    /// The cache they outlast.
    #[serde(default)]
    pub cache_bytes: Option<u64>,
    /// Threads of the CPU device.
    #[serde(default)]
    pub threads: Option<u64>,
    /// Load of the machine before the row.
    #[serde(default)]
    pub load: Option<f64>,
    /// Of this tool.
    #[serde(default)]
    pub version: Option<String>,
    /// Of its source, where the environment variable HANDMILL_COMMIT tells it.
    #[serde(default)]
    pub commit: Option<String>,
    /// When, in seconds since 1970.
    #[serde(default)]
    pub unix_time: Option<u64>,
}

impl Row {
    /// What it is compared by: kernel, device, case and cold.
    pub fn key(&self) -> (&str, &str, &str, bool) {
        (&self.kernel, &self.device, &self.case, self.cold)
    }

    /// As a line.
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("a row has string keys")
    }
}

/// What is wrong with a row; a file may claim anything.
pub(super) fn fault(row: &Row) -> Option<String> {
    let times = [row.median_us, row.p20_us, row.p80_us, row.free_us, row.invariant_cost];
    if times.iter().flatten().any(|t| !t.is_finite() || *t <= 0.0) {
        return Some("times, and invariant_cost, must be above zero, or null".into());
    }
    if let (Some(median), Some(p20), Some(p80)) = (row.median_us, row.p20_us, row.p80_us) {
        if p20 > median || median > p80 {
            return Some(format!("p20_us {p20}, median_us {median} and p80_us {p80} are not in order"));
        }
    }
    let speeds = [row.gb_per_s, row.tflop_per_s, row.roofline_fraction, row.datasheet_fraction, row.error];
    if speeds.iter().flatten().any(|v| !v.is_finite() || *v < 0.0) {
        return Some("speeds, fractions and errors must be numbers from zero on, or null".into());
    }
    (row.op.is_empty() || row.kernel.is_empty()).then(|| "op and kernel must be named".into())
}

/// The rows of a file, or of the one in a directory that `bench --out` wrote. A last line that was cut off, as by a kill, is left out; any other fault is an error with its
/// line.
pub fn read(path: &Path) -> Result<Vec<Row>, Error> {
    let path = &if path.is_dir() { path.join(FILE) } else { path.to_path_buf() };
    let size = std::fs::metadata(path).map_err(|cause| Error::io(path, cause))?.len();
    if size > FILE_BYTES {
        return Err(Error::file(path, format!("has {size} bytes: more than {FILE_BYTES} are not read as a benchmark")));
    }
    let bytes = std::fs::read(path).map_err(|cause| Error::io(path, cause))?;
    let mut rows = Vec::new();
    let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').enumerate().peekable();
    while let Some((i, line)) = lines.next() {
        let fail = |what: String| Error::file(path, format!("line {}: {what}", i + 1));
        if line.len() > LINE_BYTES {
            return Err(fail(format!("has {} bytes: no row has more than {LINE_BYTES}", line.len())));
        }
        if rows.len() == LINES {
            return Err(fail(format!("more than {LINES} rows: split the file")));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        match serde_json::from_slice::<Row>(line) {
            Ok(row) => match fault(&row) {
                None => rows.push(row),
                Some(fault) => return Err(fail(fault)),
            },
            Err(_) if lines.peek().is_none() && !line.ends_with(b"\n") => {
                log::warn!("{}: the last line was cut off and is left out", path.display());
            }
            Err(error) => return Err(fail(format!("is no row of `handmill bench --json`: {}", place(&error)))),
        }
    }
    Ok(rows)
}

/// What the parser says, its line (always the first) left out.
fn place(error: &serde_json::Error) -> String {
    let said = error.to_string();
    let said = said.split(" at line ").next().unwrap_or_default();
    format!("column {}: {}", error.column(), crate::error::quote(said))
}

/// A file that grows row by row, so that a kill loses none that was told.
pub struct Log {
    path: PathBuf,
    file: std::fs::File,
    /// Keeps a second run from the folder.
    _lock: std::fs::File,
}

impl Log {
    /// Begins `folder`'s file anew; what it held is kept beside it as `bench.jsonl.before`. An error where another run
    /// is writing there.
    pub fn create(folder: &Path) -> Result<Log, Error> {
        let lock = crate::train::run::lock(folder)?;
        let path = folder.join(FILE);
        if path.exists() {
            let before = folder.join(format!("{FILE}.before"));
            std::fs::rename(&path, &before).map_err(|cause| Error::io(&before, cause))?;
        }
        let file = std::fs::File::create(&path).map_err(|cause| Error::io(&path, cause))?;
        Ok(Log { path, file, _lock: lock })
    }

    /// Appends a row.
    pub fn push(&mut self, row: &Row) -> Result<(), Error> {
        let line = row.line() + "\n";
        self.file.write_all(line.as_bytes()).map_err(|cause| Error::io(&self.path, cause))
    }
}
