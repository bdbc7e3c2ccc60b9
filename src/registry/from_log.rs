//! What was asked of a served model and answered, as training rows: read, joined with what users said of it, checked,
//! each once, and nothing of the held-out set.
//!
//! ```text
//! {"id", "time", "model", "adapter", "user", "messages": [{role, content}], "answer", "finish_reason", "shadow", ..}
//! {"id", "time", "feedback": {"rating": 1 | 0 | -1, "correction": "text", "comment"}}
//! {"id", "time", "model", "error": "code", ..}
//! ```
//!
//! An answer that was corrected is trained on as corrected, wherever it stands: at the end of a row, or as an earlier
//! turn of one. Of rows that ask the same the best is kept: corrected, then by rating, then the latest.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::{json, Map, Value};

use super::near::Near;
use crate::aside;
use crate::compare::questions::{self, Question, TrainRow};
use crate::compare::{metrics, stages};
use crate::error::{quote, Error};
use crate::model::adapter::{hex, sha256};

/// The longest line that is read, in bytes.
const MAX_LINE: usize = 16 << 20;
/// What stands for what was redacted.
pub const REDACTED: &str = "[redacted]";
/// Marks by which chat templates tell turns apart: a text that holds one could pass for another's turn.
const MARKS: [&str; 9] =
    ["<|", "|>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"];

/// How rows are chosen.
#[derive(Clone, Debug)]
pub struct Options {
    /// Held-out questions, none of which may be among the rows.
    pub questions: Option<PathBuf>,
    /// Share of the questions that are kept apart from the rows, for evaluation.
    pub holdout: f64,
    /// Chooses which: the same ones each time.
    pub seed: u64,
    /// What is taken out of every text.
    pub redact: Vec<Regex>,
    /// Rows that nobody rated this high or corrected are left out; none: unrated ones are taken.
    pub min_rating: Option<f64>,
    /// Questions as similar as this ask the same, where their answers are the same.
    pub near: f64,
}

impl Default for Options {
    fn default() -> Self {
        Options { questions: None, holdout: 0.0, seed: 0, redact: Vec::new(), min_rating: None, near: 0.8 }
    }
}

/// What the logs came to.
#[derive(Clone, Debug)]
pub struct Made {
    /// Rows to train on, lines of `{"messages"}`.
    pub rows: String,
    /// How many.
    pub count: usize,
    /// Rows kept apart, the same.
    pub held_out: String,
    /// How many.
    pub held_out_count: usize,
    /// What was read, and how many were left out for which reason.
    pub manifest: Map<String, Value>,
    /// The files that were read.
    inputs: Vec<PathBuf>,
}

/// An interaction.
struct Asked {
    messages: Vec<(String, String)>,
    answer: String,
    finished: bool,
    shadow: bool,
}

/// What was said of one.
#[derive(Default)]
struct Feedback {
    rating: Option<f64>,
    correction: Option<String>,
}

/// A row that may be trained on.
struct Candidate {
    messages: Vec<(String, String)>,
    answer: String,
    corrected: bool,
    rating: f64,
    /// Place in the logs.
    place: usize,
}

/// Counts by reason.
type Left = BTreeMap<&'static str, usize>;

/// What was left out, in words.
pub fn left_out(manifest: &Map<String, Value>) -> String {
    let count = |key: &str| manifest.get(key).and_then(Value::as_u64).unwrap_or(0);
    if count("lines") == 0 {
        return "the logs hold no whole line".into();
    }
    let left = manifest.get("left_out").and_then(Value::as_object).into_iter().flatten();
    let left: Vec<String> = left.map(|(why, count)| format!("{why} {count}")).collect();
    let left = if left.is_empty() { "nothing".into() } else { left.join(", ") };
    // `lines` are whole ones; of a file of another kind none is understood.
    let other = manifest.get("left_out").and_then(|left| left.get("line not understood")?.as_u64());
    let hint = match other == Some(count("lines")) {
        true => ": a log is what `handmill serve --capture` writes",
        false => "",
    };
    format!("left out of the logs: {left}{hint}")
}

/// Makes rows of logs, in their order. Errors: a log or the questions cannot be read, no row is left.
pub fn make(logs: &[PathBuf], options: &Options) -> Result<Made, Error> {
    let held = options.questions.as_ref().map(|path| questions::read_questions(path)).transpose()?.unwrap_or_default();
    let (mut left, mut order, mut asked) = (Left::new(), Vec::new(), HashMap::new());
    let (mut said, mut sources, mut lines): (HashMap<String, Feedback>, Vec<Value>, usize) = Default::default();
    for path in logs {
        let bytes = fs::read(path).map_err(|cause| Error::io(path, cause))?;
        let mut read = 0;
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            if !line.ends_with(b"\n") {
                // The server is writing it, or was killed while it did.
                *left.entry("line cut off").or_default() += 1;
                continue;
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            read += 1;
            match parse(line) {
                Some((id, Line::Asked(one))) => match asked.entry(id) {
                    Entry::Occupied(_) => *left.entry("id seen before").or_default() += 1,
                    Entry::Vacant(place) => {
                        order.push(place.key().clone());
                        place.insert(one);
                    }
                },
                Some((id, Line::Feedback(new))) => {
                    let known = said.entry(id).or_default();
                    known.rating = new.rating.or(known.rating);
                    known.correction = new.correction.or(known.correction.take());
                }
                Some((_, Line::Failed)) => *left.entry("not answered").or_default() += 1,
                None => *left.entry("line not understood").or_default() += 1,
            }
        }
        lines += read;
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        sources.push(json!({ "file": file, "lines": read, "sha256": stages::file_sha256(path)? }));
    }
    let interactions = order.len();
    let strays = said.keys().filter(|id| !asked.contains_key(*id)).count();
    let corrections = corrections(&asked, &said);
    let mut found = Vec::new();
    for (place, id) in order.iter().enumerate() {
        let Some(one) = asked.remove(id) else { continue };
        match candidate(one, said.get(id), &corrections, options, place) {
            Ok(row) => found.push(row),
            Err(why) => *left.entry(why).or_default() += 1,
        }
    }
    let redactions: usize = found.iter_mut().map(|row| redact(row, &options.redact)).sum();
    let found = unlike(found, options.near, &mut left);
    let found = unleaked(found, &held, options.near, &mut left);
    let (mut rows, mut held_out, mut count, mut apart, mut corrected) = (String::new(), String::new(), 0, 0, 0);
    for row in &found {
        corrected += usize::from(row.corrected);
        let turn = |(role, content): &(String, String)| json!({ "role": role, "content": content });
        let mut messages: Vec<Value> = row.messages.iter().map(turn).collect();
        messages.push(json!({ "role": "assistant", "content": row.answer }));
        let line = format!("{}\n", json!({ "messages": messages }));
        if drawn(&row.asks(), options) {
            held_out += &line;
            apart += 1;
        } else {
            rows += &line;
            count += 1;
        }
    }
    let questions = options.questions.as_ref().map(|path| stages::file_sha256(path)).transpose()?;
    let manifest = json!({
        "lines": lines, "interactions": interactions, "rows": count, "held_out": apart, "corrected": corrected,
        "redactions": redactions, "feedback_without_interaction": strays, "left_out": left, "logs": sources,
        "questions_sha256": questions, "sha256": hex(&sha256(rows.as_bytes())),
        "held_out_sha256": hex(&sha256(held_out.as_bytes())),
        "options": { "holdout": options.holdout, "seed": options.seed, "min_rating": options.min_rating,
            "near": options.near, "redact": options.redact.iter().map(Regex::as_str).collect::<Vec<_>>() },
    });
    let manifest = manifest.as_object().cloned().unwrap_or_default();
    let inputs = logs.iter().chain(&options.questions).cloned().collect();
    Ok(Made { rows, count, held_out, held_out_count: apart, manifest, inputs })
}

impl Made {
    /// Writes the rows to `out`, those kept apart beside it as `NAME.held-out.jsonl`, the manifest as
    /// `NAME.manifest.json`; gives both paths. Errors: there is no row, or one of them is a file that was read.
    pub fn save(&self, out: &Path) -> Result<(PathBuf, PathBuf), Error> {
        if self.count == 0 {
            return Err(Error::file(out, format!("would hold no row: {}", left_out(&self.manifest))));
        }
        let (held_out, manifest) = (out.with_extension("held-out.jsonl"), out.with_extension("manifest.json"));
        for path in [out, &held_out, &manifest] {
            if self.inputs.iter().any(|input| aside::same_file(input, path)) {
                return Err(Error::file(path, "was read, and would be written over: name another file to write"));
            }
        }
        if self.held_out_count > 0 {
            aside::write(&held_out, self.held_out.as_bytes())?;
        } else if held_out.is_file() {
            // Of a run with other options.
            fs::remove_file(&held_out).map_err(|cause| Error::io(&held_out, cause))?;
        }
        aside::write(&manifest, format!("{:#}\n", json!(self.manifest)).as_bytes())?;
        aside::write(out, self.rows.as_bytes())?;
        Ok((held_out, manifest))
    }
}

impl Candidate {
    /// What is asked: all that users say.
    fn asks(&self) -> String {
        let users = self.messages.iter().filter(|(role, _)| role == "user");
        users.map(|(_, content)| content.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// The last question.
    fn question(&self) -> &str {
        self.messages.iter().rev().find(|(role, _)| role == "user").map_or("", |(_, content)| content)
    }

    /// Which of two rows that ask the same is kept.
    fn worth(&self) -> (bool, f64, usize) {
        (self.corrected, self.rating, self.place)
    }
}

enum Line {
    Asked(Asked),
    Feedback(Feedback),
    /// A request that was not answered.
    Failed,
}

fn parse(line: &[u8]) -> Option<(String, Line)> {
    if line.len() > MAX_LINE {
        return None;
    }
    let object: Map<String, Value> = serde_json::from_slice(line).ok()?;
    let text = |key: &str| object.get(key).and_then(Value::as_str).map(str::to_string);
    let id = text("id").filter(|id| !id.is_empty())?;
    if let Some(said) = object.get("feedback") {
        let said = said.as_object()?;
        let rating = match said.get("rating") {
            None | Some(Value::Null) => None,
            Some(rating) => Some(rating.as_f64().filter(|rating| rating.is_finite())?),
        };
        let correction = said.get("correction").and_then(Value::as_str).map(str::to_string);
        let correction = correction.filter(|text| !text.trim().is_empty());
        return Some((id, Line::Feedback(Feedback { rating, correction })));
    }
    if object.contains_key("error") {
        return Some((id, Line::Failed));
    }
    let message = |value: &Value| {
        let part = |key: &str| value.get(key)?.as_str().map(str::to_string);
        part("role").zip(part("content"))
    };
    let messages: Vec<(String, String)> =
        object.get("messages")?.as_array()?.iter().map(message).collect::<Option<_>>()?;
    let finished = text("finish_reason").is_none_or(|reason| reason == "stop");
    let shadow = object.get("shadow").and_then(Value::as_bool).unwrap_or(false);
    // A shadow answers what another has the id of.
    let id = if shadow { format!("{id} (shadow)") } else { id };
    Some((id, Line::Asked(Asked { messages, answer: text("answer")?, finished, shadow })))
}

/// What a user asked last and was answered, by normal text.
fn exchange(messages: &[(String, String)], answer: &str) -> (String, String) {
    let asked = messages.last().map_or("", |(_, content)| content);
    (asked.trim().into(), answer.trim().into())
}

/// Answers that were refused, by what they answered; with what they should have been, where someone said it.
fn corrections(
    asked: &HashMap<String, Asked>,
    said: &HashMap<String, Feedback>,
) -> HashMap<(String, String), Option<String>> {
    let mut found: HashMap<(String, String), Option<String>> = HashMap::new();
    let mut ids: Vec<&String> = asked.keys().collect();
    ids.sort(); // a map's order changes from run to run
    for id in ids {
        let Some(said) = said.get(id) else { continue };
        if said.correction.is_some() || said.rating.is_some_and(|rating| rating < 0.0) {
            let known = found.entry(exchange(&asked[id].messages, &asked[id].answer)).or_default();
            *known = said.correction.clone().or(known.take());
        }
    }
    found
}

/// A row of an interaction, or why there is none.
fn candidate(
    one: Asked,
    said: Option<&Feedback>,
    corrections: &HashMap<(String, String), Option<String>>,
    options: &Options,
    place: usize,
) -> Result<Candidate, &'static str> {
    if one.shadow {
        return Err("shadow");
    }
    let correction = said.and_then(|said| said.correction.clone());
    let rating = said.and_then(|said| said.rating);
    let corrected = correction.is_some();
    if !corrected {
        match (rating, options.min_rating) {
            (Some(rating), _) if rating < 0.0 => return Err("negative rating"),
            (Some(rating), Some(least)) if rating < least => return Err("rating too low"),
            (None, Some(_)) => return Err("not rated"),
            _ => {}
        }
        if !one.finished {
            return Err("answer not finished");
        }
    }
    let answer = correction.unwrap_or(one.answer);
    let mut messages = one.messages;
    check(&messages)?;
    for at in 1..messages.len() {
        if messages[at].0 == "assistant" {
            match corrections.get(&exchange(&messages[..at], &messages[at].1)) {
                Some(Some(better)) => messages[at].1 = better.clone(),
                Some(None) => return Err("holds a turn rated negative"),
                None => {}
            }
        }
    }
    if answer.trim().is_empty() {
        return Err("no answer");
    }
    let marked = |text: &str| MARKS.iter().any(|mark| text.contains(mark));
    if marked(&answer) || messages.iter().any(|(_, content)| marked(content)) {
        return Err("holds a chat template's mark");
    }
    Ok(Candidate { messages, answer: answer.trim().into(), corrected, rating: rating.unwrap_or(0.0), place })
}

/// Refuses conversations that cannot be trained on.
fn check(messages: &[(String, String)]) -> Result<(), &'static str> {
    let roles: Vec<&str> = messages.iter().map(|(role, _)| role.as_str()).collect();
    let known = (roles.iter().enumerate())
        .all(|(i, role)| matches!(*role, "user" | "assistant" | "tool") || (*role == "system" && i == 0));
    let ends = roles.last().is_some_and(|role| *role == "user" || *role == "tool") && roles.contains(&"user");
    match known && ends {
        false => Err("roles out of order"),
        true if messages.iter().any(|(role, content)| role != "system" && content.trim().is_empty()) => {
            Err("an empty turn")
        }
        true => Ok(()),
    }
}

fn redact(row: &mut Candidate, patterns: &[Regex]) -> usize {
    let mut count = 0;
    for text in row.messages.iter_mut().map(|(_, content)| content).chain([&mut row.answer]) {
        for pattern in patterns {
            let found = pattern.find_iter(text).filter(|found| !found.is_empty()).count();
            if found > 0 {
                *text = pattern.replace_all(text, regex::NoExpand(REDACTED)).into_owned();
                count += found;
            }
        }
    }
    count
}

/// Each question once: of those that ask the same the best, of those that nearly do and are answered the same too.
fn unlike(mut found: Vec<Candidate>, threshold: f64, left: &mut Left) -> Vec<Candidate> {
    found.sort_by(|a, b| {
        let ((a, rating, place), (b, other, at)) = (a.worth(), b.worth());
        b.cmp(&a).then(other.total_cmp(&rating)).then(at.cmp(&place))
    });
    let (mut near, mut kept): (Near, Vec<Candidate>) = (Near::new(threshold), Vec::new());
    let (mut rows, mut prompts) = (HashSet::new(), HashSet::new());
    for row in found {
        let turns = row.messages.iter().map(|(role, content)| format!("{role} {}\n", plain(content)));
        let prompt: String = turns.collect();
        let answer = plain(&row.answer);
        let new = rows.insert((prompt.clone(), answer.clone()));
        let first = prompts.insert(prompt);
        let same = || near.of(&row.asks()).into_iter().any(|i| plain(&kept[i].answer) == answer);
        let why = match (new, first) {
            (false, _) => Some("duplicate"),
            (true, false) => Some("asked before, answered otherwise"),
            (true, true) => same().then_some("near duplicate"),
        };
        match why {
            Some(why) => *left.entry(why).or_default() += 1,
            None => {
                near.push(&row.asks());
                kept.push(row);
            }
        }
    }
    kept.sort_by_key(|row| row.place);
    kept
}

/// Without case and with single blanks; punctuation may make another question.
fn plain(text: &str) -> String {
    text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Without what the held-out set asks: its questions, and those nearly the same that give its answers away.
fn unleaked(found: Vec<Candidate>, held: &[Question], threshold: f64, left: &mut Left) -> Vec<Candidate> {
    let mut near = Near::new(threshold);
    held.iter().for_each(|question| near.push(&question.question));
    let asked: HashSet<String> = held.iter().map(|question| metrics::normal(&question.question)).collect();
    let leaks = |row: &Candidate| {
        let turns = row.messages.iter().filter(|(role, _)| role == "user");
        let same = turns.flat_map(|(_, content)| asks(content)).any(|text| asked.contains(&metrics::normal(text)));
        let given = |i: &usize| metrics::present(&row.answer, &held[*i].answers()) > 0.0;
        same || asks(row.question()).iter().any(|text| near.of(text).iter().any(given))
    };
    let (out, kept): (Vec<Candidate>, Vec<Candidate>) = found.into_iter().partition(leaks);
    if !out.is_empty() {
        left.insert("in the held-out set", out.len());
    }
    kept
}

/// What a turn may ask: all of it, or its last paragraph, as an instruction or passages may stand before a question.
fn asks(turn: &str) -> [&str; 2] {
    let turn = turn.trim_end();
    [turn, turn.rsplit("\n\n").next().unwrap_or(turn)]
}

/// The users' turns of a row to train on.
fn turns(row: &TrainRow) -> Vec<String> {
    let text = match row {
        TrainRow::Asked(question) => return vec![question.question.clone()],
        TrainRow::Plain(text) => text,
    };
    let row: Value = serde_json::from_str(text).unwrap_or_default();
    let said = row["messages"].as_array().into_iter().flatten().filter(|turn| turn["role"] == "user");
    let said = said.map(|turn| &turn["content"]).chain(["prompt", "instruction", "input"].map(|key| &row[key]));
    said.filter_map(|text| text.as_str().map(str::to_string)).collect()
}

/// Which of these questions, by line, rows to train on ask as well.
pub fn leaks(rows: &Path, held: &[Question]) -> Result<Vec<usize>, Error> {
    let turns: Vec<String> = questions::read_train(rows)?.iter().flat_map(turns).collect();
    let asked: HashSet<String> = turns.iter().flat_map(|turn| asks(turn)).map(metrics::normal).collect();
    let leaks = held.iter().filter(|question| asked.contains(&metrics::normal(&question.question)));
    Ok(leaks.map(|question| question.line).collect())
}

/// Whether a question is kept apart: by its text alone, so that it stays so in the next data set.
fn drawn(asks: &str, options: &Options) -> bool {
    let hash = sha256(format!("{} {}", options.seed, metrics::normal(asks)).as_bytes());
    let draw = u64::from_le_bytes(*hash.first_chunk::<8>().unwrap_or(&[0; 8])) as f64 / 2f64.powi(64);
    draw < options.holdout
}

/// Compiles what is to be redacted. The error names the expression.
pub fn patterns(texts: &[String]) -> Result<Vec<Regex>, Error> {
    let compile = |text: &String| {
        Regex::new(text).map_err(|_| Error::Request(format!("--redact: {} is no regular expression", quote(text))))
    };
    texts.iter().map(compile).collect()
}
