//! The form a reply is to have.
//!
//! A template such as `{answer} [{topic}]` is a reply in which each `{name}` stands for a field of the question's row.
//! The reply that is expected is the template filled in; a reply has the form where the text around the fields is there
//! and each field is filled with something; its answer is what stands at `{answer}`, and its other fields are right
//! where they are the row's, without regard to case. A regular expression may be given instead: it must match the
//! whole reply, and its group named `answer`, where it has one, is the answer. Without either every reply has the form.

use regex::Regex;

use super::questions::Question;
use crate::error::{quote, Error};

/// How replies are read.
#[derive(Clone, Debug, Default)]
pub struct Form {
    /// The flag's template, which goes before the rows' own.
    template: Option<String>,
    regex: Option<Regex>,
}

/// What a reply was read as.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    /// The part that is compared with the answer: the whole reply where it has not the form.
    pub answer: String,
    /// It has the form.
    pub form: bool,
    /// Its fields beside the answer are right; none where the form has no other field.
    pub fields: Option<bool>,
}

impl Form {
    /// By flags: a template, or a regular expression. An error where one does not parse.
    pub fn new(template: Option<&str>, regex: Option<&str>) -> Result<Form, Error> {
        let wrong = |what: String| Error::Request(what);
        if let Some(template) = template {
            pieces(template).map_err(|what| wrong(format!("--format: {what}")))?;
        }
        // Anchored, so that the whole reply counts.
        let anchored = |text: &str| Regex::new(&format!("^(?s:{text})$"));
        let regex = regex.map(|text| {
            Regex::new(text).and_then(|_| anchored(text)).map_err(|error| {
                // The last line says what is wrong, those before it draw where.
                let said = error.to_string();
                let said = said.lines().last().unwrap_or_default().trim_start_matches("error: ");
                wrong(format!("--format-regex does not parse: {}", quote(said)))
            })
        });
        Ok(Form { template: template.map(str::to_string), regex: regex.transpose()? })
    }

    fn template<'a>(&'a self, question: &'a Question) -> Option<&'a str> {
        match &self.regex {
            Some(_) => None,
            None => self.template.as_deref().or(question.format.as_deref()),
        }
    }

    /// True where replies to this question are to have a form.
    pub fn asked(&self, question: &Question) -> bool {
        self.regex.is_some() || self.template(question).is_some()
    }

    /// The reply that is expected: the template filled in, else the answer.
    pub fn expected(&self, question: &Question) -> Result<String, String> {
        let Some(template) = self.template.as_deref().or(question.format.as_deref()) else {
            return Ok(question.answer.clone());
        };
        let mut text = String::new();
        for piece in pieces(template)? {
            match piece {
                Piece::Text(piece) => text += piece,
                Piece::Field(name) => text += question.field(name).ok_or_else(|| missing(template, name))?,
            }
        }
        Ok(text)
    }

    /// Reads a reply.
    pub fn read(&self, reply: &str, question: &Question) -> Read {
        let reply = reply.trim();
        let whole = |form| Read { answer: reply.to_string(), form, fields: None };
        if let Some(regex) = &self.regex {
            let Some(found) = regex.captures(reply) else { return whole(false) };
            let answer = found.name("answer").map_or(reply, |group| group.as_str());
            return Read { answer: answer.to_string(), form: true, fields: None };
        }
        let Some(template) = self.template(question) else { return whole(true) };
        let Ok(pieces) = pieces(template) else { return whole(false) };
        let mut pattern = String::from("^(?s:");
        let mut names = Vec::new();
        for piece in &pieces {
            match piece {
                Piece::Text(text) => pattern += &regex::escape(text),
                Piece::Field(name) => {
                    pattern += "(.+?)";
                    names.push(*name);
                }
            }
        }
        let Some(regex) = Regex::new(&(pattern + ")$")).ok() else { return whole(false) };
        let others: Vec<&str> = names.iter().copied().filter(|name| *name != "answer").collect();
        let Some(found) = regex.captures(reply) else {
            return Read { fields: (!others.is_empty()).then_some(false), ..whole(false) };
        };
        let at = |name: &str| {
            let group = names.iter().position(|other| *other == name)?;
            Some(found.get(group + 1)?.as_str().trim())
        };
        let same = |name: &&str| {
            let (said, wanted) = (at(name).unwrap_or_default(), question.field(name).unwrap_or_default());
            said.to_lowercase() == wanted.trim().to_lowercase()
        };
        let fields = (!others.is_empty()).then(|| others.iter().all(same));
        Read { answer: at("answer").unwrap_or(reply).to_string(), form: true, fields }
    }
}

enum Piece<'a> {
    Text(&'a str),
    Field(&'a str),
}

fn missing(template: &str, name: &str) -> String {
    format!("has no {name}, which the format {} asks for", quote(template))
}

/// A template's parts.
fn pieces(template: &str) -> Result<Vec<Piece<'_>>, String> {
    let (mut pieces, mut rest) = (Vec::new(), template);
    while let Some(begin) = rest.find('{') {
        let Some(end) = rest[begin..].find('}').map(|end| begin + end) else {
            return Err(format!("{} has a {{ without its }}", quote(template)));
        };
        let name = &rest[begin + 1..end];
        if name.is_empty() || !name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            return Err(format!("{}: {{{}}} is no field's name", quote(template), quote(name)));
        }
        if begin > 0 {
            pieces.push(Piece::Text(&rest[..begin]));
        }
        pieces.push(Piece::Field(name));
        rest = &rest[end + 1..];
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    match pieces.iter().any(|piece| matches!(piece, Piece::Field("answer"))) {
        true => Ok(pieces),
        false => Err(format!("{} has no {{answer}}", quote(template))),
    }
}

/// Checks a row's own template.
pub(super) fn check(template: &str) -> Result<(), String> {
    pieces(template).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Question {
        Question::parse(r#"{"question":"q","answer":"2,945 km","topic":"geography","format":"{answer} [{topic}]"}"#)
            .unwrap()
    }

    #[test]
    fn a_template_reads_answer_form_and_fields() {
        let (form, question) = (Form::default(), question());
        assert_eq!(form.expected(&question).unwrap(), "2,945 km [geography]");
        let read = |reply| form.read(reply, &question);
        let got = |answer: &str, form, fields| Read { answer: answer.into(), form, fields: Some(fields) };
        assert_eq!(read("2,945 km [geography]"), got("2,945 km", true, true));
        assert_eq!(read(" 12 km [Geography]\n"), got("12 km", true, true));
        assert_eq!(read("2,945 km [people]"), got("2,945 km", true, false));
        assert_eq!(read("2,945 km"), got("2,945 km", false, false));
        assert_eq!(read("2,945 km [geography]. More"), got("2,945 km [geography]. More", false, false));
        assert_eq!(read("[geography]"), got("[geography]", false, false));
    }

    #[test]
    fn a_regex_takes_the_whole_reply() {
        let form = Form::new(None, Some(r"(?P<answer>[\d,]+) km|none")).unwrap();
        let question = question();
        assert_eq!(form.read("12 km", &question), Read { answer: "12".into(), form: true, fields: None });
        assert!(form.read("none", &question).form);
        assert!(!form.read("about 12 km", &question).form);
        assert!(!form.read("12 km\nand more", &question).form);
        let error = Form::new(None, Some("(")).unwrap_err().to_string();
        assert!(error.contains("--format-regex"), "{error}");
    }

    #[test]
    fn wrong_templates_are_told() {
        for (template, word) in [("{answer", "without"), ("[{topic}]", "{answer}"), ("{answer} {a b}", "name")] {
            let error = Form::new(Some(template), None).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let mut question = question();
        question.format = Some("{answer} {unit}".into());
        assert!(Form::default().expected(&question).unwrap_err().contains("unit"));
    }

    #[test]
    fn without_a_form_every_reply_has_it() {
        let question = Question::parse(r#"{"question":"q","answer":"x"}"#).unwrap();
        let form = Form::default();
        assert!(!form.asked(&question));
        assert_eq!(form.read("x y", &question), Read { answer: "x y".into(), form: true, fields: None });
        assert_eq!(form.expected(&question).unwrap(), "x");
    }
}
