//! The text of a PDF, page by page.

use super::{Block, Builder};

/// The paragraphs of every page, each page under its own heading. Lines are those of the text, counted through.
pub fn blocks(bytes: &[u8]) -> Result<Vec<Block>, String> {
    let pages = pdf_extract::extract_text_from_mem_by_pages(bytes).map_err(|error| {
        let said = crate::error::quote(&error.to_string());
        format!("is no PDF that can be read ({said}): convert it to text, such as with pdftotext")
    })?;
    let (mut builder, mut number) = (Builder::default(), 0);
    for (page, text) in (1..).zip(&pages) {
        if !text.trim().is_empty() {
            builder.heading(1, &format!("page {page}"), number + 1);
        }
        for line in text.lines() {
            number += 1;
            // Characters that a font has no name for come out as NUL.
            let line: String = line.chars().filter(|&c| c != '\0').collect();
            match line.trim().is_empty() {
                true => builder.end(),
                false => builder.line(&line, number),
            }
        }
    }
    Ok(builder.finish())
}
