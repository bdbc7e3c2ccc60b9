//! Where a run stands, on disk: `checkpoint-000007/` holds everything that step 8 depends on.
//!
//! ```text
//! adapter_model.safetensors  adapter_config.json   the adapter, as PEFT stores it
//! optimizer.bin                                    means of gradients, then of their squares: f32, padding included
//! state.json                                       step, settings, best held-out loss, SHA-256 of the files above
//! ```
//!
//! A checkpoint is written beside its place, brought to the disk, and renamed: one that is there is whole. Order of
//! rows, masks of dropout and learning rates are functions of seed and step, so the step is all there is to say of
//! them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::parameters::Parameters;
use crate::aside;
use crate::device::Device;
use crate::error::Error;
use crate::model::adapter::{hex, sha256, Adapter};

const PREFIX: &str = "checkpoint-";
const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.bin";
/// The longest state that is read, in bytes.
const MAX_STATE: u64 = 1 << 20;

/// What a checkpoint knows beside its numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// What the run was asked for: a run with other settings does not continue it.
    pub settings: Map<String, Value>,
    /// Held-out loss before the first step.
    pub eval_before: Option<f64>,
    /// Step and value of the best held-out loss.
    pub best: Option<(usize, f64)>,
    /// Evaluations since.
    pub since_best: usize,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Hashes of the other files, by name.
    #[serde(default)]
    files: Map<String, Value>,
}

impl State {
    /// Before the first step.
    pub fn new(settings: Map<String, Value>) -> State {
        let files = Map::new();
        State { step: 0, settings, eval_before: None, best: None, since_best: 0, seconds: 0.0, files }
    }
}

/// The checkpoint directories of a run with their steps, the latest first.
fn list(run: &Path) -> Vec<(usize, PathBuf)> {
    let Ok(entries) = fs::read_dir(run) else { return Vec::new() };
    let step = |name: &str| name.strip_prefix(PREFIX)?.parse().ok();
    let mut found: Vec<(usize, PathBuf)> =
        entries.flatten().filter_map(|e| Some((step(e.file_name().to_str()?)?, e.path()))).collect();
    found.sort_by_key(|entry| std::cmp::Reverse(entry.0));
    found
}

/// True where a run left a checkpoint.
pub fn exists(run: &Path) -> bool {
    !list(run).is_empty()
}

/// Removes every checkpoint of a run.
pub fn clear(run: &Path) -> Result<(), Error> {
    for (_, path) in list(run) {
        fs::remove_dir_all(&path).map_err(|cause| Error::io(&path, cause))?;
    }
    Ok(())
}

/// Writes a checkpoint of `run` and removes those before it.
pub fn save(run: &Path, state: &State, parameters: &Parameters, base_sha256: &str) -> Result<(), Error> {
    let adapter = parameters.adapter(&parameters.values, Some(base_sha256.to_string()))?;
    let (mean, square) = (parameters.read(&parameters.mean)?, parameters.read(&parameters.square)?);
    let optimizer = [bytemuck::cast_slice::<f32, u8>(&mean), bytemuck::cast_slice(&square)].concat();

    let staging = run.join(".checkpoint.partial");
    let fail = |cause| Error::io(&staging, cause);
    if staging.exists() {
        fs::remove_dir_all(&staging).map_err(fail)?; // left by a run that was cut off
    }
    fs::create_dir_all(&staging).map_err(fail)?;
    let mut state = state.clone();
    state.files.clear();
    let [weights, config] = adapter.files();
    for (name, bytes) in [weights, config, (OPTIMIZER, optimizer)] {
        aside::write(&staging.join(name), &bytes)?;
        state.files.insert(name.to_string(), hex(&sha256(&bytes)).into());
    }
    let text = serde_json::to_string_pretty(&state).map_err(|error| Error::json(&staging.join(STATE), &error))?;
    aside::write(&staging.join(STATE), text.as_bytes())?;

    let place = run.join(format!("{PREFIX}{:06}", state.step));
    if place.exists() {
        fs::remove_dir_all(&place).map_err(|cause| Error::io(&place, cause))?;
    }
    fs::rename(&staging, &place).map_err(|cause| Error::io(&place, cause))?;
    if let Ok(directory) = fs::File::open(run) {
        let _ = directory.sync_all(); // some systems cannot sync a directory
    }
    for (step, path) in list(run) {
        if step != state.step {
            if let Err(error) = fs::remove_dir_all(&path) {
                log::warn!("{} stays behind: {error}", path.display());
            }
        }
    }
    Ok(())
}

/// A checkpoint as it was read.
pub struct Found {
    /// What it knows.
    pub state: State,
    /// The adapter.
    pub adapter: Adapter,
    optimizer: Vec<u8>,
    path: PathBuf,
}

/// The latest whole checkpoint of a run; none where there is none. One whose files are not those it names is passed
/// over.
pub fn find(run: &Path) -> Result<Option<Found>, Error> {
    for (_, path) in list(run) {
        match open(&path) {
            Ok(found) => return Ok(Some(found)),
            Err(error) => log::warn!("{error}; an earlier checkpoint is looked for"),
        }
    }
    Ok(None)
}

fn open(path: &Path) -> Result<Found, Error> {
    let file = path.join(STATE);
    let meta = fs::metadata(&file).map_err(|cause| Error::io(&file, cause))?;
    if !meta.is_file() || meta.len() > MAX_STATE {
        return Err(Error::file(&file, format!("is no file of at most {MAX_STATE} bytes")));
    }
    let text = fs::read(&file).map_err(|cause| Error::io(&file, cause))?;
    let state: State = serde_json::from_slice(&text).map_err(|error| Error::json(&file, &error))?;
    let mut optimizer = Vec::new();
    for name in ["adapter_model.safetensors", "adapter_config.json", OPTIMIZER] {
        let file = path.join(name);
        let bytes = fs::read(&file).map_err(|cause| Error::io(&file, cause))?;
        if state.files.get(name).and_then(Value::as_str) != Some(&hex(&sha256(&bytes))) {
            return Err(Error::file(&file, format!("is not the file that {STATE} names: damaged or changed")));
        }
        if name == OPTIMIZER {
            optimizer = bytes;
        }
    }
    Ok(Found { state, adapter: Adapter::open(path)?, optimizer, path: path.to_path_buf() })
}

impl Found {
    /// Brings the optimizer's means to the device; the parameters were made of this checkpoint's adapter.
    pub fn restore(&self, device: &dyn Device, parameters: &Parameters) -> Result<(), Error> {
        let half = 4 * parameters.len;
        if self.optimizer.len() != 2 * half {
            let what = format!(
                "has {} bytes, {} are expected: was it written on another device?",
                self.optimizer.len(),
                2 * half
            );
            return Err(Error::file(&self.path.join(OPTIMIZER), what));
        }
        device.write(&parameters.mean, 0, &self.optimizer[..half])?;
        device.write(&parameters.square, 0, &self.optimizer[half..])?;
        Ok(())
    }
}
