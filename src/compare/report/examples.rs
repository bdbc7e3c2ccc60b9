//! Questions on which the arms differ, a few of each way of differing.

use super::super::metrics;
use super::super::outcome::Outcome;
use super::escape;

/// How many are shown.
const SHOWN: usize = 8;

/// Places of the questions to show: those on which the arms differ, one of each pattern of right and wrong in turn, the
/// most frequent pattern first.
pub fn pick(outcome: &Outcome) -> Vec<usize> {
    let mut patterns: Vec<(Vec<bool>, Vec<usize>)> = Vec::new();
    for i in 0..outcome.questions.len() {
        let right: Vec<bool> = outcome.arms.iter().map(|arm| arm.scores[i].strict > 0.0).collect();
        if right.iter().all(|r| *r == right[0]) {
            continue;
        }
        match patterns.iter_mut().find(|(pattern, _)| *pattern == right) {
            Some((_, places)) => places.push(i),
            None => patterns.push((right, vec![i])),
        }
    }
    patterns.sort_by_key(|(_, places)| std::cmp::Reverse(places.len()));
    let mut shown = Vec::new();
    for turn in 0..SHOWN {
        shown.extend(patterns.iter().filter_map(|(_, places)| places.get(turn)));
    }
    shown.truncate(SHOWN);
    shown
}

/// The cards of these questions.
pub fn cards(outcome: &Outcome, places: &[usize]) -> String {
    places.iter().map(|&i| card(outcome, i)).collect()
}

fn card(outcome: &Outcome, i: usize) -> String {
    let question = &outcome.questions[i];
    let kind = match question.kind.is_empty() {
        true => String::new(),
        false => format!(" · {}", escape(&question.kind)),
    };
    let mut html = format!(
        "<article class=\"card\"><p class=\"q\">{}</p><p class=\"meta\">expected: {}{kind}</p>",
        escape(&question.question),
        escape(&question.answer)
    );
    for arm in &outcome.arms {
        let (mark, class, word) = match (arm.scores[i].strict > 0.0, arm.scores[i].answer_present > 0.0) {
            (true, _) => ("✓", "ok", "right"),
            (false, true) => ("~", "no", "answer present, not as asked"),
            (false, false) => ("✗", "no", "wrong"),
        };
        let reply = match arm.answers[i].reply.as_str() {
            "" => "(nothing)".to_string(),
            text => escape(text),
        };
        html += &format!(
            "<div class=\"reply {}\"><span><span class=\"dot\"></span>{}</span><span class=\"{class}\" \
             title=\"{word}\" aria-label=\"{word}\">{mark}</span><span>{reply}</span></div>",
            arm.arm.key(),
            arm.arm.name(),
        );
    }
    let passages = &outcome.passages[i];
    if !passages.is_empty() {
        let answers = question.answers();
        html += &format!("<details><summary>{} passages that were found</summary>", passages.len());
        for passage in passages {
            let holds = if metrics::present(&passage.text, &answers) > 0.0 { " · holds the answer" } else { "" };
            let heading = match passage.heading.is_empty() {
                true => String::new(),
                false => format!("{}: ", escape(&passage.heading)),
            };
            html += &format!(
                "<blockquote>{heading}{}<cite>{}, lines {} to {} · cosine {:.3}{holds}</cite></blockquote>",
                escape(&passage.text),
                escape(&passage.path),
                passage.lines.0,
                passage.lines.1,
                passage.score
            );
        }
        html += "</details>";
    } else if !question.context.is_empty() {
        html += "<details><summary>shown with the question in every arm</summary>";
        for context in &question.context {
            html += &format!("<blockquote>{}</blockquote>", escape(context));
        }
        html += "</details>";
    }
    html + "</article>"
}
