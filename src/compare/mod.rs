//! Fine-tune, retrieve, or both? Answered by measurement: an adapter is trained, documents are indexed, and held-out
//! questions are put to four arms.
//!
//! ```text
//! base      the model, with the prompt that did best on development questions
//! rag       the same with passages found in the documents; its prompt chosen likewise
//! lora      with an adapter trained on the training rows
//! lora_rag  with an adapter that met retrieved passages in part of its rows, and passages
//! ```
//!
//! One adapter trained on both kinds of rows serves both arms, unless two are asked for. Read in this order:
//! [`questions`], [`form`] and [`metrics`] (what is asked and how replies are judged), [`retrieval`], [`prompt`] and
//! [`mix`] (what a model meets), [`arms`] (how it answers), [`work`] (the stages), [`stats`], [`outcome`] and
//! [`recommend`] (what it comes to), [`report`] (the page).

pub mod arms;
pub mod form;
mod inputs;
pub mod metrics;
pub mod mix;
pub mod outcome;
pub mod prompt;
pub mod questions;
pub mod recommend;
pub mod report;
pub mod retrieval;
pub mod stages;
pub mod stats;
pub mod training;
mod warnings;
pub mod work;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::quant::Format;
use crate::train::optimizer::Schedule;

/// The text on which forgetting is measured where no other is given: of our own writing, in the public domain.
pub const RETENTION: &str = include_str!("retention.txt");

/// What is to be compared, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// A `.gguf` file or a Hugging Face directory.
    pub model: PathBuf,
    /// The embedder's directory.
    pub embed_model: PathBuf,
    /// Training rows.
    pub train: PathBuf,
    /// Documents and folders of them.
    pub docs: Vec<PathBuf>,
    /// Held-out questions.
    pub questions: PathBuf,
    /// Questions to choose prompts on; none: some of the training rows, which are then not trained on.
    pub dev: Option<PathBuf>,
    /// Where everything goes.
    pub out: PathBuf,
    /// Said before every question whose row has no instruction.
    pub instruction: Option<String>,
    /// The replies' form as a template.
    pub format: Option<String>,
    /// The replies' form as a regular expression.
    pub format_regex: Option<String>,
    /// Passages shown with a question.
    pub passages: usize,
    /// Tokens of a reply at most.
    pub max_tokens: usize,
    /// Examples in the few-shot prompt that is tried; 0: none is.
    pub shots: usize,
    /// Development questions at most.
    pub dev_questions: usize,
    /// Questions at most, drawn evenly over kinds.
    pub limit: Option<usize>,
    /// Share of the training rows that passages are put to.
    pub context_share: f64,
    /// Trains an adapter of its own for the arm without passages, on bare rows.
    pub separate: bool,
    /// How adapters are trained.
    pub recipe: Recipe,
    /// Quantize the layers' weights first, for every arm.
    pub quant: Option<Format>,
    /// Round what meets the weights to bf16 where that is faster.
    pub bf16: bool,
    /// The text on which forgetting is measured.
    pub retention: Option<PathBuf>,
    /// The most that its loss may rise, in nats a token.
    pub max_forgetting: Option<f64>,
    /// Seeds everything that is drawn.
    pub seed: u64,
}

/// How an adapter is trained.
#[derive(Clone, Debug, Serialize)]
pub struct Recipe {
    /// Rank.
    pub r: usize,
    /// The adapter is scaled by alpha/r.
    pub alpha: f64,
    /// Steps.
    pub steps: usize,
    /// Rows of a step.
    pub rows: usize,
    /// Largest learning rate.
    pub lr: f64,
    /// How it changes.
    #[serde(serialize_with = "name_of")]
    pub schedule: Schedule,
    /// Steps it rises for.
    pub warmup: usize,
    /// AdamW's decay of the weights.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for none.
    pub grad_clip: f64,
    /// Tokens of a row; longer ones are cut.
    pub max_len: usize,
    /// Bytes for activations kept from the forward to the backward pass.
    pub keep_activations: usize,
}

fn name_of<S: serde::Serializer>(schedule: &Schedule, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(schedule.name())
}

/// Times and sizes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Costs {
    /// Seconds of training.
    pub train_s: f64,
    /// Steps of it.
    pub steps: usize,
    /// Tokens read in it.
    pub train_tokens: usize,
    /// The most memory resident meanwhile, in bytes.
    pub train_peak_bytes: Option<u64>,
    /// Numbers trained.
    pub parameters: usize,
    /// Seconds of indexing.
    pub index_s: f64,
    /// Documents in the index.
    pub documents: usize,
    /// Passages in the index.
    pub chunks: usize,
    /// Seconds to find a question's passages.
    pub retrieve_s: f64,
    /// Bytes on disk: the model.
    pub model_bytes: u64,
    /// Bytes on disk: the adapter, or both.
    pub adapter_bytes: u64,
    /// Bytes on disk: the index.
    pub index_bytes: u64,
    /// Bytes on disk: the embedder.
    pub embedder_bytes: u64,
}

/// Where a comparison stands.
pub struct Progress<'a> {
    /// The stage's name.
    pub stage: &'a str,
    /// Done so far.
    pub done: usize,
    /// Of so many; 0 where that is not known.
    pub total: usize,
    /// What is counted, or a word about the work.
    pub what: String,
}

/// Takes progress; false asks the work to keep what is done and end.
pub type Watch<'a> = &'a mut dyn FnMut(&Progress) -> bool;

/// Why a comparison came to no outcome.
#[derive(Debug)]
pub enum Halt {
    /// Something is wrong.
    Error(Error),
    /// The caller's wish; another run goes on.
    Interrupted,
}

impl<E: Into<Error>> From<E> for Halt {
    fn from(error: E) -> Halt {
        Halt::Error(error.into())
    }
}
