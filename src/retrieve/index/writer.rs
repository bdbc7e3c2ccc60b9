//! The one writer of an index: what makes documents visible, takes them away, and packs the segments anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use rusqlite::{params, Connection};

use super::database::{Database, Meta};
use super::segment::{self, Segment};
use super::PathFilter;
use crate::error::{quote, Error};
use crate::retrieve::chunk::Chunk;
use crate::retrieve::document::Document;

/// Bytes of rows that compaction puts into one segment.
const SEGMENT_BYTES: usize = 1 << 30;
/// Tries to take the lock, 20 ms apart.
const LOCK_TRIES: usize = 50;

/// An index held for writing, until dropped.
pub struct Writer {
    /// The index.
    pub dir: PathBuf,
    /// What holds for all of it.
    pub meta: Meta,
    /// Its database.
    pub database: Database,
    /// Which rows of each segment are in use: as in the database.
    alive: BTreeMap<i64, Vec<u32>>,
    _lock: fs::File,
}

/// A document ready to become visible.
pub struct Ready {
    /// Its path, source and hash.
    pub document: Document,
    /// The path of its file.
    pub source: String,
    /// Its passages.
    pub chunks: Vec<Chunk>,
    /// f32[passages, d].
    pub vectors: Vec<f32>,
}

/// One step of what becomes visible together, in order.
pub enum Step {
    /// A document, new or instead of the one of its path.
    Put(Ready),
    /// A file all of whose documents are there.
    Whole {
        /// Its path.
        source: String,
        /// SHA-256 of its bytes.
        hash: [u8; 32],
        /// Documents that it no longer has, by id.
        gone: Vec<i64>,
        /// Documents that are as they were, on another line.
        moved: Vec<(i64, u32)>,
    },
}

impl Step {
    /// Passages it brings.
    pub fn chunks(&self) -> usize {
        match self {
            Step::Put(ready) => ready.chunks.len(),
            Step::Whole { .. } => 0,
        }
    }
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Documents.
    pub documents: usize,
    /// Their passages.
    pub chunks: usize,
}

/// What compaction did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of the index before.
    pub bytes_before: u64,
    /// And after.
    pub bytes_after: u64,
    /// Rows that were dropped.
    pub dead_rows: usize,
}

impl Writer {
    /// Takes an index for writing; with `begin`, makes it where there is none. Files that no state speaks of are
    /// removed. An error where another process writes, or where the directory holds something else.
    pub fn open(dir: &Path, begin: Option<&Meta>) -> Result<Writer, Error> {
        if begin.is_some() {
            fs::create_dir_all(dir).map_err(|cause| Error::io(dir, cause))?;
            check_vacant(dir)?;
        } else if !dir.join(super::database::FILE).is_file() {
            return Err(Error::file(dir, "is no index: make one with `handmill index build`"));
        }
        let lock = lock(dir)?;
        let folder = dir.join(segment::FOLDER);
        if begin.is_some() {
            fs::create_dir_all(&folder).map_err(|cause| Error::io(&folder, cause))?;
            segment::sync_folder(dir)?;
        }
        let database = Database::write(dir, begin)?;
        let (meta, known) = (database.meta()?, database.segments()?);
        for known in &known {
            Segment::open(dir, known.id, known.rows, meta.d).map_err(|error| match error {
                Error::Io { path, cause } if cause.kind() == std::io::ErrorKind::NotFound => {
                    Error::file(&path, "is missing: the index is damaged, build it anew in another directory")
                }
                error => error,
            })?;
        }
        let alive = known.into_iter().map(|known| (known.id, known.alive)).collect();
        let writer = Writer { dir: dir.to_path_buf(), meta, database, alive, _lock: lock };
        writer.sweep();
        Ok(writer)
    }

    /// Removes the files of segments that no state speaks of: left by a run that was cut off, or by compaction.
    fn sweep(&self) {
        let known: BTreeSet<PathBuf> = self.alive.keys().map(|&number| segment::path(&self.dir, number)).collect();
        for entry in fs::read_dir(self.dir.join(segment::FOLDER)).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if !known.contains(&path) && (name.ends_with(".vectors") || name.ends_with(".partial")) {
                if let Err(error) = fs::remove_file(&path) {
                    log::warn!("{} stays behind: {error}", path.display());
                }
            }
        }
    }

    /// Makes steps visible, all at once.
    pub fn commit(&mut self, steps: &[Step]) -> Result<(), Error> {
        let mut rows: Vec<f32> = Vec::new();
        for step in steps {
            if let Step::Put(ready) = step {
                assert_eq!(ready.vectors.len(), ready.chunks.len() * self.meta.d, "a vector a passage");
                rows.extend(&ready.vectors);
            }
        }
        let count = rows.len() / self.meta.d;
        let number = self.next_segment()?;
        let mut alive = self.alive.clone();
        let sha256 = match count {
            0 => None,
            _ => Some(segment::write(&self.dir, number, self.meta.d, &rows)?),
        };
        self.database.with(|connection| {
            let transaction = connection.unchecked_transaction()?;
            let mut touched = BTreeSet::new();
            if let Some(sha256) = &sha256 {
                let bits = filled(count);
                transaction.execute(
                    "INSERT INTO segments VALUES (?1, ?2, ?3, ?4)",
                    params![number, count as i64, sha256, blob(&bits)],
                )?;
                alive.insert(number, bits);
                set_next(&transaction, number + 1)?;
            }
            let mut next_row = 0;
            for step in steps {
                put(&transaction, step, number, &mut next_row, &mut alive, &mut touched)?;
            }
            store(&transaction, &alive, &touched)?;
            transaction.commit()
        })?;
        self.alive = alive;
        Ok(())
    }

    /// Removes the documents that `gone` chooses by path.
    pub fn remove_where(&mut self, gone: impl Fn(&str, &str) -> bool) -> Result<Removed, Error> {
        let mut alive = self.alive.clone();
        let removed = self.database.with(|connection| {
            let transaction = connection.unchecked_transaction()?;
            let list = |query: &str| -> rusqlite::Result<Vec<(i64, String, String)>> {
                let mut query = transaction.prepare(query)?;
                let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
                let mut all: Vec<(i64, String, String)> = rows.collect::<Result<_, _>>()?;
                all.retain(|(_, path, source)| gone(path, source));
                Ok(all)
            };
            let (mut touched, mut removed) = (BTreeSet::new(), Removed::default());
            for (id, _, source) in &list("SELECT id, path, source FROM documents")? {
                removed.chunks += forget(&transaction, *id, &mut alive, &mut touched)?;
                removed.documents += 1;
                // The file is read again when it is given again.
                transaction.execute("DELETE FROM sources WHERE path = ?1", [source])?;
            }
            for (_, source, _) in &list("SELECT 0, path, path FROM sources")? {
                transaction.execute("DELETE FROM sources WHERE path = ?1", [source])?;
            }
            store(&transaction, &alive, &touched)?;
            transaction.commit()?;
            Ok(removed)
        })?;
        self.alive = alive;
        Ok(removed)
    }

    /// Brings the log into the database's file, where no reader holds it back; none is waited for.
    pub fn settle(&self) {
        let _ = self.database.connection.busy_timeout(std::time::Duration::ZERO);
        let done = self.database.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if let Err(error) = done {
            log::debug!("the log stays for now: {error}");
        }
    }

    fn next_segment(&self) -> Result<i64, Error> {
        let next = "SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'next_segment'";
        let next: i64 = self.database.with(|connection| connection.query_row(next, [], |row| row.get(0)))?;
        let last = self.alive.last_key_value().map_or(0, |(&number, _)| number);
        match next > last && next < i64::MAX {
            true => Ok(next),
            false => Err(self.database.wrong(format!("the next segment is {next} after {last}"))),
        }
    }
}

/// Takes the lock of an index. A moment's patience: another writer may be about to end.
fn lock(dir: &Path) -> Result<fs::File, Error> {
    let path = dir.join(".lock");
    let file = fs::File::create(&path).map_err(|cause| Error::io(&path, cause))?;
    for _ in 0..LOCK_TRIES {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(std::time::Duration::from_millis(20)),
            Err(fs::TryLockError::Error(cause)) => return Err(Error::io(&path, cause)),
        }
    }
    Err(Error::file(dir, "is being written by another process: wait for it, then run the command again"))
}

/// An error for a directory that holds something that is no index.
fn check_vacant(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(|cause| Error::io(dir, cause))? {
        let name = entry.map_err(|cause| Error::io(dir, cause))?.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with(super::database::FILE) || name == ".lock" || name == segment::FOLDER) {
            let what = format!("holds {}, which is no part of an index: name an empty directory", quote(&name));
            return Err(Error::file(dir, what));
        }
    }
    Ok(())
}

/// Bits of `rows` rows, all set.
fn filled(rows: usize) -> Vec<u32> {
    (0..rows.div_ceil(32)).map(|word| if rows - word * 32 >= 32 { !0 } else { (1 << (rows % 32)) - 1 }).collect()
}

fn blob(bits: &[u32]) -> Vec<u8> {
    bits.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn set_next(connection: &Connection, number: i64) -> rusqlite::Result<()> {
    connection.execute("UPDATE meta SET value = ?1 WHERE key = 'next_segment'", [number.to_string()])?;
    Ok(())
}

fn store(connection: &Connection, alive: &BTreeMap<i64, Vec<u32>>, touched: &BTreeSet<i64>) -> rusqlite::Result<()> {
    for number in touched {
        if let Some(bits) = alive.get(number) {
            connection.execute("UPDATE segments SET alive = ?2 WHERE id = ?1", params![number, blob(bits)])?;
        }
    }
    Ok(())
}

/// Takes a document away; gives the count of its passages.
fn forget(
    connection: &Connection,
    id: i64,
    alive: &mut BTreeMap<i64, Vec<u32>>,
    touched: &mut BTreeSet<i64>,
) -> rusqlite::Result<usize> {
    let mut query = connection.prepare("SELECT segment, row FROM chunks WHERE document = ?1")?;
    let mut rows = query.query([id])?;
    while let Some(row) = rows.next()? {
        let (segment, at): (i64, u32) = (row.get(0)?, row.get(1)?);
        if let Some(word) = alive.get_mut(&segment).and_then(|bits| bits.get_mut(at as usize / 32)) {
            *word &= !(1 << (at % 32));
            touched.insert(segment);
        }
    }
    drop(rows);
    let count = connection.execute("DELETE FROM chunks WHERE document = ?1", [id])?;
    connection.execute("DELETE FROM documents WHERE id = ?1", [id])?;
    Ok(count)
}

fn put(
    connection: &Connection,
    step: &Step,
    segment: i64,
    next_row: &mut i64,
    alive: &mut BTreeMap<i64, Vec<u32>>,
    touched: &mut BTreeSet<i64>,
) -> rusqlite::Result<()> {
    match step {
        Step::Put(ready) => {
            let path = &ready.document.path;
            let mut query = connection.prepare("SELECT id FROM documents WHERE path = ?1")?;
            let before: Vec<i64> = query.query_map([path], |row| row.get(0))?.collect::<Result<_, _>>()?;
            for id in before {
                forget(connection, id, alive, touched)?;
            }
            connection.execute(
                "INSERT INTO documents(path, source, hash) VALUES (?1, ?2, ?3)",
                params![path, ready.source, &ready.document.hash[..]],
            )?;
            let id = connection.last_insert_rowid();
            let mut insert = connection.prepare("INSERT INTO chunks VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?;
            for (chunk, ordinal) in ready.chunks.iter().zip(0i64..) {
                let (first, last) = chunk.lines;
                insert.execute(params![segment, *next_row, id, ordinal, first, last, chunk.heading, chunk.text])?;
                *next_row += 1;
            }
        }
        Step::Whole { source, hash, gone, moved } => {
            for &id in gone {
                forget(connection, id, alive, touched)?;
            }
            for (id, line) in moved {
                let update = "UPDATE chunks SET first_line = ?2, last_line = ?2 WHERE document = ?1";
                connection.execute(update, params![id, line])?;
            }
            connection.execute("INSERT OR REPLACE INTO sources VALUES (?1, ?2)", params![source, &hash[..]])?;
        }
    }
    Ok(())
}

/// Removes documents from an index: those of each path, of each file, below each folder, or that match each glob. An
/// error where a pattern chooses none, and then nothing is removed.
pub fn remove(dir: &Path, patterns: &[String]) -> Result<Removed, Error> {
    let filters = patterns.iter().map(|pattern| PathFilter::new(pattern)).collect::<Result<Vec<_>, _>>()?;
    let mut writer = Writer::open(dir, None)?;
    let paths: Vec<String> = writer.database.with(|connection| {
        let mut query = connection.prepare("SELECT path FROM documents")?;
        let paths = query.query_map([], |row| row.get(0))?;
        paths.collect()
    })?;
    for (pattern, filter) in patterns.iter().zip(&filters) {
        if !paths.iter().any(|path| filter.allows(path)) {
            let what = format!("holds no document at {}: `handmill index info --list` lists them", quote(pattern));
            return Err(Error::file(dir, what));
        }
    }
    let removed = writer.remove_where(|path, _| filters.iter().any(|filter| filter.allows(path)))?;
    writer.settle();
    Ok(removed)
}

/// Writes an index's segments anew, in the order of documents' paths, without the rows of passages that are gone.
pub fn compact(dir: &Path) -> Result<Compacted, Error> {
    let mut writer = Writer::open(dir, None)?;
    let d = writer.meta.d;
    let size = |dir: &Path| {
        let files = fs::read_dir(dir).into_iter().chain(fs::read_dir(dir.join(segment::FOLDER))).flatten().flatten();
        files.flat_map(|entry| entry.metadata()).filter(|meta| meta.is_file()).map(|meta| meta.len()).sum::<u64>()
    };
    writer.settle();
    let bytes_before = size(dir);
    let known = writer.database.segments()?;
    let segments: BTreeMap<i64, Segment> = known
        .iter()
        .map(|known| Ok((known.id, Segment::open(dir, known.id, known.rows, d)?)))
        .collect::<Result<_, Error>>()?;
    for known in &known {
        segments[&known.id].verify(&known.sha256)?;
    }
    let order: Vec<(i64, i64)> = writer.database.with(|connection| {
        let mut query = connection
            .prepare("SELECT segment, row FROM chunks JOIN documents ON document = id ORDER BY path, ordinal")?;
        let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    })?;
    let total: usize = segments.values().map(|segment| segment.rows).sum();

    let mut written = Vec::new();
    let first = writer.next_segment()?;
    for (group, number) in order.chunks((SEGMENT_BYTES / 4 / d).max(1)).zip(first..) {
        let mut rows: Vec<f32> = Vec::with_capacity(group.len() * d);
        for &(segment, row) in group {
            let at = segments.get(&segment).filter(|segment| (0..segment.rows as i64).contains(&row));
            let segment = at.ok_or_else(|| writer.database.wrong(format!("segment {segment} has no row {row}")))?;
            rows.extend(segment.row(row as usize));
        }
        written.push((number, segment::write(dir, number, d, &rows)?, group));
    }
    writer.database.with(|connection| {
        let transaction = connection.unchecked_transaction()?;
        transaction.execute("DELETE FROM segments", [])?;
        for (number, sha256, group) in &written {
            transaction.execute(
                "INSERT INTO segments VALUES (?1, ?2, ?3, ?4)",
                params![number, group.len() as i64, sha256, blob(&filled(group.len()))],
            )?;
            let mut update =
                transaction.prepare("UPDATE chunks SET segment = ?1, row = ?2 WHERE segment = ?3 AND row = ?4")?;
            for (&(segment, row), at) in group.iter().zip(0i64..) {
                update.execute((number, at, segment, row))?;
            }
            set_next(&transaction, number + 1)?;
        }
        transaction.commit()
    })?;
    drop(segments);
    writer.settle();
    writer.alive = written.into_iter().map(|(number, _, group)| (number, filled(group.len()))).collect();
    writer.sweep();
    // A reader may hold the old pages; the next compaction gets them then.
    if let Err(error) = writer.database.connection.execute_batch("VACUUM") {
        log::debug!("the database keeps its size for now: {error}");
    }
    writer.settle();
    Ok(Compacted { bytes_before, bytes_after: size(dir), dead_rows: total - order.len() })
}
