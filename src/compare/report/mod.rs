//! What is written beside the state: `compare.json`, and `report.html`, a page that needs nothing but itself.

mod examples;
mod html;
mod svg;

use std::path::Path;

use super::outcome::Outcome;
use crate::aside;
use crate::error::Error;

pub use html::page;

/// Writes both files.
pub fn write(out: &Path, outcome: &Outcome) -> Result<(), Error> {
    aside::write(&out.join("compare.json"), format!("{:#}\n", outcome.json()).as_bytes())?;
    aside::write(&out.join("report.html"), page(outcome).as_bytes())
}

/// Text of any origin, made fit to stand in HTML, between tags and in attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // Characters that no page shows, and those that turn the direction of what follows.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_text() {
        assert_eq!(
            escape("<b onload=\"x\">a & 'b'</b>"),
            "&lt;b onload=&quot;x&quot;&gt;a &amp; &#39;b&#39;&lt;/b&gt;"
        );
        assert_eq!(escape("a\u{202e}b\u{0}"), "a\u{fffd}b\u{fffd}");
        assert_eq!(escape("é\n"), "é\n");
    }
}
