//! Readers: a file's bytes to documents, each a list of paragraphs that know their headings and their lines.
//!
//! Text, Markdown and HTML have one document a file and the file's own lines. A PDF has the lines of its extracted
//! text, under a heading that names the page. JSON Lines have a document a row, all on the row's line.

mod html;
mod pdf;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{mpsc, Once};
use std::time::Duration;

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use serde::Deserialize;

use super::files::Source;
use crate::error::quote;
use crate::model::adapter::sha256;

/// How long a file may take to read.
const DEADLINE: Duration = Duration::from_secs(120);
/// Stack of the thread that reads: nested structures recurse. Reserved, not touched.
const STACK: usize = 256 << 20;
/// The name of that thread, by which its panics are told from others.
const READER: &str = "document reader";

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Lines; a blank line ends a paragraph.
    Text,
    /// CommonMark, kept as written; headings are taken out.
    Markdown,
    /// The text between tags; scripts and styles are left out.
    Html,
    /// The text of each page.
    Pdf,
    /// Rows with `text` and, if they like, `title`, and `path` or `id`.
    Jsonl,
}

impl Kind {
    /// The endings that are known.
    pub const KNOWN: [&str; 11] =
        ["txt", "text", "rst", "md", "markdown", "html", "htm", "xhtml", "pdf", "jsonl", "ndjson"];

    /// The kind that a file's ending says.
    pub fn of(path: &Path) -> Option<Kind> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "txt" | "text" | "rst" => Some(Kind::Text),
            "md" | "markdown" => Some(Kind::Markdown),
            "html" | "htm" | "xhtml" => Some(Kind::Html),
            "pdf" => Some(Kind::Pdf),
            "jsonl" | "ndjson" => Some(Kind::Jsonl),
            _ => None,
        }
    }
}

/// A text with a name of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The source's path; of a row, with `#` and its path, id or line after it.
    pub path: String,
    /// SHA-256 of what it was read from.
    pub hash: [u8; 32],
    /// In order.
    pub blocks: Vec<Block>,
    /// The line of a row that holds all of it.
    pub line: Option<u32>,
}

/// A paragraph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The headings above it, ` > ` between them.
    pub heading: String,
    /// Its lines, `\n` between them, no blank ones around them.
    pub text: String,
    /// The number of each of its lines in the file, from 1.
    pub lines: Vec<u32>,
}

/// The documents of a file. The reason where it cannot be read, in words that follow its name.
pub fn documents(source: &Source, bytes: Vec<u8>) -> Result<Vec<Document>, String> {
    let (path, kind) = (source.path.clone(), source.kind);
    apart(move || {
        let hash = sha256(&bytes);
        let one = |blocks| Ok(vec![Document { path: path.clone(), hash, blocks, line: None }]);
        if kind == Kind::Pdf {
            return pdf::blocks(&bytes).and_then(one);
        }
        let text = text(&bytes)?;
        match kind {
            Kind::Markdown => one(markdown(text)),
            Kind::Html => one(html::blocks(text)),
            Kind::Jsonl => rows(&path, text),
            _ => one(plain(text)),
        }
    })
}

/// Bytes as UTF-8 text.
fn text(bytes: &[u8]) -> Result<&str, String> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err("is in UTF-16: convert it to UTF-8, such as with iconv".into());
    }
    if bytes.contains(&0) {
        return Err("is binary, no text".into());
    }
    std::str::from_utf8(bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count() + 1;
        format!("line {line} is no UTF-8: convert the file, such as with iconv")
    })
}

/// Reads on a thread with [`STACK`] for at most [`DEADLINE`]; a panic there is a reason. What overruns is left behind:
/// it owns its bytes.
fn apart<T: Send + 'static>(read: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    static QUIET: Once = Once::new();
    // A parser's panic is told as a reason, so it is not printed too.
    QUIET.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().name() != Some(READER) {
                before(info);
            }
        }));
    });
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name(READER.into()).stack_size(STACK);
    let started = thread.spawn(move || {
        let _ = sender.send(read()); // nobody listens any more after the deadline
    });
    started.map_err(|cause| format!("cannot be read: no thread for it: {cause}"))?;
    receiver.recv_timeout(DEADLINE).unwrap_or_else(|error| {
        Err(match error {
            mpsc::RecvTimeoutError::Timeout => format!("takes longer than {} s to read", DEADLINE.as_secs()),
            mpsc::RecvTimeoutError::Disconnected => "is damaged: its reader gave up".into(),
        })
    })
}

/// Paragraphs as they come: lines, ends and headings to blocks.
#[derive(Default)]
struct Builder {
    blocks: Vec<Block>,
    headings: Vec<Heading>,
    text: String,
    lines: Vec<u32>,
}

struct Heading {
    level: u8,
    text: String,
    line: u32,
    /// Whether anything stands below it.
    bears: bool,
}

impl Builder {
    /// A line of the paragraph; a blank one does not end it.
    fn line(&mut self, text: &str, number: u32) {
        let text = text.trim_end();
        if text.is_empty() && self.lines.is_empty() {
            return;
        }
        if !self.lines.is_empty() {
            self.text.push('\n');
        }
        self.text += text;
        self.lines.push(number);
    }

    /// Ends the paragraph.
    fn end(&mut self) {
        let kept = self.text.trim_end().len();
        self.text.truncate(kept);
        if self.text.is_empty() {
            self.lines.clear();
            return;
        }
        self.lines.truncate(self.text.matches('\n').count() + 1);
        for heading in &mut self.headings {
            heading.bears = true;
        }
        let heading = self.heading_path(self.headings.len());
        self.blocks.push(Block {
            heading,
            text: std::mem::take(&mut self.text),
            lines: std::mem::take(&mut self.lines),
        });
    }

    /// A heading: what follows stands below it until one of its level or above. Level 0 is a title.
    fn heading(&mut self, level: u8, text: &str, line: u32) {
        self.end();
        self.close(level);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if !text.is_empty() {
            self.headings.push(Heading { level, text, line, bears: false });
        }
    }

    /// Drops the headings from `level` down; one that nothing stood below is text itself.
    fn close(&mut self, level: u8) {
        while self.headings.last().is_some_and(|heading| heading.level >= level) {
            let heading = self.headings.pop().expect("there is a last one");
            if !heading.bears {
                self.headings.iter_mut().for_each(|above| above.bears = true);
                let above = self.heading_path(self.headings.len());
                self.blocks.push(Block { heading: above, text: heading.text, lines: vec![heading.line] });
            }
        }
    }

    fn heading_path(&self, count: usize) -> String {
        self.headings[..count].iter().map(|heading| heading.text.as_str()).collect::<Vec<_>>().join(" > ")
    }

    fn finish(mut self) -> Vec<Block> {
        self.end();
        self.close(0);
        self.blocks
    }
}

/// Lines with their numbers, from 1.
fn numbered(text: &str) -> impl Iterator<Item = (&str, u32)> {
    text.lines().zip(1..)
}

fn plain(text: &str) -> Vec<Block> {
    let mut builder = Builder::default();
    for (line, number) in numbered(text) {
        match line.trim().is_empty() {
            true => builder.end(),
            false => builder.line(line, number),
        }
    }
    builder.finish()
}

fn markdown(text: &str) -> Vec<Block> {
    // What each line is: part of a heading, of a block whose blank lines do not end it, or neither.
    enum Mark {
        Heading(u8, String),
        Code,
    }
    let starts: Vec<usize> = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let line_of = |at: usize| starts.partition_point(|&start| start <= at) - 1;
    let mut marks: HashMap<usize, Mark> = HashMap::new();
    let mut inside = HashSet::new(); // every line of a heading
    let mut heading: Option<(u8, String)> = None;
    for (event, range) in Parser::new_ext(text, Options::ENABLE_YAML_STYLE_METADATA_BLOCKS).into_offset_iter() {
        match event {
            Event::Start(Tag::Heading { level, .. }) => heading = Some((level as u8, String::new())),
            Event::End(TagEnd::Heading(_)) => {
                let (level, said) = heading.take().unwrap_or_default();
                let (first, last) = (line_of(range.start), line_of(range.end.max(range.start + 1) - 1));
                marks.insert(first, Mark::Heading(level, said));
                inside.extend(first..=last);
            }
            Event::Start(Tag::CodeBlock(_)) => {
                let (first, last) = (line_of(range.start), line_of(range.end.max(range.start + 1) - 1));
                marks.extend((first..=last).map(|line| (line, Mark::Code)));
            }
            Event::Text(piece) | Event::Code(piece) => {
                if let Some((_, said)) = &mut heading {
                    *said += &piece;
                }
            }
            Event::SoftBreak | Event::HardBreak => {
                if let Some((_, said)) = &mut heading {
                    said.push(' ');
                }
            }
            _ => {}
        }
    }
    let mut builder = Builder::default();
    for (line, number) in numbered(text) {
        let at = number as usize - 1;
        match marks.get(&at) {
            Some(Mark::Heading(level, said)) => builder.heading(*level, said, number),
            Some(Mark::Code) => builder.line(line, number),
            None if inside.contains(&at) => {}
            None if line.trim().is_empty() => builder.end(),
            None => builder.line(line, number),
        }
    }
    builder.finish()
}

/// A row of JSON Lines.
#[derive(Deserialize)]
struct Row {
    text: String,
    title: Option<String>,
    path: Option<String>,
    id: Option<Id>,
}

/// A row's id as people write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Text(String),
    Number(i64),
}

fn rows(path: &str, text: &str) -> Result<Vec<Document>, String> {
    let (mut documents, mut named) = (Vec::new(), HashMap::new());
    for (line, number) in numbered(text).filter(|(line, _)| !line.trim().is_empty()) {
        let row: Row = serde_json::from_str(line).map_err(|error| {
            let said = error.to_string();
            format!("line {number}: {}; a row is {{\"text\": ..}}", quote(said.split(" at line ").next().unwrap_or("")))
        })?;
        let name = match (&row.path, &row.id) {
            (Some(path), _) => path.clone(),
            (None, Some(Id::Text(id))) => id.clone(),
            (None, Some(Id::Number(id))) => id.to_string(),
            (None, None) => number.to_string(),
        };
        if let Some(first) = named.insert(name.clone(), number) {
            let name = quote(&name);
            return Err(format!("line {number}: is named {name} as line {first} is: give each row its own path or id"));
        }
        let mut builder = Builder::default();
        let title = row.title.unwrap_or_default();
        builder.heading(0, &title, number);
        for line in row.text.lines() {
            match line.trim().is_empty() {
                true => builder.end(),
                false => builder.line(line, number),
            }
        }
        let hash = sha256([title.as_bytes(), b"\0", row.text.as_bytes()].concat().as_slice());
        documents.push(Document { path: format!("{path}#{name}"), hash, blocks: builder.finish(), line: Some(number) });
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: Kind, text: &str) -> Result<Vec<Document>, String> {
        let source = Source { path: "x".into(), file: "x".into(), kind, bytes: text.len() as u64 };
        documents(&source, text.as_bytes().to_vec())
    }

    /// (heading, text, first line, last line) of each block of a file with one document.
    fn blocks(kind: Kind, text: &str) -> Vec<(String, String, u32, u32)> {
        let blocks = of(kind, text).unwrap().remove(0).blocks;
        let row = |b: Block| {
            assert_eq!(b.text.split('\n').count(), b.lines.len(), "a number a line: {b:?}");
            (b.heading, b.text, b.lines[0], *b.lines.last().unwrap())
        };
        blocks.into_iter().map(row).collect()
    }

    fn row(heading: &str, text: &str, first: u32, last: u32) -> (String, String, u32, u32) {
        (heading.into(), text.into(), first, last)
    }

    #[test]
    fn blank_lines_end_paragraphs_of_text() {
        let expected = [row("", "one\ntwo", 2, 3), row("", "three", 6, 6)];
        assert_eq!(blocks(Kind::Text, "\none\r\ntwo  \n \n\nthree"), expected);
        assert_eq!(blocks(Kind::Text, "\u{feff}one\ntwo"), [row("", "one\ntwo", 1, 2)]);
        assert!(blocks(Kind::Text, " \n\n").is_empty());
    }

    #[test]
    fn markdown_headings_stand_above_what_follows() {
        let text = "intro\n\n# A *b*\npara\n\n## B\n```\n# code\n\nmore\n```\n# C\n\nTwo\nlines\n---\nend\n";
        let expected = [
            row("", "intro", 1, 1),
            row("A b", "para", 4, 4),
            row("A b > B", "```\n# code\n\nmore\n```", 7, 11),
            row("", "C", 12, 12),
            row("", "end", 17, 17),
        ];
        let found = blocks(Kind::Markdown, text);
        assert_eq!(found[..3], expected[..3]);
        assert_eq!(found[3], row("C > Two lines", "end", 17, 17), "a line of dashes makes a heading of level 2");
        assert_eq!(blocks(Kind::Markdown, "# A\n## B\n# C\n"), [row("A", "B", 2, 2), row("", "C", 3, 3)]);
        assert_eq!(blocks(Kind::Markdown, "---\ntitle: x\n---\ntext")[0].0, "", "front matter is no heading");
    }

    #[test]
    fn rows_are_documents() {
        let lines = [r#"{"text":"one","title":"T","id":7}"#, "", r#"{"text":"a\n\nb","path":"p/q"}"#, r#"{"text":""}"#];
        let text = &lines.join("\n");
        let found = of(Kind::Jsonl, text).unwrap();
        let names: Vec<&str> = found.iter().map(|document| document.path.as_str()).collect();
        assert_eq!(names, ["x#7", "x#p/q", "x#4"]);
        assert_eq!(found[0].blocks, [Block { heading: "T".into(), text: "one".into(), lines: vec![1] }]);
        assert_eq!((found[1].blocks.len(), found[1].blocks[1].lines[0]), (2, 3));
        assert!(found[2].blocks.is_empty());

        let error = of(Kind::Jsonl, "{\"text\":\"a\"}\n{\"txt\":1}").unwrap_err();
        assert!(error.starts_with("line 2: missing field `text`"), "{error}");
        let error = of(Kind::Jsonl, "{\"text\":\"a\",\"id\":\"2\"}\n{\"text\":\"a\"}").unwrap_err();
        assert!(error.contains("line 2") && error.contains("line 1"), "{error}");
    }

    #[test]
    fn what_is_no_text_is_told() {
        let source = Source { path: "x".into(), file: "x".into(), kind: Kind::Text, bytes: 0 };
        let reason = |bytes: &[u8]| documents(&source, bytes.to_vec()).unwrap_err();
        assert!(reason(b"a\0b").contains("binary"));
        assert!(reason(b"a\nb\xff").contains("line 2"));
        assert!(reason(b"\xff\xfea\0").contains("UTF-16"));
        assert!(apart(|| -> Result<(), String> { panic!("a parser's") }).unwrap_err().contains("damaged"));
    }
}
