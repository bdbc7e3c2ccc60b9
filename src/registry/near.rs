//! Texts that are nearly the same, without an embedding model.
//!
//! ```text
//! words(text)    = lower case, without punctuation and articles, as answers are compared
//! shingles(text) = its words in pairs, hashed; of one word, that
//! near(a, b)     = |A ∩ B| / |A ∪ B| >= threshold over shingles
//! ```
//!
//! Candidates come from MinHash: 64 hashes of each text in 16 bands of 4; texts that agree on a band are compared
//! exactly. Texts at a similarity of 0.8 share no band with probability (1 - 0.8⁴)¹⁶ = 2·10⁻⁴; every one found is near.

use std::collections::HashMap;

use crate::compare::metrics;

const BANDS: usize = 16;
const ROWS: usize = 4;

/// Texts that were seen, to be asked for those near another.
pub struct Near {
    threshold: f64,
    texts: Vec<Vec<u64>>,
    bands: HashMap<(usize, [u64; ROWS]), Vec<usize>>,
}

impl Near {
    /// None yet. At a threshold of 1 texts are near whose shingles are the same.
    pub fn new(threshold: f64) -> Near {
        Near { threshold, texts: Vec::new(), bands: HashMap::new() }
    }

    /// Adds a text; they are numbered from 0.
    pub fn push(&mut self, text: &str) {
        let shingles = shingles(text);
        for key in keys(&shingles) {
            self.bands.entry(key).or_default().push(self.texts.len());
        }
        self.texts.push(shingles);
    }

    /// The numbers of the texts near this one, in order. A text without a word is near none.
    pub fn of(&self, text: &str) -> Vec<usize> {
        let shingles = shingles(text);
        let mut found: Vec<usize> = keys(&shingles).filter_map(|key| self.bands.get(&key)).flatten().copied().collect();
        found.sort_unstable();
        found.dedup();
        found.retain(|&i| similarity(&shingles, &self.texts[i]) >= self.threshold);
        found
    }
}

/// Pairs of words, each as a number, in order and each once.
fn shingles(text: &str) -> Vec<u64> {
    let normal = metrics::normal(text);
    let words: Vec<u64> = normal.split_whitespace().map(|word| fnv(word.as_bytes())).collect();
    let mut found = match words.len() {
        0 | 1 => words,
        _ => words.windows(2).map(|pair| mix(pair[0] ^ pair[1].rotate_left(32))).collect(),
    };
    found.sort_unstable();
    found.dedup();
    found
}

/// What a text is filed under: for each band the least of each of its hashes over the shingles.
fn keys(shingles: &[u64]) -> impl Iterator<Item = (usize, [u64; ROWS])> + '_ {
    let least = |seed: usize| shingles.iter().map(|s| mix(s ^ mix(seed as u64 + 1))).min().unwrap_or(0);
    let bands = if shingles.is_empty() { 0 } else { BANDS };
    (0..bands).map(move |band| (band, std::array::from_fn(|row| least(band * ROWS + row))))
}

/// Shared over all, of two ordered lists.
fn similarity(a: &[u64], b: &[u64]) -> f64 {
    let shared = a.iter().filter(|s| b.binary_search(s).is_ok()).count();
    shared as f64 / (a.len() + b.len() - shared).max(1) as f64
}

/// FNV-1a, 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// SplitMix64's finish: every bit of the result depends on every bit of `x`.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_is_found_and_nothing_else() {
        let mut near = Near::new(0.8);
        let texts = [
            "How do I reset the password of my account on the new portal?",
            "Where is the mill?",
            "Where is the inn?",
            "yes",
            "",
        ];
        texts.iter().for_each(|text| near.push(text));
        assert_eq!(near.of("how do i reset the password of my account, on the new portal"), [0]);
        assert_eq!(near.of("Please, how do I reset the password of my account on the new portal?"), [0]);
        assert_eq!(near.of("Where is THE mill"), [1], "one word more or less of three is another question");
        assert_eq!(near.of("Yes."), [3]);
        assert!(near.of("?").is_empty() && near.of("How do I open an account?").is_empty());
    }

    #[test]
    fn similar_texts_share_a_band_as_often_as_theory_has_it() {
        // 21 words, the last one another: 19 of 21 pairs shared, a similarity of 19/21 = 0.90.
        let word = |i: u64| format!("w{}", mix(i));
        let (mut near, mut found) = (Near::new(0.8), 0);
        let text = |i: u64, last: u64| (0..20).map(|j| word(100 * i + j) + " ").collect::<String>() + &word(last);
        (0..500).for_each(|i| near.push(&text(i, 1_000_000 + i)));
        for i in 0..500 {
            found += usize::from(near.of(&text(i, 2_000_000 + i)) == [i as usize]);
        }
        // A miss has a chance of (1 - 0.9^4)^16 = 3e-8.
        assert_eq!(found, 500);
    }
}
