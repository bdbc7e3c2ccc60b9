//! What is to be known before the figures are believed, and where they come from.

use std::collections::{HashMap, HashSet};

use super::inputs::Inputs;
use super::metrics;
use super::outcome::{ArmOutcome, Forgetting, HitRate, Pair};
use super::questions::TrainRow;
use super::recommend::{percent, FEW, LEVEL};
use super::training::Trained;
use super::work::Retrieved;
use super::Config;
use crate::device::Device;

/// Below so many questions intervals are wide.
const MANY: usize = 100;

/// Warnings in order of weight, and how many questions are asked in the training rows too.
#[allow(clippy::too_many_arguments)] // each is a different thing to look at
pub(super) fn warnings(
    config: &Config,
    inputs: &Inputs,
    retrieved: &Retrieved,
    arms: &[ArmOutcome],
    pairs: &[Pair],
    hits: &HitRate,
    forgetting: &Forgetting,
    trained: &Trained,
) -> (Vec<String>, usize) {
    let mut said = Vec::new();
    let questions = &inputs.questions;
    let n = questions.len();
    let train: Vec<_> = (inputs.train.iter())
        .filter_map(|row| match row {
            TrainRow::Asked(question) => Some(&**question),
            TrainRow::Plain(_) => None,
        })
        .collect();
    // Rows made of messages hold the instruction too: the question may be a part of what is asked.
    let asked: HashSet<String> = train.iter().map(|row| metrics::normal(&row.question)).collect();
    let leaked = questions.iter().filter(|q| asked.contains(&metrics::normal(&q.question))).count();
    if leaked > 0 {
        said.push(format!(
            "{leaked} of {n} questions are asked in the training rows too, so the adapter may know them by heart: take \
             them out of either file."
        ));
    }
    let known: HashSet<String> = train.iter().map(|row| metrics::normal(&row.answer)).collect();
    let shared = questions.iter().filter(|q| known.contains(&metrics::normal(&q.answer))).count();
    if 2 * shared > n {
        said.push(format!(
            "The answers of {shared} of {n} questions are answers of training rows too: the adapter can guess among \
             them."
        ));
    }
    let verbatim = questions.iter().zip(&retrieved.questions).filter(|(question, passages)| {
        let asked = metrics::normal(&question.question);
        passages.iter().any(|passage| metrics::normal(&passage.text).contains(&asked))
    });
    let verbatim = verbatim.count();
    if verbatim > 0 {
        said.push(format!(
            "{verbatim} of {n} questions stand word for word in the documents: finding them is easier than it will be."
        ));
    }
    if n < FEW {
        said.push(format!("{n} questions are too few: every interval below is wide, and no advice is given."));
    } else if n < MANY {
        said.push(format!("{n} questions are few: differences under some {:.0} points do not show.", spread(n)));
    }
    let mut seen: HashMap<String, usize> = HashMap::new();
    questions.iter().for_each(|q| *seen.entry(metrics::normal(&q.question)).or_default() += 1);
    let again: usize = seen.values().map(|count| count - 1).sum();
    if again > 0 {
        said.push(format!("{again} questions are asked more than once, so that they count more than once."));
    }
    let strict: Vec<&Pair> = pairs.iter().filter(|pair| pair.metric == "strict").collect();
    if n >= FEW && !strict.is_empty() && strict.iter().all(|pair| pair.p_holm >= LEVEL) {
        said.push("In what is right and in form no two arms differ by more than chance would explain.".into());
    }
    if hits.n > 0 && hits.at_k < 0.5 {
        said.push(format!(
            "The {} passages found hold the answer for {} of the questions only: documents, passages or embedder do not \
             fit the questions.",
            hits.k,
            percent(hits.at_k)
        ));
    }
    for arm in arms {
        let cut = arm.answers.iter().filter(|answered| !answered.ended).count();
        if 5 * cut > n {
            said.push(format!(
                "{} of {n} replies of {} were cut at {} tokens (--max-tokens).",
                cut,
                arm.arm.name(),
                config.max_tokens
            ));
        }
    }
    if train.is_empty() {
        said.push("No training row is a question, so no passage was put to any: the adapter never met one.".into());
    }
    if inputs.shots.is_empty() || inputs.dev.is_empty() {
        said.push("There was nothing to choose prompts on: base and RAG were asked without examples.".into());
    } else if inputs.dev.len() < 10 {
        said.push(format!("Prompts were chosen on {} questions only.", inputs.dev.len()));
    }
    if trained.truncated > 0 {
        said.push(format!("{} training rows were cut to {} tokens.", trained.truncated, config.recipe.max_len));
    }
    let (first, last) = ends(&trained.losses);
    if last > first {
        said.push(format!("The training loss rose from {first:.3} to {last:.3}: lower the learning rate (--lr)."));
    }
    said.extend(retrieved.built.skipped.iter().map(|line| line.replacen("left", "Documents left", 1)));
    if retrieved.built.partly {
        said.push("The index was there but for some documents: the time of indexing is that of those alone.".into());
    }
    if let Some(limit) = config.max_forgetting.filter(|limit| forgetting.delta.mean > *limit) {
        said.push(format!(
            "The loss on the unrelated text rose by {:.3} nats a token; {limit} are allowed (--max-forgetting).",
            forgetting.delta.mean
        ));
    }
    (said, leaked)
}

/// Percentage points that a difference of two shares near one half needs, on n questions: 1.96·sqrt(2·0.25/n).
fn spread(n: usize) -> f64 {
    100.0 * 1.96 * (0.5 / n as f64).sqrt()
}

/// Mean losses of the first and the last tenth of the steps.
fn ends(losses: &[f64]) -> (f64, f64) {
    let count = losses.len().div_ceil(10);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    (mean(&losses[..count]), mean(&losses[losses.len() - count..]))
}

/// Names and values, for the page's foot and for `compare.json`.
pub(super) fn provenance(
    config: &Config,
    inputs: &Inputs,
    device: &dyn Device,
    trained: &Trained,
) -> Vec<(String, String)> {
    let hash = |name: &str| inputs.hashes[name].as_str().map_or(String::new(), |hash| hash.chars().take(16).collect());
    let file = |path: &std::path::Path, name: &str| {
        let file = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        format!("{file}, SHA-256 {}", hash(name))
    };
    let recipe = &config.recipe;
    let passages = match config.separate {
        true => "two adapters: on bare rows for LoRA, on rows with passages for LoRA + RAG".to_string(),
        false => format!("one adapter for both arms, passages in {} of its rows", percent(config.context_share)),
    };
    let docs: Vec<String> = config.docs.iter().map(|path| path.display().to_string()).collect();
    let mut rows = vec![
        ("model", file(&config.model, "model")),
        ("embedder", file(&config.embed_model, "embed_model")),
        ("training rows", file(&config.train, "train")),
        ("documents", format!("{}, SHA-256 {}", docs.join(", "), hash("docs"))),
        ("questions", file(&config.questions, "questions")),
    ];
    if let Some(dev) = &config.dev {
        rows.push(("development questions", file(dev, "dev")));
    }
    rows.extend([
        (
            "training",
            format!(
                "{} steps of {} rows, rank {}, alpha {}, learning rate {} ({}, warm-up {}), {passages}",
                recipe.steps,
                recipe.rows,
                recipe.r,
                recipe.alpha,
                recipe.lr,
                recipe.schedule.name(),
                recipe.warmup
            ),
        ),
        ("adapter", format!("SHA-256 {}", trained.sha256.chars().take(16).collect::<String>())),
        ("weights", config.quant.map_or("as they are".into(), |format| format!("quantized to {}", format.name()))),
        ("device", format!("{}: {}", device.id(), device.description())),
        ("seed", config.seed.to_string()),
        ("handmill", env!("CARGO_PKG_VERSION").to_string()),
    ]);
    rows.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}
