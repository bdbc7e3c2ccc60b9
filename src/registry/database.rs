//! The registry's database: which entries there are, what they are made of, and where names point.
//!
//! One SQLite file in WAL mode: a transaction is there whole or not at all, whatever process is killed; writers wait
//! for each other. Nothing in it is believed before it is checked.

use std::fs::File;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use crate::error::{quote, Error};

/// The database's file in a registry.
pub const FILE: &str = "registry.sqlite";
/// "HMRG": SQLite's application id of a registry.
const APPLICATION: i64 = 0x484d_5247;
/// Of the tables below.
const VERSION: i64 = 1;
/// How long a writer waits for others.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// `sha256` is of an entry's bytes: of its file, or of the list of its files. `identity` is the hash by which other
/// entries speak of it: of the files of a model that bear on what it computes, of an adapter's weights. `tree` names
/// its folder below trees; `place` is where it is where it is registered in place, and then its bytes are not here.
/// `names.next` is the version that a name's next entry gets: numbers are never given twice.
const SCHEMA: &str = "
    CREATE TABLE names(name TEXT PRIMARY KEY NOT NULL COLLATE NOCASE, kind TEXT NOT NULL, next INTEGER NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE entries(id INTEGER PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE, version INTEGER NOT NULL,
        kind TEXT NOT NULL, sha256 TEXT NOT NULL, identity TEXT NOT NULL, tree TEXT NOT NULL,
        directory INTEGER NOT NULL, place TEXT, bytes INTEGER NOT NULL, created TEXT NOT NULL, metadata TEXT NOT NULL, UNIQUE(name, version));
    CREATE INDEX entries_sha256 ON entries(sha256);
    CREATE INDEX entries_identity ON entries(identity);
    CREATE TABLE files(entry INTEGER NOT NULL, path TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
        PRIMARY KEY(entry, path)) WITHOUT ROWID;
    CREATE TABLE edges(child INTEGER NOT NULL, role TEXT NOT NULL, parent TEXT NOT NULL,
        PRIMARY KEY(child, role, parent)) WITHOUT ROWID;
    CREATE INDEX edges_parent ON edges(parent);
    CREATE TABLE tags(entry INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY(entry, key))
        WITHOUT ROWID;
    CREATE TABLE aliases(name TEXT NOT NULL COLLATE NOCASE, alias TEXT NOT NULL COLLATE NOCASE,
        version INTEGER NOT NULL, PRIMARY KEY(name, alias)) WITHOUT ROWID;
    CREATE TABLE history(id INTEGER PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE, alias TEXT NOT NULL COLLATE NOCASE,
        action TEXT NOT NULL, before INTEGER, after INTEGER, time TEXT NOT NULL, evaluation TEXT);";

/// An open database.
pub struct Database {
    path: PathBuf,
    connection: Connection,
}

impl Database {
    /// Opens the database of the registry `dir`; `create` makes it where there is none. Where nothing may be written
    /// it can be read.
    pub fn open(dir: &Path, create: bool) -> Result<Database, Error> {
        let path = dir.join(FILE);
        let none = || Error::file(dir, "is no registry: make one with `handmill registry init`");
        if !create && !path.is_file() {
            return Err(none());
        }
        if create {
            crate::aside::folder(dir)?;
        }
        // Two processes that make one at the same time would both find it empty.
        let lock = path.with_extension("lock");
        let lock = match create {
            false => None,
            true => {
                let file = File::create(&lock).map_err(|cause| Error::io(&lock, cause))?;
                file.lock().map_err(|cause| Error::io(&lock, cause))?;
                Some(file)
            }
        };
        let flag = if create { OpenFlags::SQLITE_OPEN_CREATE } else { OpenFlags::empty() };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | flag;
        let connection = connect(&path, flags).or_else(|error| match create {
            true => Err(error),
            false => only_to_read(&path, error),
        });
        let connection = connection.map_err(|error| fault(&path, &error))?;
        let database = Database { path, connection };
        let empty = database.pragma("user_version")? == 0 && database.pragma("application_id")? == 0;
        match (empty, create) {
            (true, false) => return Err(none()),
            (true, true) => database.with(|connection| {
                connection.execute_batch("PRAGMA journal_mode=WAL;")?;
                let transaction = connection.unchecked_transaction()?;
                transaction.execute_batch(SCHEMA)?;
                transaction
                    .execute_batch(&format!("PRAGMA application_id={APPLICATION}; PRAGMA user_version={VERSION};"))?;
                transaction.commit()
            })?,
            (false, _) => database.check()?,
        }
        drop(lock);
        Ok(database)
    }

    fn check(&self) -> Result<(), Error> {
        if self.pragma("application_id")? != APPLICATION {
            return Err(Error::file(&self.path, "is the database of some other program, no registry"));
        }
        match self.pragma("user_version")? {
            VERSION => Ok(()),
            other => {
                let what = format!("is a registry of version {other}, this program knows {VERSION}: use a newer one");
                Err(Error::file(&self.path, what))
            }
        }
    }

    /// Reads; errors name the file.
    pub fn with<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        work(&self.connection).map_err(|error| fault(&self.path, &error))
    }

    /// Changes something in one transaction, which begins as a writer's: all of it, or where `work` fails none.
    pub fn change<T>(&self, work: impl FnOnce(&Change) -> Result<T, Error>) -> Result<T, Error> {
        let begin = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate);
        let change = Change { path: &self.path, transaction: begin.map_err(|error| fault(&self.path, &error))? };
        let result = work(&change)?;
        change.transaction.commit().map_err(|error| fault(&self.path, &error))?;
        Ok(result)
    }

    /// Reads in one transaction: everything `work` reads is one state.
    pub fn view<T>(&self, work: impl FnOnce(&Change) -> Result<T, Error>) -> Result<T, Error> {
        let begin = Transaction::new_unchecked(&self.connection, TransactionBehavior::Deferred);
        let change = Change { path: &self.path, transaction: begin.map_err(|error| fault(&self.path, &error))? };
        work(&change)
    }

    /// What is wrong with what the database says.
    pub fn wrong(&self, what: impl std::fmt::Display) -> Error {
        wrong(&self.path, what)
    }

    /// What SQLite finds wrong with its pages; none where nothing is.
    pub fn integrity(&self) -> Result<Option<String>, Error> {
        let said: String = self.with(|c| c.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)))?;
        Ok((said != "ok").then(|| quote(&said)))
    }

    fn pragma(&self, name: &str) -> Result<i64, Error> {
        self.with(|connection| connection.pragma_query_value(None, name, |row| row.get(0)))
    }
}

/// A connection that has read something.
fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(PATIENCE)?;
    connection.execute_batch("PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON; PRAGMA synchronous=FULL;")?;
    connection.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))?;
    Ok(connection)
}

/// A connection to a database in a place where nothing may be written, such as a registry that is shared read-only;
/// `error` is what writing met.
fn only_to_read(path: &Path, error: rusqlite::Error) -> rusqlite::Result<Connection> {
    use rusqlite::ErrorCode::{CannotOpen, PermissionDenied, ReadOnly};
    if !matches!(error.sqlite_error_code(), Some(CannotOpen | PermissionDenied | ReadOnly)) {
        return Err(error);
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    connect(path, flags).or_else(|_| {
        // Without the files that writers share there is no writer. What stands in a log alone would be missed.
        let log = path.with_file_name(format!("{FILE}-wal"));
        let (Some(text), false) = (path.to_str(), std::fs::metadata(&log).is_ok_and(|meta| meta.len() > 0)) else {
            return Err(error);
        };
        let text = text.replace('%', "%25").replace('?', "%3f").replace('#', "%23");
        let uri = format!("file:{text}?immutable=1");
        connect(Path::new(&uri), flags | OpenFlags::SQLITE_OPEN_URI).map_err(|_| error)
    })
}

/// A transaction.
pub struct Change<'a> {
    path: &'a Path,
    transaction: Transaction<'a>,
}

impl Change<'_> {
    /// Runs SQL; errors name the file.
    pub fn with<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        work(&self.transaction).map_err(|error| fault(self.path, &error))
    }

    /// What is wrong with what the database says.
    pub fn wrong(&self, what: impl std::fmt::Display) -> Error {
        wrong(self.path, what)
    }
}

fn wrong(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::file(path, format!("{what}: the registry is damaged"))
}

/// SQLite's fault in words that name the file.
fn fault(path: &Path, error: &rusqlite::Error) -> Error {
    Error::sqlite(path, error, "take it from a backup")
}
