//! Hugging Face directories: `config.json` and either `model.safetensors` or the shards that
//! `model.safetensors.index.json` names.
//!
//! ```text
//! safetensors: u64 n   n bytes of JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..}   data
//! ```
//!
//! JSON files are mapped and parsed into typed structs, so unknown keys cost nothing; the data of safetensors is not
//! touched. File names inside the index must be plain names. Symbolic links are followed, since the hub's cache stores
//! a model as a directory of links; whoever made the directory made them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};
use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::checkpoint::{map_file, Encoding, StoredTensor};
use crate::error::{quote, Error};

/// The largest JSON text that is parsed, in bytes: ten times what a safetensors header of 10,000 tensors takes.
const MAX_JSON: usize = 16 << 20;

/// An open directory.
#[derive(Debug)]
pub struct HfDir {
    /// The directory.
    pub path: PathBuf,
    /// Its safetensors files: one, or the shards in alphabetical order.
    pub shards: Vec<Shard>,
}

/// An open safetensors file.
///
/// Bytes are read straight from the mapping: should another process cut the file short while it is open, touching the
/// missing part ends this process with SIGBUS. Replace model files by renaming, not by writing over them.
#[derive(Debug)]
pub struct Shard {
    /// The file.
    pub path: PathBuf,
    /// The whole file.
    pub mmap: Arc<Mmap>,
    /// Its tensors in the order of their bytes.
    pub tensors: Vec<StoredTensor>,
}

/// What `model.safetensors.index.json` must hold: the file of each tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl HfDir {
    /// Maps the safetensors files of `path` and reads their headers. Refuses, naming the file and the tensor: a
    /// directory without `config.json` or safetensors, an index that names anything but files beside it, shards that
    /// are missing or lack a tensor the index promises, tensors in two shards, and whatever [`Shard::open`] refuses.
    pub fn open(path: &Path) -> Result<HfDir, Error> {
        if path.join("config.json").symlink_metadata().is_err() {
            return Err(Error::file(path, "holds no config.json: not a Hugging Face model directory"));
        }
        let single = path.join("model.safetensors");
        let index_name = "model.safetensors.index.json";
        let index_path = path.join(index_name);
        let mut dir = HfDir { path: path.to_path_buf(), shards: Vec::new() };
        if single.symlink_metadata().is_ok() {
            dir.shards.push(Shard::open(&single)?);
            return Ok(dir);
        }
        let Some(index) = dir.json::<Index>(index_name)? else {
            let what = format!("holds neither model.safetensors nor {index_name}: convert the weights to safetensors");
            return Err(Error::file(path, what));
        };
        for (tensor, file) in &index.weight_map {
            // A plain name: no separator of any system, no drive, not `..`, not the index itself.
            if file.contains(['/', '\\', ':', '\0']) || !file.ends_with(".safetensors") {
                let what = format!("is said to be in {}, which is not the name of a .safetensors file", quote(file));
                return Err(Error::tensor(&index_path, tensor, what));
            }
        }
        let files: BTreeSet<&String> = index.weight_map.values().collect();
        let mut homes: BTreeMap<&str, &str> = BTreeMap::new();
        for file in &files {
            dir.shards.push(Shard::open(&path.join(file))?);
        }
        for (shard, file) in dir.shards.iter().zip(&files) {
            for tensor in &shard.tensors {
                if let Some(other) = homes.insert(&tensor.name, file) {
                    return Err(Error::tensor(&shard.path, &tensor.name, format!("is also in {}", quote(other))));
                }
            }
        }
        for (tensor, file) in &index.weight_map {
            if homes.get(tensor.as_str()) != Some(&file.as_str()) {
                let what = format!("is said to be in {}, which does not hold it", quote(file));
                return Err(Error::tensor(&index_path, tensor, what));
            }
        }
        Ok(dir)
    }

    /// Parses the JSON file `name` of the directory; `None` where there is no such file. An error names the file, and
    /// the line and column of what does not fit `T`.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Error> {
        let path = self.path.join(name);
        if path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Ok(None);
        }
        let mmap = map_file(&path)?;
        if mmap.len() > MAX_JSON {
            let what = format!("takes {} bytes; JSON files of up to {MAX_JSON} are read", mmap.len());
            return Err(Error::file(&path, what));
        }
        serde_json::from_slice(&mmap).map(Some).map_err(|error| Error::json(&path, &error))
    }
}

/// The entries of a safetensors header in the order of the text, duplicates included.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info = map.next_value().map_err(|e| A::Error::custom(format!("tensor {}: {e}", quote(&name))));
                    entries.push((name, info?));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Shard {
    /// Maps `path` and reads its header. Refuses, naming the file and the tensor: a header longer than the file or than
    /// 16 MiB, text that is not the JSON expected, duplicate names, shapes that overflow or disagree with their bytes,
    /// bytes shared or left over, and element types without an [`Encoding`].
    pub fn open(path: &Path) -> Result<Shard, Error> {
        let mmap = map_file(path)?;
        let Some((length, rest)) = mmap.split_first_chunk::<8>() else {
            return Err(Error::file(path, format!("has {} bytes, too few for a safetensors file", mmap.len())));
        };
        let length = u64::from_le_bytes(*length);
        let Some(length) = usize::try_from(length).ok().filter(|&n| n <= rest.len()) else {
            let what = format!(
                "claims a header of {length} bytes where {} follow: truncated, or not a safetensors file",
                rest.len()
            );
            return Err(Error::file(path, what));
        };
        if length > MAX_JSON {
            return Err(Error::file(path, format!("has a header of {length} bytes; up to {MAX_JSON} are read")));
        }
        let (text, data) = rest.split_at(length);
        let Header(mut entries) = serde_json::from_slice(text).map_err(|error| Error::json(path, &error))?;

        let mut names = BTreeSet::new();
        let mut tensors = Vec::new();
        entries.sort_by_key(|(_, info)| info.data_offsets);
        for (name, info) in &entries {
            if !names.insert(name.as_str()) {
                return Err(Error::tensor(path, name, "appears twice"));
            }
            let stored = check(name, info, 8 + length, data.len()).map_err(|what| Error::tensor(path, name, what))?;
            tensors.push(stored);
        }
        // The crate holds the rule for the whole: by offset, tensors follow each other without hole or overlap.
        let metadata = Metadata::new(None, entries).map_err(|error| match error {
            SafeTensorError::InvalidOffset(name) => {
                Error::tensor(path, &name, "does not begin where the tensor before it ends: bytes shared or left over")
            }
            error => Error::file(path, quote(&error.to_string())),
        })?;
        if metadata.data_len() != data.len() {
            let what = format!("{} bytes of tensors are followed by others", metadata.data_len());
            return Err(Error::file(path, what));
        }
        Ok(Shard { path: path.to_path_buf(), mmap, tensors })
    }
}

/// One entry, alone: its bytes are as many as its shape needs, and lie within the `len` bytes of data that begin at
/// `data` in the file.
fn check(name: &str, info: &TensorInfo, data: usize, len: usize) -> Result<StoredTensor, String> {
    let encoding = match info.dtype {
        Dtype::F64 => Encoding::F64,
        Dtype::F32 => Encoding::F32,
        Dtype::F16 => Encoding::F16,
        Dtype::BF16 => Encoding::BF16,
        Dtype::I64 => Encoding::I64,
        Dtype::I32 => Encoding::I32,
        Dtype::I16 => Encoding::I16,
        Dtype::I8 => Encoding::I8,
        Dtype::U64 => Encoding::U64,
        Dtype::U32 => Encoding::U32,
        Dtype::U16 => Encoding::U16,
        Dtype::U8 => Encoding::U8,
        Dtype::BOOL => Encoding::Bool,
        other => return Err(format!("is stored as {other}, which is not supported: convert the model to BF16")),
    };
    if info.shape.len() > 8 {
        return Err(format!("has {} dims; up to 8 are read", info.shape.len()));
    }
    let (begin, end) = info.data_offsets;
    if begin > end || end > len {
        return Err(format!("claims bytes {begin} to {end} of {len}: truncated? fetch the file again"));
    }
    let elements = info.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let Some(bytes) = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize() / 8)) else {
        return Err(format!("its shape {:?} overflows", info.shape));
    };
    if bytes != end - begin {
        let (shape, found) = (&info.shape, end - begin);
        return Err(format!("its shape {shape:?} of {} takes {bytes} bytes, not {found}", encoding.name()));
    }
    Ok(StoredTensor { name: name.to_string(), encoding, shape: info.shape.clone(), offset: data + begin, len: bytes })
}
