//! A model on disk: its config and its tensors, under one set of names whatever the files are.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use super::config::Config;
use super::gguf::{ggml_type, Gguf};
use super::hf::HfDir;
use super::layout;
use crate::error::{quote, Error};

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Encoding {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    /// Quantized blocks of this ggml type id: always one of those GGUF has in use.
    Ggml(u32),
}

impl Encoding {
    /// The encoding of a ggml type id that is in use: plain types become the plain encodings.
    pub(crate) fn from_ggml(id: u32) -> Encoding {
        match id {
            0 => Encoding::F32,
            1 => Encoding::F16,
            24 => Encoding::I8,
            25 => Encoding::I16,
            26 => Encoding::I32,
            27 => Encoding::I64,
            28 => Encoding::F64,
            30 => Encoding::BF16,
            _ => Encoding::Ggml(id),
        }
    }

    /// The name in messages: `F32`, `Q4_1`, ...
    pub fn name(self) -> &'static str {
        match self {
            Encoding::F64 => "F64",
            Encoding::F32 => "F32",
            Encoding::F16 => "F16",
            Encoding::BF16 => "BF16",
            Encoding::I64 => "I64",
            Encoding::I32 => "I32",
            Encoding::I16 => "I16",
            Encoding::I8 => "I8",
            Encoding::U64 => "U64",
            Encoding::U32 => "U32",
            Encoding::U16 => "U16",
            Encoding::U8 => "U8",
            Encoding::Bool => "BOOL",
            Encoding::Ggml(id) => ggml_type(id).map_or("unknown", |kind| kind.name),
        }
    }
}

/// A tensor as a file describes it, checked to lie within the file.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// The name in the file.
    pub name: String,
    /// How the values are stored.
    pub encoding: Encoding,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Where the bytes begin in the file.
    pub offset: usize,
    /// How many bytes.
    pub len: usize,
}

/// The files behind a checkpoint.
#[derive(Debug)]
pub enum Source {
    /// One GGUF file, whose header also holds the tokenizer.
    Gguf(Gguf),
    /// A Hugging Face directory.
    Hf(HfDir),
}

/// Where a tensor is: file and index in [`Source`].
#[derive(Debug)]
struct TensorEntry {
    shard: usize,
    index: usize,
    rope_permuted: bool,
}

/// A model on disk, mapped, with every tensor its architecture needs known to be there in the right shape.
///
/// Nothing but headers has been read: weights are touched when [`TensorView::bytes`] is. Should another process cut a
/// file short while it is mapped, touching the missing part ends this process with SIGBUS; replace files by renaming.
#[derive(Debug)]
pub struct Checkpoint {
    /// Sizes and constants.
    pub config: Config,
    /// The files that hold the tensors.
    pub files: Vec<PathBuf>,
    /// The open files.
    pub source: Source,
    tensors: BTreeMap<String, TensorEntry>,
}

/// A tensor of a [`Checkpoint`], in place.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Hugging Face name.
    pub name: &'a str,
    /// The name in the file.
    pub stored_name: &'a str,
    /// How the values are stored.
    pub encoding: Encoding,
    /// Sizes, outermost first. That of bitsandbytes' packed weights is what the file says: see [`Checkpoint::bnb4`].
    pub shape: Vec<usize>,
    /// The values, little-endian, at any alignment.
    pub bytes: &'a [u8],
    /// The file's mapping.
    pub mmap: &'a Arc<Mmap>,
    /// Where `bytes` begin in `mmap`.
    pub offset: usize,
    /// The file.
    pub file: &'a Path,
    /// The rows of each head are stored in GGUF's order for interleaved rotary embeddings: row 2i+j of a head holds row
    /// j·head_dim/2 + i of the Hugging Face order (i < head_dim/2, j < 2). Set for q and k of GGUF's `llama`.
    pub rope_permuted: bool,
}

impl Checkpoint {
    /// Opens a `.gguf` file or a Hugging Face directory, reads config and headers, and checks that every tensor the
    /// architecture needs is there, in its shape and in an encoding that makes sense for it.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        let meta = std::fs::metadata(path).map_err(|cause| Error::io(path, cause))?;
        let (config, source) = if meta.is_dir() {
            let dir = HfDir::open(path)?;
            (Config::from_hf(&dir)?, Source::Hf(dir))
        } else {
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                return Err(Error::file(
                    path,
                    "name the directory that holds this file, config.json and tokenizer.json",
                ));
            }
            let gguf = Gguf::open(path)?;
            (Config::from_gguf(&gguf)?, Source::Gguf(gguf))
        };
        let files = match &source {
            Source::Gguf(gguf) => vec![gguf.path.clone()],
            Source::Hf(dir) => dir.shards.iter().map(|shard| shard.path.clone()).collect(),
        };
        let mut checkpoint = Checkpoint { config, files, source, tensors: BTreeMap::new() };
        checkpoint.index()?;
        layout::validate(&checkpoint)?;
        Ok(checkpoint)
    }

    /// Files every stored tensor under its Hugging Face name.
    fn index(&mut self) -> Result<(), Error> {
        let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
        let gguf = matches!(self.source, Source::Gguf(_));
        for shard in 0..self.files.len() {
            for (index, stored) in self.shard(shard).0.iter().enumerate() {
                let name = match gguf {
                    true => layout::name_from_gguf(&stored.name),
                    false => layout::name_from_hf(self.config.arch, &stored.name),
                };
                let rope_permuted = gguf && layout::is_rope_permuted(&self.config, &name);
                if let Some(other) = tensors.insert(name, TensorEntry { shard, index, rope_permuted }) {
                    let other = quote(&self.shard(other.shard).0[other.index].name);
                    let what = format!("stands for the same weight as tensor {other}");
                    return Err(Error::tensor(&self.files[shard], &stored.name, what));
                }
            }
        }
        self.tensors = tensors;
        Ok(())
    }

    /// The tensors and the mapping of a file.
    fn shard(&self, shard: usize) -> (&[StoredTensor], &Arc<Mmap>) {
        match &self.source {
            Source::Gguf(gguf) => (&gguf.tensors, &gguf.mmap),
            Source::Hf(dir) => (&dir.shards[shard].tensors, &dir.shards[shard].mmap),
        }
    }

    /// Every tensor's Hugging Face name, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// True when there is a tensor of this Hugging Face name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of this Hugging Face name. Where it is missing, the error names the file and the nearest names.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let Some((name, entry)) = self.tensors.get_key_value(name) else {
            return Err(self.missing(name));
        };
        let (stored, mmap) = self.shard(entry.shard);
        let stored = &stored[entry.index];
        Ok(TensorView {
            name,
            stored_name: &stored.name,
            encoding: stored.encoding,
            shape: stored.shape.clone(),
            bytes: &mmap[stored.offset..stored.offset + stored.len],
            mmap,
            offset: stored.offset,
            file: &self.files[entry.shard],
            rope_permuted: entry.rope_permuted,
        })
    }

    fn missing(&self, name: &str) -> Error {
        let path = match &self.source {
            Source::Gguf(gguf) => &gguf.path,
            Source::Hf(dir) => &dir.path,
        };
        // Nearest: the longest beginning and end in common.
        let common = |other: &str| {
            let head = name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
            let tail = name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
            std::cmp::Reverse(head + tail)
        };
        let mut nearest: Vec<&str> = self.names().collect();
        nearest.sort_by_cached_key(|other| common(other));
        let nearest: Vec<String> = nearest.iter().take(3).map(|name| quote(name)).collect();
        let what = match nearest.is_empty() {
            true => "is missing; the model holds no tensor at all".to_string(),
            false => format!("is missing; the nearest names are {}", nearest.join(", ")),
        };
        Error::tensor(path, name, what)
    }

    /// Bytes on disk of the files that hold the tensors.
    pub fn bytes(&self) -> u64 {
        (0..self.files.len()).map(|shard| self.shard(shard).1.len() as u64).sum()
    }
}

impl TensorView<'_> {
    /// The values of an F32, F16 or BF16 tensor as f32, exactly. For the small ones: norms, biases.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        let pairs = || self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.encoding {
            Encoding::F32 => {
                Ok(self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
            Encoding::F16 => Ok(pairs().map(|bits| f16::from_bits(bits).to_f32()).collect()),
            Encoding::BF16 => Ok(pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect()),
            other => Err(self.wrong(format!("must be F32, F16 or BF16, not {}", other.name()))),
        }
    }

    /// An error about this tensor.
    pub fn wrong(&self, what: impl Into<String>) -> Error {
        Error::tensor(self.file, self.stored_name, what)
    }
}

/// Maps a regular file that is not empty, for reading.
pub(crate) fn map_file(path: &Path) -> Result<Arc<Mmap>, Error> {
    // Asked before opening: opening a pipe would wait for its writer.
    let meta = std::fs::metadata(path).map_err(|cause| Error::io(path, cause))?;
    if !meta.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    if meta.len() == 0 {
        return Err(Error::file(path, "is empty: fetch it again"));
    }
    let file = File::open(path).map_err(|cause| Error::io(path, cause))?;
    // SAFETY: the mapping is read-only and private to this process. Bytes may change or vanish only if another process
    // writes over or truncates the file meanwhile, which the types that hold the mapping warn about; no value read from
    // it is trusted without a check, and every slice is bounded by the mapping's own length.
    let mmap = unsafe { Mmap::map(&file) }.map_err(|cause| Error::io(path, cause))?;
    Ok(Arc::new(mmap))
}
