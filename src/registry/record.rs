//! What commands leave in a registry: a run, and under a name what they made, each with what it was made from.

use serde_json::{json, Map, Value};

use super::entries::{Entry, New, Source};
use super::files::is_hash;
use super::{Kind, Registry};
use crate::error::Error;

/// Something that a command made.
pub struct Product<'a> {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its bytes.
    pub source: Source<'a>,
    /// What it was made from beside the run's own parents: roles and identities.
    pub parents: Vec<(String, String)>,
}

/// Roles and identities of what a run was made from, by the keys of its report that hold them: such as `base_sha256`
/// as `base`. Keys that are not there, or hold no hash, are passed over.
pub fn parents(report: &Map<String, Value>, keys: &[(&str, &str)]) -> Vec<(String, String)> {
    let hash = |key: &str| report.get(key).and_then(Value::as_str).filter(|text| is_hash(text)).map(str::to_string);
    keys.iter().filter_map(|(key, role)| Some((role.to_string(), hash(key)?))).collect()
}

/// Keeps a command's run, as `command@n`, and what it made.
pub fn leave(
    registry: &Registry,
    command: &str,
    report: &Map<String, Value>,
    parents: &[(String, String)],
    products: &[Product],
) -> Result<Vec<Entry>, Error> {
    let text = format!("{:#}\n", json!(report));
    let mut run = New::of(command, Kind::Run, Source::Bytes("run.json", text.as_bytes()));
    run.parents = parents.to_vec();
    for key in ["status", "out", "device"] {
        run.metadata.extend(report.get(key).map(|value| (key.to_string(), value.clone())));
    }
    let (run, _) = registry.add(&run)?;
    let mut left = vec![run];
    for product in products {
        let mut new = New::of(&product.name, product.kind, product.source);
        new.parents = [parents, &product.parents, &[("run".to_string(), left[0].identity.clone())]].concat();
        left.push(registry.add(&new)?.0);
    }
    left.rotate_left(1); // what was made comes first
    Ok(left)
}
