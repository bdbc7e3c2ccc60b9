//! How near a reply is to an answer, as SQuAD measures it: words without case, punctuation and articles.
//!
//! ```text
//! normal(text)  = lower case, without ASCII punctuation, without the words a, an, the, blanks as one
//! exact match   = normal(reply) = normal(answer)
//! F1            = 2pr / (p + r) over the words of both, as bags
//! present       = the answer's words stand in the reply, one after the other
//! ```
//!
//! Of several answers the best counts. An answer of which nothing would be left is compared by its lower case alone.

/// Text as it is compared.
pub fn normal(text: &str) -> String {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let words = kept.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the"));
    words.collect::<Vec<_>>().join(" ")
}

/// [`normal`], or where nothing is left of it the text in lower case.
fn comparable(text: &str) -> String {
    let normal = normal(text);
    if normal.is_empty() {
        text.trim().to_lowercase()
    } else {
        normal
    }
}

/// 1 where the reply is one of the answers, else 0.
pub fn exact_match(reply: &str, answers: &[String]) -> f64 {
    let reply = comparable(reply);
    f64::from(answers.iter().any(|answer| comparable(answer) == reply))
}

/// The best F1 over the words that the reply shares with an answer.
pub fn f1(reply: &str, answers: &[String]) -> f64 {
    let reply = comparable(reply);
    answers.iter().map(|answer| f1_of(&reply, &comparable(answer))).fold(0.0, f64::max)
}

fn f1_of(reply: &str, answer: &str) -> f64 {
    let reply: Vec<&str> = reply.split_whitespace().collect();
    let mut left: Vec<&str> = answer.split_whitespace().collect();
    if reply.is_empty() || left.is_empty() {
        return f64::from(reply.is_empty() && left.is_empty());
    }
    let wanted = left.len();
    let mut shared = 0;
    for word in &reply {
        if let Some(at) = left.iter().position(|other| other == word) {
            left.swap_remove(at);
            shared += 1;
        }
    }
    2.0 * shared as f64 / (reply.len() + wanted) as f64
}

/// 1 where an answer's words stand in the text one after the other, else 0.
pub fn present(text: &str, answers: &[String]) -> f64 {
    let text = comparable(text);
    let words: Vec<&str> = text.split_whitespace().collect();
    let stands = |answer: &String| {
        let answer = comparable(answer);
        let wanted: Vec<&str> = answer.split_whitespace().collect();
        !wanted.is_empty() && words.windows(wanted.len()).any(|window| window == wanted)
    };
    f64::from(answers.iter().any(stands))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| text.to_string()).collect()
    }

    #[test]
    fn text_is_normalised_as_squad_does() {
        // Cases of the SQuAD evaluation script: lower case, punctuation, articles, blanks, in this order.
        for (text, expected) in [
            ("The Eiffel  Tower!", "eiffel tower"),
            ("an apple a day", "apple day"),
            ("U.S.A.", "usa"),
            ("2,945 km", "2945 km"),
            ("\"Theatre\"", "theatre"),
            ("a-an-the", "aanthe"),
            ("", ""),
            ("the", ""),
            ("São Tomé", "são tomé"),
        ] {
            assert_eq!(normal(text), expected, "{text}");
        }
    }

    #[test]
    fn exact_match_takes_any_alias() {
        let wanted = answers(&["Denver Broncos", "the Broncos"]);
        assert_eq!(exact_match("broncos.", &wanted), 1.0);
        assert_eq!(exact_match("Denver", &wanted), 0.0);
        assert_eq!(exact_match("The", &answers(&["the"])), 1.0, "an answer that is an article");
        assert_eq!(exact_match("", &answers(&["the"])), 0.0);
    }

    #[test]
    fn f1_counts_shared_words_as_bags() {
        assert_eq!(f1("Denver Broncos", &answers(&["the Denver Broncos"])), 1.0);
        // precision 1/2, recall 1: 2/3
        assert!((f1("cat sat", &answers(&["cat"])) - 2.0 / 3.0).abs() < 1e-12);
        // one of two "to" is in the answer: 2·1/(2+2)
        assert_eq!(f1("to to", &answers(&["to be"])), 0.5);
        assert_eq!(f1("", &answers(&["x"])), 0.0);
        assert_eq!(f1("y", &answers(&["x", "y z"])), 2.0 / 3.0);
    }

    #[test]
    fn presence_needs_whole_words_in_order() {
        assert_eq!(present("It is 2945 km long.", &answers(&["2,945 km"])), 1.0);
        assert_eq!(present("Roman", &answers(&["Oman"])), 0.0);
        assert_eq!(present("km 2945", &answers(&["2,945 km"])), 0.0);
        assert_eq!(present("", &answers(&["x"])), 0.0);
    }
}
