//! From a request to what the engine is asked: names become adapters and indexes, a question gets its passages, text
//! becomes tokens. All of it computes, so it runs on a thread for blocking work.

use serde_json::{json, Value};

use super::error::ApiError;
use super::wire::{Asked, Chat, Prompt};
use super::Server;
use crate::model::chat::Message;
use crate::retrieve::index::Passage;
use crate::retrieve::prompt::{self, defuse};
use crate::serve::retrieval::Found;

/// Tokens that a chat template may add beyond those of an empty message.
const SLACK: usize = 16;
/// What is answered where no passage is relevant: the model is not asked.
pub const REFUSAL: &str = "No relevant passage was found in the documents.";

/// A model as the engine and the indexes know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name: the base model's, an adapter's, `name+index`.
    pub name: String,
    /// The adapter; none: the base model.
    pub adapter: Option<String>,
    /// The index that it answers from.
    pub index: Option<String>,
}

/// Who answers.
#[derive(Clone, Debug)]
pub struct Route {
    /// The model's name as it was asked for.
    pub asked: String,
    /// The alias, where it is one.
    pub alias: Option<String>,
    /// What answers.
    pub target: Target,
    /// What answers too, for the record.
    pub shadow: Option<Target>,
}

/// A prompt's tokens, and the passages in it.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    /// The tokens; none: there is nothing to ask a model, and [`REFUSAL`] is the answer.
    pub ids: Vec<u32>,
    /// The passages, `[{n, path, lines, score, text}]`; none: no index was asked.
    pub citations: Option<Value>,
}

impl Server {
    /// The base model, an adapter, or either with an index.
    pub fn target(&self, name: &str) -> Option<Target> {
        let adapter_of = |name: &str| match name {
            name if name == self.base => Some(None),
            name => self.engine.adapters().iter().any(|a| a.name == name).then(|| Some(name.to_string())),
        };
        let found =
            |adapter, index: Option<&str>| Target { name: name.to_string(), adapter, index: index.map(str::to_string) };
        if let Some(adapter) = adapter_of(name) {
            return Some(found(adapter, None));
        }
        let (model, index) = name.rsplit_once('+')?;
        let known = self.retrieval.as_ref().is_some_and(|retrieval| retrieval.indexes.contains_key(index));
        adapter_of(model).filter(|_| known).map(|adapter| found(adapter, Some(index)))
    }

    /// Who answers: `key` is whoever asks, so that an alias gives them the same arm again.
    pub fn route(&self, asked: &str, key: &str) -> Result<Route, ApiError> {
        if let Some(choice) = self.canary.choose(asked, key) {
            let target = self.target(&choice.model).ok_or_else(|| self.no_text_model(&choice.model))?;
            let shadow = choice.shadow.and_then(|shadow| self.target(&shadow));
            return Ok(Route { asked: asked.into(), alias: Some(asked.into()), target, shadow });
        }
        let target = self.target(asked).ok_or_else(|| self.no_text_model(asked))?;
        Ok(Route { asked: asked.into(), alias: None, target, shadow: None })
    }

    /// 404: this model answers with no text, or is not here.
    fn no_text_model(&self, name: &str) -> ApiError {
        let error = ApiError::no_model(name);
        match self.retrieval.as_ref().is_some_and(|retrieval| retrieval.name == name) {
            true => ApiError { message: format!("{name} embeds texts and writes none: POST /v1/embeddings"), ..error },
            false => error,
        }
    }

    /// 404: this model embeds nothing, or is not here.
    pub fn no_embedding_model(&self, name: &str) -> ApiError {
        let error = ApiError::no_model(name);
        if !super::routes::models(self).iter().any(|(id, _)| id == name) {
            return error;
        }
        let message = match &self.retrieval {
            Some(retrieval) => format!("{name} writes text; the model for embeddings is {}", retrieval.name),
            None => format!("{name} writes text; for embeddings the server is started with --embed-model"),
        };
        ApiError { message, ..error }
    }

    /// Tokens that an answer may have, at most what the context leaves beside the prompt where nobody says how many.
    pub fn most_tokens(&self, asked: &Asked, prompt: usize, default: usize) -> usize {
        let left = self.engine.text().context().saturating_sub(prompt).max(1);
        asked.max_tokens.unwrap_or(default.min(left))
    }

    /// A conversation's tokens, its last question with passages where an index is asked. What a shadow is asked has
    /// been counted when the other was.
    pub fn prepare_chat(&self, chat: &Chat, target: &Target, shadow: bool) -> Result<Ready, ApiError> {
        // Nobody vouches for what clients send: it must not end a turn or open another.
        let safe = |m: &Message| Message::new(m.role.clone(), defuse(&m.content, &self.special));
        let mut messages: Vec<Message> = chat.messages.iter().map(safe).collect();
        let mut ready = Ready::default();
        let last = messages.iter().rposition(|message| message.role == "user");
        if let Some(name) = &target.index {
            let Some(last) = last else {
                return Err(ApiError::param("messages", "an index is asked with a message of the user's"));
            };
            let mut found = self.search(name, &chat.messages[last].content, shadow)?;
            // An adapter is asked as it was trained.
            let adapters = self.engine.adapters();
            let adapter = adapters.into_iter().find(|adapter| Some(&adapter.name) == target.adapter.as_ref());
            let trained = adapter.and_then(|adapter| adapter.layout);
            found.passages.truncate(trained.as_ref().map_or(usize::MAX, |layout| layout.passages));
            let layout = trained.unwrap_or_default();
            if found.passages.is_empty() {
                if !shadow {
                    self.metrics.refusals.with_label_values(&[name]).inc();
                }
                return Ok(Ready { ids: Vec::new(), citations: Some(json!([])) });
            }
            let mut frame = messages.clone();
            frame[last].content.clear();
            let new = chat.asked.max_tokens.unwrap_or(self.limits.default_tokens);
            let spent = self.ids(&frame)?.len() + SLACK + new;
            let budget = self.engine.text().context().saturating_sub(spent);
            let text = self.engine.text();
            let question = &chat.messages[last].content;
            let prompt = prompt::message(&text.tokenizer, &layout, question, &found.passages, budget);
            let prompt = prompt.map_err(|error| ApiError::param("messages", error.to_string()))?;
            if prompt.used == 0 {
                let what = "no passage fits the context beside this conversation: ask for fewer max_tokens";
                return Err(ApiError::param("max_tokens", what));
            }
            messages[last].content = prompt.message;
            ready.citations = Some(citations(&found.passages[..prompt.used]));
        } else if let (false, Some(watch), Some(last), Some(retrieval)) = (shadow, &self.drift, last, &self.retrieval) {
            match retrieval.embed(&chat.messages[last].content) {
                Ok(question) => watch.see(&question),
                Err(error) => log::warn!("drift: {error}"),
            }
        }
        ready.ids = self.ids(&messages)?;
        Ok(ready)
    }

    fn search(&self, index: &str, question: &str, shadow: bool) -> Result<Found, ApiError> {
        let retrieval = self.retrieval.as_ref().ok_or_else(|| ApiError::no_model(index))?;
        let found = retrieval.search(index, question).map_err(|error| {
            log::error!("index {index}: {error}");
            ApiError::internal("the index could not be searched: see the server's log")
        })?;
        if !shadow {
            found.best.iter().for_each(|&best| self.metrics.scored(index, best));
            if let Some(watch) = &self.drift {
                watch.see(&found.question);
            }
        }
        Ok(found)
    }

    /// A conversation in the model's chat template, or as plain text for a model that has none.
    fn ids(&self, messages: &[Message]) -> Result<Vec<u32>, ApiError> {
        let text = self.engine.text();
        let ids = match text.chat_template {
            Some(_) => text.chat_ids(messages),
            None => {
                let turns = messages.iter().map(|message| format!("{}\n\n", message.content));
                text.prompt_ids(&(turns.collect::<String>() + "Answer:"))
            }
        };
        ids.map_err(|error| ApiError::param("messages", error.to_string()))
    }

    /// A prompt's tokens and its text.
    pub fn prepare_prompt(&self, prompt: &Prompt) -> Result<(Vec<u32>, String), ApiError> {
        let text = self.engine.text();
        let bad = |error: crate::Error| ApiError::param("prompt", error.to_string());
        match prompt {
            Prompt::Text(prompt) => Ok((text.prompt_ids(prompt).map_err(bad)?, prompt.clone())),
            Prompt::Ids(ids) => {
                let decoded = text.tokenizer.decode(ids, false).map_err(|error| bad(error.into()))?;
                Ok((ids.clone(), decoded))
            }
        }
    }
}

/// Passages as an answer cites them.
fn citations(passages: &[Passage]) -> Value {
    let one = |(n, passage): (usize, &Passage)| {
        json!({"n": n, "path": passage.path, "lines": [passage.lines.0, passage.lines.1], "score": passage.score,
            "text": passage.note()})
    };
    Value::Array((1..).zip(passages).map(one).collect())
}
