//! Every route, who may ask it, and those that answer with something else than generated text.

use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{header, HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::Router;
use serde_json::{json, Value};

use super::error::ApiError;
use super::wire::{Embeddings, Feedback, Fields};
use super::{base64, complete, page, Server};
use crate::model::adapter::sha256;
use crate::serve::capture::now;

/// Adapters loaded at once: what a label or a list may hold.
const MAX_ADAPTERS: usize = 256;
/// Characters of an adapter's name.
const MAX_NAME: usize = 64;

/// The server's routes.
pub fn router(server: Arc<Server>) -> Router {
    Router::new().fallback(move |request: Request| answer(server.clone(), request))
}

/// Answers one request; every error is an object.
async fn answer(server: Arc<Server>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let route = known(parts.uri.path());
    let result = dispatch(&server, &parts.method, &parts.uri, &parts.headers, body).await;
    let mut response = result.unwrap_or_else(IntoResponse::into_response);
    server.metrics.answered(route, response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(header::HeaderValue::from_static("no-store"));
    response
}

/// A route as a label: one of a fixed list.
fn known(path: &str) -> &'static str {
    const ROUTES: [&str; 9] = [
        "/",
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/feedback",
        "/v1/status",
    ];
    let exact = ROUTES.iter().find(|route| **route == path).copied();
    exact.unwrap_or(if path.starts_with("/v1/adapters") { "/v1/adapters" } else { "other" })
}

async fn dispatch(
    server: &Arc<Server>,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    check_host(server, uri, headers)?;
    let path = uri.path();
    let wanted = match path {
        "/v1/chat/completions" | "/v1/completions" | "/v1/embeddings" | "/v1/feedback" | "/v1/adapters" => Method::POST,
        _ if path.starts_with("/v1/adapters/") => Method::DELETE,
        "/" | "/health" | "/metrics" | "/v1/models" | "/v1/status" => Method::GET,
        _ if path.starts_with("/v1/models/") => Method::GET,
        _ => {
            let what = "there is no such route: see GET / for a page, GET /v1/models for models";
            return Err(ApiError::refused(StatusCode::NOT_FOUND, "unknown_url", what));
        }
    };
    if *method != wanted && !(*method == Method::HEAD && wanted == Method::GET) {
        let what = format!("this route is asked with {wanted}");
        let allow = [(Method::POST, "POST"), (Method::DELETE, "DELETE")].into_iter().find(|(one, _)| *one == wanted);
        let error = ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", what);
        return Err(ApiError { allow: Some(allow.map_or("GET, HEAD", |(_, word)| word)), ..error });
    }
    if path == "/" {
        return Ok(page::page(server));
    }
    if path == "/health" {
        return Ok(health(server));
    }
    authorize(server, headers)?;
    if wanted == Method::POST {
        let body = read(server, headers, body).await?;
        return match path {
            "/v1/chat/completions" => complete::chat(server.clone(), headers, &body).await,
            "/v1/completions" => complete::completions(server.clone(), headers, &body).await,
            "/v1/embeddings" => embeddings(server.clone(), &body).await,
            "/v1/feedback" => feedback(server, &body).await,
            _ => load(server.clone(), &body).await,
        };
    }
    match path {
        "/metrics" => {
            if let Some(watch) = &server.drift {
                watch.tell(&server.metrics);
            }
            let text = server.metrics.text(&server.engine.stats(), &server.canary);
            Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
        }
        "/v1/models" => {
            let list: Vec<Value> = models(server).iter().map(|(id, kind)| model(server, id, kind)).collect();
            Ok(axum::Json(json!({"object": "list", "data": list})).into_response())
        }
        "/v1/status" => Ok(axum::Json(status(server)).into_response()),
        _ => match path.strip_prefix("/v1/adapters/") {
            Some(name) => unload(server.clone(), &unescape(name)).await,
            None => {
                let name = unescape(path.trim_start_matches("/v1/models/"));
                let found = models(server).into_iter().find(|(id, _)| *id == name);
                let (id, kind) = found.ok_or_else(|| ApiError::no_model(&name))?;
                Ok(axum::Json(model(server, &id, kind)).into_response())
            }
        },
    }
}

/// A name in a path, where clients may write `%2B` for a plus.
fn unescape(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let [first, after @ ..] = rest {
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16).filter(|_| *first == b'%');
        let escaped = digit(0).zip(digit(1)).map(|(high, low)| (16 * high + low) as u8);
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// An open server answers only to this machine's names: else a page of another origin, whose name leads here, could ask.
fn check_host(server: &Server, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
    if !server.loopback || !server.tokens.is_empty() {
        return Ok(());
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).or(uri.authority().map(|a| a.as_str()));
    let host = host.unwrap_or_default();
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let here = name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    match here {
        true => Ok(()),
        false => {
            let what = "without a token this server answers only to localhost, 127.0.0.1 and [::1]";
            Err(ApiError::refused(StatusCode::FORBIDDEN, "wrong_host", what))
        }
    }
}

/// The token, compared in a time that does not tell how much of it was right.
fn authorize(server: &Server, headers: &HeaderMap) -> Result<(), ApiError> {
    if server.tokens.is_empty() {
        return Ok(());
    }
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.split_once(' ')).filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer"));
    let given = sha256(given.map_or("", |(_, token)| token.trim()).as_bytes());
    let differ = |token: &[u8; 32]| token.iter().zip(&given).fold(0u8, |bits, (a, b)| bits | (a ^ b));
    // Every token is compared, to its end.
    let right =
        server.tokens.iter().fold(0u8, |right, token| right | u8::from(std::hint::black_box(differ(token)) == 0));
    match right {
        0 => {
            let what = "the token is missing or wrong: send Authorization: Bearer TOKEN";
            Err(ApiError::refused(StatusCode::UNAUTHORIZED, "invalid_api_key", what))
        }
        _ => Ok(()),
    }
}

/// A body of JSON, of at most as many bytes as may be.
async fn read(server: &Server, headers: &HeaderMap, body: Body) -> Result<Value, ApiError> {
    let most = server.limits.max_body;
    let too_large = || {
        let what = format!("the body has more than {most} bytes: send less, or give the server more --max-body");
        ApiError::refused(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", what)
    };
    // Pages of other origins can send forms and text unasked, but not this.
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if !kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        let what = "the body must be JSON: send Content-Type: application/json";
        return Err(ApiError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", what));
    }
    let told = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if told.is_some_and(|told| told > most as u64) {
        return Err(too_large());
    }
    let bytes = match tokio::time::timeout(server.limits.client, axum::body::to_bytes(body, most)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            let long =
                std::error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("length limit"));
            return Err(if long { too_large() } else { ApiError::request("the body broke off") });
        }
        Err(_) => {
            let what = format!("the body did not come within {} s", server.limits.client.as_secs_f64());
            return Err(ApiError::refused(StatusCode::REQUEST_TIMEOUT, "request_timeout", what));
        }
    };
    serde_json::from_slice(&bytes).map_err(|error| ApiError::request(format!("the body is no JSON: {error}")))
}

fn health(server: &Server) -> Response {
    match server.draining.load(Ordering::SeqCst) {
        true => (StatusCode::SERVICE_UNAVAILABLE, axum::Json(json!({"status": "draining"}))).into_response(),
        false => axum::Json(json!({"status": "ok"})).into_response(),
    }
}

/// Every name that may be asked, and what it is.
pub fn models(server: &Server) -> Vec<(String, &'static str)> {
    let plain = server.models();
    let indexes: Vec<&String> = server.retrieval.iter().flat_map(|retrieval| retrieval.indexes.keys()).collect();
    let mut list: Vec<(String, &'static str)> = Vec::new();
    for (i, name) in plain.iter().enumerate() {
        list.push((name.clone(), if i == 0 { "base" } else { "adapter" }));
    }
    for name in &plain {
        list.extend(indexes.iter().map(|index| (format!("{name}+{index}"), "index")));
    }
    list.extend(server.canary.names().into_iter().map(|name| (name, "alias")));
    list.extend(server.retrieval.iter().map(|retrieval| (retrieval.name.clone(), "embedding")));
    list
}

fn model(server: &Server, id: &str, kind: &str) -> Value {
    let created = now() - server.began.elapsed().as_secs_f64();
    json!({"id": id, "object": "model", "created": created as u64, "owned_by": "handmill", "kind": kind,
        "parent": (kind != "base" && kind != "embedding").then_some(&server.base)})
}

/// Where the server stands, for the page and `handmill ab`.
fn status(server: &Server) -> Value {
    let stats = server.engine.stats();
    json!({
        "model": server.base,
        "uptime_seconds": server.began.elapsed().as_secs_f64(),
        "draining": server.draining.load(Ordering::SeqCst),
        "running": stats.running,
        "waiting": stats.waiting,
        "cache_tokens": stats.cache_tokens,
        "cache_usage": stats.cached_tokens as f64 / stats.cache_tokens.max(1) as f64,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.new_tokens,
        "passes": stats.passes,
        "capture": server.capture.is_some(),
        "aliases": server.canary.status(),
        "drift": server.drift.as_ref().map(|watch| watch.status()),
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(error.to_string())),
    }
}

async fn embeddings(server: Arc<Server>, body: &Value) -> Result<Response, ApiError> {
    let asked = Embeddings::read(body)?;
    let _ticket = server.ticket();
    if server.draining.load(Ordering::SeqCst) {
        return Err(ApiError::draining());
    }
    let retrieval = server.retrieval.clone().filter(|retrieval| retrieval.name == asked.model);
    let retrieval = retrieval.ok_or_else(|| server.no_embedding_model(&asked.model))?;
    let deadline = std::time::Instant::now() + server.limits.timeout;
    blocking(move || {
        let (mut data, mut tokens) = (Vec::new(), 0);
        for (index, text) in asked.inputs.iter().enumerate() {
            if std::time::Instant::now() > deadline {
                return Err(ApiError::timeout());
            }
            let bad = |error: crate::Error| ApiError::param("input", error.to_string());
            tokens += retrieval.tokens(text).map_err(bad)?;
            let vector = retrieval.embed(text).map_err(bad)?;
            let embedding = match asked.base64 {
                true => json!(base64(&vector.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())),
                false => json!(vector),
            };
            data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
        }
        let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
        let object = json!({"object": "list", "data": data, "model": asked.model, "usage": usage});
        Ok(axum::Json(object).into_response())
    })
    .await
}

async fn feedback(server: &Arc<Server>, body: &Value) -> Result<Response, ApiError> {
    let asked = Feedback::read(body)?;
    let _ticket = server.ticket();
    let Some(arm) = server.recent.arm(&asked.id) else {
        let what = "there is no answer of this id, or it is too long ago";
        let error = ApiError::refused(StatusCode::NOT_FOUND, "unknown_id", what);
        return Err(ApiError { param: Some("id".into()), ..error });
    };
    let mut feedback = json!({"rating": asked.rating});
    asked.correction.iter().for_each(|text| feedback["correction"] = json!(text));
    asked.comment.iter().for_each(|text| feedback["comment"] = json!(text));
    server.log(json!({"id": asked.id, "time": now(), "feedback": feedback})).await?;
    // An answer has one rating, the last: who says it again says nothing new.
    let good = asked.rating > 0;
    let before = server.recent.rate(&asked.id, good);
    if let Some(arm) = arm.filter(|_| before != Some(good)) {
        server.metrics.rated(&arm.alias, &arm.model, asked.rating);
        if let Some(event) = server.canary.feedback(&arm.alias, &arm.model, before, good) {
            server.metrics.rolled_back(&event);
        }
    }
    let recorded = server.capture.is_some();
    Ok(axum::Json(json!({"id": asked.id, "object": "feedback", "recorded": recorded})).into_response())
}

/// Whether a model may be called so: what stands in a path, a label and a list without another meaning.
pub fn is_name(name: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=MAX_NAME).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(inside)
}

fn admin(server: &Server) -> Result<&Path, ApiError> {
    let what = "adapters are not loaded on request: start the server with --allow-admin";
    server.adapter_root.as_deref().ok_or_else(|| ApiError::refused(StatusCode::FORBIDDEN, "admin_not_allowed", what))
}

async fn load(server: Arc<Server>, body: &Value) -> Result<Response, ApiError> {
    let root = admin(&server)?.to_path_buf();
    let fields = Fields::of(body)?;
    let (name, path) = (fields.needed("name")?.to_string(), fields.needed("path")?.to_string());
    if !is_name(&name) {
        let what = format!("name is 1 to {MAX_NAME} of a-z, A-Z, 0-9, '.', '_', '-', a letter or digit first");
        return Err(ApiError::param("name", what));
    }
    let taken = models(&server).into_iter().find(|(id, _)| *id == name).map(|(_, kind)| kind);
    let replaced = taken == Some("adapter") && fields.flag("replace")?;
    if let Some(kind) = taken.filter(|_| !replaced) {
        let hint = if kind == "adapter" { ": \"replace\": true puts this one in its place" } else { "" };
        let what = format!("there is a model {name} already{hint}");
        let error = ApiError::refused(StatusCode::CONFLICT, "name_taken", what);
        return Err(ApiError { param: Some("name".into()), ..error });
    }
    if !replaced && server.engine.adapters().len() >= MAX_ADAPTERS {
        return Err(ApiError::refused(StatusCode::CONFLICT, "too_many", "unload an adapter first"));
    }
    let path = within(&root, &path)
        .ok_or_else(|| ApiError::param("path", "there is no adapter there, below --adapter-root"))?;
    blocking(move || {
        let loaded = server.engine.load_adapter(&name, &path);
        let info = loaded.map_err(|error| ApiError::param("path", error.to_string()))?;
        server.canary.renewed(&name, &info.sha256);
        log::info!("adapter {name} is loaded");
        let object = json!({"name": info.name, "sha256": info.sha256, "rank": info.rank, "bytes": info.bytes});
        let status = if replaced { StatusCode::OK } else { StatusCode::CREATED };
        Ok((status, axum::Json(object)).into_response())
    })
    .await
}

/// A directory below a root, and every file in it too: links are followed, and what they lead to must be below it.
pub fn within(root: &Path, path: &str) -> Option<std::path::PathBuf> {
    let root = root.canonicalize().ok()?;
    let found = root.join(path).canonicalize().ok()?;
    if !found.starts_with(&root) || found == root || !found.is_dir() {
        return None;
    }
    let entries = std::fs::read_dir(&found).ok()?.collect::<Result<Vec<_>, _>>().ok()?;
    let inside = |entry: &std::fs::DirEntry| entry.path().canonicalize().is_ok_and(|path| path.starts_with(&root));
    entries.iter().all(inside).then_some(found)
}

async fn unload(server: Arc<Server>, name: &str) -> Result<Response, ApiError> {
    admin(&server)?;
    if !server.engine.adapters().iter().any(|adapter| adapter.name == name) {
        return Err(ApiError::no_model(name));
    }
    if server.canary.weights().iter().any(|(_, arm, _)| arm == name || arm.starts_with(&format!("{name}+"))) {
        return Err(ApiError::refused(StatusCode::CONFLICT, "in_use", format!("{name} is the arm of an alias")));
    }
    let name = name.to_string();
    blocking(move || {
        server.engine.unload_adapter(&name).map_err(|error| ApiError::internal(error.to_string()))?;
        log::info!("adapter {name} is unloaded");
        Ok(axum::Json(json!({"name": name, "deleted": true})).into_response())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_the_root_is_reached() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        for dir in ["root/good", "root/linked", "outside"] {
            std::fs::create_dir_all(folder.path().join(dir)).unwrap();
        }
        std::fs::write(root.join("file"), "x").unwrap();
        std::fs::write(folder.path().join("outside/secret"), "x").unwrap();
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(folder.path().join("outside"), root.join("way-out")).unwrap();
            std::os::unix::fs::symlink(folder.path().join("outside/secret"), root.join("linked/weights")).unwrap();
            std::os::unix::fs::symlink(root.join("good"), root.join("way-in")).unwrap();
            assert!(within(&root, "way-in").is_some());
        }
        assert!(within(&root, "good").is_some() && within(&root, "./good/").is_some());
        let outside = folder.path().join("outside");
        for path in ["../outside", "good/../../outside", outside.to_str().unwrap(), "way-out", "linked", "file", ""] {
            assert!(within(&root, path).is_none(), "{path}");
        }
        for path in [".", "/", "nowhere", "good\0", "~", "good/../..", "%2e%2e/outside"] {
            assert!(within(&root, path).is_none(), "{path}");
        }
    }

    #[test]
    fn escapes_in_a_path_are_read() {
        for (text, name) in [("a%2Bb", "a+b"), ("a+b", "a+b"), ("%2b%", "+%"), ("%zz%4", "%zz%4"), ("%+1", "%+1")] {
            assert_eq!(unescape(text), name, "{text}");
        }
    }

    #[test]
    fn names_have_one_meaning() {
        assert!(is_name("a") && is_name("my-adapter_v1.2") && is_name("0"));
        for name in ["", "a+b", "../x", ".x", "a/b", "a b", "é", &"a".repeat(65), "a\n"] {
            assert!(!is_name(name), "{name}");
        }
    }
}
