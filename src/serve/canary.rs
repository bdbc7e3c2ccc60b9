//! Aliases whose requests are split among models: sticky, weighed, and taken back by themselves when one does badly.
//!
//! The first arm of an alias is its champion; every other one can be rolled back, and its share then goes to the
//! champion. Which arm answers is drawn from SHA-256 of a salt, the alias and who asks, so whoever asks again meets the same
//! arm. What was rolled back is written aside and renamed at once: a restart keeps it, until the arm's weights change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::tally::{Bounds, Tally};
use crate::aside;
use crate::error::Error;
use crate::model::adapter::{hex, sha256};

/// An alias as it is asked for: its arms with their weights, the champion first.
#[derive(Clone, Debug, PartialEq)]
pub struct AliasSpec {
    /// The alias.
    pub name: String,
    /// Models and their weights.
    pub arms: Vec<(String, f64)>,
    /// An arm that also answers what others are asked, for the record alone.
    pub shadow: Option<String>,
}

/// Why an arm was taken back, and when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollback {
    /// The alias.
    pub alias: String,
    /// The model that no longer answers for it.
    pub arm: String,
    /// SHA-256 of its weights: another version of the same name is another arm.
    pub sha256: String,
    /// Seconds since 1970.
    pub time: f64,
    /// `errors`, `latency` or `feedback`.
    pub bound: String,
    /// What was found, in words.
    pub reason: String,
}

/// What stays when the server does not.
#[derive(Default, Serialize, Deserialize)]
struct State {
    salt: String,
    #[serde(default)]
    rolled_back: Vec<Rollback>,
}

struct Arm {
    model: String,
    sha256: String,
    weight: f64,
    tally: Tally,
    rolled_back: Option<Rollback>,
}

struct Alias {
    arms: Vec<Arm>,
    shadow: Option<String>,
}

/// The arm that answers, and the one that answers beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The model that answers.
    pub model: String,
    /// The model whose answer is only recorded.
    pub shadow: Option<String>,
}

/// What there is to say of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Observed {
    /// The server's fault, or its time was up.
    pub failed: bool,
    /// From the request to the end of the answer.
    pub seconds: f64,
    /// Only recorded.
    pub shadow: bool,
}

/// All aliases.
pub struct Canary {
    aliases: Mutex<BTreeMap<String, Alias>>,
    bounds: Bounds,
    salt: String,
    path: Option<PathBuf>,
    events: Mutex<Vec<Rollback>>,
}

impl Canary {
    /// The aliases with what is known of them from `path`, which is written where it is missing. `sha256_of` tells the
    /// weights of a model.
    pub fn open(
        specs: &[AliasSpec],
        bounds: Bounds,
        path: Option<&Path>,
        sha256_of: &dyn Fn(&str) -> String,
    ) -> Result<Canary, Error> {
        let known = path.map(read_state).transpose()?.flatten();
        let fresh = known.is_none();
        let state = known.unwrap_or_else(|| State { salt: new_salt(), rolled_back: Vec::new() });
        let mut aliases = BTreeMap::new();
        for spec in specs {
            let arms = spec.arms.iter().enumerate().map(|(i, (model, weight))| {
                let sha256 = sha256_of(model);
                let is_this = |r: &&Rollback| r.alias == spec.name && r.arm == *model && r.sha256 == sha256;
                let rolled_back = state.rolled_back.iter().find(is_this).filter(|_| i > 0).cloned();
                Arm { model: model.clone(), sha256, weight: *weight, tally: Tally::default(), rolled_back }
            });
            aliases.insert(spec.name.clone(), Alias { arms: arms.collect(), shadow: spec.shadow.clone() });
        }
        let canary = Canary {
            aliases: Mutex::new(aliases),
            bounds,
            salt: state.salt,
            path: path.map(Path::to_path_buf),
            events: Mutex::new(state.rolled_back),
        };
        if fresh {
            canary.save()?;
        }
        Ok(canary)
    }

    /// Whether there is such an alias.
    pub fn is_alias(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }

    /// The aliases.
    pub fn names(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// The name by which someone is known in the record: nobody can tell from it who it is without the salt.
    pub fn pseudonym(&self, user: &str) -> String {
        hex(&sha256(format!("{}\0user\0{user}", self.salt).as_bytes()))[..32].to_string()
    }

    /// The arm that answers whoever `key` is.
    pub fn choose(&self, alias: &str, key: &str) -> Option<Choice> {
        let digest = sha256(format!("{}\0{alias}\0{key}", self.salt).as_bytes());
        let bits = digest.iter().take(8).fold(0u64, |bits, &byte| bits << 8 | u64::from(byte));
        let aliases = self.lock();
        let found = aliases.get(alias)?;
        let total: f64 = found.arms.iter().map(|arm| arm.weight).sum();
        // 53 bits: the numbers that f64 has below one, evenly.
        let mut at = (bits >> 11) as f64 / (1u64 << 53) as f64 * total;
        let mut chosen = &found.arms[0];
        for arm in &found.arms {
            if at < arm.weight {
                chosen = arm;
                break;
            }
            at -= arm.weight;
        }
        if chosen.rolled_back.is_some() {
            chosen = &found.arms[0];
        }
        let ill = |model: &str| found.arms.iter().any(|arm| arm.model == model && arm.rolled_back.is_some());
        let shadow = found.shadow.clone().filter(|shadow| *shadow != chosen.model && !ill(shadow));
        Some(Choice { model: chosen.model.clone(), shadow })
    }

    /// Counts an answer; gives the rollback that it led to.
    pub fn record(&self, alias: &str, model: &str, seen: Observed) -> Option<Rollback> {
        self.change(alias, model, |tally| match seen.shadow {
            true => tally.shadow(seen.failed, seen.seconds),
            false => tally.answer(seen.failed, seen.seconds),
        })
    }

    /// Counts an answer's rating in place of the one it had `before`; gives the rollback that it led to.
    pub fn feedback(&self, alias: &str, model: &str, before: Option<bool>, good: bool) -> Option<Rollback> {
        self.change(alias, model, |tally| tally.rating(before, good))
    }

    /// An adapter has other weights from now on: as an arm it is another one, of which nothing is known, unless it was
    /// rolled back with these weights.
    pub fn renewed(&self, adapter: &str, sha256: &str) {
        let events = self.events.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        for (name, alias) in self.lock().iter_mut() {
            for (i, arm) in alias.arms.iter_mut().enumerate() {
                let own = arm.model.split('+').next() == Some(adapter);
                if own && arm.sha256 != sha256 {
                    let is_this = |r: &&Rollback| r.alias == *name && r.arm == arm.model && r.sha256 == sha256;
                    arm.rolled_back = events.iter().find(is_this).filter(|_| i > 0).cloned();
                    (arm.sha256, arm.tally) = (sha256.into(), Tally::default());
                }
            }
        }
    }

    /// Counts what the log holds of an earlier run: nothing is rolled back by it.
    pub fn remember(&self, alias: &str, model: &str, count: impl FnOnce(&mut Tally)) {
        let mut aliases = self.lock();
        let arm = aliases.get_mut(alias).and_then(|alias| alias.arms.iter_mut().find(|arm| arm.model == model));
        if let Some(arm) = arm {
            count(&mut arm.tally);
        }
    }

    fn change(&self, alias: &str, model: &str, count: impl FnOnce(&mut Tally)) -> Option<Rollback> {
        let rollback = {
            let mut aliases = self.lock();
            let arms = &mut aliases.get_mut(alias)?.arms;
            let i = arms.iter().position(|arm| arm.model == model)?;
            count(&mut arms[i].tally);
            if i == 0 || arms[i].rolled_back.is_some() {
                return None;
            }
            let (bound, reason) = self.bounds.judge(&arms[0].tally, &arms[i].tally)?;
            let rollback = Rollback {
                alias: alias.into(),
                arm: model.into(),
                sha256: arms[i].sha256.clone(),
                time: super::capture::now(),
                bound: bound.into(),
                reason,
            };
            arms[i].rolled_back = Some(rollback.clone());
            rollback
        };
        log::warn!("{alias}: {model} is rolled back: {}", rollback.reason);
        self.events.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(rollback.clone());
        if let Err(error) = self.save() {
            log::error!("the rollback of {model} will not outlive this process: {error}");
        }
        Some(rollback)
    }

    /// What holds of every alias, for people and scripts.
    pub fn status(&self) -> Value {
        let aliases = self.lock();
        let arm = |arm: &Arm, champion: &Arm, first: bool, taken: f64| {
            let weight = match arm.rolled_back {
                Some(_) => 0.0,
                None if first => arm.weight + taken,
                None => arm.weight,
            };
            let mut object = arm.tally.status((!first).then_some(&champion.tally));
            object["model"] = json!(arm.model);
            object["weight"] = json!(weight);
            object["champion"] = json!(first);
            object["rolled_back"] = json!(arm.rolled_back);
            object
        };
        let alias = |(name, alias): (&String, &Alias)| {
            let taken = alias.arms.iter().filter(|arm| arm.rolled_back.is_some()).map(|arm| arm.weight).sum();
            let arms = alias.arms.iter().enumerate().map(|(i, a)| arm(a, &alias.arms[0], i == 0, taken));
            json!({"alias": name, "shadow": alias.shadow, "arms": arms.collect::<Vec<_>>()})
        };
        Value::Array(aliases.iter().map(alias).collect())
    }

    /// Weight in use of each arm: alias, model, weight.
    pub fn weights(&self) -> Vec<(String, String, f64)> {
        let status = self.status();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let arms = |alias: &Value| {
            let name = text(&alias["alias"]);
            let arms = alias["arms"].as_array().cloned().unwrap_or_default();
            arms.into_iter().map(move |a| (name.clone(), text(&a["model"]), a["weight"].as_f64().unwrap_or(0.0)))
        };
        status.as_array().into_iter().flatten().flat_map(arms).collect()
    }

    fn save(&self) -> Result<(), Error> {
        let Some(path) = &self.path else { return Ok(()) };
        let rolled_back = self.events.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let state = State { salt: self.salt.clone(), rolled_back };
        aside::write(path, (json!(state).to_string() + "\n").as_bytes())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Alias>> {
        // Counts that a panic cut short are still counts.
        self.aliases.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The state of an earlier run, if there was one.
fn read_state(path: &Path) -> Result<Option<State>, Error> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(Error::io(path, cause)),
    };
    let state: State = serde_json::from_slice(&bytes).map_err(|error| Error::json(path, &error))?;
    match state.salt.len() {
        64 => Ok(Some(state)),
        _ => Err(Error::file(path, "has no salt of 64 digits: it is no state of this server, name another --state")),
    }
}

/// 256 bits that nobody can guess.
fn new_salt() -> String {
    let parts: Vec<String> = (0..8).map(|_| super::random().to_string()).collect();
    hex(&sha256(parts.join(" ").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> AliasSpec {
        AliasSpec { name: "chat".into(), arms: vec![("old".into(), 95.0), ("new".into(), 5.0)], shadow: None }
    }

    fn open(path: Option<&Path>, sha256: &str) -> Canary {
        Canary::open(&[spec()], Bounds::default(), path, &|_| sha256.to_string()).unwrap()
    }

    #[test]
    fn the_split_is_within_its_binomial_bound_and_sticky() {
        let canary = open(None, "x");
        let n = 20_000;
        let to_new = |i: usize| canary.choose("chat", &format!("user {i}")).unwrap().model == "new";
        let count = (0..n).filter(|&i| to_new(i)).count() as f64;
        // Five standard deviations of a binomial: beyond them with a probability of 6e-7.
        let sd = (n as f64 * 0.05 * 0.95).sqrt();
        assert!((count - n as f64 * 0.05).abs() < 5.0 * sd, "{count} of {n}");
        assert!((0..200).all(|i| to_new(i) == to_new(i)));
        assert!(canary.choose("other", "x").is_none());
    }

    #[test]
    fn a_bad_arm_is_rolled_back_and_a_restart_keeps_it_until_its_weights_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        let canary = open(Some(&path), "x");
        let key = (0..).map(|i| format!("user {i}")).find(|key| canary.choose("chat", key).unwrap().model == "new");
        let key = key.unwrap();
        let seen = |failed| Observed { failed, seconds: 0.1, shadow: false };
        let mut rollback = None;
        for i in 0..200 {
            canary.record("chat", "old", seen(false));
            rollback = canary.record("chat", "new", seen(true));
            if rollback.is_some() {
                assert!(i + 1 >= Bounds::default().least, "not before the least count");
                break;
            }
        }
        let rollback = rollback.expect("an arm that always fails is rolled back");
        assert_eq!((rollback.bound.as_str(), rollback.arm.as_str()), ("errors", "new"));
        assert_eq!(canary.choose("chat", &key).unwrap().model, "old");
        let again = open(Some(&path), "x");
        assert_eq!(again.choose("chat", &key).unwrap().model, "old", "a restart keeps it");
        assert_eq!(again.pseudonym("u"), canary.pseudonym("u"), "and the salt");
        assert_eq!(again.status()[0]["arms"][1]["rolled_back"]["bound"], "errors");
        assert_eq!(open(Some(&path), "y").choose("chat", &key).unwrap().model, "new", "other weights, another arm");
        std::fs::write(&path, "{}").unwrap();
        assert!(Canary::open(&[spec()], Bounds::default(), Some(&path), &|_| String::new()).is_err());
    }

    #[test]
    fn the_shadow_never_answers_beside_itself() {
        let spec = AliasSpec { shadow: Some("new".into()), ..spec() };
        let canary = Canary::open(&[spec], Bounds::default(), None, &|_| String::new()).unwrap();
        for i in 0..300 {
            let choice = canary.choose("chat", &i.to_string()).unwrap();
            assert_eq!(choice.shadow.is_none(), choice.model == "new");
        }
    }
}
