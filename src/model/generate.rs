//! Text in, text out: a decoder or an encoder with its tokenizer, and what people ask of them.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rayon::prelude::*;
use serde::Deserialize;

use super::adapter::{hex, model_sha256, sha256};
use super::bert::Bert;
use super::chat::{ChatTemplate, Message};
use super::checkpoint::{Checkpoint, Source};
use super::gguf::Gguf;
use super::llama::{Llama, Want};
use super::sampler::{Sampler, SamplerSettings};
use super::session::Session;
use super::tokenizer::{GgufVocab, Tokenizer};
use super::weights::LoadOptions;
use crate::device::Device;
use crate::error::Error;

/// Tokens that sentences of one batch hold together: enough for full-speed products, small enough for caches.
const BATCH_TOKENS: usize = 1024;
/// Tokens of a sentence where the model's files do not say.
const SENTENCE_TOKENS: usize = 256;
/// The longest chat template that is read, in bytes.
const MAX_TEMPLATE: u64 = 1 << 20;

/// A decoder with its tokenizer.
pub struct LanguageModel {
    /// The decoder.
    pub llama: Llama,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The Jinja text of its chat template, if it has one.
    pub chat_template: Option<String>,
}

/// How to continue a prompt.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How each token is chosen.
    pub sampler: SamplerSettings,
    /// At most so many new tokens.
    pub max_tokens: usize,
    /// Tokens that end the text, such as [`LanguageModel::stop_ids`].
    pub stop: Vec<u32>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// One of the stop tokens was chosen; it is not among the ids.
    Stop(u32),
    /// As many tokens as were asked for.
    MaxTokens,
    /// The session is full.
    Context,
    /// The caller's wish.
    Caller,
}

/// A generation and what it took.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The new tokens.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub ending: Ending,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Seconds until the prompt's last logits were there.
    pub prompt_seconds: f64,
    /// Tokens that went through the model after the prompt.
    pub decode_tokens: usize,
    /// Seconds those took, with choosing them.
    pub decode_seconds: f64,
}

/// How well a model predicts a text.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Natural logarithm of the probability of each token but the first, f32[N-1].
    pub logprobs: Vec<f32>,
    /// Mean of their negatives.
    pub mean_nll: f64,
    /// exp(mean_nll).
    pub perplexity: f64,
    /// Seconds it took.
    pub seconds: f64,
}

/// Sentences to unit vectors: an encoder with its tokenizer.
pub struct Embedder {
    /// The encoder.
    pub bert: Bert,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Longer sentences are cut to this many tokens.
    pub max_tokens: usize,
    path: PathBuf,
    hash: OnceLock<String>,
}

impl LanguageModel {
    /// Opens a `.gguf` file or a Hugging Face directory and brings its weights to `device`. Errors name the file and
    /// what is wrong with it.
    pub fn open(path: &Path, device: Arc<dyn Device>, options: &LoadOptions) -> Result<LanguageModel, Error> {
        let checkpoint = Checkpoint::open(path)?;
        let tokenizer = open_tokenizer(&checkpoint)?;
        let chat_template = open_chat_template(&checkpoint)?;
        Ok(LanguageModel { llama: Llama::load(device, &checkpoint, options)?, tokenizer, chat_template })
    }

    /// The ids of a prompt: special tokens in it are recognised, BOS comes first where the model's metadata says so.
    pub fn prompt_ids(&self, text: &str) -> Result<Vec<u32>, Error> {
        prompt_ids(&self.tokenizer, text)
    }

    /// The ids of a conversation in the model's chat template, the assistant's turn open at the end. The template
    /// places BOS itself. An error where the model has no template or it refuses the messages.
    pub fn chat_ids(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        chat_ids(&self.tokenizer, self.chat_template.as_deref(), messages)
    }

    /// The tokens by which the model ends a text or a turn.
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids = self.llama.config.eos.clone();
        ids.extend(self.tokenizer.eos().into_iter().chain(self.tokenizer.eot()));
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// A session with room for a prompt and its continuation, as far as the model's context goes.
    pub fn session(&self, prompt_tokens: usize, max_tokens: usize) -> Result<Session, Error> {
        let max = self.llama.config.max_positions;
        if prompt_tokens > max {
            let what = format!("the prompt has {prompt_tokens} tokens; this model takes {max}: shorten it");
            return Err(Error::Request(what));
        }
        // The last token is chosen, not read.
        self.llama.session((prompt_tokens + max_tokens.saturating_sub(1)).clamp(1, max))
    }

    /// Appends `prompt` to the session's text and continues it. `on_token` gets each new token and the logits it was
    /// chosen from, `f32[vocab]`, and may end the generation. The session then holds every token but the last one.
    pub fn generate(
        &self,
        session: &mut Session,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32, &[f32]) -> ControlFlow<()>,
    ) -> Result<Generated, Error> {
        let mut sampler = Sampler::new(options.sampler)?;
        let mut generated = Generated {
            ids: Vec::new(),
            ending: Ending::MaxTokens,
            prompt_tokens: prompt.len(),
            prompt_seconds: 0.0,
            decode_tokens: 0,
            decode_seconds: 0.0,
        };
        if options.max_tokens == 0 {
            return Ok(generated);
        }
        let start = Instant::now();
        let mut logits = self.llama.forward(session, prompt, Want::Last)?;
        generated.prompt_seconds = start.elapsed().as_secs_f64();

        let start = Instant::now();
        loop {
            let id = sampler.sample(logits)?;
            if options.stop.contains(&id) {
                generated.ending = Ending::Stop(id);
                break;
            }
            generated.ids.push(id);
            if on_token(id, logits).is_break() {
                generated.ending = Ending::Caller;
                break;
            }
            if generated.ids.len() == options.max_tokens {
                break;
            }
            if session.len() == session.capacity() {
                generated.ending = Ending::Context;
                break;
            }
            logits = self.llama.forward(session, &[id], Want::Last)?;
            generated.decode_tokens += 1;
        }
        generated.decode_seconds = start.elapsed().as_secs_f64();
        Ok(generated)
    }

    /// How probable each token of `ids` is after those before it, in one window. Errors: fewer than two tokens, more
    /// than the model's context.
    pub fn evaluate(&self, ids: &[u32]) -> Result<Evaluation, Error> {
        self.evaluate_with(ids, &mut |_| {})
    }

    /// [`LanguageModel::evaluate`], telling `on_progress` how many tokens were read so far.
    pub fn evaluate_with(&self, ids: &[u32], on_progress: &mut dyn FnMut(usize)) -> Result<Evaluation, Error> {
        if ids.len() < 2 {
            let what = format!("the text has {} tokens; at least 2 are needed to predict one", ids.len());
            return Err(Error::Request(what));
        }
        let start = Instant::now();
        let vocab = self.llama.config.vocab;
        let mut session = self.llama.session(ids.len())?;
        let mut logprobs: Vec<f64> = Vec::with_capacity(ids.len());
        let mut each = |row0: usize, rows: &[f32]| {
            let targets = &ids[row0 + 1..ids.len().min(row0 + 1 + rows.len() / vocab)];
            let rows = rows.par_chunks(vocab).zip(targets);
            logprobs.par_extend(rows.map(|(row, &target)| row[target as usize] as f64 - log_sum_exp(row)));
            on_progress(logprobs.len() + 1);
            Ok(())
        };
        self.llama.forward(&mut session, ids, Want::All(&mut each))?;
        let mean_nll = -logprobs.iter().sum::<f64>() / logprobs.len() as f64;
        Ok(Evaluation {
            logprobs: logprobs.into_iter().map(|logprob| logprob as f32).collect(),
            mean_nll,
            perplexity: mean_nll.exp(),
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

impl Generated {
    /// Tokens of the prompt per second.
    pub fn prompt_tokens_per_s(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_seconds)
    }

    /// New tokens per second, once the prompt is read.
    pub fn tokens_per_s(&self) -> f64 {
        rate(self.decode_tokens, self.decode_seconds)
    }
}

/// [`LanguageModel::prompt_ids`].
pub(crate) fn prompt_ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let mut ids: Vec<u32> = bos.into_iter().collect();
    ids.extend(tokenizer.encode(text)?);
    Ok(ids)
}

/// [`LanguageModel::chat_ids`].
pub(crate) fn chat_ids(tokenizer: &Tokenizer, template: Option<&str>, messages: &[Message]) -> Result<Vec<u32>, Error> {
    let Some(template) = template else {
        return Err(Error::Request("this model has no chat template: give it a plain prompt".into()));
    };
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
    let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
    let text = ChatTemplate::from_str(template, &bos, &eos)?.render(messages, true)?;
    Ok(tokenizer.encode(&text)?)
}

fn rate(count: usize, seconds: f64) -> f64 {
    if count == 0 {
        0.0
    } else {
        count as f64 / seconds.max(1e-9)
    }
}

/// log Σ exp(l) in f64, the largest term taken out.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &l| max.max(l)) as f64;
    max + logits.iter().map(|&l| (l as f64 - max).exp()).sum::<f64>().ln()
}

/// The tokenizer in a GGUF header, or the one beside the weights.
pub(super) fn open_tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer, Error> {
    let config = &checkpoint.config;
    match &checkpoint.source {
        Source::Gguf(gguf) => {
            let id = |name: &str| gguf.optional(&format!("tokenizer.ggml.{name}_token_id"), Gguf::u32);
            let vocab = GgufVocab {
                model: gguf.str("tokenizer.ggml.model")?,
                pre: gguf.optional("tokenizer.ggml.pre", Gguf::str)?.unwrap_or("default"),
                tokens: gguf.strings("tokenizer.ggml.tokens")?,
                token_types: gguf.optional("tokenizer.ggml.token_type", Gguf::i32s)?.unwrap_or_default(),
                merges: gguf.optional("tokenizer.ggml.merges", Gguf::strings)?.unwrap_or_default(),
                bos: id("bos")?,
                eos: id("eos")?,
                eot: id("eot")?,
                add_bos: config.add_bos.unwrap_or(false),
            };
            Ok(Tokenizer::from_gguf(vocab)?)
        }
        Source::Hf(dir) => {
            let mut tokenizer = Tokenizer::from_json_file(&dir.path.join("tokenizer.json"))?;
            let mut eos = config.eos.iter().copied();
            let bos = config.bos.or(tokenizer.bos());
            tokenizer.set_ends(bos, eos.next(), eos.next(), config.add_bos.unwrap_or(tokenizer.add_bos()))?;
            Ok(tokenizer)
        }
    }
}

/// `chat_template` of `tokenizer_config.json`: one text, or several by name.
#[derive(Deserialize)]
#[serde(untagged)]
enum JsonTemplates {
    One(String),
    Many(Vec<JsonTemplate>),
}

#[derive(Deserialize)]
struct JsonTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
struct JsonTokenizerConfig {
    chat_template: Option<JsonTemplates>,
}

/// The chat template in a GGUF header, in `chat_template.jinja` or in `tokenizer_config.json`.
pub(super) fn open_chat_template(checkpoint: &Checkpoint) -> Result<Option<String>, Error> {
    let dir = match &checkpoint.source {
        Source::Gguf(gguf) => return Ok(gguf.optional("tokenizer.chat_template", Gguf::str)?.map(str::to_string)),
        Source::Hf(dir) => dir,
    };
    let path = dir.path.join("chat_template.jinja");
    match std::fs::metadata(&path) {
        Ok(meta) if meta.is_file() && meta.len() <= MAX_TEMPLATE => {
            return std::fs::read_to_string(&path).map(Some).map_err(|cause| Error::io(&path, cause));
        }
        Ok(_) => return Err(Error::file(&path, format!("is no file of at most {MAX_TEMPLATE} bytes"))),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {}
        Err(cause) => return Err(Error::io(&path, cause)),
    }
    let config: Option<JsonTokenizerConfig> = dir.json("tokenizer_config.json")?;
    Ok(config.and_then(|config| config.chat_template).and_then(|templates| match templates {
        JsonTemplates::One(template) => Some(template),
        JsonTemplates::Many(list) => list.into_iter().find(|t| t.name == "default").map(|t| t.template),
    }))
}

/// `sentence_bert_config.json`.
#[derive(Deserialize)]
struct JsonSentence {
    max_seq_length: Option<usize>,
}

/// `1_Pooling/config.json`.
#[derive(Deserialize)]
struct JsonPooling {
    pooling_mode_mean_tokens: Option<bool>,
}

impl Embedder {
    /// Opens a Hugging Face directory of a BERT sentence embedder and brings its weights to `device`. Errors name the
    /// file and what is wrong with it, such as a pooling other than the mean.
    pub fn open(path: &Path, device: Arc<dyn Device>, options: &LoadOptions) -> Result<Embedder, Error> {
        let checkpoint = Checkpoint::open(path)?;
        let Source::Hf(dir) = &checkpoint.source else {
            return Err(Error::file(path, "is not a Hugging Face directory, which embeddings need"));
        };
        let sentence: Option<JsonSentence> = dir.json("sentence_bert_config.json")?;
        let pooling: Option<JsonPooling> = dir.json("1_Pooling/config.json")?;
        if pooling.is_some_and(|pooling| pooling.pooling_mode_mean_tokens == Some(false)) {
            let what = "asks for a pooling other than the mean over tokens, which is not supported";
            return Err(Error::file(&path.join("1_Pooling/config.json"), what));
        }
        let max_tokens = sentence.and_then(|config| config.max_seq_length).unwrap_or(SENTENCE_TOKENS);
        let max_tokens = max_tokens.min(checkpoint.config.max_positions);
        let tokenizer = Tokenizer::from_json_file(&path.join("tokenizer.json"))?;
        let bert = Bert::load(device, &checkpoint, options)?;
        Ok(Embedder { bert, tokenizer, max_tokens, path: path.to_path_buf(), hash: OnceLock::new() })
    }

    /// What tells this model from others that make other vectors of a text: SHA-256 in hexadecimal of its files and of
    /// [`Embedder::max_tokens`]. The first call reads the files.
    pub fn model_hash(&self) -> Result<&str, Error> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash);
        }
        let files = model_sha256(&Checkpoint::open(&self.path)?)?;
        let hash = hex(&sha256(format!("{files} {}", self.max_tokens).as_bytes()));
        Ok(self.hash.get_or_init(|| hash))
    }

    /// Floats of one vector.
    pub fn width(&self) -> usize {
        self.bert.config.hidden
    }

    /// The unit vectors of lines, f32[lines, width], in order. Lines of about the same length go in one batch, so the
    /// order of work is another; a line's result depends on its batch by rounding alone.
    pub fn embed_lines<S: AsRef<str> + Sync>(&self, lines: &[S]) -> Result<Vec<f32>, Error> {
        let encode = |line: &S| self.tokenizer.encode_sentence(line.as_ref(), self.max_tokens);
        let mut sentences = lines.par_iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        let mut order: Vec<usize> = (0..lines.len()).collect();
        order.sort_by_key(|&i| sentences[i].len());

        let width = self.width();
        let mut out = vec![0.0; lines.len() * width];
        let mut rest = &order[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |&&i: &&usize| {
                tokens += sentences[i].len();
                tokens <= BATCH_TOKENS
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (batch, after) = rest.split_at(count);
            let ids: Vec<Vec<u32>> = batch.iter().map(|&i| std::mem::take(&mut sentences[i])).collect();
            for (vector, &i) in self.bert.embed(&ids)?.chunks(width).zip(batch) {
                out[i * width..(i + 1) * width].copy_from_slice(vector);
            }
            rest = after;
        }
        Ok(out)
    }
}
