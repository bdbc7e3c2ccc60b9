//! The way of a real model's answers to a candidate: served and recorded, corrected by people, trained on, judged.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use super::place::place_of;
use super::*;

/// `count` rows of the factbook, evenly from a file of them.
fn factbook(name: &str, count: usize) -> Vec<Value> {
    let path = place_of("HANDMILL_DATA", "handmill/data", &format!("factbook/{name}"), "tools/fetch_data");
    let text = fs::read_to_string(path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    (0..count).map(|i| serde_json::from_str(lines[i * lines.len() / count]).unwrap()).collect()
}

/// What the row asks, with its instruction, and what is to be said.
fn asked(row: &Value) -> (String, String) {
    let text = |key: &str| row[key].as_str().unwrap().to_string();
    let said = text("format").replace("{answer}", &text("answer")).replace("{topic}", &text("topic"));
    (format!("{}\n\n{}", text("instruction"), text("question")), said)
}

fn post(address: &str, path: &str, body: &Value) -> Value {
    let mut stream = TcpStream::connect(address).unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\nContent-Type: application/json\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

fn interrupt(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn corrections_of_a_served_model_come_to_a_candidate_that_is_better() {
    let place = Place::new();
    let model = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let model = place_of("HANDMILL_MODELS", "handmill/models", model, "tools/fetch_models");
    place.json(&["registry", "add", "smollm2", str(&model), "--in-place"]);
    let held = factbook("questions.jsonl", 16);
    let lines: String = held.iter().map(|row| format!("{row}\n")).collect();
    let questions = place.file("held-out.jsonl", &lines);

    // People ask, and say what would have been right; once nobody does, and once it is asked what is held out.
    let log = place.path("log.jsonl");
    let mut server =
        place.start(
            &[
                &[
                    "serve",
                    "--model",
                    "smollm2",
                    "--name",
                    "smollm2",
                    "--capture",
                    str(&log),
                    "--listen",
                    "127.0.0.1:0",
                ][..],
                &["--device", "cpu", "--any-batch", "--json"],
            ]
            .concat(),
        );
    let mut ready = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    let ready: Value = serde_json::from_str(&ready).unwrap();
    let address = ready["address"].as_str().unwrap();
    let mut rows = factbook("train.jsonl", 24);
    rows.push(held[0].clone());
    // One after the other: the order of the log is the order of training, and with it the figures.
    for (i, row) in rows.iter().enumerate() {
        let (question, right) = asked(row);
        let body = json!({"model": "smollm2", "messages": [{"role": "user", "content": question}], "max_tokens": 4,
            "temperature": 0, "user": format!("user {i}")});
        let answer = post(address, "/v1/chat/completions", &body);
        let mut said = json!({"id": answer["id"], "rating": "down"});
        if i != 3 {
            said["correction"] = json!(right);
        }
        assert_eq!(post(address, "/v1/feedback", &said)["recorded"], true);
    }
    interrupt(&server, "-TERM");
    assert!(server.wait().unwrap().success());

    // Ctrl-C in the middle of training, then the same command.
    let text = fs::read_to_string(gate::text(&place)).unwrap().repeat(2);
    let (out, text) = (place.path("next"), place.file("unrelated.txt", &text));
    let cycle = [
        &["cycle", "--name", "facts", "--log", str(&log), "--model", "smollm2", "--questions", str(&questions)][..],
        &["--retention", str(&text), "--out", str(&out), "--steps", "12", "--batch", "2", "--lr", "1e-3"],
        &["--metric", "nll", "--max-forgetting", "0.5", "--device", "cpu", "--json"],
    ]
    .concat();
    let mut child = place.start(&cycle);
    let (steps, begun) = (out.join("adapter/metrics.jsonl"), Instant::now());
    let count = || fs::read_to_string(&steps).map_or(0, |text| text.lines().count());
    while count() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        assert!(begun.elapsed() < Duration::from_secs(120), "it does not train");
        std::thread::sleep(Duration::from_millis(10));
    }
    interrupt(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(count() < 12, "it was stopped");
    assert_eq!(place.lines(&["registry", "list", "facts"]), Vec::<Value>::new(), "no candidate yet");

    let done = place.run(&cycle);
    assert_eq!(done.code, 0, "{} {}", done.stdout, done.stderr);
    let report = done.object();
    assert_eq!((&report["decision"], &report["aliases"]), (&"passed".into(), &json!(["candidate"])), "{report}");
    let left = json!({"in the held-out set": 1, "negative rating": 1});
    assert_eq!((&report["data"]["rows"], &report["data"]["left_out"]), (&23.into(), &left));
    assert_eq!((&report["data"]["corrected"], &report["champion"]), (&23.into(), &Value::Null));
    assert_eq!((&report["train"]["steps"], count()), (&12.into(), 12));
    let (task, kept) = (&report["task"], &report["retention"][0]);
    assert_eq!((&task["n"], task["gain"]["low"].as_f64() > Some(0.0)), (&16.into(), true), "{task}");
    assert!(kept["delta"]["high"].as_f64() < Some(0.5), "{kept}");
    let lineage = place.json(&["registry", "lineage", "facts@candidate"]);
    let names: Vec<&str> =
        lineage["ancestors"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"smollm2") && names.contains(&"facts-data"), "{names:?}");
    assert_eq!(place.run(&cycle).object(), report, "nothing was done anew");
    assert_eq!(place.json(&["registry", "verify"])["damage"], json!([]));
}
