//! Who is refused, and how.

use super::*;

#[test]
fn faults_are_told_with_their_status_and_field() {
    let server = Running::start(&["--max-body", "4096", "--context", "200"]);
    let chat = |more: Value| server.chat(&question("tiny", "x", more)).fault();
    let none = String::new;
    assert_eq!(chat(json!({"model": "gone"})), (404, "model".into(), "model_not_found".into()));
    assert_eq!(chat(json!({"temperature": 9})), (400, "temperature".into(), none()));
    assert_eq!(chat(json!({"max_tokens": 500})), (400, "messages".into(), "context_length_exceeded".into()));
    assert_eq!(chat(json!({"user": "u".repeat(4096)})).0, 413);
    let ids = server.post("/v1/completions", &json!({"model": "tiny", "prompt": [1, 99999]}));
    assert_eq!(ids.fault(), (400, "prompt".into(), none()));
    for (body, kind, status) in [
        (&b"{"[..], "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[]", "application/json; charset=utf-8", 400),
        (b"{}", "text/plain", 415),
    ] {
        let reply = server.call("POST", "/v1/chat/completions", &format!("Content-Type: {kind}\r\n"), body);
        assert_eq!(reply.fault().0, status, "{}", reply.body);
    }
    // A body without its length, longer than may be: noticed on the way.
    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
        Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let _ = stream.write_all(format!("2000\r\n{}\r\n0\r\n\r\n", "x".repeat(0x2000)).as_bytes());
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let other = server.get("/v1/chat/completions");
    assert_eq!((other.fault().0, other.head.contains("allow: post")), (405, true), "{}", other.head);
    let embedder = server.chat(&question("words", "x", json!({})));
    assert_eq!(embedder.fault(), (404, "model".into(), "model_not_found".into()));
    assert!(embedder.body.contains("/v1/embeddings"), "{}", embedder.body);
    assert_eq!(server.get("/v1/models/one%2Bdocs").json()["id"], "one+docs");
    assert_eq!(server.get("/etc/passwd").fault().0, 404);
    assert_eq!(server.get("/v1/models/../../etc/passwd").fault().0, 404);
    let feedback = server.post("/v1/feedback", &json!({"id": "nobody", "rating": 1}));
    assert_eq!(feedback.fault(), (404, "id".into(), "unknown_id".into()));

    // Another origin whose name leads here.
    let mut stream = server.connect();
    stream.write_all(b"GET /v1/models HTTP/1.0\r\nHost: evil.example:8080\r\n\r\n").unwrap();
    assert_eq!(receive(stream).fault().0, 403);
    let page = server.get("/");
    let policy = page.head.lines().find(|line| line.starts_with("content-security-policy")).unwrap().to_string();
    assert!(
        policy.contains("default-src 'none'") && policy.contains("sha256-") && !policy.contains("unsafe"),
        "{policy}"
    );
    assert!(!page.body.contains("innerHTML") && !page.body.contains("http://h") && !page.body.contains("https://"));
}

#[test]
fn a_token_is_asked_for_everywhere_but_at_the_door() {
    let folder = folder();
    let file = join(&folder, "tokens");
    std::fs::write(&file, "first-token\n\nsecond-token\n").unwrap();
    let mut server = Running::start(&["--token-file", file.to_str().unwrap()]);
    for path in ["/v1/models", "/metrics", "/v1/status"] {
        let reply = server.get(path);
        assert_eq!(reply.fault(), (401, String::new(), "invalid_api_key".into()));
        assert!(reply.head.contains("www-authenticate: bearer"), "{}", reply.head);
    }
    assert_eq!(server.chat(&question("tiny", "x", json!({}))).fault().0, 401);
    assert_eq!((server.get("/health").status, server.get("/").status), (200, 200));
    let page = server.get("/").body;
    assert!(page.contains("data-token=\"needed\"") && page.contains("id=\"token\" type=\"password\""));
    // It keeps the token as long as its tab, and nowhere else.
    let kept = ["localStorage", "document.cookie", "indexedDB", "location"].iter().all(|word| !page.contains(word));
    assert!(page.contains("sessionStorage") && kept);
    assert!(!page.contains("first-token"));
    for (token, status) in [("first-token", 200), ("second-token", 200), ("first-toke", 401), ("", 401)] {
        server.token = Some(token.into());
        assert_eq!(server.get("/v1/models").status, status, "{token}");
    }
    let refused = Command::new(env!("CARGO_BIN_EXE_handmill"))
        .args(["serve", "--model", &path("tiny"), "--listen", "0.0.0.0:0", "--device", "cpu"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--token-file"));
}

#[test]
fn a_place_to_listen_that_cannot_be_had_is_told_at_once() {
    let listen = |address: &str| {
        let flags = ["serve", "--model", "/no/such/model", "--device", "cpu", "--listen", address];
        let run = Command::new(env!("CARGO_BIN_EXE_handmill")).args(flags).output().unwrap();
        (run.status.code(), String::from_utf8(run.stderr).unwrap())
    };
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (code, error) = listen(&held.local_addr().unwrap().to_string());
    assert!(code == Some(1) && error.contains("name another port with --listen"), "{error}");
    let (code, error) = listen("localhost:0");
    assert!(code == Some(1) && error.contains("/no/such/model"), "localhost is a place: {error}");
    for address in ["8080", "mill:8080", "127.0.0.1:99999"] {
        let (code, error) = listen(address);
        assert!(code == Some(2) && error.contains("such as 127.0.0.1:8080"), "{address}: {error}");
    }
}

#[test]
fn adapters_come_and_go_from_below_the_root_only() {
    let closed = Running::start(&[]);
    let body = json!({"name": "new", "path": "one"});
    assert_eq!(closed.post("/v1/adapters", &body).fault(), (403, String::new(), "admin_not_allowed".into()));
    drop(closed);
    let folder = folder();
    let root = join(&folder, "root");
    std::fs::create_dir_all(&root).unwrap();
    let copy = root.join("copy");
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(files().join("adapters/one")).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(files().join("adapters/two"), root.join("way-out")).unwrap();
    let server = Running::start(&["--allow-admin", "--adapter-root", root.to_str().unwrap()]);
    let before = server.chat(&question("one", "hello", json!({}))).chat();
    let outside = path("adapters/two");
    for path in ["../root", "..", "/", "way-out", "copy/../../x", "nowhere", "", outside.as_str()] {
        let reply = server.post("/v1/adapters", &json!({"name": "new", "path": path}));
        assert_eq!(reply.fault(), (400, "path".into(), String::new()), "{path}");
    }
    for name in ["", "a/b", "a+b", "..", "é"] {
        let reply = server.post("/v1/adapters", &json!({"name": name, "path": "copy"}));
        assert_eq!(reply.fault().1, "name", "{name}");
    }
    assert_eq!(server.post("/v1/adapters", &json!({"name": "tiny", "path": "copy"})).fault().0, 409);
    let loaded = server.post("/v1/adapters", &json!({"name": "new", "path": "copy"}));
    assert_eq!((loaded.status, loaded.json()["rank"].as_u64()), (201, Some(3)), "{}", loaded.body);
    assert_eq!(server.chat(&question("new", "hello", json!({}))).chat(), before);
    // In the place of another only where that is said, and never in that of what is no adapter.
    let two = server.chat(&question("two", "hello", json!({}))).chat();
    assert!(two != before, "the adapters say different things");
    let body = |name: &str, replace: Value| json!({"name": name, "path": "copy", "replace": replace});
    assert_eq!(server.post("/v1/adapters", &body("two", json!(false))).fault().0, 409);
    assert_eq!(server.post("/v1/adapters", &body("two", json!("yes"))).fault().1, "replace");
    for name in ["tiny", "words"] {
        assert_eq!(server.post("/v1/adapters", &body(name, json!(true))).fault().0, 409);
    }
    let swapped = server.post("/v1/adapters", &body("two", json!(true)));
    assert_eq!((swapped.status, &swapped.json()["sha256"]), (200, &loaded.json()["sha256"]), "{}", swapped.body);
    assert_eq!(server.chat(&question("two", "hello", json!({}))).chat(), before);
    assert_eq!(server.call("DELETE", "/v1/adapters/new", "", b"").status, 200);
    assert_eq!(server.call("DELETE", "/v1/adapters/new", "", b"").fault().0, 404);
    assert_eq!(server.chat(&question("new", "hello", json!({}))).fault().0, 404);
}

#[test]
fn too_many_are_told_to_try_again_and_time_runs_out() {
    let server = Running::start(&["--max-running", "1", "--max-waiting", "1", "--timeout", "1.5"]);
    let long = question("tiny", "x", json!({"max_tokens": 900, "stream": true, "temperature": 1}));
    let header = "Content-Type: application/json\r\n";
    let body = long.to_string();
    let held: Vec<TcpStream> =
        (0..6).map(|_| server.send("POST", "/v1/chat/completions", header, body.as_bytes())).collect();
    let replies: Vec<Reply> = held.into_iter().map(receive).collect();
    let full: Vec<&Reply> = replies.iter().filter(|reply| reply.status == 429).collect();
    assert!(!full.is_empty(), "one runs and one waits");
    for reply in full {
        assert!(reply.head.contains("retry-after: "), "{}", reply.head);
        assert_eq!(reply.fault().2, "rate_limit_exceeded");
    }
    assert!(replies.iter().any(|reply| reply.status == 200));
}

#[cfg(unix)]
#[test]
fn what_runs_is_finished_and_what_comes_is_refused() {
    let mut server = Running::start(&["--timeout", "60"]);
    let body = question("tiny", "x", json!({"max_tokens": 400, "stream": true, "temperature": 1, "seed": 3}));
    let header = "Content-Type: application/json\r\n";
    let mut running = server.send("POST", "/v1/chat/completions", header, body.to_string().as_bytes());
    let mut begun = [0; 400];
    running.read_exact(&mut begun).unwrap();
    let address = server.address.clone();
    server.signal("-TERM");
    let mut refused = false;
    while let Ok(mut stream) = TcpStream::connect(&address) {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
        let mut answer = String::new();
        if stream.write_all(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n").is_err() {
            break;
        }
        let _ = stream.read_to_string(&mut answer);
        refused |= answer.starts_with("HTTP/1.0 503") && answer.contains("draining");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    assert!(refused, "while it finished, it said that it takes no more");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}
