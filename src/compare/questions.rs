//! Questions with their answers, and training rows, from lines of JSON; every faulty line is told at once.
//!
//! ```text
//! {"question", "answer"}      what is asked and the answer; both also in training rows
//!   "aliases": [..]           other answers that count
//!   "kind"                    questions are reported by kind
//!   "instruction"             said before the question
//!   "format"                  the reply's form, such as "{answer} [{topic}]", over any field of the row
//!   "context"                 a text, or a list of them, that every arm is shown; nothing is retrieved then
//!   "group"                   questions of one group are not independent: drawn together in every statistic
//! ```
//!
//! A training row may also be `{"instruction","input","output"}`, `{"prompt","completion"}` or `{"messages"}` of one
//! user's and one assistant's turn: the question is what is asked. Other rows that `finetune` takes are trained on as
//! they are.

use std::path::Path;

use serde_json::{Map, Value};

use super::form;
use crate::error::{quote, Error};

/// The longest line that is read, in bytes.
const MAX_LINE: usize = 1 << 20;
/// Faults that are told one by one.
const TOLD: usize = 20;

/// One question.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Question {
    /// Line of the file, from 1.
    pub line: usize,
    /// What is asked.
    pub question: String,
    /// The answer.
    pub answer: String,
    /// Other answers that count.
    pub aliases: Vec<String>,
    /// Its kind; empty where the row does not say.
    pub kind: String,
    /// What is said before it.
    pub instruction: Option<String>,
    /// The template of its reply.
    pub format: Option<String>,
    /// Texts that every arm is shown with it; empty where passages are to be retrieved.
    pub context: Vec<String>,
    /// What it shares with questions that are not independent of it.
    pub group: Option<String>,
    /// Every field of the row that is a text.
    fields: Map<String, Value>,
}

/// A row to train on.
#[derive(Clone, Debug, PartialEq)]
pub enum TrainRow {
    /// A question with its answer, to which passages can be put.
    Asked(Box<Question>),
    /// Any other row, as it stands.
    Plain(String),
}

impl Question {
    /// Reads a line.
    pub fn parse(line: &str) -> Result<Question, String> {
        Question::from_object(object(line)?)
    }

    fn from_object(object: Map<String, Value>) -> Result<Question, String> {
        let keys = || object.keys().take(8).map(|key| quote(key)).collect::<Vec<_>>().join(", ");
        let optional = |key: &str| match object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(format!("{key} is no string")),
        };
        let needed = |key: &str| match optional(key)? {
            Some(text) if text.trim().is_empty() => Err(format!("{key} is empty")),
            Some(text) => Ok(text),
            None => Err(format!("has no {key} (its keys: {})", keys())),
        };
        let texts = |key: &str| match object.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::String(text)) if key == "context" => Ok(vec![text.clone()]),
            Some(Value::Array(items)) => {
                let text = |item: &Value| item.as_str().map(str::to_string).filter(|text| !text.trim().is_empty());
                items.iter().map(|item| text(item).ok_or(format!("{key} holds something that is no text"))).collect()
            }
            Some(_) => Err(format!("{key} is no list of texts")),
        };
        let question = Question {
            line: 0,
            question: needed("question")?,
            answer: needed("answer")?,
            aliases: texts("aliases")?,
            kind: optional("kind")?.unwrap_or_default(),
            instruction: optional("instruction")?.filter(|text| !text.trim().is_empty()),
            format: optional("format")?,
            context: texts("context")?,
            group: optional("group")?,
            fields: object.into_iter().filter(|(_, value)| value.is_string()).collect(),
        };
        if let Some(template) = &question.format {
            form::check(template)?;
        }
        Ok(question)
    }

    /// A field of the row that is a text.
    pub fn field(&self, name: &str) -> Option<&str> {
        match name {
            "answer" => Some(&self.answer),
            "question" => Some(&self.question),
            _ => self.fields.get(name)?.as_str(),
        }
    }

    /// The answer and its aliases.
    pub fn answers(&self) -> Vec<String> {
        let mut answers = vec![self.answer.clone()];
        answers.extend(self.aliases.iter().cloned());
        answers
    }
}

fn object(line: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err("is no JSON object".into()),
        Err(error) => {
            let said = error.to_string();
            let said = said.split(" at line ").next().unwrap_or_default().to_string();
            Err(format!("is not JSON: column {}: {}", error.column(), quote(&said)))
        }
    }
}

/// A question of fields under other names; none where they are no texts.
fn renamed(object: &Map<String, Value>, question: &str, answer: &str) -> Option<TrainRow> {
    let text = |key: &str| object.get(key)?.as_str().map(|text| text.trim().to_string()).filter(|t| !t.is_empty());
    asked(text(question)?, text(answer)?, None)
}

fn asked(question: String, answer: String, instruction: Option<String>) -> Option<TrainRow> {
    Some(TrainRow::Asked(Box::new(Question { question, answer, instruction, ..Question::default() })))
}

fn train_row(line: &str) -> Result<TrainRow, String> {
    let object = object(line)?;
    if object.contains_key("question") || object.contains_key("answer") {
        return Ok(TrainRow::Asked(Box::new(Question::from_object(object)?)));
    }
    let found = if object.contains_key("completion") {
        renamed(&object, "prompt", "completion")
    } else if object.contains_key("output") {
        let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default().trim().to_string();
        match (text("instruction"), text("input"), text("output")) {
            (instruction, input, output) if !input.is_empty() && !output.is_empty() => {
                asked(input, output, Some(instruction).filter(|text| !text.is_empty()))
            }
            _ => renamed(&object, "instruction", "output"),
        }
    } else {
        let turn = |i: usize, role: &str| {
            let turn = object.get("messages")?.as_array().filter(|turns| turns.len() == 2)?.get(i)?;
            (turn.get("role")?.as_str()? == role).then(|| turn.get("content")?.as_str().map(str::to_string)).flatten()
        };
        turn(0, "user").zip(turn(1, "assistant")).and_then(|(user, reply)| asked(user, reply, None))
    };
    Ok(found.unwrap_or_else(|| TrainRow::Plain(line.to_string())))
}

/// Reads a file of questions. Errors: it cannot be read, it has none, or the list of its faulty lines.
pub fn read_questions(path: &Path) -> Result<Vec<Question>, Error> {
    let rows = read(path, "a question", Question::parse)?;
    Ok(rows.into_iter().map(|(line, question)| Question { line, ..question }).collect())
}

/// Reads a file to train on. Errors: as for questions.
pub fn read_train(path: &Path) -> Result<Vec<TrainRow>, Error> {
    let rows = read(path, "a training row", train_row)?;
    let placed = |(line, row)| match row {
        TrainRow::Asked(question) => TrainRow::Asked(Box::new(Question { line, ..*question })),
        plain => plain,
    };
    Ok(rows.into_iter().map(placed).collect())
}

fn read<T>(path: &Path, wanted: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<(usize, T)>, Error> {
    let bytes = std::fs::read(path).map_err(|cause| Error::io(path, cause))?;
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
    let (mut rows, mut faults) = (Vec::new(), Vec::new());
    for (i, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let row = match std::str::from_utf8(line) {
            _ if line.len() > MAX_LINE => Err(format!("has {} bytes; up to {MAX_LINE} are read", line.len())),
            Ok(line) => parse(line),
            Err(error) => Err(format!("byte {} is not UTF-8", error.valid_up_to())),
        };
        match row {
            Ok(row) => rows.push((i + 1, row)),
            Err(what) => faults.push((i + 1, what)),
        }
    }
    let count = rows.len() + faults.len();
    if count == 0 {
        return Err(Error::file(path, format!("is empty: give a line of JSON for {wanted}")));
    }
    if faults.is_empty() {
        return Ok(rows);
    }
    let mut what = format!("{} of {count} lines are not {wanted} each:", faults.len());
    for (line, fault) in faults.iter().take(TOLD) {
        what += &format!("\n  #{line} {fault}");
    }
    if faults.len() > TOLD {
        what += &format!("\n  .. and {} more", faults.len() - TOLD);
    }
    Err(Error::file(path, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_brings_its_fields() {
        let line = r#"{"question":"q?","answer":"x","aliases":["y"],"kind":"k","topic":"t","context":"c","n":3}"#;
        let question = Question::parse(line).unwrap();
        assert_eq!(question.answers(), ["x", "y"]);
        assert_eq!((question.kind.as_str(), question.field("topic")), ("k", Some("t")));
        assert_eq!(question.context, ["c"]);
        assert_eq!(question.field("n"), None);
    }

    #[test]
    fn faults_name_what_is_wrong() {
        for (line, word) in [
            (r#"{"q":"?","a":"x"}"#, "has no question (its keys: q, a)"),
            (r#"{"question":"?"}"#, "has no answer"),
            (r#"{"question":"?","answer":" "}"#, "answer is empty"),
            (r#"{"question":"?","answer":3}"#, "answer is no string"),
            (r#"{"question":"?","answer":"x","aliases":"y"}"#, "aliases is no list"),
            (r#"{"question":"?","answer":"x","aliases":[1]}"#, "no text"),
            (r#"{"question":"?","answer":"x","format":"[{topic}]"}"#, "{answer}"),
            ("[1]", "is no JSON object"),
            ("{", "is not JSON: column"),
        ] {
            let error = Question::parse(line).unwrap_err();
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn training_rows_of_every_kind() {
        let question = |line: &str| match train_row(line).unwrap() {
            TrainRow::Asked(q) => Some((q.instruction, q.question, q.answer)),
            TrainRow::Plain(text) => {
                assert_eq!(text, line);
                None
            }
        };
        let some = |i: Option<&str>| Some((i.map(str::to_string), "q".to_string(), "x".to_string()));
        assert_eq!(question(r#"{"question":"q","answer":"x"}"#), some(None));
        assert_eq!(question(r#"{"prompt":"q","completion":" x"}"#), some(None));
        assert_eq!(question(r#"{"instruction":"q","output":"x"}"#), some(None));
        assert_eq!(question(r#"{"instruction":"i","input":"q","output":"x"}"#), some(Some("i")));
        let turns = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"x"}]}"#;
        assert_eq!(question(turns), some(None));
        assert_eq!(question(r#"{"text":"t"}"#), None);
        assert!(train_row(r#"{"question":"q"}"#).is_err());
    }
}
