//! `--register`: what a command made, kept in the registry with what it was made from.

use std::path::Path;

use anyhow::Result;
use clap::Args;
use handmill::model::adapter::model_sha256;
use handmill::model::checkpoint::Checkpoint;
use handmill::registry::entries::Entry;
use handmill::registry::names::{self, Reference, Which};
use handmill::registry::record::{self, Product};
use handmill::registry::Kind;
use serde_json::{Map, Value};

use super::registry::{create, directory};
use super::{note, Usage};

/// Under which name a command registers what it made.
#[derive(Args)]
pub struct RegisterFlag {
    /// Register what is made as the next version of this name, with what it was made from; where a registry is named
    /// and can be written, a command's run is recorded without it too
    #[arg(long, value_name = "NAME")]
    register: Option<String>,
}

impl RegisterFlag {
    /// Refuses, before any work, a name that cannot be given to what is made; `ends` follow the name, with their kinds.
    pub fn check(&self, ends: &[(&str, Kind)]) -> Result<()> {
        let Some(name) = &self.register else { return Ok(()) };
        let registry = create()?;
        for (end, kind) in ends {
            let name = format!("{name}{end}");
            names::check_name(&name).map_err(|error| Usage(error.to_string()))?;
            registry.find(&Reference { name, which: Which::Latest }, Some(*kind))?;
        }
        Ok(())
    }

    /// The name, followed by `end`.
    pub fn name(&self, end: &str) -> Option<String> {
        self.register.as_ref().map(|name| format!("{name}{end}"))
    }

    /// Records a run where a registry is named, and registers what was made where a name is given: `products` are
    /// those with one.
    pub fn leave(
        &self,
        command: &str,
        report: &Value,
        parents: &[(String, String)],
        products: Vec<Option<Product>>,
    ) -> Result<()> {
        if directory().is_none() {
            return Ok(());
        }
        let products: Vec<Product> = products.into_iter().flatten().collect();
        // The command's name tells its run from what it made, where that is the same figures.
        let mut object = Map::from_iter([("command".to_string(), command.into())]);
        object.extend(report.as_object().cloned().unwrap_or_default());
        let left = create().and_then(|registry| Ok(record::leave(&registry, command, &object, parents, &products)?));
        let left = match left {
            Err(error) if self.register.is_none() => {
                // Nobody asked for it, and what the command is for is done.
                note(&format!("not recorded: {}", super::chain(&error)));
                return Ok(());
            }
            left => left?,
        };
        let names: Vec<String> = left.iter().map(Entry::reference).collect();
        note(&format!("registered: {}", names.join(", ")));
        if let Some(adapter) = left.iter().find(|entry| entry.kind == Kind::Adapter) {
            let (name, version) = (&adapter.name, adapter.version);
            note(&format!(
                "handmill promote {name} --candidate {version} --questions FILE puts it in use, if it is better"
            ));
        }
        Ok(())
    }
}

/// The identity of a model, where a registry is named that is to know it.
pub fn model_hash(path: &Path) -> Result<Vec<(String, String)>> {
    match directory() {
        None => Ok(Vec::new()),
        Some(_) => Ok(vec![("base".into(), model_sha256(&Checkpoint::open(path)?)?)]),
    }
}
