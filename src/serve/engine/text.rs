//! What turns text into a job's tokens and back: shared by all who talk to the engine, apart from its thread.

use crate::error::Error;
use crate::model::chat::Message;
use crate::model::generate;
use crate::model::tokenizer::Tokenizer;

/// The text side of a model. To decode a stream, take [`Tokenizer::decoder`]: it holds back half a character.
pub struct TextSide {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The Jinja text of the chat template, if the model has one.
    pub chat_template: Option<String>,
    pub(super) stop: Vec<u32>,
    pub(super) vocab: usize,
    pub(super) context: usize,
}

impl TextSide {
    /// The ids of a prompt: special tokens in it are recognised, BOS comes first where the model's metadata says so.
    pub fn prompt_ids(&self, text: &str) -> Result<Vec<u32>, Error> {
        generate::prompt_ids(&self.tokenizer, text)
    }

    /// The ids of a conversation in the model's chat template, the assistant's turn open at the end. An error where the
    /// model has no template or it refuses the messages.
    pub fn chat_ids(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        generate::chat_ids(&self.tokenizer, self.chat_template.as_deref(), messages)
    }

    /// The tokens by which the model ends a text or a turn.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop
    }

    /// Ids are below this.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Tokens a text may have, prompt and continuation together.
    pub fn context(&self) -> usize {
        self.context
    }
}
