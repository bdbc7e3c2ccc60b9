//! `handmill generate`: continues a prompt.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use handmill::device::invariant::invariant;
use handmill::model::chat::Message;
use handmill::model::generate::{Ending, GenerateOptions, Generated, LanguageModel};
use handmill::model::sampler::{self, Sampler, SamplerSettings};
use handmill::model::stop::StopText;
use serde_json::json;

use super::{
    human_bytes, note, open_model, peak_bytes, print_json, read_text, AdapterFlag, Common, ModelFlag, Precision, Usage,
};

/// Continue a prompt
///
/// Prompts are taken byte for byte; special tokens written in them are recognised, and BOS comes first where the
/// model's metadata says so. With --json: prompt_ids, ids, text, prompt_tokens_per_s, tokens_per_s, device, ending,
/// seed, peak_bytes (the most memory resident, the model's mapped pages included).
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    adapter: AdapterFlag,
    #[command(flatten)]
    prompt: Prompt,
    /// Say the prompt as the user's message in the model's chat template
    #[arg(long)]
    chat: bool,
    /// The system's message before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// At most so many new tokens; 0 only tokenizes
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// End before this text; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// 0 takes the most probable token; higher draws more freely
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Draw among the K most probable tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw among the most probable tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Leave out tokens less probable than this share of the most probable one
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Seeds the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Add the N largest logits of the first new position to the JSON, as top_logits: [[id, logit], ..]
    #[arg(long, value_name = "N", requires = "json")]
    top_logits: Option<usize>,
    /// Take only kernels whose rows do not depend on one another: the bits of `serve` with the same flag
    #[arg(long)]
    batch_invariant: bool,
    #[command(flatten)]
    precision: Precision,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Prompt {
    /// The prompt
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// A file with the prompt
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
}

impl Generate {
    pub fn run(&self) -> Result<()> {
        let settings = SamplerSettings {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
        };
        Sampler::new(settings).map_err(|error| Usage(error.to_string()))?;
        if self.stop.iter().any(String::is_empty) {
            return Err(Usage("--stop is empty: give a text".into()).into());
        }
        if self.top_logits.is_some() && self.max_tokens == 0 {
            return Err(
                Usage("--top-logits needs --max-tokens 1 or more: it is about the first new token".into()).into()
            );
        }
        let prompt = match (&self.prompt.prompt, &self.prompt.prompt_file) {
            (Some(text), _) => text.clone(),
            (_, Some(file)) => read_text(file)?,
            _ => unreachable!("clap asks for one of the two"),
        };
        let mut device = self.common.open_device()?;
        if self.batch_invariant {
            device = invariant(device);
        }
        let model = open_model(&self.model.model, &self.adapter, &self.precision, &device)?;
        let prompt_ids = self.prompt_ids(&model, prompt)?;
        if self.max_tokens > 0 && prompt_ids.is_empty() {
            anyhow::bail!("the prompt has no tokens, and this model begins no text by itself: give a prompt");
        }

        let options = GenerateOptions { sampler: settings, max_tokens: self.max_tokens, stop: model.stop_ids() };
        let mut session = model.session(prompt_ids.len(), self.max_tokens)?;
        let (mut text, mut top_logits, mut failed) = (StopText::new(&self.stop), None, None);
        let mut decoder = model.tokenizer.decoder(true);
        let mut on_token = |id: u32, logits: &[f32]| {
            if let (None, Some(count)) = (&top_logits, self.top_logits) {
                top_logits = Some(sampler::top(logits, count));
            }
            let done = decoder.push(id).map_err(anyhow::Error::from).and_then(|piece| {
                let (ready, ended) = text.push(piece.as_deref().unwrap_or_default());
                self.show(&ready)?;
                Ok(ended)
            });
            match done {
                Ok(false) => ControlFlow::Continue(()),
                Ok(true) => ControlFlow::Break(()),
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
        if !text.ended {
            text.push(&decoder.finish());
            self.show(&text.rest())?;
        }
        if !self.common.json {
            return self.report(&prompt_ids, &generated);
        }
        let mut object = json!({
            "prompt_ids": prompt_ids,
            "ids": generated.ids,
            "text": text.whole,
            "ending": ending(generated.ending),
            "prompt_tokens_per_s": generated.prompt_tokens_per_s(),
            "tokens_per_s": generated.tokens_per_s(),
            "device": device.id(),
            "seed": self.seed,
            "peak_bytes": peak_bytes(),
        });
        if let Some(top) = top_logits {
            object["top_logits"] = json!(top);
        }
        print_json(&object)
    }

    fn prompt_ids(&self, model: &LanguageModel, prompt: String) -> Result<Vec<u32>> {
        if !self.chat {
            return Ok(model.prompt_ids(&prompt)?);
        }
        let mut messages: Vec<Message> = self.system.iter().map(|text| Message::new("system", text)).collect();
        messages.push(Message::new("user", prompt));
        Ok(model.chat_ids(&messages)?)
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

    /// What follows the text: its last newline, and the timings on stderr.
    fn report(&self, prompt_ids: &[u32], generated: &Generated) -> Result<()> {
        if self.max_tokens == 0 {
            let ids: Vec<String> = prompt_ids.iter().map(u32::to_string).collect();
            writeln!(io::stdout(), "{}", ids.join(" "))?;
            note(&format!("{} tokens", prompt_ids.len()));
            return Ok(());
        }
        writeln!(io::stdout())?;
        note(&format!(
            "prompt {} tokens, {:.1} tokens/s; {} new tokens, {:.1} tokens/s; ended by {}; peak memory {}",
            generated.prompt_tokens,
            generated.prompt_tokens_per_s(),
            generated.ids.len(),
            generated.tokens_per_s(),
            ending(generated.ending),
            peak_bytes().map_or("unknown".into(), human_bytes),
        ));
        Ok(())
    }
}

fn ending(ending: Ending) -> &'static str {
    match ending {
        Ending::Stop(_) => "the model",
        Ending::MaxTokens => "max-tokens",
        Ending::Context => "the context's end",
        Ending::Caller => "a stop text",
    }
}
