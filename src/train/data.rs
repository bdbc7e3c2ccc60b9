//! Lines of JSON to rows of tokens and labels, every fault of the file told at once.
//!
//! ```text
//! {"text"}                                every token is predicted
//! {"prompt", "completion"}                the completion and the end of text after it
//! {"messages": [{"role", "content"}, ..]} what the assistant says, each turn to its end, in the model's chat template
//! {"instruction", "input", "output"}      the same with one turn of each; without a template, Alpaca's headings
//! {"input_ids", "labels"}                 the ids as they are; a label of -100 is masked
//! ```
//!
//! Labels stand beside the tokens they name: the token at i is predicted from those before it, so the label of the
//! first is never used. The parts of a row are encoded apart, as they are when a model is asked to continue one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{quote, Error};
use crate::model::adapter::sha256;
use crate::model::chat::{ChatTemplate, Message};
use crate::model::generate::LanguageModel;
use crate::model::tokenizer::Tokenizer;

/// The label of a token that is not predicted.
pub const MASKED: i32 = -100;
/// The longest line that is read, in bytes.
const MAX_LINE: usize = 16 << 20;
/// Faults that are told one by one.
const TOLD: usize = 20;

/// What is said of a file without rows.
pub(super) const NO_ROW: &str = "holds no row: give a line of JSON for each example";

/// What becomes of rows longer than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverLong {
    /// Cut at their end, and counted.
    Truncate,
    /// A fault.
    Refuse,
}

/// How rows are made.
#[derive(Clone, Copy, Debug)]
pub struct DataOptions {
    /// Tokens of a row.
    pub max_len: usize,
    /// What becomes of longer ones.
    pub over_long: OverLong,
}

/// A row ready to train on.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Line of the file, from 1.
    pub line: u32,
    /// Tokens.
    pub ids: Vec<u32>,
    /// A label for each token: its id, or [`MASKED`].
    pub labels: Vec<i32>,
}

/// What was found that is no fault.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Notes {
    /// Lines of rows that were cut, the first few.
    pub truncated: Vec<u32>,
    /// How many were cut.
    pub truncated_count: usize,
    /// Pairs of lines with equal rows, the later one first: the first few.
    pub duplicates: Vec<(u32, u32)>,
    /// How many rows equal an earlier one.
    pub duplicate_count: usize,
}

/// A line that cannot be trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Line of the file, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: String,
}

/// What turns lines into tokens: a model's tokenizer, template and ends.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<ChatTemplate>,
    bos: Option<u32>,
    eos: Option<u32>,
    stop: Vec<u32>,
    vocab: usize,
}

/// Where a row comes to its end.
#[derive(Clone, Copy, PartialEq)]
enum Ends {
    /// It is cut out of a text.
    Nowhere,
    /// After its last piece, by the end-of-text token.
    Text,
    /// Each predicted piece by a stop token of its own.
    Turns,
}

/// A message of a conversation.
fn message((i, value): (usize, &Value)) -> Result<Message, String> {
    let string = |key: &str| match value.get(key) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(_) => Err(format!("message {}: {key} is no string", i + 1)),
        None => Err(format!("message {} has no {key}", i + 1)),
    };
    Ok(Message::new(string("role")?, string("content")?))
}

/// Refuses a text that has nothing to predict.
fn filled(key: &str, text: &str) -> Result<(), String> {
    match text.trim().is_empty() {
        true if text.is_empty() => Err(format!("{key} is empty")),
        true => Err(format!("{key} is only white space")),
        false => Ok(()),
    }
}

impl<'a> Encoder<'a> {
    /// That of a model. An error where its chat template does not parse.
    pub fn new(model: &'a LanguageModel) -> Result<Encoder<'a>, Error> {
        let tokenizer = &model.tokenizer;
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        let template = model.chat_template.as_ref().map(|t| ChatTemplate::from_str(t, &bos, &eos)).transpose()?;
        Ok(Encoder {
            tokenizer,
            template,
            bos: tokenizer.bos().filter(|_| tokenizer.add_bos()),
            eos: tokenizer.eos().or(model.llama.config.eos.first().copied()),
            stop: model.stop_ids(),
            vocab: model.llama.config.vocab,
        })
    }

    /// The tokens and labels of a line.
    fn row(&self, line: &str) -> Result<(Vec<u32>, Vec<i32>), String> {
        let value: Value = serde_json::from_str(line).map_err(|error| {
            let (said, column) = (error.to_string(), error.column());
            let said = said.split(" at line ").next().unwrap_or_default().to_string();
            format!("is not JSON: column {column}: {}", quote(&said))
        })?;
        let Value::Object(object) = value else { return Err("is no JSON object".into()) };
        const KINDS: [&str; 5] = ["text", "completion", "messages", "output", "input_ids"];
        let kinds: Vec<&str> = KINDS.into_iter().filter(|key| object.contains_key(*key)).collect();
        let string = |key: &str| match object.get(key) {
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(_) => Err(format!("{key} is no string")),
            None => Err(format!("has no {key}")),
        };
        match kinds[..] {
            ["text"] => {
                let text = string("text")?;
                filled("text", text)?;
                self.pieces(&[(text, true)], self.bos, Ends::Nowhere)
            }
            ["completion"] => {
                let (prompt, completion) = (string("prompt")?, string("completion")?);
                filled("completion", completion)?;
                self.pieces(&[(prompt, false), (completion, true)], self.bos, Ends::Text)
            }
            ["messages"] => {
                let list = object["messages"].as_array().ok_or("messages is no list")?;
                let messages: Result<Vec<Message>, String> = list.iter().enumerate().map(message).collect();
                self.chat(&messages?)
            }
            ["output"] => {
                let (instruction, output) = (string("instruction")?, string("output")?);
                let input = if object.get("input").is_none_or(Value::is_null) { "" } else { string("input")? };
                filled("output", output)?;
                self.instruction(instruction, input, output)
            }
            ["input_ids"] => self.ids(&object),
            [] => {
                Err("has none of the keys text, prompt and completion, messages, instruction and output, input_ids"
                    .into())
            }
            _ => Err(format!("has {} at once: one kind of row a line", kinds.join(" and "))),
        }
    }

    /// Texts one after the other, those marked true predicted.
    fn pieces(&self, pieces: &[(&str, bool)], bos: Option<u32>, ends: Ends) -> Result<(Vec<u32>, Vec<i32>), String> {
        let mut ids: Vec<u32> = bos.into_iter().collect();
        let mut labels = vec![MASKED; ids.len()];
        for (text, trained) in pieces.iter().filter(|piece| !piece.0.is_empty()) {
            let piece = self.tokenizer.encode(text).map_err(|error| error.to_string())?;
            // What the template writes after the end of a turn, such as a line's end, no model is asked for.
            let turn = piece.iter().rposition(|id| self.stop.contains(id)).filter(|_| ends == Ends::Turns);
            let trained = if *trained { turn.map_or(piece.len(), |at| at + 1) } else { 0 };
            labels.extend(piece.iter().enumerate().map(|(i, &id)| if i < trained { id as i32 } else { MASKED }));
            ids.extend(piece);
        }
        if let Some(eos) = self.eos.filter(|eos| ends == Ends::Text && ids.last() != Some(eos)) {
            ids.push(eos);
            labels.push(eos as i32);
        }
        Ok((ids, labels))
    }

    fn chat(&self, messages: &[Message]) -> Result<(Vec<u32>, Vec<i32>), String> {
        let Some(template) = &self.template else {
            return Err("holds messages, and this model has no chat template: use prompt and completion".into());
        };
        for (i, message) in messages.iter().enumerate() {
            match (message.role.as_str(), i) {
                ("system", 0) | ("user" | "assistant" | "tool", _) => {}
                ("system", _) => return Err(format!("message {}: a system's message stands first", i + 1)),
                (role, _) => {
                    let role = quote(role);
                    return Err(format!("message {}: role {role}; system, user, assistant and tool are known", i + 1));
                }
            }
            if message.role == "assistant" && message.content.trim().is_empty() {
                return Err(format!("message {}: the assistant says nothing", i + 1));
            }
        }
        match messages.last() {
            Some(last) if last.role == "assistant" => {}
            Some(last) => {
                return Err(format!("ends with a message of role {}; the assistant's is expected", last.role))
            }
            None => return Err("has no messages".into()),
        }
        let render =
            |count: usize, open: bool| template.render(&messages[..count], open).map_err(|error| error.to_string());
        let whole = render(messages.len(), false)?;
        let (mut pieces, mut at) = (Vec::new(), 0);
        for (i, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            let (before, after) = (render(i, true)?, render(i + 1, false)?);
            let (begin, end) = (before.len(), after.len());
            if !(whole.starts_with(&before) && whole.starts_with(&after) && at <= begin && begin < end) {
                return Err(format!(
                    "message {}: the chat template writes this turn otherwise once the conversation goes on, so it \
                     cannot be told from the rest: end the row with it",
                    i + 1
                ));
            }
            pieces.extend([(&whole[at..begin], false), (&whole[begin..end], true)]);
            at = end;
        }
        pieces.push((&whole[at..], false));
        self.pieces(&pieces, None, Ends::Turns)
    }

    fn instruction(&self, instruction: &str, input: &str, output: &str) -> Result<(Vec<u32>, Vec<i32>), String> {
        if self.template.is_some() {
            let asked = if input.is_empty() { instruction.to_string() } else { format!("{instruction}\n\n{input}") };
            return self.chat(&[Message::new("user", asked), Message::new("assistant", output)]);
        }
        let middle = if input.is_empty() { String::new() } else { format!("### Input:\n{input}\n\n") };
        let prompt = format!("### Instruction:\n{instruction}\n\n{middle}### Response:\n");
        self.pieces(&[(&prompt, false), (output, true)], self.bos, Ends::Text)
    }

    fn ids(&self, object: &serde_json::Map<String, Value>) -> Result<(Vec<u32>, Vec<i32>), String> {
        let list = |key: &str| -> Result<Vec<i64>, String> {
            let items = object[key].as_array().ok_or_else(|| format!("{key} is no list"))?;
            let item = |(i, item): (usize, &Value)| item.as_i64().ok_or_else(|| format!("{key}[{i}] is no integer"));
            items.iter().enumerate().map(item).collect()
        };
        let ids = list("input_ids")?;
        let labels = if object.contains_key("labels") { list("labels")? } else { ids.clone() };
        if ids.len() != labels.len() {
            return Err(format!("has {} input_ids and {} labels", ids.len(), labels.len()));
        }
        let known = |id: i64| (0..self.vocab as i64).contains(&id);
        for (i, (&id, &label)) in ids.iter().zip(&labels).enumerate() {
            if !known(id) {
                return Err(format!("input_ids[{i}] is {id}; this model knows ids below {}", self.vocab));
            }
            if !known(label) && label != i64::from(MASKED) {
                return Err(format!("labels[{i}] is {label}; an id below {} or {MASKED} is expected", self.vocab));
            }
        }
        Ok((ids.iter().map(|&id| id as u32).collect(), labels.iter().map(|&label| label as i32).collect()))
    }

    /// A checked row.
    fn checked(&self, number: usize, line: &str, options: &DataOptions) -> Result<(Row, bool), String> {
        let (mut ids, mut labels) = self.row(line)?;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(format!(
                "has token {id}; this model knows ids below {}: is the tokenizer its own?",
                self.vocab
            ));
        }
        if ids.len() < 2 {
            return Err(format!("has {} tokens; at least 2 are needed to predict one", ids.len()));
        }
        let (count, over_long) = (ids.len(), ids.len() > options.max_len);
        if over_long && options.over_long == OverLong::Refuse {
            return Err(format!("has {count} tokens; at most {} are allowed (--max-len)", options.max_len));
        }
        ids.truncate(options.max_len);
        labels.truncate(options.max_len);
        if labels[1..].iter().all(|&label| label == MASKED) {
            return Err(match over_long {
                true => format!("has nothing to predict in its first {} of {count} tokens: raise --max-len", ids.len()),
                false => "is wholly masked: there is nothing to predict".into(),
            });
        }
        Ok((Row { line: number as u32, ids, labels }, over_long))
    }
}

/// Reads a file of JSON lines; empty lines count and are passed over. The error lists every line that cannot be trained
/// on, by `#line`.
pub fn read(path: &Path, bytes: &[u8], encoder: &Encoder, options: &DataOptions) -> Result<(Vec<Row>, Notes), Error> {
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let lines: Vec<(usize, &[u8])> = bytes.split(|&byte| byte == b'\n').enumerate().collect();
    let blank = |line: &[u8]| line.iter().all(u8::is_ascii_whitespace);
    let made = lines.par_iter().filter(|(_, line)| !blank(line)).map(|&(i, line)| {
        let row = match std::str::from_utf8(line) {
            _ if line.len() > MAX_LINE => Err(format!("has {} bytes; up to {MAX_LINE} are read", line.len())),
            Ok(line) => encoder.checked(i + 1, line, options),
            Err(error) => Err(format!("byte {} is not UTF-8", error.valid_up_to())),
        };
        row.map_err(|what| Fault { line: i + 1, what })
    });
    let made: Vec<Result<(Row, bool), Fault>> = made.collect();
    let faults: Vec<&Fault> = made.iter().filter_map(|row| row.as_ref().err()).collect();
    if !faults.is_empty() {
        return Err(list(path, &faults, made.len()));
    }
    let (rows, cut): (Vec<Row>, Vec<bool>) = made.into_iter().filter_map(Result::ok).unzip();
    if rows.is_empty() {
        return Err(Error::file(path, NO_ROW));
    }
    let mut notes = Notes::default();
    for row in rows.iter().zip(cut).filter_map(|(row, cut)| cut.then_some(row)) {
        notes.truncated_count += 1;
        if notes.truncated.len() < TOLD {
            notes.truncated.push(row.line);
        }
    }
    let keys: Vec<[u8; 32]> = rows.par_iter().map(|row| key(&row.ids, &row.labels)).collect();
    let mut seen: HashMap<[u8; 32], u32> = HashMap::with_capacity(rows.len());
    for (row, key) in rows.iter().zip(keys) {
        if let Some(&first) = seen.get(&key) {
            notes.duplicate_count += 1;
            if notes.duplicates.len() < TOLD {
                notes.duplicates.push((row.line, first));
            }
        } else {
            seen.insert(key, row.line);
        }
    }
    Ok((rows, notes))
}

/// One error for all faults.
fn list(path: &Path, faults: &[&Fault], rows: usize) -> Error {
    let mut what = match faults.len() {
        1 => format!("1 of {rows} rows cannot be trained on:"),
        n => format!("{n} of {rows} rows cannot be trained on:"),
    };
    for fault in faults.iter().take(TOLD) {
        what += &format!("\n  #{} {}", fault.line, fault.what);
    }
    if faults.len() > TOLD {
        what += &format!("\n  .. and {} more", faults.len() - TOLD);
    }
    Error::File { path: PathBuf::from(path), what }
}

/// What tells a row from others.
fn key(ids: &[u32], labels: &[i32]) -> [u8; 32] {
    let mut bytes = Vec::with_capacity(8 * ids.len());
    bytes.extend_from_slice(bytemuck::cast_slice(ids));
    bytes.extend_from_slice(bytemuck::cast_slice(labels));
    sha256(&bytes)
}

/// The tokens before the first that is predicted: what a row asks.
fn prompt<'a>(ids: &'a [u32], labels: &[i32]) -> &'a [u32] {
    let first = labels.iter().skip(1).position(|&label| label != MASKED).map_or(ids.len(), |at| at + 1);
    &ids[..first]
}

/// Rows of a held-out set that training would give away.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Leaks {
    /// Lines of the held-out file with the line of the training file that holds the same row.
    pub rows: Vec<(u32, u32)>,
    /// The same for rows that ask the same and expect another answer.
    pub prompts: Vec<(u32, u32)>,
}

/// Compares two sets, given as (line, ids, labels).
pub fn leaks<'a>(
    train: impl Iterator<Item = (u32, &'a [u32], &'a [i32])>,
    held_out: impl Iterator<Item = (u32, &'a [u32], &'a [i32])>,
) -> Leaks {
    let (mut rows, mut prompts) = (HashMap::new(), HashMap::new());
    for (line, ids, labels) in train {
        rows.entry(key(ids, labels)).or_insert(line);
        prompts.entry(prompt(ids, labels).to_vec()).or_insert(line);
    }
    let mut leaks = Leaks::default();
    for (line, ids, labels) in held_out {
        let asked = prompt(ids, labels);
        if let Some(&other) = rows.get(&key(ids, labels)) {
            leaks.rows.push((line, other));
        } else if let Some(&other) = prompts.get(asked).filter(|_| asked.len() > 1) {
            leaks.prompts.push((line, other));
        }
    }
    leaks
}
