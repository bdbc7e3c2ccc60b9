//! A data set ready to train on, as one memory-mapped file beside the run.
//!
//! ```text
//! 8 bytes "HMTOKENS"   u32 version   u32 rows   u64 tokens   32 bytes key   32 bytes SHA-256 of all that follows
//! u64 n   n bytes of JSON (notes)   zeros to a multiple of 8
//! u64 offsets[rows + 1]   i32 labels[tokens]   u32 ids[tokens]   u32 lines[rows]
//! ```
//!
//! The key is the SHA-256 of everything the rows were made from; a file with another key is made anew. The order of
//! rows is a function of seed and epoch, and is not stored.

use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::data::{self, DataOptions, Encoder, Notes, OverLong, Row, MASKED};
use crate::aside;
use crate::error::Error;
use crate::model::adapter::{hex, sha256};
use crate::model::checkpoint::map_file;

const MAGIC: &[u8; 8] = b"HMTOKENS";
const VERSION: u32 = 1;
const HEADER: usize = 8 + 4 + 4 + 8 + 32 + 32;

/// A prepared data set.
pub struct TokenSet {
    bytes: Store,
    rows: usize,
    labels: usize,
    ids: usize,
    lines: usize,
    tokens: usize,
    offsets: usize,
    /// What was found that is no fault.
    pub notes: Notes,
    /// SHA-256 of the data file, in hexadecimal.
    pub data_sha256: String,
    /// SHA-256 of the prepared rows, in hexadecimal.
    pub sha256: String,
    /// It was found prepared.
    pub reused: bool,
}

enum Store {
    Mapped(Arc<Mmap>),
    Owned(crate::tensor::Bytes),
}

/// Lengths of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// Rows.
    pub rows: usize,
    /// Tokens of all rows.
    pub tokens: usize,
    /// Those that are predicted.
    pub predicted: usize,
    /// Shortest row.
    pub shortest: usize,
    /// Half of the rows are as long or shorter.
    pub median: usize,
    /// 95 % of the rows are as long or shorter.
    pub p95: usize,
    /// Longest row.
    pub longest: usize,
}

impl TokenSet {
    /// Reads `path`, or finds it prepared at `cache` from the same bytes by a model of the same hash and the same
    /// options; else prepares it and writes `cache`. Errors list every row that cannot be trained on.
    pub fn open(
        path: &Path,
        encoder: &Encoder,
        model_sha256: &str,
        options: &DataOptions,
        cache: Option<&Path>,
    ) -> Result<TokenSet, Error> {
        if std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == 0) {
            return Err(Error::file(path, data::NO_ROW));
        }
        let map = map_file(path)?;
        let data_sha256 = hex(&sha256(&map));
        let refuse = options.over_long == OverLong::Refuse;
        let made_from = format!("{VERSION} {model_sha256} {data_sha256} {} {refuse}", options.max_len);
        let key = sha256(made_from.as_bytes());
        if let Some(found) = cache.filter(|cache| cache.is_file()) {
            match map_file(found).map(|map| TokenSet::parse(Store::Mapped(map), &key)) {
                Ok(Ok(mut set)) => {
                    (set.data_sha256, set.reused) = (data_sha256, true);
                    return Ok(set);
                }
                Ok(Err(what)) => log::info!("{}: {what}; it is made anew", found.display()),
                Err(error) => log::info!("{error}; it is made anew"),
            }
        }
        let (rows, notes) = data::read(path, &map, encoder, options)?;
        let image = image(&rows, &notes, &key);
        let store = match cache {
            None => Store::Owned(crate::tensor::Bytes::from_slice(&image)),
            Some(cache) => {
                aside::write(cache, &image)?;
                Store::Mapped(map_file(cache)?)
            }
        };
        let mut set = TokenSet::parse(store, &key).map_err(|what| Error::file(path, format!("prepared: {what}")))?;
        set.data_sha256 = data_sha256;
        Ok(set)
    }

    /// Checks an image, every length and offset of it.
    fn parse(bytes: Store, key: &[u8; 32]) -> Result<TokenSet, String> {
        let all = bytes.as_slice();
        let short = || "is too short for what it claims".to_string();
        if all.len() < HEADER || &all[..8] != MAGIC {
            return Err("is no prepared data set".into());
        }
        let word = |at: usize| u32::from_le_bytes([all[at], all[at + 1], all[at + 2], all[at + 3]]) as usize;
        if word(8) != VERSION as usize {
            return Err("is of another version".into());
        }
        if &all[24..56] != key {
            return Err("was made from other data, another model or other options".into());
        }
        let hash = sha256(&all[HEADER..]);
        if all[56..88] != hash {
            return Err("is damaged".into());
        }
        let wide = |at: usize| -> Result<usize, String> {
            let bytes = all.get(at..at + 8).and_then(|b| b.first_chunk::<8>()).ok_or_else(short)?;
            usize::try_from(u64::from_le_bytes(*bytes)).map_err(|_| short())
        };
        let (rows, tokens, notes_len) = (word(12), wide(16)?, wide(HEADER)?);
        let notes_at = HEADER + 8;
        let offsets = notes_at.checked_add(notes_len).ok_or_else(short)?.next_multiple_of(8);
        let labels = offsets.checked_add(8 * (rows + 1)).ok_or_else(short)?;
        let span = tokens.checked_mul(4).ok_or_else(short)?;
        let ids = labels.checked_add(span).ok_or_else(short)?;
        let lines = ids.checked_add(span).ok_or_else(short)?;
        if lines.checked_add(4 * rows) != Some(all.len()) || offsets > all.len() {
            return Err(short());
        }
        let notes = serde_json::from_slice(&all[notes_at..notes_at + notes_len]).map_err(|error| error.to_string())?;
        let sha256 = hex(&hash);
        let set = TokenSet {
            rows,
            labels,
            ids,
            lines,
            tokens,
            offsets,
            notes,
            sha256,
            data_sha256: String::new(),
            reused: false,
            bytes,
        };
        let offsets = set.offsets();
        let rising = offsets.windows(2).all(|pair| pair[1].checked_sub(pair[0]).is_some_and(|tokens| tokens >= 2));
        if rows == 0 || offsets[0] != 0 || !rising || offsets[rows] != tokens as u64 {
            return Err("has rows that do not follow each other".into());
        }
        Ok(set)
    }

    fn offsets(&self) -> &[u64] {
        bytemuck::cast_slice(&self.bytes.as_slice()[self.offsets..self.labels])
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// True when there is none, which [`TokenSet::open`] refuses.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Tokens and labels of a row. Panics beyond the last.
    pub fn row(&self, row: usize) -> (&[u32], &[i32]) {
        let offsets = self.offsets();
        let range = offsets[row] as usize..offsets[row + 1] as usize;
        let bytes = self.bytes.as_slice();
        let ids: &[u32] = bytemuck::cast_slice(&bytes[self.ids..self.lines]);
        let labels: &[i32] = bytemuck::cast_slice(&bytes[self.labels..self.ids]);
        (&ids[range.clone()], &labels[range])
    }

    /// Where each row stands in the data file, counted from 1.
    pub fn lines(&self) -> &[u32] {
        bytemuck::cast_slice(&self.bytes.as_slice()[self.lines..self.lines + 4 * self.rows])
    }

    /// Line, tokens and labels of every row.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u32], &[i32])> {
        self.lines().iter().enumerate().map(|(row, &line)| {
            let (ids, labels) = self.row(row);
            (line, ids, labels)
        })
    }

    /// Lengths.
    pub fn statistics(&self) -> Statistics {
        let mut lengths: Vec<usize> = self.iter().map(|(_, ids, _)| ids.len()).collect();
        lengths.sort_unstable();
        let at = |share: f64| lengths[((lengths.len() as f64 * share).ceil() as usize).clamp(1, lengths.len()) - 1];
        Statistics {
            rows: self.rows,
            tokens: self.tokens,
            predicted: self.iter().map(|(_, _, labels)| predicted(labels)).sum(),
            shortest: lengths[0],
            median: at(0.5),
            p95: at(0.95),
            longest: lengths[self.rows - 1],
        }
    }

    /// The rows in groups whose tokens together are at most `max_len`, each group in the order of the file: first fit.
    /// Every row alone where `pack` is false.
    pub fn groups(&self, pack: bool, max_len: usize) -> Vec<Vec<u32>> {
        if !pack {
            return (0..self.rows as u32).map(|row| vec![row]).collect();
        }
        // Groups that may still take a row; a row that finds none in the last few opens one.
        const OPEN: usize = 64;
        let mut groups: Vec<(usize, Vec<u32>)> = Vec::new();
        for (row, (_, ids, _)) in self.iter().enumerate() {
            let from = groups.len().saturating_sub(OPEN);
            match groups[from..].iter_mut().find(|(room, _)| *room >= ids.len()) {
                Some((room, group)) => {
                    *room -= ids.len();
                    group.push(row as u32);
                }
                None => groups.push((max_len.saturating_sub(ids.len()), vec![row as u32])),
            }
        }
        groups.into_iter().map(|(_, group)| group).collect()
    }
}

/// Labels that are predicted: all but the first and the masked ones.
pub fn predicted(labels: &[i32]) -> usize {
    labels[1..].iter().filter(|&&label| label != MASKED).count()
}

impl Store {
    fn as_slice(&self) -> &[u8] {
        match self {
            Store::Mapped(map) => map,
            Store::Owned(bytes) => bytes.as_slice(),
        }
    }
}

/// The file's bytes.
fn image(rows: &[Row], notes: &Notes, key: &[u8; 32]) -> Vec<u8> {
    let notes = serde_json::to_vec(notes).expect("plain numbers are JSON");
    let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
    let mut out = Vec::with_capacity(HEADER + 16 + notes.len() + 12 * (rows.len() + 1) + 8 * tokens);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((rows.len() as u32).to_le_bytes());
    out.extend((tokens as u64).to_le_bytes());
    out.extend(key);
    out.extend([0; 32]);
    out.extend((notes.len() as u64).to_le_bytes());
    out.extend(notes);
    out.resize(out.len().next_multiple_of(8), 0);
    let mut offset = 0u64;
    out.extend(offset.to_le_bytes());
    for row in rows {
        offset += row.ids.len() as u64;
        out.extend(offset.to_le_bytes());
    }
    rows.iter().for_each(|row| out.extend_from_slice(bytemuck::cast_slice(&row.labels)));
    rows.iter().for_each(|row| out.extend_from_slice(bytemuck::cast_slice(&row.ids)));
    rows.iter().for_each(|row| out.extend(row.line.to_le_bytes()));
    let hash = sha256(&out[HEADER..]);
    out[56..88].copy_from_slice(&hash);
    out
}

/// Which group comes at each place: a stream that starts over at its end, shuffled anew each time unless it is to stay
/// in order. A function of its fields alone, so a run resumes anywhere in it.
pub struct Order {
    count: usize,
    /// None: in order.
    seed: Option<u64>,
    /// The epoch that is at hand, and its permutation.
    at: (usize, Vec<u32>),
}

impl Order {
    /// Of `count` groups, at least one.
    pub fn new(count: usize, seed: Option<u64>) -> Order {
        Order { count, seed, at: (usize::MAX, Vec::new()) }
    }

    /// The group at `place`.
    pub fn group(&mut self, place: usize) -> usize {
        let Some(seed) = self.seed else { return place % self.count };
        let epoch = place / self.count;
        if self.at.0 != epoch {
            let mut order: Vec<u32> = (0..self.count as u32).collect();
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(1 + epoch as u64); // stream 0 is the adapter's
            order.shuffle(&mut rng);
            self.at = (epoch, order);
        }
        self.at.1[place % self.count] as usize
    }
}
