//! The text of HTML: what a reader sees, paragraph by paragraph, with the lines it stands on.
//!
//! Only the tokenizer of `html5ever` is used, which knows lines; a tree is not needed to tell paragraphs apart.

use std::cell::RefCell;

use html5ever::tendril::StrTendril;
use html5ever::tokenizer::states::RawKind;
use html5ever::tokenizer::{BufferQueue, Tag, TagKind, Token, TokenSink, TokenSinkResult, Tokenizer, TokenizerOpts};

use super::{Block, Builder};

/// Their content is not read.
const HIDDEN: &[&str] = &["script", "style", "template", "svg", "math", "noscript", "iframe", "noembed", "noframes"];
/// They stand within a line of text; every other tag ends a paragraph.
const INLINE: &[&str] = &[
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img",
    "ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong", "sub",
    "sup", "time", "tt", "u", "var", "wbr",
];

/// The paragraphs of a page.
pub fn blocks(text: &str) -> Vec<Block> {
    let queue = BufferQueue::default();
    queue.push_back(StrTendril::from_slice(text));
    let tokenizer = Tokenizer::new(Page::default(), TokenizerOpts::default());
    let _ = tokenizer.feed(&queue);
    tokenizer.end();
    let mut reader = tokenizer.sink.0.into_inner();
    reader.end();
    reader.builder.finish()
}

#[derive(Default)]
struct Page(RefCell<Reader>);

#[derive(Default)]
struct Reader {
    builder: Builder,
    /// The line being put together, whitespace collapsed, and its number.
    line: String,
    number: u32,
    /// The hidden tag that is open, and how many of its name.
    hidden: Option<(String, usize)>,
    /// The heading or title that is open: its level, its text, its line.
    heading: Option<(u8, String, u32)>,
}

impl TokenSink for Page {
    type Handle = ();

    fn process_token(&self, token: Token, line_after: u64) -> TokenSinkResult<()> {
        let mut reader = self.0.borrow_mut();
        match token {
            Token::CharacterTokens(text) => {
                let newlines = text.bytes().filter(|&byte| byte == b'\n').count() as u64;
                reader.text(&text, line_after.saturating_sub(newlines).max(1) as u32);
            }
            Token::TagToken(tag) => return reader.tag(&tag, line_after as u32),
            _ => {}
        }
        TokenSinkResult::Continue
    }
}

impl Reader {
    fn text(&mut self, text: &str, first: u32) {
        if self.hidden.is_some() {
            return;
        }
        if let Some((_, said, _)) = &mut self.heading {
            *said += text;
            return;
        }
        for (piece, number) in text.split('\n').zip(first..) {
            if number != first {
                self.break_line();
            }
            for c in piece.chars() {
                if !c.is_whitespace() {
                    if self.line.is_empty() {
                        self.number = number;
                    }
                    self.line.push(c);
                } else if !self.line.is_empty() && !self.line.ends_with(' ') {
                    self.line.push(' ');
                }
            }
        }
    }

    fn break_line(&mut self) {
        if !self.line.trim().is_empty() {
            self.builder.line(&self.line, self.number);
        }
        self.line.clear();
    }

    fn end(&mut self) {
        self.end_heading();
        self.break_line();
        self.builder.end();
    }

    fn end_heading(&mut self) {
        if let Some((level, said, line)) = self.heading.take() {
            self.builder.heading(level, &said, line);
        }
    }

    fn tag(&mut self, tag: &Tag, line: u32) -> TokenSinkResult<()> {
        let (name, opens) = (&*tag.name, tag.kind == TagKind::StartTag);
        if let Some((hidden, depth)) = &mut self.hidden {
            if hidden == name {
                *depth = if opens && !tag.self_closing { *depth + 1 } else { *depth - usize::from(!opens) };
                if *depth == 0 {
                    self.hidden = None;
                }
            }
            return TokenSinkResult::Continue;
        }
        if HIDDEN.contains(&name) {
            if opens && !tag.self_closing {
                self.hidden = Some((name.to_string(), 1));
            }
            return match name {
                _ if !opens => TokenSinkResult::Continue,
                "script" => TokenSinkResult::RawData(RawKind::ScriptData),
                "style" | "iframe" | "noembed" | "noframes" => TokenSinkResult::RawData(RawKind::Rawtext),
                _ => TokenSinkResult::Continue,
            };
        }
        let level = match name.as_bytes() {
            [b'h', digit @ b'1'..=b'6'] => Some(digit - b'0'),
            b"title" => Some(0),
            _ => None,
        };
        if let Some(level) = level {
            self.end();
            if opens {
                self.heading = Some((level, String::new(), line));
                if level == 0 {
                    return TokenSinkResult::RawData(RawKind::Rcdata);
                }
            }
        } else if name == "br" {
            match &mut self.heading {
                Some((_, said, _)) => said.push(' '),
                None => {
                    self.break_line();
                    self.number = line;
                }
            }
        } else if name == "td" || name == "th" {
            self.text(" ", line);
        } else if name == "textarea" && opens {
            self.end();
            return TokenSinkResult::RawData(RawKind::Rcdata);
        } else if !INLINE.contains(&name) {
            // A heading that was never closed ends where another block begins.
            self.end();
        }
        TokenSinkResult::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_a_reader_sees() {
        let page = "<!doctype html>\n<head><title>The &amp; title</title>\n<style>p { x }</style></head>\n<body>\n\
                    <h1>First\n part</h1><p>Some <b>bold</b>\n   text &lt;tag&gt;.<p>Next<br>line\n\
                    <script>if (a < b) { \"</p>\" }</script>\n<ul><li>one<li>two</ul>\n\
                    <table><tr><td>a<td>b</tr></table>\n\
                    <template><p>no</p></template><h2>Second</h2>tail";
        let found = blocks(page);
        let row = |b: &Block| (b.heading.clone(), b.text.clone(), b.lines[0], *b.lines.last().unwrap());
        let expected = [
            ("The & title > First part", "Some bold\ntext <tag>.", 6, 7),
            ("The & title > First part", "Next\nline", 7, 7),
            ("The & title > First part", "one", 9, 9),
            ("The & title > First part", "two", 9, 9),
            ("The & title > First part", "a b", 10, 10),
            ("The & title > First part > Second", "tail", 11, 11),
        ];
        let expected: Vec<_> = expected.map(|(h, t, a, b)| (h.to_string(), t.to_string(), a, b)).into();
        assert_eq!(found.iter().map(row).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn broken_pages_are_read_as_far_as_they_go() {
        for page in ["<", "<p", "</", "<h1>never closed", "<script>", "<svg><svg></svg>", "&#0;&#x110000;&bogus;", "\0"]
        {
            for block in blocks(page) {
                assert_eq!(block.text.split('\n').count(), block.lines.len(), "{page}");
            }
        }
        assert_eq!(blocks("<h1>only</h1>")[0].text, "only");
        assert_eq!(blocks("</script>text")[0].text, "text");
    }
}
