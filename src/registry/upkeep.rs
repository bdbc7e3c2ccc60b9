//! Keeping a registry in order: every byte read again, bytes that nothing holds taken out, entries written elsewhere,
//! and models that are on the machine already found.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::entries::{Entry, New, Source};
use super::{files, names, Kind, Registry};
use crate::aside::{self, Aside};
use crate::error::Error;
use crate::retrieve::index::Index;
use crate::train::run;

/// A file that is not what was registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Whose, such as `support@2`.
    pub entry: String,
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub what: String,
}

/// What [`Registry::verify`] found.
#[derive(Clone, Debug, Default)]
pub struct Verified {
    /// Entries.
    pub entries: usize,
    /// Files that were read.
    pub files: usize,
    /// Bytes that were read.
    pub bytes: u64,
    /// What is wrong.
    pub damage: Vec<Damage>,
    /// Indexes that have changed since they were registered, which is no fault.
    pub changed: Vec<String>,
}

/// What [`Registry::collect`] took out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Collected {
    /// Blobs.
    pub blobs: usize,
    /// Their bytes; those of links to files elsewhere are not freed by it.
    pub bytes: u64,
    /// Folders of links.
    pub trees: usize,
    /// What was left of processes that were cut off.
    pub leftovers: usize,
}

/// A model that [`Registry::scan`] found.
pub struct Scanned {
    /// Where.
    pub path: PathBuf,
    /// Its entry and whether it is new, or why it is not taken.
    pub entry: Result<(Entry, bool), Error>,
}

impl Registry {
    /// Reads every byte again. `tell` is told entries done, of how many.
    pub fn verify(&self, tell: &mut dyn FnMut(usize, usize)) -> Result<Verified, Error> {
        let _lock = self.lock(false)?;
        let mut found = Verified::default();
        if let Some(said) = self.database.integrity()? {
            let file = self.dir.join(super::database::FILE);
            found.damage.push(Damage { entry: "the registry".into(), file, what: said });
        }
        // Blobs that several entries share are read once.
        let mut read: HashMap<PathBuf, (String, u64)> = HashMap::new();
        let entries = self.list(None, None)?;
        for (done, entry) in entries.iter().enumerate() {
            tell(done, entries.len());
            found.entries += 1;
            if entry.kind == Kind::Index {
                self.verify_index(entry, &mut found);
                continue;
            }
            let listed = self.files(entry)?;
            let alone = match &listed[..] {
                [file] if !entry.directory => file.sha256 == entry.sha256,
                _ => entry.sha256 == entry.tree(),
            };
            if files::tree_hash(&listed) != entry.tree() || !alone {
                let what = "its list of files is not the one that was registered".into();
                let file = self.dir.join(super::database::FILE);
                found.damage.push(Damage { entry: entry.reference(), file, what });
            }
            for file in listed {
                let places = match &entry.place {
                    Some(place) if entry.directory => vec![place.join(&file.path)],
                    Some(place) => vec![place.clone()],
                    None => {
                        let (blob, link) = (files::blob(&self.dir, &file.sha256), self.link(entry, &file.path));
                        // A link that is gone is made again when it is used.
                        match link.exists() && !aside::same_file(&blob, &link) {
                            true => vec![blob, link],
                            false => vec![blob],
                        }
                    }
                };
                for place in places {
                    let known = read.get(&place).cloned().map_or_else(|| files::hash(&place, &mut |_| Ok(())), Ok);
                    let wrong = match &known {
                        Err(error) => Some(error.to_string()),
                        Ok((_, bytes)) if *bytes != file.bytes => {
                            Some(format!("has {bytes} bytes; {} were registered", file.bytes))
                        }
                        Ok((hash, _)) if *hash != file.sha256 => {
                            let short = |hash: &str| hash.get(..12).unwrap_or_default().to_string();
                            let (now, then) = (short(hash), short(&file.sha256));
                            Some(format!(
                                "has changed: its SHA-256 begins with {now}, that of what was registered with {then}"
                            ))
                        }
                        Ok(_) => None,
                    };
                    if let Ok((hash, bytes)) = known {
                        if read.insert(place.clone(), (hash, bytes)).is_none() {
                            found.files += 1;
                            found.bytes += bytes;
                        }
                    }
                    if let Some(what) = wrong {
                        found.damage.push(Damage { entry: entry.reference(), file: place, what });
                    }
                }
            }
        }
        Ok(found)
    }

    fn verify_index(&self, entry: &Entry, found: &mut Verified) {
        let place = entry.place.clone().unwrap_or_default();
        let done = Index::open_any(&place).and_then(|index| index.verify().and_then(|()| index.fingerprint()));
        match done {
            Ok(now) if now != entry.sha256 => found.changed.push(entry.reference()),
            Ok(_) => {}
            Err(error) => {
                found.damage.push(Damage { entry: entry.reference(), file: place, what: error.to_string() });
            }
        }
    }

    fn link(&self, entry: &Entry, file: &str) -> PathBuf {
        self.dir.join("trees").join(entry.tree()).join(file)
    }

    /// Takes out the bytes that no entry holds. Waits until nobody is bringing any in.
    pub fn collect(&self) -> Result<Collected, Error> {
        let _lock = self.lock(true)?;
        let (mut blobs, mut trees) = (HashSet::new(), HashSet::new());
        for entry in self.list(None, None)? {
            trees.insert(entry.tree().to_string());
            blobs.extend(self.files(&entry)?.into_iter().filter(|_| entry.place.is_none()).map(|file| file.sha256));
        }
        let mut done = Collected::default();
        for folder in entries_of(&self.dir.join("blobs"))? {
            for blob in entries_of(&folder)? {
                if !name(&blob).is_some_and(|name| blobs.contains(name)) {
                    let bytes = fs::symlink_metadata(&blob).map_or(0, |meta| meta.len());
                    remove(&blob)?;
                    (done.blobs, done.bytes) = (done.blobs + 1, done.bytes + bytes);
                }
            }
            let _ = fs::remove_dir(&folder); // where it is empty
        }
        for tree in entries_of(&self.dir.join("trees"))? {
            if !name(&tree).is_some_and(|name| trees.contains(name)) {
                remove(&tree)?;
                done.trees += 1;
            }
        }
        for left in entries_of(&self.dir.join("incoming"))? {
            remove(&left)?;
            done.leftovers += 1;
        }
        for gate in entries_of(&self.dir.join("gate"))? {
            // One that is under way is held by its process.
            if let Ok(_held) = run::lock(&gate) {
                remove(&gate)?;
                done.leftovers += 1;
            }
        }
        Ok(done)
    }

    /// Writes an entry's files below `out`, which must be new or empty, each read from the registry and checked.
    pub fn export(&self, entry: &Entry, out: &Path) -> Result<Vec<PathBuf>, Error> {
        if entry.kind == Kind::Index {
            let what = format!("{} is an index, registered in place: copy its directory", entry.reference());
            return Err(Error::Request(what));
        }
        aside::folder(out)?;
        if !entries_of(out)?.is_empty() {
            return Err(Error::file(out, "is not empty: name a new directory"));
        }
        let from = self.path(entry)?;
        let mut written = Vec::new();
        for file in self.files(entry)? {
            let (source, target) =
                (if entry.directory { from.join(&file.path) } else { from.clone() }, out.join(&file.path));
            let folder = target.parent().unwrap_or(out);
            fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
            let mut copy = Aside::create(&target)?;
            let (hash, _) = files::hash(&source, &mut |piece| copy.write(piece))?;
            if hash != file.sha256 {
                return Err(Error::file(&source, format!("is damaged: its SHA-256 should be {}", file.sha256)));
            }
            copy.commit()?;
            written.push(target);
        }
        Ok(written)
    }

    /// Registers, in place, the models in the caches of this machine: each snapshot of a repository in `hubs`, folders
    /// of Hugging Face's layout, and each model in `folders`.
    pub fn scan(&self, hubs: &[PathBuf], folders: &[PathBuf]) -> Result<Vec<Scanned>, Error> {
        let mut found: Vec<(String, PathBuf, String)> = Vec::new();
        for hub in hubs {
            for repository in entries_of(hub)? {
                let Some(id) = name(&repository).and_then(|name| name.strip_prefix("models--")) else { continue };
                let short = id.rsplit("--").next().unwrap_or(id);
                for revision in entries_of(&repository.join("snapshots"))? {
                    for model in models(&revision)? {
                        let file = model.file_stem().and_then(|stem| stem.to_str()).filter(|_| model.is_file());
                        let origin = format!("{}@{}", id.replace("--", "/"), name(&revision).unwrap_or_default());
                        found.push((file.unwrap_or(short).into(), model.clone(), origin));
                    }
                }
            }
        }
        for folder in folders {
            for at in [vec![folder.clone()], entries_of(folder)?].concat() {
                let within = models(&at)?;
                for model in &within {
                    // A folder of its own, such as smollm2, says it shorter than its file does.
                    let alone = within.len() == 1 && at != *folder;
                    let own = if alone { at.file_name() } else { model.file_stem() };
                    let own = own.and_then(|own| own.to_str()).unwrap_or_default();
                    found.push((own.into(), model.clone(), folder.display().to_string()));
                }
            }
        }
        let mut scanned = Vec::new();
        for (text, path, origin) in found {
            let Some(word) = names::name_of(&text) else { continue };
            let mut new = New::of(&word, Kind::Model, Source::InPlace(&path));
            new.metadata.insert("origin".into(), json!(origin));
            let entry = self.add(&new);
            scanned.push(Scanned { path, entry });
        }
        Ok(scanned)
    }
}

/// The models at a place: the directory where it is one, else the GGUF files in it.
fn models(at: &Path) -> Result<Vec<PathBuf>, Error> {
    if at.join("config.json").is_file() {
        return Ok(vec![at.to_path_buf()]);
    }
    let mut found = entries_of(at)?;
    found.retain(|path| path.extension().is_some_and(|extension| extension == "gguf") && path.is_file());
    Ok(found)
}

/// What a folder holds, by name; nothing where it is none.
fn entries_of(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let fail = |cause| Error::io(folder, cause);
    let entries = fs::read_dir(folder).map_err(fail)?;
    let mut found = entries.map(|entry| Ok(entry.map_err(fail)?.path())).collect::<Result<Vec<_>, Error>>()?;
    found.sort();
    Ok(found)
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn remove(path: &Path) -> Result<(), Error> {
    let folder = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let done = if folder { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    done.map_err(|cause| Error::io(path, cause))
}
