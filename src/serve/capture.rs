//! The log of what was asked and answered, kept only where someone switched it on: JSON Lines, each on the disk before
//! its answer is acknowledged.
//!
//! ```text
//! FILE          a line an interaction, a line a rating
//! FILE.lock     held by the one server that writes
//! ```
//!
//! One thread writes: what waits is written together and brought to the disk once. Killed at any moment, the file ends in
//! a whole line, or in the beginning of one that nobody was told of, which the next start removes. What is older than
//! the retention time is dropped by writing the rest aside and renaming it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use regex::Regex;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::aside::Aside;
use crate::error::Error;

/// The longest line that is read, in bytes.
const MAX_LINE: u64 = 64 << 20;
/// Lines brought to the disk together at most.
const TOGETHER: usize = 1024;
/// How often old lines are looked for.
const SWEEP: Duration = Duration::from_secs(3600);
/// What stands for text that a pattern matched.
const REDACTED: &str = "[redacted]";
/// Fields whose texts are redacted, at any depth; the others are made here.
const TEXTS: [&str; 5] = ["messages", "answer", "hits", "correction", "comment"];

/// A log that is being written.
pub struct Capture {
    lines: Sender<Line>,
    redact: Vec<Regex>,
}

/// A line on its way, and who waits for it to be on the disk.
struct Line {
    text: String,
    done: oneshot::Sender<Result<(), String>>,
}

/// What the writer's thread holds.
struct Writer {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    length: u64,
    retention: Option<Duration>,
    _lock: File,
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

impl Capture {
    /// Opens a log or begins it, repairs its end, drops what is too old, and shows each line that is there. Errors: a
    /// file that cannot be written, or that another server writes.
    pub fn open(
        path: &Path,
        redact: Vec<Regex>,
        retention: Option<Duration>,
        each: &mut dyn FnMut(&Value),
    ) -> Result<Capture, Error> {
        let io = |cause| Error::io(path, cause);
        let lock_path = with_end(path, ".lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(|cause| Error::io(&lock_path, cause))?;
        if lock.try_lock().is_err() {
            return Err(Error::file(path, "is being written by another server: give this one another --capture"));
        }
        let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(io)?;
        let length = repair(path, &mut file)?;
        let mut writer = Writer { path: path.to_path_buf(), file, length, retention, _lock: lock };
        writer.sweep()?;
        read(path, each)?;
        let (lines, orders) = mpsc::channel();
        std::thread::Builder::new().name("capture".into()).spawn(move || writer.run(&orders)).map_err(io)?;
        Ok(Capture { lines, redact })
    }

    /// Appends an object, its texts redacted; comes back when it is on the disk.
    pub async fn write(&self, mut object: Value) -> Result<(), String> {
        if let Some(fields) = object.as_object_mut() {
            for (name, value) in fields.iter_mut() {
                match name.as_str() {
                    name if TEXTS.contains(&name) => self.redact(value),
                    "feedback" => self.redact(value),
                    _ => {}
                }
            }
        }
        let (done, on_disk) = oneshot::channel();
        let ended = |_| "the writer of --capture ended".to_string();
        self.lines.send(Line { text: format!("{object}\n"), done }).map_err(|_| ended(()))?;
        on_disk.await.map_err(|_| ended(()))?
    }

    fn redact(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                for pattern in &self.redact {
                    if pattern.is_match(text) {
                        *text = pattern.replace_all(text, REDACTED).into_owned();
                    }
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|value| self.redact(value)),
            Value::Object(map) => map.iter_mut().for_each(|(_, value)| self.redact(value)),
            _ => {}
        }
    }
}

impl Writer {
    /// Writes until nobody can order any more.
    fn run(&mut self, orders: &Receiver<Line>) {
        let mut swept = Instant::now();
        loop {
            let mut batch = match orders.recv_timeout(SWEEP.saturating_sub(swept.elapsed())) {
                Ok(line) => vec![line],
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            batch.extend(orders.try_iter().take(TOGETHER));
            if !batch.is_empty() {
                let written = self.append(&batch).map_err(|cause| format!("{}: {cause}", self.path.display()));
                if let Err(what) = &written {
                    log::error!("{what}");
                }
                for line in batch {
                    let _ = line.done.send(written.clone()); // who went away needs no word
                }
            }
            if swept.elapsed() >= SWEEP {
                swept = Instant::now();
                if let Err(error) = self.sweep() {
                    log::error!("old lines stay: {error}");
                }
            }
        }
    }

    fn append(&mut self, batch: &[Line]) -> std::io::Result<()> {
        let bytes: Vec<u8> = batch.iter().flat_map(|line| line.text.as_bytes()).copied().collect();
        let write = |file: &mut File, at: u64| {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&bytes)?;
            file.sync_data()
        };
        match write(&mut self.file, self.length) {
            Ok(()) => {
                self.length += bytes.len() as u64;
                Ok(())
            }
            Err(cause) => {
                let _ = self.file.set_len(self.length); // what was told to have failed must not appear later
                Err(cause)
            }
        }
    }

    /// Drops what is older than the retention time, and what has no time, for nobody could tell when to drop it.
    fn sweep(&mut self) -> Result<(), Error> {
        let Some(retention) = self.retention else { return Ok(()) };
        let oldest = now() - retention.as_secs_f64();
        let old = |line: &[u8]| {
            let time = serde_json::from_slice::<Value>(line).ok().and_then(|line| line.get("time")?.as_f64());
            time.is_none_or(|time| time < oldest)
        };
        let mut dropped = 0;
        lines(&self.path, &mut |line| {
            dropped += usize::from(old(line));
            Ok(())
        })?;
        if dropped == 0 {
            return Ok(());
        }
        let mut rest = Aside::create(&self.path)?;
        lines(&self.path, &mut |line| if old(line) { Ok(()) } else { rest.write(line) })?;
        rest.commit()?;
        let io = |cause| Error::io(&self.path, cause);
        self.file = OpenOptions::new().read(true).write(true).open(&self.path).map_err(io)?;
        self.length = self.file.metadata().map_err(io)?.len();
        log::info!("{}: {dropped} lines past their time dropped", self.path.display());
        Ok(())
    }
}

/// A file beside another: its name and an end.
pub fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(end);
    PathBuf::from(name)
}

/// Shows each line with its end. A file that is not there has none.
fn lines(path: &Path, each: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(Error::io(path, cause)),
    };
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
        match read.map_err(|cause| Error::io(path, cause))? {
            0 => break,
            count if count as u64 == MAX_LINE && line.last() != Some(&b'\n') => {
                return Err(Error::file(path, format!("line {number} has more than {MAX_LINE} bytes: is it a log?")));
            }
            _ => each(&line)?,
        }
    }
    Ok(())
}

/// Shows each object of a log. A line that is none is passed over with a word.
pub fn read(path: &Path, each: &mut dyn FnMut(&Value)) -> Result<(), Error> {
    let mut number = 0;
    lines(path, &mut |line| {
        number += 1;
        match serde_json::from_slice::<Value>(line) {
            Ok(object) if object.is_object() => each(&object),
            _ => log::warn!("{}: line {number} is no JSON object and is passed over", path.display()),
        }
        Ok(())
    })
}

/// Makes the file end in a whole line: the beginning of one is cut off, one that lacks only its end gets it. Gives the
/// file's length.
fn repair(path: &Path, file: &mut File) -> Result<u64, Error> {
    let (mut whole, mut torn) = (0, Vec::new());
    lines(path, &mut |line| {
        match line.last() {
            Some(b'\n') => whole += line.len() as u64,
            _ => torn = line.to_vec(),
        }
        Ok(())
    })?;
    if torn.is_empty() {
        return Ok(whole);
    }
    let io = |cause| Error::io(path, cause);
    if serde_json::from_slice::<Value>(&torn).is_ok_and(|object| object.is_object()) {
        file.seek(SeekFrom::End(0)).and_then(|_| file.write_all(b"\n")).map_err(io)?;
        whole += torn.len() as u64 + 1;
    } else {
        log::warn!("{}: the last line was cut off and is removed ({} bytes)", path.display(), torn.len());
        file.set_len(whole).map_err(io)?;
    }
    file.sync_all().map_err(io)?;
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn block_on<T>(work: impl std::future::Future<Output = T>) -> T {
        pollster::block_on(work)
    }

    fn all(path: &Path) -> Vec<Value> {
        let mut found = Vec::new();
        read(path, &mut |line| found.push(line.clone())).unwrap();
        found
    }

    #[test]
    fn lines_are_there_when_they_are_acknowledged_and_a_torn_one_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let open = || Capture::open(&path, Vec::new(), None, &mut |_| ());
        let capture = open().unwrap();
        block_on(capture.write(json!({"id": "a", "time": 1}))).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"id\":\"a\",\"time\":1}\n");
        assert!(open().err().unwrap().to_string().contains("another server"));
        drop(capture);

        let reopen = || {
            // The writer lets go of the lock when its thread ends.
            let begun = Instant::now();
            loop {
                match open() {
                    Ok(capture) => return capture,
                    Err(error) => assert!(begun.elapsed() < Duration::from_secs(20), "{error}"),
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        for (tail, left) in [("{\"id\":\"b\",\"ti", 1), ("{\"id\":\"b\",\"time\":2}", 2), ("\u{0}\u{0}", 2)] {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(tail.as_bytes()).unwrap();
            let capture = reopen();
            assert_eq!(all(&path).len(), left, "{tail}");
            assert!(std::fs::read_to_string(&path).unwrap().ends_with("}\n"), "{tail}");
            drop(capture);
        }
        let capture = reopen();
        block_on(capture.write(json!({"id": "c", "time": 3}))).unwrap();
        let ids: Vec<Value> = all(&path).iter().map(|line| line["id"].clone()).collect();
        assert_eq!(ids, ["a", "b", "c"]);
    }

    #[test]
    fn texts_are_redacted_and_old_lines_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let day = 86_400.0;
        let old = format!(
            "{}\nno json\n{}\n",
            json!({"id": "old", "time": now() - 3.0 * day}),
            json!({"id": "young", "time": now() - day})
        );
        std::fs::write(&path, old).unwrap();
        let patterns = vec![Regex::new(r"\b\d{4}\b").unwrap()];
        let mut seen = Vec::new();
        let mut each = |line: &Value| seen.push(line["id"].clone());
        let capture = Capture::open(&path, patterns, Some(Duration::from_secs(2 * 86_400)), &mut each).unwrap();
        assert_eq!(seen, ["young"]);
        let said = json!({"id": "1234", "time": now(), "messages": [{"role": "user", "content": "my pin is 1234"}],
            "answer": "1234?", "hits": [{"text": "a 1234"}], "feedback": {"rating": 1, "correction": "1234"}});
        block_on(capture.write(said)).unwrap();
        let lines = all(&path);
        assert_eq!(lines.len(), 2);
        let line = lines[1].to_string();
        assert_eq!(line.matches("[redacted]").count(), 4, "{line}");
        assert_eq!(lines[1]["id"], "1234", "what is made here stays");
    }
}
