//! Which files an index is made of: those below the folders a person names, of a known kind, reached by no link.

use std::collections::HashSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::document::Kind;
use crate::error::{quote, Error};

/// A longer file is not read.
pub const MAX_FILE: u64 = 256 << 20;

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// As it is named in an index and in citations: as the person named the folder, then `/` between names.
    pub path: String,
    /// Where it is.
    pub file: PathBuf,
    /// How it is read.
    pub kind: Kind,
    /// Bytes it has.
    pub bytes: u64,
}

/// A file or folder that was left out, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// As [`Source::path`].
    pub path: String,
    /// Why, in words.
    pub reason: String,
}

/// What lies below the folders.
#[derive(Default)]
pub struct Found {
    /// By path.
    pub sources: Vec<Source>,
    /// By path.
    pub skipped: Vec<Skipped>,
    /// Files of kinds that hold no text known here.
    pub other: usize,
}

/// The files below `roots`, each a folder or a file. Hidden names and links are not followed. An error for a root
/// that is not there.
pub fn scan(roots: &[PathBuf]) -> Result<Found, Error> {
    let (mut found, mut seen) = (Found::default(), HashSet::new());
    for root in roots {
        let name = display(root).ok_or_else(|| Error::file(root, "is a name that is no UTF-8: rename it"))?;
        let real = root.canonicalize().map_err(|cause| Error::io(root, cause))?;
        if real.is_dir() {
            walk(name, real, &mut found, &mut seen);
        } else {
            file(name, real, &mut found, &mut seen, true);
        }
    }
    found.sources.sort_by(|a, b| a.path.cmp(&b.path));
    found.skipped.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

impl Found {
    /// Leaves a file or folder out.
    pub fn skip(&mut self, path: String, reason: impl Into<String>) {
        self.skipped.push(Skipped { path, reason: reason.into() });
    }
}

/// A path as a person named it, `.` taken out and `/` between its names; empty for the folder they stand in.
pub fn display(path: &Path) -> Option<String> {
    let mut text = String::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::RootDir => text.push('/'),
            part => {
                if !text.is_empty() && !text.ends_with('/') {
                    text.push('/');
                }
                text += part.as_os_str().to_str()?;
            }
        }
    }
    Some(text)
}

/// Everything below a folder.
fn walk(name: String, folder: PathBuf, found: &mut Found, seen: &mut HashSet<PathBuf>) {
    let mut folders = vec![(name, folder)];
    while let Some((name, folder)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(cause) => {
                found.skip(name, format!("cannot be read: {cause}"));
                continue;
            }
        };
        for entry in entries {
            let (entry, kind) = match entry.and_then(|entry| Ok((entry.file_type()?, entry))) {
                Ok((kind, entry)) => (entry, kind),
                Err(cause) => {
                    found.skip(name.clone(), format!("cannot be read: {cause}"));
                    break;
                }
            };
            let own = entry.file_name();
            if own.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let below = |own: &str| if name.is_empty() { own.to_string() } else { format!("{name}/{own}") };
            let path = match own.to_str() {
                Some(own) => below(own).replace("//", "/"),
                None => {
                    found.skip(below(&own.to_string_lossy()), "has a name that is no UTF-8: rename it");
                    continue;
                }
            };
            if kind.is_symlink() {
                found.skip(path, "is a link: links are not followed, name what it points at");
            } else if kind.is_dir() {
                folders.push((path, entry.path()));
            } else if kind.is_file() {
                file(path, entry.path(), found, seen, false);
            } else {
                found.skip(path, "is no ordinary file");
            }
        }
    }
}

/// One file, `named` by the person or met below a folder.
fn file(path: String, place: PathBuf, found: &mut Found, seen: &mut HashSet<PathBuf>, named: bool) {
    let Some(kind) = Kind::of(&place) else {
        match named {
            true => found.skip(path, format!("is of no kind that can be read: {}", Kind::KNOWN.join(", "))),
            false => found.other += 1,
        }
        return;
    };
    match fs::symlink_metadata(&place) {
        Ok(meta) if !meta.is_file() => found.skip(path, "is no ordinary file"),
        Ok(meta) if meta.len() > MAX_FILE => {
            found.skip(path, format!("has {} MB; at most {} are read: split it", meta.len() >> 20, MAX_FILE >> 20));
        }
        Ok(meta) => {
            if seen.insert(place.clone()) {
                found.sources.push(Source { path, file: place, kind, bytes: meta.len() });
            }
        }
        Err(cause) => found.skip(path, format!("cannot be read: {cause}")),
    }
}

/// The bytes of a source; the reason where there are none to have.
pub fn read(source: &Source) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let open = fs::File::open(&source.file).map_err(|cause| format!("cannot be read: {cause}"))?;
    let mut bytes = Vec::new();
    open.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|cause| format!("cannot be read: {cause}"))?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(format!("has grown beyond {} MB: split it", MAX_FILE >> 20)),
        false => Ok(bytes),
    }
}

/// What was left out, in lines for a person: the first `count`, then how many more.
pub fn tell(skipped: &[Skipped], count: usize) -> Vec<String> {
    let line = |one: &Skipped| format!("left out: {} {}", quote(&one.path), one.reason);
    let mut lines: Vec<String> = skipped.iter().take(count).map(line).collect();
    if skipped.len() > count {
        lines.push(format!("left out: {} more (--json lists them all)", skipped.len() - count));
    }
    lines
}
