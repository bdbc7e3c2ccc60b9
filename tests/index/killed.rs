//! Processes that are killed at any moment.

use std::fs;
use std::time::Duration;

use handmill::retrieve::index::Index;

use super::*;

/// Runs the tool and kills it after so many milliseconds; whether it came to its end before.
fn killed(args: &[&str], after: u64) -> bool {
    let mut child = start(args);
    std::thread::sleep(Duration::from_millis(after));
    let ended = child.try_wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    match ended {
        Some(status) => {
            assert!(status.success(), "{args:?}: {status}");
            true
        }
        None => false,
    }
}

/// What is there is whole: every document as the finished index has it.
fn whole(idx: &Path, finished: &BTreeMap<String, Vec<Row>>) -> usize {
    let index = match Index::open_any(idx) {
        Ok(index) => index,
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains("never begun") || error.contains("is no index"), "{error}");
            return 0;
        }
    };
    index.verify().unwrap();
    drop(index);
    let found = by_document(idx);
    for (path, rows) in &found {
        assert_eq!(Some(rows), finished.get(path), "{path}");
    }
    found.len()
}

fn by_document(idx: &Path) -> BTreeMap<String, Vec<Row>> {
    let mut documents: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    for (row, _) in export(idx) {
        documents.entry(row.0.clone()).or_default().push(row);
    }
    documents
}

fn many(docs: &Path, count: usize, word: &str) {
    fs::create_dir_all(docs).unwrap();
    for i in 0..count {
        let topics = [TOPICS[i % 6], TOPICS[i * 7 % 6 / 2], TOPICS[i / 6 % 6]];
        let text = format!("# {word} {i}\n\n{}\n\n{}\n\n{} {i}\n", topics[0], topics[1], topics[2]);
        fs::write(docs.join(format!("{i:03}.md")), text).unwrap();
    }
}

#[test]
fn an_index_survives_being_killed_and_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let (docs, idx, unbroken) = (folder.path().join("d"), folder.path().join("idx"), folder.path().join("unbroken"));
    many(&docs, 240, "first");
    build(&unbroken, &docs);
    let finished = by_document(&unbroken);
    let model = tiny_dir().join("tiny");
    let (model, d, i) = (str(&model), str(&docs), str(&idx));
    let build_args =
        ["index", "build", "--model", model, "--docs", d, "--out", i, "--save-every", "24", "--device", "cpu"];

    // Delays from before the index is begun to past its end; each kill that strikes leaves a little more.
    let (mut strikes, mut partial, mut after) = (0, 0, 20);
    while !killed(&build_args, after) {
        strikes += 1;
        let there = whole(&idx, &finished);
        partial += usize::from(there > 0 && there < finished.len());
        after = if strikes % 4 == 0 { after + 60 } else { after + 15 };
        assert!(strikes < 300, "it comes to its end some time");
    }
    assert!(strikes > 0 && partial > 0, "{strikes} strikes, {partial} while it was partly there");
    same(&idx, &unbroken);

    // The same for other documents added, then for compaction.
    many(&folder.path().join("e"), 120, "second");
    let e = folder.path().join("e");
    handmill::retrieve::index::add(&unbroken, std::slice::from_ref(&e), tiny(), &Options::default(), &mut |_| true)
        .unwrap();
    let finished = by_document(&unbroken);
    let add = ["index", "add", i, "--model", model, "--docs", str(&e), "--save-every", "24", "--device", "cpu"];
    let mut after = 60;
    while !killed(&add, after) {
        assert!(whole(&idx, &finished) >= 240, "what was there stays");
        after += 40;
    }
    same(&idx, &unbroken);
    let mut after = 4;
    while !killed(&["index", "compact", i], after) {
        assert_eq!(whole(&idx, &finished), 360);
        after += 8;
    }
    same(&idx, &unbroken);
    let names = tree(&idx.join("segments"));
    assert_eq!(names.len(), 1, "nothing is left over: {:?}", names.keys());
}

#[test]
fn what_no_state_speaks_of_is_swept_away() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    for name in ["00000099.vectors", ".00000100.vectors.7-0.partial"] {
        fs::write(idx.join("segments").join(name), "half").unwrap();
    }
    Index::open(&idx, tiny()).unwrap().verify().unwrap();
    assert_eq!(tree(&idx.join("segments")).len(), 3, "a reader changes nothing");
    build(&idx, &docs);
    assert_eq!(tree(&idx.join("segments")).len(), 1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let (docs, idx, unbroken) = (folder.path().join("d"), folder.path().join("idx"), folder.path().join("unbroken"));
    many(&docs, 480, "first");
    let model = tiny_dir().join("tiny");
    let args = [
        "index",
        "build",
        "--model",
        str(&model),
        "--docs",
        str(&docs),
        "--out",
        str(&idx),
        "--save-every",
        "8",
        "--device",
        "cpu",
    ];
    let mut child = start(&args);
    while Index::open_any(&idx).and_then(|index| index.info()).map_or(0, |info| info.documents) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before anything was there");
        std::thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let there = Index::open_any(&idx).unwrap().info().unwrap().documents;
    assert!(there > 0 && there < 480, "{there}");
    let report = json(&[&args[..], &["--json"]].concat());
    assert_eq!((&report["status"], &report["unchanged"]), (&"done".into(), &there.into()));
    build(&unbroken, &docs);
    same(&idx, &unbroken);
}
