//! Many processes at once, and processes that are killed at any moment.

use std::collections::BTreeSet;
use std::io::Read;
use std::time::Duration;

use super::*;

#[test]
fn processes_that_add_at_once_lose_nothing() {
    let place = Place::new();
    // Nobody has made the registry: the first ones do, at once. Two in three add bytes that another adds too.
    let rows = |i: usize| place.file(&format!("rows-{i}.jsonl"), &format!("{{\"text\":\"{}\"}}\n", i / 3));
    let files: Vec<PathBuf> = (0..12).map(rows).collect();
    let started: Vec<Child> = (files.iter().zip(0..))
        .map(|(file, i)| {
            let alias = format!("a{i}");
            place.start(&["registry", "add", "rows", str(file), "--alias", &alias, "--json"])
        })
        .collect();
    let mut seen = BTreeSet::new();
    for (mut child, i) in started.into_iter().zip(0..) {
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success());
        let entry: Value = serde_json::from_str(&text).unwrap();
        seen.insert((i / 3, entry["version"].as_i64().unwrap()));
    }
    assert_eq!(seen.len(), 4, "the same bytes are the same version: {seen:?}");
    let versions: BTreeSet<i64> = seen.iter().map(|(_, version)| *version).collect();
    assert_eq!(versions, BTreeSet::from([1, 2, 3, 4]));
    let list = place.lines(&["registry", "list"]);
    let aliases: usize = list.iter().map(|entry| entry["aliases"].as_array().unwrap().len()).sum();
    assert_eq!((list.len(), aliases), (4, 12));
    assert_eq!(place.json(&["registry", "verify"])["files"], 4);
    assert_eq!(place.json(&["registry", "gc"])["blobs"], 0);
}

#[test]
fn collecting_while_others_add_takes_nothing_of_theirs() {
    let place = Place::new();
    place.json(&["registry", "init"]);
    let mut started = Vec::new();
    for i in 0..8 {
        let file = place.file(&format!("rows-{i}.jsonl"), &format!("{{\"text\":\"{i}\"}}\n"));
        started.push(place.start(&["registry", "add", "rows", str(&file)]));
        started.push(place.start(&["registry", "gc"]));
    }
    assert!(started.into_iter().all(|mut child| child.wait().unwrap().success()));
    let verified = place.json(&["registry", "verify"]);
    assert_eq!((&verified["files"], &verified["damage"]), (&8.into(), &serde_json::json!([])));
}

#[test]
fn what_was_acknowledged_survives_being_killed() {
    let place = Place::new();
    place.json(&["registry", "init"]);
    // Some megabytes take the moments in which a kill strikes bytes on their way in.
    let filler = "x".repeat(2 << 20);
    let (mut told, mut strikes, mut after) = (0, 0, 1);
    let mut aliased = 0;
    for i in 1..=40 {
        let file = place.file("rows.jsonl", &format!("{{\"text\":\"{i} {filler}\"}}\n"));
        let mut child = place.start(&["registry", "add", "rows", str(&file), "--alias", "candidate", "--json"]);
        std::thread::sleep(Duration::from_millis(after));
        child.kill().unwrap();
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let ended = child.wait().unwrap();
        let entry: Option<Value> = serde_json::from_str(&text).ok();
        strikes += usize::from(!ended.success());
        if let Some(entry) = &entry {
            told = entry["version"].as_i64().unwrap();
            aliased = told;
        }
        // From before it begins to past its end, and again.
        after = if entry.is_some() { 1 } else { after + 4 };

        let list = place.lines(&["registry", "list", "rows"]);
        let top = list.last().map_or(0, |entry| entry["version"].as_i64().unwrap());
        assert!(top >= told && list.len() as i64 == top, "{list:?}, and {told} was told");
        let candidate = list.iter().find(|entry| entry["aliases"][0] == "candidate");
        let candidate = candidate.map_or(0, |entry| entry["version"].as_i64().unwrap());
        assert!(candidate >= aliased, "{candidate}, and {aliased} was told");
        if let Some(entry) = entry {
            assert_eq!(place.json(&["registry", "show", "rows@candidate"])["sha256"], entry["sha256"]);
        }
    }
    assert!(strikes >= 5 && told >= 2, "{strikes} strikes, {told} told");
    assert_eq!(place.json(&["registry", "verify"])["damage"], serde_json::json!([]));
    let before = place.lines(&["registry", "list"]).len();
    place.json(&["registry", "gc"]);
    assert_eq!(place.json(&["registry", "verify"])["entries"], before);
    let left = |name: &str| fs::read_dir(place.registry().join(name)).unwrap().count();
    assert_eq!((left("incoming"), left("trees")), (0, before), "nothing is left over");
}
