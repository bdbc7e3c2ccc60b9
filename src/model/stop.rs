//! Texts that end an answer, found across the borders of tokens and never shown.

/// Text as it comes, held back where it may be the beginning of a stop text.
#[derive(Clone, Debug, Default)]
pub struct StopText {
    stop: Vec<String>,
    /// All text, up to the stop text.
    pub whole: String,
    /// Bytes of it that were given out.
    pub shown: usize,
    /// Whether a stop text was met.
    pub ended: bool,
}

impl StopText {
    /// Nothing yet; none of `stop` may be empty.
    pub fn new(stop: &[String]) -> StopText {
        StopText { stop: stop.to_vec(), ..StopText::default() }
    }

    /// Adds a piece; gives what can be shown now, and whether a stop text was met.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.whole.push_str(piece);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.whole[self.shown..].find(stop.as_str())).min() {
            self.whole.truncate(self.shown + at);
            self.ended = true;
            return (self.rest(), true);
        }
        let held = self.stop.iter().map(|stop| overlap(&self.whole[self.shown..], stop)).max().unwrap_or(0);
        let ready = self.whole[self.shown..self.whole.len() - held].to_string();
        self.shown += ready.len();
        (ready, false)
    }

    /// What was held back.
    pub fn rest(&mut self) -> String {
        let rest = self.whole[self.shown..].to_string();
        self.shown = self.whole.len();
        rest
    }
}

/// Bytes at the end of `text` that begin `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let cuts = stop.char_indices().map(|(at, _)| at).rev();
    cuts.into_iter().find(|&len| text.ends_with(&stop[..len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_texts_are_never_shown_and_nothing_else_is_lost() {
        let stop = ["END".to_string(), "\n\n".to_string()];
        let run = |pieces: &[&str]| {
            let mut text = StopText::new(&stop);
            let mut shown = String::new();
            for piece in pieces {
                let (ready, ended) = text.push(piece);
                shown += &ready;
                if ended {
                    break;
                }
            }
            shown += &text.rest();
            assert_eq!(shown, text.whole);
            (shown, text.ended)
        };
        assert_eq!(run(&["a", "E", "N", "x"]), ("aENx".to_string(), false));
        assert_eq!(run(&["a", "E", "N", "D", "x"]), ("a".to_string(), true));
        assert_eq!(run(&["one\n", "\ntwo"]), ("one".to_string(), true));
        assert_eq!(run(&["EEN", "DEND"]), ("E".to_string(), true));
        assert_eq!(run(&["ü\n", "é", "EN"]), ("ü\néEN".to_string(), false));
    }

    #[test]
    fn what_may_begin_a_stop_text_waits() {
        let mut text = StopText::new(&["stop".to_string()]);
        assert_eq!(text.push("a st"), ("a ".to_string(), false));
        assert_eq!(text.push("a"), ("sta".to_string(), false));
    }
}
