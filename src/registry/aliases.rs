//! Aliases: which version of a name is in use, and which was before. An alias and its history change together.

use rusqlite::{params, OptionalExtension};
use serde_json::{json, Value};

use super::database::Change;
use super::entries::{self, Entry, New};
use super::names::{self, Reference, Which};
use super::Registry;
use crate::error::{quote, Error};

/// A time an alias was moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Its name.
    pub alias: String,
    /// `alias`, `promote`, `rollback` or `delete`.
    pub action: String,
    /// The version it pointed at.
    pub before: Option<i64>,
    /// The version it pointed at from then on.
    pub after: Option<i64>,
    /// When, UTC.
    pub time: String,
    /// The evaluation by which it was moved, such as `support-evaluation@2`.
    pub evaluation: Option<String>,
}

impl Moved {
    /// As scripts take it.
    pub fn json(&self) -> Value {
        json!({ "alias": self.alias, "action": self.action, "from": self.before, "to": self.after,
            "time": self.time, "evaluation": self.evaluation })
    }
}

/// A promotion: where an alias is to point, as long as it still points where it did when this was decided.
pub struct Promotion<'a> {
    /// The alias, such as `champion`.
    pub alias: &'a str,
    /// The version it pointed at; none where there was no such alias.
    pub before: Option<i64>,
    /// The version it is to point at.
    pub after: &'a Entry,
}

impl Registry {
    /// Points an alias at an entry.
    pub fn alias(&self, entry: &Entry, alias: &str) -> Result<Entry, Error> {
        names::check_alias(alias)?;
        self.database.change(|change| {
            let entry = current(change, entry)?;
            let before = points_at(change, &entry.name, alias)?;
            if before != Some(entry.version) {
                point(change, &entry.name, alias, "alias", before, Some(entry.version), None)?;
            }
            current(change, &entry)
        })
    }

    /// Takes an alias away; false where there was none.
    pub fn unalias(&self, name: &str, alias: &str) -> Result<bool, Error> {
        self.database.change(|change| {
            let before = points_at(change, name, alias)?;
            if before.is_some() {
                point(change, name, alias, "delete", before, None, None)?;
            }
            Ok(before.is_some())
        })
    }

    /// Every move of a name's aliases, the first one first.
    pub fn history(&self, name: &str) -> Result<Vec<Moved>, Error> {
        self.database.view(|view| history(view, name, None))
    }

    /// The version an alias points at.
    pub fn points_at(&self, name: &str, alias: &str) -> Result<Option<i64>, Error> {
        self.database.view(|view| points_at(view, name, alias))
    }

    /// Keeps an evaluation and, where it was passed, moves the alias by it: both or neither. An error where the alias
    /// has been moved since it was decided. Gives the evaluation's entry.
    pub fn decide(&self, evaluation: &New, promotion: Option<Promotion>) -> Result<Entry, Error> {
        let prepared = self.prepare(evaluation)?;
        self.database.change(|change| {
            let (id, _) = entries::insert(change, &prepared)?;
            let kept = entries::read(change, id)?;
            if let Some(Promotion { alias, before, after }) = promotion {
                names::check_alias(alias)?;
                let after = current(change, after)?;
                let now = points_at(change, &after.name, alias)?;
                if now != before {
                    let what = format!("{}@{alias} was moved meanwhile, so nothing is: run it again", after.name);
                    return Err(Error::Request(what));
                }
                if now != Some(after.version) {
                    let by = Some(kept.reference());
                    point(change, &after.name, alias, "promote", before, Some(after.version), by.as_deref())?;
                }
            }
            Ok(kept)
        })
    }

    /// Points an alias back at the version it pointed at before, also where it was taken away since; said again, at the
    /// one before that. Gives the version left, none where there was no such alias, and the one taken up.
    pub fn rollback(&self, name: &str, alias: &str) -> Result<(Option<i64>, Entry), Error> {
        self.database.change(|change| {
            let now = points_at(change, name, alias)?;
            let mut before: Vec<Option<i64>> = Vec::new();
            for moved in history(change, name, Some(alias))? {
                match moved.action.as_str() {
                    "rollback" => while before.pop().is_some_and(|version| version != moved.after) {},
                    _ => before.push(moved.before),
                }
            }
            // Times without the alias are passed over.
            let mut versions = before.into_iter().rev().flatten().filter(|version| Some(*version) != now);
            let Some(version) = versions.next() else {
                let Some(now) = now else {
                    let (name, alias) = (quote(name), quote(alias));
                    let what =
                        format!("there is no {name}@{alias}: no version was promoted yet, see `handmill promote`");
                    return Err(Error::Request(what));
                };
                let what = format!(
                    "{name}@{alias} is version {now} and was no other before: there is no way back, but \
                     `handmill registry alias {name} {alias} --delete` leaves the base model alone in use"
                );
                return Err(Error::Request(what));
            };
            let entry = |version| {
                let reference = Reference { name: name.into(), which: Which::Version(version) };
                Ok::<_, Error>(entries::version_of(change, &reference)?.map(|(id, _)| id))
            };
            let Some(id) = entry(version)? else {
                let mut what = format!("{name}@{alias} was version {version} before, which was removed since");
                for earlier in versions {
                    if entry(earlier)?.is_some() {
                        what +=
                            &format!(": `handmill registry alias {name}@{earlier} {alias}` takes the one before that");
                        break;
                    }
                }
                return Err(Error::Request(what));
            };
            point(change, name, alias, "rollback", now, Some(version), None)?;
            Ok((now, entries::read(change, id)?))
        })
    }
}

/// The entry as it is now; an error where it was removed meanwhile.
fn current(change: &Change, entry: &Entry) -> Result<Entry, Error> {
    let reference = Reference { name: entry.name.clone(), which: Which::Version(entry.version) };
    match entries::version_of(change, &reference)? {
        Some((id, _)) => entries::read(change, id),
        None => Err(Error::Request(format!("{} is not there any more", entry.reference()))),
    }
}

fn points_at(view: &Change, name: &str, alias: &str) -> Result<Option<i64>, Error> {
    view.with(|c| {
        let query = "SELECT version FROM aliases WHERE name = ?1 AND alias = ?2";
        c.query_row(query, [name, alias], |row| row.get(0)).optional()
    })
}

fn point(
    change: &Change,
    name: &str,
    alias: &str,
    action: &str,
    before: Option<i64>,
    after: Option<i64>,
    evaluation: Option<&str>,
) -> Result<(), Error> {
    change.with(|c| {
        match after {
            Some(version) => c.execute(
                "INSERT INTO aliases VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET version = ?3",
                params![name, alias, version],
            )?,
            None => c.execute("DELETE FROM aliases WHERE name = ?1 AND alias = ?2", [name, alias])?,
        };
        c.execute(
            "INSERT INTO history(name, alias, action, before, after, time, evaluation)
                VALUES (?1, ?2, ?3, ?4, ?5, strftime('%Y-%m-%dT%H:%M:%SZ'), ?6)",
            params![name, alias, action, before, after, evaluation],
        )?;
        Ok(())
    })
}

fn history(view: &Change, name: &str, alias: Option<&str>) -> Result<Vec<Moved>, Error> {
    view.with(|c| {
        let mut query = c.prepare(
            "SELECT alias, action, before, after, time, evaluation FROM history
                WHERE name = ?1 AND (?2 IS NULL OR alias = ?2 COLLATE NOCASE) ORDER BY id",
        )?;
        let rows = query.query_map(params![name, alias], |row| {
            Ok(Moved {
                alias: row.get(0)?,
                action: row.get(1)?,
                before: row.get(2)?,
                after: row.get(3)?,
                time: row.get(4)?,
                evaluation: row.get(5)?,
            })
        })?;
        rows.collect()
    })
}
