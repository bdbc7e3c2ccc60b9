//! What a comparison came to: scores of every question, means with intervals, differences between arms.

use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::arms::{Answered, Arm};
use super::form::Form;
use super::metrics;
use super::questions::Question;
use super::recommend::Recommendation;
use super::stats::{self, Interval};
use super::Costs;
use crate::retrieve::index::Passage;

/// How a reply was judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The answer part is the answer.
    pub exact_match: f64,
    /// Words that the answer part shares with it.
    pub f1: f64,
    /// The answer stands in the reply.
    pub answer_present: f64,
    /// The reply has the form that was asked for; none where none was.
    pub form: Option<f64>,
    /// The form's other fields are right; none where it has none.
    pub fields: Option<f64>,
    /// Exact match, in the form, its fields right.
    pub strict: f64,
    /// Mean -log p of the expected answer's tokens.
    pub answer_nll: f64,
    /// The same of the whole expected reply.
    pub reply_nll: f64,
}

/// A number of [`Score`]: its key, its name for people, its value.
pub struct Metric {
    /// Its key in JSON.
    pub key: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
    /// Its value; none where it does not apply.
    pub of: fn(&Score) -> Option<f64>,
}

/// Every number of a score.
pub const METRICS: [Metric; 8] = [
    Metric {
        key: "strict",
        name: "right and in form",
        about: "the answer exactly, in the form asked for, its fields right",
        of: |s| Some(s.strict),
    },
    Metric {
        key: "exact_match",
        name: "exact match",
        about: "the answer part is the answer, as SQuAD compares",
        of: |s| Some(s.exact_match),
    },
    Metric { key: "f1", name: "token F1", about: "words shared with the answer", of: |s| Some(s.f1) },
    Metric {
        key: "answer_present",
        name: "answer present",
        about: "the answer stands somewhere in the reply, whatever its form",
        of: |s| Some(s.answer_present),
    },
    Metric { key: "form", name: "form", about: "the reply has the form asked for", of: |s| s.form },
    Metric { key: "fields", name: "fields right", about: "the form's other fields are right", of: |s| s.fields },
    Metric {
        key: "answer_nll",
        name: "answer loss",
        about: "nats a token of the expected answer",
        of: |s| Some(s.answer_nll),
    },
    Metric {
        key: "reply_nll",
        name: "reply loss",
        about: "nats a token of the whole expected reply",
        of: |s| Some(s.reply_nll),
    },
];

/// The metrics that pairs of arms are tested on.
pub const TESTED: [&str; 3] = ["strict", "answer_present", "form"];

/// Means over some questions.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// How many questions.
    pub n: usize,
    /// By the order of [`METRICS`]; none where it does not apply.
    pub metrics: Vec<Option<Interval>>,
}

impl Summary {
    /// A metric by its key.
    pub fn get(&self, key: &str) -> Option<Interval> {
        let at = METRICS.iter().position(|metric| metric.key == key)?;
        self.metrics.get(at).copied().flatten()
    }

    /// Its mean, 0 where it does not apply.
    pub fn mean(&self, key: &str) -> f64 {
        self.get(key).map_or(0.0, |interval| interval.mean)
    }
}

/// An arm.
#[derive(Clone, Debug)]
pub struct ArmOutcome {
    /// Which.
    pub arm: Arm,
    /// What its prompt shows.
    pub style: Style,
    /// Its answers, one a question.
    pub answers: Vec<Answered>,
    /// How they were judged.
    pub scores: Vec<Score>,
    /// All questions.
    pub all: Summary,
    /// By kind, as in [`Outcome::kinds`].
    pub kinds: Vec<Summary>,
    /// The most memory resident while it answered, in bytes.
    pub peak_bytes: Option<u64>,
    /// Mean seconds to retrieve for a question; 0 where it does not.
    pub retrieve_s: f64,
}

impl ArmOutcome {
    fn mean(&self, of: impl Fn(&Answered) -> f64) -> f64 {
        self.answers.iter().map(of).sum::<f64>() / self.answers.len().max(1) as f64
    }

    /// Mean tokens of a prompt.
    pub fn prompt_tokens(&self) -> f64 {
        self.mean(|a| a.prompt_tokens as f64)
    }

    /// New tokens a second.
    pub fn tokens_per_s(&self) -> f64 {
        self.mean(|a| a.tokens as f64) / self.mean(|a| a.reply_s).max(1e-9)
    }

    /// Mean seconds a question takes, retrieval included.
    pub fn seconds(&self) -> f64 {
        self.retrieve_s + self.mean(|a| a.prompt_s + a.reply_s)
    }
}

/// A difference between two arms on the same questions.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The first.
    pub a: Arm,
    /// The second.
    pub b: Arm,
    /// Which metric.
    pub metric: &'static str,
    /// Mean of b - a.
    pub difference: Interval,
    /// Two-sided permutation test.
    pub p: f64,
    /// Holm-corrected over every pair and metric shown.
    pub p_holm: f64,
}

/// Change on a text that has nothing to do with the task.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Forgetting {
    /// Which text.
    pub text: String,
    /// Its tokens that are predicted.
    pub tokens: usize,
    /// Loss of the base, nats a token.
    pub base_nll: f64,
    /// Loss with the adapter.
    pub lora_nll: f64,
    /// The second less the first, with the interval over stretches of the text.
    pub delta: Interval,
}

/// How often retrieval brings what is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct HitRate {
    /// Questions that retrieve.
    pub n: usize,
    /// Passages for each.
    pub k: usize,
    /// Share whose first passage holds the answer.
    pub at_1: f64,
    /// Share of which some passage does.
    pub at_k: f64,
}

/// What a prompt shows beside the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Style {
    /// Examples.
    pub shots: usize,
    /// Passages with the question, and with each example; 0 for arms that retrieve none.
    pub passages: usize,
}

impl Style {
    /// An arm that shows it, for people.
    pub fn name(self, arm: Arm) -> String {
        let passages = match self.passages {
            0 => String::new(),
            1 => ", 1 passage".into(),
            n => format!(", {n} passages"),
        };
        let examples = match self.shots {
            0 => "no examples".into(),
            n => format!("{n} examples"),
        };
        format!("{}{passages}, {examples}", arm.name())
    }
}

/// A prompt that was tried on development questions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Variant {
    /// Base or rag.
    pub arm: Arm,
    /// What it shows.
    #[serde(flatten)]
    pub style: Style,
    /// Mean F1 of the answer part.
    pub f1: f64,
    /// Right and in form.
    pub strict: f64,
    /// Answer present.
    pub present: f64,
    /// It was taken.
    pub chosen: bool,
}

/// Everything.
pub struct Outcome {
    /// The questions.
    pub questions: Vec<Question>,
    /// Passages found for each; empty where none were asked for.
    pub passages: Vec<Vec<Passage>>,
    /// Kinds of questions; one without a name where they have none.
    pub kinds: Vec<String>,
    /// The arms, in the order of [`Arm::ALL`].
    pub arms: Vec<ArmOutcome>,
    /// Differences between them.
    pub pairs: Vec<Pair>,
    /// Prompts tried on development questions.
    pub variants: Vec<Variant>,
    /// How many development questions there were.
    pub dev: usize,
    /// Retrieval.
    pub hits: HitRate,
    /// The unrelated text.
    pub forgetting: Forgetting,
    /// The limit it was given.
    pub max_forgetting: Option<f64>,
    /// Times and sizes.
    pub costs: Costs,
    /// Loss of each training step.
    pub losses: Vec<f64>,
    /// What is to be known before anything is believed.
    pub warnings: Vec<String>,
    /// What follows.
    pub recommendation: Recommendation,
    /// Where all of it comes from: names and values, in order.
    pub provenance: Vec<(String, String)>,
}

/// Judges an arm's answers.
pub fn scores(questions: &[Question], answers: &[Answered], form: &Form) -> Vec<Score> {
    let score = |(question, answered): (&Question, &Answered)| {
        let read = form.read(&answered.reply, question);
        let wanted = question.answers();
        let exact_match = metrics::exact_match(&read.answer, &wanted);
        let right = read.form && read.fields != Some(false);
        Score {
            exact_match,
            f1: metrics::f1(&read.answer, &wanted),
            answer_present: metrics::present(&answered.reply, &wanted),
            form: form.asked(question).then_some(f64::from(read.form)),
            fields: read.fields.map(f64::from),
            strict: exact_match * f64::from(right),
            answer_nll: answered.answer_nll,
            reply_nll: answered.reply_nll,
        }
    };
    questions.iter().zip(answers).map(score).collect()
}

/// Each question's group as a number: its own where it names none.
pub fn groups(questions: &[Question]) -> Vec<usize> {
    let mut names = std::collections::HashMap::new();
    let number = |(i, question): (usize, &Question)| match &question.group {
        Some(name) => *names.entry(name.clone()).or_insert(i),
        None => i,
    };
    questions.iter().enumerate().map(number).collect()
}

/// Means of the scores for which `among` holds.
pub fn summary(scores: &[Score], groups: &[usize], among: impl Fn(usize) -> bool, seed: u64) -> Summary {
    let rows: Vec<usize> = (0..scores.len()).filter(|&i| among(i)).collect();
    let metrics = METRICS.iter().map(|metric| {
        let found = rows.iter().filter_map(|&i| Some(((metric.of)(&scores[i])?, groups[i])));
        let (values, groups): (Vec<f64>, Vec<usize>) = found.unzip();
        (!values.is_empty()).then(|| stats::bootstrap(&values, &groups, seed))
    });
    Summary { n: rows.len(), metrics: metrics.collect() }
}

/// Tests every pair of arms on the metrics of [`TESTED`] that apply.
pub fn pairs(arms: &[ArmOutcome], groups: &[usize], seed: u64) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for metric in METRICS.iter().filter(|metric| TESTED.contains(&metric.key)) {
        for (i, a) in arms.iter().enumerate() {
            for b in &arms[i + 1..] {
                let both = a.scores.iter().zip(&b.scores).zip(groups);
                let found = both.filter_map(|((a, b), &group)| Some(((metric.of)(b)? - (metric.of)(a)?, group)));
                let (differences, groups): (Vec<f64>, Vec<usize>) = found.unzip();
                if differences.is_empty() {
                    continue;
                }
                pairs.push(Pair {
                    a: a.arm,
                    b: b.arm,
                    metric: metric.key,
                    difference: stats::bootstrap(&differences, &groups, seed),
                    p: stats::permutation(&differences, &groups, seed),
                    p_holm: 1.0,
                });
            }
        }
    }
    let adjusted = stats::holm(&pairs.iter().map(|pair| pair.p).collect::<Vec<_>>());
    pairs.iter_mut().zip(adjusted).for_each(|(pair, p)| pair.p_holm = p);
    pairs
}

impl Outcome {
    /// An arm.
    pub fn arm(&self, arm: Arm) -> &ArmOutcome {
        &self.arms[arm as usize]
    }

    /// The difference of two arms on a metric: b - a.
    pub fn pair(&self, a: Arm, b: Arm, metric: &str) -> Option<&Pair> {
        self.pairs.iter().find(|pair| pair.a == a && pair.b == b && pair.metric == metric)
    }

    /// True where some question asks for a form.
    pub fn has_form(&self) -> bool {
        self.arms[0].all.get("form").is_some()
    }

    /// The adapter keeps within the limit on forgetting, or there is none.
    pub fn kept(&self) -> bool {
        self.max_forgetting.is_none_or(|limit| self.forgetting.delta.mean <= limit)
    }

    /// The object that `--json` prints.
    pub fn json(&self) -> Value {
        let interval = |i: Interval| json!({ "mean": i.mean, "low": i.low, "high": i.high });
        let summary = |summary: &Summary| {
            let mut object = Map::new();
            object.insert("n".into(), summary.n.into());
            for (metric, value) in METRICS.iter().zip(&summary.metrics) {
                object.insert(metric.key.into(), value.map_or(Value::Null, interval));
            }
            Value::Object(object)
        };
        let mut arms = Map::new();
        for arm in &self.arms {
            let mut object = Map::new();
            for (metric, value) in METRICS.iter().zip(&arm.all.metrics) {
                object.insert(metric.key.into(), value.map_or(Value::Null, |value| value.mean.into()));
            }
            let kinds = self.kinds.iter().zip(&arm.kinds).map(|(kind, s)| (kind.clone(), summary(s)));
            let more = json!({
                "tokens_per_s": arm.tokens_per_s(),
                "prompt_tokens": arm.prompt_tokens(),
                "peak_bytes": arm.peak_bytes,
                "seconds_per_question": arm.seconds(),
                "retrieve_s": arm.retrieve_s,
                "shots": arm.style.shots,
                "passages": arm.style.passages,
                "intervals": summary(&arm.all),
                "kinds": kinds.collect::<Map<_, _>>(),
            });
            object.extend(more.as_object().cloned().unwrap_or_default());
            arms.insert(arm.arm.key().into(), Value::Object(object));
        }
        let pairs = self.pairs.iter().map(|pair| {
            json!({ "a": pair.a.key(), "b": pair.b.key(), "metric": pair.metric, "difference": pair.difference.mean,
                "low": pair.difference.low, "high": pair.difference.high, "p": pair.p, "p_holm": pair.p_holm })
        });
        let f = &self.forgetting;
        json!({
            "recommendation": self.recommendation.sentence,
            "choice": self.recommendation.choice.map(Arm::key),
            "reasons": self.recommendation.reasons,
            "would_change": self.recommendation.would_change,
            "warnings": self.warnings,
            "questions": self.questions.len(),
            "arms": arms,
            "pairs": pairs.collect::<Vec<_>>(),
            "retrieval": { "n": self.hits.n, "k": self.hits.k, "hit_at_1": self.hits.at_1, "hit_at_k": self.hits.at_k },
            "variants": self.variants,
            "forgetting": { "text": f.text, "base_nll": f.base_nll, "lora_nll": f.lora_nll, "delta": f.delta.mean,
                "low": f.delta.low, "high": f.delta.high, "tokens": f.tokens, "limit": self.max_forgetting,
                "kept": self.kept() },
            "train_s": self.costs.train_s,
            "index_s": self.costs.index_s,
            "costs": self.costs,
            "losses": self.losses,
            "provenance": self.provenance.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect::<Map<_, _>>(),
        })
    }
}
