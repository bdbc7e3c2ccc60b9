//! The index's database: which segments there are, which of their rows are in use, and what each row says.
//!
//! SQLite's transactions make what is written visible at once or not at all. Nothing in it is believed before it is
//! checked: it is a file like any other.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags};

use super::segment::MAX_D;
use crate::error::{quote, Error};
use crate::retrieve::chunk::Chunking;

/// The database's file in an index.
pub const FILE: &str = "index.sqlite";
/// "HMIX": SQLite's application id of an index.
const APPLICATION: i64 = 0x484d_4958;
/// Of the tables below.
const VERSION: i64 = 1;

/// One row of `chunks` for each row in use of a segment. `alive` has bit r % 8 of byte r / 8 set for it; a segment's
/// other rows belong to documents that are gone.
const SCHEMA: &str = "
    CREATE TABLE meta(key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE segments(id INTEGER PRIMARY KEY, rows INTEGER NOT NULL, sha256 TEXT NOT NULL, alive BLOB NOT NULL);
    CREATE TABLE sources(path TEXT PRIMARY KEY NOT NULL, hash BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE documents(id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, source TEXT NOT NULL,
        hash BLOB NOT NULL);
    CREATE INDEX documents_source ON documents(source);
    CREATE TABLE chunks(segment INTEGER NOT NULL, row INTEGER NOT NULL, document INTEGER NOT NULL,
        ordinal INTEGER NOT NULL, first_line INTEGER NOT NULL, last_line INTEGER NOT NULL, heading TEXT NOT NULL,
        text TEXT NOT NULL, PRIMARY KEY(segment, row)) WITHOUT ROWID;
    CREATE INDEX chunks_document ON chunks(document, ordinal);";

/// What holds for the whole index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Of the embedding model, as [`crate::model::generate::Embedder::model_hash`] gives it.
    pub model_hash: String,
    /// Numbers of a vector.
    pub d: usize,
    /// How documents are cut.
    pub chunking: Chunking,
}

/// A segment as the database knows it.
pub struct Known {
    /// Its number.
    pub id: i64,
    /// Rows of its file.
    pub rows: usize,
    /// Of its rows' bytes.
    pub sha256: String,
    /// Which rows are in use, as [`crate::retrieve::topk::search`] takes a filter.
    pub alive: Vec<u32>,
}

/// An open database.
pub struct Database {
    /// Its file.
    pub path: PathBuf,
    /// SQLite's handle.
    pub connection: Connection,
}

impl Database {
    /// Opens for reading; a transaction is begun, so all that is read is one state. An error where there is no index.
    pub fn read(index: &Path) -> Result<Database, Error> {
        let path = index.join(FILE);
        if !path.is_file() {
            return Err(Error::file(index, "is no index: make one with `handmill index build`"));
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let open = |immutable: bool| {
            let name = path.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
            let connection = match immutable {
                false => Connection::open_with_flags(&path, flags),
                true => {
                    Connection::open_with_flags(format!("file:{name}?immutable=1"), flags | OpenFlags::SQLITE_OPEN_URI)
                }
            }?;
            ready(&connection)?;
            connection.execute_batch("BEGIN; SELECT count(*) FROM sqlite_master;")?;
            Ok(connection)
        };
        let connection = open(false).or_else(|error: rusqlite::Error| {
            // Readers of a write-ahead log need to write beside it. Where they cannot, and nothing is in the log, the
            // database alone is the whole state.
            let log = std::fs::metadata(index.join(format!("{FILE}-wal"))).map_or(0, |meta| meta.len());
            match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::CannotOpen | rusqlite::ErrorCode::ReadOnly) if log == 0 => open(true),
                _ => Err(error),
            }
        });
        let database = Database { connection: connection.map_err(|error| fault(&path, error))?, path };
        if database.pragma("user_version")? == 0 && database.pragma("application_id")? == 0 {
            return Err(Error::file(index, "holds an index that was never begun: run `handmill index build` again"));
        }
        database.check()?;
        Ok(database)
    }

    /// Opens for writing, and makes the database where there is none, or one that was cut off in its making.
    pub fn write(index: &Path, begin: Option<&Meta>) -> Result<Database, Error> {
        let path = index.join(FILE);
        if begin.is_none() && !path.is_file() {
            return Err(Error::file(index, "is no index: make one with `handmill index build`"));
        }
        let create = if begin.is_some() { OpenFlags::SQLITE_OPEN_CREATE } else { OpenFlags::empty() };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | create;
        let connection = Connection::open_with_flags(&path, flags).map_err(|error| fault(&path, error))?;
        let database = Database { path, connection };
        database.with(|connection| {
            ready(connection)?;
            // Every commit reaches the disk before it counts; what is deleted is overwritten.
            connection.execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=ON;")
        })?;
        let empty = database.pragma("user_version")? == 0 && database.pragma("application_id")? == 0;
        match begin {
            Some(meta) if empty => {
                let chunking = serde_json::to_string(&meta.chunking).expect("numbers are JSON");
                database.with(|connection| {
                    let transaction = connection.unchecked_transaction()?;
                    transaction.execute_batch(SCHEMA)?;
                    let mut insert = transaction.prepare("INSERT INTO meta VALUES (?1, ?2)")?;
                    insert.execute(["model_hash", &meta.model_hash])?;
                    insert.execute(["d", &meta.d.to_string()])?;
                    insert.execute(["chunking", &chunking])?;
                    insert.execute(["next_segment", "1"])?;
                    drop(insert);
                    transaction.execute_batch(&format!(
                        "PRAGMA application_id={APPLICATION}; PRAGMA user_version={VERSION};"
                    ))?;
                    transaction.commit()
                })?;
            }
            None if empty => {
                return Err(Error::file(index, "holds an index that was never begun: run `handmill index build`"));
            }
            _ => database.check()?,
        }
        Ok(database)
    }

    /// Runs SQL; its errors name the file.
    pub fn with<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        work(&self.connection).map_err(|error| fault(&self.path, error))
    }

    /// What is wrong with what the database says.
    pub fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("{what}: the index is damaged, build it anew"))
    }

    fn pragma(&self, name: &str) -> Result<i64, Error> {
        self.with(|connection| connection.pragma_query_value(None, name, |row| row.get(0)))
    }

    fn check(&self) -> Result<(), Error> {
        if self.pragma("application_id")? != APPLICATION {
            return Err(Error::file(&self.path, "is the database of some other program, no index"));
        }
        match self.pragma("user_version")? {
            VERSION => Ok(()),
            other => {
                let what = format!("is an index of version {other}, this program knows {VERSION}: build it anew");
                Err(Error::file(&self.path, what))
            }
        }
    }

    /// What holds for the whole index.
    pub fn meta(&self) -> Result<Meta, Error> {
        let value = |key: &str| {
            self.with(|c| c.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get::<_, String>(0)))
        };
        let d = value("d")?;
        let width = d.parse().ok().filter(|d| (1..=MAX_D).contains(d));
        let chunking = value("chunking")?;
        let settings = serde_json::from_str::<Chunking>(&chunking).ok().filter(|settings| settings.check().is_ok());
        Ok(Meta {
            model_hash: value("model_hash")?,
            d: width.ok_or_else(|| self.wrong(format!("says vectors have {} numbers", quote(&d))))?,
            chunking: settings.ok_or_else(|| self.wrong(format!("says documents are cut by {}", quote(&chunking))))?,
        })
    }

    /// The segments, by number, each one's bits checked against its rows.
    pub fn segments(&self) -> Result<Vec<Known>, Error> {
        let rows: Vec<(i64, i64, String, Vec<u8>)> = self.with(|connection| {
            let mut query = connection.prepare("SELECT id, rows, sha256, alive FROM segments ORDER BY id")?;
            let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
            rows.collect()
        })?;
        let known = |(id, rows, sha256, alive): (i64, i64, String, Vec<u8>)| {
            let count = u32::try_from(rows).ok().filter(|&count| count > 0).map(|count| count as usize);
            let fits = count.filter(|count| alive.len() == count.div_ceil(32) * 4).filter(|_| id > 0);
            let rows = fits.ok_or_else(|| self.wrong(format!("segment {id} has {rows} rows, its bits do not fit")))?;
            let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("chunks of 4"));
            let mut alive: Vec<u32> = alive.chunks_exact(4).map(word).collect();
            if let (Some(last), true) = (alive.last_mut(), rows % 32 != 0) {
                *last &= (1 << (rows % 32)) - 1;
            }
            Ok(Known { id, rows, sha256, alive })
        };
        rows.into_iter().map(known).collect()
    }

    /// A count.
    pub fn count(&self, query: &str) -> Result<usize, Error> {
        let count: i64 = self.with(|connection| connection.query_row(query, [], |row| row.get(0)))?;
        usize::try_from(count).map_err(|_| self.wrong("counts less than nothing"))
    }
}

/// Settings of every connection: no code from the file's schema, damaged pages noticed, a little patience.
fn ready(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    connection.execute_batch("PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON;")
}

/// SQLite's fault in words that name the file.
pub fn fault(path: &Path, error: rusqlite::Error) -> Error {
    Error::sqlite(path, &error, "build the index anew")
}
