//! Vectors from files, as rows of unit norm: `.npy` (f32, f16), `.fvecs`, and a matrix of a `.safetensors` file.
//!
//! Rows that are of unit norm already stay as they lie in the mapped file; others are divided by their norm, computed in
//! f64, and rounded once. A row without a direction, zero or not of numbers, is refused or left out of every search.

use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;

use super::topk::{Codes, Corpus, Exact, Rows};
use crate::error::{quote, Error};
use crate::model::checkpoint::{map_file, Encoding};
use crate::model::hf::Shard;
use crate::npy;

/// How far from one the norm of a row that is meant to be one may be: D roundings of f32 at worst, for D below 1000.
const UNIT_F32: f64 = 6e-5;
/// The same for elements rounded to f16, by 2⁻¹¹ each.
const UNIT_F16: f64 = 5e-4;
/// Bad rows that a message names.
const NAMED: usize = 5;
/// The widest rows that are read.
const MAX_WIDTH: usize = 1 << 20;

/// Vectors of unit norm.
pub struct Vectors {
    /// Rows.
    pub n: usize,
    /// Elements of a row.
    pub d: usize,
    /// N·d elements. Rows that are [`Vectors::bad`] may hold anything.
    pub data: Data,
    /// The norms that rows had, where any was divided by its own; else all are one.
    pub norms: Option<Vec<f32>>,
    /// Rows that were divided by their norm.
    pub normalised: usize,
    /// Rows, ascending, that have no direction: zero, infinite or not numbers.
    pub bad: Vec<u32>,
}

/// Elements, in memory or in a mapped file.
pub enum Data {
    /// In memory.
    F32(Vec<f32>),
    /// In memory.
    F16(Vec<f16>),
    /// From a byte of a file on, aligned for f32.
    MappedF32(Arc<Mmap>, usize),
    /// From a byte of a file on, aligned for f16.
    MappedF16(Arc<Mmap>, usize),
}

/// What becomes of rows without a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// An error names the first few.
    Refuse,
    /// They keep their numbers and are never found.
    Drop,
}

impl Vectors {
    /// Reads a file by its extension; `tensor` names the matrix of a `.safetensors` file that holds several. Errors name
    /// the file: another format or type, another number of dims, rows that are [`Bad`].
    pub fn open(path: &Path, tensor: Option<&str>, bad: Bad) -> Result<Vectors, Error> {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if tensor.is_some() && extension != "safetensors" {
            return Err(Error::file(path, "has no tensors to choose from: only a .safetensors file has"));
        }
        let (n, d, data) = match extension {
            "npy" => open_npy(path)?,
            "fvecs" => open_fvecs(path)?,
            "safetensors" => open_safetensors(path, tensor)?,
            _ => return Err(Error::file(path, "is none of .npy, .fvecs and .safetensors: convert it to one of them")),
        };
        if d == 0 || d > MAX_WIDTH {
            return Err(Error::file(path, format!("holds rows of {d} elements: 1 to {MAX_WIDTH} are read")));
        }
        if n >= u32::MAX as usize {
            return Err(Error::file(path, format!("holds {n} rows: {} are the most", u32::MAX - 1)));
        }
        let vectors = normalise(n, d, data);
        if bad == Bad::Refuse && !vectors.bad.is_empty() {
            let named: Vec<String> = vectors.bad.iter().take(NAMED).map(u32::to_string).collect();
            let more = if vectors.bad.len() > NAMED { ", ..." } else { "" };
            let (count, rows) = (vectors.bad.len(), named.join(", "));
            let what = format!("{count} of {n} rows are zero or not finite: rows {rows}{more}; remove or drop them");
            return Err(Error::file(path, what));
        }
        Ok(vectors)
    }

    /// The elements.
    pub fn exact(&self) -> Exact<'_> {
        match &self.data {
            Data::F32(values) => Exact::F32(values),
            Data::F16(values) => Exact::F16(values),
            Data::MappedF32(map, offset) => Exact::F32(bytemuck::cast_slice(&map[*offset..][..4 * self.n * self.d])),
            Data::MappedF16(map, offset) => Exact::F16(bytemuck::cast_slice(&map[*offset..][..2 * self.n * self.d])),
        }
    }

    /// To search in.
    pub fn corpus(&self) -> Corpus<'_> {
        let rows = match self.exact() {
            Exact::F32(rows) => Rows::F32(rows),
            Exact::F16(rows) => Rows::F16(rows),
        };
        Corpus { d: self.d, rows }
    }

    /// To search in by these rows' codes.
    pub fn corpus_by<'a>(&'a self, codes: &'a Codes<'a>) -> Corpus<'a> {
        Corpus { d: self.d, rows: Rows::I8 { codes, exact: self.exact() } }
    }

    /// The elements as f32, exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.exact() {
            Exact::F32(values) => values.to_vec(),
            Exact::F16(values) => values.par_iter().map(|v| v.to_f32()).collect(),
        }
    }

    /// The same vectors in f32: exactly.
    pub fn into_f32(self) -> Vectors {
        if matches!(self.data, Data::F32(_) | Data::MappedF32(..)) {
            return self;
        }
        Vectors { data: Data::F32(self.to_f32()), ..self }
    }

    /// The same vectors rounded to f16.
    pub fn into_f16(self) -> Vectors {
        let Exact::F32(values) = self.exact() else { return self };
        let values = values.par_iter().map(|v| f16::from_f32(*v)).collect();
        Vectors { data: Data::F16(values), ..self }
    }

    /// A bitset for searches: rows that `wanted` allows, where given, less those without a direction. None when every
    /// row counts.
    pub fn filter(&self, wanted: Option<&[u32]>) -> Option<Vec<u32>> {
        if wanted.is_none() && self.bad.is_empty() {
            return None;
        }
        let mut words = wanted.map_or_else(|| vec![u32::MAX; self.n.div_ceil(32)], <[u32]>::to_vec);
        self.bad.iter().for_each(|row| words[*row as usize / 32] &= !(1 << (row % 32)));
        Some(words)
    }
}

/// Divides rows by their norms where these are not one.
fn normalise(n: usize, d: usize, data: Data) -> Vectors {
    let mut vectors = Vectors { n, d, data, norms: None, normalised: 0, bad: Vec::new() };
    let squares = |row: usize| -> f64 {
        let at = row * d..(row + 1) * d;
        match vectors.exact() {
            Exact::F32(values) => values[at].iter().map(|v| (*v as f64).powi(2)).sum(),
            Exact::F16(values) => values[at].iter().map(|v| v.to_f64().powi(2)).sum(),
        }
    };
    let norms: Vec<f64> = (0..n).into_par_iter().with_min_len(256).map(|row| squares(row).sqrt()).collect();
    let good = |norm: f64| norm.is_finite() && norm > 0.0;
    let near = if matches!(vectors.exact(), Exact::F32(_)) { UNIT_F32 } else { UNIT_F16 };
    let unit = |norm: f64| (norm - 1.0).abs() <= near;
    let bad = (0..n).filter(|row| !good(norms[*row])).map(|row| row as u32).collect();
    let normalised = norms.iter().filter(|norm| good(**norm) && !unit(**norm)).count();
    if normalised > 0 {
        let norm_of = |element: usize| match norms[element / d] {
            norm if good(norm) && !unit(norm) => norm,
            _ => 1.0,
        };
        let elements = (0..n * d).into_par_iter();
        vectors.data = match vectors.exact() {
            Exact::F32(from) => Data::F32(elements.map(|i| (from[i] as f64 / norm_of(i)) as f32).collect()),
            Exact::F16(from) => Data::F16(elements.map(|i| f16::from_f64(from[i].to_f64() / norm_of(i))).collect()),
        };
        vectors.norms = Some(norms.iter().map(|norm| *norm as f32).collect());
    }
    Vectors { normalised, bad, ..vectors }
}

/// N, d of a matrix's shape.
fn matrix(path: &Path, shape: &[usize]) -> Result<(usize, usize), Error> {
    match *shape {
        [n, d] => Ok((n, d)),
        _ => {
            Err(Error::file(path, format!("holds an array of shape {shape:?}: a matrix, a row each vector, is needed")))
        }
    }
}

fn open_npy(path: &Path) -> Result<(usize, usize, Data), Error> {
    let half = npy::Array::open::<f16>(path);
    let (array, size) = match half {
        Ok(array) => (array, 2),
        // What it says of f32 is what to do about any other type.
        Err(_) => (npy::Array::open::<f32>(path)?, 4),
    };
    let (n, d) = matrix(path, &array.shape)?;
    Ok((n, d, mapped(&array.mmap, array.offset, n * d, size)))
}

/// `count` elements of f32 or f16, by their size: as they lie, or a copy where they lie badly.
fn mapped(mmap: &Arc<Mmap>, offset: usize, count: usize, size: usize) -> Data {
    let bytes = &mmap[offset..offset + count * size];
    match (size, offset.is_multiple_of(size)) {
        (2, true) => Data::MappedF16(mmap.clone(), offset),
        (2, false) => Data::F16(bytemuck::pod_collect_to_vec(bytes)),
        (_, true) => Data::MappedF32(mmap.clone(), offset),
        (_, false) => Data::F32(bytemuck::pod_collect_to_vec(bytes)),
    }
}

/// Rows of a u32 that says d, and d elements in f32.
fn open_fvecs(path: &Path) -> Result<(usize, usize, Data), Error> {
    let mmap = map_file(path)?;
    let Some(first) = mmap.first_chunk::<4>() else {
        return Err(Error::file(path, format!("has {} bytes, too few for a row", mmap.len())));
    };
    let d = u32::from_le_bytes(*first) as usize;
    if d == 0 || d > MAX_WIDTH {
        return Err(Error::file(path, format!("row 0 claims {d} elements: 1 to {MAX_WIDTH} are read")));
    }
    let pitch = 4 + 4 * d;
    if mmap.len() % pitch != 0 {
        let (bytes, left) = (mmap.len(), mmap.len() % pitch);
        return Err(Error::file(path, format!("has {bytes} bytes: {left} too many for rows of {d} elements")));
    }
    let rows = mmap.chunks_exact(pitch);
    if let Some(row) = rows.clone().position(|row| row[..4] != *first) {
        return Err(Error::file(path, format!("row {row} is not of {d} elements as row 0 is")));
    }
    let mut values = vec![0f32; rows.len() * d];
    for (values, row) in values.chunks_exact_mut(d).zip(rows.clone()) {
        bytemuck::cast_slice_mut(values).copy_from_slice(&row[4..]);
    }
    Ok((rows.len(), d, Data::F32(values)))
}

fn open_safetensors(path: &Path, tensor: Option<&str>) -> Result<(usize, usize, Data), Error> {
    let shard = Shard::open(path)?;
    let mut fit = shard.tensors.iter().filter(|t| tensor.map_or(t.shape.len() == 2, |name| t.name == name));
    let Some(found) = fit.next() else {
        return Err(Error::file(
            path,
            tensor.map_or("holds no matrix".into(), |t| format!("holds no tensor {}", quote(t))),
        ));
    };
    if let Some(other) = fit.next() {
        let (a, b) = (quote(&found.name), quote(&other.name));
        return Err(Error::file(path, format!("holds several matrices, such as {a} and {b}: name one")));
    }
    let (n, d) = matrix(path, &found.shape)?;
    let data = match found.encoding {
        Encoding::F32 => mapped(&shard.mmap, found.offset, n * d, 4),
        Encoding::F16 => mapped(&shard.mmap, found.offset, n * d, 2),
        Encoding::BF16 => {
            let values: Vec<bf16> = bytemuck::pod_collect_to_vec(&shard.mmap[found.offset..][..found.len]);
            Data::F32(values.iter().map(|v| v.to_f32()).collect())
        }
        other => {
            let what = format!("is of type {}: F32, F16 and BF16 are read", other.name());
            return Err(Error::tensor(path, &found.name, what));
        }
    };
    Ok((n, d, data))
}
