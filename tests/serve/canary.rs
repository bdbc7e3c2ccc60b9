//! Aliases: who gets which arm, and what becomes of a bad one.

use super::*;

#[test]
fn a_bad_candidate_is_rolled_back_by_itself_and_stays_so() {
    let folder = folder();
    let state = join(&folder, "state.json");
    let flags = ["--alias", "chat=one:50,ill:50", "--rollback-least", "10", "--state", state.to_str().unwrap()];
    let server = Running::start(&flags);
    let arms = || server.status()["aliases"][0]["arms"].clone();
    assert_eq!(server.chat(&question("ill", "x", json!({}))).fault().0, 500, "it fails by itself");
    let (mut failed, mut fine) = (0, 0);
    for i in 0..400 {
        let reply = server.chat(&question("chat", "hello", json!({"user": format!("user {i}"), "max_tokens": 1})));
        match reply.status {
            200 => fine += 1,
            500 => failed += 1,
            status => panic!("{status}: {}", reply.body),
        }
        if !arms()[1]["rolled_back"].is_null() {
            break;
        }
    }
    let arms_now = arms();
    assert_eq!(arms_now[1]["rolled_back"]["bound"], "errors", "{arms_now}");
    assert!((10..40).contains(&failed) && fine > 0, "{failed} failed, {fine} did not");
    assert_eq!((&arms_now[0]["weight"], &arms_now[1]["weight"]), (&json!(100.0), &json!(0.0)));
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("handmill_rollbacks_total{alias=\"chat\",arm=\"ill\",bound=\"errors\"} 1"), "{metrics}");
    let again = |server: &Running| {
        for i in 0..40 {
            let reply = server.chat(&question("chat", "hello", json!({"user": format!("user {i}"), "max_tokens": 1})));
            assert_eq!(reply.status, 200, "the champion answers: {}", reply.body);
        }
    };
    again(&server);
    drop(server);
    again(&Running::start(&flags));
}

/// A text that an adapter comes to early and another one not in 60 tokens, each asked alone.
fn ends_early(server: &Running) -> Option<String> {
    let [one, two] = ["one", "two"].map(|arm| server.chat(&question(arm, "hello", json!({"max_tokens": 60}))).chat());
    let early: Vec<char> = one.chars().take(4).collect();
    (1..=4).map(|n| early[..n].iter().collect::<String>()).find(|stop| !two.contains(stop.as_str()))
}

#[test]
fn a_slow_candidate_is_rolled_back_by_itself_and_stays_so() {
    let folder = folder();
    let state = join(&folder, "state.json");
    let flags = ["--alias", "chat=one:50,two:50", "--rollback-least", "8", "--state", state.to_str().unwrap()];
    let server = Running::start(&flags);
    // One arm ends within eight tokens, the other takes sixty: some five times as long, where twice is the bound.
    let stop = ends_early(&server).expect("two adapters say different things");
    let ask = |server: &Running, i: usize| {
        let more = json!({"user": format!("user {i}"), "max_tokens": 60, "stop": [stop.clone()]});
        server.chat(&question("chat", "hello", more)).json()["usage"]["completion_tokens"].as_u64().unwrap()
    };
    let alone = server.chat(&question("one", "hello", json!({"max_tokens": 60, "stop": [stop.clone()]})));
    let short = alone.json()["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(short <= 8, "{short}");
    let arms = || server.status()["aliases"][0]["arms"].clone();
    let asked = (0..400).take_while(|&i| {
        ask(&server, i);
        arms()[1]["rolled_back"].is_null()
    });
    assert!(asked.count() >= 15, "not before eight answers of each");
    let now = arms();
    let rollback = &now[1]["rolled_back"];
    assert_eq!((&rollback["bound"], &rollback["arm"]), (&json!("latency"), &json!("two")), "{now}");
    assert!(rollback["reason"].as_str().unwrap().contains("times as long as the champion's"), "{rollback}");
    assert!(now[1]["seconds_ratio"]["low"].as_f64().unwrap() > 2.0, "{now}");
    assert_eq!((&now[0]["weight"], &now[1]["weight"]), (&json!(100.0), &json!(0.0)));
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("handmill_rollbacks_total{alias=\"chat\",arm=\"two\",bound=\"latency\"} 1"), "{metrics}");
    assert!((0..20).all(|i| ask(&server, i) == short), "the champion answers");
    drop(server);
    let again = Running::start(&flags);
    assert!((0..20).all(|i| ask(&again, i) == short), "after a restart too");
    let url = format!("http://{}", again.address);
    let shown = Command::new(env!("CARGO_BIN_EXE_handmill")).args(["ab", "--url", &url]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("rolled back: an answer takes"), "{shown}");
}

#[test]
fn a_candidate_that_is_rated_badly_is_rolled_back_and_a_champion_is_not() {
    let folder = folder();
    let log = join(&folder, "log.jsonl");
    let flags = [
        "--alias",
        "chat=one:50,two:50",
        "--alias",
        "back=two:50,one:50",
        "--rollback-least",
        "8",
        "--capture",
        log.to_str().unwrap(),
    ];
    let server = Running::start(&flags);
    let bad = server.chat(&question("two", "hello", json!({}))).chat();
    // People like `one` and dislike `two`, whichever is the champion.
    let rate = |alias: &str, i: usize| {
        let reply = server.chat(&question(alias, "hello", json!({"user": format!("user {i}")})));
        let rating = if reply.chat() == bad { "down" } else { "up" };
        let rated = server.post("/v1/feedback", &json!({"id": reply.json()["id"], "rating": rating}));
        assert_eq!((rated.status, &rated.json()["recorded"]), (200, &json!(true)), "{}", rated.body);
    };
    let arms = |server: &Running, alias: usize| server.status()["aliases"][alias]["arms"].clone();
    for i in 0..400 {
        rate("chat", i);
        rate("back", i);
        // Aliases are told in the order of their names.
        if !arms(&server, 1)[1]["rolled_back"].is_null() {
            break;
        }
    }
    let (back, chat) = (arms(&server, 0), arms(&server, 1));
    let rollback = &chat[1]["rolled_back"];
    assert_eq!((&rollback["bound"], &rollback["arm"]), (&json!("feedback"), &json!("two")), "{chat}");
    assert!(rollback["reason"].as_str().unwrap().contains("ratings are good"), "{rollback}");
    let difference = &chat[1]["feedback_difference"];
    assert!(difference["value"] == -1.0 && difference["high"].as_f64().unwrap() < -0.1, "{difference}");
    assert!(back.as_array().unwrap().iter().all(|arm| arm["rolled_back"].is_null()), "{back}");
    for i in 0..20 {
        let reply = server.chat(&question("chat", "hello", json!({"user": format!("user {i}")})));
        assert!(reply.chat() != bad, "the champion answers");
    }
    // An answer has one rating, the last, however often it is said.
    let reply = server.chat(&question("back", "hello", json!({"user": "user 0"})));
    let ratings = || {
        let of = |arm: &Value| arm["feedback"]["n"].as_u64().unwrap_or(0);
        arms(&server, 0).as_array().unwrap().iter().map(of).sum::<u64>()
    };
    let before = ratings();
    for rating in ["up", "up", "down", "down", "up"] {
        assert_eq!(server.post("/v1/feedback", &json!({"id": reply.json()["id"], "rating": rating})).status, 200);
        assert_eq!(ratings(), before + 1);
    }
    let chat = arms(&server, 1);
    let back = arms(&server, 0);
    drop(server);
    let again = Running::start(&flags);
    assert_eq!(arms(&again, 0)[0]["feedback"], back[0]["feedback"]);
    assert_eq!(arms(&again, 0)[1]["feedback"], back[1]["feedback"]);
    let kept = arms(&again, 1);
    assert_eq!(&kept[1]["rolled_back"], rollback, "a restart keeps it");
    assert_eq!(kept[1]["feedback"], chat[1]["feedback"], "and the ratings, from the log");
}

#[test]
fn who_asks_again_meets_the_same_arm_and_the_shadow_answers_for_the_record() {
    let folder = folder();
    let log = join(&folder, "log.jsonl");
    let flags = ["--alias", "chat=one:70,two:30", "--shadow", "two", "--capture", log.to_str().unwrap()];
    let server = Running::start(&flags);
    let texts = ["one", "two"].map(|arm| server.chat(&question(arm, "hello", json!({}))).chat());
    let mut of_two = 0;
    let n = 60;
    for i in 0..n {
        let ask = || server.chat(&question("chat", "hello", json!({"user": format!("user {i}")})));
        let reply = ask();
        assert!(texts.contains(&reply.chat()));
        of_two += usize::from(reply.chat() == texts[1]);
        let id = reply.json()["id"].clone();
        let rating = if reply.chat() == texts[1] { "down" } else { "up" };
        assert_eq!(server.post("/v1/feedback", &json!({"id": id, "rating": rating})).status, 200);
        if i < 10 {
            assert_eq!(ask().chat(), reply.chat(), "user {i}");
        }
    }
    // Four standard deviations of a binomial: 6e-5 of all salts would fail this.
    let (mean, sd) = (n as f64 * 0.3, (n as f64 * 0.3 * 0.7).sqrt());
    assert!((of_two as f64 - mean).abs() < 4.0 * sd, "{of_two} of {n}");
    let shadows = || server.status()["aliases"][0]["arms"][1]["shadow_requests"].as_u64().unwrap();
    let of_one = server.status()["aliases"][0]["arms"][0]["requests"].as_u64().unwrap();
    server.until("the shadow has answered all", || shadows() == of_one);
    server.until("and all of it is recorded", || {
        lines(&log).iter().filter(|l| l["shadow"] == true).count() as u64 == of_one
    });
    for line in lines(&log).iter().filter(|line| line["shadow"] == true) {
        assert_eq!((&line["arm"], line["answer"].as_str()), (&json!("two"), Some(texts[1].as_str())));
    }
    let ab = |args: &[&str]| {
        let run = Command::new(env!("CARGO_BIN_EXE_handmill")).arg("ab").args(args).output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        String::from_utf8(run.stdout).unwrap()
    };
    let url = format!("http://{}", server.address);
    let live: Value = serde_json::from_str(&ab(&["--url", &url, "--json"])).unwrap();
    let log_args = ["--capture", log.to_str().unwrap(), "--champion", "one", "--json"];
    let kept: Value = serde_json::from_str(&ab(&log_args)).unwrap();
    for i in 0..2 {
        let (live, kept) = (&live["aliases"][0]["arms"][i], &kept["aliases"][0]["arms"][i]);
        for key in ["model", "requests", "errors", "feedback", "shadow_requests"] {
            assert_eq!(live[key], kept[key], "{key}");
        }
    }
    let good = &live["aliases"][0]["arms"][0]["feedback"];
    assert!(good["value"] == 1.0 && good["low"].as_f64().unwrap() > 0.8, "{good}");
    let text = ab(&["--url", &url]);
    assert!(text.contains("good ratings") && text.contains("as a shadow"), "{text}");
    // Figures end where their headings do.
    let lines: Vec<&str> = text.lines().collect();
    let end = |line: &str, word: &str| line.find(word).unwrap() + word.len();
    let answers = live["aliases"][0]["arms"][0]["requests"].to_string();
    assert_eq!(end(lines[1], "answers"), end(lines[2], &format!(" {answers} ")) - 1, "{text}");
}

#[test]
fn an_arm_with_other_weights_is_another_arm() {
    let root = files().join("adapters");
    let flags = ["--alias", "chat=one:50,two:50", "--allow-admin", "--adapter-root", root.to_str().unwrap()];
    let server = Running::start(&flags);
    let arms = || server.status()["aliases"][0]["arms"].clone();
    for i in 0..20 {
        server.chat(&question("chat", "hello", json!({"user": format!("user {i}"), "max_tokens": 1})));
    }
    let before = arms();
    assert!(before.as_array().unwrap().iter().all(|arm| arm["requests"].as_u64() > Some(0)), "{before}");
    assert_eq!(server.call("DELETE", "/v1/adapters/two", "", b"").fault().0, 409, "it is in use");
    let swap = |path: &str| server.post("/v1/adapters", &json!({"name": "two", "path": path, "replace": true}));
    assert_eq!(swap("two").status, 200);
    assert_eq!(arms(), before, "the same weights");
    assert_eq!(swap("three").status, 200);
    let after = arms();
    assert_eq!((&after[0], &after[1]["requests"]), (&before[0], &json!(0)), "of the new ones nothing is known");
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
