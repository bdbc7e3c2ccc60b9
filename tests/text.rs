//! Text in and out: the tokenizer against llama.cpp, chat templates against Jinja2, the sampler against its
//! distributions. Needs the models: run `tools/fetch_models` once, or set HANDMILL_MODELS.

#[path = "text/sampler.rs"]
mod sampler;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use handmill::model::chat::{ChatTemplate, Message};
use handmill::model::tokenizer::{GgufVocab, Tokenizer};
use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
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

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
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

#[test]
fn the_perplexity_text_and_prompts_have_the_ids_of_their_fixtures() {
    let header = smollm2();
    let tokenizer = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    let bytes = std::fs::read(fixtures().join("smollm2_transformers_fp32.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let words = tensors.tensor("ppl.ids").unwrap().data().chunks_exact(4);
    let expected: Vec<u32> = words.map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
    let text = std::fs::read_to_string(fixtures().join("ppl_text.txt")).unwrap();
    assert_eq!(tokenizer.encode(&text).unwrap()[..2048], expected);
    for prompt in fixture("smollm2_transformers_fp32.json")["prompts"].as_array().unwrap() {
        assert_eq!(tokenizer.encode(prompt["text"].as_str().unwrap()).unwrap(), ids(&prompt["ids"]));
    }
}

#[test]
fn smollm2_knows_its_tokens() {
    fn shared_between_threads<T: Send + Sync>(_: &T) {}
    let header = smollm2();
    let tokenizer = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    shared_between_threads(&tokenizer);
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.eot(), tokenizer.add_bos()),
        (Some(1), Some(2), None, false)
    );
    assert_eq!(tokenizer.id("<|im_end|>"), Some(2));
    assert_eq!(tokenizer.token(905).as_deref(), Some("Ġworld"));
    assert_eq!((tokenizer.id("no such token"), tokenizer.token(49152)), (None, None));
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(905) && !tokenizer.is_special(49152));

    let turn = tokenizer.encode("<|im_start|>user\nHi<|im_end|>").unwrap();
    assert_eq!(turn, [1, 4093, 198, 26843, 2]);
    assert_eq!(tokenizer.decode(&turn, false).unwrap(), "<|im_start|>user\nHi<|im_end|>");
    assert_eq!(tokenizer.decode(&turn, true).unwrap(), "user\nHi");
    let told = tokenizer.decode(&[905, 49152], false).unwrap_err().to_string();
    assert_eq!(told, "token id 49152 is not in the vocabulary of 49152 ids");
    assert_eq!(tokenizer.encode_sentence("a b c", 2).unwrap(), tokenizer.encode("a b").unwrap());
}

#[test]
fn plain_text_never_gives_a_special_token() {
    let header = smollm2();
    let tokenizer = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    let parts =
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<|", "|>", "<", " user", "\n", "é", "im_end"];
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..2000 {
        let n = rng.next_u32() % 8;
        let text: String = (0..n).map(|_| parts[rng.next_u32() as usize % parts.len()]).collect();
        let found = tokenizer.encode_plain(&text).unwrap();
        assert!(!found.iter().any(|&id| tokenizer.is_special(id)), "{text:?}: {found:?}");
        assert_eq!(tokenizer.decode(&found, true).unwrap(), text);
    }
}

#[test]
fn a_blank_run_of_a_million_characters_keeps_its_text() {
    let header = smollm2();
    let tokenizer = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    let text = " ".repeat(1_200_000) + "x y";
    assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap(), false).unwrap(), text);
}

/// Pushes `ids` one at a time; gives all the text and checks that no piece is empty.
fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = tokenizer.decoder(skip_special);
    let mut text = String::new();
    for &id in ids {
        if let Some(piece) = decoder.push(id).unwrap() {
            assert!(!piece.is_empty());
            text += &piece;
        }
    }
    text + &decoder.finish()
}

#[test]
fn a_stream_decodes_to_the_same_text() {
    let header = smollm2();
    let smollm2 = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    let minilm = Tokenizer::from_json_file(&model("minilm/tokenizer.json")).unwrap();
    for case in fixture("tokens_llama_cpp.json")["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        for skip in [false, true] {
            let ids = smollm2.encode(text).unwrap();
            assert_eq!(stream(&smollm2, &ids, skip), smollm2.decode(&ids, skip).unwrap());
            let ids = minilm.encode_sentence(text, 64).unwrap();
            assert_eq!(stream(&minilm, &ids, skip), minilm.decode(&ids, skip).unwrap(), "{text:?}");
        }
    }
    // Ids at random: broken UTF-8 of every kind. 273 is past the specials and the bytes of SmolLM2.
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for round in 0..500 {
        let top = if round % 2 == 0 { 273 } else { 49152 };
        let ids: Vec<u32> = (0..40).map(|_| rng.next_u32() % top).collect();
        assert_eq!(stream(&smollm2, &ids, false), smollm2.decode(&ids, false).unwrap(), "{ids:?}");
    }
}

#[test]
fn a_character_is_printed_when_it_is_whole_and_not_before() {
    let header = smollm2();
    let tokenizer = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    let bytes = |text: &str| -> Vec<u32> {
        let spelt = |b: u8| format!("{}", char::from_u32(b as u32 + if b < 0xa1 { 0xa2 } else { 0 }).unwrap());
        text.bytes().map(|b| tokenizer.id(&spelt(b)).unwrap()).collect()
    };
    let mut decoder = tokenizer.decoder(false);
    let mut pieces = Vec::new();
    for id in bytes("é👍") {
        pieces.push(decoder.push(id).unwrap());
    }
    let some = |s: &str| Some(s.to_string());
    assert_eq!(pieces, [None, some("é"), None, None, None, some("👍")]);
    // Cut off by another character, and by the end.
    assert_eq!(decoder.push(bytes("👍")[0]).unwrap(), None);
    assert_eq!(decoder.push(tokenizer.id("a").unwrap()).unwrap(), some("\u{fffd}a"));
    assert_eq!(decoder.push(bytes("👍")[0]).unwrap(), None);
    assert!(decoder.push(49152).is_err());
    assert_eq!(decoder.finish(), "\u{fffd}");
}

#[test]
fn a_sentencepiece_tokenizer_json_streams_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "ab"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": {"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": ["▁ a", "▁ b", "a b"]},
    });
    std::fs::write(&path, json.to_string()).unwrap();
    let mut tokenizer = Tokenizer::from_json_file(&path).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.add_bos(), tokenizer.eos()), (Some(1), true, None));
    tokenizer.set_ends(Some(1), Some(2), None, true).unwrap();
    assert_eq!(tokenizer.eos(), Some(2));
    assert!(tokenizer.set_ends(None, Some(265), None, false).is_err());

    let text = "a b é👍 ab";
    let ids = tokenizer.encode_sentence(text, 100).unwrap();
    assert_eq!(ids[..4], [1, 6, 7, 3]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    assert_eq!(stream(&tokenizer, &ids, true), text);
    assert_eq!(stream(&tokenizer, &[6, 2, 7], true), "a b"); // a skipped token between
    let mut decoder = tokenizer.decoder(true);
    let pieces: Vec<_> = ids.iter().filter_map(|&id| decoder.push(id).unwrap()).collect();
    assert_eq!(pieces, ["a", " b", " ", "é", "👍", " a", "b"]);
}

#[test]
fn sentences_are_framed_and_cut_for_minilm() {
    let tokenizer = Tokenizer::from_json_file(&model("minilm/tokenizer.json")).unwrap();
    let fixture = fixture("minilm_sentences.json");
    for (text, expected) in
        fixture["sentences"].as_array().unwrap().iter().zip(fixture["input_ids"].as_array().unwrap())
    {
        assert_eq!(tokenizer.encode_sentence(text.as_str().unwrap(), 256).unwrap(), ids(expected), "{text}");
    }
    let (cls, sep, word) = (101, 102, 2773);
    assert_eq!(tokenizer.encode_sentence("", 256).unwrap(), [cls, sep]);
    let long = tokenizer.encode_sentence(&"word ".repeat(1000), 256).unwrap();
    assert_eq!(long, [vec![cls], vec![word; 254], vec![sep]].concat());
    assert_eq!(tokenizer.encode(&"word ".repeat(1000)).unwrap(), [word; 1000]); // neither cut nor padded to 128
    assert_eq!(tokenizer.encode_sentence("word word", 3).unwrap(), [cls, word, sep]);
    let told = tokenizer.encode_sentence("word", 2).unwrap_err().to_string();
    assert_eq!(told, "a sentence of at most 2 tokens has no room for text beside its 2 special tokens");
    assert_eq!(tokenizer.decode(&[cls, 7592, 1010, 2088, 999, sep], true).unwrap(), "hello, world!");
    assert!(!tokenizer.encode_plain("a [SEP] b [CLS]").unwrap().iter().any(|&id| tokenizer.is_special(id)));
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos()), (30522, Some(cls)));
    assert!(tokenizer.decode(&[30522], false).is_err());
}

#[test]
fn a_broken_gguf_vocabulary_is_told_in_words() {
    let tokens = || vec!["<|end|>", "a", "b", "ab", "Ġ"];
    let good = || GgufVocab {
        model: "gpt2",
        pre: "gpt-2",
        tokens: tokens(),
        token_types: vec![3, 1, 1, 1, 1],
        merges: vec!["a b"],
        eos: Some(0),
        ..GgufVocab::default()
    };
    let tokenizer = Tokenizer::from_gguf(good()).unwrap();
    assert_eq!(tokenizer.encode("ab a<|end|>").unwrap(), [3, 4, 1, 0]);
    let untyped = Tokenizer::from_gguf(GgufVocab { token_types: vec![], ..good() }).unwrap();
    assert_eq!(untyped.encode("<|end|>").unwrap(), Vec::<u32>::new()); // no byte of it has a token
    let typed = |types: &[i32]| GgufVocab { token_types: types.to_vec(), ..good() };
    let user_defined = Tokenizer::from_gguf(typed(&[4, 1, 1, 1, 1])).unwrap();
    assert_eq!(user_defined.encode_plain("a<|end|>").unwrap(), [1, 0]);
    assert_eq!(user_defined.decode(&[1, 0], true).unwrap(), "a<|end|>");

    let with = |tokens: &[&'static str], types: &[i32]| GgufVocab { tokens: tokens.to_vec(), ..typed(types) };
    let merging = |merges: &[&'static str]| GgufVocab { merges: merges.to_vec(), ..good() };
    for (vocab, told) in [
        (
            GgufVocab { model: "llama", ..good() },
            "tokenizer.ggml.model is 'llama', which is not supported; known: gpt2",
        ),
        (GgufVocab { model: "bert", ..good() }, "'bert'"),
        (GgufVocab { pre: "tekken", ..good() }, "'tekken', which is not supported; known: smollm, llama-bpe, llama3"),
        (with(&[], &[]), "tokenizer.ggml.tokens has 0 tokens"),
        (typed(&[3, 1, 1, 1]), "token_type has 4 entries for 5 tokens"),
        (typed(&[3, 1, 1, 1, 1, 1]), "token_type has 6 entries for 5 tokens"),
        (typed(&[3, 1, 1, 1, 7]), "token 4 'Ġ' has type 7"),
        (typed(&[3, -1, 1, 1, 1]), "token 1 'a' has type -1"),
        (with(&["a", "b", "a"], &[1, 1, 1]), "tokens 0 and 2 are both 'a'"),
        (merging(&["a b", "a x"]), "merge 1 'a x' needs 'x', which is not a token"),
        (merging(&["b a"]), "merge 0 'b a' needs 'ba', which is not a token"),
        (merging(&["ab"]), "merge 0 'ab' is not two tokens"),
        (merging(&[""]), "merge 0 '' is not two tokens"),
        (merging(&["a b c"]), "merge 0 'a b c' needs 'b c'"),
        (GgufVocab { bos: Some(5), ..good() }, "tokenizer.ggml.bos_token_id is 5; there are 5 tokens"),
        (GgufVocab { eot: Some(u32::MAX), ..good() }, "tokenizer.ggml.eot_token_id is 4294967295"),
    ] {
        let error = Tokenizer::from_gguf(vocab).err().unwrap_or_else(|| panic!("accepted: {told}")).to_string();
        assert!(error.contains(told), "{error:?} does not say {told:?}");
    }
    let long = "x".repeat(1 << 20) + "\u{1b}[31m";
    let error = Tokenizer::from_gguf(GgufVocab { pre: &long, ..good() }).err().unwrap().to_string();
    assert!(error.len() < 1000 && !error.contains('\u{1b}'), "{error}");
}

#[test]
fn a_broken_tokenizer_json_is_told_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let told = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Tokenizer::from_json_file(&path).err().map(|e| e.to_string());
        assert!(error.iter().all(|e| e.contains("tokenizer.json") && e.len() < 2000), "{error:?}");
        error
    };
    assert!(Tokenizer::from_json_file(&folder.path().join("none")).err().unwrap().to_string().contains("cannot read"));
    let bpe = |vocab: &str, merges: &str| {
        format!(r#"{{"version":"1.0","added_tokens":[],"model":{{"type":"BPE","vocab":{vocab},"merges":{merges}}}}}"#)
    };
    assert_eq!(told(bpe(r#"{"a":0,"b":1,"ab":2}"#, r#"["a b"]"#).as_bytes()), None);
    for hostile in [
        String::new(),
        "{}".into(),
        "[".repeat(100_000),
        "null".into(),
        bpe("{}", "[]"),
        bpe(r#"{"a":4294967295}"#, "[]"),
        bpe(r#"{"a":-1}"#, "[]"),
        bpe(r#"{"a":0,"b":1}"#, r#"["a b"]"#), // its merge is longer than every token
        bpe(r#"{"a":0}"#, r#"["a x"]"#),
        bpe(r#"{"a":0,"b":1,"ab":2}"#, r#"["ab"]"#),
        bpe(r#"{"a":0}"#, "[]").replace(
            r#""added_tokens":[],"#,
            r#""added_tokens":[],"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"X",
            "type_id":0}}],"pair":[],"special_tokens":{}},"#,
        ),
    ] {
        assert!(told(hostile.as_bytes()).is_some(), "accepted {}", &hostile[..hostile.len().min(300)]);
    }
    // A real file cut short, or with a byte changed, loads or is refused; it never ends the process.
    let good = std::fs::read(model("minilm/tokenizer.json")).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for round in 0..40 {
        let mut bytes = good.clone();
        // The head and the tail hold the structure, the middle 30 000 words alike.
        let at = rng.next_u32() as usize % 4000;
        let at = if round % 4 == 3 { good.len() - 1 - at } else { at };
        match round % 2 {
            0 => bytes[at] = rng.next_u32() as u8,
            _ => bytes.truncate(at),
        }
        let error = told(&bytes);
        assert!(round % 2 == 0 || error.is_some());
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

#[test]
fn smollm2_has_a_chat_template_that_renders() {
    let header = smollm2();
    let tokenizer = Tokenizer::from_gguf(header.vocab("smollm")).unwrap();
    let template =
        ChatTemplate::from_str(&header.strings["tokenizer.chat_template"], "<|im_start|>", "<|im_end|>").unwrap();
    let text = template.render(&[Message::new("user", "Hi")], true).unwrap();
    let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    assert_eq!(text, format!("{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"));
    let ids = tokenizer.encode(&text).unwrap();
    assert_eq!(ids.iter().filter(|&&id| tokenizer.is_special(id)).count(), 5);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

/// What a template says of one message from the user.
fn rendered(template: &str) -> Result<String, String> {
    let template = ChatTemplate::from_str(template, "<s>", "</s>").map_err(|e| e.to_string())?;
    template.render(&[Message::new("user", "Hi")], false).map_err(|e| e.to_string())
}

#[test]
fn template_errors_name_the_line_and_the_roles() {
    for (template, told) in [
        ("a\n{% if %}\n", "the chat template does not parse: line 2: syntax error: "),
        ("{% for m in messages %}", "the chat template does not parse: line 1: "),
        ("\n\n{{ raise_exception('users only') }}", "the chat template failed: line 3: users only (messages: user)"),
        ("\n{{ messages[3].content.x }}", "the chat template failed: line 2: undefined value"),
        ("{{ messages|nope }}", "line 1: unknown filter: filter nope is unknown"),
        ("{{ messages|tojson(sort=1) }}", "line 1: too many arguments: unknown keyword argument 'sort'"),
        ("{% include 'other' %}", "line 1: template not found"),
        ("{{ strftime_now('%Q') }}", "line 1: strftime_now does not know %Q"),
    ] {
        let error = rendered(template).unwrap_err();
        assert!(error.contains(told), "{template:?}: {error:?} does not say {told:?}");
    }
    let refuses = ChatTemplate::from_str("{{ raise_exception('no') }}", "", "").unwrap();
    let many: Vec<Message> = (0..100).map(|_| Message::new("assistant", "x")).collect();
    assert!(refuses.render(&many, false).unwrap_err().to_string().ends_with("assistant, assistant, … 100 in all)"));
    assert!(refuses.render(&[], false).unwrap_err().to_string().ends_with("(messages: none)"));
    let year: u32 = rendered("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2024);
}

#[test]
fn a_hostile_template_ends_in_an_error() {
    let grow = |step: &str| {
        let start = "{% set ns = namespace(x='ab', l=[], d={}) %}{% for i in range(99999) %}{% set ";
        [start, step, " %}{% endfor %}{{ ns.x|length }}"].concat()
    };
    let templates = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        grow("ns.x = ns.x ~ ns.x"),
        grow("ns.x = ns.x + ns.x"),
        grow("ns.x = ns.x.replace('a', ns.x)"),
        grow("ns.x = ns.x.join([ns.x, ns.x, ns.x])"),
        grow("ns.x = ns.x|replace('a', ns.x)"),
        "{{ ('a' * 999999).replace('a', 'b' * 999999)|length }}".into(),
        "{{ ('a' * 999999).join('b' * 999999)|length }}".into(),
        "{{ '{:999999999}'.format(1) }}".into(),
        "{{ 'a' * 10 ** 12 }}".into(),
        grow("ns.l = [ns.l, ns.l]").replace("99999", "60").replace("ns.x|length", "ns.l|tojson"),
        format!("{{{{ {}1{} }}}}", "[".repeat(99_999), "]".repeat(99_999)),
        "{% if true %}".repeat(9999) + &"{% endif %}".repeat(9999),
        "x".repeat(300_000),
    ];
    for template in templates {
        let start = std::time::Instant::now();
        let error = rendered(&template).err().unwrap_or_else(|| panic!("rendered {template:.200}"));
        assert!(start.elapsed().as_secs() < 9, "{error}: {template:.200}"); // ended by itself, not by the deadline
    }
    // What nests deep is taken down again without a stack overflow, whether or not it renders.
    for template in [grow("ns.l = [ns.l]"), grow("ns.d = {'k': ns.d}"), grow("ns.l = [ns.l] if ns.l == ns.l else 1")] {
        let _ = rendered(&template);
        let _ = rendered(&template.replace("ns.x|length", "ns.l"));
        let _ = rendered(&template.replace("ns.x|length", "ns.l|tojson"));
    }
    for operator in ["1+", "not ", "-", "x.y if "] {
        let _ = rendered(&format!("{{{{ {}1 }}}}", operator.repeat(200_000 / operator.len())));
    }
    let _ = rendered(&format!("{{{{ 1{} }}}}", "|int".repeat(60_000)));
}
