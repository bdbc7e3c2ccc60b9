//! The text of a PDF, page by page, in the order that its pages draw it.
//!
//! `lopdf` reads the file, unpacks streams within a limit and knows the fonts' encodings. Here is what makes lines of
//! it: a page shows strings at places, and a gap is a blank, another baseline a line's end, a step down of nearly two
//! lines a paragraph's. Text inside drawn forms, and text that is a picture, is not read.

use std::collections::{BTreeMap, HashMap};

use lopdf::content::Content;

use lopdf::{Dictionary, Document, Encoding, LoadOptions, Object, ObjectId};

use super::{Block, Builder};
use crate::error::quote;

/// Bytes that a stream, and a page's drawing, may unpack to. An operation of five bytes takes a hundred times as much.
const UNPACKED: usize = 8 << 20;
/// Codes of a font, and ranges of them, whose widths are read.
const CODES: usize = 1 << 16;
const RANGES: usize = 1 << 12;
/// Saved states of a drawing; deeper ones are none.
const STATES: usize = 64;
/// Shares of the font's size: a gap that is a blank, a step that is another line, one that is another paragraph.
const BLANK: f64 = 0.18;
const LINE: f64 = 0.5;
const PARAGRAPH: f64 = 1.75;
/// Thousandths of the font's size that a character is wide where the font does not say.
const WIDTH: f64 = 500.0;

/// The paragraphs of every page, each page under its own heading. Lines are those of the text, counted through.
pub fn blocks(bytes: &[u8]) -> Result<Vec<Block>, String> {
    const INSTEAD: &str = "convert it to text, such as with pdftotext";
    let told = |error: lopdf::Error| match error {
        lopdf::Error::Decompress(lopdf::DecompressError::MemoryLimitExceeded { .. }) => {
            format!("(it unpacks to more than {} MB): {INSTEAD}", UNPACKED >> 20)
        }
        error => format!("({}): {INSTEAD}", quote(&error.to_string())),
    };
    let options = LoadOptions { max_decompressed_size: Some(UNPACKED), ..LoadOptions::default() };
    let document = Document::load_mem_with_options(bytes, options)
        .map_err(|error| format!("is no PDF that can be read {}", told(error)))?;
    if document.is_encrypted() {
        return Err(format!("is encrypted: {INSTEAD}"));
    }
    let pages = document.get_pages();
    if pages.is_empty() {
        return Err(format!("is a PDF without pages: {INSTEAD}"));
    }
    let (mut builder, mut number) = (Builder::default(), 0);
    for (page, id) in pages {
        let text = text(&document, id).map_err(|error| format!("page {page} cannot be read {}", told(error)))?;
        if !text.trim().is_empty() {
            builder.heading(1, &format!("page {page}"), number + 1);
        }
        for line in text.lines() {
            number += 1;
            match line.trim().is_empty() {
                true => builder.end(),
                false => builder.line(line.trim(), number),
            }
        }
    }
    Ok(builder.finish())
}

/// A font: what its codes mean, and how wide they are.
struct Font<'a> {
    encoding: Option<Encoding<'a>>,
    /// Two bytes a code.
    wide: bool,
    /// Thousandths of the size.
    widths: HashMap<u32, f64>,
    width: f64,
}

/// x' = a·x + c·y + e, y' = b·x + d·y + f.
type Matrix = [f64; 6];

const IDENTITY: Matrix = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0];

/// First `m`, then `n`.
fn times(m: &Matrix, n: &Matrix) -> Matrix {
    [
        m[0] * n[0] + m[1] * n[2],
        m[0] * n[1] + m[1] * n[3],
        m[2] * n[0] + m[3] * n[2],
        m[2] * n[1] + m[3] * n[3],
        m[4] * n[0] + m[5] * n[2] + n[4],
        m[4] * n[1] + m[5] * n[3] + n[5],
    ]
}

/// What `q` saves.
#[derive(Clone)]
struct State {
    place: Matrix,
    font: Vec<u8>,
    size: f64,
    leading: f64,
    /// Added after each character, and after each blank.
    spacing: (f64, f64),
}

/// A page's text as it is put together.
struct Writer {
    text: String,
    /// Where the last string ended, and the font's size there.
    end: Option<(f64, f64, f64)>,
}

impl Writer {
    /// A string from one place to another.
    fn show(&mut self, shown: &str, from: (f64, f64), to: (f64, f64), size: f64) {
        if shown.is_empty() {
            return;
        }
        if let Some((x, y, last)) = self.end {
            let size = size.max(last);
            let down = (from.1 - y).abs();
            if down > PARAGRAPH * size {
                self.text += "\n\n";
            } else if down > LINE * size {
                self.text.push('\n');
            } else if (from.0 - x > BLANK * size || x - from.0 > size) && !self.text.ends_with([' ', '\n']) {
                self.text.push(' ');
            }
        }
        // Codes that a font has no name for come out as NUL.
        self.text.extend(shown.chars().filter(|&c| c != '\0'));
        self.end = Some((to.0, to.1, size));
    }
}

fn text(document: &Document, page: ObjectId) -> lopdf::Result<String> {
    // Codes mean what a font's own table says, and only without one what its encoding says.
    let mut dictionaries: BTreeMap<Vec<u8>, Dictionary> = BTreeMap::new();
    for (name, font) in document.get_page_fonts(page)? {
        let mut font = font.clone();
        if font.get_deref(b"ToUnicode", document).and_then(Object::as_stream).is_ok() {
            font.remove(b"Encoding");
        }
        dictionaries.insert(name, font);
    }
    let mut fonts: HashMap<&[u8], Font<'_>> = HashMap::new();
    for (name, dictionary) in &dictionaries {
        fonts.insert(name, font(document, dictionary)?);
    }
    let content = Content::decode(&document.get_page_content_with_limit(page, UNPACKED)?)?;

    let start = State { place: IDENTITY, font: Vec::new(), size: 1.0, leading: 0.0, spacing: (0.0, 0.0) };
    let (mut state, mut saved) = (start, Vec::new());
    let (mut line, mut pen) = (IDENTITY, IDENTITY);
    let mut out = Writer { text: String::new(), end: None };
    for operation in &content.operations {
        let number = |at: usize| operation.operands.get(at).map_or(0.0, float);
        let matrix = || std::array::from_fn(number);
        let next = |line: &Matrix, x: f64, y: f64| times(&[1.0, 0.0, 0.0, 1.0, x, y], line);
        match operation.operator.as_str() {
            "q" if saved.len() < STATES => saved.push(state.clone()),
            "Q" => state = saved.pop().unwrap_or(state),
            "cm" => state.place = times(&matrix(), &state.place),
            "BT" => (line, pen) = (IDENTITY, IDENTITY),
            "Tf" => {
                let name = operation.operands.first().and_then(|name| name.as_name().ok());
                (state.font, state.size) = (name.unwrap_or_default().to_vec(), number(1));
            }
            "TL" => state.leading = number(0),
            "Tc" => state.spacing.0 = number(0),
            "Tw" => state.spacing.1 = number(0),
            "Tm" => (line, pen) = (matrix(), matrix()),
            "Td" | "TD" => {
                if operation.operator == "TD" {
                    state.leading = -number(1);
                }
                line = next(&line, number(0), number(1));
                pen = line;
            }
            "T*" | "'" | "\"" => {
                line = next(&line, 0.0, -state.leading);
                pen = line;
            }
            _ => {}
        }
        let strings: &[Object] = match (operation.operator.as_str(), &operation.operands[..]) {
            ("Tj" | "'", [string, ..]) => std::slice::from_ref(string),
            ("\"", [_, _, string, ..]) => std::slice::from_ref(string),
            ("TJ", [Object::Array(strings), ..]) => strings,
            _ => &[],
        };
        let Some(font) = fonts.get(&state.font[..]) else { continue };
        for string in strings {
            let Object::String(codes, _) = string else {
                pen = next(&pen, -float(string) / 1000.0 * state.size, 0.0);
                continue;
            };
            let from = times(&pen, &state.place);
            pen = next(&pen, font.advance(codes, &state), 0.0);
            let to = times(&pen, &state.place);
            let size = state.size.abs() * (from[2].powi(2) + from[3].powi(2)).sqrt();
            let shown = font.encoding.as_ref().and_then(|encoding| encoding.bytes_to_string(codes).ok());
            out.show(&shown.unwrap_or_default(), (from[4], from[5]), (to[4], to[5]), size);
        }
    }
    Ok(out.text)
}

fn float(object: &Object) -> f64 {
    object.as_float().map_or(0.0, f64::from)
}

impl Font<'_> {
    /// How far a string takes the pen.
    fn advance(&self, codes: &[u8], state: &State) -> f64 {
        let step = if self.wide { 2 } else { 1 };
        let of = |code: &[u8]| {
            let number = code.iter().fold(0, |number, &byte| number << 8 | u32::from(byte));
            let width = self.widths.get(&number).copied().unwrap_or(self.width) / 1000.0 * state.size;
            let blank = if code == b" " { state.spacing.1 } else { 0.0 };
            width + state.spacing.0 + blank
        };
        codes.chunks(step).map(of).sum()
    }
}

fn font<'a>(document: &'a Document, dictionary: &'a Dictionary) -> lopdf::Result<Font<'a>> {
    let encoding = match dictionary.get_font_encoding_with_limit(document, UNPACKED) {
        Ok(encoding) => Some(encoding),
        Err(error @ lopdf::Error::Decompress(_)) => return Err(error),
        Err(_) => None,
    };
    let wide = dictionary.get(b"Subtype").and_then(Object::as_name).is_ok_and(|name| name == b"Type0");
    let (mut widths, mut width) = (HashMap::new(), WIDTH);
    let array = |dictionary: &'a Dictionary, key: &[u8]| dictionary.get_deref(key, document).and_then(Object::as_array);
    let deref = |object: &'a Object| document.dereference(object).map_or(object, |(_, object)| object);
    if !wide {
        let first = dictionary.get_deref(b"FirstChar", document).map_or(0.0, float) as u32;
        for (code, object) in (first..first.saturating_add(256)).zip(array(dictionary, b"Widths").into_iter().flatten())
        {
            widths.insert(code, float(deref(object)));
        }
    } else if let Some(inner) = array(dictionary, b"DescendantFonts").ok().and_then(|fonts| fonts.first()) {
        if let Ok(inner) = deref(inner).as_dict() {
            width = inner.get_deref(b"DW", document).map_or(1000.0, float);
            let mut ranges = RANGES;
            let mut rest = array(inner, b"W").map_or(&[][..], |list| &list[..]);
            // Either `first [w w ..]` or `first last w`.
            while let ([first, second, after @ ..], true) = (rest, widths.len() <= CODES) {
                let first = float(deref(first)) as u32;
                match (deref(second), after) {
                    (Object::Array(list), _) => {
                        widths.extend((first..).zip(list.iter().take(CODES).map(|w| float(deref(w)))));
                        rest = after;
                    }
                    (last, [w, after @ ..]) if ranges > 0 => {
                        let (last, w) = ((float(last) as u32).min(first.saturating_add(CODES as u32)), float(deref(w)));
                        widths.extend((first..=last).map(|code| (code, w)));
                        ranges -= 1;
                        rest = after;
                    }
                    _ => break,
                }
            }
        }
    }
    Ok(Font { encoding, wide, widths, width })
}
