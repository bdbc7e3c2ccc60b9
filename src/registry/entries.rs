//! Entries: how one is made, found and told of.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use rusqlite::{params, Connection, OptionalExtension, Row};
use serde_json::{json, Map, Value};

use super::database::Change;
use super::describe::{describe, Told};
use super::files::{self, Stored};
use super::names::{self, Reference, Which};
use super::{Kind, Registry};
use crate::error::{quote, Error};

/// The longest tag or metadata.
const MAX_TEXT: usize = 1 << 20;

/// A version of a name.
#[derive(Clone, Debug)]
pub struct Entry {
    id: i64,
    /// Its name.
    pub name: String,
    /// Its version, from 1.
    pub version: i64,
    /// What it is.
    pub kind: Kind,
    /// Of its bytes: of its file, or of the list of its files.
    pub sha256: String,
    /// The hash by which others speak of it: a model's as [`model_sha256`](crate::model::adapter::model_sha256) gives
    /// it, an adapter's weights', else `sha256`.
    pub identity: String,
    /// True for a directory.
    pub directory: bool,
    /// Where it is, where it was registered in place.
    pub place: Option<PathBuf>,
    /// Bytes of its files; of an index, when it was registered.
    pub bytes: u64,
    /// When it was made, UTC, such as `2026-01-31T09:00:00Z`.
    pub created: String,
    /// What is known of it.
    pub metadata: Map<String, Value>,
    /// What it was tagged with.
    pub tags: BTreeMap<String, String>,
    /// Aliases that point at it.
    pub aliases: Vec<String>,
    /// What it was made from.
    pub parents: Vec<Parent>,
    tree: String,
}

/// What an entry was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// As what: base, data, original ..
    pub role: String,
    /// Its identity.
    pub sha256: String,
    /// The entry, where the registry has it.
    pub entry: Option<(String, i64)>,
}

/// Where the bytes of a new entry come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// A file or directory, which is kept.
    Path(&'a Path),
    /// The same, used where it is.
    InPlace(&'a Path),
    /// A file of this name with these bytes.
    Bytes(&'a str, &'a [u8]),
}

/// A new entry.
pub struct New<'a> {
    /// Its name; the version is the next.
    pub name: &'a str,
    /// What it is.
    pub kind: Kind,
    /// Its bytes.
    pub source: Source<'a>,
    /// Roles and identities of what it was made from, beside what its files say.
    pub parents: Vec<(String, String)>,
    /// Tags.
    pub tags: Vec<(String, String)>,
    /// What is known of it.
    pub metadata: Map<String, Value>,
}

impl<'a> New<'a> {
    /// An entry of which nothing more is known.
    pub fn of(name: &'a str, kind: Kind, source: Source<'a>) -> New<'a> {
        New { name, kind, source, parents: Vec::new(), tags: Vec::new(), metadata: Map::new() }
    }
}

/// A new entry whose bytes are kept, ready to be inserted. Holds off those who would take them out again.
pub(super) struct Prepared<'a> {
    new: &'a New<'a>,
    files: Vec<Stored>,
    bytes: u64,
    sha256: String,
    identity: String,
    tree: String,
    directory: bool,
    place: Option<PathBuf>,
    parents: Vec<(String, String)>,
    metadata: Map<String, Value>,
    _lock: File,
}

impl Entry {
    /// `name@version`.
    pub fn reference(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }

    /// The hash of its list of files, by which its folder below trees is named.
    pub(super) fn tree(&self) -> &str {
        &self.tree
    }

    /// As scripts take it.
    pub fn json(&self) -> Value {
        let parent = |parent: &Parent| {
            let (name, version) = parent.entry.clone().unzip();
            json!({ "role": parent.role, "sha256": parent.sha256, "name": name, "version": version })
        };
        json!({
            "name": self.name,
            "version": self.version,
            "kind": self.kind.name(),
            "sha256": self.sha256,
            "identity": self.identity,
            "parents": self.parents.iter().map(parent).collect::<Vec<_>>(),
            "aliases": self.aliases,
            "tags": self.tags,
            "metadata": self.metadata,
            "bytes": self.bytes,
            "created": self.created,
            "in_place": self.place.as_ref().map(|place| place.display().to_string()),
        })
    }
}

impl Registry {
    /// Adds an entry, and says whether it is new: bytes that the name has already are the version that has them, which
    /// then learns what is new about them. It is there for good once this returns.
    pub fn add(&self, new: &New) -> Result<(Entry, bool), Error> {
        let prepared = self.prepare(new)?;
        let (id, fresh) = self.database.change(|change| insert(change, &prepared))?;
        Ok((self.entry(id)?, fresh))
    }

    /// Checks a new entry and keeps its bytes.
    pub(super) fn prepare<'a>(&self, new: &'a New<'a>) -> Result<Prepared<'a>, Error> {
        names::check_name(new.name)?;
        let long = new.tags.iter().any(|(key, value)| key.len() > names::MAX_NAME || value.len() > MAX_TEXT);
        if long || new.tags.iter().any(|(key, _)| key.is_empty()) || json!(new.metadata).to_string().len() > MAX_TEXT {
            return Err(Error::Request("a tag or the metadata is empty or too long".into()));
        }
        if let Some((role, hash)) = new.parents.iter().find(|(_, hash)| !files::is_hash(hash)) {
            let what = format!("parent {}: {} is no SHA-256 in hexadecimal", quote(role), quote(hash));
            return Err(Error::Request(what));
        }
        let _lock = self.lock(false)?;
        let (mut parents, mut metadata) = (new.parents.clone(), Map::new());
        let Told { identity: known, bytes } = match new.source {
            Source::Bytes(..) => Told::default(),
            Source::Path(path) | Source::InPlace(path) => describe(path, new.kind, &mut parents, &mut metadata)?,
        };
        metadata.extend(new.metadata.clone());
        // An index goes on changing, so it stays where it is.
        let in_place = new.kind == Kind::Index || matches!(new.source, Source::InPlace(_));
        let (found, place, directory) = match new.source {
            Source::Bytes(name, bytes) => {
                files::check_path(name).map_err(Error::Request)?;
                let sha256 = files::keep_bytes(&self.dir, bytes)?;
                (vec![Stored { path: name.into(), sha256, bytes: bytes.len() as u64 }], None, false)
            }
            Source::Path(path) | Source::InPlace(path) => {
                // Links stay: what a downloaded model's point at has no name that says what it is.
                let place = std::path::absolute(path).map_err(|cause| Error::io(path, cause))?;
                let listed = if new.kind == Kind::Index { Vec::new() } else { files::list(path, new.kind)? };
                let mut found = Vec::with_capacity(listed.len());
                for (name, at) in listed {
                    let (sha256, bytes) = match in_place {
                        true => files::hash(&at, &mut |_| Ok(()))?,
                        false => files::keep(&self.dir, &at, new.kind == Kind::Model)?,
                    };
                    found.push(Stored { path: name, sha256, bytes });
                }
                (found, in_place.then_some(place), path.is_dir())
            }
        };
        let tree = files::tree_hash(&found);
        let sha256 = match (&found[..], directory, &known) {
            ([file], false, _) => file.sha256.clone(),
            // An index's own account of what it holds.
            ([], _, Some(known)) => known.clone(),
            _ => tree.clone(),
        };
        if !in_place {
            files::tree(&self.dir, &tree, &found, true)?;
        }
        let identity = match (new.kind, known) {
            (Kind::Adapter, _) => {
                found.iter().find(|file| file.path.ends_with(".safetensors")).map(|file| file.sha256.clone())
            }
            (_, known) => known,
        };
        let identity = identity.unwrap_or_else(|| sha256.clone());
        let bytes = bytes.unwrap_or_else(|| found.iter().map(|file| file.bytes).sum());
        Ok(Prepared { new, files: found, bytes, sha256, identity, tree, directory, place, parents, metadata, _lock })
    }

    /// The entry a reference speaks of; none where there is no such name, version or alias. An error where the name is
    /// of another kind.
    pub fn find(&self, reference: &Reference, kind: Option<Kind>) -> Result<Option<Entry>, Error> {
        self.database.view(|view| {
            let found = version_of(view, reference)?;
            let Some((id, found)) = found else { return Ok(None) };
            if let Some(kind) = kind.filter(|kind| *kind != found) {
                let what = format!("{} is of kind {found}, where kind {kind} is asked for", reference.name);
                return Err(Error::Request(what));
            }
            read(view, id).map(Some)
        })
    }

    /// The entry that `text` speaks of. An error where there is none.
    pub fn get(&self, text: &str, kind: Option<Kind>) -> Result<Entry, Error> {
        let reference = Reference::parse(text)?;
        match self.find(&reference, kind)? {
            Some(entry) => Ok(entry),
            None => Err(Error::file(
                &self.dir,
                format!("the registry has no {}: {}", quote(text), self.has(&reference.name)?),
            )),
        }
    }

    /// What there is instead of a version or alias that is missing.
    fn has(&self, name: &str) -> Result<String, Error> {
        let entries = self.list(None, Some(name))?;
        if entries.is_empty() {
            let mut names: Vec<String> = self.list(None, None)?.into_iter().map(|entry| entry.name).collect();
            names.dedup();
            let more = if names.len() > super::TOLD { ", .." } else { "" };
            names.truncate(super::TOLD);
            return Ok(match names.is_empty() {
                true => "it has nothing yet, `handmill registry add NAME PATH` registers something".into(),
                false => format!("its names are {}{more}", names.join(", ")),
            });
        }
        let one = |entry: &Entry| {
            let aliases: String = entry.aliases.iter().map(|alias| format!(", @{alias}")).collect();
            format!("{}{aliases}", entry.version)
        };
        // The last ones: of hundreds nobody reads the first.
        let last = entries.len().saturating_sub(8);
        let known: Vec<String> = entries[last..].iter().map(one).collect();
        let before = if last > 0 { format!("{last} before, ") } else { String::new() };
        let word = if entries.len() == 1 { "its version is" } else { "its versions are" };
        Ok(format!("{word} {before}{}", known.join("; ")))
    }

    fn entry(&self, id: i64) -> Result<Entry, Error> {
        self.database.view(|view| read(view, id))
    }

    /// All entries, of a kind or a name where one is given, by name and version.
    pub fn list(&self, kind: Option<Kind>, name: Option<&str>) -> Result<Vec<Entry>, Error> {
        self.database.view(|view| {
            let ids: Vec<i64> = view.with(|c| {
                let wanted = "SELECT id FROM entries WHERE (?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR name = ?2)
                    ORDER BY name, version";
                let mut query = c.prepare(wanted)?;
                let rows = query.query_map(params![kind.map(Kind::name), name], |row| row.get(0))?;
                rows.collect()
            })?;
            ids.into_iter().map(|id| read(view, id)).collect()
        })
    }

    /// The entries that have this identity or these bytes.
    pub fn by_hash(&self, hash: &str) -> Result<Vec<Entry>, Error> {
        self.database.view(|view| {
            let ids = view.with(|c| with_hash(c, hash))?;
            ids.into_iter().map(|id| read(view, id)).collect()
        })
    }

    /// The files of an entry, by name.
    pub fn files(&self, entry: &Entry) -> Result<Vec<Stored>, Error> {
        let rows: Vec<(String, String, i64)> = self.database.with(|c| {
            let mut query = c.prepare("SELECT path, sha256, bytes FROM files WHERE entry = ?1 ORDER BY path")?;
            let rows = query.query_map([entry.id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
            rows.collect()
        })?;
        let stored = |(path, sha256, bytes): (String, String, i64)| {
            files::check_path(&path).map_err(|what| self.database.wrong(what))?;
            let bytes = u64::try_from(bytes).ok().filter(|_| files::is_hash(&sha256));
            let bytes = bytes.ok_or_else(|| self.database.wrong(format!("{} has no length or hash", quote(&path))))?;
            Ok(Stored { path, sha256, bytes })
        };
        rows.into_iter().map(stored).collect()
    }

    /// Where an entry is to be used: its file or its directory.
    pub fn path(&self, entry: &Entry) -> Result<PathBuf, Error> {
        if let Some(place) = &entry.place {
            return match place.exists() {
                true => Ok(place.clone()),
                false => {
                    Err(Error::file(place, format!("is gone: {} was registered there, in place", entry.reference())))
                }
            };
        }
        let found = self.files(entry)?;
        if !files::is_hash(&entry.tree) {
            return Err(self.database.wrong(format!("{} has no tree", entry.reference())));
        }
        let tree = files::tree(&self.dir, &entry.tree, &found, false)?;
        match (&found[..], entry.directory) {
            ([file], false) => Ok(tree.join(&file.path)),
            _ => Ok(tree),
        }
    }

    /// Sets a tag, or takes it away where there is no value.
    pub fn tag(&self, entry: &Entry, key: &str, value: Option<&str>) -> Result<Entry, Error> {
        if key.is_empty() || key.len() > names::MAX_NAME || value.is_some_and(|value| value.len() > MAX_TEXT) {
            return Err(Error::Request("a tag's key or value is empty or too long".into()));
        }
        self.database.change(|change| {
            change.with(|c| match value {
                Some(value) => {
                    c.execute("INSERT OR REPLACE INTO tags VALUES (?1, ?2, ?3)", params![entry.id, key, value])
                }
                None => c.execute("DELETE FROM tags WHERE entry = ?1 AND key = ?2", params![entry.id, key]),
            })?;
            read(change, entry.id)
        })
    }

    /// What an entry was made from, and what that was made from, nearest first; and what was made from it.
    pub fn lineage(&self, entry: &Entry) -> Result<(Vec<Entry>, Vec<Entry>), Error> {
        self.database.view(|view| {
            let walk = |next: &dyn Fn(&Entry) -> Result<Vec<i64>, Error>| {
                let (mut seen, mut found) = (HashSet::from([entry.id]), Vec::new());
                let mut now = vec![entry.clone()];
                while !now.is_empty() {
                    let mut then = Vec::new();
                    for of in &now {
                        for id in next(of)?.into_iter().filter(|id| seen.insert(*id)).collect::<Vec<_>>() {
                            then.push(read(view, id)?);
                        }
                    }
                    found.extend(then.iter().cloned());
                    now = then;
                }
                Ok::<_, Error>(found)
            };
            let up = walk(&|of| {
                let ids = of.parents.iter().map(|parent| view.with(|c| with_hash(c, &parent.sha256)));
                Ok(ids.collect::<Result<Vec<_>, Error>>()?.concat())
            })?;
            let down = walk(&|of| view.with(|c| children(c, of)))?;
            Ok((up, down))
        })
    }

    /// Takes an entry out; its bytes go with the next collection. An error where an alias points at it or something
    /// else was made from it.
    pub fn remove(&self, entry: &Entry) -> Result<(), Error> {
        self.database.change(|change| {
            let now = read(change, entry.id)?;
            let name = now.reference();
            if let Some(alias) = now.aliases.first() {
                let what = format!("{name} is {}@{alias}: point the alias elsewhere first", now.name);
                return Err(Error::Request(what));
            }
            // Others of the same identity hold the lineage as well.
            let twins = change.with(|c| with_hash(c, &now.identity))?;
            let held = change.with(|c| children(c, &now))?;
            if let Some(child) = held.first().filter(|_| twins.len() <= 1) {
                let child = read(change, *child)?.reference();
                return Err(Error::Request(format!("{child} was made from {name}: remove that first")));
            }
            change.with(|c| {
                for table in ["files WHERE entry", "tags WHERE entry", "edges WHERE child", "entries WHERE id"] {
                    c.execute(&format!("DELETE FROM {table} = ?1"), [now.id])?;
                }
                Ok(())
            })
        })
    }
}

/// The version of a new entry, and whether it is new.
pub(super) fn insert(change: &Change, prepared: &Prepared) -> Result<(i64, bool), Error> {
    let Prepared { new, sha256, identity, .. } = prepared;
    let (name, kind) = (new.name, new.kind.name());
    let known: Option<String> =
        change.with(|c| c.query_row("SELECT kind FROM names WHERE name = ?1", [name], |row| row.get(0)).optional())?;
    if let Some(other) = known.filter(|other| other != kind) {
        return Err(Error::Request(format!(
            "{name} is the name of {}: take another for this {kind}",
            super::a(&other)
        )));
    }
    let place = prepared.place.as_ref().map(|place| place.to_str().map(str::to_string));
    if place == Some(None) {
        let what = "has a path that is no UTF-8: rename it, or do not register it in place";
        return Err(Error::file(prepared.place.as_deref().unwrap_or(Path::new("")), what));
    }
    let place = place.flatten();
    let same = change.with(|c| {
        let query = "SELECT id, metadata FROM entries WHERE name = ?1 AND sha256 = ?2 AND identity = ?3
            AND place IS ?4 ORDER BY version DESC LIMIT 1";
        c.query_row(query, params![name, sha256, identity, place], |row| Ok((row.get(0)?, row.get(1)?))).optional()
    })?;
    let (id, fresh): (i64, bool) = match same {
        Some((id, metadata)) => {
            let metadata: String = metadata;
            let mut all: Map<String, Value> = serde_json::from_str(&metadata).unwrap_or_default();
            all.extend(prepared.metadata.clone());
            change.with(|c| {
                c.execute("UPDATE entries SET metadata = ?2 WHERE id = ?1", params![id, json!(all).to_string()])
            })?;
            (id, false)
        }
        None => {
            change.with(|c| {
                c.execute("INSERT OR IGNORE INTO names VALUES (?1, ?2, 1)", params![name, kind])?;
                let version: i64 =
                    c.query_row("UPDATE names SET next = next + 1 WHERE name = ?1 RETURNING next - 1", [name], |r| {
                        r.get(0)
                    })?;
                // The name is written as it was first.
                c.execute(
                    "INSERT INTO entries(name, version, kind, sha256, identity, tree, directory, place, bytes, created,
                    metadata) SELECT name, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, strftime('%Y-%m-%dT%H:%M:%SZ'), ?10
                    FROM names WHERE name = ?1",
                    params![
                        name,
                        version,
                        kind,
                        sha256,
                        identity,
                        prepared.tree,
                        prepared.directory,
                        place,
                        prepared.bytes as i64,
                        json!(prepared.metadata).to_string()
                    ],
                )?;
                let id = c.last_insert_rowid();
                let mut row = c.prepare("INSERT INTO files VALUES (?1, ?2, ?3, ?4)")?;
                for file in &prepared.files {
                    row.execute(params![id, file.path, file.sha256, file.bytes as i64])?;
                }
                Ok((id, true))
            })?
        }
    };
    change.with(|c| {
        for (role, parent) in &prepared.parents {
            c.execute("INSERT OR IGNORE INTO edges VALUES (?1, ?2, ?3)", params![id, role, parent])?;
        }
        for (key, value) in &new.tags {
            c.execute("INSERT OR REPLACE INTO tags VALUES (?1, ?2, ?3)", params![id, key, value])?;
        }
        Ok(())
    })?;
    Ok((id, fresh))
}

/// Number and kind of the entry a reference speaks of.
pub(super) fn version_of(view: &Change, reference: &Reference) -> Result<Option<(i64, Kind)>, Error> {
    let name = &reference.name;
    let found: Option<(i64, String)> = view.with(|c| {
        let take = |row: &Row| Ok((row.get(0)?, row.get(1)?));
        match &reference.which {
            Which::Latest => {
                let query = "SELECT id, kind FROM entries WHERE name = ?1 ORDER BY version DESC LIMIT 1";
                c.query_row(query, [name], take).optional()
            }
            Which::Version(version) => {
                let query = "SELECT id, kind FROM entries WHERE name = ?1 AND version = ?2";
                c.query_row(query, params![name, version], take).optional()
            }
            Which::Alias(alias) => {
                let query = "SELECT id, kind FROM entries JOIN aliases USING(name, version)
                    WHERE name = ?1 AND alias = ?2";
                c.query_row(query, params![name, alias], take).optional()
            }
        }
    })?;
    found.map(|(id, kind)| Ok((id, kind_of(view, &kind)?))).transpose()
}

fn kind_of(view: &Change, word: &str) -> Result<Kind, Error> {
    word.parse().map_err(|_| view.wrong(format!("it knows a kind {}", quote(word))))
}

/// Reads an entry.
pub(super) fn read(view: &Change, id: i64) -> Result<Entry, Error> {
    let (mut entry, kind, metadata) = view.with(|c| {
        let query = "SELECT name, version, kind, sha256, identity, tree, directory, place, bytes, created, metadata
            FROM entries WHERE id = ?1";
        c.query_row(query, [id], |row| {
            let place: Option<String> = row.get(7)?;
            let entry = Entry {
                id,
                name: row.get(0)?,
                version: row.get(1)?,
                kind: Kind::Run,
                sha256: row.get(3)?,
                identity: row.get(4)?,
                tree: row.get(5)?,
                directory: row.get(6)?,
                place: place.map(PathBuf::from),
                bytes: row.get::<_, i64>(8)?.max(0) as u64,
                created: row.get(9)?,
                metadata: Map::new(),
                tags: BTreeMap::new(),
                aliases: Vec::new(),
                parents: Vec::new(),
            };
            Ok((entry, row.get::<_, String>(2)?, row.get::<_, String>(10)?))
        })
    })?;
    entry.kind = kind_of(view, &kind)?;
    entry.metadata = serde_json::from_str(&metadata)
        .map_err(|_| view.wrong(format!("the metadata of {} is no JSON object", entry.reference())))?;
    view.with(|c| {
        let mut query = c.prepare("SELECT key, value FROM tags WHERE entry = ?1")?;
        let rows = query.query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        entry.tags = rows.collect::<Result<_, _>>()?;
        let mut query = c.prepare("SELECT alias FROM aliases WHERE name = ?1 AND version = ?2 ORDER BY alias")?;
        let rows = query.query_map(params![entry.name, entry.version], |row| row.get(0))?;
        entry.aliases = rows.collect::<Result<_, _>>()?;
        let mut query = c.prepare("SELECT role, parent FROM edges WHERE child = ?1 ORDER BY role, parent")?;
        let rows = query.query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let edges: Vec<(String, String)> = rows.collect::<Result<_, _>>()?;
        let mut query =
            c.prepare("SELECT name, version FROM entries WHERE sha256 = ?1 OR identity = ?1 ORDER BY id LIMIT 1")?;
        for (role, sha256) in edges {
            let found = query.query_row([&sha256], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
            entry.parents.push(Parent { role, sha256, entry: found });
        }
        Ok(())
    })?;
    Ok(entry)
}

fn with_hash(c: &Connection, hash: &str) -> rusqlite::Result<Vec<i64>> {
    let mut query = c.prepare("SELECT id FROM entries WHERE sha256 = ?1 OR identity = ?1 ORDER BY id")?;
    let rows = query.query_map([hash], |row| row.get(0))?;
    rows.collect()
}

/// What was made from an entry.
fn children(c: &Connection, of: &Entry) -> rusqlite::Result<Vec<i64>> {
    let mut query =
        c.prepare("SELECT DISTINCT child FROM edges WHERE parent IN (?1, ?2) AND child <> ?3 ORDER BY child")?;
    let rows = query.query_map(params![of.sha256, of.identity, of.id], |row| row.get(0))?;
    rows.collect()
}
