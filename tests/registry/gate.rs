//! A candidate's way to champion and back, on a tiny model.

use std::time::Duration;

use serde_json::json;

use super::*;

const THINGS: [(&str, &str); 8] = [
    ("mill", "river"),
    ("inn", "bridge"),
    ("forge", "wood"),
    ("barn", "field"),
    ("tower", "hill"),
    ("dam", "lake"),
    ("school", "square"),
    ("church", "market"),
];

/// Held-out questions, none of which is among [`rows`].
pub fn questions(place: &Place) -> PathBuf {
    let line = |(thing, at): (&str, &str)| json!({"question": format!("At what stands the {thing}?"), "answer": at});
    place.file("questions.jsonl", &THINGS.map(|row| format!("{}\n", line(row))).concat())
}

/// A text of which the tiny model knows nothing either.
pub fn text(place: &Place) -> PathBuf {
    place.file("text.txt", &"five men had needed a day for what it did in an hour. ".repeat(4))
}

/// A folder whose registry holds the tiny model, and two adapters for it: version 1 does nothing, version 2 is trained
/// on what is asked.
fn place() -> Place {
    let place = Place::new();
    let base = place.json(&["registry", "add", "tiny", str(model())]);
    keep::adapter(&place.path("fresh"), 1, base["identity"].as_str().unwrap());
    place.json(&["registry", "add", "support", str(&place.path("fresh"))]);
    let row = |(thing, at): (&str, &str)| {
        let asked = format!("Where is the {thing}?");
        json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": at}]})
    };
    let rows = place.file("rows.jsonl", &THINGS.map(|thing| format!("{}\n", row(thing))).concat());
    place.json(&["registry", "add", "rows", str(&rows)]);
    let out = place.path("run");
    let train = ["finetune", "--model", "tiny", "--data", "rows", "--out", str(&out), "--steps", "24", "--batch", "2"];
    place.json(&[&train[..], &["--lr", "1e-2", "--device", "cpu", "--register", "support"]].concat());
    place
}

fn promote<'a>(candidate: &'a str, questions: &'a Path, text: &'a Path) -> Vec<&'a str> {
    let flags =
        ["promote", "support", "--candidate", candidate, "--questions", str(questions), "--retention", str(text)];
    [&flags[..], &["--metric", "nll", "--device", "cpu", "--json"]].concat()
}

#[test]
fn a_better_candidate_is_promoted_a_worse_one_is_not_and_the_way_back_is_one_command() {
    let place = place();
    let (questions, text) = (questions(&place), text(&place));
    let shown = place.json(&["registry", "show", "support@2"]);
    let roles: Vec<&str> = shown["parents"].as_array().unwrap().iter().map(|p| p["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["base", "data", "run"], "{shown}");
    let names: Vec<&Value> = shown["parents"].as_array().unwrap().iter().map(|parent| &parent["name"]).collect();
    assert_eq!(names, ["tiny", "rows", "finetune"], "{shown}");

    // An adapter that does nothing is no better than the base.
    let promote = |candidate, more: &[&str]| place.run(&[&promote(candidate, &questions, &text)[..], more].concat());
    let run = promote("1", &[]);
    let refused = run.object();
    assert_eq!((run.code, refused["decision"].as_str()), (1, Some("refused")), "{refused}");
    assert_eq!((&refused["champion"], &refused["task"]["n"]), (&Value::Null, &8.into()));
    assert!(refused["reasons"].to_string().contains("does not lie above 0"), "{refused}");
    assert_eq!(refused["retention"][0]["delta"]["mean"], 0.0);

    // A trained one is, but must not forget.
    let run = promote("2", &["--max-forgetting", "-9"]);
    let refused = run.object();
    assert_eq!((run.code, &refused["retention"][0]["kept"]), (1, &false.into()), "{refused}");
    assert!(refused["aliases"].as_array().unwrap().is_empty(), "{refused}");
    let run = promote("2", &["--max-forgetting", "99"]);
    let passed = run.object();
    assert_eq!((run.code, passed["decision"].as_str()), (0, Some("promoted")), "{passed}");
    assert_eq!((&passed["version"], &passed["aliases"][0]), (&2.into(), &"champion".into()));
    assert!(passed["task"]["gain"]["low"].as_f64().unwrap() > 0.0, "{passed}");
    assert!(passed["task"]["candidate"].as_f64() < passed["task"]["champion"].as_f64(), "a loss: less is better");
    let evaluation = place.json(&["registry", "show", passed["evaluation"].as_str().unwrap()]);
    let parents = evaluation["parents"].to_string();
    assert!(["candidate", "base", "questions", "retention"].iter().all(|role| parents.contains(role)), "{evaluation}");
    let kept = fs::read_to_string(evaluation["path"].as_str().unwrap()).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(kept["task"], passed["task"]);

    // The champion is the measure now: what does nothing is worse than it, and it is not better than itself.
    let run = promote("1", &["--max-forgetting", "99"]);
    assert_eq!((run.code, run.object()["champion"].as_i64()), (1, Some(2)));
    assert!(run.object()["task"]["gain"]["high"].as_f64().unwrap() < 0.0);
    assert!(promote("2", &[]).stderr.contains("the same adapter"));

    // Back: there is nothing before the first champion, until there is.
    assert!(place.fails(&["rollback", "support"]).contains("no way back"));
    let terms = ["--max-forgetting", "99", "--min-gain", "-99"];
    assert_eq!(promote("1", &terms).object()["decision"], "promoted");
    let back = place.json(&["rollback", "support"]);
    assert_eq!((&back["version"], &back["from"]), (&2.into(), &1.into()), "{back}");
    assert!(place.fails(&["rollback", "support"]).contains("no way back"));
    let history = place.json(&["registry", "show", "support"])["history"].clone();
    let actions: Vec<&str> =
        history.as_array().unwrap().iter().map(|moved| moved["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["promote", "promote", "rollback"]);
    assert_eq!(history[0]["evaluation"], passed["evaluation"]);
    assert_eq!(place.json(&["registry", "verify"])["damage"], json!([]));
    // What was judged cannot be taken out.
    assert!(place.fails(&["registry", "remove", "support@1"]).contains("was made from"));
    assert!(fs::read_dir(place.registry().join("gate")).unwrap().next().is_none(), "nothing is left over");
}

#[test]
fn other_measures_and_terms_that_make_no_sense() {
    let place = place();
    let (questions, text) = (questions(&place), text(&place));
    let rows = place.path("rows.jsonl");
    let flags = ["promote", "support", "--candidate", "2", "--retention", str(&text), "--device", "cpu"];
    let by = |more: &[&str]| place.run(&[&flags[..], more, &["--json"]].concat());
    let run = by(&["--eval-data", str(&rows), "--max-forgetting", "99"]);
    assert!(run.code == 1 && run.stdout.contains("is the file that it was trained on"), "{}", run.stdout);
    let row = |(thing, at): (&str, &str)| {
        let asked = format!("At what stands the {thing}?");
        json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": at}]})
    };
    let held = place.file("held.jsonl", &THINGS.map(|thing| format!("{}\n", row(thing))).concat());
    let run = by(&["--eval-data", str(&held), "--max-forgetting", "99"]);
    let passed = run.object();
    assert_eq!((run.code, &passed["task"]["metric"], &passed["task"]["n"]), (0, &"nll".into(), &8.into()), "{passed}");
    place.json(&["registry", "alias", "support", "champion", "--delete"]);
    for metric in ["f1", "exact_match"] {
        let run = by(&["--questions", str(&questions), "--metric", metric, "--max-tokens", "4", "--min-gain", "2"]);
        assert_eq!((run.code, run.object()["task"]["metric"].as_str()), (1, Some(metric)));
    }
    // Two questions, however well answered, prove nothing.
    let few: String = fs::read_to_string(&questions).unwrap().lines().take(2).map(|line| format!("{line}\n")).collect();
    let few = place.file("few.jsonl", &few);
    let run = by(&["--questions", str(&few), "--metric", "nll", "--max-forgetting", "99"]);
    assert!(run.code == 1 && run.stdout.contains("too few"), "{}", run.stdout);
    // Questions it was trained on prove nothing either.
    let known = |(thing, at): (&str, &str)| json!({"question": format!("Where is the {thing}?"), "answer": at});
    let known = place.file("known.jsonl", &THINGS.map(|thing| format!("{}\n", known(thing))).concat());
    let run = by(&["--questions", str(&known), "--metric", "nll", "--max-forgetting", "99"]);
    assert!(run.code == 1 && run.stdout.contains("8 of 8 questions, #1 first, are in rows@1"), "{}", run.stdout);
    for (more, words) in [
        (vec!["--eval-data", str(&rows), "--metric", "f1"], "--metric nll"),
        (vec!["--questions", str(&questions), "--max-forgetting", "nan"], "are numbers"),
        (vec!["--questions", str(&questions), "--champion", "7"], "cannot be an alias"),
        (vec!["--questions", "/no/such.jsonl"], "/no/such.jsonl"),
    ] {
        let run = by(&more);
        assert!(run.code > 0 && run.stderr.contains(words), "{more:?}: {}", run.stderr);
    }
    let error = place.fails(&["promote", "nobody", "--questions", str(&questions)]);
    assert!(error.contains("nobody@candidate"), "{error}");
}

#[test]
fn a_promotion_that_is_killed_leaves_the_champion_with_its_history() {
    let place = place();
    let (questions, text) = (questions(&place), text(&place));
    let args = [&promote("2", &questions, &text)[..], &["--max-forgetting", "99"]].concat();
    let (mut strikes, mut after) = (0, 10);
    loop {
        let mut child = place.start(&args);
        std::thread::sleep(Duration::from_millis(after));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let shown = place.json(&["registry", "show", "support@2"]);
        let (aliases, history) = (shown["aliases"].as_array().unwrap(), shown["history"].as_array().unwrap());
        assert_eq!(aliases.len(), history.len(), "both or neither: {shown}");
        assert_eq!(place.json(&["registry", "verify"])["damage"], json!([]));
        // Killed after it was decided and before it said so, it has been done.
        if ended.is_some() || !aliases.is_empty() {
            assert!(!aliases.is_empty(), "{ended:?}");
            break;
        }
        strikes += 1;
        after += 40;
        assert!(strikes < 100, "it comes to its end some time");
    }
    assert!(strikes > 0, "it was never cut off");
}
