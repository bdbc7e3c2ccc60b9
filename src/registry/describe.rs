//! What the files of a new entry say of themselves.

use std::path::Path;

use serde_json::{json, Map, Value};

use super::{files, Kind};
use crate::error::Error;
use crate::model::adapter::{model_sha256, Adapter};
use crate::model::checkpoint::Checkpoint;
use crate::retrieve::index::Index;

/// What is told beside parents and metadata.
#[derive(Default)]
pub(super) struct Told {
    /// The hash by which others speak of it, where that is not of its bytes.
    pub identity: Option<String>,
    /// How large it is, where its files are not listed.
    pub bytes: Option<u64>,
}

/// What can be told of what lies at `path`, which must be what it is said to be; adds to what it was made from and to
/// what is known of it.
pub(super) fn describe(
    path: &Path,
    kind: Kind,
    parents: &mut Vec<(String, String)>,
    metadata: &mut Map<String, Value>,
) -> Result<Told, Error> {
    match kind {
        Kind::Model => {
            let checkpoint = Checkpoint::open(path)?;
            metadata.insert("architecture".into(), checkpoint.config.arch.name().into());
            // That of a GGUF file is of its bytes, which are hashed anyway.
            let identity = path.is_dir().then(|| model_sha256(&checkpoint)).transpose()?;
            Ok(Told { identity, bytes: None })
        }
        Kind::Adapter => {
            let adapter = Adapter::open(path)?;
            if let Some(base) = adapter.base_sha256.clone().filter(|hash| files::is_hash(hash)) {
                parents.push(("base".into(), base));
            }
            let config = &adapter.config;
            metadata.insert("r".into(), config.r.into());
            metadata.insert("alpha".into(), config.alpha.into());
            metadata.insert("targets".into(), json!(config.targets));
            metadata.insert("base".into(), json!(config.base));
            Ok(Told::default())
        }
        Kind::Index => {
            let index = Index::open_any(path)?;
            let info = index.info()?;
            metadata.insert("documents".into(), info.documents.into());
            metadata.insert("chunks".into(), info.chunks.into());
            metadata.insert("model_hash".into(), info.model_hash.into());
            Ok(Told { identity: Some(index.fingerprint()?), bytes: Some(info.bytes) })
        }
        Kind::Dataset | Kind::Evaluation | Kind::Run => Ok(Told::default()),
    }
}
