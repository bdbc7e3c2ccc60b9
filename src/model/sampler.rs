//! Choosing the next token from logits `f32[V]`: greedy, or a seeded draw from a truncated, tempered softmax.
//!
//! ```text
//! top_k        keep the k largest logits
//! top_p        p = softmax(kept); keep the shortest run, most probable first, whose p sums to top_p or more
//! min_p        drop what has p < min_p * max p
//! temperature  draw from softmax(kept / temperature)
//! ```
//!
//! The order is llama.cpp's: truncation looks at the model's own probabilities, temperature comes last. Hugging Face
//! transformers and vLLM apply temperature first. We follow llama.cpp because GGUF users tune for it and because a
//! high temperature then cannot let back in what the model finds improbable: temperature reshapes the draw among the
//! plausible tokens, top_p and min_p alone decide which those are. At temperature 1 both orders agree.
//!
//! Ties rank by id, so the kept set is unique and the same seed and logits give the same ids on every run.
//! Nothing sorts the vocabulary: a selection puts the kept logits first, only those are sorted.

use std::cmp::Ordering;

use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

/// What is wrong with the settings or the logits.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A setting outside its range.
    #[error("{name} is {value}; it must be {range}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// What was asked for.
        value: f32,
        /// What is allowed, in words.
        range: &'static str,
    },
    /// There is nothing to choose from.
    #[error("no logits to sample from")]
    Empty,
    /// A logit that is no usable number: an overflow or a broken kernel upstream.
    #[error("logit {id} of {count} is {value}; the forward pass before it went wrong")]
    NotFinite {
        /// The token id.
        id: usize,
        /// How many logits there are.
        count: usize,
        /// NaN or +infinity.
        value: f32,
    },
    /// Every logit is −infinity: all tokens are masked.
    #[error("all {0} logits are -inf: no token is allowed")]
    AllMasked(usize),
}

/// How the next token is drawn. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerSettings {
    /// Divides the logits before the draw; 0 is greedy: the largest logit, the lowest id on ties.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most probable tokens until their probabilities sum to this, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable one, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Seeds the draws.
    pub seed: u64,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        SamplerSettings { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

/// A seeded sampler; reuses its buffers from token to token.
pub struct Sampler {
    settings: SamplerSettings,
    rng: ChaCha12Rng,
    kept: Vec<(u32, f32)>,
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence. Errors name the setting that is out of range.
    pub fn new(settings: SamplerSettings) -> Result<Sampler, Error> {
        let check = |name, value: f32, ok, range| if ok { Ok(()) } else { Err(Error::Setting { name, value, range }) };
        let SamplerSettings { temperature, top_p, min_p, .. } = settings;
        check("temperature", temperature, temperature.is_finite() && temperature >= 0.0, "a number of 0 or more")?;
        check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1 (1 keeps all)")?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 (keeps all) and 1")?;
        let rng = ChaCha12Rng::seed_from_u64(settings.seed);
        Ok(Sampler { settings, rng, kept: Vec::new(), weights: Vec::new() })
    }

    /// The settings it was made with.
    pub fn settings(&self) -> &SamplerSettings {
        &self.settings
    }

    /// The next token id from `logits`, `f32[V]`. −infinity masks a token; NaN and +infinity are errors.
    /// Takes one number from the seeded sequence per call, none when greedy.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, Error> {
        let best = argmax(logits)?;
        let s = self.settings;
        if s.temperature == 0.0 {
            return Ok(best);
        }
        let max = logits[best as usize] as f64;

        let kept = &mut self.kept;
        kept.clear();
        kept.extend(logits.iter().enumerate().map(|(id, &l)| (id as u32, l)));
        if s.top_k > 0 {
            keep_first(kept, s.top_k);
        }
        if s.top_p < 1.0 {
            let total: f64 = kept.iter().map(|&(_, l)| (l as f64 - max).exp()).sum();
            let n = nucleus(kept, s.top_p as f64 * total, max);
            kept.truncate(n);
        }
        if s.min_p > 0.0 {
            // p >= min_p * max_p, in logits; the most probable token has l = max and always stays.
            let floor = max + (s.min_p as f64).ln();
            kept.retain(|&(_, l)| l as f64 >= floor);
        }

        let temperature = s.temperature as f64;
        self.weights.clear();
        self.weights.extend(kept.iter().map(|&(_, l)| ((l as f64 - max) / temperature).exp()));
        Ok(kept[draw(&self.weights, unit(&mut self.rng))].0)
    }
}

/// The `n` largest of `logits` as (id, logit), largest first, lower id first on ties, NaN last. O(V + n log n).
pub fn top(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = logits.iter().enumerate().map(|(id, &l)| (id as u32, l)).collect();
    keep_first(&mut all, n);
    all.sort_unstable_by(rank);
    all
}

/// The id of the largest logit, the lowest on ties.
fn argmax(logits: &[f32]) -> Result<u32, Error> {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (id, &l) in logits.iter().enumerate() {
        if l.is_nan() || l == f32::INFINITY {
            return Err(Error::NotFinite { id, count: logits.len(), value: l });
        }
        if l > max {
            (best, max) = (id, l);
        }
    }
    match (logits.is_empty(), max == f32::NEG_INFINITY) {
        (true, _) => Err(Error::Empty),
        (_, true) => Err(Error::AllMasked(logits.len())),
        _ => Ok(best as u32),
    }
}

/// Larger logit first, then lower id; NaN after every number.
fn rank(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    a.1.is_nan().cmp(&b.1.is_nan()).then(b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal)).then(a.0.cmp(&b.0))
}

/// Keeps the `n` first by [`rank`], in no order.
fn keep_first(items: &mut Vec<(u32, f32)>, n: usize) {
    if n < items.len() {
        if n > 0 {
            items.select_nth_unstable_by(n - 1, rank);
        }
        items.truncate(n);
    }
}

/// Sorts the head of `items` as far as needed and returns how many of its tokens sum to `mass`, at least one.
/// The head grows fourfold from 64, so a peaked distribution over 150 000 tokens sorts 64 of them.
fn nucleus(items: &mut [(u32, f32)], mass: f64, max: f64) -> usize {
    let (mut sum, mut done, mut head) = (0.0, 0, 64);
    loop {
        let end = head.min(items.len());
        let rest = &mut items[done..];
        if end - done < rest.len() {
            rest.select_nth_unstable_by(end - done - 1, rank);
        }
        items[done..end].sort_unstable_by(rank);
        for (i, &(_, l)) in items[done..end].iter().enumerate() {
            sum += (l as f64 - max).exp();
            if sum >= mass {
                return done + i + 1;
            }
        }
        if end == items.len() {
            return end; // rounding left the sum a hair short of the mass
        }
        (done, head) = (end, head * 4);
    }
}

/// The index that `u` in [0, 1) falls on when the weights are laid end to end. Never one of weight zero.
fn draw(weights: &[f64], u: f64) -> usize {
    let target = u * weights.iter().sum::<f64>();
    let (mut sum, mut last) = (0.0, 0);
    for (i, &w) in weights.iter().enumerate() {
        if w > 0.0 {
            sum += w;
            last = i;
            if target < sum {
                break;
            }
        }
    }
    last
}

/// A uniform number in [0, 1) of 53 bits.
fn unit(rng: &mut ChaCha12Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
