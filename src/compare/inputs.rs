//! What a comparison is made from: every file read and checked before any work.

use std::fs;

use rand::seq::SliceRandom;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{json, Value};

use super::form::Form;
use super::questions::{self, Question, TrainRow};
use super::{mix, retrieval, stages, Config, Halt, RETENTION};
use crate::error::Error;
use crate::model::adapter::{self, hex, sha256};
use crate::model::checkpoint::Checkpoint;

/// Training rows of ten that are kept from training at most, for development questions.
const DEV_TENTHS: usize = 2;

/// What was read and checked before any work.
pub(super) struct Inputs {
    pub questions: Vec<Question>,
    pub train: Vec<TrainRow>,
    pub dev: Vec<Question>,
    /// Places in `train` of the examples of the few-shot prompt.
    pub shots: Vec<usize>,
    /// Places in `train`, in the order in which they are trained on.
    pub order: Vec<usize>,
    pub form: Form,
    pub retention: String,
    /// Hashes of the files.
    pub hashes: Value,
}

/// Reads and checks every file.
pub(super) fn prepare(config: &Config) -> Result<Inputs, Halt> {
    let form = Form::new(config.format.as_deref(), config.format_regex.as_deref())?;
    let all = questions::read_questions(&config.questions)?;
    let mut train = questions::read_train(&config.train)?;
    let questions = draw(all, config.limit, config.seed);
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    rng.set_stream(2);
    let dev = match &config.dev {
        Some(path) => draw(questions::read_questions(path)?, Some(config.dev_questions), config.seed),
        None => cut(&mut train, config.dev_questions, &mut rng),
    };
    for (path, rows) in [(&config.questions, &questions), (config.dev.as_ref().unwrap_or(&config.train), &dev)] {
        for row in rows {
            form.expected(row).map_err(|what| Error::file(path, format!("#{} {what}", row.line)))?;
        }
    }
    for row in &train {
        if let TrainRow::Asked(row) = row {
            form.expected(row).map_err(|what| Error::file(&config.train, format!("#{} {what}", row.line)))?;
        }
    }
    let asked = |row: &TrainRow| matches!(row, TrainRow::Asked(question) if question.context.is_empty());
    let mut shots: Vec<usize> = (0..train.len()).filter(|&i| asked(&train[i])).collect();
    shots.shuffle(&mut rng);
    shots.truncate(if dev.is_empty() { 0 } else { config.shots });
    let order = mix::order(train.len(), config.recipe.steps * config.recipe.rows, config.seed);
    let retention = match &config.retention {
        None => RETENTION.to_string(),
        Some(path) => {
            let text = fs::read(path).map_err(|cause| Error::io(path, cause))?;
            String::from_utf8(text).map_err(|_| Error::file(path, "is not UTF-8: convert it, such as with iconv"))?
        }
    };
    let docs = retrieval::fingerprint(config)?;
    let hashes = json!({
        "model": adapter::model_sha256(&Checkpoint::open(&config.model)?)?,
        "embed_model": adapter::model_sha256(&Checkpoint::open(&config.embed_model)?)?,
        "train": stages::file_sha256(&config.train)?,
        "questions": stages::file_sha256(&config.questions)?,
        "dev": config.dev.as_ref().map(|path| stages::file_sha256(path)).transpose()?,
        "docs": hex(&sha256(docs.as_bytes())),
        "retention": hex(&sha256(retention.as_bytes())),
    });
    Ok(Inputs { questions, train, dev, shots, order, form, retention, hashes })
}

/// At most `limit` questions, drawn in turn from every kind, in the order of the file.
fn draw(mut all: Vec<Question>, limit: Option<usize>, seed: u64) -> Vec<Question> {
    let Some(limit) = limit.filter(|&limit| limit < all.len()) else { return all };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(3);
    all.shuffle(&mut rng);
    let mut taken = std::collections::HashMap::new();
    let mut ranked: Vec<(usize, Question)> = Vec::with_capacity(all.len());
    for question in all {
        let rank = taken.entry(question.kind.clone()).or_insert(0);
        ranked.push((*rank, question));
        *rank += 1;
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.truncate(limit);
    let mut drawn: Vec<Question> = ranked.into_iter().map(|(_, question)| question).collect();
    drawn.sort_by_key(|question| question.line);
    drawn
}

/// Takes development questions out of the training rows.
fn cut(train: &mut Vec<TrainRow>, count: usize, rng: &mut ChaCha8Rng) -> Vec<Question> {
    let mut places: Vec<usize> = (0..train.len()).filter(|&i| matches!(train[i], TrainRow::Asked(_))).collect();
    places.shuffle(rng);
    places.truncate(count.min(train.len() * DEV_TENTHS / 10));
    places.sort_unstable();
    let mut dev = Vec::with_capacity(places.len());
    for &place in places.iter().rev() {
        if let TrainRow::Asked(question) = train.remove(place) {
            dev.push(*question);
        }
    }
    dev.reverse();
    dev
}
