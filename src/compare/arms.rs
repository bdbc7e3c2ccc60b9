//! The four arms, and how one answers: each prompt is read once, continued greedily, and the session taken back to its
//! end to score the answer that was expected.
//!
//! ```text
//! shared = the longest beginning that all prompts of the arm have in common, read once
//! for each prompt:
//!     truncate the session to shared; read the rest; take the most probable token until a stop
//!     truncate to the prompt without its last token; read that token and the expected reply's
//!     answer_nll = mean of -log p over the answer's tokens, reply_nll over the whole reply's
//! ```
//!
//! What is shared does not depend on how far a run has come, so a run that was cut off comes to the same bits.

use std::ops::ControlFlow;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::prompt::{self, Example};
use super::questions::Question;
use super::stages::Records;
use super::Halt;
use crate::error::Error;
use crate::model::generate::{log_sum_exp, Ending, GenerateOptions, LanguageModel};
use crate::model::llama::Want;
use crate::model::sampler::SamplerSettings;
use crate::model::session::Session;

/// A way of answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// The model as it is.
    Base,
    /// With the adapter.
    Lora,
    /// With retrieved passages.
    Rag,
    /// With both.
    LoraRag,
}

impl Arm {
    /// All, in the order in which they are shown.
    pub const ALL: [Arm; 4] = [Arm::Base, Arm::Lora, Arm::Rag, Arm::LoraRag];

    /// Its key.
    pub fn key(self) -> &'static str {
        ["base", "lora", "rag", "lora_rag"][self as usize]
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        ["base", "LoRA", "RAG", "LoRA + RAG"][self as usize]
    }

    /// With the adapter.
    pub fn adapted(self) -> bool {
        matches!(self, Arm::Lora | Arm::LoraRag)
    }

    /// With retrieved passages.
    pub fn retrieves(self) -> bool {
        matches!(self, Arm::Rag | Arm::LoraRag)
    }
}

/// What an arm is asked, and the reply that is expected.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Those of the expected reply.
    pub reply: Vec<u32>,
    /// Those of the answer alone.
    pub answer: Vec<u32>,
}

/// What an arm answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// Its words.
    pub reply: String,
    /// It came to its end by itself.
    pub ended: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the reply.
    pub tokens: usize,
    /// Seconds until the prompt was read.
    pub prompt_s: f64,
    /// Seconds of the reply.
    pub reply_s: f64,
    /// Mean of -log p over the tokens of the expected answer, in nats.
    pub answer_nll: f64,
    /// The same over the whole expected reply.
    pub reply_nll: f64,
}

#[allow(clippy::too_many_arguments)] // each is a part of the prompt
/// The prompt for a question; passages that the model's context has no room for are left out, the last first.
pub fn prompt(
    model: &LanguageModel,
    special: &[String],
    question: &Question,
    expected: &str,
    examples: &[Example],
    notes: &[String],
    instruction: Option<&str>,
    max_tokens: usize,
) -> Result<Prompt, Error> {
    let reply = model.tokenizer.encode(expected)?;
    let answer = model.tokenizer.encode(&question.answer)?;
    let room = model.llama.config.max_positions.saturating_sub(max_tokens.max(reply.len()).max(answer.len()));
    let mut count = notes.len();
    loop {
        let ids = prompt::ids(model, special, examples, instruction, &notes[..count], question)?;
        if ids.len() <= room {
            return Ok(Prompt { ids, reply, answer });
        }
        if count == 0 {
            let (line, max) = (question.line, model.llama.config.max_positions);
            let what = format!("question #{line} has {} tokens and the model takes {max}: shorten it", ids.len());
            return Err(Error::Request(what));
        }
        count -= 1;
    }
}

/// Answers the prompts that `records` does not have yet. `tell` is told how many are done; false from it ends the work.
pub fn answer(
    model: &LanguageModel,
    prompts: &[Prompt],
    max_tokens: usize,
    records: &mut Records<Answered>,
    tell: &mut dyn FnMut(usize) -> bool,
) -> Result<(), Halt> {
    if records.done.len() >= prompts.len() {
        return Ok(());
    }
    let longest = prompts.iter().map(|p| p.ids.len() + max_tokens.max(p.reply.len()).max(p.answer.len())).max();
    let capacity = longest.unwrap_or(1).min(model.llama.config.max_positions);
    let mut session = model.llama.session(capacity)?;
    let shared = shared(prompts);
    if shared > 0 {
        model.llama.forward(&mut session, &prompts[0].ids[..shared], Want::None)?;
    }
    let sampler = SamplerSettings { temperature: 0.0, ..SamplerSettings::default() };
    let options = GenerateOptions { sampler, max_tokens, stop: model.stop_ids() };
    for prompt in &prompts[records.done.len()..] {
        session.truncate(shared);
        let go_on = &mut |_, _: &[f32]| ControlFlow::Continue(());
        let made = model.generate(&mut session, &prompt.ids[shared..], &options, go_on)?;
        let reply_nll = nll(model, &mut session, &prompt.ids, &prompt.reply)?;
        let answer_nll = match prompt.reply.starts_with(&prompt.answer) {
            true => reply_nll[..prompt.answer.len()].to_vec(),
            false => nll(model, &mut session, &prompt.ids, &prompt.answer)?,
        };
        // A model may have logits for ids that its tokenizer does not know: they are no text.
        let mut known = made.ids.clone();
        known.retain(|&id| model.tokenizer.token(id).is_some());
        records.push(Answered {
            reply: model.tokenizer.decode(&known, true)?.trim().to_string(),
            ended: matches!(made.ending, Ending::Stop(_)),
            prompt_tokens: prompt.ids.len(),
            tokens: made.ids.len(),
            prompt_s: made.prompt_seconds,
            reply_s: made.decode_seconds,
            answer_nll: mean(&answer_nll),
            reply_nll: mean(&reply_nll),
        })?;
        if !tell(records.done.len()) {
            return Err(Halt::Interrupted);
        }
    }
    Ok(())
}

/// Tokens that every prompt begins with, one less than the shortest at most.
fn shared(prompts: &[Prompt]) -> usize {
    let Some(first) = prompts.first() else { return 0 };
    let common = |other: &Prompt| first.ids.iter().zip(&other.ids).take_while(|(a, b)| a == b).count();
    let shortest = prompts.iter().map(|prompt| prompt.ids.len()).min().unwrap_or(0);
    prompts.iter().map(common).min().unwrap_or(0).min(shortest.saturating_sub(1))
}

/// -log p of each token of `text` after `prompt`, of which the session holds all but what follows it.
fn nll(model: &LanguageModel, session: &mut Session, prompt: &[u32], text: &[u32]) -> Result<Vec<f64>, Error> {
    let Some((last, before)) = text.split_last().zip(prompt.split_last()).map(|(t, p)| (t.1, p)) else {
        return Ok(Vec::new());
    };
    session.truncate(before.1.len());
    let mut ids = vec![*before.0];
    ids.extend(last);
    let vocab = model.llama.config.vocab;
    let mut found = Vec::with_capacity(text.len());
    let mut each = |row0: usize, rows: &[f32]| {
        let rows = rows.par_chunks(vocab).zip(&text[row0..]);
        found.par_extend(rows.map(|(row, &id)| log_sum_exp(row) - f64::from(row[id as usize])));
        Ok(())
    };
    model.llama.forward(session, &ids, Want::All(&mut each))?;
    Ok(found)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_their_common_beginning_but_for_a_token() {
        let prompt = |ids: &[u32]| Prompt { ids: ids.to_vec(), reply: vec![], answer: vec![] };
        assert_eq!(shared(&[prompt(&[1, 2, 3]), prompt(&[1, 2, 4, 5])]), 2);
        assert_eq!(shared(&[prompt(&[1, 2]), prompt(&[1, 2, 4, 5])]), 1);
        assert_eq!(shared(&[prompt(&[7])]), 0);
        assert_eq!(shared(&[]), 0);
    }
}
