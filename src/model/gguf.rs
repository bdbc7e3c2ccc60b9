//! GGUF, versions 2 and 3, little-endian: a header of typed key-value pairs, a table of tensors, and their data.
//!
//! ```text
//! "GGUF"  u32 version  u64 tensors  u64 pairs
//! pair    string key   u32 type     value             string = u64 length, bytes; array = u32 type, u64 count, values
//! tensor  string name  u32 n_dims   u64 dims[n_dims]  u32 ggml type  u64 offset
//! ..      zeros up to a multiple of general.alignment (32 unless said), then the data the offsets count from
//! ```
//!
//! The file is mapped, and the header is the only part that is read. Values that can be long (strings, arrays) stay in
//! the file and are decoded when asked for. Every length and count is compared with what is left of the file before
//! anything is done with it, so a file cannot make the reader allocate more than a small multiple of its own header.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::checkpoint::{map_file, Encoding, StoredTensor};
use crate::error::{quote, Error};

/// A ggml tensor type: what a row of values becomes on disk.
pub(crate) struct GgmlType {
    id: u32,
    pub(crate) name: &'static str,
    /// Values in a block; a row is a whole number of blocks.
    pub(crate) values: usize,
    /// Bytes of a block.
    pub(crate) bytes: usize,
}

const fn ggml(id: u32, name: &'static str, values: usize, bytes: usize) -> GgmlType {
    GgmlType { id, name, values, bytes }
}

/// Every type that files hold today. Ids missing here were withdrawn, exist only while computing (Q8_1, Q8_K) or are
/// unknown; all are refused.
const GGML_TYPES: &[GgmlType] = &[
    ggml(0, "F32", 1, 4),
    ggml(1, "F16", 1, 2),
    ggml(2, "Q4_0", 32, 18),
    ggml(3, "Q4_1", 32, 20),
    ggml(6, "Q5_0", 32, 22),
    ggml(7, "Q5_1", 32, 24),
    ggml(8, "Q8_0", 32, 34),
    ggml(10, "Q2_K", 256, 84),
    ggml(11, "Q3_K", 256, 110),
    ggml(12, "Q4_K", 256, 144),
    ggml(13, "Q5_K", 256, 176),
    ggml(14, "Q6_K", 256, 210),
    ggml(16, "IQ2_XXS", 256, 66),
    ggml(17, "IQ2_XS", 256, 74),
    ggml(18, "IQ3_XXS", 256, 98),
    ggml(19, "IQ1_S", 256, 50),
    ggml(20, "IQ4_NL", 32, 18),
    ggml(21, "IQ3_S", 256, 110),
    ggml(22, "IQ2_S", 256, 82),
    ggml(23, "IQ4_XS", 256, 136),
    ggml(24, "I8", 1, 1),
    ggml(25, "I16", 1, 2),
    ggml(26, "I32", 1, 4),
    ggml(27, "I64", 1, 8),
    ggml(28, "F64", 1, 8),
    ggml(29, "IQ1_M", 256, 56),
    ggml(30, "BF16", 1, 2),
    ggml(34, "TQ1_0", 256, 54),
    ggml(35, "TQ2_0", 256, 66),
    ggml(39, "MXFP4", 32, 17),
    ggml(40, "NVFP4", 64, 36),
    ggml(41, "Q1_0", 128, 18),
    ggml(42, "Q2_0", 64, 18),
];

/// The type with this id, if it is one in use.
pub(crate) fn ggml_type(id: u32) -> Option<&'static GgmlType> {
    GGML_TYPES.iter().find(|kind| kind.id == id)
}

/// One value of the header. Strings and arrays are where they are in the file; [`Gguf`]'s getters decode them.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any of the eight integer types; all of them fit.
    Int(i128),
    /// f32 or f64.
    Float(f64),
    /// A byte that is 0 or 1.
    Bool(bool),
    /// UTF-8, checked when the file was opened.
    String(Range<usize>),
    /// Values of one type, back to back.
    Array(Array),
}

/// An array in the header: `len` values of one type, at `bytes` of the file. Arrays of arrays are refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// How many values.
    pub len: usize,
    kind: u32,
    bytes: Range<usize>,
}

/// Value types by id, with the bytes of one value; strings (8) and arrays (9) have no fixed size.
const KINDS: [(&str, usize); 13] = [
    ("u8", 1),
    ("i8", 1),
    ("u16", 2),
    ("i16", 2),
    ("u32", 4),
    ("i32", 4),
    ("f32", 4),
    ("bool", 1),
    ("string", 0),
    ("array", 0),
    ("u64", 8),
    ("i64", 8),
    ("f64", 8),
];
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl Value {
    fn kind(&self) -> String {
        match self {
            Value::Int(_) => "an integer".into(),
            Value::Float(_) => "a float".into(),
            Value::Bool(_) => "a bool".into(),
            Value::String(_) => "a string".into(),
            Value::Array(array) => format!("an array of {} {}", array.len, KINDS[array.kind as usize].0),
        }
    }
}

/// An open GGUF file.
///
/// Bytes are read straight from the mapping: should another process cut the file short while it is open, touching the
/// missing part ends this process with SIGBUS. Replace model files by renaming, not by writing over them.
#[derive(Debug)]
pub struct Gguf {
    /// The file.
    pub path: PathBuf,
    /// 2 or 3.
    pub version: u32,
    /// The whole file.
    pub mmap: Arc<Mmap>,
    /// The tensors in the order of the header, under the names of the file.
    pub tensors: Vec<StoredTensor>,
    meta: BTreeMap<String, Value>,
    /// Where each value lies, its type before it.
    stored: BTreeMap<String, Range<usize>>,
}

impl Gguf {
    /// Maps `path` and reads its header. Refuses, naming the file and the key or tensor: what is not GGUF, version 1,
    /// big-endian files, one part of a split model, and every inconsistency: counts and lengths beyond the file,
    /// duplicate keys or tensors, unknown types, dims that are zero or overflow, rows that are not whole blocks, data
    /// that is misaligned, past the end, or shared by two tensors.
    pub fn open(path: &Path) -> Result<Gguf, Error> {
        let mmap = map_file(path)?;
        let mut at = Cursor { path, bytes: &mmap, at: 0 };
        if at.take(4, "the magic")? != b"GGUF" {
            return Err(Error::file(path, "does not begin with the bytes GGUF: not a GGUF file"));
        }
        let version = at.u32("the version")?;
        match version {
            2 | 3 => {}
            1 => return Err(at.wrong("GGUF version 1 is not supported: convert the model again, to version 3")),
            _ if (1..=3).contains(&version.swap_bytes()) => {
                return Err(at.wrong("a big-endian GGUF file is not supported: convert it to little-endian"));
            }
            _ => return Err(at.wrong(format!("GGUF version {version} is unknown: 2 and 3 are read"))),
        }
        // A tensor takes at least 32 bytes of header (lengths, one dim, type, offset), a pair at least 13.
        let tensors = at.count("tensors", 32)?;
        let pairs = at.count("key-value pairs", 13)?;

        let (mut meta, mut stored) = (BTreeMap::new(), BTreeMap::new());
        for i in 0..pairs {
            let key = at.string(format_args!("the key of pair {i}"))?;
            let start = at.at;
            let value = at.value(key)?;
            stored.insert(key.to_string(), start..at.at);
            if meta.insert(key.to_string(), value).is_some() {
                return Err(at.wrong(format!("key {} appears twice", quote(key))));
            }
        }
        let mut gguf =
            Gguf { path: path.to_path_buf(), version, mmap: mmap.clone(), tensors: Vec::new(), meta, stored };

        let parts = gguf.optional("split.count", Gguf::u32)?.unwrap_or(1);
        if parts > 1 {
            let what = format!("one of {parts} parts of a split model: join the parts into one GGUF file first");
            return Err(Error::file(path, what));
        }
        let alignment = gguf.optional("general.alignment", Gguf::u32)?.unwrap_or(32) as usize;
        if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
            let what = format!("general.alignment is {alignment}; it must be a power of two from 8 to 2^20");
            return Err(Error::file(path, what));
        }
        for i in 0..tensors {
            gguf.tensors.push(at.tensor(i, alignment)?);
        }
        // In bounds: the cursor is within a mapping, whose length is at most isize::MAX.
        gguf.place(at.at.next_multiple_of(alignment))?;
        Ok(gguf)
    }

    /// Turns the tensors' offsets into offsets in the file, whose data begins at `data`, and checks that names are
    /// unique and that every tensor has bytes of its own.
    fn place(&mut self, data: usize) -> Result<(), Error> {
        let file = self.mmap.len();
        for tensor in &mut self.tensors {
            let start = data.checked_add(tensor.offset);
            let end = start.and_then(|start| start.checked_add(tensor.len));
            let (Some(start), Some(_)) = (start, end.filter(|&end| end <= file)) else {
                let (len, offset) = (tensor.len, tensor.offset);
                let what = format!(
                    "its {len} bytes at offset {offset} of the data (which begins at {data}) end past the {file} bytes \
                     of the file: truncated? fetch it again"
                );
                return Err(Error::tensor(&self.path, &tensor.name, what));
            };
            tensor.offset = start;
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = self.tensors.iter().find(|tensor| !names.insert(&tensor.name)) {
            return Err(Error::tensor(&self.path, &twice.name, "appears twice"));
        }
        let mut by_offset: Vec<&StoredTensor> = self.tensors.iter().collect();
        by_offset.sort_by_key(|tensor| tensor.offset);
        for pair in by_offset.windows(2) {
            if pair[0].offset + pair[0].len > pair[1].offset {
                let what = format!("its bytes overlap those of tensor {}", quote(&pair[0].name));
                return Err(Error::tensor(&self.path, &pair[1].name, what));
            }
        }
        Ok(())
    }

    /// The value of a key.
    pub fn meta(&self, key: &str) -> Option<&Value> {
        self.meta.get(key)
    }

    /// The bytes of a value as the file has them, behind those of its type: what a copy of the pair needs.
    pub fn stored(&self, key: &str) -> Option<&[u8]> {
        self.stored.get(key).map(|range| &self.mmap[range.clone()])
    }

    /// Every key, in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.meta.keys().map(String::as_str)
    }

    /// The tensor with this name in the file.
    pub fn tensor(&self, stored_name: &str) -> Option<&StoredTensor> {
        self.tensors.iter().find(|tensor| tensor.name == stored_name)
    }

    /// `None` where the key is missing, else what the getter says: `gguf.optional("general.alignment", Gguf::u32)`.
    pub fn optional<'a, T>(
        &'a self,
        key: &str,
        get: impl FnOnce(&'a Gguf, &str) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.meta(key).map(|_| get(self, key)).transpose()
    }

    /// A non-negative integer below 2^32, of any integer type. An error where the key is missing or not that.
    pub fn u32(&self, key: &str) -> Result<u32, Error> {
        match self.get(key)? {
            Value::Int(value) => u32::try_from(*value)
                .map_err(|_| self.wrong(key, format!("is {value}; a u32 is from 0 to {}", u32::MAX))),
            other => Err(self.mistyped(key, "an integer", other)),
        }
    }

    /// A float (an f64 is rounded to f32). An error where the key is missing or not that.
    pub fn f32(&self, key: &str) -> Result<f32, Error> {
        match self.get(key)? {
            Value::Float(value) => Ok(*value as f32),
            other => Err(self.mistyped(key, "a float", other)),
        }
    }

    /// A bool. An error where the key is missing or not that.
    pub fn bool(&self, key: &str) -> Result<bool, Error> {
        match self.get(key)? {
            Value::Bool(value) => Ok(*value),
            other => Err(self.mistyped(key, "a bool", other)),
        }
    }

    /// A string. An error where the key is missing or not that.
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        match self.get(key)? {
            Value::String(bytes) => {
                std::str::from_utf8(&self.mmap[bytes.clone()]).map_err(|error| self.wrong(key, error.to_string()))
            }
            other => Err(self.mistyped(key, "a string", other)),
        }
    }

    /// An array of strings, borrowed from the file. An error where the key is missing, not that, or where a string is
    /// not UTF-8, naming the key and the index.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, Error> {
        let array = self.array(key, "an array of strings", &[STRING])?;
        let mut at = Cursor { path: &self.path, bytes: &self.mmap[..array.bytes.end], at: array.bytes.start };
        let key = quote(key);
        (0..array.len).map(|i| at.string(format_args!("string {i} of key {key}"))).collect()
    }

    /// An array of i32 or u32 that fit i32. An error where the key is missing or not that.
    pub fn i32s(&self, key: &str) -> Result<Vec<i32>, Error> {
        let array = self.array(key, "an array of i32", &[5, 4])?;
        let words = self.mmap[array.bytes.clone()].chunks_exact(4);
        let values: Vec<i32> = words.map(|word| i32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
        match values.iter().position(|&value| array.kind == 4 && value < 0) {
            Some(i) => Err(self.wrong(key, format!("value {i} is {}, beyond i32", values[i] as u32))),
            None => Ok(values),
        }
    }

    /// An array of f32. An error where the key is missing or not that.
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>, Error> {
        let array = self.array(key, "an array of f32", &[6])?;
        let words = self.mmap[array.bytes.clone()].chunks_exact(4);
        Ok(words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }

    fn array(&self, key: &str, expected: &str, kinds: &[u32]) -> Result<&Array, Error> {
        match self.get(key)? {
            Value::Array(array) if kinds.contains(&array.kind) => Ok(array),
            other => Err(self.mistyped(key, expected, other)),
        }
    }

    fn get(&self, key: &str) -> Result<&Value, Error> {
        self.meta(key).ok_or_else(|| Error::file(&self.path, format!("the header has no key {}", quote(key))))
    }

    fn mistyped(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.wrong(key, format!("must be {expected}, not {}", found.kind()))
    }

    fn wrong(&self, key: &str, what: String) -> Error {
        Error::file(&self.path, format!("key {} {what}", quote(key)))
    }
}

/// A place in the header. Every read checks what is left.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn wrong(&self, what: impl Into<String>) -> Error {
        Error::file(self.path, what)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: u64, what: impl Display) -> Result<&'a [u8], Error> {
        match usize::try_from(len).ok().filter(|&len| len <= self.left()) {
            Some(len) => {
                self.at += len;
                Ok(&self.bytes[self.at - len..self.at])
            }
            None => Err(self.wrong(format!(
                "{what} takes {len} bytes at offset {}, where {} are left: truncated or damaged, fetch the file again",
                self.at,
                self.left()
            ))),
        }
    }

    fn word<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N], Error> {
        let bytes = self.take(N as u64, what)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    fn u32(&mut self, what: impl Display) -> Result<u32, Error> {
        self.word(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: impl Display) -> Result<u64, Error> {
        self.word(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least` bytes each, refused when the file could not hold them.
    fn count(&mut self, what: impl Display, least: usize) -> Result<usize, Error> {
        let count = self.u64(&what)?;
        usize::try_from(count).ok().filter(|&count| count <= self.left() / least).ok_or_else(|| {
            let left = self.left();
            self.wrong(format!("claims {count} {what}, more than the {left} bytes that follow could hold: damaged"))
        })
    }

    fn string(&mut self, what: impl Display) -> Result<&'a str, Error> {
        let len = self.u64(&what)?;
        let bytes = self.take(len, &what)?;
        std::str::from_utf8(bytes).map_err(|error| self.wrong(format!("{what} is not UTF-8: {error}")))
    }

    /// The value of a pair, behind its type.
    fn value(&mut self, key: &str) -> Result<Value, Error> {
        let key = quote(key);
        let what = format!("the value of key {key}");
        let kind = self.kind(&key)?;
        Ok(match kind {
            0 => Value::Int(u8::from_le_bytes(self.word(&what)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.word(&what)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.word(&what)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.word(&what)?).into()),
            4 => Value::Int(self.u32(&what)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.word(&what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.word(&what)?).into()),
            BOOL => match self.word(&what)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.wrong(format!("key {key} is a bool with the byte {other}"))),
            },
            STRING => {
                let len = self.string(&what)?.len();
                Value::String(self.at - len..self.at)
            }
            ARRAY => Value::Array(self.array(&key)?),
            10 => Value::Int(self.u64(&what)?.into()),
            11 => Value::Int(i64::from_le_bytes(self.word(&what)?).into()),
            _ => Value::Float(f64::from_le_bytes(self.word(&what)?)),
        })
    }

    /// A value type that exists.
    fn kind(&mut self, key: &str) -> Result<u32, Error> {
        let kind = self.u32(key)?;
        if kind as usize >= KINDS.len() {
            return Err(self.wrong(format!("key {key} has the unknown value type {kind}")));
        }
        Ok(kind)
    }

    fn array(&mut self, key: &str) -> Result<Array, Error> {
        let kind = self.kind(key)?;
        let what = format!("the array of key {key}");
        if kind == ARRAY {
            return Err(self.wrong(format!("key {key} is an array of arrays, which no model needs: refused")));
        }
        // A string takes the 8 bytes of its length at least.
        let size = if kind == STRING { 8 } else { KINDS[kind as usize].1 };
        let len = self.count(format_args!("values of key {key}"), size)?;
        let start = self.at;
        if kind == STRING {
            for i in 0..len {
                let what = format_args!("string {i} of key {key}");
                let bytes = self.u64(what)?;
                self.take(bytes, what)?;
            }
        } else {
            self.take((len * size) as u64, &what)?;
        }
        Ok(Array { len, kind, bytes: start..self.at })
    }

    /// Row `i` of the table of tensors. Its offset is left as it stands: from the beginning of the data.
    fn tensor(&mut self, i: usize, alignment: usize) -> Result<StoredTensor, Error> {
        let name = self.string(format_args!("the name of tensor {i}"))?;
        let wrong = |what: String| Error::tensor(self.path, name, what);
        if name.is_empty() || name.len() > 64 {
            return Err(wrong(format!("its name takes {} bytes; 1 to 64 are allowed", name.len())));
        }
        let what = format!("the entry of tensor {}", quote(name));
        let n_dims = self.u32(&what)?;
        if !(1..=4).contains(&n_dims) {
            return Err(Error::tensor(self.path, name, format!("has {n_dims} dims; 1 to 4 are allowed")));
        }
        let mut shape = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            shape.push(self.u64(&what)?);
        }
        let id = self.u32(&what)?;
        let offset = self.u64(&what)?;

        let wrong = |what: String| Error::tensor(self.path, name, what);
        let Some(kind) = ggml_type(id) else {
            return Err(wrong(format!(
                "has the ggml type {id}, which is unknown or not for files: convert the model again"
            )));
        };
        let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
        let bytes = elements.and_then(|n| (n / kind.values as u64).checked_mul(kind.bytes as u64));
        let (Some(elements), Some(bytes)) = (elements, bytes.and_then(|n| usize::try_from(n).ok())) else {
            return Err(wrong(format!("its dims {shape:?} overflow")));
        };
        if elements == 0 {
            return Err(wrong(format!("its dims {shape:?} have a zero")));
        }
        if shape[0] % kind.values as u64 != 0 {
            return Err(wrong(format!(
                "its rows of {} values are not whole blocks of {} ({})",
                shape[0], kind.values, kind.name
            )));
        }
        let Some(offset) = usize::try_from(offset).ok().filter(|offset| offset % alignment == 0) else {
            return Err(wrong(format!("its offset {offset} is not a multiple of the alignment {alignment}")));
        };
        // Each dim is at most `elements`, which is at most 256 times a usize of bytes; the data check follows.
        let shape = shape.iter().rev().map(|&dim| usize::try_from(dim)).collect::<Result<Vec<usize>, _>>();
        let shape =
            shape.map_err(|_| Error::tensor(self.path, name, "has a dim beyond this machine's address space"))?;
        Ok(StoredTensor { name: name.to_string(), encoding: Encoding::from_ggml(id), shape, offset, len: bytes })
    }
}
