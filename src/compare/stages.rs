//! Stages of a comparison, on disk: what a stage came to is kept under the hash of everything it was made from, so a
//! run that is cut off goes on where it was, and a second run does again only what has changed.
//!
//! ```text
//! state/NAME.json     {"key": .., "value": ..}        written whole
//! state/NAME.jsonl    {"key": ..}, then a line a record   appended to; a line cut off by a kill is dropped
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::{json, Value};

use crate::aside;
use crate::error::Error;
use crate::model::adapter::{hex, sha256};

/// Changed where a stage does something else with the same inputs.
const VERSION: u32 = 1;

/// The hash of what a stage is made from.
pub fn key(inputs: &Value) -> String {
    hex(&sha256(format!("{VERSION} {inputs}").as_bytes()))
}

/// The hash of a file's bytes; reads it whole.
pub fn file_sha256(path: &Path) -> Result<String, Error> {
    Ok(hex(&sha256(&fs::read(path).map_err(|cause| Error::io(path, cause))?)))
}

/// What the stage `name` came to, where it was made from the same.
pub fn load<T: DeserializeOwned>(dir: &Path, name: &str, key: &str) -> Option<T> {
    let text = fs::read(path(dir, name, "json")).ok()?;
    let mut found: Value = serde_json::from_slice(&text).ok()?;
    (found["key"] == key).then(|| serde_json::from_value(found["value"].take()).ok()).flatten()
}

/// Keeps what the stage `name` came to, and gives it as [`load`] will: text may change a number's last bit, and a run
/// that goes on is to come to the same as one that was never cut off.
pub fn save<T: Serialize + DeserializeOwned>(dir: &Path, name: &str, key: &str, value: &T) -> Result<T, Error> {
    let file = path(dir, name, "json");
    let text = serde_json::to_string(&json!({ "key": key, "value": value })).map_err(|e| Error::json(&file, &e))?;
    aside::write(&file, text.as_bytes())?;
    load(dir, name, key).ok_or_else(|| Error::file(&file, "is not what was written to it: is the disk in order?"))
}

fn path(dir: &Path, name: &str, extension: &str) -> PathBuf {
    dir.join("state").join(format!("{name}.{extension}"))
}

/// Records that are appended one by one.
pub struct Records<T> {
    path: PathBuf,
    file: File,
    /// Every record so far.
    pub done: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> Records<T> {
    /// Opens the records of the stage `name`: those that are there, where they were made from the same, else none.
    pub fn open(dir: &Path, name: &str, key: &str) -> Result<Records<T>, Error> {
        let path = path(dir, name, "jsonl");
        let text = fs::read(&path).unwrap_or_default();
        let mut lines = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let first: Option<Value> = lines.next().and_then(|line| serde_json::from_slice(line).ok());
        let mut kept = format!("{}\n", json!({ "key": key })).into_bytes();
        let mut done = Vec::new();
        if first.is_some_and(|first| first["key"] == key) {
            for line in lines {
                let Ok(record) = serde_json::from_slice(line) else { break };
                kept.extend_from_slice(line);
                done.push(record);
            }
        }
        if kept != text {
            aside::write(&path, &kept)?;
        }
        let file = OpenOptions::new().append(true).open(&path).map_err(|cause| Error::io(&path, cause))?;
        Ok(Records { path, file, done })
    }

    /// Appends a record, which is kept as it will be read: text may change a number's last bit.
    pub fn push(&mut self, record: T) -> Result<(), Error> {
        let mut line = serde_json::to_vec(&record).map_err(|error| Error::json(&self.path, &error))?;
        self.done.push(serde_json::from_slice(&line).map_err(|error| Error::json(&self.path, &error))?);
        line.push(b'\n');
        self.file.write_all(&line).map_err(|cause| Error::io(&self.path, cause))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_a_cut_and_not_another_key() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let open = |key: &str| Records::<u32>::open(dir.path(), "answers", key).unwrap();
        let mut records = open("a");
        records.push(1).unwrap();
        records.push(2).unwrap();
        drop(records);
        let path = dir.path().join("state/answers.jsonl");
        let mut text = fs::read(&path).unwrap();
        text.extend(b"33"); // cut off before its end
        fs::write(&path, text).unwrap();
        let mut records = open("a");
        assert_eq!(records.done, [1, 2]);
        records.push(3).unwrap();
        drop(records);
        assert_eq!(open("a").done, [1, 2, 3]);
        assert!(open("b").done.is_empty());
    }

    #[test]
    fn values_are_found_under_their_key_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        save(dir.path(), "x", "k", &vec![1, 2]).unwrap();
        assert_eq!(load(dir.path(), "x", "k"), Some(vec![1, 2]));
        assert_eq!(load::<Vec<u32>>(dir.path(), "x", "other"), None);
        assert_eq!(load::<Vec<u32>>(dir.path(), "y", "k"), None);
    }
}
