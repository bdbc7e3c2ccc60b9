//! One job from its first token to its last: text that no stop text is part of, log-probabilities, what it took.

use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::{json, Map, Value};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::time::timeout_at;

use super::error::ApiError;
use super::metrics::Took;
use super::Server;
use crate::model::generate::Ending;
use crate::model::sampler::SamplerSettings;
use crate::model::stop::StopText;
use crate::model::tokenizer;
use crate::serve::job::{Event, Job, Refused, Token};

/// How long after its deadline an answer is waited for: the engine looks at the clock between passes.
const GRACE: std::time::Duration = std::time::Duration::from_secs(2);

/// What is asked of the engine for one choice.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The adapter.
    pub adapter: Option<String>,
    /// The tokens to continue.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampler: SamplerSettings,
    /// New tokens at most.
    pub max_tokens: usize,
    /// Texts that end it.
    pub stop: Vec<String>,
    /// The most probable tokens told.
    pub logprobs: Option<usize>,
    /// The prompt's log-probabilities are told.
    pub echo: bool,
    /// The token that ends the text is told with its log-probability: what scores texts counts on one for each place.
    pub tell_end: bool,
    /// When its time is up.
    pub deadline: Instant,
}

/// A token with its text.
#[derive(Clone, Debug)]
pub struct Scored {
    /// The token.
    pub token: Token,
    /// Where its text begins in the answer, in bytes.
    pub at: usize,
}

/// What can be shown now.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// Text.
    pub text: String,
    /// Its tokens, where their log-probabilities were asked for.
    pub tokens: Vec<Scored>,
    /// The prompt's, before all others.
    pub prompt: Vec<Token>,
}

/// A whole answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, where their log-probabilities were asked for.
    pub tokens: Vec<Scored>,
    /// The prompt's tokens, where theirs were.
    pub prompt: Vec<Token>,
    /// `stop` or `length`.
    pub finish: &'static str,
    /// What it took.
    pub took: Took,
}

/// Why there is no answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Whoever asked has left.
    Gone,
    /// Something else.
    Api(ApiError),
}

/// Where the pieces of an answer go: made into bytes, with room for a few; who reads slowly makes it wait.
pub struct Sink {
    /// The body's end.
    pub to: mpsc::Sender<axum::body::Bytes>,
    /// Makes an event of a piece.
    pub make: Box<dyn Fn(&Piece) -> Value + Send + Sync>,
}

impl Sink {
    /// Sends an event. An error: nobody reads.
    pub async fn send(&self, value: &Value) -> Result<(), Fault> {
        self.to.send(event(value)).await.map_err(|_| Fault::Gone)
    }
}

/// A server-sent event.
pub fn event(value: &Value) -> axum::body::Bytes {
    axum::body::Bytes::from(format!("data: {value}\n\n"))
}

/// Hands a job to the engine.
pub fn begin(server: &Server, plan: &Plan) -> Result<UnboundedReceiver<Event>, Refused> {
    if server.draining.load(Ordering::SeqCst) {
        return Err(Refused::Draining);
    }
    let (events, received) = mpsc::unbounded_channel();
    server.engine.submit(Job {
        prompt: plan.prompt.clone(),
        adapter: plan.adapter.clone(),
        sampler: plan.sampler,
        max_tokens: plan.max_tokens,
        stop: if plan.tell_end { Vec::new() } else { server.engine.text().stop_ids().to_vec() },
        logprobs: plan.logprobs,
        echo: plan.echo,
        deadline: Some(plan.deadline),
        events,
    })?;
    Ok(received)
}

/// Counts how a choice ended, whatever becomes of whoever waits for it.
struct End<'a> {
    server: &'a Server,
    reason: &'static str,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.server.metrics.ended(self.reason);
    }
}

/// Follows a job to its end, sending its pieces on the way where there is someone to send them to.
pub async fn follow(
    server: &Server,
    plan: &Plan,
    events: UnboundedReceiver<Event>,
    began: Instant,
    sink: Option<&Sink>,
) -> Result<Answer, Fault> {
    let mut end = End { server, reason: "abort" };
    let answer = pieces(server, plan, events, began, sink).await;
    end.reason = match &answer {
        Ok(answer) => answer.finish,
        Err(Fault::Gone) => "abort",
        Err(Fault::Api(_)) => "error",
    };
    if let Ok(answer) = &answer {
        server.metrics.took(&answer.took);
    }
    answer
}

async fn pieces(
    server: &Server,
    plan: &Plan,
    mut events: UnboundedReceiver<Event>,
    began: Instant,
    sink: Option<&Sink>,
) -> Result<Answer, Fault> {
    let text = server.engine.text();
    let stop_ids = text.stop_ids();
    let mut decoder = text.tokenizer.decoder(true);
    let mut shown = StopText::new(&plan.stop);
    let mut answer = Answer { finish: "length", ..Answer::default() };
    answer.took.prompt_tokens = plan.prompt.len();
    let broken = |error: tokenizer::Error| Fault::Api(ApiError::internal(error.to_string()));
    let late = tokio::time::Instant::from_std(plan.deadline + GRACE);
    let (mut told, mut last, mut prompt): (usize, Option<Instant>, Vec<Token>) = (0, None, Vec::new());
    loop {
        let next = async {
            match sink {
                None => Some(events.recv().await),
                // Who leaves while the job waits would otherwise be noticed at its first token.
                Some(sink) => tokio::select! {
                    next = events.recv() => Some(next),
                    () = sink.to.closed() => None,
                },
            }
        };
        let event = match timeout_at(late, next).await {
            Err(_) => return Err(Fault::Api(ApiError::timeout())),
            Ok(None) => return Err(Fault::Gone),
            Ok(Some(None)) => return Err(Fault::Api(ApiError::internal("the engine gave the job up"))),
            Ok(Some(Some(event))) => event,
        };
        let token = match event {
            Event::Prompt(tokens) => {
                answer.prompt = tokens.clone();
                prompt = tokens;
                continue;
            }
            Event::Failed(what) => {
                log::error!("a job failed: {what}");
                return Err(Fault::Api(ApiError::internal(what)));
            }
            Event::Done(done) => {
                answer.finish = match done.ending {
                    Ending::Stop(_) => "stop",
                    Ending::MaxTokens | Ending::Context => "length",
                    Ending::Caller => return Err(Fault::Api(ApiError::timeout())),
                };
                answer.took.queue = done.queue_seconds;
                answer.took.prefill = done.prompt_seconds;
                answer.took.decode = done.decode_seconds;
                break;
            }
            Event::Token(token) => token,
        };
        let now = Instant::now();
        match last.replace(now) {
            None => answer.took.first = Some((now - began).as_secs_f64()),
            Some(before) => {
                server.metrics.between((now - before).as_secs_f64());
                answer.took.decode += (now - before).as_secs_f64();
            }
        }
        answer.took.new_tokens += 1;
        let ended = plan.tell_end && stop_ids.contains(&token.id);
        let id = token.id;
        if plan.logprobs.is_some() {
            answer.tokens.push(Scored { token, at: shown.whole.len() });
        }
        if ended {
            answer.finish = "stop";
            break;
        }
        let piece = match decoder.push(id) {
            // Rows of the output matrix that pad it have no token: they can be drawn, and are no text.
            Err(tokenizer::Error::UnknownId { .. }) => None,
            piece => piece.map_err(broken)?,
        };
        let (ready, stopped) = shown.push(piece.as_deref().unwrap_or_default());
        if stopped {
            answer.finish = "stop";
            let whole = shown.whole.len();
            answer.tokens.retain(|scored| scored.at < whole);
        }
        if let Some(sink) = sink {
            let whole = answer.tokens.iter().take_while(|scored| stopped || scored.at < shown.shown).count();
            let tokens = answer.tokens[told.min(whole)..whole].to_vec();
            told = told.max(whole);
            send(sink, Piece { text: ready, tokens, prompt: std::mem::take(&mut prompt) }, late).await?;
        }
        if stopped {
            break;
        }
    }
    drop(events);
    if !shown.ended {
        // What waited for the rest of its character, and what might have begun a stop text.
        let (mut ready, _) = shown.push(&decoder.finish());
        ready += &shown.rest();
        if let Some(sink) = sink {
            let tokens = answer.tokens.get(told..).unwrap_or_default().to_vec();
            send(sink, Piece { text: ready, tokens, prompt }, late).await?;
        }
    }
    answer.text = shown.whole;
    answer.took.whole = began.elapsed().as_secs_f64();
    Ok(answer)
}

/// Sends what there is of a piece.
async fn send(sink: &Sink, piece: Piece, late: tokio::time::Instant) -> Result<(), Fault> {
    if piece.text.is_empty() && piece.tokens.is_empty() && piece.prompt.is_empty() {
        return Ok(());
    }
    let value = (sink.make)(&piece);
    timeout_at(late, sink.send(&value)).await.map_err(|_| Fault::Api(ApiError::timeout()))?
}

/// The text of a token by itself, and its bytes.
fn spelled(server: &Server, id: u32) -> (String, Vec<u8>) {
    let bytes = server.engine.text().tokenizer.bytes(id).unwrap_or_default();
    match String::from_utf8(bytes) {
        Ok(text) => (text.clone(), text.into_bytes()),
        // OpenAI's way to spell what is no text.
        Err(error) => {
            let bytes = error.into_bytes();
            let digits: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            (format!("bytes:{digits}"), bytes)
        }
    }
}

/// Log-probabilities as `/v1/chat/completions` tells them.
pub fn chat_logprobs(server: &Server, tokens: &[Scored]) -> Value {
    let one = |id: u32, logprob: Option<f32>| {
        let (text, bytes) = spelled(server, id);
        json!({"token": text, "logprob": logprob, "bytes": bytes})
    };
    let content = tokens.iter().map(|Scored { token, .. }| {
        let mut value = one(token.id, token.logprob);
        value["top_logprobs"] = token.top.iter().map(|&(id, logprob)| one(id, Some(logprob))).collect();
        value
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// Log-probabilities as `/v1/completions` tells them; `offset` is where the first token's text begins, in characters.
pub fn text_logprobs(server: &Server, tokens: &[&Token], offset: &mut usize) -> Value {
    let (mut texts, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for token in tokens {
        let (text, _) = spelled(server, token.id);
        offsets.push(*offset);
        *offset += text.chars().count();
        logprobs.push(token.logprob);
        // Two tokens may be spelled alike: the more probable one, which comes first, is told.
        let mut top = Map::new();
        for &(id, logprob) in &token.top {
            top.entry(spelled(server, id).0).or_insert(json!(logprob));
        }
        if let Some(logprob) = token.logprob {
            top.entry(text.clone()).or_insert(json!(logprob));
        }
        tops.push(token.logprob.map(|_| Value::Object(top)));
        texts.push(text);
    }
    json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}
