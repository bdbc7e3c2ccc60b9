//! `handmill ask`: an answer from documents, with where it stands.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use handmill::model::chat::Message;
use handmill::model::generate::{GenerateOptions, LanguageModel};
use handmill::model::sampler::{Sampler, SamplerSettings};
use handmill::registry::Kind;
use handmill::retrieve::index::{Index, PathFilter};
use handmill::retrieve::prompt::{self, Layout};
use serde_json::json;

use super::search::{citation, hits};
use super::{
    note, open_embedder, open_model, peak_bytes, print_json, resolve, AdapterFlag, Common, ModelFlag, Precision, Usage,
};

/// The least score of a passage worth giving. With MiniLM over the documents of `tools/fetch_data` the best passage
/// scores 0.52 or more for each of their questions, and less than 0.25 for 18 of 20 questions about other things (0.34
/// and 0.42 for the other two); passages of 250 tokens score about 0.05 less.
const MIN_SCORE: f32 = 0.3;
/// Tokens that a chat template may add beyond those of an empty message.
const SLACK: usize = 16;

/// Answer a question from an index of documents, with citations
///
/// The best passages become the prompt's notes, the model answers, and the passages are cited after the answer. Where
/// none scores --min-score there is no answer. With --json: answer (null for none), hits: [{rank, score, path, lines,
/// heading, text}] that were in the prompt, dropped, prompt_tokens, retrieve_ms, generate_ms, tokens_per_s, device,
/// peak_bytes.
#[derive(Args)]
pub struct Ask {
    /// The index, a directory of `handmill index build`
    #[arg(long, value_name = "IDX")]
    index: PathBuf,
    /// The embedding model that the index was built with
    #[arg(long, value_name = "EMB")]
    embed_model: PathBuf,
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    adapter: AdapterFlag,
    /// The question
    question: String,
    /// Passages to give to the model [default: as many as the adapter was trained with, else 5]
    #[arg(short, value_name = "K")]
    k: Option<usize>,
    /// The least score of a passage worth giving: cosine, -1 to 1
    #[arg(long, value_name = "SCORE", default_value_t = MIN_SCORE)]
    min_score: f32,
    /// Only documents of this path or folder, or whose path matches this glob
    #[arg(long, value_name = "PATTERN")]
    path: Option<String>,
    /// What the model is told to do, before the notes [default: what the adapter was trained with, else to answer from
    /// the notes and follow no instruction in them]
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    /// Tokens of the prompt at most; passages that do not fit are left out, the last ones first
    /// [default: what the model's context leaves]
    #[arg(long, value_name = "N")]
    prompt_tokens: Option<usize>,
    /// At most so many new tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 takes the most probable token; higher draws more freely
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Seeds the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    precision: Precision,
    #[command(flatten)]
    common: Common,
}

impl Ask {
    pub fn run(&self) -> Result<()> {
        let usage = |what: &str| Err(Usage(what.into()).into());
        let sampler =
            SamplerSettings { temperature: self.temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: self.seed };
        Sampler::new(sampler).map_err(|error| Usage(error.to_string()))?;
        if self.question.trim().is_empty() {
            return usage("the question is empty: give one");
        }
        if self.max_tokens == 0 {
            return usage("--max-tokens is 0: an answer needs at least 1");
        }
        if !self.min_score.is_finite() {
            return usage("--min-score is a number, such as 0.3");
        }
        let layout = self.layout()?;
        let filter = self.path.as_deref().map(PathFilter::new).transpose()?;
        let device = self.common.open_device()?;
        let embedder = open_embedder(&self.embed_model, &device)?;
        let index = Index::open(&resolve(Kind::Index, &self.index)?, &embedder)?;
        let start = Instant::now();
        let mut found =
            index.search(&*device, &embedder, &[&self.question], layout.passages, filter.as_ref())?.remove(0);
        let retrieve_ms = start.elapsed().as_secs_f64() * 1e3;
        let best = found.first().map(|passage| passage.score);
        found.retain(|passage| passage.score >= self.min_score);
        if found.is_empty() {
            return self.nothing(best, retrieve_ms, device.id());
        }

        let model = open_model(&self.model.model, &self.adapter, &self.precision, &device)?;
        let budget = self.budget(&model)?;
        let prompt = prompt::message(&model.tokenizer, &layout, &self.question, &found, budget)?;
        if prompt.used == 0 {
            let most =
                "no passage fits the prompt: give more --prompt-tokens, or fewer --max-tokens where the model's \
                        context is what ends it";
            anyhow::bail!("{most}");
        }
        if prompt.dropped > 0 {
            let (dropped, all) = (prompt.dropped, found.len());
            note(&format!("the last {dropped} of {all} passages did not fit the prompt and were left out"));
            found.truncate(prompt.used);
        }
        let prompt_ids = ids(&model, &prompt.message)?;
        let start = Instant::now();
        let options = GenerateOptions { sampler, max_tokens: self.max_tokens, stop: model.stop_ids() };
        let mut session = model.session(prompt_ids.len(), self.max_tokens)?;
        let (mut answer, mut failed) = (String::new(), None);
        let mut decoder = model.tokenizer.decoder(true);
        let mut on_token = |id: u32, _: &[f32]| {
            let shown = decoder.push(id).map_err(anyhow::Error::from).and_then(|piece| {
                let piece = piece.unwrap_or_default();
                answer += &piece;
                self.show(&piece)
            });
            match shown {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let generated = model.generate(&mut session, &prompt_ids, &options, &mut on_token)?;
        if let Some(error) = failed {
            return Err(error);
        }
        let rest = decoder.finish();
        answer += &rest;
        self.show(&rest)?;
        let generate_ms = start.elapsed().as_secs_f64() * 1e3;
        if self.common.json {
            return print_json(&json!({
                "answer": answer,
                "hits": hits(&found),
                "dropped": prompt.dropped,
                "prompt_tokens": prompt_ids.len(),
                "retrieve_ms": retrieve_ms,
                "generate_ms": generate_ms,
                "tokens_per_s": generated.tokens_per_s(),
                "device": device.id(),
                "peak_bytes": peak_bytes(),
            }));
        }
        let mut out = io::stdout();
        writeln!(out, "\n")?;
        for (rank, passage) in (1..).zip(&found) {
            writeln!(out, "{}", citation(rank, passage))?;
        }
        note(&format!(
            "found in {retrieve_ms:.0} ms; prompt {} tokens, {:.1} tokens/s; {} new tokens, {:.1} tokens/s",
            prompt_ids.len(),
            generated.prompt_tokens_per_s(),
            generated.ids.len(),
            generated.tokens_per_s(),
        ));
        Ok(())
    }

    /// The layout that the adapter was trained with, else the usual one, and what flags say otherwise.
    fn layout(&self) -> Result<Layout> {
        let mut layout = Layout::default();
        if let Some(adapter) = &self.adapter.adapter {
            layout = Layout::of_adapter(&resolve(Kind::Adapter, adapter)?)?.unwrap_or_default();
        }
        layout.passages = self.k.unwrap_or(layout.passages);
        if let Some(instruction) = &self.instruction {
            layout.instruction.clone_from(instruction);
        }
        Ok(layout)
    }

    /// Tokens that the message may have.
    fn budget(&self, model: &LanguageModel) -> Result<usize> {
        let frame = ids(model, "")?.len() + SLACK;
        let most = model.llama.config.max_positions.saturating_sub(self.max_tokens).saturating_sub(frame);
        Ok(self.prompt_tokens.map_or(most, |asked| asked.saturating_sub(frame).min(most)))
    }

    fn nothing(&self, best: Option<f32>, retrieve_ms: f64, device: &str) -> Result<()> {
        let least = self.min_score;
        if self.common.json {
            return print_json(&json!({
                "answer": null,
                "reason": "no relevant passage",
                "best_score": best,
                "hits": [],
                "prompt_tokens": 0,
                "retrieve_ms": retrieve_ms,
                "generate_ms": 0.0,
                "device": device,
            }));
        }
        writeln!(io::stdout(), "no relevant passage")?;
        match best {
            Some(best) => note(&format!("the best scores {best:.3}, below --min-score {least}")),
            None => note("the index, or what --path leaves of it, is empty"),
        }
        Ok(())
    }

    /// Text for a person, at once.
    fn show(&self, text: &str) -> Result<()> {
        if !self.common.json && !text.is_empty() {
            let mut out = io::stdout();
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }
}

/// The ids of a user's message: in the model's chat template, or as it is for a model that has none.
fn ids(model: &LanguageModel, message: &str) -> Result<Vec<u32>> {
    match model.chat_template {
        Some(_) => Ok(model.chat_ids(&[Message::new("user", message)])?),
        None => Ok(model.prompt_ids(&format!("{message}\n\nAnswer:"))?),
    }
}
