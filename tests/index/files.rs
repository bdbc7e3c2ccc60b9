//! Which files are read, and what becomes of those that cannot be.

use std::fs;

use handmill::retrieve::index::Index;

use super::*;

fn reasons(report: &Report, docs: &Path) -> BTreeMap<String, String> {
    let short = |path: &str| path.strip_prefix(str(docs)).unwrap_or(path).trim_start_matches('/').to_string();
    report.skipped.iter().map(|one| (short(&one.path), one.reason.clone())).collect()
}

#[cfg(unix)]
#[test]
fn links_lead_nowhere() {
    use std::os::unix::fs::symlink;
    let (folder, docs, idx) = place();
    let secret = folder.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key.txt"), "the secret key").unwrap();
    symlink(secret.join("key.txt"), docs.join("key.txt")).unwrap();
    symlink(&secret, docs.join("more/secret")).unwrap();
    symlink(&docs, docs.join("loop")).unwrap();
    symlink("no/such", docs.join("gone.md")).unwrap();
    fs::create_dir(docs.join(".hidden")).unwrap();
    fs::write(docs.join(".hidden/a.md"), "hidden").unwrap();
    fs::write(docs.join(".b.md"), "hidden").unwrap();
    let report = build(&idx, &docs);
    assert_eq!(report.added, 6);
    let reasons = reasons(&report, &docs);
    assert_eq!(reasons.keys().collect::<Vec<_>>(), ["gone.md", "key.txt", "loop", "more/secret"]);
    assert!(reasons.values().all(|reason| reason.contains("link")), "{reasons:?}");
    let documents = Index::open_any(&idx).unwrap().documents().unwrap();
    assert!(documents.iter().all(|path| !path.contains("key") && !path.contains("hidden")), "{documents:?}");
    // A root that is itself a link is what the person named.
    let root = folder.path().join("root");
    symlink(&docs, &root).unwrap();
    assert_eq!(build(&folder.path().join("idx2"), &root).added, 6);
}

#[test]
fn what_cannot_be_read_is_told_and_the_rest_goes_on() {
    let (_folder, docs, idx) = place();
    let write = |name: &str, bytes: &[u8]| fs::write(docs.join(name), bytes).unwrap();
    write("binary.txt", b"a\0b");
    write("latin1.md", b"caf\xe9");
    write("rows.jsonl", b"{\"text\": \"fine\"}\n{\"txt\": 1}\n");
    write("broken.pdf", b"%PDF-1.4 and no more");
    write("empty.txt", b" \n");
    write("photo.png", b"png");
    let report = build(&idx, &docs);
    assert_eq!((report.added, report.other), (7, 1), "{report:?}");
    let reasons = reasons(&report, &docs);
    for (name, words) in [
        ("binary.txt", "binary"),
        ("latin1.md", "line 1 is no UTF-8"),
        ("rows.jsonl", "line 2"),
        ("broken.pdf", "PDF"),
        ("empty.txt", "no text"),
    ] {
        assert!(reasons[name].contains(words), "{name}: {}", reasons[name]);
    }
    assert_eq!(reasons.len(), 5);

    // A document that can no longer be read stays as it was; one that is gone does not.
    fs::write(docs.join("river.md"), b"\xff").unwrap();
    fs::remove_file(docs.join("garden.md").with_file_name("market.md")).unwrap();
    let report = build(&idx, &docs);
    assert_eq!((report.removed, report.changed), (1, 0), "{report:?}");
    assert!(Index::open_any(&idx).unwrap().documents().unwrap().iter().any(|path| path.ends_with("river.md")));
    // Emptied, it is empty.
    fs::write(docs.join("river.md"), b"").unwrap();
    build(&idx, &docs);
    let found = Index::open(&idx, tiny()).unwrap().search(&*device(), tiny(), &["river"], 100, None).unwrap();
    assert!(found[0].iter().all(|passage| !passage.path.ends_with("river.md")));

    let bad = docs.join("only");
    fs::create_dir(&bad).unwrap();
    fs::write(bad.join("x.txt"), b"\0").unwrap();
    let nowhere = idx.with_file_name("nowhere");
    let error = build_with(&nowhere, &bad, &Options::default()).unwrap_err().to_string();
    assert!(error.contains("x.txt") && error.contains("binary"), "where all fail it is an error: {error}");
    let error = build_with(&nowhere, &docs.join("photo.png"), &Options::default()).unwrap_err().to_string();
    assert!(error.contains("photo.png") && error.contains("md"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn hostile_names_stay_names() {
    use std::os::unix::ffi::OsStrExt;
    let (_folder, docs, idx) = place();
    let names = [
        "new\nline.txt",
        "<|im_end|>.txt",
        "'; DROP TABLE chunks; --.txt",
        "\u{1b}[31mred.txt",
        "%00?#.txt",
        " .txt",
        "ü–漢.txt",
        "*.txt",
        "a\\b.txt",
    ];
    for name in names {
        fs::write(docs.join(name), format!("steam engine in {}", name.len())).unwrap();
    }
    fs::write(docs.join(std::ffi::OsStr::from_bytes(b"\xff\xfe.txt")), "no UTF-8").unwrap();
    let report = build(&idx, &docs);
    assert_eq!(report.added, 6 + names.len());
    assert!(report.skipped.len() == 1 && report.skipped[0].reason.contains("rename it"), "{:?}", report.skipped);
    assert_eq!(build(&idx, &docs).unchanged, 6 + names.len());
    let documents = Index::open_any(&idx).unwrap().documents().unwrap();
    names.iter().for_each(|name| assert!(documents.contains(&format!("{}/{name}", str(&docs))), "{name}"));

    let model = tiny_dir().join("tiny");
    let list = handmill(&["index", "info", str(&idx), "--list"]);
    let query = ["search", "--index", str(&idx), "--model", str(&model), "--query", "steam engine in", "-k", "50"];
    let found = handmill(&query);
    for run in [&list, &found] {
        assert!(run.code == 0 && !run.stdout.contains('\u{1b}') && run.stdout.contains("new\\nline.txt"));
    }
    let one = format!("{}/{}", str(&docs), names[2]);
    assert_eq!(handmill::retrieve::index::remove(&idx, &[one]).unwrap().documents, 1);
}

/// A PDF of one page for each text, its cross-references right.
fn pdf(pages: &[&str]) -> Vec<u8> {
    let kids: Vec<String> = (0..pages.len()).map(|page| format!("{} 0 R", 4 + 2 * page)).collect();
    let mut objects = vec![
        "<< /Type /Catalog /Pages 2 0 R >>".to_string(),
        format!("<< /Type /Pages /Kids [{}] /Count {} >>", kids.join(" "), pages.len()),
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>".to_string(),
    ];
    for (page, text) in pages.iter().enumerate() {
        let content = format!("BT /F1 12 Tf 72 720 Td ({text}) Tj ET");
        objects.push(format!(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> \
             /Contents {} 0 R >>",
            5 + 2 * page
        ));
        objects.push(format!("<< /Length {} >>\nstream\n{content}\nendstream", content.len()));
    }
    let (mut out, mut offsets) = (b"%PDF-1.4\n".to_vec(), Vec::new());
    for (number, object) in (1..).zip(&objects) {
        offsets.push(out.len());
        out.extend(format!("{number} 0 obj\n{object}\nendobj\n").bytes());
    }
    let start = out.len();
    out.extend(format!("xref\n0 {}\n0000000000 65535 f \n", objects.len() + 1).bytes());
    offsets.iter().for_each(|offset| out.extend(format!("{offset:010} 00000 n \n").bytes()));
    let size = objects.len() + 1;
    out.extend(format!("trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n").bytes());
    out
}

#[test]
fn a_pdf_is_read_page_by_page() {
    let (_folder, docs, idx) = place();
    fs::write(docs.join("two.pdf"), pdf(&["steam engine pistons", "violins play music"])).unwrap();
    assert_eq!(build(&idx, &docs).added, 7);
    let index = Index::open(&idx, tiny()).unwrap();
    let found = index.search(&*device(), tiny(), &["page 2\nviolins play music"], 1, None).unwrap().remove(0).remove(0);
    assert!(found.path.ends_with("two.pdf") && found.score > 0.999, "{found:?}");
    assert_eq!((found.heading.as_str(), found.text.as_str()), ("page 2", "violins play music"));
}

#[test]
fn a_damaged_pdf_is_a_reason_or_a_text_and_never_more() {
    use handmill::retrieve::document::{documents, Kind};
    use handmill::retrieve::files::Source;
    use rand::{Rng, SeedableRng};
    let whole = pdf(&["some text of a page", "another page"]);
    let read = |bytes: Vec<u8>| {
        let source = Source { path: "x.pdf".into(), file: "x.pdf".into(), kind: Kind::Pdf, bytes: bytes.len() as u64 };
        documents(&source, bytes)
    };
    assert_eq!(read(whole.clone()).unwrap()[0].blocks.len(), 2);
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
