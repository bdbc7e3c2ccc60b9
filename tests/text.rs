//! Text in and out: the tokenizer against llama.cpp, chat templates against Jinja2, the sampler against its
//! distributions. Needs the models: run `tools/fetch_models` once, or set HANDMILL_MODELS.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use handmill::model::chat::{ChatTemplate, Message};
use handmill::model::tokenizer::{GgufVocab, Tokenizer};
use serde_json::Value;

// ---------------------------------------------------------------------------------------------------- models

/// A file of the models folder; a missing one fails the test.
fn model(name: &str) -> PathBuf {
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = std::env::var_os("HOME").map(|h| Path::new(&h).join(".cache"));
        cache.or(home).unwrap_or_default().join("handmill/models")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run tools/fetch_models once", path.display());
    path
}

/// What the header of SmolLM2's GGUF says about text.
struct Header {
    strings: HashMap<String, String>,
    lists: HashMap<String, Vec<String>>,
    types: Vec<i32>,
    numbers: HashMap<String, u64>,
}

/// Reads the header of a trusted GGUF file: pairs of a name and a typed value.
fn header(path: &Path) -> Header {
    let bytes = std::fs::read(path).unwrap();
    let mut at = 16; // magic, version, tensor count
    let mut take = |n: usize| {
        at += n;
        &bytes[at - n..at]
    };
    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |n, &b| n << 8 | b as u64)
    }
    fn string<'a>(take: &mut impl FnMut(usize) -> &'a [u8]) -> String {
        let n = number(take(8)) as usize;
        String::from_utf8(take(n).to_vec()).unwrap()
    }
    let mut h = Header { strings: HashMap::new(), lists: HashMap::new(), types: Vec::new(), numbers: HashMap::new() };
    for _ in 0..number(take(8)) {
        let key = string(&mut take);
        let size = |kind: u64| [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind as usize];
        match number(take(4)) {
            8 => {
                h.strings.insert(key, string(&mut take));
            }
            9 => {
                let (kind, n) = (number(take(4)), number(take(8)) as usize);
                match (kind, key.as_str()) {
                    (8, _) => {
                        h.lists.insert(key, (0..n).map(|_| string(&mut take)).collect());
                    }
                    (5, "tokenizer.ggml.token_type") => h.types = (0..n).map(|_| number(take(4)) as i32).collect(),
                    _ => {
                        take(n * size(kind));
                    }
                }
            }
            kind => {
                h.numbers.insert(key, number(take(size(kind))));
            }
        }
    }
    h
}

impl Header {
    fn vocab<'a>(&'a self, pre: &'a str) -> GgufVocab<'a> {
        let list = |key: &str| self.lists[key].iter().map(String::as_str).collect();
        let id = |key: &str| self.numbers.get(key).map(|&n| n as u32);
        GgufVocab {
            model: &self.strings["tokenizer.ggml.model"],
            pre,
            tokens: list("tokenizer.ggml.tokens"),
            token_types: self.types.clone(),
            merges: list("tokenizer.ggml.merges"),
            bos: id("tokenizer.ggml.bos_token_id"),
            eos: id("tokenizer.ggml.eos_token_id"),
            eot: id("tokenizer.ggml.eot_token_id"),
            add_bos: self.numbers.get("tokenizer.ggml.add_bos_token") == Some(&1),
        }
    }
}

fn smollm2() -> Header {
    header(&model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

// ------------------------------------------------------------------------------------------------- tokenizer

/// The vocabulary of tools/fixtures/make_tokens.py that merges nearly any two bytes, so that ids show every split.
fn pairs_vocab(smollm2: &Header) -> (Vec<String>, Vec<String>) {
    let direct = |b: &u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others: Vec<u32> = (0..256).filter(|b| !direct(b)).collect();
    let code = |b| others.iter().position(|&o| o == b).map_or(b, |i| 256 + i as u32);
    let spell: Vec<String> = (0..256).map(|b| char::from_u32(code(b)).unwrap().to_string()).collect();

    let known = &smollm2.lists["tokenizer.ggml.tokens"];
    let special = smollm2.types.iter().take_while(|&&t| t == 3).count();
    let mut tokens: Vec<String> = known[..special].iter().chain(&spell).cloned().collect();
    let pairs = (0..known.len() - tokens.len() - 1).map(|k| k * 40503 % 65536);
    let merges: Vec<String> = pairs.map(|p| format!("{} {}", spell[p >> 8], spell[p & 255])).collect();
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    tokens.push("Ġthe".into());
    (tokens, merges)
}

#[test]
fn smollm2_tokenizes_as_llama_cpp_does() {
    let (header, fixture) = (smollm2(), fixture("tokens_llama_cpp.json"));
    let tokenizer = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["smollm2"]), "{text:?}");
        assert_eq!(tokenizer.encode_plain(text).unwrap(), ids(&case["plain"]), "plain {text:?}");
    }
}

#[test]
fn every_pre_tokenizer_splits_as_llama_cpp_does() {
    let (header, fixture) = (smollm2(), fixture("tokens_llama_cpp.json"));
    let (tokens, merges) = pairs_vocab(&header);
    for pre in ["smollm", "llama-bpe", "qwen2", "gpt-2", "default"] {
        let mut vocab = header.vocab(pre);
        vocab.tokens = tokens.iter().map(String::as_str).collect();
        vocab.merges = merges.iter().map(String::as_str).collect();
        let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
        for case in fixture["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["pairs"][pre]), "{pre}: {text:?}");
            assert_eq!(tokenizer.decode(&ids(&case["pairs"][pre]), false).unwrap(), text, "{pre}");
        }
    }
}

// ----------------------------------------------------------------------------------------------------- chat

#[test]
fn chat_templates_render_as_jinja2_does() {
    let fixture = fixture("chat_jinja2.json");
    let mut bad = Vec::new();
    for case in fixture["cases"].as_array().unwrap() {
        let text = |key: &str| case[key].as_str().map(str::to_string);
        let template = ChatTemplate::from_str(&text("template").unwrap(), "<s>", "</s>");
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let found = template.and_then(|t| t.render(&messages, case["add_generation_prompt"].as_bool().unwrap()));
        match (found, text("text"), text("error")) {
            (Ok(found), Some(text), _) if found == text => {}
            (Err(_), None, Some(_)) => {}
            (found, text, error) => bad.push(format!("{}:\n ours {found:?}\n  ref {:?}", case["name"], text.or(error))),
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
