//! What follows from the figures, in plain sentences, and never more than that.
//!
//! ```text
//! fewer than 30 questions         nothing is recommended
//! no arm better than the base     the base, or more questions    (strict, Holm-corrected p < 0.05)
//! else                            the simplest arm that is better than the base and not worse than the best
//! ```
//!
//! Simplest first: base, retrieval, adapter, both. An adapter beyond the limit on forgetting is not recommended.

use super::arms::Arm;
use super::outcome::{ArmOutcome, Forgetting, HitRate, Pair};
use super::Costs;

/// Below so many questions nothing is recommended.
pub const FEW: usize = 30;
/// Differences with a corrected p-value below this are believed.
pub const LEVEL: f64 = 0.05;

/// What is advised, and why.
#[derive(Clone, Debug, Default)]
pub struct Recommendation {
    /// The arm; none where the questions do not tell.
    pub choice: Option<Arm>,
    /// The advice in a few words.
    pub headline: String,
    /// The advice in a sentence or two.
    pub sentence: String,
    /// The figures it rests on.
    pub reasons: Vec<String>,
    /// What would change it.
    pub would_change: Vec<String>,
}

/// What it is made from.
pub struct Facts<'a> {
    /// The arms, in the order of [`Arm::ALL`].
    pub arms: &'a [ArmOutcome],
    /// Differences between them.
    pub pairs: &'a [Pair],
    /// Retrieval.
    pub hits: HitRate,
    /// The unrelated text.
    pub forgetting: &'a Forgetting,
    /// The adapter keeps within the limit on forgetting.
    pub kept: bool,
    /// Times and sizes.
    pub costs: &'a Costs,
    /// Questions that are also asked in the training rows.
    pub leaked: usize,
}

/// A share in percent; the number and its sign stay on one line.
pub fn percent(share: f64) -> String {
    format!("{:.0}\u{a0}%", 100.0 * share)
}

/// A difference of shares in percentage points, with its sign and interval.
fn points(pair: &Pair) -> String {
    let signed = |x: f64| format!("{}{:.0}", if x < 0.0 { "−" } else { "+" }, (100.0 * x).abs());
    let d = pair.difference;
    let p = if pair.p_holm < 0.001 { "p < 0.001".into() } else { format!("p = {:.3}", pair.p_holm) };
    format!("{} points [{}, {}], {p}", signed(d.mean), signed(d.low), signed(d.high))
}

/// Seconds in the unit a person reads.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 0.9995 => format!("{:.0} ms", 1e3 * s),
        s if s < 59.95 => format!("{s:.1} s"),
        s if s < 3599.5 => format!("{} min {:02} s", s.round() as u64 / 60, s.round() as u64 % 60),
        s => format!("{:.1} h", s / 3600.0),
    }
}

impl Facts<'_> {
    fn mean(&self, arm: Arm, metric: &str) -> f64 {
        self.arms[arm as usize].all.mean(metric)
    }

    fn pair(&self, a: Arm, b: Arm, metric: &str) -> Option<&Pair> {
        self.pairs.iter().find(|pair| pair.a == a && pair.b == b && pair.metric == metric)
    }

    /// 1 where b is better than a, -1 where it is worse, 0 where that cannot be told.
    fn better(&self, a: Arm, b: Arm, metric: &str) -> i32 {
        let Some((pair, sign)) =
            self.pair(a, b, metric).map(|p| (p, 1)).or_else(|| self.pair(b, a, metric).map(|p| (p, -1)))
        else {
            return 0;
        };
        match pair.difference.mean {
            _ if pair.p_holm >= LEVEL => 0,
            d if d > 0.0 => sign,
            d if d < 0.0 => -sign,
            _ => 0,
        }
    }

    /// The recommendation.
    pub fn recommend(&self) -> Recommendation {
        let n = self.arms[0].all.n;
        let strict = |arm: Arm| self.mean(arm, "strict");
        let allowed = |arm: &Arm| self.kept || !arm.adapted();
        let best =
            (Arm::ALL.into_iter().filter(allowed)).fold(
                Arm::Base,
                |best, arm| {
                    if strict(arm) > strict(best) {
                        arm
                    } else {
                        best
                    }
                },
            );
        let simplest = [Arm::Rag, Arm::Lora, Arm::LoraRag].into_iter().filter(allowed).find(|&arm| {
            self.better(Arm::Base, arm, "strict") > 0 && (arm == best || self.better(best, arm, "strict") == 0)
        });
        let (choice, headline, mut sentence) = match simplest {
            _ if n < FEW => {
                let sentence = format!(
                    "{n} questions are too few to recommend anything: give at least {FEW}, better 100 or more."
                );
                (None, "Too few questions to tell".to_string(), sentence)
            }
            None => {
                let shown = percent(strict(best));
                let sentence = format!(
                    "On these {n} questions nothing is measurably better than the base ({} right; at best {shown}): \
                     keep it, or change data, documents or steps and measure again.",
                    percent(strict(Arm::Base))
                );
                (Some(Arm::Base), "Nothing measurably better than the base".to_string(), sentence)
            }
            Some(arm) => {
                let headline = match arm {
                    Arm::Lora => "Fine-tune",
                    Arm::Rag => "Retrieve",
                    _ => "Both: fine-tune and retrieve",
                };
                let mut sentence = format!(
                    "{} is right in {} of {n} questions, the base in {}.",
                    arm.name(),
                    percent(strict(arm)),
                    percent(strict(Arm::Base))
                );
                if arm != best {
                    sentence += &format!(
                        " {} scored {}, but that difference may be chance, and {} is simpler.",
                        best.name(),
                        percent(strict(best)),
                        arm.name()
                    );
                }
                (Some(arm), headline.to_string(), sentence)
            }
        };
        if !self.kept {
            sentence += " The adapter is beyond the limit on forgetting, so no arm with it is recommended.";
        }
        if self.leaked > 0 {
            sentence += &format!(
                " {} of the questions are asked in the training rows too: what the adapter knows of them is no \
                 evidence.",
                self.leaked
            );
        }
        let (reasons, would_change) = (self.reasons(), self.would_change(choice));
        Recommendation { choice, headline, sentence, reasons, would_change }
    }

    fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        let shown = |arm, metric| percent(self.mean(arm, metric));
        if let Some(pair) = self.pair(Arm::Base, Arm::Rag, "answer_present") {
            let what = match self.better(Arm::Base, Arm::Rag, "answer_present") {
                1 => "Retrieval adds knowledge",
                -1 => "Retrieval costs knowledge",
                _ => "Retrieval adds no knowledge that can be told from chance",
            };
            reasons.push(format!(
                "{what}: the answer stands in {} of RAG's replies and {} of the base's ({}).",
                shown(Arm::Rag, "answer_present"),
                shown(Arm::Base, "answer_present"),
                points(pair)
            ));
        }
        if let Some(pair) = self.pair(Arm::Base, Arm::Lora, "answer_present") {
            let what = match self.better(Arm::Base, Arm::Lora, "answer_present") {
                1 => "The adapter adds knowledge",
                -1 => "The adapter costs knowledge",
                _ => "The adapter alone adds no knowledge that can be told from chance",
            };
            reasons.push(format!("{what}: {} ({}).", shown(Arm::Lora, "answer_present"), points(pair)));
        }
        if let Some(pair) = self.pair(Arm::Base, Arm::Lora, "form") {
            let what = match self.better(Arm::Base, Arm::Lora, "form") {
                1 => "The adapter teaches the form",
                -1 => "The adapter costs the form",
                _ => "The adapter changes nothing about the form that can be told from chance",
            };
            reasons.push(format!(
                "{what}: {} of its replies have it, {} of the base's, {} of RAG's ({}).",
                shown(Arm::Lora, "form"),
                shown(Arm::Base, "form"),
                shown(Arm::Rag, "form"),
                points(pair)
            ));
        }
        let single = if self.mean(Arm::Rag, "strict") >= self.mean(Arm::Lora, "strict") { Arm::Rag } else { Arm::Lora };
        if let Some(pair) = self.pair(single, Arm::LoraRag, "strict") {
            let what = match self.better(single, Arm::LoraRag, "strict") {
                1 => "Both together beat either",
                -1 => "Both together do worse than one",
                _ => "Both together cannot be told from the better one",
            };
            reasons.push(format!(
                "{what}: {} right, {} alone {} ({}).",
                shown(Arm::LoraRag, "strict"),
                single.name(),
                shown(single, "strict"),
                points(pair)
            ));
        }
        if self.hits.n > 0 {
            reasons.push(format!(
                "Some of the {} passages found holds the answer for {} of the questions (the first one for {}): no arm \
                 that retrieves can be expected to go far beyond that.",
                self.hits.k,
                percent(self.hits.at_k),
                percent(self.hits.at_1)
            ));
        }
        let f = self.forgetting;
        let what = match f.delta {
            d if d.low > 0.0 => "The adapter forgets a little elsewhere",
            d if d.high < 0.0 => "The adapter forgets nothing elsewhere",
            _ => "The adapter changes nothing elsewhere that can be told from chance",
        };
        reasons.push(format!(
            "{what}: loss on an unrelated text goes from {:.3} to {:.3} nats a token ({:+.3} [{:+.3}, {:+.3}]).",
            f.base_nll, f.lora_nll, f.delta.mean, f.delta.low, f.delta.high
        ));
        reasons
    }

    fn would_change(&self, choice: Option<Arm>) -> Vec<String> {
        let seconds = |arm: Arm| duration(self.arms[arm as usize].seconds());
        let tokens = |arm: Arm| self.arms[arm as usize].prompt_tokens();
        let mut list = vec![format!(
            "Facts that change often speak for retrieval: all documents were indexed in {}, and one that changes is \
             indexed alone; the adapter took {} and is trained again.",
            duration(self.costs.index_s),
            duration(self.costs.train_s)
        )];
        if self.arms[0].all.get("form").is_some() {
            list.push(format!(
                "If the form does not matter, count \"answer present\": base {}, LoRA {}, RAG {}, both {}.",
                percent(self.mean(Arm::Base, "answer_present")),
                percent(self.mean(Arm::Lora, "answer_present")),
                percent(self.mean(Arm::Rag, "answer_present")),
                percent(self.mean(Arm::LoraRag, "answer_present"))
            ));
        }
        if choice != Some(Arm::Base) {
            list.push(format!(
                "Where each answer must be quick: {} a question with passages ({:.0} tokens of prompt), {} without \
                 ({:.0}).",
                seconds(Arm::LoraRag),
                tokens(Arm::LoraRag),
                seconds(Arm::Lora),
                tokens(Arm::Lora)
            ));
        }
        list.push(
            "Not measured: other models, other seeds of the training, other documents, and people's judgement.".into(),
        );
        list
    }
}

#[cfg(test)]
mod tests {
    use super::super::outcome::{pairs, summary, Score, Style};
    use super::super::stats::Interval;
    use super::*;

    /// Four arms of which the first `right[i]` of n answers are right and in form.
    fn arms(n: usize, right: [usize; 4]) -> Vec<ArmOutcome> {
        let score = |right: bool| Score {
            exact_match: f64::from(right),
            f1: f64::from(right),
            answer_present: f64::from(right),
            form: Some(f64::from(right)),
            fields: None,
            strict: f64::from(right),
            answer_nll: 1.0,
            reply_nll: 1.0,
        };
        let groups: Vec<usize> = (0..n).collect();
        let arm = |(arm, right): (Arm, usize)| {
            let scores: Vec<Score> = (0..n).map(|i| score(i < right)).collect();
            let all = summary(&scores, &groups, |_| true, 1);
            let kinds = vec![all.clone()];
            let style = Style { shots: 0, passages: 0 };
            ArmOutcome { arm, style, answers: vec![], scores, all, kinds, peak_bytes: None, retrieve_s: 0.0 }
        };
        Arm::ALL.into_iter().zip(right).map(arm).collect()
    }

    fn advice(n: usize, right: [usize; 4], kept: bool, leaked: usize) -> Recommendation {
        let arms = arms(n, right);
        let groups: Vec<usize> = (0..n).collect();
        let pairs = pairs(&arms, &groups, 1);
        let delta = Interval { mean: 0.02, low: 0.01, high: 0.03 };
        let forgetting = Forgetting { text: "bundled".into(), tokens: 900, base_nll: 3.0, lora_nll: 3.02, delta };
        let (hits, costs) = (HitRate { n, k: 3, at_1: 0.8, at_k: 0.9 }, Costs::default());
        Facts { arms: &arms, pairs: &pairs, hits, forgetting: &forgetting, kept, costs: &costs, leaked }.recommend()
    }

    #[test]
    fn the_simplest_arm_that_is_not_worse_than_the_best_is_taken() {
        // base, LoRA, RAG, both
        assert_eq!(advice(100, [2, 5, 10, 85], true, 0).choice, Some(Arm::LoraRag));
        assert_eq!(advice(100, [2, 5, 84, 85], true, 0).choice, Some(Arm::Rag));
        assert_eq!(advice(100, [2, 85, 20, 86], true, 0).choice, Some(Arm::Lora));
        let both = advice(100, [2, 5, 84, 85], true, 0);
        assert!(both.sentence.contains("may be chance"), "{}", both.sentence);
    }

    #[test]
    fn nothing_is_claimed_that_was_not_measured() {
        let few = advice(20, [0, 0, 0, 20], true, 0);
        assert_eq!(few.choice, None);
        assert!(few.sentence.contains("too few"), "{}", few.sentence);
        let same = advice(100, [50, 51, 52, 51], true, 0);
        assert_eq!(same.choice, Some(Arm::Base));
        assert!(same.sentence.contains("nothing is measurably better"), "{}", same.sentence);
        assert!(same.reasons.iter().any(|reason| reason.contains("cannot be told")), "{:?}", same.reasons);
        let leaked = advice(100, [2, 5, 10, 85], true, 7);
        assert!(leaked.sentence.contains("7 of the questions are asked in the training rows"), "{}", leaked.sentence);
    }

    #[test]
    fn an_adapter_beyond_the_gate_is_not_recommended() {
        let closed = advice(100, [2, 90, 60, 95], false, 0);
        assert_eq!(closed.choice, Some(Arm::Rag));
        assert!(closed.sentence.contains("limit on forgetting"), "{}", closed.sentence);
        assert_eq!(advice(100, [2, 90, 3, 95], false, 0).choice, Some(Arm::Base));
    }

    #[test]
    fn durations_are_in_the_unit_a_person_reads() {
        let said = [0.0123, 0.9999, 59.96, 61.0, 3600.0].map(duration);
        assert_eq!(said, ["12 ms", "1.0 s", "1 min 00 s", "1 min 01 s", "1.0 h"]);
    }
}
