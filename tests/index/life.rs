//! From the first build to compaction.

use std::fs;
use std::path::{Path, PathBuf};

use handmill::retrieve::chunk::Chunking;
use handmill::retrieve::index::{self, Index, Options, PathFilter};

use super::*;

#[test]
fn only_what_changed_is_embedded() {
    let (_folder, docs, idx) = place();
    let report = build(&idx, &docs);
    let passages = Index::open(&idx, tiny()).unwrap().info().unwrap().chunks;
    assert_eq!(counts(&report), (6, 0, 0, 0, passages));
    assert!(passages >= 6);

    let before = tree(&idx.join("segments"));
    assert_eq!(counts(&build(&idx, &docs)), (0, 0, 6, 0, 0));
    assert_eq!(tree(&idx.join("segments")), before, "nothing is written twice");

    fs::write(docs.join("river.md"), "# river\n\nviolins").unwrap();
    assert_eq!(counts(&build(&idx, &docs)), (0, 1, 5, 0, 1));
    let index = Index::open(&idx, tiny()).unwrap();
    assert_eq!(best(&index, "orchestra drums play music for dancers"), format!("{}/orchestra.md", str(&docs)));
    let found = index.search(&*device(), tiny(), &["river\nviolins"], 1, None).unwrap();
    assert_eq!((found[0][0].path.as_str(), found[0][0].lines), (&*format!("{}/river.md", str(&docs)), (3, 3)));
    assert!(found[0][0].score > 0.999, "the text itself: {}", found[0][0].score);

    fs::remove_file(docs.join("river.md")).unwrap();
    fs::rename(docs.join("market.md"), docs.join("bazaar.md")).unwrap();
    let report = build(&idx, &docs);
    assert_eq!((report.added, report.removed, report.unchanged), (1, 2, 4));
    let index = Index::open(&idx, tiny()).unwrap();
    let info = index.info().unwrap();
    assert_eq!(info.documents, 5);
    assert!(info.dead_rows > 0 && index.verify().is_ok());

    let fresh = idx.with_file_name("fresh");
    build(&fresh, &docs);
    same(&idx, &fresh);
    let done = index::compact(&idx).unwrap();
    assert_eq!(done.dead_rows, info.dead_rows);
    same(&idx, &fresh);
    let index = Index::open(&idx, tiny()).unwrap();
    assert_eq!((index.info().unwrap().dead_rows, index.info().unwrap().segments), (0, 1));
    index.verify().unwrap();
    assert_eq!(counts(&build(&idx, &docs)), (0, 0, 5, 0, 0), "compaction forgets nothing");
}

#[test]
fn adding_keeps_the_rest_and_removing_takes_it_away() {
    let (folder, docs, idx) = place();
    build(&idx, &docs);
    let more = folder.path().join("rows.jsonl");
    let row = |id: &str, text: &str| format!("{{\"id\": \"{id}\", \"title\": \"T\", \"text\": \"{text}\"}}\n");
    fs::write(&more, row("a", "steam engine") + &row("b", "summer garden")).unwrap();
    let add = || index::add(&idx, std::slice::from_ref(&more), tiny(), &Options::default(), &mut |_| true).unwrap();
    assert_eq!(counts(&add()), (2, 0, 0, 0, 2));
    assert_eq!(counts(&add()), (0, 0, 2, 0, 0));
    // A line above moves both rows; one is changed, one is new, none else is embedded.
    fs::write(&more, row("c", "snow") + &row("a", "steam engine") + &row("b", "winter garden")).unwrap();
    assert_eq!(counts(&add()), (1, 1, 1, 0, 2));
    let index = Index::open(&idx, tiny()).unwrap();
    let only = PathFilter::new(str(&more)).unwrap();
    let found = index.search(&*device(), tiny(), &["T\nsteam engine"], 9, Some(&only)).unwrap().remove(0);
    assert_eq!(found.len(), 3);
    assert_eq!((found[0].path.clone(), found[0].lines), (format!("{}#a", str(&more)), (2, 2)));
    assert_eq!(found[0].heading, "T");
    // A row that is gone is gone.
    fs::write(&more, row("a", "steam engine")).unwrap();
    assert_eq!(counts(&add()), (0, 0, 1, 2, 0));

    let remove = |patterns: &[&str]| {
        index::remove(&idx, &patterns.iter().map(|pattern| pattern.to_string()).collect::<Vec<_>>())
    };
    let error = remove(&[str(&more), "no/such"]).unwrap_err().to_string();
    assert!(error.contains("no/such") && error.contains("info --list"), "{error}");
    assert_eq!(remove(&[str(&more)]).unwrap().documents, 1, "an error removes nothing");
    assert_eq!(remove(&[str(&docs.join("more"))]).unwrap().documents, 3);
    assert_eq!(remove(&["**/*.md"]).unwrap().documents, 3);
    let empty = Index::open(&idx, tiny()).unwrap();
    assert_eq!((empty.info().unwrap().documents, empty.info().unwrap().chunks), (0, 0));
    assert!(empty.search(&*device(), tiny(), &["river"], 3, None).unwrap()[0].is_empty());
    index::compact(&idx).unwrap();
    assert_eq!(Index::open_any(&idx).unwrap().info().unwrap().segments, 0);
    assert_eq!(build(&idx, &docs).added, 6, "what was removed comes back when it is given again");
}

#[test]
fn a_search_is_that_of_every_passage_one_by_one() {
    let (_folder, docs, idx) = place();
    let options = Options { save_every: Some(4), ..Options::default() };
    build_with(&idx, &docs, &options).unwrap();
    let index = Index::open(&idx, tiny()).unwrap();
    assert!(index.info().unwrap().segments > 1);
    let questions = ["bees beside the wall", "climbers rest", "bread"];
    let all = export(&idx);
    let queries = tiny().embed_lines(&questions).unwrap();
    for k in [1, 3, 100] {
        let found = index.search(&*device(), tiny(), &questions, k, None).unwrap();
        for (found, query) in found.iter().zip(queries.chunks(tiny().width())) {
            let cosine = |row: &[f32]| query.iter().zip(row).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() as f32;
            let mut scores: Vec<f32> = all.iter().map(|(_, vector)| cosine(vector)).collect();
            scores.sort_by(|a, b| b.total_cmp(a));
            scores.truncate(k);
            assert_eq!(found.iter().map(|passage| passage.score).collect::<Vec<_>>(), scores);
            for passage in found {
                let row = all.iter().find(|((path, first, _, _, text, _), _)| {
                    (path, *first as u32, text) == (&passage.path, passage.lines.0, &passage.text)
                });
                assert_eq!(cosine(&row.expect("an indexed passage").1), passage.score);
            }
        }
    }
    let glob = PathFilter::new(&format!("{}/*.md", str(&docs))).unwrap();
    let found = index.search(&*device(), tiny(), &questions, 100, Some(&glob)).unwrap();
    assert!(found.iter().flatten().all(|passage| !passage.path.contains("/more/")) && found[0].len() > 2);
    assert!(index.search(&*device(), tiny(), &questions, 0, None).is_err());
}

#[test]
fn another_model_or_another_way_of_cutting_is_refused() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    let other = open_embedder(&tiny_dir().join("other"));
    for error in [
        Index::open(&idx, &other).err().unwrap(),
        index::build(&idx, std::slice::from_ref(&docs), &other, &Options::default(), &mut |_| true).unwrap_err(),
        index::add(&idx, std::slice::from_ref(&docs), &other, &Options::default(), &mut |_| true).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains("another embedding model") && error.contains(str(&idx)), "{error}");
    }
    let chunking = Chunking { max_tokens: 128, ..Chunking::default() };
    let options = Options { chunking: Some(chunking), ..Options::default() };
    let error = build_with(&idx, &docs, &options).unwrap_err().to_string();
    assert!(error.contains("128 tokens") && error.contains("256 tokens"), "{error}");
    let fits = Options { chunking: Some(Chunking::default()), ..Options::default() };
    assert_eq!(build_with(&idx, &docs, &fits).unwrap().unchanged, 6);

    let elsewhere = idx.with_file_name("elsewhere");
    for (wrong, word) in [(8, "16 to 8192"), (4096, "takes 256")] {
        let chunking = Chunking { max_tokens: wrong, join: 0, overlap: 0 };
        let options = Options { chunking: Some(chunking), ..Options::default() };
        let error = build_with(&elsewhere, &docs, &options).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let error = build_with(&docs, &docs, &Options::default()).unwrap_err().to_string();
    assert!(error.contains("no part of an index"), "{error}");
    let error = Index::open_any(&docs).err().unwrap().to_string();
    assert!(error.contains("handmill index build"), "{error}");
    let add = index::add(&elsewhere, &[docs], tiny(), &Options::default(), &mut |_| true);
    assert!(add.unwrap_err().to_string().contains("handmill index build"));
    assert!(!elsewhere.join("index.sqlite").exists(), "what is refused makes nothing");
}

#[test]
fn a_reader_keeps_what_it_opened() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    let index = Index::open(&idx, tiny()).unwrap();
    let look = || (index.info().unwrap(), index.search(&*device(), tiny(), &["river water"], 5, None).unwrap());
    let before = look();
    let sized = |info: index::Info| index::Info { bytes: 0, ..info };
    let steps: [&dyn Fn(); 4] = [
        &|| assert!(index::remove(&idx, &[str(&docs.join("river.md")).to_string()]).is_ok()),
        &|| assert!(index::compact(&idx).is_ok()),
        &|| fs::write(docs.join("new.txt"), "river water").map(|()| drop(build(&idx, &docs))).unwrap(),
        &|| assert!(index::compact(&idx).is_ok()),
    ];
    for step in steps {
        step();
        let now = look();
        assert_eq!((sized(now.0), now.1), (sized(before.0.clone()), before.1.clone()));
        assert!(index.verify().is_ok());
    }
    let now = Index::open(&idx, tiny()).unwrap();
    assert_eq!(best(&now, "river water"), format!("{}/new.txt", str(&docs)));
}

#[test]
fn one_writes_and_the_next_is_told() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    let lock = fs::File::create(idx.join(".lock")).unwrap();
    lock.try_lock().unwrap();
    let error = build_with(&idx, &docs, &Options::default()).unwrap_err().to_string();
    assert!(error.contains("being written by another process"), "{error}");
    let model = tiny_dir().join("tiny");
    let args = ["index", "build", "--model", str(&model), "--docs", str(&docs), "--out", str(&idx), "--device", "cpu"];
    let run = handmill(&args);
    assert!(run.code == 1 && run.stderr.contains("being written by another process"), "{}", run.stderr);
    assert_eq!(best(&Index::open(&idx, tiny()).unwrap(), TOPICS[3]), format!("{}/more/engine.md", str(&docs)));
    drop(lock);
    assert_eq!(handmill(&args).code, 0);
}

#[test]
fn stopping_keeps_what_is_done() {
    let (_folder, docs, idx) = place();
    let options = Options { save_every: Some(2), ..Options::default() };
    let (mut left, mut rounds) = (0, 0);
    loop {
        let mut looks = 0;
        let mut until = |_: index::Progress| {
            looks += 1;
            looks < 5
        };
        let report = index::build(&idx, std::slice::from_ref(&docs), tiny(), &options, &mut until).unwrap();
        rounds += 1;
        left = left.max(report.unchanged);
        if !report.interrupted {
            break;
        }
        assert!(rounds < 50, "every run brings it on");
    }
    assert!(rounds > 1 && left > 0, "{rounds} runs");
    let whole = idx.with_file_name("whole");
    build(&whole, &docs);
    same(&idx, &whole);
}

#[test]
fn the_tool_does_all_of_it() {
    let (folder, docs, idx) = place();
    let model = tiny_dir().join("tiny");
    let (model, docs, idx) = (str(&model), str(&docs), str(&idx));
    let report = json(&["index", "build", "--model", model, "--docs", docs, "--out", idx, "--json"]);
    assert_eq!((&report["added"], &report["status"]), (&6.into(), &"done".into()), "{report}");
    let info = json(&["index", "info", idx, "--list", "--verify", "--json"]);
    assert_eq!((&info["documents"], &info["d"], &info["chunks"]), (&6.into(), &32.into(), &report["chunks"]));
    assert_eq!(info["model_hash"], tiny().model_hash().unwrap());
    assert!(info["bytes"].as_u64().unwrap() > 1000 && info["paths"].as_array().unwrap().len() == 6);

    let query = ["search", "--index", idx, "--model", model, "--query", TOPICS[4], "-k", "2", "--json"];
    let found = json(&query);
    let hits = found["hits"].as_array().unwrap();
    assert_eq!((hits.len(), &hits[0]["rank"]), (2, &1.into()));
    assert_eq!(hits[0]["path"], format!("{docs}/orchestra.md"));
    assert_eq!(hits[0]["lines"].as_array().unwrap().len(), 2);
    assert!(hits[0]["score"].as_f64() >= hits[1]["score"].as_f64() && hits[0]["text"].is_string());
    let shown = handmill(&query[..query.len() - 1]);
    assert!(shown.stdout.starts_with(&format!("[1] {docs}/orchestra.md:")), "{}", shown.stdout);

    let out = folder.path().join("out");
    let exported = json(&["index", "export", idx, "--out", str(&out), "--json"]);
    assert_eq!(exported["chunks"], info["chunks"]);
    let removed = json(&["index", "remove", idx, &format!("{docs}/more"), "--json"]);
    assert_eq!(removed["documents"], 3);
    let packed = json(&["index", "compact", idx, "--json"]);
    assert_eq!(packed["dead_rows"], removed["chunks"]);
    let added = json(&["index", "add", idx, "--model", model, "--docs", docs, "--json"]);
    assert_eq!((&added["added"], &added["unchanged"]), (&3.into(), &3.into()));

    for (args, code, words) in [
        (vec!["index", "info", docs], 1, "handmill index build"),
        (vec!["index", "info", "no/such"], 1, "handmill index build"),
        (vec!["index", "add", idx, "--model", model, "--docs", "no/such"], 1, "no/such"),
        (vec!["index", "build", "--model", docs, "--docs", docs, "--out", idx], 1, "embedding model"),
        (vec!["search", "--index", idx, "--model", model, "--query", " "], 2, "--query is empty"),
        (vec!["search", "--index", idx, "--model", model, "--query", "x", "--path", "["], 1, "is no pattern"),
        (vec!["search", "--index", idx, "--model", model, "--query", "x", "-k", "0"], 1, "k is 0"),
    ] {
        let run = handmill(&args);
        assert!(run.code == code && run.stderr.contains(words), "{args:?}: {} {}", run.code, run.stderr);
        assert_eq!(run.stderr.trim_end().lines().count(), 1, "{args:?}: {}", run.stderr);
    }
}

#[test]
fn paths_are_kept_as_they_were_given() {
    let (folder, _, _) = place();
    let model = tiny_dir().join("tiny");
    let run = |docs: &str, out: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_handmill"));
        command.args(["index", "build", "--model", str(&model), "--docs", docs, "--out", out, "--device", "cpu"]);
        assert!(command.current_dir(folder.path()).output().unwrap().status.success());
        Index::open_any(&folder.path().join(out)).unwrap().documents().unwrap()
    };
    let paths: Vec<String> = run("./docs/", "a");
    assert_eq!(paths[0], "docs/market.md");
    assert_eq!(paths, run("docs", "a"), "the same folder written otherwise is the same");
    assert_eq!(run("docs/market.md", "b"), ["docs/market.md"]);
    let expected: PathBuf = Path::new("docs").join("more").join("mountain.md");
    assert!(paths.contains(&str(&expected).to_string()));
}
