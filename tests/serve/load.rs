//! Many clients at once, some of whom leave, dawdle or send nonsense: every answer is the one its request gets alone.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use rand::RngExt;

use super::*;

const REQUESTS: usize = 200;
const CLIENTS: usize = 12;

#[test]
fn none_is_lost_and_none_is_mixed() {
    let server = Running::start(&["--max-running", "6", "--max-waiting", "64"]);
    let models = ["tiny", "one", "two", "tiny+docs", "two+docs"];
    let questions = ["the mill grinds wheat", "the inn serves beer", "iron nails", "zzzz"];
    let body = |kind: usize, stream: bool| {
        let (model, text) = (models[kind % 5], questions[kind / 5 % 4]);
        let drawn = if kind.is_multiple_of(2) { 0.0 } else { 0.9 };
        question(model, text, json!({"temperature": drawn, "seed": kind, "max_tokens": 6 + kind % 3, "stream": stream}))
    };
    let alone: HashMap<usize, String> = (0..20).map(|kind| (kind, server.chat(&body(kind, false)).chat())).collect();
    let (next, wrong, answered, busy) =
        (AtomicUsize::new(0), Mutex::new(Vec::new()), AtomicUsize::new(0), AtomicUsize::new(0));
    let client = |seed: u64| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let header = "Content-Type: application/json\r\n";
        while next.fetch_add(1, Ordering::SeqCst) < REQUESTS {
            let kind = rng.random_range(0..20);
            let text = body(kind, rng.random_range(0..2) == 0).to_string();
            let what = rng.random_range(0..10);
            let nonsense = &text.as_bytes()[..rng.random_range(0..text.len())];
            match what {
                0 => {
                    let reply = server.call("POST", "/v1/chat/completions", header, nonsense);
                    if reply.status != 400 {
                        wrong.lock().unwrap().push(reply.body);
                    }
                }
                1 => {
                    // Leaves in the middle.
                    let mut stream = server.send("POST", "/v1/chat/completions", header, text.as_bytes());
                    let _ = stream.read(&mut vec![0; rng.random_range(1..300)]);
                }
                _ => {
                    let stream = server.send("POST", "/v1/chat/completions", header, text.as_bytes());
                    if what == 2 {
                        std::thread::sleep(Duration::from_millis(rng.random_range(10..60)));
                    }
                    let reply = receive(stream);
                    if reply.status == 429 {
                        busy.fetch_add(1, Ordering::SeqCst);
                    } else if reply.status != 200 || reply.chat() != alone[&kind] {
                        wrong.lock().unwrap().push(format!("{kind}: {} is not {}", reply.body, alone[&kind]));
                    }
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    };
    let client = &client;
    std::thread::scope(|scope| {
        for seed in 0..CLIENTS as u64 {
            scope.spawn(move || client(seed));
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} wrong, such as {}", wrong.len(), wrong[0]);
    assert!(answered.into_inner() > REQUESTS / 2 && busy.into_inner() == 0);
    server.until("those who left are let go", || {
        let status = server.status();
        status["running"] == 0 && status["waiting"] == 0
    });
}
