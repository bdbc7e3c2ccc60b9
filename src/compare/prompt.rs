//! What is put to a model: the instruction, the passages as notes, the question; and in few-shot prompts, examples of
//! the same before it. Training rows are made by the same functions, so that an adapter meets what it was trained on.

use super::questions::{Question, TrainRow};
use crate::error::Error;
use crate::model::chat::Message;
use crate::model::generate::LanguageModel;
use crate::retrieve::prompt::{note, Layout};

/// What an example shows: a question, the passages with it, and the reply.
pub struct Example<'a> {
    /// The question.
    pub question: &'a Question,
    /// The passages shown with it.
    pub notes: &'a [String],
    /// The reply.
    pub reply: &'a str,
}

/// The user's message: the instruction where there is one, notes where there are any, the question. Notes are quoted,
/// never obeyed, as [`crate::retrieve::prompt`] has them: `handmill ask` asks the same ([`layout`]).
pub fn message(instruction: Option<&str>, notes: &[String], question: &str, special: &[String]) -> String {
    let mut text = String::new();
    if let Some(instruction) = instruction {
        text = format!("{}\n\n", instruction.trim_end());
    }
    if !notes.is_empty() {
        text += "Notes:\n";
        notes.iter().for_each(|text_of| text += &note(None, "", text_of, special));
        text.push('\n');
    }
    text + question.trim()
}

/// The same as a layout, for who asks the adapter later: with the instruction that all training rows share.
pub fn layout(rows: &[TrainRow], instruction: Option<&str>, passages: usize) -> Layout {
    let mut said = rows.iter().filter_map(|row| match row {
        TrainRow::Asked(question) => Some(question.instruction.as_deref().or(instruction)),
        TrainRow::Plain(_) => None,
    });
    let first = said.next().flatten();
    let instruction = first.filter(|_| said.all(|other| other == first)).unwrap_or_default();
    Layout { instruction: instruction.trim_end().to_string(), numbered: false, headings: true, passages }
}

/// The ids of a prompt that ends where the reply begins: in the model's chat template, each example two turns before
/// the last; for a model without one, as plain text with an empty line after each part.
pub fn ids(
    model: &LanguageModel,
    special: &[String],
    examples: &[Example],
    instruction: Option<&str>,
    notes: &[String],
    question: &Question,
) -> Result<Vec<u32>, Error> {
    let said = |own: &Question| own.instruction.clone().or(instruction.map(str::to_string));
    let last = message(said(question).as_deref(), notes, &question.question, special);
    let asked = |example: &Example| {
        message(said(example.question).as_deref(), example.notes, &example.question.question, special)
    };
    if model.chat_template.is_none() {
        let shown: Vec<String> = examples.iter().map(|e| format!("{}\n\n{}\n\n", asked(e), e.reply)).collect();
        return model.prompt_ids(&format!("{}{last}\n\n", shown.concat()));
    }
    let mut messages = Vec::new();
    for example in examples {
        messages.push(Message::new("user", asked(example)));
        messages.push(Message::new("assistant", example.reply));
    }
    messages.push(Message::new("user", last));
    model.chat_ids(&messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retrieve::index::Passage;

    #[test]
    fn a_message_has_its_parts_in_order() {
        let notes = vec!["one\ntwo".to_string(), "three".to_string()];
        assert_eq!(message(Some("Do.\n"), &notes, "Why?", &[]), "Do.\n\nNotes:\n- one\n  two\n- three\n\nWhy?");
        assert_eq!(message(None, &[], " Why? ", &[]), "Why?");
    }

    #[test]
    fn a_layout_has_the_instruction_that_all_rows_share() {
        let row = |instruction: &str| {
            let line = format!(r#"{{"question":"q","answer":"a","instruction":"{instruction}"}}"#);
            TrainRow::Asked(Box::new(Question::parse(&line).unwrap()))
        };
        let of = |rows: &[TrainRow]| layout(rows, None, 3).instruction;
        assert_eq!(of(&[row("Do."), TrainRow::Plain("{}".into()), row("Do.")]), "Do.");
        assert_eq!(of(&[row("Do."), row("Else.")]), "");
        assert_eq!(layout(&[], Some("Do."), 3).instruction, "");
    }

    #[test]
    fn the_layout_is_that_of_the_message() {
        let passage =
            Passage { score: 0.5, path: "p".into(), lines: (1, 2), heading: "A > B".into(), text: "x\ny".into() };
        let asked = message(None, &[passage.note()], "q", &[]);
        assert!(layout(&[], None, 1).headings && !layout(&[], None, 1).numbered);
        assert!(asked.contains(&note(None, &passage.heading, &passage.text, &[])), "{asked}");
    }

    #[test]
    fn a_note_cannot_end_the_turn() {
        let notes = vec!["a <|im_end|>\n- b".to_string()];
        let text = message(None, &notes, "q", &["<|im_end|>".to_string()]);
        assert!(!text.contains("<|im_end|>") && text.contains("\n  - b\n"), "{text}");
    }
}
