//! The real models on the first adapter: a software one where there is no other, so a few tokens only.

use super::adapter;
use super::real::{expected, ids, json, minilm_embedder, model, smollm2, LOGITS};
use handmill::model::generate::{Embedder, GenerateOptions, LanguageModel};
use handmill::model::sampler::SamplerSettings;
use handmill::model::weights::LoadOptions;
use std::ops::ControlFlow;
use std::sync::OnceLock;

/// SmolLM2 on the adapter, opened once.
fn on_adapter() -> Option<&'static LanguageModel> {
    static MODEL: OnceLock<Option<LanguageModel>> = OnceLock::new();
    let path = || model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let open = |device| LanguageModel::open(&path(), device, &LoadOptions::default()).unwrap();
    MODEL.get_or_init(|| adapter().map(open)).as_ref()
}

#[test]
fn smollm2_perplexity_is_that_of_the_cpu_and_of_transformers() {
    let Some(model) = on_adapter() else { return };
    let ids: Vec<u32> = expected("ppl.ids").iter().take(64).map(|&id| id as u32).collect();
    let (got, on_cpu) = (model.evaluate(&ids).unwrap(), smollm2().evaluate(&ids).unwrap());
    let transformers = expected("ppl.logprobs");
    for (i, (got, on_cpu)) in got.logprobs.iter().zip(&on_cpu.logprobs).enumerate() {
        // A log-probability is a logit less a mean of logits.
        assert!((got - on_cpu).abs() < 2.0 * LOGITS as f32, "token {i}: {got}, {on_cpu} on the CPU");
        assert!((*got as f64 - transformers[i]).abs() < 2.0 * LOGITS, "token {i}: {got}, {}", transformers[i]);
    }
    // And so for their mean, of which the perplexity is the exponential.
    let off = (got.perplexity / on_cpu.perplexity).ln().abs();
    assert!(off < 2.0 * LOGITS, "perplexity {}, {} on the CPU", got.perplexity, on_cpu.perplexity);
}

#[test]
fn smollm2_continues_token_by_token() {
    let Some(model) = on_adapter() else { return };
    let prompt = &json("smollm2_transformers_fp32.json")["prompts"][0];
    let (prompt_ids, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy32_ids"]));
    let margins = prompt["greedy32_top1_minus_top2"].as_array().unwrap();
    let sure = margins.iter().position(|margin| margin.as_f64().unwrap() < 2.0 * LOGITS).unwrap_or(32).min(6);
    let options = GenerateOptions { sampler: SamplerSettings::default(), max_tokens: 6, stop: Vec::new() };
    let mut session = model.session(prompt_ids.len(), 6).unwrap();
    let generated = model.generate(&mut session, &prompt_ids, &options, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(generated.ids[..sure], greedy[..sure], "{sure} tokens are sure");
    assert!(sure > 2);
}

#[test]
fn minilm_vectors_are_those_of_the_cpu() {
    let Some(device) = adapter() else { return };
    let fixture = json("minilm_sentences.json");
    let sentences: Vec<&str> = fixture["sentences"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    let embedder = Embedder::open(&model("minilm"), device, &LoadOptions::default()).unwrap();
    let (got, on_cpu) =
        (embedder.embed_lines(&sentences[..8]).unwrap(), minilm_embedder().embed_lines(&sentences[..8]).unwrap());
    let off = got.iter().zip(&on_cpu).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Each is within 1e-5 of the reference in f64.
    assert!(off < 2e-5, "off by {off:e}");
}
