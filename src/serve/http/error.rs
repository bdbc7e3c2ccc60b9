//! What went wrong, as OpenAI's clients read it: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{header, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{json, Value};

use crate::serve::job::Refused;

/// Seconds after which a client may try again when all places are taken.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// An answer that is an error.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP's word for it.
    pub status: StatusCode,
    /// OpenAI's type.
    pub kind: &'static str,
    /// OpenAI's code, for programs.
    pub code: Option<&'static str>,
    /// The field of the request that is at fault.
    pub param: Option<String>,
    /// For people: what is wrong and what to do.
    pub message: String,
    /// Of 405: the methods that the route is asked with.
    pub allow: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> ApiError {
        ApiError { status, kind, code, param: None, message, allow: None }
    }

    /// 400: a field is not what it must be.
    pub fn param(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into());
        ApiError { param: Some(param.into()), ..error }
    }

    /// 400: the request as a whole is not what it must be.
    pub fn request(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into())
    }

    /// The same with another status.
    pub fn refused(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(status, "invalid_request_error", Some(code), message.into())
    }

    /// 404: there is no such model.
    pub fn no_model(name: &str) -> ApiError {
        let name: String = name.chars().take(96).collect();
        let message = format!("the model {name:?} does not exist: GET /v1/models lists those there are");
        let error = ApiError::refused(StatusCode::NOT_FOUND, "model_not_found", message);
        ApiError { param: Some("model".into()), ..error }
    }

    /// 503: no more work is taken.
    pub fn draining() -> ApiError {
        let message = "the server is going down: ask another".to_string();
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("draining"), message)
    }

    /// 504: the time for the request is up.
    pub fn timeout() -> ApiError {
        let message = "the time for this request is up: ask for fewer tokens, or give the server more --timeout".into();
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", Some("timeout"), message)
    }

    /// 500: the server failed.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), message.into())
    }

    /// The engine's refusal; `prompt` names the field that the prompt came in.
    pub fn from_refused(refused: Refused, prompt: &str) -> ApiError {
        let message = refused.to_string();
        match refused {
            Refused::Full { .. } => {
                let (kind, code) = ("rate_limit_error", Some("rate_limit_exceeded"));
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, kind, code, message)
            }
            Refused::TooLong { .. } => {
                ApiError { code: Some("context_length_exceeded"), ..ApiError::param(prompt, message) }
            }
            Refused::UnknownAdapter(name) => ApiError::no_model(&name),
            Refused::Invalid(_) => ApiError::param(prompt, message),
            Refused::Draining => ApiError::draining(),
        }
    }

    /// Whether it is the server's fault and not the request's.
    pub fn is_ours(&self) -> bool {
        self.status == StatusCode::INTERNAL_SERVER_ERROR || self.status == StatusCode::GATEWAY_TIMEOUT
    }

    /// The object that tells it.
    pub fn body(&self) -> Value {
        let (message, param, code) = (&self.message, &self.param, self.code);
        json!({"error": {"message": message, "type": self.kind, "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER);
            }
            StatusCode::METHOD_NOT_ALLOWED => {
                if let Some(method) = self.allow.and_then(|method| HeaderValue::from_str(method).ok()) {
                    headers.insert(header::ALLOW, method);
                }
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
