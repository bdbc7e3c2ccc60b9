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
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
