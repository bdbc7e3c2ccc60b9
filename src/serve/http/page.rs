//! `GET /`: one page, whole in itself. Its style and script are in it, and the policy lets nothing else run or be asked.

use std::sync::OnceLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::{base64, Server};
use crate::model::adapter::sha256;

const HTML: &str = include_str!("page/page.html");
const CSS: &str = include_str!("page/page.css");
const JS: &str = include_str!("page/page.js");

/// The page and the policy it is sent with.
fn parts() -> &'static (String, String) {
    static PARTS: OnceLock<(String, String)> = OnceLock::new();
    PARTS.get_or_init(|| {
        let hash = |text: &str| format!("'sha256-{}'", base64(&sha256(text.as_bytes())));
        let html = HTML.replace("/*style*/", CSS).replace("/*script*/", JS);
        let policy = format!(
            "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'",
            hash(JS),
            hash(CSS)
        );
        (html, policy)
    })
}

/// The page; whether a token is needed stands in it.
pub fn page(server: &Server) -> Response {
    let (html, policy) = parts();
    let html = html.replace("data-token=\"\"", if server.tokens.is_empty() { "" } else { "data-token=\"needed\"" });
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, policy.as_str()),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, html).into_response()
}
