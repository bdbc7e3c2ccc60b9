//! SmolLM2-135M-Instruct (GGUF Q4_1) against transformers in f32 on the same weights, and all-MiniLM-L6-v2 against the
//! reference in f64 and its published similarities.

use super::reference::{minilm, Weights};
use super::{device, ptx_sim, worst};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::{Embedder, Ending, GenerateOptions, LanguageModel};
use handmill::model::llama::{Llama, Want};
use handmill::model::sampler::SamplerSettings;
use handmill::model::weights::LoadOptions;
use rayon::prelude::*;
use safetensors::{tensor::TensorView, Dtype, SafeTensors};
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Two passes in f32 may differ this much in a logit. A product of 1536 terms is off by sqrt(1536)·2⁻²⁴ = 2e-6 of them;
/// 210 independent ones make 3e-5 of the stream, of which a logit of up to 30 sums 576 terms: 1e-3 each pass.
pub const LOGITS: f64 = 2e-3;

/// A model's file or directory, in `$HANDMILL_MODELS` or the user's cache.
pub fn model(name: &str) -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let root = variable("HANDMILL_MODELS").or_else(|| Some(cache()?.join("handmill/models")));
    let path = root.expect("neither HANDMILL_MODELS nor HOME is set").join(name);
    assert!(path.exists(), "{} is missing: run tools/fetch_models, or set HANDMILL_MODELS", path.display());
    path
}

pub fn smollm2() -> &'static LanguageModel {
    static MODEL: OnceLock<LanguageModel> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
        LanguageModel::open(&path, device(), &LoadOptions::default()).unwrap()
    })
}

pub fn minilm_embedder() -> &'static Embedder {
    static MODEL: OnceLock<Embedder> = OnceLock::new();
    MODEL.get_or_init(|| Embedder::open(&model("minilm"), device(), &LoadOptions::default()).unwrap())
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The values of an F32, F64 or I32 tensor.
fn values(view: &TensorView) -> Vec<f64> {
    match view.dtype() {
        Dtype::F32 => view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
        Dtype::F64 => view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::I32 => view.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
        other => panic!("a fixture in {other}"),
    }
}

/// Tensor `name` of the SmolLM2 fixture.
pub fn expected(name: &str) -> Vec<f64> {
    let bytes = std::fs::read(fixture("smollm2_transformers_fp32.safetensors")).unwrap();
    values(&SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap())
}

fn prompts() -> Vec<Value> {
    json("smollm2_transformers_fp32.json")["prompts"].as_array().unwrap().clone()
}

#[test]
fn smollm2_logits_are_those_of_transformers() {
    let model = smollm2();
    for (i, prompt) in prompts().iter().enumerate() {
        let prompt_ids = model.prompt_ids(prompt["text"].as_str().unwrap()).unwrap();
        assert_eq!(prompt_ids, ids(&prompt["ids"]), "ids of prompt {i}");
        let mut session = model.llama.session(64).unwrap();
        let logits = model.llama.forward(&mut session, &prompt_ids, Want::Last).unwrap();
        let expected = expected(&format!("p{i}.last_logits"));
        let off = logits.iter().zip(&expected).map(|(&a, b)| (a as f64 - b).abs()).fold(0.0, f64::max);
        assert!(off < LOGITS, "prompt {i}: logits are off by {off}");
    }
}

#[test]
fn smollm2_logits_of_every_row_are_those_of_transformers() {
    let model = smollm2();
    let vocab = model.llama.config.vocab;
    for (i, prompt) in prompts().iter().enumerate() {
        let (log_sums, best) = (expected(&format!("p{i}.all_lse")), expected(&format!("p{i}.all_argmax")));
        let mut rows_seen = 0;
        let mut each = |row0: usize, rows: &[f32]| {
            for (row, m) in rows.chunks(vocab).zip(row0..) {
                let sum = row.iter().map(|&l| (l as f64 - log_sums[m]).exp()).sum::<f64>();
                assert!(sum.ln().abs() < LOGITS, "prompt {i}, row {m}: logsumexp is off by {}", sum.ln());
                // The best of transformers is within twice the error of ours.
                let max = row.iter().fold(f32::MIN, |max, &l| max.max(l));
                assert!((max - row[best[m] as usize]) as f64 <= 2.0 * LOGITS, "prompt {i}, row {m}: another best");
                rows_seen += 1;
            }
            Ok(())
        };
        let ids = ids(&prompt["ids"]);
        model.llama.forward(&mut model.llama.session(64).unwrap(), &ids, Want::All(&mut each)).unwrap();
        assert_eq!(rows_seen, ids.len());
    }
}

#[test]
fn smollm2_hidden_states_are_those_of_transformers() {
    let model = smollm2();
    let mut seen = Vec::new();
    let mut each = |layer: usize, _: usize, rows: &[f32]| {
        if [0, 1, 2, 15, 30].contains(&layer) {
            let error = worst(rows, &expected(&format!("p0.hidden_{layer}")));
            assert!(error < 1e-3, "hidden states after layer {layer} are off by {error:e}");
            seen.push(layer);
        }
        Ok(())
    };
    let ids = ids(&prompts()[0]["ids"]);
    model.llama.forward(&mut model.llama.session(8).unwrap(), &ids, Want::Hidden(&mut each)).unwrap();
    assert_eq!(seen, [0, 1, 2, 15, 30]);
}

#[test]
fn smollm2_perplexity_is_that_of_transformers() {
    let model = smollm2();
    let ids: Vec<u32> = expected("ppl.ids").iter().map(|&id| id as u32).collect();
    let text = std::fs::read_to_string(fixture("ppl_text.txt")).unwrap();
    assert_eq!(model.tokenizer.encode(&text).unwrap()[..2048], ids);

    let evaluation = model.evaluate(&ids).unwrap();
    assert!((evaluation.perplexity - 39.0278).abs() < 0.01, "perplexity {}", evaluation.perplexity);
    let expected = expected("ppl.logprobs");
    assert_eq!(evaluation.logprobs.len(), expected.len());
    let off = evaluation.logprobs.iter().zip(&expected).map(|(&a, b)| (a as f64 - b).abs()).fold(0.0, f64::max);
    // A log-probability is a logit less a mean of logits.
    assert!(off < 2.0 * LOGITS, "a log-probability is off by {off}");
}

#[test]
fn smollm2_continues_as_transformers_does() {
    let model = smollm2();
    for (i, prompt) in prompts().iter().enumerate() {
        let (expected, margins) =
            (ids(&prompt["greedy32_ids"]), prompt["greedy32_top1_minus_top2"].as_array().unwrap());
        // Where two tokens are closer than both may be off, either may be chosen, and all that follows differs.
        let sure = margins.iter().position(|margin| margin.as_f64().unwrap() < 2.0 * LOGITS).unwrap_or(32);
        let prompt_ids = ids(&prompt["ids"]);
        let mut session = model.session(prompt_ids.len(), 32).unwrap();
        let options = GenerateOptions { sampler: SamplerSettings::default(), max_tokens: 32, stop: Vec::new() };
        let mut seen = Vec::new();
        let mut on_token = |id: u32, logits: &[f32]| {
            assert_eq!(logits.len(), model.llama.config.vocab);
            seen.push(id);
            ControlFlow::Continue(())
        };
        let generated = model.generate(&mut session, &prompt_ids, &options, &mut on_token).unwrap();
        assert_eq!(seen, generated.ids);
        assert_eq!((generated.ids.len(), generated.ending), (32, Ending::MaxTokens));
        assert_eq!(generated.ids[..sure], expected[..sure], "prompt {i}, of which {sure} tokens are sure");
        assert!(generated.tokens_per_s() > 0.0 && generated.prompt_tokens_per_s() > 0.0);
    }
}

#[test]
fn smollm2_chats_and_stops() {
    let model = smollm2();
    let expected = &prompts()[1];
    let message = handmill::model::chat::Message::new("user", "Explain in one sentence why the sky is blue.");
    let prompt = model.chat_ids(&[message]).unwrap();
    assert_eq!(prompt, ids(&expected["ids"]));

    // The third prompt's greedy text would go on; any of its tokens may be named as a stop.
    let greedy = ids(&expected["greedy32_ids"]);
    let options = |stop, max_tokens| GenerateOptions { sampler: SamplerSettings::default(), max_tokens, stop };
    let mut go_on = |_: u32, _: &[f32]| ControlFlow::Continue(());
    let mut session = model.llama.session(prompt.len() + 3).unwrap();
    let stopped = model.generate(&mut session, &prompt, &options(vec![greedy[2]], 8), &mut go_on).unwrap();
    assert_eq!((stopped.ids.as_slice(), stopped.ending), (&greedy[..2], Ending::Stop(greedy[2])));
    assert!(model.stop_ids().contains(&2));

    session.truncate(0);
    let full = model.generate(&mut session, &prompt, &options(Vec::new(), 32), &mut go_on).unwrap();
    assert_eq!((full.ids.as_slice(), full.ending), (&greedy[..4], Ending::Context));
    session.truncate(0);
    let mut once = |_: u32, _: &[f32]| ControlFlow::Break(());
    let ended = model.generate(&mut session, &prompt, &options(Vec::new(), 32), &mut once).unwrap();
    assert_eq!((ended.ids.as_slice(), ended.ending), (&greedy[..1], Ending::Caller));
    let none = model.generate(&mut session, &prompt, &options(Vec::new(), 0), &mut once).unwrap();
    assert!(none.ids.is_empty());
}

/// MiniLM's tensors, read without the library.
fn minilm_weights() -> Weights {
    let bytes = std::fs::read(model("minilm").join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = tensors.iter().filter(|(_, view)| view.dtype() == Dtype::F32);
    let narrow = |view: &TensorView| values(view).into_iter().map(|v| v as f32).collect::<Vec<_>>();
    floats.map(|(name, view)| (name.to_string(), (view.shape().to_vec(), narrow(&view)))).collect()
}

#[test]
fn minilm_vectors_are_those_of_the_reference() {
    let fixture = json("minilm_sentences.json");
    let sentences: Vec<&str> = fixture["sentences"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    let embedder = minilm_embedder();
    let got = embedder.embed_lines(&sentences).unwrap();
    let weights = minilm_weights();
    let rows: Vec<_> = got.chunks(embedder.width()).zip(fixture["input_ids"].as_array().unwrap()).collect();
    rows.par_iter().enumerate().for_each(|(i, (row, sentence_ids))| {
        let sentence_ids = ids(sentence_ids);
        assert_eq!(embedder.tokenizer.encode_sentence(sentences[i], embedder.max_tokens).unwrap(), sentence_ids);
        let expected = minilm(&weights, &sentence_ids);
        let off = row.iter().zip(&expected).map(|(&a, b)| (a as f64 - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-5, "sentence {i}: off by {off:e}");
    });
}

#[test]
fn minilm_similarities_are_those_published() {
    let lines = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."];
    let embedder = minilm_embedder();
    let rows = embedder.embed_lines(&lines).unwrap();
    let rows: Vec<&[f32]> = rows.chunks(embedder.width()).collect();
    let cosine = |a: usize, b: usize| rows[a].iter().zip(rows[b]).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>();
    for (a, b, published) in [(0, 1, 0.6660), (0, 2, 0.1046), (1, 2, 0.1411), (0, 0, 1.0)] {
        // Published with four digits.
        assert!((cosine(a, b) - published).abs() < 6e-5, "{a}, {b}: {}", cosine(a, b));
    }
}

#[test]
fn batches_do_not_mix_their_sentences() {
    let embedder = minilm_embedder();
    // More tokens than one batch takes, of very different lengths, in no order.
    let lines: Vec<String> = (0..60).map(|i| vec![format!("word{i}"); (i * 37) % 90 + 1].join(" ")).collect();
    let together = embedder.embed_lines(&lines).unwrap();
    for i in [0, 1, 29, 58, 59] {
        let alone: Vec<f64> = embedder.embed_lines(&lines[i..=i]).unwrap().iter().map(|&v| v as f64).collect();
        let error = worst(&together[i * embedder.width()..][..embedder.width()], &alone);
        assert!(error < 1e-5, "line {i} depends on its batch: {error:e}");
    }
    assert!(embedder.embed_lines::<&str>(&[]).unwrap().is_empty());
    let error = embedder.bert.embed(&[vec![101, 102], vec![]]).unwrap_err().to_string();
    assert!(error.contains("sentence 1") && error.contains("1 to 512"), "{error}");
    let error = embedder.bert.embed(&[vec![101, 30522]]).unwrap_err().to_string();
    assert!(error.contains("sentence 0") && error.contains("30522"), "{error}");
}

#[test]
fn two_layers_of_smollm2_through_the_ptx_kernels() {
    let checkpoint = Checkpoint::open(&model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    let options = LoadOptions { layers: Some(2), ..LoadOptions::default() };
    let ids = ids(&prompts()[0]["ids"]);
    // A prompt, then a token by itself: kernels for many rows and for one.
    let [expected, got] = [device(), ptx_sim()].map(|device| {
        let llama = Llama::load(device, &checkpoint, &options).unwrap();
        assert_eq!(llama.layers.len(), 2);
        let mut session = llama.session(ids.len() + 1).unwrap();
        let mut logits = llama.forward(&mut session, &ids, Want::Last).unwrap().to_vec();
        logits.extend(llama.forward(&mut session, &[7], Want::Last).unwrap());
        logits
    });
    let expected: Vec<f64> = expected.iter().map(|&v| v as f64).collect();
    // The sums of at most 1536 terms are off by sqrt(1536)·2⁻²⁴ = 2.3e-6 of them; a pass of two layers chains fifteen,
    // whose errors are independent: 9e-6 of the largest logit, and two passes differ by at most both.
    let error = worst(&got, &expected);
    assert!(error < 2e-5, "logits of the executor and the CPU differ by {error:e}");
}

#[test]
fn tensor_cores_take_activations_in_bf16() {
    let checkpoint = Checkpoint::open(&model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    let [exact, rounded] = [false, true].map(|bf16| {
        let options = LoadOptions { layers: Some(1), bf16, ..LoadOptions::default() };
        Llama::load(ptx_sim(), &checkpoint, &options).unwrap()
    });
    // Few rows and many have kernels of their own.
    for tokens in [9, 33] {
        let ids: Vec<u32> = (0..tokens).map(|i| 100 + 7 * i).collect();
        let [exact, rounded] = [&exact, &rounded].map(|llama| {
            let mut session = llama.session(ids.len()).unwrap();
            llama.forward(&mut session, &ids, Want::Last).unwrap().to_vec()
        });
        let exact: Vec<f64> = exact.iter().map(|&v| v as f64).collect();
        // Both factors of each product are off by up to 2^-9 of themselves, independently: a sum by about
        // sqrt(2/3)·2^-9 = 1.6e-3 of its usual size. A layer chains four such sums, 3.2e-3; three times that is more
        // than the worst of 49,152 needs, as the measure is the largest logit. Rounding must also be seen, or the
        // kernels were others.
        let error = worst(&rounded, &exact);
        assert!((1e-5..1e-2).contains(&error), "logits of {tokens} tokens in bf16 are off by {error:e}");
    }
}

#[test]
fn minilm_through_the_ptx_kernels() {
    let lines = ["The weather is lovely today.", "It's so sunny outside!"];
    let expected = minilm_embedder().embed_lines(&lines).unwrap();
    let got =
        Embedder::open(&model("minilm"), ptx_sim(), &LoadOptions::default()).unwrap().embed_lines(&lines).unwrap();
    // Each is within 1e-5 of the reference in f64.
    let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 2e-5, "vectors of the executor and the CPU differ by {off:e}");
}

#[test]
fn a_model_of_the_other_kind_is_refused() {
    let error = LanguageModel::open(&model("minilm"), device(), &LoadOptions::default()).err().unwrap().to_string();
    assert!(error.contains("bert model"), "{error}");
    let path = model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let error = Embedder::open(&path, device(), &LoadOptions::default()).err().unwrap().to_string();
    assert!(error.contains("not a Hugging Face directory"), "{error}");
}
