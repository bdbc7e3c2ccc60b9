//! NumPy's `.npy`: one array of f32, f16, i64 or bool, little-endian, row-major.
//!
//! ```text
//! "\x93NUMPY"  u8 major  u8 minor  u16 (version 1) or u32 n   n bytes of text   data, at a multiple of 64
//! text: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 384), }  blanks  newline
//! ```
//!
//! The text is a Python literal; the reader takes the three keys in any order and nothing else.

use std::path::Path;
use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit};
use half::f16;
use memmap2::Mmap;

use crate::aside::Aside;
use crate::error::{quote, Error};
use crate::model::checkpoint::map_file;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// The longest header that is read; NumPy itself takes 10,000 characters.
const MAX_HEADER: usize = 10_000;
/// More dims than NumPy allows are refused.
const MAX_DIMS: usize = 32;
/// Where data begins: a multiple of this.
const ALIGN: usize = 64;

/// An element type that a `.npy` file holds here.
pub trait Element: NoUninit + AnyBitPattern {
    /// NumPy's name for it.
    const DESCR: &'static str;
}

impl Element for f32 {
    const DESCR: &'static str = "<f4";
}

impl Element for f16 {
    const DESCR: &'static str = "<f2";
}

impl Element for i64 {
    const DESCR: &'static str = "<i8";
}

/// NumPy's bool: 0 is false.
impl Element for u8 {
    const DESCR: &'static str = "|b1";
}

/// An array being written, a piece at a time; the file gets its name when it is whole.
pub struct Writer<T> {
    file: Aside,
    /// Elements still to come.
    left: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Element> Writer<T> {
    /// Begins an array of this shape, outermost dim first. Panics when the count of elements overflows.
    pub fn create(path: &Path, shape: &[usize]) -> Result<Writer<T>, Error> {
        let left = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim)).expect("elements of an array");
        let mut file = Aside::create(path)?;
        file.write(&header(T::DESCR, shape))?;
        Ok(Writer { file, left, element: std::marker::PhantomData })
    }

    /// Appends elements in row-major order. Panics for more than the shape holds.
    pub fn write(&mut self, values: &[T]) -> Result<(), Error> {
        self.left = self.left.checked_sub(values.len()).expect("no more elements than the shape holds");
        self.file.write(bytemuck::cast_slice(values))
    }

    /// Completes the file. Panics when elements are missing.
    pub fn finish(self) -> Result<(), Error> {
        assert_eq!(self.left, 0, "elements of the array still to be written");
        self.file.commit()
    }
}

/// Writes a whole array.
pub fn write<T: Element>(path: &Path, shape: &[usize], values: &[T]) -> Result<(), Error> {
    let mut writer = Writer::create(path, shape)?;
    writer.write(values)?;
    writer.finish()
}

/// Magic, version 1.0, the text and the blanks that align the data.
fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if shape.len() == 1 { "," } else { "" };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}{comma}), }}", dims.join(", "));
    let taken = MAGIC.len() + 4;
    let len = (taken + text.len() + 1).next_multiple_of(ALIGN) - taken;
    text += &" ".repeat(len - 1 - text.len());
    text.push('\n');
    [&MAGIC[..], &[1, 0], &(len as u16).to_le_bytes(), text.as_bytes()].concat()
}

/// An array in a mapped file, checked: dtype, order, shape and length fit each other.
pub struct Array {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The file's mapping.
    pub mmap: Arc<Mmap>,
    /// Where the elements begin in it.
    pub offset: usize,
}

impl Array {
    /// Maps a file of `T` elements. Errors name the file: not `.npy`, another element type, column-major order, a
    /// header that is no header, more or fewer bytes than the shape asks for.
    pub fn open<T: Element>(path: &Path) -> Result<Array, Error> {
        let mmap = map_file(path)?;
        let wrong = |what: String| Error::file(path, what);
        let Some(rest) = mmap.strip_prefix(MAGIC) else {
            return Err(wrong("does not begin as a .npy file does".into()));
        };
        let (version, rest) = rest.split_at_checked(2).ok_or_else(|| wrong("ends in its header".into()))?;
        let width = match version[0] {
            1 => 2,
            2 | 3 => 4,
            other => return Err(wrong(format!("is .npy version {other}; 1 to 3 are read"))),
        };
        let (len, rest) = rest.split_at_checked(width).ok_or_else(|| wrong("ends in its header".into()))?;
        let len = len.iter().rev().fold(0usize, |len, &byte| len << 8 | byte as usize);
        if len > MAX_HEADER || len > rest.len() {
            let most = MAX_HEADER.min(rest.len());
            return Err(wrong(format!("claims a header of {len} bytes; at most {most} can be")));
        }
        let (text, data) = rest.split_at(len);
        let text = std::str::from_utf8(text).map_err(|error| wrong(format!("header: {error}")))?;
        let (descr, column_major, shape) =
            parse(text).ok_or_else(|| wrong(format!("has a header that is not understood: {}", quote(text.trim()))))?;
        if descr != T::DESCR {
            let (found, wanted) = (quote(descr), T::DESCR);
            return Err(wrong(format!("holds elements of type {found}; {wanted} is needed: convert it with astype")));
        }
        if column_major {
            return Err(wrong("is in Fortran order: save numpy.ascontiguousarray of it".into()));
        }
        let count = shape.iter().try_fold(size_of::<T>(), |bytes, &dim| bytes.checked_mul(dim));
        if count != Some(data.len()) {
            let found = data.len();
            return Err(wrong(format!(
                "has {found} bytes of data, which its shape {shape:?} of {descr} does not take"
            )));
        }
        let offset = mmap.len() - data.len();
        Ok(Array { shape, mmap: mmap.clone(), offset })
    }

    /// A copy of the elements. Panics for another element type than the file was opened with.
    pub fn to_vec<T: Element>(&self) -> Vec<T> {
        bytemuck::pod_collect_to_vec(&self.mmap[self.offset..])
    }
}

/// descr, fortran_order and shape of a header's text; `None` for anything but these three keys, each once.
fn parse(text: &str) -> Option<(&str, bool, Vec<usize>)> {
    let (mut descr, mut order, mut shape) = (None, None, None);
    let mut rest = text.trim().strip_prefix('{')?.trim_start();
    loop {
        if let Some(after) = rest.strip_prefix('}') {
            return after.is_empty().then_some((descr?, order?, shape?));
        }
        let (key, value) = string(rest)?;
        let value = value.trim_start().strip_prefix(':')?.trim_start();
        let after = match key {
            "descr" if descr.is_none() => {
                let (word, after) = string(value)?;
                descr = Some(word);
                after
            }
            "fortran_order" if order.is_none() => {
                let yes = value.starts_with("True");
                order = Some(yes);
                value.strip_prefix(if yes { "True" } else { "False" })?
            }
            "shape" if shape.is_none() => {
                let (dims, after) = value.strip_prefix('(')?.split_once(')')?;
                let dims = dims.trim().strip_suffix(',').unwrap_or(dims.trim());
                let dims = dims.split(',').filter(|_| !dims.is_empty());
                let dims = dims.map(|dim| dim.trim().parse().ok()).collect::<Option<Vec<usize>>>()?;
                shape = Some(dims).filter(|dims| dims.len() <= MAX_DIMS);
                after
            }
            _ => return None,
        };
        rest = after.trim_start();
        rest = match rest.strip_prefix(',') {
            Some(after) => after.trim_start(),
            None if rest.starts_with('}') => rest,
            None => return None,
        };
    }
}

/// A quoted word at the beginning of `text`, and what follows it.
fn string(text: &str) -> Option<(&str, &str)> {
    let mark = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        for shape in [vec![2, 3], vec![6], vec![1, 6, 1], vec![3, 2]] {
            write(&path, &shape, &[1.5f32, -2.0, 0.0, f32::MIN, 3.25, 7.0]).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!((bytes.len() - 24) % ALIGN, 0, "the data begins at a multiple of {ALIGN}");
            let array = Array::open::<f32>(&path).unwrap();
            assert_eq!(array.shape, shape);
            assert_eq!(array.to_vec::<f32>(), [1.5, -2.0, 0.0, f32::MIN, 3.25, 7.0]);
        }
        write(&path, &[0, 4], &[] as &[i64]).unwrap();
        assert_eq!(Array::open::<i64>(&path).unwrap().shape, [0, 4]);
        write(&path, &[2], &[f16::from_f32(0.5), f16::NEG_INFINITY]).unwrap();
        assert_eq!(Array::open::<f16>(&path).unwrap().to_vec::<f16>(), [f16::from_f32(0.5), f16::NEG_INFINITY]);
    }

    #[test]
    fn the_header_is_numpys_own() {
        // From numpy 2.4: np.save(path, np.zeros((2, 3), np.float32)).
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
        let expected = [b"\x93NUMPY\x01\x00v\x00", text.as_bytes(), " ".repeat(58).as_bytes(), b"\n"].concat();
        assert_eq!(header("<f4", &[2, 3]), expected);
        assert!(header("<i8", &[5]).windows(13).any(|w| w == b"'shape': (5,)"));
    }

    #[test]
    fn headers_in_other_words_are_read() {
        for text in [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
            "{\"shape\": (2,3), \"fortran_order\":False,\"descr\":\"<f4\"}\n",
            " { 'shape' : ( 2 , 3 ) , 'descr' : '<f4' , 'fortran_order' : False } ",
        ] {
            assert_eq!(parse(text), Some(("<f4", false, vec![2, 3])), "{text}");
        }
        assert_eq!(parse("{'descr': '<f4', 'fortran_order': True, 'shape': ()}"), Some(("<f4", true, vec![])));
    }

    #[test]
    fn hostile_headers_are_refused() {
        for text in [
            "",
            "{",
            "{}",
            "{'descr': '<f4', 'fortran_order': False}",
            "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': Maybe, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}",
            "{'descr': '<f4' 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("damaged.npy");
        write(&path, &[2, 3], &[1.0f32; 6]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let fails = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let error = Array::open::<f32>(&path).err().expect("refused").to_string();
            assert!(error.contains("damaged.npy"), "{error}");
        };
        for len in 0..whole.len() {
            fails(&whole[..len]);
        }
        fails(&[&whole[..], &[0]].concat());
        let replaced = |from: &str, to: &str| {
            let text = String::from_utf8_lossy(&whole[10..128]).replace(from, to);
            [&whole[..10], &text.as_bytes()[..118], &whole[128..]].concat()
        };
        fails(&replaced("<f4", "<f8"));
        fails(&replaced("<f4", ">f4"));
        fails(&replaced("False", "True "));
        fails(&replaced("(2, 3)", "(2, 4)"));
        fails(&replaced("(2, 3), ", "(18446744073709551615, 4), "));
        let mut long = whole.clone();
        long[8..10].copy_from_slice(&u16::MAX.to_le_bytes());
        fails(&long);
    }
}
