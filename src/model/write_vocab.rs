//! The arrays of a GGUF vocabulary from a `tokenizer.json`, where GGUF has a word for what it does.
//!
//! GGUF names a pre-tokenizer; `tokenizer.json` spells it out. The name is given only where the spelling is, step by
//! step, that of one in [`PRE_TOKENIZERS`]; anything else is refused in words.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::hf::HfDir;
use super::tokenizer::PRE_TOKENIZERS;
use crate::error::{quote, Error};

const FILE: &str = "tokenizer.json";

/// What `tokenizer.ggml.*` needs.
pub(super) struct Vocab {
    /// `tokenizer.ggml.pre`.
    pub pre: &'static str,
    /// By id; ids that no token has are `[PAD123]`, as other converters write.
    pub tokens: Vec<String>,
    /// 1 normal, 3 control, 4 user-defined, 5 unused.
    pub types: Vec<i32>,
    /// "left right", best first.
    pub merges: Vec<String>,
}

#[derive(Deserialize)]
struct Json {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Step>,
    pre_tokenizer: Option<Step>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// A normalizer or pre-tokenizer, with the fields of all that are known here.
#[derive(Deserialize)]
struct Step {
    r#type: String,
    #[serde(default)]
    pretokenizers: Vec<Step>,
    individual_digits: Option<bool>,
    pattern: Option<Pattern>,
    behavior: Option<String>,
    invert: Option<bool>,
    add_prefix_space: Option<bool>,
    use_regex: Option<bool>,
}

#[derive(Deserialize)]
enum Pattern {
    Regex(String),
    String(#[allow(dead_code)] String),
}

#[derive(Deserialize)]
struct Model {
    r#type: Option<String>,
    vocab: BTreeMap<String, u32>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// "left right" in older files, a pair in newer ones.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

impl Vocab {
    /// The vocabulary of a directory whose model has `rows` rows of embedding.
    pub fn open(dir: &HfDir, rows: usize) -> Result<Vocab, Error> {
        let path = dir.path.join(FILE);
        let json: Json = dir.json(FILE)?.ok_or_else(|| Error::file(&dir.path, "holds no tokenizer.json"))?;
        Vocab::new(json, rows).map_err(|what| Error::file(&path, what))
    }

    fn new(json: Json, rows: usize) -> Result<Vocab, String> {
        let Model { r#type, vocab, merges, byte_fallback, continuing_subword_prefix, end_of_word_suffix, .. } =
            &json.model;
        let affixes =
            [continuing_subword_prefix, end_of_word_suffix].into_iter().flatten().any(|text| !text.is_empty());
        if r#type.as_deref().unwrap_or("BPE") != "BPE" || *byte_fallback || affixes {
            return Err("is no byte-level BPE tokenizer, the kind that can be written to GGUF".into());
        }
        let pre = pre_tokenizer(&json)?;

        let named = vocab.iter().map(|(token, &id)| (id, token, 1));
        let added = json.added_tokens.iter().map(|added| (added.id, &added.content, if added.special { 3 } else { 4 }));
        let mut slots: Vec<Option<(&String, i32)>> = vec![None; rows];
        for (id, token, kind) in named.chain(added) {
            let slot = slots.get_mut(id as usize);
            let slot = slot.ok_or_else(|| format!("token {} has id {id}; the model has {rows} rows", quote(token)))?;
            if let Some((other, _)) = slot.filter(|(other, _)| *other != token) {
                return Err(format!("tokens {} and {} share id {id}", quote(other), quote(token)));
            }
            *slot = Some((token, kind));
        }
        let (mut tokens, mut types) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for (id, slot) in slots.into_iter().enumerate() {
            let (token, kind) = slot.map_or((format!("[PAD{id}]"), 5), |(token, kind)| (token.clone(), kind));
            tokens.push(token);
            types.push(kind);
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = tokens.iter().find(|token| !seen.insert(token.as_str())) {
            return Err(format!("token {} has two ids", quote(twice)));
        }
        let merges = merges.iter().map(|merge| match merge {
            Merge::Text(text) => Ok(text.clone()),
            Merge::Pair(left, right) if !left.contains(' ') && !right.contains(' ') => Ok(format!("{left} {right}")),
            Merge::Pair(left, right) => {
                Err(format!("merge of {} and {} has a space in it, which GGUF cannot hold", quote(left), quote(right)))
            }
        });
        Ok(Vocab { pre, tokens, types, merges: merges.collect::<Result<_, _>>()? })
    }
}

/// GGUF's name for what comes before the merging.
fn pre_tokenizer(json: &Json) -> Result<&'static str, String> {
    let mut steps = Vec::new();
    match &json.pre_tokenizer {
        Some(step) => flatten(step, &mut steps)?,
        None => return Err("has no pre-tokenizer".into()),
    }
    let Some((bytes, splits)) = steps.split_last().filter(|(last, _)| last.r#type == "ByteLevel") else {
        return Err("does not end its pre-tokenizer in ByteLevel".into());
    };
    if bytes.add_prefix_space != Some(false) {
        return Err("puts a space before each text (add_prefix_space), which GGUF has no word for".into());
    }
    let gpt2 = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&"gpt-2")).map_or("", |pre| pre.splits[0]);
    let mut found = splits.iter().map(|step| split(step)).collect::<Result<Vec<_>, _>>()?;
    if bytes.use_regex != Some(false) {
        found.push(gpt2.to_string());
    }
    let pre = PRE_TOKENIZERS.iter().find(|pre| pre.splits == found && pre.ignore_merges == json.model.ignore_merges);
    let name = pre.map(|pre| pre.names[0]).ok_or("splits text in a way that GGUF has no known name for")?;
    // What wrote the GGUF files of this one left its NFC out.
    match json.normalizer.as_ref().map(|step| step.r#type.as_str()) {
        None => Ok(name),
        Some("NFC") if name == "qwen2" => Ok(name),
        Some(other) => Err(format!("has the normalizer {}, which GGUF has no word for", quote(other))),
    }
}

/// The steps of sequences within sequences; refused beyond any that exist.
fn flatten<'a>(step: &'a Step, out: &mut Vec<&'a Step>) -> Result<(), String> {
    if out.len() > 16 {
        return Err("has a pre-tokenizer of more than 16 steps".into());
    }
    match step.r#type.as_str() {
        "Sequence" => step.pretokenizers.iter().try_for_each(|step| flatten(step, out)),
        _ => {
            out.push(step);
            Ok(())
        }
    }
}

/// A step as the expression that [`PRE_TOKENIZERS`] would split by.
fn split(step: &Step) -> Result<String, String> {
    match (step.r#type.as_str(), &step.pattern) {
        ("Digits", _) if step.individual_digits == Some(true) => Ok(r"\p{N}".to_string()),
        ("Split", Some(Pattern::Regex(regex)))
            if step.behavior.as_deref() == Some("Isolated") && step.invert != Some(true) =>
        {
            // Spelled without the flag there. ſ, which the flag lets stand for s, is the one difference.
            let long = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]";
            Ok(regex.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", long))
        }
        (other, _) => Err(format!("splits text by {} in a way that GGUF has no known name for", quote(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocab(pre: &str, normalizer: &str, ignore_merges: bool) -> Result<Vocab, String> {
        let text = format!(
            r#"{{"added_tokens": [{{"id": 3, "content": "<s>", "special": true}}, {{"id": 5, "content": "+"}}],
                "normalizer": {normalizer}, "pre_tokenizer": {pre},
                "model": {{"type": "BPE", "ignore_merges": {ignore_merges}, "vocab": {{"a": 0, "b": 1, "ab": 2}},
                           "merges": [["a", "b"], "a b"]}}}}"#
        );
        Vocab::new(serde_json::from_str(&text).unwrap(), 6)
    }

    const BYTES: &str = r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#;

    #[test]
    fn arrays_follow_the_ids() {
        let vocab = vocab(BYTES, "null", false).unwrap();
        assert_eq!(vocab.tokens, ["a", "b", "ab", "<s>", "[PAD4]", "+"]);
        assert_eq!(vocab.types, [1, 1, 1, 3, 5, 4]);
        assert_eq!(vocab.merges, ["a b", "a b"]);
    }

    #[test]
    fn pre_tokenizers_are_named_only_when_they_are_known() {
        let split = |regex: &str| {
            let pattern = serde_json::json!({ "Regex": regex });
            let bytes = r#"{"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}"#;
            format!(
                r#"{{"type": "Sequence", "pretokenizers": [
                    {{"type": "Split", "pattern": {pattern}, "behavior": "Isolated", "invert": false}}, {bytes}]}}"#
            )
        };
        let smollm = format!(
            r#"{{"type": "Sequence", "pretokenizers": [{{"type": "Digits", "individual_digits": true}}, {BYTES}]}}"#
        );
        let rest = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let llama = split(&format!("(?i:'s|'t|'re|'ve|'m|'ll|'d){rest}"));
        let qwen = split(&format!("(?i:'s|'t|'re|'ve|'m|'ll|'d){}", rest.replace("{1,3}", "")));
        let name = |pre: &str, normalizer: &str, ignore| vocab(pre, normalizer, ignore).map(|vocab| vocab.pre);

        assert_eq!(name(BYTES, "null", false), Ok("gpt-2"));
        assert_eq!(name(&smollm, "null", false), Ok("smollm"));
        assert_eq!(name(&llama, "null", true), Ok("llama-bpe"));
        assert_eq!(name(&qwen, r#"{"type": "NFC"}"#, false), Ok("qwen2"));
        for (pre, normalizer, ignore) in [
            (llama.as_str(), "null", false),
            (&llama, r#"{"type": "NFC"}"#, true),
            (&split(r"\w+"), "null", false),
            (&BYTES.replace("false", "true"), "null", false),
            (r#"{"type": "Metaspace"}"#, "null", false),
            ("null", "null", false),
        ] {
            assert!(name(pre, normalizer, ignore).is_err(), "{pre}");
        }
    }
}
