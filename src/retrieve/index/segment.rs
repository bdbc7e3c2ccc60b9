//! A segment: a file of unit rows that is written once and mapped.
//!
//! ```text
//! "HMVECTOR"  u32 version = 1  u32 d  u64 rows  u64 number  32 bytes of 0  f32[rows, d], little-endian
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::aside::Aside;
use crate::error::Error;
use crate::model::adapter::{hex, sha256};

const MAGIC: &[u8; 8] = b"HMVECTOR";
const VERSION: u32 = 1;
/// Where the rows begin.
const HEADER: usize = 64;
/// Wider rows than any model's are refused.
pub const MAX_D: usize = 1 << 16;

/// The folder of an index that holds its segments.
pub const FOLDER: &str = "segments";

/// A mapped segment.
pub struct Segment {
    /// Its file.
    pub path: PathBuf,
    /// Its number, never used again.
    pub number: i64,
    /// Rows it has, those of removed documents among them.
    pub rows: usize,
    d: usize,
    map: Arc<Mmap>,
}

/// The file of a segment.
pub fn path(index: &Path, number: i64) -> PathBuf {
    index.join(FOLDER).join(format!("{number:08}.vectors"))
}

fn header(number: i64, rows: usize, d: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(d as u32).to_le_bytes());
    header[16..24].copy_from_slice(&(rows as u64).to_le_bytes());
    header[24..32].copy_from_slice(&number.to_le_bytes());
    header
}

/// Writes rows, f32[rows, d], aside, brings them to the disk under their name, and gives their SHA-256.
pub fn write(index: &Path, number: i64, d: usize, rows: &[f32]) -> Result<String, Error> {
    let file = path(index, number);
    let mut aside = Aside::create(&file)?;
    aside.write(&header(number, rows.len() / d, d))?;
    aside.write(bytemuck::cast_slice(rows))?;
    aside.commit()?;
    sync_folder(&index.join(FOLDER))?;
    Ok(hex(&sha256(bytemuck::cast_slice(rows))))
}

/// Brings a folder's names to the disk.
pub fn sync_folder(folder: &Path) -> Result<(), Error> {
    // Elsewhere a folder cannot be opened, and its names are safe with the file.
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|cause| Error::io(folder, cause))?;
    }
    Ok(())
}

impl Segment {
    /// Maps a segment and checks that it is the one that the index speaks of: number, width and length.
    pub fn open(index: &Path, number: i64, rows: usize, d: usize) -> Result<Segment, Error> {
        let path = path(index, number);
        let file = File::open(&path).map_err(|cause| Error::io(&path, cause))?;
        let wrong = |what: &str| Error::file(&path, format!("{what}: the index is damaged, build it anew"));
        let bytes = rows.checked_mul(d).and_then(|count| count.checked_mul(4)?.checked_add(HEADER));
        let found = file.metadata().map_err(|cause| Error::io(&path, cause))?.len();
        if d == 0 || d > MAX_D || bytes.map(|bytes| bytes as u64) != Some(found) {
            return Err(wrong(&format!("has {found} bytes, which {rows} rows of {d} numbers do not take")));
        }
        // SAFETY: a segment is written under another name and never changed under this one.
        let map = unsafe { Mmap::map(&file) }.map_err(|cause| Error::io(&path, cause))?;
        if map.get(..HEADER) != Some(&header(number, rows, d)[..]) {
            return Err(wrong("does not begin as this segment does"));
        }
        Ok(Segment { path, number, rows, d, map: Arc::new(map) })
    }

    /// Its rows, f32[rows, d].
    pub fn vectors(&self) -> &[f32] {
        // A map begins at a page, and the header is a multiple of 4.
        bytemuck::cast_slice(&self.map[HEADER..])
    }

    /// One row, f32[d].
    pub fn row(&self, row: usize) -> &[f32] {
        &self.vectors()[row * self.d..(row + 1) * self.d]
    }

    /// An error unless its rows have this SHA-256. Reads them all.
    pub fn verify(&self, expected: &str) -> Result<(), Error> {
        match hex(&sha256(&self.map[HEADER..])) == expected {
            true => Ok(()),
            false => Err(Error::file(&self.path, "has changed since it was written: build the index anew")),
        }
    }

    /// Bytes of its file.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }
}
