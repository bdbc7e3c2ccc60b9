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
