//! A run: steps, evaluations, checkpoints and what is told of them, in one directory.
//!
//! ```text
//! adapter_model.safetensors  adapter_config.json   the result: with held-out data the best, else the last
//! last/                                            with held-out data the last
//! metrics.jsonl  loss.svg                          a line a step; their curve
//! run.json                                         what was asked for, from what, by what, and how it ended
//! train.tokens  eval.tokens                        the prepared data
//! checkpoint-000042/                               where it stands
//! ```

use std::fs;
use std::path::Path;
use std::time::Instant;

use serde_json::{json, Map, Value};

use super::checkpoint::{self, State};
use super::metrics::{self, Line, Metrics};
use super::optimizer::Schedule;
use super::prepared::{Order, TokenSet};
use super::step::Trainer;
use crate::aside;
use crate::error::Error;
use crate::model::adapter::{hex, sha256, PROMPT};

/// What a run is to do, beside what the trainer knows.
#[derive(Clone, Debug)]
pub struct Options {
    /// Steps in all.
    pub steps: usize,
    /// Largest learning rate.
    pub lr: f64,
    /// How it changes.
    pub schedule: Schedule,
    /// Steps it rises for.
    pub warmup: usize,
    /// Rows, or groups of packed rows, of a step.
    pub rows: usize,
    /// Tokens of a packed group; none: rows are not packed.
    pub pack: Option<usize>,
    /// Shuffles rows; none: they come in order.
    pub shuffle: Option<u64>,
    /// Steps between evaluations.
    pub eval_every: usize,
    /// Evaluations without a better loss after which the run ends; none: it does not.
    pub patience: Option<usize>,
    /// Steps between checkpoints.
    pub save_every: usize,
    /// SHA-256 of the base model.
    pub base_sha256: String,
    /// Everything the result depends on, as run.json tells it and as a run that resumes must have it again.
    pub settings: Map<String, Value>,
    /// What else run.json tells.
    pub about: Map<String, Value>,
}

/// What happens, as it happens.
pub enum Event<'a> {
    /// A step is done.
    Step(&'a Line),
    /// Held-out rows are being evaluated: how many are done.
    Evaluating(usize),
    /// They are: step and mean loss, and whether it is the best so far.
    Evaluated(usize, f64, bool),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// After its last step.
    Finished,
    /// The held-out loss no longer got better.
    EarlyStop,
    /// The caller's wish; it can be resumed.
    Interrupted,
}

impl Ending {
    /// The word of run.json.
    pub fn name(self) -> &'static str {
        match self {
            Ending::Finished => "finished",
            Ending::EarlyStop => "early stop",
            Ending::Interrupted => "interrupted",
        }
    }
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// Steps done.
    pub steps: usize,
    /// Losses of the first and the last step.
    pub losses: Option<(f64, f64)>,
    /// Held-out loss before the first step.
    pub eval_before: Option<f64>,
    /// Step and value of the best held-out loss.
    pub best: Option<(usize, f64)>,
    /// Seconds of training, evaluations included.
    pub seconds: f64,
    /// SHA-256 of adapter_model.safetensors, in hexadecimal.
    pub adapter_sha256: String,
}

/// Takes events; false asks the run to save and end.
pub type Watch<'a> = &'a mut dyn FnMut(Event) -> bool;

/// Runs from `state` on: [`State::new`], or a checkpoint's whose numbers the trainer already has.
pub fn run(
    options: &Options,
    trainer: &mut Trainer,
    train: &TokenSet,
    held_out: Option<&TokenSet>,
    out: &Path,
    state: State,
    watch: Watch,
) -> Result<Outcome, Error> {
    let mut metrics = Metrics::open(out, state.step)?;
    let groups = train.groups(options.pack.is_some(), options.pack.unwrap_or(0));
    let mut order = Order::new(groups.len(), options.shuffle);
    let mut state = state;
    let began = (Instant::now(), state.seconds);
    let tell = |state: &State, ending: &str, losses: &[Line], sha256: Option<&str>| {
        let about = json!({
            "status": ending,
            "steps_done": state.step,
            "loss_first": losses.first().map(|line| line.loss),
            "loss_last": losses.last().map(|line| line.loss),
            "eval_loss_before": state.eval_before,
            "eval_loss_best": state.best.map(|best| best.1),
            "best_step": state.best.map(|best| best.0),
            "seconds": began.1 + began.0.elapsed().as_secs_f64(),
            "peak_bytes": metrics::peak_bytes(),
            "adapter_sha256": sha256,
        });
        let mut object = options.settings.clone();
        object.extend(options.about.clone());
        object.extend(about.as_object().cloned().unwrap_or_default());
        aside::write(&out.join("run.json"), format!("{:#}\n", Value::Object(object)).as_bytes())
    };
    tell(&state, "running", &metrics.lines, None)?;

    let out_of_patience = |state: &State| options.patience.is_some_and(|patience| state.since_best >= patience);
    let mut ending = if out_of_patience(&state) { Ending::EarlyStop } else { Ending::Finished };
    if let (Some(set), 0, None) = (held_out, state.step, state.eval_before) {
        match trainer.evaluate(set, &mut |rows| watch(Event::Evaluating(rows)))? {
            Some(loss) => {
                state.eval_before = Some(loss);
                watch(Event::Evaluated(0, loss, false));
            }
            None => ending = Ending::Interrupted,
        }
    }
    while ending == Ending::Finished && state.step < options.steps {
        let step = state.step;
        let places = step * options.rows..(step + 1) * options.rows;
        let rows: Vec<u32> = places.flat_map(|place| groups[order.group(place)].clone()).collect();
        let lr = options.schedule.rate(options.lr, step, options.steps, options.warmup);
        let start = Instant::now();
        let found = match trainer.step(train, &rows, lr, step) {
            Ok(found) => found,
            Err(error) => {
                tell(&state, "failed", &metrics.lines, None)?;
                return Err(error);
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        state.step += 1;
        let mut line = Line {
            step: state.step,
            loss: found.loss,
            lr,
            grad_norm: found.grad_norm,
            tokens: found.tokens,
            predicted: found.predicted,
            tokens_per_s: found.tokens as f64 / seconds.max(1e-9),
            peak_bytes: metrics::peak_bytes(),
            eval_loss: None,
        };
        let mut go_on = watch(Event::Step(&line));
        let last = state.step == options.steps;
        if let Some(set) = held_out.filter(|_| go_on && (last || state.step.is_multiple_of(options.eval_every))) {
            line.eval_loss = trainer.evaluate(set, &mut |rows| watch(Event::Evaluating(rows)))?;
            go_on = line.eval_loss.is_some();
        }
        if let Some(loss) = line.eval_loss {
            let better = state.best.is_none_or(|best| loss < best.1);
            if better {
                (state.best, state.since_best) = (Some((state.step, loss)), 0);
                save_adapter(trainer, options, out)?;
            } else {
                state.since_best += 1;
            }
            go_on &= watch(Event::Evaluated(state.step, loss, better));
        }
        metrics.push(line)?;
        if !go_on {
            ending = Ending::Interrupted;
        } else if out_of_patience(&state) {
            ending = Ending::EarlyStop;
        }
        if last || ending != Ending::Finished || state.step.is_multiple_of(options.save_every) {
            state.seconds = began.1 + began.0.elapsed().as_secs_f64();
            checkpoint::save(out, &state, &trainer.parameters, &options.base_sha256)?;
        }
        if last {
            break;
        }
    }

    match state.best {
        None => save_adapter(trainer, options, out)?,
        Some(_) => save_adapter(trainer, options, &out.join("last"))?,
    }
    aside::write(&out.join("loss.svg"), metrics::curve(&metrics.lines, state.eval_before).as_bytes())?;
    let path = out.join("adapter_model.safetensors");
    let adapter_sha256 = hex(&sha256(&fs::read(&path).map_err(|cause| Error::io(&path, cause))?));
    tell(&state, ending.name(), &metrics.lines, Some(&adapter_sha256))?;
    Ok(Outcome {
        ending,
        steps: state.step,
        losses: metrics.lines.first().zip(metrics.lines.last()).map(|(first, last)| (first.loss, last.loss)),
        eval_before: state.eval_before,
        best: state.best,
        seconds: began.1 + began.0.elapsed().as_secs_f64(),
        adapter_sha256,
    })
}

fn save_adapter(trainer: &Trainer, options: &Options, out: &Path) -> Result<(), Error> {
    let parameters = &trainer.parameters;
    parameters.adapter(&parameters.values, Some(options.base_sha256.clone()))?.save(out)
}

/// Refuses to continue a run with other settings, naming those that differ. The number of steps may grow where no
/// learning rate depends on it.
pub fn check_settings(found: &Map<String, Value>, wanted: &Map<String, Value>, out: &Path) -> Result<(), Error> {
    let constant = wanted.get("schedule").and_then(Value::as_str) == Some("constant");
    let mut differ = Vec::new();
    for (key, value) in wanted {
        let before = found.get(key).unwrap_or(&Value::Null);
        if before != value && !(key == "steps" && constant) {
            differ.push(format!("{key} was {before} and is now {value}"));
        }
    }
    if differ.is_empty() {
        return Ok(());
    }
    let what = format!(
        "the run in it had other settings: {}; resume with the same, or start anew with --restart",
        differ.join(", ")
    );
    Err(Error::file(out, what))
}

/// Holds a run's directory, which is made where it is missing, until dropped. An error where another run holds it.
pub fn lock(out: &Path) -> Result<fs::File, Error> {
    crate::aside::folder(out)?;
    let path = out.join(".lock");
    let file = fs::File::create(&path).map_err(|cause| Error::io(&path, cause))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            Err(Error::file(out, "is being written by another run: wait for it, or name another directory"))
        }
        Err(fs::TryLockError::Error(cause)) => Err(Error::io(&path, cause)),
    }
}

/// Readies a directory for a run from the beginning; true where a finished run was in it. An error where an unfinished
/// one is, unless `restart`.
pub fn clear(out: &Path, restart: bool) -> Result<bool, Error> {
    let finished = fs::read_to_string(out.join("run.json")).is_ok_and(|text| {
        let status =
            serde_json::from_str::<Value>(&text).ok().and_then(|run| Some(run.get("status")?.as_str()?.to_string()));
        status.is_some_and(|status| status == Ending::Finished.name() || status == Ending::EarlyStop.name())
    });
    if checkpoint::exists(out) && !finished && !restart {
        let what = "holds a run that did not come to its end: go on with --resume, or start anew with --restart";
        return Err(Error::file(out, what));
    }
    checkpoint::clear(out)?;
    const ADAPTER: [&str; 2] = ["adapter_model.safetensors", "adapter_config.json"];
    let last = ADAPTER.map(|name| out.join("last").join(name));
    let files = [&ADAPTER[..], &[PROMPT, "run.json", metrics::FILE, "loss.svg"]].concat();
    for path in files.iter().map(|name| out.join(name)).chain(last) {
        match fs::remove_file(&path) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&path, cause)),
            _ => {}
        }
    }
    // Where there is something else in it, it stays.
    let _ = fs::remove_dir(out.join("last"));
    Ok(finished)
}
