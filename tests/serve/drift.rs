//! Questions that are other than those of training, as a running server tells of them.

use super::*;

const THINGS: [&str; 4] = ["mill", "inn", "river", "bridge"];

/// The `i`-th question about mills and inns.
fn alike(i: usize) -> String {
    let (thing, other) = (THINGS[i % 4], THINGS[(i / 4 + 1) % 4]);
    match i % 3 {
        0 => format!("Where is the {thing} beside the {other}?"),
        1 => format!("Is the {thing} near the {other} or the mill?"),
        _ => format!("Which {thing} grinds wheat and serves beer at the {other}?"),
    }
}

fn gauge(server: &Running, statistic: &str) -> f64 {
    let metrics = server.get("/metrics").body;
    let begin = format!("handmill_question_drift{{statistic=\"{statistic}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&begin));
    let line = line.unwrap_or_else(|| panic!("no {begin} in {metrics}"));
    // By the parser that reads the status: it may miss the nearest number by a last place, and both are compared.
    serde_json::from_str(line).unwrap()
}

#[test]
fn questions_of_another_kind_are_noticed() {
    let folder = folder();
    let file = join(&folder, "train.jsonl");
    // Every form that a training row may have.
    let row = |i: usize| match i % 4 {
        0 => json!({"messages": [{"role": "system", "content": "Answer."}, {"role": "user", "content": alike(i)}]}),
        1 => json!({"question": alike(i), "answer": "yes"}),
        2 => json!({"prompt": alike(i), "completion": "yes"}),
        _ => json!({"instruction": alike(i), "output": "yes"}),
    };
    std::fs::write(&file, (0..96).map(|i| format!("{}\n", row(i))).collect::<String>()).unwrap();
    // What the shadow is asked was asked before, and is not counted again.
    let shadow = ["--alias", "chat=one:1,two:0", "--shadow", "two"];
    let server = Running::start(&[&["--drift-reference", file.to_str().unwrap()][..], &shadow].concat());
    let ask = |text: &str, model: &str| {
        let reply = server.chat(&question(model, text, json!({"max_tokens": 1})));
        assert_eq!(reply.status, 200, "{}", reply.body);
    };
    // Looked at every 32 questions, on a thread of its own.
    let found = |seen: u64| {
        let drift = || server.status()["drift"].clone();
        server.until("the look is done", || drift()["questions"] == seen && !drift()["found"].is_null());
        drift()["found"].clone()
    };
    (0..32).for_each(|i| ask(&alike(5 * i + 1), ["tiny", "tiny+docs", "chat"][i % 3]));
    let shadowed = || server.status()["aliases"][0]["arms"][1]["shadow_requests"].clone();
    server.until("the shadow has answered all", || shadowed() == 10);
    let same = found(32);
    assert!(same["p_value"].as_f64().unwrap() > 0.05, "{same}");
    assert_eq!(gauge(&server, "questions"), 32.0);
    let p = same["p_value"].as_f64().unwrap();
    assert_eq!(gauge(&server, "p_value"), p);

    (0..32).for_each(|i| ask(&format!("The forge makes {} nails from iron", ["new", "old", "good"][i % 3]), "one"));
    server.until("the second look is done", || found(64)["p_value"] != p);
    let other = found(64);
    // No random split reaches it: one in 200 is the least there is.
    assert_eq!(other["p_value"], 0.005, "{other}");
    for key in ["centroid_distance", "mmd2"] {
        assert!(other[key].as_f64() > same[key].as_f64(), "{key}: {same} {other}");
        assert_eq!(gauge(&server, key), other[key].as_f64().unwrap());
    }

    let refused = |name: &str, text: &str| {
        let file = join(&folder, name);
        std::fs::write(&file, text).unwrap();
        let run = Command::new(env!("CARGO_BIN_EXE_handmill"))
            .args(["serve", "--model", &path("tiny"), "--embed-model", &path("words"), "--listen", "127.0.0.1:0"])
            .args(["--device", "cpu", "--drift-reference", file.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(!run.status.success());
        String::from_utf8(run.stderr).unwrap()
    };
    assert!(refused("one.jsonl", "{\"text\":\"x\"}\n").contains("fewer than two questions"));
    let error = refused("bad.jsonl", "{\"text\":\"x\"}\n{\"answer\":\"x\"}\n");
    assert!(error.contains("bad.jsonl") && error.contains("#2"), "{error}");
}
