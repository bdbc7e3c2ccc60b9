//! Bytes by their SHA-256, each once, and folders of links to them in which an entry is used in place.
//!
//! ```text
//! incoming/PID-N     bytes on their way in
//! blobs/ab/ab12..    a file's bytes, under their hash; renamed there when they are whole and on the disk
//! trees/cd34..       an entry's files under their own names; renamed there when all links are made
//! ```
//!
//! A model's files are linked where they can be, since they are large and nobody writes into them; all else is copied,
//! so that no one who edits a file in place changes what was registered. Copies cannot be written to.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::Kind;
use crate::aside::same_file;
use crate::error::{quote, Error};
use crate::model::adapter::{hex, sha256, PROMPT};

/// Files of an entry at most, and folders within folders.
const MAX_FILES: usize = 100_000;
const MAX_DEPTH: usize = 16;

/// A file of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its path in the entry, `/` between names.
    pub path: String,
    /// Of its bytes.
    pub sha256: String,
    /// Their count.
    pub bytes: u64,
}

/// The files that an entry of this kind has at `source`: names in the entry, and where they are, by name.
pub fn list(source: &Path, kind: Kind) -> Result<Vec<(String, PathBuf)>, Error> {
    if !source.is_dir() {
        let meta = fs::metadata(source).map_err(|cause| Error::io(source, cause))?;
        if !meta.is_file() {
            return Err(Error::file(source, "is neither a file nor a directory"));
        }
        let name = source.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::file(source, "has a name that is no UTF-8: rename it"))?;
        return Ok(vec![(name.into(), source.into())]);
    }
    if kind == Kind::Adapter {
        // A run's directory holds its checkpoints and records too: they are no part of the adapter.
        let layout = source.join(PROMPT).is_file().then_some(PROMPT);
        let names = ["adapter_config.json", "adapter_model.safetensors"].into_iter().chain(layout);
        return Ok(names.map(|name| (name.into(), source.join(name))).collect());
    }
    let (mut found, mut folders) = (Vec::new(), vec![(String::new(), source.to_path_buf(), 0)]);
    while let Some((prefix, folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|cause| Error::io(&folder, cause))? {
            let path = entry.map_err(|cause| Error::io(&folder, cause))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(|| Error::file(&path, "has a name that is no UTF-8: rename it"))?;
            if name.starts_with('.') {
                continue;
            }
            let own = format!("{prefix}{name}");
            check_path(&own).map_err(|what| Error::file(&path, what))?;
            // Links to files are followed, as a downloaded model's are; links to folders may go round in circles.
            let link = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink());
            let meta = fs::metadata(&path).map_err(|cause| Error::io(&path, cause))?;
            if meta.is_file() {
                found.push((own, path));
            } else if meta.is_dir() && !link && depth < MAX_DEPTH {
                folders.push((format!("{own}/"), path, depth + 1));
            } else {
                let what = "is a link to a folder, no ordinary file, or too deep: take it out, or register in place";
                return Err(Error::file(&path, what));
            }
            if found.len() > MAX_FILES {
                return Err(Error::file(source, format!("holds more than {MAX_FILES} files: name what is to be kept")));
            }
        }
    }
    if found.is_empty() {
        return Err(Error::file(source, "holds no file: there is nothing to register"));
    }
    found.sort();
    Ok(found)
}

/// Refuses a path in an entry that would lead out of it.
pub fn check_path(path: &str) -> Result<(), String> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    let names = path.split('/').all(|name| !name.is_empty() && name != "." && name != "..");
    match plain && names && !path.contains(['\0', '\\']) && path.len() <= 4096 {
        true => Ok(()),
        false => Err(format!("{} is no path inside an entry", quote(path))),
    }
}

/// The hash of a list of files, by name.
pub fn tree_hash(files: &[Stored]) -> String {
    let line = |file: &Stored| format!("{}  {}  {}\n", file.sha256, file.bytes, file.path);
    hex(&sha256(files.iter().map(line).collect::<String>().as_bytes()))
}

/// A file's SHA-256 and length, read a piece at a time; `each` gets what is read.
pub fn hash(path: &Path, each: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(String, u64), Error> {
    let fail = |cause| Error::io(path, cause);
    let mut file = File::open(path).map_err(fail)?;
    let (mut hasher, mut piece, mut bytes) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        let read = match file.read(&mut piece) {
            Ok(0) => return Ok((hex(&hasher.finalize()), bytes)),
            Ok(read) => read,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
            Err(cause) => return Err(fail(cause)),
        };
        hasher.update(&piece[..read]);
        bytes += read as u64;
        each(&piece[..read])?;
    }
}

/// True for a SHA-256 in hexadecimal.
pub fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Where bytes of this hash lie.
pub fn blob(dir: &Path, hash: &str) -> PathBuf {
    dir.join("blobs").join(hash.get(..2).unwrap_or("xx")).join(hash)
}

/// A path of its own below `incoming`.
fn incoming(dir: &Path) -> Result<PathBuf, Error> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let folder = dir.join("incoming");
    fs::create_dir_all(&folder).map_err(|cause| Error::io(&folder, cause))?;
    loop {
        // What is there already is left over from a process of the same number.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{}-{number}", std::process::id()));
        if fs::symlink_metadata(&path).is_err() {
            return Ok(path);
        }
    }
}

/// Keeps a file's bytes; `link` asks for a link to it rather than a copy.
pub fn keep(dir: &Path, source: &Path, link: bool) -> Result<(String, u64), Error> {
    let aside = incoming(dir)?;
    let done = keep_at(dir, source, link, &aside);
    if done.is_err() {
        let _ = fs::remove_file(&aside); // the first error is the one to tell
    }
    done
}

fn keep_at(dir: &Path, source: &Path, link: bool, aside: &Path) -> Result<(String, u64), Error> {
    let fail = |cause| Error::io(aside, cause);
    // A link to a link would be another link; its target is what is meant.
    let linked = link && fs::canonicalize(source).and_then(|real| fs::hard_link(real, aside)).is_ok();
    let (hash, bytes) = match linked {
        true => hash(aside, &mut |_| Ok(()))?,
        false => {
            let mut copy = File::create_new(aside).map_err(fail)?;
            let done = hash(source, &mut |piece| copy.write_all(piece).map_err(fail))?;
            copy.sync_all().map_err(fail)?;
            read_only(aside).map_err(fail)?;
            done
        }
    };
    place(dir, aside, &hash)?;
    Ok((hash, bytes))
}

/// Keeps bytes.
pub fn keep_bytes(dir: &Path, bytes: &[u8]) -> Result<String, Error> {
    let (aside, hash) = (incoming(dir)?, hex(&sha256(bytes)));
    let write = || {
        let mut file = File::create_new(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        read_only(&aside)
    };
    let done = write().map_err(|cause| Error::io(&aside, cause)).and_then(|()| place(dir, &aside, &hash));
    if done.is_err() {
        let _ = fs::remove_file(&aside); // the first error is the one to tell
    }
    done.map(|()| hash)
}

/// Gives bytes that are whole their place. The same ones that are there already stay, as they are in use; damaged ones
/// give way.
fn place(dir: &Path, aside: &Path, hash: &str) -> Result<(), Error> {
    let path = blob(dir, hash);
    let folder = path.parent().unwrap_or(dir);
    fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
    if is_of(&path, hash) || same_file(&path, aside) {
        return fs::remove_file(aside).map_err(|cause| Error::io(aside, cause));
    }
    fs::rename(aside, &path).and_then(|()| sync(folder)).map_err(|cause| Error::io(&path, cause))
}

/// True for a file of this SHA-256.
fn is_of(path: &Path, sha256: &str) -> bool {
    path.is_file() && hash(path, &mut |_| Ok(())).is_ok_and(|(found, _)| found == sha256)
}

/// Brings a folder's names to the disk.
fn sync(folder: &Path) -> io::Result<()> {
    match cfg!(unix) {
        true => File::open(folder)?.sync_all(),
        false => Ok(()),
    }
}

/// Nobody writes into bytes that have a name by their hash. Elsewhere such a file could not be removed either.
fn read_only(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        let mut permissions = fs::metadata(path)?.permissions();
        permissions.set_readonly(true);
        fs::set_permissions(path, permissions)?;
    }
    Ok(())
}

/// The folder in which an entry's files stand under their names, made where it is missing or incomplete; where
/// `careful`, also where a file in it is no link to what is kept and has other bytes.
pub fn tree(dir: &Path, hash: &str, files: &[Stored], careful: bool) -> Result<PathBuf, Error> {
    let path = dir.join("trees").join(hash);
    let whole = |path: &Path| {
        let there = |file: &Stored| {
            let link = path.join(&file.path);
            fs::metadata(&link).is_ok_and(|meta| meta.len() == file.bytes)
                && (!careful || same_file(&link, &blob(dir, &file.sha256)) || is_of(&link, &file.sha256))
        };
        files.iter().all(there)
    };
    if whole(&path) {
        return Ok(path);
    }
    let aside = incoming(dir)?;
    for file in files {
        check_path(&file.path).map_err(|what| Error::file(dir, what))?;
        let (from, to) = (blob(dir, &file.sha256), aside.join(&file.path));
        let folder = to.parent().unwrap_or(&aside);
        fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
        // Some file systems know no links, and others allow so many.
        let made = fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(|_| ()));
        made.map_err(|cause| Error::io(&from, cause))?;
    }
    let trees = dir.join("trees");
    fs::create_dir_all(&trees).map_err(|cause| Error::io(&trees, cause))?;
    if path.exists() && !whole(&path) {
        // Someone took files out of it; what is in it is links.
        let gone = incoming(dir)?;
        fs::rename(&path, &gone).map_err(|cause| Error::io(&path, cause))?;
        let _ = fs::remove_dir_all(&gone); // else the next collection does
    }
    match fs::rename(&aside, &path) {
        Ok(()) => Ok(path),
        // Another process made it meanwhile.
        Err(_) if whole(&path) => {
            let _ = fs::remove_dir_all(&aside); // else the next collection does
            Ok(path)
        }
        Err(cause) => Err(Error::io(&path, cause)),
    }
}
