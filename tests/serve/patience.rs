//! Clients that hold a connection and do not move: those who never read, and those whose request never ends.

use std::io::ErrorKind;

use super::*;

const HEADER: &str = "Content-Type: application/json\r\n";

/// A connection whose other side gets little before this one reads.
fn narrow(address: &str) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = runtime.block_on(socket.connect(address.parse().unwrap())).unwrap().into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

#[test]
fn who_never_reads_loses_the_connection_and_its_places() {
    let server = Running::start(&["--client-timeout", "0.3", "--max-running", "1"]);
    // Some 1.5 KB a token, 11 MB in all: more than a system keeps for who reads nothing (Linux: 4 MiB).
    let (n, tokens) = (8, 900);
    let more = json!({"n": n, "max_tokens": tokens, "stream": true, "logprobs": true, "top_logprobs": 20});
    let endless = |model: &&&str| {
        let alone = server.chat(&question(model, "x", json!({"max_tokens": tokens}))).json();
        alone["choices"][0]["finish_reason"] == "length"
    };
    let model = ["tiny", "one", "two"].iter().find(endless).expect("some model does not end by itself");
    let body = question(model, "x", more).to_string();
    let before = server.status()["generation_tokens"].as_u64().unwrap();
    let mut stream = narrow(&server.address);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n{HEADER}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    server.until("it is worked on", || server.status()["running"] == 1);
    server.until("it is let go", || {
        let status = server.status();
        status["running"] == 0 && status["waiting"] == 0
    });
    let made = server.status()["generation_tokens"].as_u64().unwrap() - before;
    assert!(made < n * tokens, "it was let go before all was made: {made}");
    let abort = "vllm:request_success_total{finished_reason=\"abort\",model_name=\"tiny\"} ";
    let aborted = || server.get("/metrics").body.lines().find_map(|line| line.strip_prefix(abort)?.parse::<u64>().ok());
    server.until("some are counted as broken off", || aborted().is_some_and(|count| (1..=n).contains(&count)));
    // What the system had on its way comes, or is dropped with the connection; the end does not.
    let mut got = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    if let Err(error) = stream.read_to_end(&mut got) {
        assert!(error.kind() == ErrorKind::ConnectionReset, "{error}");
    }
    assert!(!got.ends_with(b"[DONE]\n\n\r\n0\r\n\r\n"));
    assert_eq!(server.chat(&question("tiny", "x", json!({}))).status, 200, "the next one is answered");
}

#[test]
fn who_reads_slowly_but_reads_gets_it_all() {
    let server = Running::start(&["--client-timeout", "1"]);
    let more = json!({"n": 8, "max_tokens": 60, "stream": true, "logprobs": true, "top_logprobs": 20});
    let body = question("tiny", "x", more);
    let mut stream = narrow(&server.address);
    let text = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\n{HEADER}\r\n",
        text.len()
    );
    stream.write_all((head + &text).as_bytes()).unwrap();
    let mut got = Vec::new();
    // Longer than a client may rest, in rests that are short enough.
    for _ in 0..15 {
        std::thread::sleep(Duration::from_millis(100));
        let mut some = vec![0; 20_000];
        let count = stream.read(&mut some).unwrap();
        got.extend(&some[..count]);
    }
    stream.read_to_end(&mut got).unwrap();
    assert!(got.ends_with(b"data: [DONE]\n\n"), "{}", String::from_utf8_lossy(&got));
}

#[test]
fn a_request_that_never_ends_is_cut_off() {
    let server = Running::start(&["--client-timeout", "0.5"]);
    let long = format!("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n{HEADER}\r\n{{");
    // (what is sent at once, what then drips)
    let cases = [
        ("".to_string(), ""),
        ("GET /health HTTP/1.1\r\nHo".into(), ""),
        ("GET /health HTTP/1.1\r\nX-Slow: ".into(), "a"),
        ("GET /health HTTP/1.1\r\n".into(), "A: b\r\n"),
        (long.clone(), ""),
        (long, " "),
        // Answered, and then idle.
        ("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n".into(), ""),
    ];
    let hold = |(begun, drip): &(String, &str)| -> String {
        let mut stream = server.connect();
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        stream.write_all(begun.as_bytes()).unwrap();
        let mut got = Vec::new();
        for _ in 0..1000 {
            let mut some = [0; 4096];
            match stream.read(&mut some) {
                Ok(0) => return String::from_utf8(got).unwrap(),
                Ok(count) => got.extend(&some[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => return String::from_utf8(got).unwrap(),
            }
            let _ = stream.write_all(drip.as_bytes()); // the read tells that it is closed
        }
        panic!("{begun:?} {drip:?} holds its connection for 20 s");
    };
    let hold = &hold;
    std::thread::scope(|scope| {
        let held: Vec<_> = cases.iter().flat_map(|case| (0..6).map(move |_| scope.spawn(move || hold(case)))).collect();
        // Meanwhile others are answered.
        for _ in 0..5 {
            assert_eq!(server.chat(&question("tiny", "x", json!({}))).status, 200);
        }
        for (i, held) in held.into_iter().enumerate() {
            let (got, case) = (held.join().unwrap(), i / 6);
            match case {
                4 | 5 => assert!(got.starts_with("HTTP/1.1 408") && got.contains("within 0.5 s"), "{case}: {got}"),
                6 => assert!(got.starts_with("HTTP/1.1 200"), "{case}: {got}"),
                _ => assert!(!got.contains("200 OK"), "{case}: {got}"),
            }
        }
    });
    server.until("nothing is left of them", || server.status()["running"] == 0);
    let refused = Command::new(env!("CARGO_BIN_EXE_handmill"))
        .args(["serve", "--model", &path("tiny"), "--client-timeout", "0", "--device", "cpu"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--client-timeout"));
}
