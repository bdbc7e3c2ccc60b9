//! The record: nothing that was acknowledged is lost, nothing is recorded that nobody asked for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use super::*;

#[test]
fn a_killed_server_has_recorded_all_it_acknowledged() {
    let folder = folder();
    let log = join(&folder, "log.jsonl");
    let flags = ["--capture", log.to_str().unwrap(), "--redact", "hun[a-z]+", "--retention-days", "30"];
    let known: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());
    for round in 0..3 {
        let mut server = Running::start(&flags);
        let stop = AtomicBool::new(false);
        let client = |number: usize| {
            let header = "Content-Type: application/json\r\n";
            for i in 0.. {
                let more = json!({"stream": i % 2 == 0, "user": "somebody", "max_tokens": 3});
                let body = question("one", &format!("hunter {number} {i}"), more).to_string();
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(mut stream) = TcpStream::connect(&server.address) else { return };
                let head = format!(
                    "POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\n{header}\r\n",
                    body.len()
                );
                let mut answer = String::new();
                let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
                if sent.is_err() || stream.read_to_string(&mut answer).is_err() {
                    return;
                }
                // Acknowledged: whole, or to the word that ends a stream.
                let Some((_, body)) = answer.split_once("\r\n\r\n") else { return };
                let id = match body.ends_with("data: [DONE]\n\n") {
                    true => body.split('"').nth(3).unwrap().to_string(),
                    false => match serde_json::from_str::<Value>(body) {
                        Ok(object) => object["id"].as_str().unwrap().to_string(),
                        Err(_) => return,
                    },
                };
                known.lock().unwrap().push((id, format!("{number} {i}")));
            }
        };
        let client = &client;
        let id = server.child.id();
        std::thread::scope(|scope| {
            (0..4).for_each(|number| drop(scope.spawn(move || client(number))));
            std::thread::sleep(Duration::from_millis(150 + 130 * round));
            assert!(Command::new("kill").args(["-KILL", &id.to_string()]).status().unwrap().success());
            stop.store(true, Ordering::SeqCst);
        });
        server.child.wait().unwrap();
    }
    // A line that was cut off, as a crash of the machine could leave it.
    std::fs::OpenOptions::new().append(true).open(&log).unwrap().write_all(b"{\"id\":\"torn").unwrap();
    let server = Running::start(&flags);
    let known = known.into_inner().unwrap();
    assert!(known.len() >= 3, "{}", known.len());
    let rated = server.post("/v1/feedback", &json!({"id": known[0].0, "rating": "down", "correction": "a hunter"}));
    assert_eq!(rated.json()["recorded"], true, "an answer of an earlier run can be rated: {}", rated.body);
    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!text.contains("hunt") && !text.contains("somebody"), "redacted, and known by a pseudonym");
    for (id, words) in &known {
        let found: Vec<&Value> = lines.iter().filter(|line| line["id"] == **id && line["answer"].is_string()).collect();
        assert_eq!(found.len(), 1, "{id}");
        assert_eq!(found[0]["messages"][0]["content"], format!("[redacted] {words}"));
        assert_eq!((&found[0]["adapter"], &found[0]["shadow"]), (&json!("one"), &json!(false)));
        assert_eq!(found[0]["user"], lines[0]["user"], "one salt over all starts");
    }
    assert_eq!(lines.last().unwrap()["feedback"]["correction"], "a [redacted]");
    let second = Command::new(env!("CARGO_BIN_EXE_handmill"))
        .args(["serve", "--model", &path("tiny"), "--listen", "127.0.0.1:0", "--device", "cpu", "--capture"])
        .arg(&log)
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&second.stderr).contains("another server"));
}

#[test]
fn nothing_is_recorded_unasked() {
    let folder = folder();
    let server = Running::start(&[]);
    let reply = server.chat(&question("one", "secret", json!({"user": "somebody"})));
    let rated = server.post("/v1/feedback", &json!({"id": reply.json()["id"], "rating": 1}));
    assert_eq!(rated.json()["recorded"], false);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
