//! Files that appear whole or not at all: written under another name in the same directory, then renamed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Names tried for the file aside: others are left over from runs that were cut off.
const NAMES: u32 = 100;

/// A file on its way to `path`. Dropped before [`Aside::commit`], it leaves nothing behind.
pub struct Aside {
    path: PathBuf,
    temporary: PathBuf,
    /// None once committed.
    writer: Option<BufWriter<File>>,
}

impl Aside {
    /// Begins the file. An error names the directory's fault, or says that `path` is itself a directory.
    pub fn create(path: &Path) -> Result<Aside, Error> {
        let Some(name) = path.file_name().filter(|_| !path.is_dir()) else {
            return Err(Error::file(path, "is a directory; name a file to write"));
        };
        let name = name.to_string_lossy();
        for number in 0..NAMES {
            let temporary = path.with_file_name(format!(".{name}.{}-{number}.partial", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&temporary) {
                Ok(file) => {
                    let writer = Some(BufWriter::with_capacity(1 << 20, file));
                    return Ok(Aside { path: path.to_path_buf(), temporary, writer });
                }
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                    return Err(Error::file(path, "cannot be written: its directory does not exist, make it first"));
                }
                Err(cause) => return Err(Error::io(path, cause)),
            }
        }
        Err(Error::file(path, format!("has {NAMES} unfinished copies beside it (.{name}.*.partial): remove them")))
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let writer = self.writer.as_mut().expect("a file aside is written before it is committed");
        writer.write_all(bytes).map_err(|cause| Error::io(&self.path, cause))
    }

    /// Brings the bytes to the disk and gives the file its name, replacing what had it.
    pub fn commit(mut self) -> Result<(), Error> {
        let fail = |cause: io::Error| Error::io(&self.path, cause);
        let writer = self.writer.take().expect("a file aside is committed once");
        let done = writer.into_inner().map_err(|error| error.into_error()).and_then(|file| file.sync_all());
        let done = done.and_then(|()| std::fs::rename(&self.temporary, &self.path));
        done.map_err(|cause| {
            let _ = std::fs::remove_file(&self.temporary); // the first error is the one to tell
            fail(cause)
        })
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            if let Err(error) = std::fs::remove_file(&self.temporary) {
                log::warn!("{} stays behind: {error}", self.temporary.display());
            }
        }
    }
}

/// True where both names are of one file.
pub fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        id(a).is_some() && id(a) == id(b)
    }
    #[cfg(not(unix))]
    {
        let real = |path: &Path| std::fs::canonicalize(path).ok();
        real(a).is_some() && real(a) == real(b)
    }
}

/// Makes a directory to write into, where there is none.
pub fn folder(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => Error::file(path, "is a file; name a directory to write"),
        _ => Error::io(path, cause),
    })
}

/// Writes a whole file of `bytes`.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = Aside::create(path)?;
    file.write(bytes)?;
    file.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        let count = || std::fs::read_dir(folder.path()).unwrap().count();

        let mut file = Aside::create(&path).unwrap();
        file.write(b"half").unwrap();
        assert!(!path.exists());
        drop(file);
        assert_eq!(count(), 0, "what was dropped is gone");

        write(&path, b"first").unwrap();
        write(&path, b"second").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert_eq!(count(), 1);

        let error = Aside::create(folder.path()).err().unwrap().to_string();
        assert!(error.contains("is a directory"), "{error}");
        let error = Aside::create(&folder.path().join("no/such/x.bin")).err().unwrap().to_string();
        assert!(error.contains("no/such/x.bin"), "{error}");
    }
}
