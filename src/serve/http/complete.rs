//! `/v1/chat/completions` and `/v1/completions`: whole or in pieces, recorded before it is acknowledged, with the shadow's
//! answer afterwards.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::http::{header, HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{json, Value};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::StreamExt;

use super::answer::{begin, chat_logprobs, event, follow, text_logprobs, Answer, Fault, Piece, Plan, Sink};
use super::error::ApiError;
use super::prepare::{Ready, Route, Target, REFUSAL};
use super::wire::{Asked, Chat, Completion};
use super::{Arm, Server, Ticket};
use crate::serve::canary::Observed;
use crate::serve::capture::now;
use crate::serve::job::{Event, Refused, Token};

/// Choices of one request that may come in pieces.
const MAX_STREAMS: usize = 32;
/// Events on their way to a reader.
const AHEAD: usize = 32;
/// New tokens of `/v1/completions` where nobody says how many, as OpenAI has it.
const LEGACY_TOKENS: usize = 16;
/// A request's header that names its conversation, for the split of an alias.
const CONVERSATION: &str = "x-conversation-id";

/// What was asked.
enum Source {
    Chat(Chat),
    Text(Completion),
}

/// A request that is being answered.
struct Work {
    server: Arc<Server>,
    _ticket: Ticket,
    id: String,
    created: u64,
    began: Instant,
    route: Route,
    source: Source,
    /// Who asks, as the record knows them.
    user: Option<String>,
    /// One for each choice; empty where no passage is relevant.
    plans: Vec<Plan>,
    /// The text of each choice's prompt, for `/v1/completions`.
    prompts: Vec<String>,
    citations: Option<Value>,
}

type Events = UnboundedReceiver<Event>;

/// `POST /v1/chat/completions`.
pub async fn chat(server: Arc<Server>, headers: &HeaderMap, body: &Value) -> Result<Response, ApiError> {
    let chat = Chat::read(body)?;
    let first = chat.messages.iter().position(|message| message.role == "user").unwrap_or(0);
    let beginning: Vec<String> = chat.messages[..=first].iter().map(|m| format!("{}\0{}", m.role, m.content)).collect();
    let key = sticky(&chat.asked, headers, &beginning.join("\0"));
    let mut work = Work::begin(server, &key, Source::Chat(chat))?;
    let (server, route) = (work.server.clone(), work.route.clone());
    work = blocking(move || {
        let Source::Chat(chat) = &work.source else { return Ok(work) };
        let ready = server.prepare_chat(chat, &route.target, false)?;
        if !(ready.ids.is_empty() && ready.citations.is_some()) {
            work.plans = work.chat_plans(chat, &route.target, &ready);
        }
        work.citations = ready.citations;
        Ok(work)
    })
    .await?;
    work.respond().await
}

/// `POST /v1/completions`.
pub async fn completions(server: Arc<Server>, headers: &HeaderMap, body: &Value) -> Result<Response, ApiError> {
    let completion = Completion::read(body)?;
    let key = sticky(&completion.asked, headers, &format!("{:?}", completion.prompts[0]));
    let mut work = Work::begin(server, &key, Source::Text(completion))?;
    if work.route.target.index.is_some() {
        let what = "an index is asked by /v1/chat/completions, which answers with citations";
        return Err(ApiError::param("model", what));
    }
    work = blocking(move || {
        let Source::Text(completion) = &work.source else { return Ok(work) };
        (work.plans, work.prompts) = work.text_plans(completion, &work.route.target)?;
        Ok(work)
    })
    .await?;
    work.respond().await
}

/// Whoever asks, for the split of an alias: the user, the conversation, or how the conversation begins.
fn sticky(asked: &Asked, headers: &HeaderMap, beginning: &str) -> String {
    let conversation = headers.get(CONVERSATION).and_then(|value| value.to_str().ok());
    match (&asked.user, conversation) {
        (Some(user), _) => format!("user {user}"),
        (None, Some(conversation)) => format!("conversation {conversation}"),
        (None, None) => format!("beginning {beginning}"),
    }
}

/// Computes on a thread for it.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("the request could not be prepared: {error}"))),
    }
}

impl Work {
    fn begin(server: Arc<Server>, key: &str, source: Source) -> Result<Work, ApiError> {
        let ticket = server.ticket();
        if server.draining.load(Ordering::SeqCst) {
            return Err(ApiError::draining());
        }
        let (asked, kind) = match &source {
            Source::Chat(chat) => (&chat.asked, "chatcmpl"),
            Source::Text(completion) => (&completion.asked, "cmpl"),
        };
        let route = server.route(&asked.model, key)?;
        let user = asked.user.as_ref().map(|user| server.canary.pseudonym(user));
        Ok(Work {
            id: format!("{kind}-{:016x}{:016x}", super::random(), super::random()),
            _ticket: ticket,
            created: now() as u64,
            began: Instant::now(),
            route,
            source,
            user,
            plans: Vec::new(),
            prompts: Vec::new(),
            citations: None,
            server,
        })
    }

    fn asked(&self) -> &Asked {
        match &self.source {
            Source::Chat(chat) => &chat.asked,
            Source::Text(completion) => &completion.asked,
        }
    }

    fn plan(&self, target: &Target, prompt: Vec<u32>, choice: usize, default: usize) -> Plan {
        let asked = self.asked();
        let mut sampler = asked.sampler;
        sampler.seed = sampler.seed.wrapping_add(choice as u64);
        Plan {
            adapter: target.adapter.clone(),
            max_tokens: self.server.most_tokens(asked, prompt.len(), default),
            prompt,
            sampler,
            stop: asked.stop.clone(),
            logprobs: asked.logprobs,
            echo: false,
            tell_end: false,
            deadline: self.began + self.server.limits.timeout,
        }
    }

    fn chat_plans(&self, chat: &Chat, target: &Target, ready: &Ready) -> Vec<Plan> {
        let default = self.server.limits.default_tokens;
        (0..chat.asked.n).map(|choice| self.plan(target, ready.ids.clone(), choice, default)).collect()
    }

    fn text_plans(&self, completion: &Completion, target: &Target) -> Result<(Vec<Plan>, Vec<String>), ApiError> {
        let (mut plans, mut texts) = (Vec::new(), Vec::new());
        for prompt in &completion.prompts {
            let (ids, text) = self.server.prepare_prompt(prompt)?;
            for choice in 0..completion.asked.n {
                let scored = completion.asked.logprobs.is_some();
                let plan = self.plan(target, ids.clone(), choice, LEGACY_TOKENS);
                plans.push(Plan { echo: completion.echo && scored, tell_end: scored, ..plan });
                texts.push(text.clone());
            }
        }
        Ok((plans, texts))
    }

    async fn respond(self) -> Result<Response, ApiError> {
        match self.asked().stream {
            true => self.stream(),
            false => self.whole().await,
        }
    }

    /// The field that the prompt came in.
    fn field(&self) -> &'static str {
        match &self.source {
            Source::Chat(_) => "messages",
            Source::Text(_) => "prompt",
        }
    }

    /// All of it at once.
    async fn whole(self) -> Result<Response, ApiError> {
        let mut answers: Vec<Answer> = Vec::new();
        let mut running: VecDeque<(usize, Events)> = VecDeque::new();
        let mut next = 0;
        while next < self.plans.len() || !running.is_empty() {
            if next < self.plans.len() {
                match begin(&self.server, &self.plans[next]) {
                    Ok(events) => {
                        running.push_back((next, events));
                        next += 1;
                        continue;
                    }
                    // A request of many prompts waits for places of its own.
                    Err(Refused::Full { .. }) if !running.is_empty() => {}
                    Err(refused) => return Err(ApiError::from_refused(refused, self.field())),
                }
            }
            let Some((choice, events)) = running.pop_front() else { break };
            match follow(&self.server, &self.plans[choice], events, self.began, None).await {
                Ok(answer) => answers.push(answer),
                Err(Fault::Api(error)) => return Err(self.failed(error).await),
                Err(Fault::Gone) => return Err(ApiError::internal("nobody waits for the answer")),
            }
        }
        if self.plans.is_empty() {
            answers.push(refusal());
        }
        for (choice, answer) in answers.iter().enumerate() {
            self.settle(choice, answer).await?;
        }
        let choices: Vec<Value> = answers.iter().enumerate().map(|(i, answer)| self.choice(i, answer)).collect();
        let mut object = self.object(match self.source {
            Source::Chat(_) => "chat.completion",
            Source::Text(_) => "text_completion",
        });
        object["choices"] = json!(choices);
        object["usage"] = self.usage(answers.iter().map(|answer| answer.took.new_tokens).sum());
        self.shadow();
        Ok(axum::Json(object).into_response())
    }

    fn object(&self, kind: &str) -> Value {
        json!({"id": self.id, "object": kind, "created": self.created, "model": self.route.asked})
    }

    fn usage(&self, new: usize) -> Value {
        // Choices of one prompt share it.
        let prompt: usize = self.plans.iter().step_by(self.asked().n).map(|plan| plan.prompt.len()).sum();
        json!({"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new})
    }

    /// A whole choice.
    fn choice(&self, index: usize, answer: &Answer) -> Value {
        let scored = self.asked().logprobs.is_some();
        match &self.source {
            Source::Chat(_) => {
                let mut message = json!({"role": "assistant", "content": answer.text, "refusal": null});
                if let Some(citations) = &self.citations {
                    message["citations"] = citations.clone();
                }
                let logprobs = scored.then(|| chat_logprobs(&self.server, &answer.tokens));
                json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish})
            }
            Source::Text(completion) => {
                let text = match completion.echo {
                    true => self.prompts[index].clone() + &answer.text,
                    false => answer.text.clone(),
                };
                let tokens: Vec<&Token> =
                    answer.prompt.iter().chain(answer.tokens.iter().map(|scored| &scored.token)).collect();
                let logprobs = scored.then(|| text_logprobs(&self.server, &tokens, &mut 0));
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish})
            }
        }
    }

    /// A piece of a choice: text, and at the end why there is no more.
    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish: Option<&str>) -> Value {
        let (kind, choice) = match self.source {
            Source::Chat(_) => {
                let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
                ("chat.completion.chunk", choice)
            }
            Source::Text(_) => {
                let choice = json!({"index": index, "text": delta, "logprobs": logprobs, "finish_reason": finish});
                ("text_completion", choice)
            }
        };
        let mut object = self.object(kind);
        object["choices"] = json!([choice]);
        if self.asked().include_usage {
            object["usage"] = Value::Null;
        }
        object
    }

    /// Pieces as they come.
    fn stream(self) -> Result<Response, ApiError> {
        if self.plans.len() > MAX_STREAMS {
            return Err(ApiError::param("stream", format!("at most {MAX_STREAMS} choices can be streamed at once")));
        }
        let begin = |plan| begin(&self.server, plan).map_err(|refused| ApiError::from_refused(refused, self.field()));
        let events = self.plans.iter().map(begin).collect::<Result<Vec<Events>, _>>()?;
        let (to, from) = mpsc::channel::<Bytes>(AHEAD);
        tokio::spawn(Arc::new(self).send(events, to));
        let body = Body::from_stream(ReceiverStream::new(from).map(Ok::<_, Infallible>));
        let headers = [(header::CONTENT_TYPE, "text/event-stream; charset=utf-8"), (header::CACHE_CONTROL, "no-store")];
        Ok((StatusCode::OK, headers, body).into_response())
    }

    async fn send(self: Arc<Self>, events: Vec<Events>, to: mpsc::Sender<Bytes>) {
        let mut choices = tokio::task::JoinSet::new();
        if events.is_empty() {
            choices.spawn(self.clone().send_refusal(to.clone()));
        }
        for (index, events) in events.into_iter().enumerate() {
            choices.spawn(self.clone().send_choice(index, events, to.clone()));
        }
        let mut new = 0;
        while let Some(ended) = choices.join_next().await {
            let error = match ended {
                Ok(Ok(tokens)) => {
                    new += tokens;
                    continue;
                }
                Ok(Err(Fault::Gone)) => return,
                Ok(Err(Fault::Api(error))) => self.failed(error).await,
                Err(error) => ApiError::internal(error.to_string()),
            };
            let _ = to.send(event(&error.body())).await; // a reader who left needs no word
            return;
        }
        if self.asked().include_usage {
            let mut last = self.chunk(0, Value::Null, Value::Null, None);
            last["choices"] = json!([]);
            last["usage"] = self.usage(new);
            let _ = to.send(event(&last)).await;
        }
        let _ = to.send(Bytes::from_static(b"data: [DONE]\n\n")).await;
        self.shadow();
    }

    async fn send_choice(
        self: Arc<Self>,
        index: usize,
        events: Events,
        to: mpsc::Sender<Bytes>,
    ) -> Result<usize, Fault> {
        let plan = &self.plans[index];
        let work = self.clone();
        let offset = AtomicUsize::new(0);
        let make = move |piece: &Piece| work.piece(index, piece, &offset);
        let sink = Sink { to, make: Box::new(make) };
        match &self.source {
            Source::Chat(_) => {
                let hello = json!({"role": "assistant", "content": ""});
                sink.send(&self.chunk(index, hello, Value::Null, None)).await?;
            }
            Source::Text(completion) if completion.echo && !plan.echo => {
                let text = json!(self.prompts[index]);
                sink.send(&self.chunk(index, text, Value::Null, None)).await?;
            }
            Source::Text(_) => {}
        }
        let answer = follow(&self.server, plan, events, self.began, Some(&sink)).await?;
        self.settle(index, &answer).await.map_err(Fault::Api)?;
        let delta = match &self.source {
            Source::Chat(_) => self.last_delta(),
            Source::Text(_) => json!(""),
        };
        sink.send(&self.chunk(index, delta, Value::Null, Some(answer.finish))).await?;
        Ok(answer.took.new_tokens)
    }

    fn last_delta(&self) -> Value {
        self.citations.as_ref().map_or(json!({}), |citations| json!({ "citations": citations }))
    }

    async fn send_refusal(self: Arc<Self>, to: mpsc::Sender<Bytes>) -> Result<usize, Fault> {
        let answer = refusal();
        let hello = json!({"role": "assistant", "content": answer.text});
        let gone = |_| Fault::Gone;
        to.send(event(&self.chunk(0, hello, Value::Null, None))).await.map_err(gone)?;
        self.settle(0, &answer).await.map_err(Fault::Api)?;
        to.send(event(&self.chunk(0, self.last_delta(), Value::Null, Some("stop")))).await.map_err(gone)?;
        Ok(0)
    }

    /// A piece as an event. `offset` is where the next token's text begins.
    fn piece(&self, index: usize, piece: &Piece, offset: &AtomicUsize) -> Value {
        let scored = self.asked().logprobs.is_some();
        match &self.source {
            Source::Chat(_) => {
                let logprobs = scored.then(|| chat_logprobs(&self.server, &piece.tokens));
                self.chunk(index, json!({"content": piece.text}), json!(logprobs), None)
            }
            Source::Text(_) => {
                let text = match piece.prompt.is_empty() {
                    true => piece.text.clone(),
                    false => self.prompts[index].clone() + &piece.text,
                };
                let tokens: Vec<&Token> =
                    piece.prompt.iter().chain(piece.tokens.iter().map(|scored| &scored.token)).collect();
                let mut at = offset.load(Ordering::Relaxed);
                let logprobs = scored.then(|| text_logprobs(&self.server, &tokens, &mut at));
                offset.store(at, Ordering::Relaxed);
                self.chunk(index, json!(text), json!(logprobs), None)
            }
        }
    }

    fn arm(&self) -> Option<Arm> {
        let alias = self.route.alias.clone()?;
        Some(Arm { alias, model: self.route.target.name.clone() })
    }

    /// Records a complete answer; when this comes back it is on the disk.
    async fn settle(&self, choice: usize, answer: &Answer) -> Result<(), ApiError> {
        let arm = self.arm();
        if let Some(arm) = arm.as_ref().filter(|_| !self.plans.is_empty()) {
            let seen = Observed { failed: false, seconds: answer.took.whole, shadow: false };
            self.server.observe(&arm.alias, &arm.model, seen);
        }
        self.server.recent.add(&self.id, arm);
        if self.server.capture.is_some() {
            let line = self.line(&self.route.target, choice, answer, false, &self.citations);
            self.server.log(line).await?;
        }
        Ok(())
    }

    fn line(&self, target: &Target, choice: usize, answer: &Answer, shadow: bool, hits: &Option<Value>) -> Value {
        let messages = match &self.source {
            Source::Chat(chat) => json!(chat.messages),
            Source::Text(_) => json!([{"role": "user", "content": self.prompts.get(choice)}]),
        };
        let mut line = json!({
            "id": self.id,
            "time": now(),
            "model": self.route.asked,
            "adapter": target.adapter,
            "index": target.index,
            "user": self.user,
            "messages": messages,
            "answer": answer.text,
            "finish_reason": answer.finish,
            "prompt_tokens": answer.took.prompt_tokens,
            "completion_tokens": answer.took.new_tokens,
            "hits": hits.clone().unwrap_or(json!([])),
            "shadow": shadow,
            "arm": self.route.alias.as_ref().map(|_| &target.name),
            // Without a model there is nothing to compare arms by.
            "seconds": (!self.plans.is_empty()).then_some(answer.took.whole),
        });
        if choice > 0 {
            line["choice"] = json!(choice);
        }
        line
    }

    /// Counts and records that there is no answer, where the server is at fault.
    async fn failed(&self, error: ApiError) -> ApiError {
        self.note_failure(&self.route.target, &error, false).await;
        error
    }

    async fn note_failure(&self, target: &Target, error: &ApiError, shadow: bool) {
        let Some(alias) = self.route.alias.as_ref().filter(|_| error.is_ours()) else { return };
        let seconds = self.began.elapsed().as_secs_f64();
        self.server.observe(alias, &target.name, Observed { failed: true, seconds, shadow });
        let line = json!({"id": self.id, "time": now(), "model": self.route.asked, "arm": target.name, "shadow": shadow,
            "error": error.code.unwrap_or(error.kind)});
        if let Err(error) = self.server.log(line).await {
            log::error!("{}: {}", self.id, error.message);
        }
    }

    /// Lets the shadow answer the same; its answer is only recorded. Where there is no room for it, it is left out.
    fn shadow(&self) {
        let Some(target) = self.route.shadow.clone() else { return };
        let source = match &self.source {
            Source::Chat(chat) => Source::Chat(chat.clone()),
            Source::Text(completion) => Source::Text(completion.clone()),
        };
        let mut work = Work {
            server: self.server.clone(),
            _ticket: self.server.ticket(),
            id: self.id.clone(),
            created: self.created,
            began: Instant::now(),
            route: self.route.clone(),
            source,
            user: self.user.clone(),
            plans: Vec::new(),
            prompts: self.prompts.clone(),
            citations: None,
        };
        tokio::spawn(async move {
            let to = target.clone();
            let prepared = blocking(move || {
                let (plans, citations) = match &work.source {
                    Source::Chat(chat) => {
                        let ready = work.server.prepare_chat(chat, &to, true)?;
                        (work.chat_plans(chat, &to, &ready), ready.citations)
                    }
                    Source::Text(completion) => (work.text_plans(completion, &to)?.0, None),
                };
                (work.plans, work.citations) = (plans, citations);
                Ok(work)
            });
            let Ok(work) = prepared.await else { return };
            let Some(plan) = work.plans.first().filter(|plan| !plan.prompt.is_empty()) else { return };
            let Ok(events) = begin(&work.server, plan) else { return };
            let alias = work.route.alias.clone().unwrap_or_default();
            match follow(&work.server, plan, events, work.began, None).await {
                Ok(answer) => {
                    let seen = Observed { failed: false, seconds: answer.took.whole, shadow: true };
                    work.server.observe(&alias, &target.name, seen);
                    let line = work.line(&target, 0, &answer, true, &work.citations);
                    if let Err(error) = work.server.log(line).await {
                        log::error!("{}: {}", work.id, error.message);
                    }
                }
                Err(Fault::Api(error)) => work.note_failure(&target, &error, true).await,
                Err(Fault::Gone) => {}
            }
        });
    }
}

/// The answer where no passage is relevant.
fn refusal() -> Answer {
    Answer { text: REFUSAL.into(), finish: "stop", ..Answer::default() }
}
