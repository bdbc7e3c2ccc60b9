//! Chat templates: the Jinja that a model's metadata carries (`tokenizer.chat_template`, `tokenizer_config.json`)
//! turns a list of messages into the one text that the model was trained on.
//!
//! The dialect is Hugging Face transformers': Jinja2 with `trim_blocks`, `lstrip_blocks` and loop controls, Python's
//! string and dict methods, `raise_exception`, `strftime_now`, a `tojson` that spells JSON as Python does, and the
//! tags `{% generation %}` … `{% endgeneration %}`, which mark what the assistant says and print nothing.
//! `tools` and `documents` are none.
//!
//! A template comes from a stranger's file. It reaches no file, no network and no other template; fuel bounds its steps
//! and the text it builds, a thread of its own bounds its depth and its time.

use std::sync::{mpsc, Arc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{context, Environment, ErrorKind, State};
use serde::{Deserialize, Serialize};

use super::tokenizer::short;

/// Steps a template may take; a real one takes tens per message. Making 64 bytes of text counts as a step, so a
/// conversation that is copied ten times over on its way may have 6 MB.
const FUEL: u64 = 1_000_000;

/// Bytes of template; real ones have up to some tens of thousands.
const MAX_TEMPLATE: usize = 256 << 10;

/// Stack of the thread that parses and renders. A step can nest a value once more and two bytes of source an
/// expression, and dropping, comparing or compiling what is nested recurses: up to about 800 bytes a level.
/// Reserved, not touched.
const STACK: usize = 256 << 20;

/// How long a template may take. Fuel ends every loop long before; what it does not count is, say, comparing a list
/// of two lists of two lists … with another.
const DEADLINE: Duration = Duration::from_secs(10);

/// The most bytes that one call of `tojson` or of a method that multiplies makes, and the levels of `tojson`.
const TEXT_LIMIT: usize = 16 << 20;
const JSON_DEPTH: usize = 64;

const NAME: &str = "chat template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, and what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A template that does not parse, or that refuses the messages.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The template is not in the dialect; the text names its line.
    #[error("the chat template does not parse: {0}")]
    Syntax(String),
    /// The template refused the messages, or did too much work.
    #[error("the chat template failed: {reason} (messages: {roles})")]
    Render {
        /// The template's line and what it raised.
        reason: String,
        /// The messages' roles, in order.
        roles: String,
    },
}

/// A parsed chat template with the model's BOS and EOS.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Parses `template`; `bos` and `eos` are the texts of the model's tokens, empty where it has none.
    /// Errors name the template's line.
    pub fn from_str(template: &str, bos: &str, eos: &str) -> Result<ChatTemplate, Error> {
        if template.len() > MAX_TEMPLATE {
            let what = format!("it has {} bytes; {MAX_TEMPLATE} are allowed", template.len());
            return Err(Error::Syntax(what));
        }
        let source = without_generation_tags(template);
        let env = apart(move || environment(source)).map_err(Error::Syntax)?;
        Ok(ChatTemplate { env: Arc::new(env), bos: bos.into(), eos: eos.into() })
    }

    /// The text of `messages`, with the opening of an assistant's turn after them if `add_generation_prompt`.
    /// Errors name the template's line and the messages' roles.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Error> {
        let message = |m: &Message| context! { role => &m.role, content => &m.content };
        let values = context! {
            messages => messages.iter().map(message).collect::<Vec<Value>>(),
            add_generation_prompt => add_generation_prompt,
            bos_token => &self.bos,
            eos_token => &self.eos,
            tools => (),
            documents => (),
        };
        let env = self.env.clone();
        apart(move || env.get_template(NAME).and_then(|t| t.render(values)).map_err(|e| reason(&e)))
            .map_err(|reason| Error::Render { reason, roles: roles(messages) })
    }
}

/// The dialect with the one template in it.
fn environment(source: String) -> Result<Environment<'static>, String> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| reason(&e))?);
    env.set_debug(false); // an error would hold the values it met
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(python_method);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", to_json);
    env.add_template_owned(NAME, source).map_err(|e| reason(&e))?;
    Ok(env)
}

/// Python's methods of strings, dicts and lists. Fuel charges a result once it is there; the three that multiply are
/// checked before.
fn python_method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    let text = |i: usize| args.get(i).and_then(Value::as_str).unwrap_or_default();
    let grown = match (value.as_str(), name) {
        (Some(s), "replace") => s.matches(text(0)).count().saturating_mul(text(1).len()),
        (Some(s), "join") => args.first().and_then(Value::len).unwrap_or(0).saturating_mul(s.len()),
        (Some(s), "format") => {
            let widths = s.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
            widths.map(|n| n.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
        }
        _ => 0,
    };
    if grown > TEXT_LIMIT {
        return Err(minijinja::Error::from(ErrorKind::OutOfFuel));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Does `work` on a thread with [`STACK`], for at most [`DEADLINE`]. What overruns is left behind: it owns its values.
fn apart<T: Send + 'static>(work: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
    let started = thread.spawn(move || {
        let _ = sender.send(work()); // nobody listens any more after the deadline
    });
    started.map_err(|e| format!("no thread for it: {e}"))?;
    receiver.recv_timeout(DEADLINE).unwrap_or_else(|e| match e {
        mpsc::RecvTimeoutError::Timeout => Err(format!("it took longer than {} s", DEADLINE.as_secs())),
        mpsc::RecvTimeoutError::Disconnected => Err("it broke the template engine".into()),
    })
}

/// The template's line and what is wrong there.
fn reason(e: &minijinja::Error) -> String {
    let what = match (e.kind(), e.detail()) {
        (ErrorKind::OutOfFuel, _) => "it does too much work for these messages (an endless loop?)".into(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.into(), // raise_exception's own words
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    match e.line() {
        Some(line) => format!("line {line}: {}", short(&what)),
        None => short(&what),
    }
}

/// The first roles, in order, for an error message.
fn roles(messages: &[Message]) -> String {
    const SHOWN: usize = 8;
    let mut names: Vec<String> = messages.iter().take(SHOWN).map(|m| short(&m.role)).collect();
    match messages.len() {
        0 => names.push("none".into()),
        n if n > SHOWN => names.push(format!("… {n} in all")),
        _ => {}
    }
    names.join(", ")
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The time now in the words of `format`, in UTC so that a prompt does not depend on the machine's place.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(format, seconds).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
}

/// `format` filled in for `seconds` since 1970 in UTC: C's directives that dates in prompts use.
fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (weekday, mut year, mut day) = ((days + 4) % 7, 1970, days); // 1970 began on a Thursday
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    while day >= 365 + leap(year) as u64 {
        day -= 365 + leap(year) as u64;
        year += 1;
    }
    let (day_of_year, mut month) = (day + 1, 0);
    let lengths = [31, 28 + leap(year) as u64, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let day = day + 1;
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let bare = directive == Some('-'); // %-d: without the leading zero
        if bare {
            directive = chars.next();
        }
        let number = |n: u64, width: usize| if bare { n.to_string() } else { format!("{n:0width$}") };
        out += &match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month as u64 + 1, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second % 60, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('B') => MONTHS[month].into(),
            Some('b') => MONTHS[month][..3].into(),
            Some('A') => DAYS[weekday as usize].into(),
            Some('a') => DAYS[weekday as usize][..3].into(),
            Some('Z') => "UTC".into(),
            Some('%') => "%".into(),
            Some(c) => return Err(format!("strftime_now does not know %{c}")),
            None => return Err("strftime_now's format ends in %".into()),
        };
    }
    Ok(out)
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` spells it: ", " and ": " between items, nothing escaped for HTML.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_json(&mut out, value, indent.map(|n| n.min(16)), 0)?;
    Ok(Value::from_safe_string(out))
}

/// Lists within lists can print far larger than they are in memory, and deeper than the stack: both are bounded here.
fn write_json(out: &mut String, value: &Value, indent: Option<usize>, depth: usize) -> Result<(), minijinja::Error> {
    let failed = |what: String| Err(minijinja::Error::new(ErrorKind::BadSerialization, what));
    if depth > JSON_DEPTH || out.len() > TEXT_LIMIT {
        return failed(format!("tojson takes {JSON_DEPTH} levels and {TEXT_LIMIT} bytes at most"));
    }
    let line = |out: &mut String, depth: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => *out += &value.to_string(),
        ValueKind::String => *out += &quote(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut count = 0;
            for item in value.try_iter()? {
                *out += if count > 0 { separator } else { "" };
                line(out, depth + 1);
                write_json(out, &item, indent, depth + 1)?;
                count += 1;
            }
            if count > 0 {
                line(out, depth);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            let mut count = 0;
            for key in value.try_iter()? {
                *out += if count > 0 { separator } else { "" };
                line(out, depth + 1);
                *out += &quote(&key.to_string());
                *out += ": ";
                write_json(out, &value.get_item(&key)?, indent, depth + 1)?;
                count += 1;
            }
            if count > 0 {
                line(out, depth);
            }
            out.push('}');
        }
        kind => return failed(format!("tojson cannot print a value of kind {kind}")),
    }
    Ok(())
}

/// A JSON string: quotes, backslashes and control characters escaped, the rest as it is.
fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The template with its generation tags as a plain scope: `with` … `endwith`, whose dashes trim the same way.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out += before;
        let end = tag.find("%}").unwrap_or(tag.len());
        let word = tag[..end].trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match word {
            "generation" | "endgeneration" => {
                out += &tag[..end].replace("generation", "with");
                rest = &tag[end..];
            }
            _ => rest = tag,
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn strftime_fills_in_utc_dates() {
        // From `date -u -d @SECONDS`.
        for (seconds, format, text) in [
            (0, "%Y-%m-%d %H:%M:%S %a %j", "1970-01-01 00:00:00 Thu 001"),
            (951_782_399, "%d %b %Y, %A, %-I:%M %p", "28 Feb 2000, Monday, 11:59 PM"),
            (951_782_400, "%d %B %Y %e %-d", "29 February 2000 29 29"),
            (1_735_689_599, "%j %y %Z 100%%", "366 24 UTC 100%"),
            (4_107_542_400, "%-d %B %Y", "1 March 2100"),
        ] {
            assert_eq!(strftime(format, seconds).unwrap(), text);
        }
        assert_eq!(strftime("%Q", 0).unwrap_err(), "strftime_now does not know %Q");
        assert!(strftime("at %", 0).is_err());
    }
}
