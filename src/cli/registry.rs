//! `handmill registry`: versions of models, adapters, datasets and indexes, and what each was made from.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use clap::{Args, Subcommand};
use handmill::error::quote;
use handmill::registry::entries::{Entry, New, Source};
use handmill::registry::names::Reference;
use handmill::registry::{self, files, Kind, Registry as Opened};
use serde_json::{json, Value};

use super::{human_bytes, note, print_json, progress, ChecksFailed, Usage};

static FLAG: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Keeps what --registry says.
pub fn set(flag: Option<PathBuf>) {
    let _ = FLAG.set(flag); // main says it once
}

/// The registry's directory, where one is named.
pub fn directory() -> Option<PathBuf> {
    registry::directory(FLAG.get().and_then(|flag| flag.as_deref()))
}

/// Where what a flag names is: a path, or a name of the registry.
pub fn resolve(kind: Kind, path: &Path) -> Result<PathBuf> {
    Ok(registry::resolve(directory().as_deref(), kind, path)?)
}

fn named() -> Result<PathBuf> {
    let none = || Usage("name the registry, a directory: --registry DIR, or the variable HANDMILL_REGISTRY".into());
    Ok(directory().ok_or_else(none)?)
}

/// The registry that is named, which must be there.
pub fn open() -> Result<Opened> {
    Ok(Opened::open(&named()?)?)
}

/// The registry that is named, made where it is missing.
pub fn create() -> Result<Opened> {
    Ok(Opened::create(&named()?)?)
}

/// Keep versions of models, adapters, datasets and indexes, with what each was made from
///
/// A registry is a directory: a database and files by their SHA-256. Names have versions, name@3, and aliases,
/// name@champion; a name stands wherever a path does, as --model smollm2 or --adapter support@candidate, and without
/// an @ is its highest version. A path that exists goes before a name. Any number of processes may use one at once;
/// what a command has answered survives its being killed. Objects of --json: name, version, kind, sha256, identity,
/// parents: [{role, sha256, name, version}], aliases, tags, metadata, bytes, created, in_place.
#[derive(Args)]
pub struct Registry {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Init(Init),
    Add(Add),
    List(List),
    Show(Show),
    Alias(Alias),
    Tag(Tag),
    Lineage(Lineage),
    Verify(Verify),
    Remove(Remove),
    Gc(Gc),
    Export(Export),
    Scan(Scan),
}

/// Make a registry
#[derive(Args)]
struct Init {
    /// Print JSON for scripts instead of text for people: registry
    #[arg(long)]
    json: bool,
}

/// Register a file or directory as the next version of a name
///
/// Bytes that the name has already are the version that has them. Files of models are linked where the file system
/// can, all else is copied; of an adapter its two files and the layout of its prompts. An index is registered where it
/// is, as it goes on changing.
/// With --json the entry, and added: false for bytes that were there.
#[derive(Args)]
struct Add {
    /// Its name
    name: String,
    /// A model, an adapter, a .jsonl file, an index ..
    path: PathBuf,
    /// What it is, where its files do not say: model, adapter, dataset, index, evaluation, run
    #[arg(long)]
    kind: Option<Kind>,
    /// Use it where it is, and keep only its hashes
    #[arg(long)]
    in_place: bool,
    /// What it was made from, as what: original=smollm2@1, or a SHA-256; an adapter's base is known
    #[arg(long, value_name = "ROLE=NAME")]
    parent: Vec<String>,
    /// A tag
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<String>,
    /// An alias to point at it
    #[arg(long)]
    alias: Option<String>,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// List entries; with --json a line each
#[derive(Args)]
struct List {
    /// Only of this name
    name: Option<String>,
    /// Only of this kind
    #[arg(long)]
    kind: Option<Kind>,
    /// Only with this tag
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<String>,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Show an entry: its files, parents, tags, and where its name's aliases pointed
///
/// With --json also path, files: [{path, sha256, bytes}], history: [{alias, action, from, to, time, evaluation}].
#[derive(Args)]
struct Show {
    /// name, name@3 or name@champion
    entry: String,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Point an alias at an entry, or take it away
#[derive(Args)]
struct Alias {
    /// name, name@3 or name@candidate
    entry: String,
    /// The alias
    alias: String,
    /// Take it away from the name
    #[arg(long)]
    delete: bool,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Tag an entry
#[derive(Args)]
struct Tag {
    /// name, name@3 or name@champion
    entry: String,
    /// KEY=VALUE sets, KEY alone takes away
    #[arg(value_name = "KEY=VALUE", required = true)]
    tags: Vec<String>,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Show what an entry was made from, and what was made from it
///
/// With --json the entry with ancestors and descendants, entries each.
#[derive(Args)]
struct Lineage {
    /// name, name@3 or name@champion
    entry: String,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Read every byte again; exit code 1 where one is not what was registered
///
/// With --json: entries, files, bytes, damage: [{entry, file, what}], changed: indexes that changed since, which is no
/// fault.
#[derive(Args)]
struct Verify {
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Take an entry out; not one that an alias points at or that something else was made from
#[derive(Args)]
struct Remove {
    /// name@3
    entry: String,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Take out the bytes that no entry holds
///
/// With --json: blobs, bytes, trees, leftovers.
#[derive(Args)]
struct Gc {
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Write an entry's files into a new directory, each checked
#[derive(Args)]
struct Export {
    /// name, name@3 or name@champion
    entry: String,
    /// The directory
    dir: PathBuf,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

/// Register, in place, the models that this machine has already
///
/// Looks in Hugging Face's cache ($HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub) and in handmill's
/// ($HANDMILL_MODELS or ~/.cache/handmill/models); models of kinds that handmill cannot read are told and passed over.
/// With --json a line each: the entry, or path and error.
#[derive(Args)]
struct Scan {
    /// A folder of Hugging Face's cache layout, models--ORG--NAME/snapshots/REV, instead
    #[arg(long, value_name = "DIR")]
    hub: Vec<PathBuf>,
    /// A folder of models instead
    #[arg(long, value_name = "DIR")]
    folder: Vec<PathBuf>,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

impl Registry {
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Command::Init(command) => command.run(),
            Command::Add(command) => command.run(),
            Command::List(command) => command.run(),
            Command::Show(command) => command.run(),
            Command::Alias(command) => command.run(),
            Command::Tag(command) => command.run(),
            Command::Lineage(command) => command.run(),
            Command::Verify(command) => command.run(),
            Command::Remove(command) => command.run(),
            Command::Gc(command) => command.run(),
            Command::Export(command) => command.run(),
            Command::Scan(command) => command.run(),
        }
    }
}

/// Prints an entry, on a line for people.
fn print(entry: &Entry, json: bool) -> Result<()> {
    match json {
        true => print_json(&entry.json()),
        false => Ok(writeln!(io::stdout(), "{}", line(entry))?),
    }
}

fn line(entry: &Entry) -> String {
    let aliases: Vec<String> = entry.aliases.iter().map(|alias| format!("@{alias}")).collect();
    let tags: Vec<String> = entry.tags.iter().map(|(key, value)| format!("{}={}", quote(key), quote(value))).collect();
    let (bytes, short) = (human_bytes(entry.bytes), entry.sha256.get(..12).unwrap_or_default());
    let more = [aliases, tags].concat().join(" ");
    let text = format!("{:<32} {:<10} {short} {bytes:>9}  {}  {more}", entry.reference(), entry.kind, entry.created);
    text.trim_end().into()
}

/// `KEY=VALUE`.
fn pair(text: &str) -> Result<(String, String)> {
    let wrong = || Usage(format!("{} has no =: give KEY=VALUE", quote(text)));
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(wrong)?;
    Ok((key.into(), value.into()))
}

impl Init {
    fn run(&self) -> Result<()> {
        let dir = create()?.dir.display().to_string();
        match self.json {
            true => print_json(&json!({ "registry": dir })),
            false => Ok(writeln!(io::stdout(), "{dir} is a registry")?),
        }
    }
}

impl Add {
    fn run(&self) -> Result<()> {
        let registry = create()?;
        std::fs::metadata(&self.path).map_err(|cause| handmill::Error::io(&self.path, cause))?;
        let kind = self
            .kind
            .or_else(|| Kind::of(&self.path))
            .ok_or_else(|| Usage(format!("{}: its files do not say what it is: give --kind", self.path.display())))?;
        let source = if self.in_place { Source::InPlace(&self.path) } else { Source::Path(&self.path) };
        let mut new = New::of(&self.name, kind, source);
        for text in &self.parent {
            let (role, parent) = pair(text)?;
            let hash = if files::is_hash(&parent) { parent } else { registry.get(&parent, None)?.identity };
            new.parents.push((role, hash));
        }
        for text in &self.tag {
            new.tags.push(pair(text)?);
        }
        if let Some(alias) = &self.alias {
            registry::names::check_alias(alias)?;
        }
        let (mut entry, added) = registry.add(&new)?;
        if let Some(alias) = &self.alias {
            entry = registry.alias(&entry, alias)?;
        }
        if self.json {
            let mut object = entry.json();
            object["added"] = added.into();
            return print_json(&object);
        }
        if !added {
            note("these bytes were there already");
        }
        print(&entry, false)
    }
}

impl List {
    fn run(&self) -> Result<()> {
        let mut entries = open()?.list(self.kind, self.name.as_deref())?;
        for text in &self.tag {
            let (key, value) = pair(text)?;
            entries.retain(|entry| entry.tags.get(&key) == Some(&value));
        }
        if entries.is_empty() && !self.json {
            note("nothing of this is registered: see `handmill registry add NAME PATH` and `handmill registry scan`");
        }
        entries.iter().try_for_each(|entry| print(entry, self.json))
    }
}

impl Show {
    fn run(&self) -> Result<()> {
        let registry = open()?;
        let entry = registry.get(&self.entry, None)?;
        let (files, path) = (registry.files(&entry)?, registry.path(&entry)?);
        let history = registry.history(&entry.name)?;
        if self.json {
            let file = |f: &files::Stored| json!({ "path": f.path, "sha256": f.sha256, "bytes": f.bytes });
            let mut object = entry.json();
            object["path"] = path.display().to_string().into();
            object["files"] = files.iter().map(file).collect();
            object["history"] = history.iter().map(|moved| moved.json()).collect();
            return print_json(&object);
        }
        let mut out = io::stdout();
        writeln!(out, "{}", line(&entry))?;
        writeln!(out, "path      {}{}", path.display(), if entry.place.is_some() { ", in place" } else { "" })?;
        writeln!(out, "identity  {}", entry.identity)?;
        for parent in &entry.parents {
            let known = parent.entry.as_ref().map_or(String::new(), |(name, version)| format!("  {name}@{version}"));
            writeln!(out, "from      {:<10} {}{known}", quote(&parent.role), quote(&parent.sha256))?;
        }
        for (key, value) in &entry.metadata {
            writeln!(out, "{:<9} {}", quote(key), quote(&words(value)))?;
        }
        for file in files {
            writeln!(out, "file      {} {:>9}  {}", &file.sha256[..12], human_bytes(file.bytes), quote(&file.path))?;
        }
        for moved in history {
            let version = |version: Option<i64>| version.map_or("none".into(), |version| version.to_string());
            let by = moved.evaluation.map_or(String::new(), |by| format!(" by {by}"));
            let (before, after) = (version(moved.before), version(moved.after));
            writeln!(out, "{}  @{} {before} -> {after}, {}{by}", moved.time, moved.alias, moved.action)?;
        }
        Ok(())
    }
}

impl Alias {
    fn run(&self) -> Result<()> {
        let registry = open()?;
        if !self.delete {
            let entry = registry.get(&self.entry, None)?;
            return print(&registry.alias(&entry, &self.alias)?, self.json);
        }
        let name = Reference::parse(&self.entry)?.name;
        let deleted = registry.unalias(&name, &self.alias)?;
        if !deleted {
            anyhow::bail!("there is no {name}@{}", quote(&self.alias));
        }
        match self.json {
            true => print_json(&json!({ "name": name, "alias": self.alias, "deleted": true })),
            false => Ok(writeln!(io::stdout(), "{name}@{} is taken away", self.alias)?),
        }
    }
}

impl Tag {
    fn run(&self) -> Result<()> {
        let registry = open()?;
        let mut entry = registry.get(&self.entry, None)?;
        for text in &self.tags {
            let (key, value) = text.split_once('=').map_or((&text[..], None), |(key, value)| (key, Some(value)));
            entry = registry.tag(&entry, key, value)?;
        }
        print(&entry, self.json)
    }
}

impl Lineage {
    fn run(&self) -> Result<()> {
        let registry = open()?;
        let entry = registry.get(&self.entry, None)?;
        let (up, down) = registry.lineage(&entry)?;
        if self.json {
            let mut object = entry.json();
            object["ancestors"] = up.iter().map(Entry::json).collect();
            object["descendants"] = down.iter().map(Entry::json).collect();
            return print_json(&object);
        }
        let mut out = io::stdout();
        for above in up.iter().rev() {
            writeln!(out, "  {}", line(above))?;
        }
        writeln!(out, "> {}", line(&entry))?;
        let unknown = entry.parents.iter().filter(|parent| parent.entry.is_none());
        for parent in unknown {
            writeln!(out, "  made from {} {}, which is not registered", quote(&parent.role), quote(&parent.sha256))?;
        }
        for below in &down {
            writeln!(out, "  {}", line(below))?;
        }
        Ok(())
    }
}

impl Verify {
    fn run(&self) -> Result<()> {
        let bar = progress(0, "entries");
        let found = open()?.verify(&mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        if self.json {
            let damage = found.damage.iter().map(|damage| {
                json!({ "entry": damage.entry, "file": damage.file.display().to_string(), "what": damage.what })
            });
            print_json(&json!({ "entries": found.entries, "files": found.files, "bytes": found.bytes,
                "damage": damage.collect::<Value>(), "changed": found.changed }))?;
        } else {
            let mut out = io::stdout();
            for damage in &found.damage {
                writeln!(out, "{}: {}: {}", damage.entry, damage.file.display(), damage.what)?;
            }
            for changed in &found.changed {
                writeln!(out, "{changed}: the index has changed since it was registered")?;
            }
            let read = [
                count(found.entries, "entry", "entries"),
                count(found.files, "file", "files"),
                human_bytes(found.bytes),
            ];
            let damage = match found.damage.len() {
                0 => "no damage".into(),
                n => count(n, "is damaged", "are damaged"),
            };
            writeln!(out, "{} read: {damage}", read.join(", "))?;
            if !found.damage.is_empty() {
                note(
                    "register what is damaged anew from where it came (registry add), or take it out (registry remove)",
                );
            }
        }
        match found.damage.is_empty() {
            true => Ok(()),
            false => Err(ChecksFailed.into()),
        }
    }
}

impl Remove {
    fn run(&self) -> Result<()> {
        let registry = open()?;
        if !self.entry.contains('@') {
            return Err(Usage("name the version to take out, such as support@3".into()).into());
        }
        let entry = registry.get(&self.entry, None)?;
        registry.remove(&entry)?;
        print(&entry, self.json)
    }
}

impl Gc {
    fn run(&self) -> Result<()> {
        let done = open()?.collect()?;
        if self.json {
            return print_json(&json!({ "blobs": done.blobs, "bytes": done.bytes, "trees": done.trees,
                "leftovers": done.leftovers }));
        }
        let blobs = (done.blobs > 0).then(|| {
            let files = count(done.blobs, "file that no entry has", "files that no entry has");
            format!("{files} ({})", human_bytes(done.bytes))
        });
        let more = |n: usize, one: &str, many: &str| (n > 0).then(|| count(n, one, many));
        let trees = more(done.trees, "folder of them", "folders of them");
        let left = more(done.leftovers, "leftover of work that was cut off", "leftovers of work that was cut off");
        let out: Vec<String> = [blobs, trees, left].into_iter().flatten().collect();
        let what = if out.is_empty() { "nothing to take out".into() } else { format!("taken out: {}", out.join(", ")) };
        Ok(writeln!(io::stdout(), "{what}")?)
    }
}

/// A value as people read it: texts, and lists of them, without quotation marks.
fn words(value: &Value) -> String {
    let list = |values: &Vec<Value>| values.iter().map(words).collect::<Vec<_>>().join(", ");
    value.as_str().map(str::to_string).or(value.as_array().map(list)).unwrap_or_else(|| value.to_string())
}

/// A number with its noun.
fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

impl Export {
    fn run(&self) -> Result<()> {
        let registry = open()?;
        let entry = registry.get(&self.entry, None)?;
        let written = registry.export(&entry, &self.dir)?;
        if self.json {
            let mut object = entry.json();
            object["files"] = written.iter().map(|path| path.display().to_string()).collect();
            return print_json(&object);
        }
        let dir = self.dir.display();
        Ok(writeln!(io::stdout(), "{dir}: files {}, {}", written.len(), human_bytes(entry.bytes))?)
    }
}

impl Scan {
    fn run(&self) -> Result<()> {
        let (hubs, folders) = match self.hub.is_empty() && self.folder.is_empty() {
            true => caches(),
            false => (self.hub.clone(), self.folder.clone()),
        };
        let found = create()?.scan(&hubs, &folders)?;
        for one in &found {
            match (&one.entry, self.json) {
                (Ok((entry, _)), json) => print(entry, json)?,
                (Err(error), true) => {
                    let path = one.path.display().to_string();
                    print_json(&json!({ "path": path, "error": error.to_string() }))?;
                }
                (Err(error), false) => note(&format!("passed over: {error}")),
            }
        }
        if found.is_empty() {
            let all: Vec<String> = hubs.iter().chain(&folders).map(|path| path.display().to_string()).collect();
            note(&format!("no model was found in {}", all.join(", ")));
        }
        Ok(())
    }
}

/// The caches of this machine: of Hugging Face's layout, and of handmill's own.
fn caches() -> (Vec<PathBuf>, Vec<PathBuf>) {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = variable("HOME").or_else(|| variable("USERPROFILE")).unwrap_or_default();
    let cache = variable("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache"));
    let hub = variable("HF_HUB_CACHE").or_else(|| Some(variable("HF_HOME")?.join("hub")));
    let models = variable("HANDMILL_MODELS").unwrap_or_else(|| cache.join("handmill/models"));
    (vec![hub.unwrap_or_else(|| cache.join("huggingface/hub"))], vec![models])
}
