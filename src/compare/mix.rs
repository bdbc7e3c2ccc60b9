//! What the adapter is trained on: questions of the training rows, bare or with passages as retrieval finds them.
//!
//! ```text
//! row i has passages  where floor((i + 1)·share) > floor(i·share)
//! of those, every third has one alone: the best that holds the answer, else the best; the others have all
//! of these, 3 in 10 have them in another order: the place of a passage is no clue
//! ```
//!
//! The rows are written in the order in which they are trained on; where there are more steps than rows, they come
//! again in another order and with other company.

use std::fmt::Write as _;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::form::Form;
use super::metrics;
use super::prompt;
use super::questions::{Question, TrainRow};
use crate::error::Error;
use crate::retrieve::index::Passage;

/// The rows that training takes, in order: `count` places in `rows`, shuffled anew each time through.
pub fn order(rows: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order = Vec::with_capacity(count + rows);
    while order.len() < count {
        let mut pass: Vec<usize> = (0..rows).collect();
        pass.shuffle(&mut rng);
        order.extend(pass);
    }
    order.truncate(count);
    order
}

/// The notes that go with a training row: all, one, or none of the passages found for it.
fn notes(question: &Question, found: &[Passage], alone: bool, rng: &mut ChaCha8Rng) -> Vec<String> {
    if alone {
        let answers = question.answers();
        let holds = |passage: &&Passage| metrics::present(&passage.text, &answers) > 0.0;
        return found.iter().find(holds).or(found.first()).map(Passage::note).into_iter().collect();
    }
    let mut notes: Vec<String> = found.iter().map(Passage::note).collect();
    if rng.random_range(0..10) < 3 {
        notes.shuffle(rng);
    }
    notes
}

/// How rows are made.
pub struct How<'a> {
    /// Share of the rows that passages are put to.
    pub share: f64,
    /// Said before questions whose row has no instruction.
    pub instruction: Option<&'a str>,
    /// Rows are messages, else prompt and completion.
    pub chat: bool,
    /// The model's special tokens.
    pub special: &'a [String],
    /// Seeds what is drawn.
    pub seed: u64,
}

/// The training file's text: a line for each place of `order`. `found` has the passages of each row, empty for those
/// that are trained on as they are. Prompts are those of [`prompt::ids`].
pub fn lines(
    rows: &[TrainRow],
    order: &[usize],
    found: &[Vec<Passage>],
    form: &Form,
    how: &How,
) -> Result<String, Error> {
    let (share, mut rng) = (how.share, ChaCha8Rng::seed_from_u64(how.seed));
    rng.set_stream(1); // stream 0 is the order's
    let (mut text, mut with) = (String::new(), 0);
    for (i, &row) in order.iter().enumerate() {
        let question = match &rows[row] {
            TrainRow::Asked(question) => question,
            TrainRow::Plain(line) => {
                text += line.trim();
                text.push('\n');
                continue;
            }
        };
        let mut shown = question.context.clone();
        if shown.is_empty() && ((i + 1) as f64 * share).floor() > (i as f64 * share).floor() {
            with += 1;
            shown = notes(question, &found[row], with % 3 == 0, &mut rng);
        }
        let said = question.instruction.as_deref().or(how.instruction);
        let asked = prompt::message(said, &shown, &question.question, how.special);
        let reply = form
            .expected(question)
            .map_err(|what| Error::Request(format!("training row #{} {what}", question.line)))?;
        let line = match how.chat {
            true => json!({ "messages": [{ "role": "user", "content": asked },
                { "role": "assistant", "content": reply }] }),
            false => json!({ "prompt": format!("{asked}\n\n"), "completion": reply }),
        };
        let _ = writeln!(text, "{line}"); // writing to a String cannot fail
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_takes_every_row_once_before_any_twice() {
        let order = order(5, 12, 3);
        for pass in order.chunks(5).take(2) {
            let mut pass = pass.to_vec();
            pass.sort_unstable();
            assert_eq!(pass, [0, 1, 2, 3, 4]);
        }
        assert_eq!(order.len(), 12);
    }

    #[test]
    fn a_share_of_the_rows_has_passages() {
        let question = |i: usize| Question::parse(&format!(r#"{{"question":"q{i}","answer":"x{i}"}}"#)).unwrap();
        let rows: Vec<TrainRow> = (0..8).map(|i| TrainRow::Asked(Box::new(question(i)))).collect();
        let passage =
            |text: String| Passage { score: 0.5, path: "p".into(), lines: (1, 1), heading: String::new(), text };
        let found: Vec<Vec<Passage>> =
            (0..8).map(|i| vec![passage("other".into()), passage(format!("holds x{i}"))]).collect();
        let order: Vec<usize> = (0..8).collect();
        let made = |share| {
            let how = How { share, instruction: None, chat: true, special: &[], seed: 1 };
            lines(&rows, &order, &found, &Form::default(), &how).unwrap()
        };
        let with = |text: &str| text.lines().filter(|line| line.contains("Notes:")).count();
        assert_eq!([made(0.0), made(0.75), made(1.0)].map(|text| with(&text)), [0, 6, 8]);
        let alone: Vec<String> =
            made(0.75).lines().filter(|l| l.contains("holds") && !l.contains("other")).map(str::to_string).collect();
        assert_eq!(alone.len(), 2, "every third of those has the passage that holds the answer: {alone:?}");
        assert_eq!(made(0.75), made(0.75));
    }
}
