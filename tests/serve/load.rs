//! Many clients at once, some of whom leave, dawdle or send nonsense: every answer is the one its request gets alone.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use rand::RngExt;

use super::*;

const REQUESTS: usize = 2000;
const CLIENTS: usize = 12;
/// Kinds of requests: each with a model, a question, a seed and a length of its own.
const KINDS: usize = 48;

#[test]
fn none_is_lost_and_none_is_mixed() {
    let mut flags: Vec<String> = ["--max-running", "6", "--max-waiting", "64"].map(String::from).to_vec();
    for name in ["three", "four", "five", "six", "seven", "eight"] {
        flags.extend(["--adapter".into(), format!("{name}={}", path(&format!("adapters/{name}")))]);
    }
    flags.extend(["--index".into(), format!("mill={}", path("idx2"))]);
    let server = Running::start(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    let models =
        ["tiny", "one", "two", "three", "four", "five", "six", "seven", "eight", "tiny+docs", "two+docs", "five+mill"];
    let questions = ["the mill grinds wheat", "the inn serves beer", "iron nails", "zzzz"];
    let body = |kind: usize, stream: bool| {
        let (model, text) = (models[kind % 12], questions[kind / 12 % 4]);
        let drawn = if kind.is_multiple_of(2) { 0.0 } else { 0.9 };
        question(model, text, json!({"temperature": drawn, "seed": kind, "max_tokens": 6 + kind % 3, "stream": stream}))
    };
    let alone: HashMap<usize, String> = (0..KINDS).map(|kind| (kind, server.chat(&body(kind, false)).chat())).collect();
    let (next, wrong, answered, busy) =
        (AtomicUsize::new(0), Mutex::new(Vec::new()), AtomicUsize::new(0), AtomicUsize::new(0));
    let early = Mutex::new(None);
    let client = |seed: u64| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let header = "Content-Type: application/json\r\n";
        loop {
            let place = next.fetch_add(1, Ordering::SeqCst);
            if place >= REQUESTS {
                break;
            }
            if place == REQUESTS / 4 {
                *early.lock().unwrap() = resident_kib(&server);
            }
            let kind = rng.random_range(0..KINDS);
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
    // Buffers, tables and threads are there after the first quarter: the rest of the requests leaves nothing behind.
    if let (Some(early), Some(late)) = (early.into_inner().unwrap(), resident_kib(&server)) {
        assert!(late < early + (8 << 10), "{early} KiB were resident, then {late}");
    }
    server.until("those who left are let go", || {
        let status = server.status();
        status["running"] == 0 && status["waiting"] == 0
    });
}

/// Memory that the server has resident, where the system tells.
fn resident_kib(server: &Running) -> Option<usize> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?.parse().ok()
}
