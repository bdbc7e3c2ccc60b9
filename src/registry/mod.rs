//! The life of an adapter around the kernels: models, adapters, datasets, indexes, evaluations and runs by name and
//! version, what each was made from, which version of a name is in use, and how one comes to be.
//!
//! ```text
//! registry.sqlite    entries, their files, what they were made from, aliases and where they pointed before
//! blobs/  trees/     bytes by their hash; an entry's files under their own names, to be used in place
//! incoming/  gate/   bytes on their way in; evaluations under way
//! .lock              shared by those who bring bytes in, held alone by who takes them out
//! ```
//!
//! Read in this order: [`names`], [`files`], [`database`], `describe` (what files say of themselves), [`entries`] (what
//! is kept and how it is found), [`aliases`], [`upkeep`] (verify, collect, export), [`record`] (what commands leave),
//! [`gate`] (whether a candidate is better), [`from_log`] and [`near`] (served answers back to training rows),
//! [`cycle`] (all of it once).

pub mod aliases;
pub mod cycle;
pub mod database;
mod describe;
pub mod entries;
pub mod files;
pub mod from_log;
pub mod gate;
pub mod names;
pub mod near;
pub mod record;
pub mod upkeep;

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::database::Database;
use self::names::Reference;
use crate::error::{quote, Error};

/// The variable that names the registry where no flag does.
pub const VARIABLE: &str = "HANDMILL_REGISTRY";
/// Names that are told where one is not found.
const TOLD: usize = 12;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A decoder or an embedder, as it was published or quantized.
    Model,
    /// A LoRA adapter: a PEFT directory.
    Adapter,
    /// Training rows, questions, documents.
    Dataset,
    /// An index of documents; registered where it is, since it changes.
    Index,
    /// Figures.
    Evaluation,
    /// What a command did.
    Run,
}

impl Kind {
    /// All.
    pub const ALL: [Kind; 6] = [Kind::Model, Kind::Adapter, Kind::Dataset, Kind::Index, Kind::Evaluation, Kind::Run];

    /// Its word.
    pub fn name(self) -> &'static str {
        ["model", "adapter", "dataset", "index", "evaluation", "run"][self as usize]
    }

    /// What a path holds, by its files' names.
    pub fn of(path: &Path) -> Option<Kind> {
        if path.is_dir() {
            let has = |name: &str| path.join(name).is_file();
            let kinds = [("adapter_config.json", Kind::Adapter), ("index.sqlite", Kind::Index)];
            let known = kinds.into_iter().find(|(name, _)| has(name)).map(|(_, kind)| kind);
            return known.or(has("config.json").then_some(Kind::Model));
        }
        match path.extension().and_then(|extension| extension.to_str())? {
            "gguf" => Some(Kind::Model),
            "jsonl" => Some(Kind::Dataset),
            _ => None,
        }
    }
}

/// A kind's word with its article.
fn a(word: &str) -> String {
    let article = if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {word}")
}

impl std::str::FromStr for Kind {
    type Err = Error;
    fn from_str(word: &str) -> Result<Kind, Error> {
        Kind::ALL.into_iter().find(|kind| kind.name() == word).ok_or_else(|| {
            let known = Kind::ALL.map(Kind::name).join(", ");
            Error::Request(format!("there is no kind {}: {known}", quote(word)))
        })
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An open registry. Any number of processes may have it open and change it at once.
pub struct Registry {
    /// Its directory.
    pub dir: PathBuf,
    database: Database,
}

impl Registry {
    /// Opens the registry in `dir`, which is made where it is missing.
    pub fn create(dir: &Path) -> Result<Registry, Error> {
        let database = Database::open(dir, true)?;
        // In place is by absolute path, and so is what is said of it.
        let dir = dir.canonicalize().map_err(|cause| Error::io(dir, cause))?;
        Ok(Registry { dir, database })
    }

    /// Opens the registry in `dir`. An error where there is none.
    pub fn open(dir: &Path) -> Result<Registry, Error> {
        let database = Database::open(dir, false)?;
        let dir = dir.canonicalize().map_err(|cause| Error::io(dir, cause))?;
        Ok(Registry { dir, database })
    }

    /// Holds off, until dropped, those who take bytes out; `alone` also those who bring bytes in. Waits for them.
    fn lock(&self, alone: bool) -> Result<File, Error> {
        let path = self.dir.join(".lock");
        let file = File::options().create(true).append(true).open(&path);
        // Where nothing may be written, bytes can still be held on to.
        let file = if alone { file } else { file.or_else(|cause| File::open(&path).map_err(|_| cause)) };
        let file = file.map_err(|cause| Error::io(&path, cause))?;
        let held = if alone { file.lock() } else { file.lock_shared() };
        held.map_err(|cause| Error::io(&path, cause))?;
        Ok(file)
    }
}

/// The registry that `flag` names, else that of the environment.
pub fn directory(flag: Option<&Path>) -> Option<PathBuf> {
    let named = || std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    flag.map(Path::to_path_buf).or_else(named)
}

/// Where what a flag names is: a path that exists as it is, else the entry of this kind that the registry has under
/// the name. Without a registry, and for what cannot be a name, the path itself, so that its user says what is wrong.
/// Files of entries stand under their own names and are used in place. Errors: neither a path nor a name.
pub fn resolve(registry: Option<&Path>, kind: Kind, path: &Path) -> Result<PathBuf, Error> {
    let reference = path.to_str().filter(|_| !path.exists()).map(Reference::parse);
    let (Some(Ok(reference)), Some(dir)) = (reference, registry) else { return Ok(path.into()) };
    let registry = Registry::open(dir)?;
    match registry.find(&reference, Some(kind))? {
        Some(entry) => registry.path(&entry),
        None => {
            let mut known: Vec<String> = registry.list(Some(kind), None)?.into_iter().map(|entry| entry.name).collect();
            known.dedup();
            let more = if known.len() > TOLD { ", .." } else { "" };
            known.truncate(TOLD);
            let has = match known.is_empty() {
                true => format!("has no {kind}"),
                false => format!("has no such {kind} (its {kind} names: {}{more})", known.join(", ")),
            };
            let what = format!("is no file or directory, and the registry {} {has}", registry.dir.display());
            Err(Error::file(path, what))
        }
    }
}
