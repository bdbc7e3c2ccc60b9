//! Requests as OpenAI's clients write them, checked field by field. A field that is not known is passed over; one that
//! is known and would change the answer in a way that is not supported is refused by name.

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::model::chat::Message;
use crate::model::sampler::{Sampler, SamplerSettings};

/// Choices that a request may ask for each prompt.
const MAX_N: u64 = 8;
/// Prompts of one request.
const MAX_PROMPTS: usize = 512;
/// Messages of one conversation.
const MAX_MESSAGES: usize = 1024;
/// Texts to embed at once, as OpenAI has it.
const MAX_INPUTS: usize = 2048;
/// Stop texts; OpenAI allows 4.
const MAX_STOPS: usize = 16;
/// Bytes of a stop text.
const MAX_STOP: usize = 256;
/// Most probable tokens told for each place.
pub const MAX_TOP: u64 = 20;
/// Characters of a user's name.
const MAX_USER: usize = 512;

/// What a prompt is.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A text, byte for byte.
    Text(String),
    /// Tokens.
    Ids(Vec<u32>),
}

/// What is asked of a model, whatever the prompt.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The model's name.
    pub model: String,
    /// How tokens are chosen; the seed of the first choice.
    pub sampler: SamplerSettings,
    /// At most so many new tokens.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Choices for each prompt.
    pub n: usize,
    /// How many of the most probable tokens are told; none: no log-probabilities.
    pub logprobs: Option<usize>,
    /// Whether pieces are sent as they come.
    pub stream: bool,
    /// Whether the last piece tells the tokens used.
    pub include_usage: bool,
    /// Who asks.
    pub user: Option<String>,
}

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug)]
pub struct Chat {
    /// What is asked.
    pub asked: Asked,
    /// The conversation.
    pub messages: Vec<Message>,
}

/// `POST /v1/completions`.
#[derive(Clone, Debug)]
pub struct Completion {
    /// What is asked.
    pub asked: Asked,
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// Whether the prompt comes before its continuation.
    pub echo: bool,
}

/// `POST /v1/embeddings`.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// The embedding model's name.
    pub model: String,
    /// The texts.
    pub inputs: Vec<String>,
    /// Whether vectors are sent as the base64 of their floats.
    pub base64: bool,
}

/// `POST /v1/feedback`.
#[derive(Clone, Debug)]
pub struct Feedback {
    /// The answer's id.
    pub id: String,
    /// 1: good, -1: bad.
    pub rating: i64,
    /// What would have been right.
    pub correction: Option<String>,
    /// A remark.
    pub comment: Option<String>,
}

/// The fields of an object.
pub struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The fields of a request.
    pub fn of(value: &'a Value) -> Result<Fields<'a>, ApiError> {
        value.as_object().map(Fields).ok_or_else(|| ApiError::request("the body must be a JSON object"))
    }

    /// A field; null is as good as none.
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A text.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        let text =
            |value: &'a Value| value.as_str().ok_or_else(|| ApiError::param(name, format!("{name} is a string")));
        self.get(name).map(text).transpose()
    }

    /// A text that must be there.
    pub fn needed(&self, name: &str) -> Result<&'a str, ApiError> {
        self.text(name)?.ok_or_else(|| ApiError::param(name, format!("{name} is missing")))
    }

    /// True or false; false where it is not there.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| ApiError::param(name, format!("{name} is true or false"))),
        }
    }

    fn whole(&self, name: &str, most: u64) -> Result<Option<u64>, ApiError> {
        let bad = || ApiError::param(name, format!("{name} is a whole number, 0 to {most}"));
        self.get(name).map(|value| value.as_u64().filter(|&number| number <= most).ok_or_else(bad)).transpose()
    }

    fn number(&self, name: &str, low: f64, high: f64) -> Result<Option<f32>, ApiError> {
        let bad = || ApiError::param(name, format!("{name} is a number, {low} to {high}"));
        let within = |value: &Value| value.as_f64().filter(|x| (low..=high).contains(x)).map(|x| x as f32);
        self.get(name).map(|value| within(value).ok_or_else(bad)).transpose()
    }

    /// Refuses what would change the answer and is not supported.
    fn refuse(&self, names: &[&str]) -> Result<(), ApiError> {
        let idle = |value: &Value| match value {
            Value::Bool(flag) => !flag,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty() || map.get("type").is_some_and(|kind| kind == "text"),
            Value::String(text) => text.is_empty() || text == "none",
            Value::Null => true,
        };
        match names.iter().find(|name| self.get(name).is_some_and(|value| !idle(value))) {
            Some(name) => Err(ApiError::param(name, format!("{name} is not supported: leave it out"))),
            None => Ok(()),
        }
    }
}

const UNSUPPORTED: [&str; 9] = [
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "response_format",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "suffix",
];

fn asked(fields: &Fields, logprobs: Option<usize>) -> Result<Asked, ApiError> {
    fields.refuse(&UNSUPPORTED)?;
    let n = fields.whole("n", MAX_N)?.unwrap_or(1);
    if n == 0 {
        return Err(ApiError::param("n", "n is 1 or more"));
    }
    if fields.whole("best_of", MAX_N)?.is_some_and(|best| best > n.max(1)) {
        return Err(ApiError::param("best_of", "best_of is not supported: leave it out"));
    }
    let options = match fields.get("stream_options") {
        None => false,
        Some(value) => {
            let options = value.as_object().ok_or_else(|| ApiError::param("stream_options", "is an object"))?;
            Fields(options).flag("include_usage")?
        }
    };
    let sampler = SamplerSettings {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
        top_k: fields.whole("top_k", 1 << 20)?.unwrap_or(0) as usize,
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0),
        seed: seed(fields)?,
    };
    Sampler::new(sampler).map_err(|error| ApiError::param("top_p", error.to_string()))?;
    let limit = |name| Ok::<_, ApiError>(fields.whole(name, 1 << 24)?.map(|limit| limit as usize));
    let user = fields.text("user")?;
    if user.is_some_and(|user| user.chars().count() > MAX_USER) {
        return Err(ApiError::param("user", format!("user has {MAX_USER} characters at most")));
    }
    Ok(Asked {
        model: fields.needed("model")?.to_string(),
        sampler,
        max_tokens: limit("max_completion_tokens")?.or(limit("max_tokens")?),
        stop: stops(fields)?,
        n: n as usize,
        logprobs,
        stream: fields.flag("stream")?,
        include_usage: options,
        user: user.filter(|user| !user.is_empty()).map(str::to_string),
    })
}

/// A seed of the client's, any whole number; else one of our own.
fn seed(fields: &Fields) -> Result<u64, ApiError> {
    let bad = || ApiError::param("seed", "seed is a whole number of 64 bits");
    match fields.get("seed") {
        None => Ok(super::random()),
        Some(value) => value.as_u64().or(value.as_i64().map(|seed| seed as u64)).ok_or_else(bad),
    }
}

fn stops(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let bad = || ApiError::param("stop", format!("stop is a string or up to {MAX_STOPS}, of 1 to {MAX_STOP} bytes"));
    let stop = |value: &Value| {
        let text = value.as_str().filter(|text| (1..=MAX_STOP).contains(&text.len()));
        text.map(str::to_string).ok_or_else(bad)
    };
    match fields.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_STOPS => list.iter().map(stop).collect(),
        Some(value) => Ok(vec![stop(value)?]),
    }
}

impl Chat {
    /// Reads a request.
    pub fn read(value: &Value) -> Result<Chat, ApiError> {
        let fields = Fields::of(value)?;
        let top = fields.whole("top_logprobs", MAX_TOP)?;
        let logprobs = match (fields.flag("logprobs")?, top) {
            (true, top) => Some(top.unwrap_or(0) as usize),
            (false, Some(top)) if top > 0 => {
                return Err(ApiError::param("top_logprobs", "top_logprobs needs logprobs: true"));
            }
            _ => None,
        };
        let list = fields.get("messages").and_then(Value::as_array);
        let list = list.filter(|list| (1..=MAX_MESSAGES).contains(&list.len()));
        let bad = || ApiError::param("messages", format!("messages is a list of 1 to {MAX_MESSAGES} messages"));
        let messages = list.ok_or_else(bad)?.iter().enumerate();
        let messages = messages.map(|(i, value)| message(i, value)).collect::<Result<_, _>>()?;
        Ok(Chat { asked: asked(&fields, logprobs)?, messages })
    }
}

fn message(i: usize, value: &Value) -> Result<Message, ApiError> {
    let place = |part: &str| format!("messages[{i}].{part}");
    let role = match value.get("role").and_then(Value::as_str) {
        Some(role @ ("system" | "user" | "assistant")) => role,
        Some("developer") => "system",
        _ => return Err(ApiError::param(&place("role"), "role is system, developer, user or assistant")),
    };
    let bad = || ApiError::param(&place("content"), "content is a string, or a list of parts of type text");
    let content = match value.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part.get("type").and_then(Value::as_str) {
                Some("text") => part.get("text").and_then(Value::as_str).map(str::to_string),
                _ => None,
            };
            parts.iter().map(text).collect::<Option<Vec<_>>>().ok_or_else(bad)?.join("\n")
        }
        _ => return Err(bad()),
    };
    Ok(Message::new(role, content))
}

impl Completion {
    /// Reads a request.
    pub fn read(value: &Value) -> Result<Completion, ApiError> {
        let fields = Fields::of(value)?;
        let logprobs = match fields.get("logprobs") {
            Some(Value::Bool(false)) => None,
            _ => fields.whole("logprobs", MAX_TOP)?.map(|count| count as usize),
        };
        let bad = || {
            let what = format!("prompt is a string, a list of token ids, or a list of up to {MAX_PROMPTS} of either");
            ApiError::param("prompt", what)
        };
        let ids = |list: &[Value]| {
            let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            list.iter().map(id).collect::<Option<Vec<u32>>>().map(Prompt::Ids)
        };
        let prompts = match fields.get("prompt").ok_or_else(bad)? {
            Value::String(text) => vec![Prompt::Text(text.clone())],
            Value::Array(list) if list.first().is_some_and(Value::is_number) => vec![ids(list).ok_or_else(bad)?],
            Value::Array(list) if (1..=MAX_PROMPTS).contains(&list.len()) => {
                let each = |value: &Value| match value {
                    Value::String(text) => Some(Prompt::Text(text.clone())),
                    Value::Array(list) => ids(list),
                    _ => None,
                };
                list.iter().map(each).collect::<Option<_>>().ok_or_else(bad)?
            }
            _ => return Err(bad()),
        };
        Ok(Completion { asked: asked(&fields, logprobs)?, prompts, echo: fields.flag("echo")? })
    }
}

impl Embeddings {
    /// Reads a request.
    pub fn read(value: &Value) -> Result<Embeddings, ApiError> {
        let fields = Fields::of(value)?;
        fields.refuse(&["dimensions"])?;
        let bad = || ApiError::param("input", format!("input is a string or a list of 1 to {MAX_INPUTS} strings"));
        let inputs = match fields.get("input").ok_or_else(bad)? {
            Value::String(text) => vec![text.clone()],
            Value::Array(list) if (1..=MAX_INPUTS).contains(&list.len()) => {
                let texts = list.iter().map(|value| value.as_str().map(str::to_string));
                texts.collect::<Option<Vec<_>>>().ok_or_else(bad)?
            }
            _ => return Err(bad()),
        };
        if inputs.iter().any(String::is_empty) {
            return Err(ApiError::param("input", "input holds an empty string"));
        }
        let base64 = match fields.text("encoding_format")? {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => return Err(ApiError::param("encoding_format", "encoding_format is float or base64")),
        };
        Ok(Embeddings { model: fields.needed("model")?.to_string(), inputs, base64 })
    }
}

impl Feedback {
    /// Reads a request.
    pub fn read(value: &Value) -> Result<Feedback, ApiError> {
        let fields = Fields::of(value)?;
        let rating = match fields.get("rating") {
            Some(Value::String(word)) if word == "up" => 1,
            Some(Value::String(word)) if word == "down" => -1,
            Some(Value::Number(number)) if matches!(number.as_i64(), Some(1 | -1)) => number.as_i64().unwrap_or(1),
            _ => return Err(ApiError::param("rating", "rating is \"up\" or 1, \"down\" or -1")),
        };
        let text = |name| Ok::<_, ApiError>(fields.text(name)?.map(str::to_string));
        Ok(Feedback {
            id: fields.needed("id")?.to_string(),
            rating,
            correction: text("correction")?,
            comment: text("comment")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The field that is at fault.
    fn fault(error: ApiError) -> String {
        assert_eq!(error.status, 400, "{error:?}");
        error.param.unwrap_or_default()
    }

    #[test]
    fn a_faulty_field_is_named() {
        let chat = |extra: Value| {
            let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            Chat::read(&body).map_err(fault)
        };
        assert!(chat(json!({"metadata": {"a": 1}, "stop": null, "tools": [], "frequency_penalty": 0})).is_ok());
        for (field, value) in [
            ("temperature", json!(-1)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_p", json!(1.5)),
            ("max_tokens", json!(-1)),
            ("max_tokens", json!(1.5)),
            ("n", json!(0)),
            ("n", json!(9)),
            ("seed", json!("x")),
            ("stop", json!([""])),
            ("stop", json!({})),
            ("stream", json!("yes")),
            ("stream_options", json!(true)),
            ("tools", json!([{"type": "function"}])),
            ("response_format", json!({"type": "json_object"})),
            ("logit_bias", json!({"5": 100})),
            ("top_logprobs", json!(3)),
            ("user", json!("u".repeat(513))),
            ("messages", json!([])),
            ("model", json!(null)),
        ] {
            assert_eq!(chat(json!({ field: value })).unwrap_err(), field, "{value}");
        }
        let roles = json!({"messages": [{"role": "user", "content": "x"}, {"role": "root", "content": "x"}]});
        assert_eq!(chat(roles).unwrap_err(), "messages[1].role");
        let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]});
        assert_eq!(chat(image).unwrap_err(), "messages[0].content");
        assert_eq!(Chat::read(&json!([])).unwrap_err().status, 400);
    }

    #[test]
    fn prompts_are_texts_ids_or_lists_of_either() {
        let read = |prompt: Value| Completion::read(&json!({"model": "m", "prompt": prompt})).map(|c| c.prompts);
        assert_eq!(read(json!("x")).unwrap(), [Prompt::Text("x".into())]);
        assert_eq!(read(json!([1, 2])).unwrap(), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(read(json!(["x", [3]])).unwrap(), [Prompt::Text("x".into()), Prompt::Ids(vec![3])]);
        for bad in [json!([]), json!([1, "x"]), json!([-1]), json!(7), json!([[1.5]]), json!(vec!["x"; 513])] {
            assert_eq!(fault(read(bad.clone()).unwrap_err()), "prompt", "{bad}");
        }
    }

    #[test]
    fn content_may_come_in_parts_and_limits_by_either_name() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let body = json!({"model": "m", "messages": [{"role": "developer", "content": parts}], "max_tokens": 5,
            "max_completion_tokens": 7, "logprobs": true, "seed": -1});
        let chat = Chat::read(&body).unwrap();
        assert_eq!(chat.messages, [Message::new("system", "a\nb")]);
        assert_eq!((chat.asked.max_tokens, chat.asked.logprobs), (Some(7), Some(0)));
        assert_eq!(chat.asked.sampler.seed, u64::MAX);
    }
}
