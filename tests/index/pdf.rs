//! PDFs as other programs write them, and as nobody should.

use std::fs;

use handmill::retrieve::document::{documents, Block, Kind};
use handmill::retrieve::files::Source;
use handmill::retrieve::index::Index;
use rand::{Rng, SeedableRng};

use super::*;

fn read(bytes: Vec<u8>) -> Result<Vec<Block>, String> {
    let source = Source { path: "x.pdf".into(), file: "x.pdf".into(), kind: Kind::Pdf, bytes: bytes.len() as u64 };
    documents(&source, bytes).map(|mut documents| documents.remove(0).blocks)
}

/// A PDF of these objects, numbered from 1, its cross-references right.
fn file(objects: &[Vec<u8>]) -> Vec<u8> {
    let (mut out, mut offsets) = (b"%PDF-1.4\n".to_vec(), Vec::new());
    for (number, object) in (1..).zip(objects) {
        offsets.push(out.len());
        out.extend([format!("{number} 0 obj\n").as_bytes(), object, b"\nendobj\n"].concat());
    }
    let start = out.len();
    out.extend(format!("xref\n0 {}\n0000000000 65535 f \n", objects.len() + 1).bytes());
    offsets.iter().for_each(|offset| out.extend(format!("{offset:010} 00000 n \n").bytes()));
    let size = objects.len() + 1;
    out.extend(format!("trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n").bytes());
    out
}

fn stream(dictionary: &str, content: &[u8]) -> Vec<u8> {
    let head = format!("<< {dictionary} /Length {} >>\nstream\n", content.len());
    [head.as_bytes(), content, b"\nendstream"].concat()
}

/// Catalog, pages, a font and one page, whose content is object 5.
fn page(fonts: &str, resources: &str, content: Vec<u8>, more: &[Vec<u8>]) -> Vec<u8> {
    let page = format!(
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 5 0 R \
         /Resources << /Font << /F1 3 0 R {fonts} >> {resources} >> >>"
    );
    let first = ["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [4 0 R] /Count 1 >>", FONT, &page];
    let mut objects: Vec<Vec<u8>> = first.iter().map(|object| object.as_bytes().to_vec()).collect();
    objects.push(content);
    objects.extend_from_slice(more);
    file(&objects)
}

const FONT: &str = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>";

/// A PDF of one page for each text.
fn pages(texts: &[&str]) -> Vec<u8> {
    let kids: Vec<String> = (0..texts.len()).map(|page| format!("{} 0 R", 4 + 2 * page)).collect();
    let tree = format!("<< /Type /Pages /Kids [{}] /Count {} >>", kids.join(" "), texts.len());
    let mut objects = vec![b"<< /Type /Catalog /Pages 2 0 R >>".to_vec(), tree.into_bytes(), FONT.into()];
    for (page, text) in texts.iter().enumerate() {
        let resources = "<< /Font << /F1 3 0 R >> >>";
        let contents = 5 + 2 * page;
        objects.push(
            format!("<< /Type /Page /Parent 2 0 R /Resources {resources} /Contents {contents} 0 R >>").into_bytes(),
        );
        objects.push(stream("", format!("BT /F1 12 Tf 72 720 Td ({text}) Tj ET").as_bytes()));
    }
    file(&objects)
}

#[test]
fn a_pdf_is_read_page_by_page() {
    let (_folder, docs, idx) = place();
    fs::write(docs.join("two.pdf"), pages(&["steam engine pistons", "violins play music"])).unwrap();
    assert_eq!(build(&idx, &docs).added, 7);
    let index = Index::open(&idx, tiny()).unwrap();
    let found = index.search(&*device(), tiny(), &["page 2\nviolins play music"], 1, None).unwrap().remove(0).remove(0);
    assert!(found.path.ends_with("two.pdf") && found.score > 0.999, "{found:?}");
    assert_eq!((found.heading.as_str(), found.text.as_str()), ("page 2", "violins play music"));
}

#[test]
fn places_make_blanks_lines_and_paragraphs() {
    // Letters of this font count as 6 wide: half of its size.
    let text = |drawing: &str| -> Vec<String> {
        let content = stream("", format!("BT /F1 12 Tf 14 TL 72 720 Td {drawing} ET").as_bytes());
        read(page("", "", content, &[])).unwrap().into_iter().map(|block| block.text).collect()
    };
    assert_eq!(text("(one) Tj 22 0 Td (two) Tj 18 0 Td (three) Tj"), ["one twothree"]);
    assert_eq!(text("[(k) 80 (er) -20 (n) -300 (gap)] TJ"), ["kern gap"]);
    assert_eq!(text("(one) Tj T* (two) Tj (three) ' 0 -14 Td (four) Tj"), ["one\ntwo\nthree\nfour"]);
    assert_eq!(text("(one) Tj 0 -30 Td (two) Tj"), ["one", "two"]);
    assert_eq!(text("(one) Tj ET q 1 0 0 1 0 -14 cm BT /F1 12 Tf 72 720 Td (two) Tj ET Q BT"), ["one\ntwo"]);
    assert_eq!(text("(caf\\351 \\226 a\\(b\\)) Tj"), ["café – a(b)"]);
    assert_eq!(text("/F9 12 Tf (no such font) Tj /F1 12 Tf (yes) Tj"), ["yes"]);
    // Two bytes a code, their meaning in a table, their widths in another.
    let fonts = [
        "<< /Type /Font /Subtype /Type0 /BaseFont /X /Encoding /Identity-H /DescendantFonts [7 0 R] \
         /ToUnicode 8 0 R >>",
        "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /X /DW 1000 /W [1 [400 600] 3 4 500] >>",
    ];
    let table = "/CIDInit /ProcSet findresource begin\n12 dict begin\nbegincmap\n/CIDSystemInfo << /Registry (Adobe) \
         /Ordering (UCS) /Supplement 0 >> def\n/CMapName /Adobe-Identity-UCS def\n/CMapType 2 def\n\
         1 begincodespacerange\n<0000> <ffff>\nendcodespacerange\n1 beginbfrange\n<0001> <0004> <0061>\n\
         endbfrange\nendcmap\nCMapName currentdict /CMap defineresource pop\nend\nend";
    let content = stream("", b"BT /G 10 Tf <00010002> Tj 10 0 Td <0003> Tj 8 0 Td <0004> Tj ET");
    let more = [fonts[0].into(), fonts[1].into(), stream("", table.as_bytes())];
    let found = read(page("/G 6 0 R", "", content, &more)).unwrap();
    assert_eq!(found.iter().map(|block| block.text.as_str()).collect::<Vec<_>>(), ["abc d"]);
}

/// Deflate's fixed code: a byte, then runs of 258 like it.
fn bomb(bytes: usize) -> Vec<u8> {
    let (mut out, mut held, mut count) = (vec![0x78, 0x9c], 0u32, 0);
    let mut put = |bits: &str| {
        for bit in bits.bytes() {
            held |= u32::from(bit - b'0') << count;
            count += 1;
            if count == 8 {
                out.push(held as u8);
                (held, count) = (0, 0);
            }
        }
    };
    put("110"); // the last block, fixed codes
    put("01010000"); // a blank
    (0..bytes / 258).for_each(|_| put("1100010100000"));
    put("0000000");
    put("0000000");
    out
}

#[test]
fn a_pdf_that_would_never_end_is_a_reason() {
    let draws_itself =
        stream("/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /A 6 0 R >> >>", b"/A Do");
    let content = stream("", b"BT /F1 12 Tf 72 720 Td (hello) Tj ET /A Do");
    let found = read(page("", "/XObject << /A 6 0 R >>", content, &[draws_itself])).unwrap();
    assert_eq!(found[0].text, "hello");

    let own_parent = [
        &b"<< /Type /Catalog /Pages 2 0 R >>"[..],
        b"<< /Type /Pages /Kids [3 0 R 2 0 R] /Parent 2 0 R >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R >>",
        &stream("", b"BT (x) Tj"),
    ];
    let _ = read(file(&own_parent.map(<[u8]>::to_vec)));
    let each_other = [b"2 0 R".to_vec(), b"1 0 R".to_vec()];
    assert!(read(file(&each_other)).is_err());
    let deep =
        [b"<< /Type /Catalog /X ".to_vec(), b"[".repeat(1 << 20), b"]".repeat(1 << 20), b" >>".to_vec()].concat();
    assert!(read(file(&[deep])).is_err());
    let nested = stream("", &[b"[".repeat(1 << 20), b"] TJ".to_vec()].concat());
    let _ = read(page("", "", nested, &[]));

    let content = stream("/Filter /FlateDecode", &bomb(64 << 20));
    assert!(content.len() < 1 << 20);
    let reason = read(page("", "", content, &[])).unwrap_err();
    assert!(reason.starts_with("page 1 ") && reason.contains("8 MB") && reason.contains("pdftotext"), "{reason}");
    let font = "/F2 << /Type /Font /Subtype /Type1 /ToUnicode 6 0 R >>";
    let content = stream("", b"BT /F2 12 Tf (x) Tj ET");
    let reason = read(page(font, "", content, &[stream("/Filter /FlateDecode", &bomb(64 << 20))])).unwrap_err();
    assert!(reason.contains("8 MB"), "{reason}");
}

#[test]
fn a_damaged_pdf_is_a_reason_or_a_text_and_never_more() {
    let whole = pages(&["some text of a page", "another page"]);
    assert_eq!(read(whole.clone()).unwrap().len(), 2);
    let (mut refused, mut rng) = (0, rand_chacha::ChaCha8Rng::seed_from_u64(7));
    for cut in (0..whole.len()).step_by(13) {
        refused += usize::from(read(whole[..cut].to_vec()).is_err());
    }
    for _ in 0..300 {
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.next_u32() % 4 {
            let at = rng.next_u32() as usize % bytes.len();
            bytes[at] = rng.next_u32() as u8;
        }
        if let Err(reason) = read(bytes) {
            assert!(!reason.is_empty() && reason.len() < 400 && !reason.contains('\n'), "{reason}");
            refused += 1;
        }
    }
    assert!(refused > 20, "{refused}");
}
