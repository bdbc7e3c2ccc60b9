//! A Hugging Face directory as a whole: tokenizer, chat template, ends, evaluation and sampling of a tiny decoder.

use super::reference::{decoder, Shape, Weights};
use super::tiny::{self, LLAMA};
use super::{device, worst};
use handmill::model::chat::Message;
use handmill::model::generate::{Ending, GenerateOptions, LanguageModel};
use handmill::model::sampler::SamplerSettings;
use handmill::model::weights::LoadOptions;
use handmill::tensor::Dtype;
use serde_json::{json, Value};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

const SHAPE: Shape = Shape { vocab: 12, ..LLAMA };
const WORDS: [&str; 12] = ["</s>", "<s>", "[user]", "[bot]", "a", "b", "c", "d", "e", "f", "g", "?"];

/// A tokenizer of twelve words; the first four are special.
fn tokenizer() -> Value {
    let special = |id: usize| {
        json!({"id": id, "content": WORDS[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let vocab: serde_json::Map<_, _> = WORDS.iter().zip(0..).map(|(w, id)| (w.to_string(), Value::from(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": (0..4).map(special).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}
    })
}

/// Writes the directory; `tokenizer_config` is its `tokenizer_config.json`.
fn write(dir: &Path, tokenizer_config: Value) -> Weights {
    let weights = tiny::random(&SHAPE, 11);
    tiny::write_hf(dir, &SHAPE, &weights, Dtype::F32);
    fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), tokenizer_config.to_string()).unwrap();
    fs::write(dir.join("generation_config.json"), r#"{"bos_token_id": 1, "eos_token_id": [0, 3]}"#).unwrap();
    weights
}

fn open(dir: &Path) -> LanguageModel {
    LanguageModel::open(dir, device(), &LoadOptions::default()).unwrap()
}

#[test]
fn prompts_templates_and_ends_come_from_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let loops = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}";
    let template = format!("{{{{ bos_token }}}} {loops}{{% if add_generation_prompt %}}[bot]{{% endif %}}");
    write(dir.path(), json!({"add_bos_token": true, "chat_template": template}));
    let model = open(dir.path());
    assert_eq!(model.prompt_ids("a b zebra").unwrap(), [1, 4, 5, 11]);
    assert_eq!(model.stop_ids(), [0, 3]);
    let chat = [Message::new("user", "a b"), Message::new("bot", "c"), Message::new("user", "d")];
    assert_eq!(model.chat_ids(&chat).unwrap(), [1, 2, 4, 5, 3, 6, 2, 7, 3]);

    // A list of templates, of which one is the default; no BOS unless asked for.
    let named = |name: &str, template: &str| json!({"name": name, "template": template});
    let many = json!([named("tools", "d"), named("default", "e {{ messages[0].content }}")]);
    write(dir.path(), json!({"chat_template": many}));
    let model = open(dir.path());
    assert_eq!(model.prompt_ids("a").unwrap(), [4]);
    assert_eq!(model.chat_ids(&chat[..1]).unwrap(), [8, 4, 5]);

    // The file of its own comes first.
    fs::write(dir.path().join("chat_template.jinja"), "f {{ messages[0].content }}").unwrap();
    assert_eq!(open(dir.path()).chat_ids(&chat[..1]).unwrap(), [9, 4, 5]);

    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    write(dir.path(), json!({}));
    let error = open(dir.path()).chat_ids(&chat).unwrap_err().to_string();
    assert!(error.contains("no chat template"), "{error}");
}

#[test]
fn evaluation_is_the_references_softmax() {
    let dir = tempfile::tempdir().unwrap();
    let weights = write(dir.path(), json!({}));
    let model = open(dir.path());
    let ids: Vec<u32> = (0..600).map(|i| (i * i / 7 + i) % 12).collect();
    let evaluation = model.evaluate(&ids).unwrap();

    let (_, logits) = decoder(&SHAPE, &weights, &ids);
    let logprob = |(row, &id): (&[f64], &u32)| row[id as usize] - row.iter().map(|l| l.exp()).sum::<f64>().ln();
    let expected: Vec<f64> = logits.chunks(12).zip(&ids[1..]).map(logprob).collect();
    assert!(worst(&evaluation.logprobs, &expected) < 1e-5);
    let nll = -expected.iter().sum::<f64>() / 599.0;
    assert!((evaluation.mean_nll - nll).abs() < 1e-5 * nll, "{} {nll}", evaluation.mean_nll);
    assert!((evaluation.perplexity - nll.exp()).abs() < 1e-4 * nll.exp());

    let error = model.evaluate(&ids[..1]).unwrap_err().to_string();
    assert!(error.contains("at least 2"), "{error}");
    let error = model.evaluate(&[4; 1025]).unwrap_err().to_string();
    assert!(error.contains("1 to 1024"), "{error}");
}

#[test]
fn the_same_seed_draws_the_same_text() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), json!({}));
    let model = open(dir.path());
    let draw = |seed: u64| {
        let sampler = SamplerSettings { temperature: 1.5, seed, ..SamplerSettings::default() };
        let options = GenerateOptions { sampler, max_tokens: 40, stop: Vec::new() };
        let mut session = model.session(3, 40).unwrap();
        let generated = model.generate(&mut session, &[4, 5, 6], &options, &mut |_, _| ControlFlow::Continue(()));
        let generated = generated.unwrap();
        assert_eq!((generated.ending, session.len()), (Ending::MaxTokens, 42));
        generated.ids
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let error = model.session(2000, 1).err().unwrap().to_string();
    assert!(error.contains("2000 tokens") && error.contains("1024"), "{error}");
}
