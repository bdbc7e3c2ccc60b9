//! Quantized models, written for others to read: GGUF for llama.cpp, or a Hugging Face directory with bitsandbytes'
//! 4-bit weights for transformers.
//!
//! ```text
//! target      layers' projections     embedding, output head     norms, biases     files
//! q8          Q8_0                    Q8_0                       F32               model.gguf
//! q4          Q4_1                    Q8_0                       F32               model.gguf
//! nf4, nf4dq  NF4, blocks of 64       as they are, or F16        as they are       model.safetensors, config.json, ..
//! ```
//!
//! A matrix is read, encoded and written a block of rows at a time, so no model is ever whole in memory. Everything is
//! written in a directory of its own inside the target, opened again by the same readers that open any model, compared
//! with the source tensor by tensor, and only then put in its place.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::checkpoint::{Checkpoint, Encoding};
use super::config::Arch;
use super::generate::open_tokenizer;
use super::weights::{lcm, unpermute, Source, BLOCK_VALUES};
use super::{layout, write_gguf, write_hf};
use crate::error::{quote, Error};
use crate::quant::{self, Format, Packed};
use crate::tensor::HostTensor;

/// What a model can be written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// GGUF with Q8_0: 8-bit codes, an f16 scale for 32 of them.
    Q8,
    /// GGUF with Q4_1: 4-bit codes, an f16 scale and minimum for 32 of them.
    Q4,
    /// Hugging Face directory with NF4: 4-bit codes, an f32 absmax for 64 of them.
    Nf4,
    /// The same with the absmax in 8 bits.
    Nf4Dq,
}

/// One tensor of a written model against its source.
#[derive(Clone, Debug)]
pub struct TensorReport {
    /// Hugging Face name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is stored as.
    pub format: Format,
    /// Σ(written − source)² / Σ source².
    pub nmse: f64,
    /// Largest |written − source|.
    pub max_abs: f64,
}

/// A model that was written and read back.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// What to open: the GGUF file or the directory.
    pub path: PathBuf,
    /// Bytes of the source's files of tensors.
    pub bytes_before: u64,
    /// Bytes of the written one's.
    pub bytes_after: u64,
    /// Every tensor, in the model's order.
    pub tensors: Vec<TensorReport>,
}

/// A tensor to be written.
pub(super) struct Item {
    /// Hugging Face name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is stored as.
    pub format: Format,
}

/// Sums over the values of a tensor: of squared errors and squares, and the largest error.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sums {
    error: f64,
    square: f64,
    max: f64,
}

impl Target {
    /// True when the target is a GGUF file.
    pub fn is_gguf(self) -> bool {
        matches!(self, Target::Q8 | Target::Q4)
    }

    /// What the projections of the layers become.
    pub fn format(self) -> Format {
        match self {
            Target::Q8 => Format::Q8 { group: 32, wide: false, affine: false },
            Target::Q4 => Format::Q4 { group: 32, wide: false },
            Target::Nf4 => Format::Nf4,
            Target::Nf4Dq => Format::Nf4Dq,
        }
    }

    /// Every file that is written, wherever the source has something to put in it.
    fn files(self) -> &'static [&'static str] {
        match self.is_gguf() {
            true => &[write_gguf::FILE],
            false => write_hf::FILES,
        }
    }
}

/// Writes `checkpoint`, a decoder, as `target` into the directory `out`, which is made where it is missing, and reads
/// it back. `on_progress` is told how many values of how many have been written and compared.
///
/// Errors name the file or tensor: an encoder, a matrix the format cannot hold, a tokenizer or a constant the other
/// kind of file has no word for, an `out` that holds other files or the source itself, a full disk. After an error
/// `out` is as it was.
pub fn quantize(
    checkpoint: &Checkpoint,
    target: Target,
    out: &Path,
    on_progress: &mut dyn FnMut(usize, usize),
) -> Result<Quantized, Error> {
    if checkpoint.config.arch == Arch::Bert {
        let what = "is a bert model, an encoder: quantize takes llama, qwen2 and qwen3 models";
        return Err(Error::file(&checkpoint.files[0], what));
    }
    let items = plan(checkpoint, target)?;
    let staging = Staging::create(checkpoint, target.files(), out)?;
    let total = 2 * items.iter().map(Item::values).sum::<usize>();
    let mut done = 0;
    let mut on_item = |item: &Item| {
        done += item.values();
        on_progress(done, total);
    };

    let model = match target.is_gguf() {
        true => staging.path.join(write_gguf::FILE),
        false => staging.path.clone(),
    };
    let sums = match target.is_gguf() {
        true => write_gguf::write(&model, checkpoint, &items, target, &mut on_item)?,
        false => write_hf::write(&model, checkpoint, &items, target, &mut on_item)?,
    };

    let written = Checkpoint::open(&model)?;
    let mut tensors = Vec::with_capacity(items.len());
    for (item, sums) in items.iter().zip(sums) {
        let found = compare(checkpoint, &written, item)?;
        if found != sums {
            let what = "reads back as other values than were written: check the disk, and write it again";
            return Err(written.tensor(&item.name)?.wrong(what));
        }
        tensors.push(TensorReport {
            name: item.name.clone(),
            shape: item.shape.clone(),
            format: item.format,
            nmse: if found.error == 0.0 { 0.0 } else { found.error / found.square },
            max_abs: found.max,
        });
        on_item(item);
    }
    compare_tokenizers(checkpoint, &written, &model)?;
    let (bytes_before, bytes_after) = (checkpoint.bytes(), written.bytes());
    drop(written); // some systems do not rename a mapped file
    staging.commit()?;
    let path = if target.is_gguf() { out.join(write_gguf::FILE) } else { out.to_path_buf() };
    Ok(Quantized { path, bytes_before, bytes_after, tensors })
}

/// Every tensor of the architecture, with what it becomes.
fn plan(checkpoint: &Checkpoint, target: Target) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    layout::for_each(&checkpoint.config, &mut |name, shape| {
        let format = match shape {
            &[n, k] => matrix_format(checkpoint, target, &name, n, k)?,
            _ if target.is_gguf() => Format::F32,
            _ => plain_format(checkpoint.tensor(&name)?.encoding).unwrap_or(Format::F32),
        };
        items.push(Item { name, shape: shape.to_vec(), format });
        Ok(())
    })?;
    let divisors = "model.rope_freqs";
    if checkpoint.has(divisors) {
        let view = checkpoint.tensor(divisors)?;
        if !target.is_gguf() {
            return Err(view.wrong(NO_WORD_FOR_DIVISORS));
        }
        items.push(Item { name: divisors.into(), shape: view.shape, format: Format::F32 });
    }
    Ok(items)
}

/// Why a GGUF file with divisors of the rotary frequencies cannot become a directory.
pub(super) const NO_WORD_FOR_DIVISORS: &str =
    "scales the rotary frequencies, which config.json has no word for: start \
    from the model's Hugging Face directory instead";

fn matrix_format(checkpoint: &Checkpoint, target: Target, name: &str, n: usize, k: usize) -> Result<Format, Error> {
    let outside = !name.starts_with("model.layers.");
    let wanted = match (outside, target.is_gguf()) {
        (true, true) => Target::Q8.format(),
        // Values of other files' blocks have up to 19 bits, of which f16 keeps 11: far finer than their own steps.
        (true, false) => return Ok(plain_format(checkpoint.tensor(name)?.encoding).unwrap_or(Format::F16)),
        (false, _) => target.format(),
    };
    match wanted.check(n, k) {
        Ok(()) => Ok(wanted),
        // As llama.cpp does with rows that are not whole blocks. transformers cannot mix so within a layer.
        Err(_) if target.is_gguf() => Ok(Format::F16),
        Err(error) => Err(checkpoint.tensor(name)?.wrong(error.to_string())),
    }
}

pub(super) fn plain_format(encoding: Encoding) -> Option<Format> {
    match encoding {
        Encoding::F32 => Some(Format::F32),
        Encoding::F16 => Some(Format::F16),
        Encoding::BF16 => Some(Format::BF16),
        _ => None,
    }
}

/// The format a matrix has in its file.
pub(super) fn source_format(checkpoint: &Checkpoint, name: &str) -> Result<Format, Error> {
    Ok(Source::open(checkpoint, name)?.format)
}

impl Item {
    /// Rows and columns; a vector is one row.
    pub fn dims(&self) -> (usize, usize) {
        match self.shape[..] {
            [n, k] => (n, k),
            _ => (1, self.values()),
        }
    }

    fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Encodes a tensor block by block: `each` gets the first row and the rows as they are to be stored, in Hugging Face's
/// order. Gives how far they are from the source.
pub(super) fn encode(
    checkpoint: &Checkpoint,
    item: &Item,
    each: &mut dyn FnMut(usize, &Packed) -> Result<(), Error>,
) -> Result<Sums, Error> {
    encode_changed(checkpoint, item, &|_, _| false, each)
}

/// Changes a block of f32 values whose first row is given; false where it left them as they are.
pub(super) type Change<'a> = &'a dyn Fn(usize, &mut [f32]) -> bool;

/// [`encode`], values changed first.
pub(super) fn encode_changed(
    checkpoint: &Checkpoint,
    item: &Item,
    change: Change,
    each: &mut dyn FnMut(usize, &Packed) -> Result<(), Error>,
) -> Result<Sums, Error> {
    let mut sums = Sums::default();
    blocks(checkpoint, item, &mut |row0, block| {
        let mut values = quant::decode(&block);
        let changed = change(row0, &mut values);
        let packed = match block.format == item.format && !changed {
            true => block,
            false => quant::encode(item.format, block.rows, block.cols, &values)
                .map_err(|error| Error::tensor(&checkpoint.files[0], &item.name, error.to_string()))?,
        };
        sums.add(&values, &quant::decode(&packed));
        each(row0, &packed)
    })?;
    Ok(sums)
}

/// How far a written tensor, read back, is from the source: the sums of [`encode`], in the same order.
fn compare(checkpoint: &Checkpoint, written: &Checkpoint, item: &Item) -> Result<Sums, Error> {
    let mut sums = Sums::default();
    let head_dim = checkpoint.config.head_dim;
    let back = match item.shape.len() {
        2 => Some(Source::open(written, &item.name)?),
        _ => None,
    };
    if let Some(back) = back.as_ref().filter(|back| back.format != item.format) {
        let what = format!("reads back as {}, written as {}", back.format.name(), item.format.name());
        return Err(back.wrong(what));
    }
    blocks(checkpoint, item, &mut |row0, block| {
        let got = match &back {
            Some(back) => quant::decode(&back.rows(row0, block.rows, head_dim)?),
            None => vector(written, &item.name)?,
        };
        sums.add(&quant::decode(&block), &got);
        Ok(())
    })?;
    if let Some(back) = back {
        back.give_back();
    }
    Ok(sums)
}

/// Calls `each` with blocks of the source's rows, in its own format and in Hugging Face's order.
fn blocks(
    checkpoint: &Checkpoint,
    item: &Item,
    each: &mut dyn FnMut(usize, Packed) -> Result<(), Error>,
) -> Result<(), Error> {
    if item.shape.len() != 2 {
        let values = vector(checkpoint, &item.name)?;
        let part = HostTensor::from_f32(&[1, values.len()], &values);
        return each(0, Packed { format: Format::F32, rows: 1, cols: values.len(), parts: vec![part] });
    }
    let source = Source::open(checkpoint, &item.name)?;
    let (n, k) = (source.n, source.k);
    // Whole heads, so that their rows can change order, and where one offset stands for a matrix, all of it at once.
    let whole = item.format == Format::Nf4Dq && source.format != item.format;
    let head_dim = checkpoint.config.head_dim;
    let unit = lcm(source.unit(head_dim), head_dim);
    let per_block = if whole { n } else { (BLOCK_VALUES / k).next_multiple_of(unit).max(unit) };
    for row0 in (0..n).step_by(per_block) {
        each(row0, source.rows(row0, per_block.min(n - row0), head_dim)?)?;
    }
    source.give_back();
    Ok(())
}

/// A vector's values in Hugging Face's order.
fn vector(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, Error> {
    let view = checkpoint.tensor(name)?;
    let values = view.to_f32()?;
    Ok(match view.rope_permuted {
        true => unpermute(bytemuck::cast_slice(&values), 4, checkpoint.config.head_dim),
        false => values,
    })
}

impl Sums {
    /// Adds the values of a block; the same values give the same sums on any number of threads.
    fn add(&mut self, values: &[f32], got: &[f32]) {
        let pieces = values.par_chunks(1 << 14).zip(got.par_chunks(1 << 14)).map(|(values, got)| {
            let mut sums = Sums::default();
            for (&value, &got) in values.iter().zip(got) {
                let error = got as f64 - value as f64;
                sums.error += error * error;
                sums.square += value as f64 * value as f64;
                sums.max = sums.max.max(error.abs());
            }
            sums
        });
        for piece in pieces.collect::<Vec<_>>() {
            self.error += piece.error;
            self.square += piece.square;
            self.max = self.max.max(piece.max);
        }
    }
}

/// Text that tokenizers split in different ways: spaces, digits, case, contractions, scripts, code.
const PROBE: &str = "Hello, World!  It's 2024-02-29; I'LL pay 1,234.50 €.\r\n\n\tfn f(x) { x+=1; } // naïve café\n   \
                     Привет 你好 👩‍🔬 ... don't  ==  \n";

/// The written model's tokenizer makes the source's ids of a text that tells tokenizers apart.
fn compare_tokenizers(checkpoint: &Checkpoint, written: &Checkpoint, model: &Path) -> Result<(), Error> {
    let (before, after) = (open_tokenizer(checkpoint)?, open_tokenizer(written)?);
    let ends = |t: &super::tokenizer::Tokenizer| (t.bos().filter(|_| t.add_bos()), t.eos(), t.eot(), t.add_bos());
    if before.encode(PROBE)? != after.encode(PROBE)? || ends(&before) != ends(&after) {
        let what = "its tokenizer makes other ids than the source's: this kind of tokenizer cannot be carried over";
        return Err(Error::file(model, what));
    }
    for id in checkpoint.config.eos.iter().filter(|id| !written.config.eos.contains(id)) {
        log::warn!("{}: token {id} ended texts of the source; GGUF has room for two such tokens", model.display());
    }
    Ok(())
}

/// Name of the staging directory in the target.
const PARTIAL: &str = ".handmill.partial";

/// A directory inside the target where files wait until all are whole. Its lock file is held while a run is alive, so
/// that what a killed run has left is known from what another is writing.
pub(super) struct Staging {
    out: PathBuf,
    /// Where files are written.
    pub path: PathBuf,
    /// Every file that may be.
    files: &'static [&'static str],
    _lock: fs::File,
    /// `out` did not exist.
    made: bool,
}

impl Staging {
    /// Begins to fill `out`, which is made where it is missing, with some of `files`. Errors: `out` holds the source or
    /// other files, or is being written by another run.
    pub fn create(checkpoint: &Checkpoint, files: &'static [&'static str], out: &Path) -> Result<Staging, Error> {
        let fail = |cause| Error::io(out, cause);
        let made = !out.exists();
        fs::create_dir_all(out).map_err(fail)?;
        let here = out.canonicalize().map_err(fail)?;
        for file in &checkpoint.files {
            // A file may be a link: neither where it stands nor where it points to is written.
            let target = file.canonicalize().map_err(|cause| Error::io(file, cause))?;
            let folder = file.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let folder = folder.canonicalize().map_err(|cause| Error::io(file, cause))?;
            if folder == here || target.parent() == Some(&here) {
                return Err(Error::file(out, "holds the model itself: name another directory"));
            }
        }
        for entry in fs::read_dir(out).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name().to_string_lossy().into_owned();
            if !files.contains(&name.as_str()) && name != PARTIAL {
                let what = format!("holds {}, which is not part of such a model: name another directory", quote(&name));
                return Err(Error::file(out, what));
            }
        }
        let path = out.join(PARTIAL);
        fs::create_dir_all(&path).map_err(|cause| Error::io(&path, cause))?;
        let lock_path = path.join("lock");
        let lock = fs::File::create(&lock_path).map_err(|cause| Error::io(&lock_path, cause))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Error::file(
                    out,
                    "is being written by another run: wait for it, or name another directory",
                ));
            }
            Err(fs::TryLockError::Error(cause)) => return Err(Error::io(&lock_path, cause)),
        }
        for name in files {
            // Left by a killed run, if it is there at all.
            let _ = fs::remove_file(path.join(name));
        }
        Ok(Staging { out: out.to_path_buf(), path, files, _lock: lock, made })
    }

    /// Puts the files in their places. What is left of an earlier model goes; `config.json`, without which a directory
    /// is no model, goes first and comes last.
    pub fn commit(self) -> Result<(), Error> {
        let mut names = self.files.to_vec();
        names.sort_by_key(|&name| name == "config.json");
        for &name in names.iter().rev() {
            if !self.path.join(name).exists() || name == "config.json" {
                match fs::remove_file(self.out.join(name)) {
                    Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io(&self.out.join(name), cause));
                    }
                    _ => {}
                }
            }
        }
        for &name in &names {
            let (from, to) = (self.path.join(name), self.out.join(name));
            if from.exists() {
                let synced = fs::File::open(&from).and_then(|file| file.sync_all());
                synced.and_then(|()| fs::rename(&from, &to)).map_err(|cause| Error::io(&to, cause))?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed here, the next run clears.
        let _ = fs::remove_dir_all(&self.path);
        if self.made {
            let _ = fs::remove_dir(&self.out); // stays when it holds anything
        }
    }
}
