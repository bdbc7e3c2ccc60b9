//! What OpenAI's clients send and expect.

use super::*;

#[test]
fn answers_have_openais_shape_and_streams_say_the_same() {
    let server = Running::start(&[]);
    for name in ["tiny", "one", "two", "tiny+docs", "one+docs", "words"] {
        assert!(server.models.iter().any(|model| model == name), "{name}: {:?}", server.models);
    }
    let list = server.get("/v1/models").json();
    assert_eq!((&list["object"], list["data"].as_array().unwrap().len()), (&json!("list"), server.models.len()));
    assert_eq!(server.get("/v1/models/one").json()["parent"], "tiny");
    assert_eq!(server.get("/health").json()["status"], "ok");

    let mut texts = Vec::new();
    for model in ["tiny", "one", "two"] {
        let whole = server.chat(&question(model, "hello", json!({})));
        let object = whole.json();
        assert_eq!((&object["object"], &object["model"]), (&json!("chat.completion"), &json!(model)));
        let usage = &object["usage"];
        assert_eq!(usage["total_tokens"], json!(usage["prompt_tokens"].as_u64().unwrap() + 12));
        assert_eq!(object["choices"][0]["finish_reason"], "length");
        let stream =
            server.chat(&question(model, "hello", json!({"stream": true, "stream_options": {"include_usage": true}})));
        assert!(stream.head.contains("text/event-stream"), "{}", stream.head);
        assert_eq!(stream.chat(), whole.chat());
        let events = stream.events();
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!((&events[0]["usage"], &events[events.len() - 1]["usage"]), (&Value::Null, usage));
        assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "length");
        texts.push(whole.chat());
    }
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "adapters change the answer: {texts:?}");

    // Choices differ by their seeds, and the same seed says the same.
    let drawn = json!({"n": 3, "temperature": 1.0, "seed": 5});
    let [first, again] =
        [0, 1].map(|_| server.chat(&question("one", "hello", drawn.clone())).json()["choices"].clone());
    assert_eq!(first, again);
    assert!(first[0]["message"]["content"] != first[1]["message"]["content"] && first[2]["index"] == 2);
}

#[test]
fn stop_texts_end_an_answer_over_the_borders_of_tokens() {
    let server = Running::start(&[]);
    let long = server.chat(&question("tiny", "go on", json!({"max_tokens": 40}))).chat();
    // Tokens are single characters, so any three span three tokens.
    let cut = long.char_indices().nth(10).unwrap().0;
    let stop: String = long[cut..].chars().take(3).collect();
    let at = long.find(&stop).unwrap();
    for stream in [false, true] {
        let more = json!({"max_tokens": 40, "stop": ["never this", stop], "stream": stream, "logprobs": true});
        let reply = server.chat(&question("tiny", "go on", more));
        assert_eq!(reply.chat(), long[..at], "never past the stop text");
        let scored: String = match stream {
            false => pieces(&reply.json()["choices"][0]["logprobs"]),
            true => reply.events().iter().map(|event| pieces(&event["choices"][0]["logprobs"])).collect(),
        };
        assert_eq!(scored, long[..at], "nor its tokens");
        assert!(reply.body.contains("\"finish_reason\":\"stop\""));
    }
}

fn pieces(logprobs: &Value) -> String {
    let tokens = logprobs["content"].as_array().into_iter().flatten();
    tokens.map(|token| token["token"].as_str().unwrap()).collect()
}

#[test]
fn completions_score_texts_as_harnesses_ask_it() {
    let server = Running::start(&[]);
    let ask = |prompt: Value, more: Value| {
        let mut body = json!({"model": "one", "prompt": prompt, "max_tokens": 1, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body).json()
    };
    let scored = ask(json!("the mill"), json!({"echo": true, "logprobs": 2}));
    let choice = &scored["choices"][0];
    let logprobs = &choice["logprobs"];
    let numbers = logprobs["token_logprobs"].as_array().unwrap();
    // A place for each token of the prompt, and one for the new token, also where it ends the text.
    assert_eq!(numbers.len(), 9, "{logprobs}");
    assert!(numbers[0].is_null() && numbers[1..].iter().all(|x| x.as_f64().unwrap() <= 0.0));
    assert_eq!(logprobs["tokens"].as_array().unwrap()[..3], [json!("t"), json!("h"), json!("e")]);
    assert_eq!(logprobs["text_offset"][8], 8);
    assert!(choice["text"].as_str().unwrap().starts_with("the mill"));
    let top = logprobs["top_logprobs"][3].as_object().unwrap();
    assert!((2..=3).contains(&top.len()), "{top:?}");
    let best = top.values().map(|x| x.as_f64().unwrap()).fold(f64::MIN, f64::max);
    assert!(best >= numbers[3].as_f64().unwrap());

    // Ids, a list, and a score that does not depend on the company.
    let many = ask(json!(["the mill", "an inn", "the mill"]), json!({"echo": true, "logprobs": 2}));
    assert_eq!(many["choices"][0]["logprobs"], *logprobs);
    assert_eq!(many["choices"][2]["logprobs"], *logprobs);
    assert_eq!(many["usage"]["prompt_tokens"], 22);
    let plain = ask(json!("the"), json!({"max_tokens": 4}));
    let echoed = ask(json!("the"), json!({"max_tokens": 4, "echo": true}));
    let text = |object: &Value| object["choices"][0]["text"].as_str().unwrap().to_string();
    assert_eq!(text(&echoed), format!("the{}", text(&plain)));
    let only = ask(json!("the"), json!({"max_tokens": 0, "echo": true, "logprobs": 0}));
    assert_eq!((text(&only).as_str(), only["usage"]["completion_tokens"].as_u64()), ("the", Some(0)));
    let body = json!({"model": "one", "prompt": "the mill", "max_tokens": 1, "temperature": 0, "echo": true,
        "logprobs": 2, "stream": true});
    let events = server.post("/v1/completions", &body).events();
    let streamed: String = events.iter().map(text).collect();
    assert_eq!(streamed, choice["text"].as_str().unwrap());
    assert_eq!(events[0]["choices"][0]["logprobs"]["token_logprobs"][3], numbers[3]);
}

#[test]
fn a_harness_that_sends_token_ids_finds_what_it_reads() {
    let server = Running::start(&[]);
    // Single characters: 2 is a space, 4 is a. Context and continuation, as lm-evaluation-harness joins them.
    let ids =
        |text: &str| text.bytes().map(|c| if c == b' ' { 2 } else { u32::from(c - b'a') + 4 }).collect::<Vec<_>>();
    let requests = [("the mill ", "grinds"), ("the inn", " serves beer"), ("a", "b")];
    let prompts: Vec<Vec<u32>> = requests.iter().map(|(context, rest)| ids(&format!("{context}{rest}"))).collect();
    let ask = |prompt: Value, max_tokens: usize| {
        let body = json!({"model": "one", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1,
            "seed": 1234, "echo": true});
        let reply = server.post("/v1/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()["choices"].as_array().unwrap().clone()
    };
    let choices = ask(json!(prompts), 1);
    assert_eq!(choices.len(), 3);
    for (i, ((context, rest), choice)) in requests.iter().zip(&choices).enumerate() {
        assert_eq!(choice["index"], i);
        let logprobs = &choice["logprobs"];
        let list = |key: &str| logprobs[key].as_array().unwrap().clone();
        let (numbers, tops) = (list("token_logprobs"), list("top_logprobs"));
        let n = context.len() + rest.len();
        // The new token is there, as the harness leaves the last one out.
        assert!([numbers.len(), tops.len(), list("tokens").len(), list("text_offset").len()]
            .iter()
            .all(|l| *l == n + 1));
        assert_eq!(list("text_offset")[..n], (0..n).map(|at| json!(at)).collect::<Vec<_>>());
        let spelled: String = list("tokens")[..n].iter().map(|token| token.as_str().unwrap()).collect();
        assert_eq!(spelled, format!("{context}{rest}"));
        assert!(numbers[0].is_null() && tops[0].is_null());
        for (number, top) in numbers[context.len()..n].iter().zip(&tops[context.len()..n]) {
            let best = top.as_object().unwrap().values().map(|x| x.as_f64().unwrap()).fold(f64::MIN, f64::max);
            assert!(number.as_f64().unwrap() <= best, "{number} {top}");
        }
        // One prompt of ids, its text, and no new token say the same.
        let alone = ask(json!(prompts[i]), 1);
        assert_eq!(alone[0]["logprobs"], *logprobs);
        assert_eq!(ask(json!(format!("{context}{rest}")), 1)[0]["logprobs"], *logprobs);
        let only = ask(json!(prompts[i]), 0);
        assert_eq!(only[0]["logprobs"]["token_logprobs"], json!(numbers[..n]));
        assert_eq!(only[0]["text"], spelled);
    }
    // The most probable token is told by the same number twice, bit for bit: what greedy means to a harness.
    let best = |top: &Value| top.as_object().unwrap().values().map(|x| x.as_f64().unwrap()).fold(f64::MIN, f64::max);
    let greedy = |text: &&str| (text.to_string(), ask(json!(ids(text)), 1)[0]["logprobs"].clone());
    // A new token that pads the vocabulary has no text that could be asked again.
    let (text, greedy) = (["abcdefgh", "the mill", "an inn", "beer", "iron", "z"].iter().map(greedy))
        .find(|(text, logprobs)| logprobs["tokens"][text.len()] != "")
        .expect("some new token has a text");
    let at = text.len();
    let text = text + greedy["tokens"][at].as_str().unwrap();
    let scored = ask(json!(text), 1)[0]["logprobs"].clone();
    for logprobs in [greedy, scored] {
        assert_eq!(logprobs["token_logprobs"][at].as_f64().unwrap(), best(&logprobs["top_logprobs"][at]), "{logprobs}");
    }
}

#[test]
fn embeddings_are_unit_vectors_in_either_form() {
    let server = Running::start(&[]);
    let ask = |format: &str| {
        let body = json!({"model": "words", "input": ["the mill", "iron"], "encoding_format": format});
        server.post("/v1/embeddings", &body).json()
    };
    let floats = ask("float");
    let vector: Vec<f32> =
        floats["data"][1]["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    assert!((vector.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(ask("base64")["data"][1]["embedding"], json!(handmill::serve::http::base64(&bytes)));
    let alone = server.post("/v1/embeddings", &json!({"model": "words", "input": "iron"})).json();
    assert_eq!(alone["data"][0]["embedding"], floats["data"][1]["embedding"], "whatever is beside it");
    let missing = server.post("/v1/embeddings", &json!({"model": "tiny", "input": "x"}));
    assert_eq!(missing.fault(), (404, "model".into(), "model_not_found".into()));
}

#[test]
fn an_index_answers_with_citations_or_not_at_all() {
    let server = Running::start(&["--max-tokens", "8"]);
    for stream in [false, true] {
        let reply = server.chat(&question("one+docs", "the forge makes nails from iron", json!({"stream": stream})));
        let citations = match stream {
            false => reply.json()["choices"][0]["message"]["citations"].clone(),
            true => reply.events().last().unwrap()["choices"][0]["delta"]["citations"].clone(),
        };
        let first = &citations[0];
        assert_eq!((&first["n"], first["lines"].as_array().unwrap().len()), (&json!(1), 2));
        assert!(first["path"].as_str().unwrap().ends_with("<b>forge.md"), "{first}");
        assert!(first["text"].as_str().unwrap().contains("<script>") && first["score"].as_f64().unwrap() > 0.3);
        let none = server.chat(&question("one+docs", "zzzz qqqq", json!({"stream": stream})));
        assert_eq!(none.chat(), "No relevant passage was found in the documents.", "{}", none.body);
    }
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("handmill_retrieval_refusals_total{index=\"docs\"} 2"), "{metrics}");
    let plain = server.post("/v1/completions", &json!({"model": "one+docs", "prompt": "x"}));
    assert_eq!(plain.fault().0, 400);
}

#[test]
fn metrics_are_well_formed_and_count() {
    let server = Running::start(&[]);
    for _ in 0..3 {
        server.chat(&question("one", "hello", json!({})));
    }
    // The engine adds a pass up after it has told its tokens.
    server.until("all tokens are counted", || server.status()["generation_tokens"] == 36);
    let metrics = server.get("/metrics");
    assert!(metrics.head.contains("text/plain; version=0.0.4"), "{}", metrics.head);
    for line in [
        "vllm:request_success_total{finished_reason=\"length\",model_name=\"tiny\"} 3",
        "vllm:generation_tokens_total{model_name=\"tiny\"} 36",
        "vllm:e2e_request_latency_seconds_count{model_name=\"tiny\"} 3",
        "vllm:inter_token_latency_seconds_count{model_name=\"tiny\"} 33",
        "vllm:num_requests_running{model_name=\"tiny\"} 0",
        "handmill_cache_tokens{model_name=\"tiny\"} 8192",
    ] {
        assert!(metrics.body.lines().any(|found| found == line), "{line}\n{}", metrics.body);
    }
    // The rules of the text format: each sample follows its HELP and TYPE, counters end in _total.
    let mut types: std::collections::BTreeMap<&str, &str> = Default::default();
    for line in metrics.body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(types.insert(name, kind).is_none(), "{name} twice");
            assert!(kind != "counter" || name.ends_with("_total"), "{name}");
            assert!(metrics.body.contains(&format!("# HELP {name} ")), "{name}");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            assert!(types.contains_key(name) || base.is_some_and(|base| types[base] == "histogram"), "{line}");
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
        }
    }
}
