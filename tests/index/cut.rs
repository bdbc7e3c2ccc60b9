//! How documents are cut.

use handmill::retrieve::chunk::{chunks, Chunk, Chunking};
use handmill::retrieve::document::{documents, Kind};
use handmill::retrieve::files::Source;

use super::*;

fn cut(text: &str, max_tokens: usize, join: usize, overlap: usize) -> Vec<Chunk> {
    let source = Source { path: "x.md".into(), file: "x.md".into(), kind: Kind::Markdown, bytes: text.len() as u64 };
    let document = documents(&source, text.as_bytes().to_vec()).unwrap().remove(0);
    let chunking = Chunking { max_tokens, join, overlap };
    chunking.check().unwrap();
    chunks(&document, &tiny().tokenizer, &chunking).unwrap()
}

fn texts(chunks: &[Chunk]) -> Vec<(&str, (u32, u32))> {
    chunks.iter().map(|chunk| (chunk.text.as_str(), chunk.lines)).collect()
}

#[test]
fn paragraphs_stay_whole_and_join_while_they_are_short() {
    // Of the tiny model, each of these words is a token and each full stop another.
    let text = "# River\n\nwater flows.\n\nfish and\nboats.\n\nmountain snow covers the peak.\n\n# Market\n\nbread.\n";
    let found = cut(text, 32, 8, 0);
    let expected = [
        ("water flows.\n\nfish and\nboats.", (3, 6)),
        ("mountain snow covers the peak.", (8, 8)),
        ("bread.", (12, 12)),
    ];
    assert_eq!(texts(&found), expected);
    assert_eq!(found[2].embedded(), "Market\nbread.");
    assert_eq!(texts(&cut(text, 32, 0, 0)).len(), 4, "joined to nothing");
    assert_eq!(texts(&cut(text, 64, 64, 0)).len(), 2, "never over a heading");
}

#[test]
fn a_long_paragraph_is_cut_at_sentences_which_overlap() {
    let sentence = |i: usize| format!("River water {i} flows to the\nsea.");
    let text: Vec<String> = (0..30).map(sentence).collect();
    let text = format!("first\n\n{}", text.join(" "));
    let found = cut(&text, 40, 16, 10);
    assert_eq!(found[0].text, "first");
    let count = |text: &str| tiny().tokenizer.encode(text).unwrap().len();
    for (a, b) in found[1..].iter().zip(&found[2..]) {
        assert!(a.text.ends_with("sea.") && b.text.starts_with("River"), "{a:?} {b:?}");
        assert!(count(&a.text) <= 38 && count(&a.text) > 19, "{a:?}");
        let shared = (0..b.text.len()).filter(|&at| b.text.is_char_boundary(at)).rev();
        let shared = shared.map(|at| &b.text[..at]).find(|start| a.text.ends_with(start)).unwrap();
        assert!((1..=10).contains(&count(shared)), "{shared:?}");
        assert!(b.lines.0 <= a.lines.1 && b.lines.1 > a.lines.1);
    }
    for i in 0..30 {
        assert!(found.iter().any(|chunk| chunk.text.contains(&sentence(i))), "sentence {i} is whole somewhere");
    }
    assert_eq!(found.last().unwrap().lines.1 as usize, text.lines().count());
    let apart = cut(&text, 40, 16, 0);
    assert_eq!(apart[1..].iter().map(|chunk| chunk.text.len() + 1).sum::<usize>(), text.len() - 7 + 1);
}

#[test]
fn what_has_no_sentences_is_cut_all_the_same() {
    let words = "water ".repeat(500);
    let found = cut(&words, 40, 32, 8);
    assert!(found.len() > 13 && found.iter().all(|chunk| chunk.text.split(' ').all(|word| word == "water")));
    let letters = "x".repeat(100_000);
    let found = cut(&letters, 40, 32, 8);
    assert_eq!(found.iter().map(|chunk| chunk.text.len()).sum::<usize>(), letters.len());
    assert!(found.iter().all(|chunk| chunk.text.len() <= 38 * 16 && chunk.lines == (1, 1)));
    let heading = format!("# {}\n\nbread.\n", "market ".repeat(100));
    let found = cut(&heading, 40, 32, 8);
    assert!(found.len() == 1 && found[0].heading.starts_with("market market") && found[0].heading.len() < 100);
}
