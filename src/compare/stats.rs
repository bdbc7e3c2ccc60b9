//! What a difference on so many questions is worth: bootstrap intervals, permutation tests, Holm's correction.
//!
//! Questions of one group (say about one country) are drawn together, since they are not independent. Every draw is a
//! function of the seed.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Draws of a bootstrap.
pub const DRAWS: usize = 2000;
/// Sign patterns of a permutation test that is not exact.
pub const FLIPS: usize = 9999;
/// Up to so many groups that differ, every pattern is tried.
const EXACT: usize = 13;

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// 2.5 % of the draws lie below.
    pub low: f64,
    /// 2.5 % of the draws lie above.
    pub high: f64,
}

/// Sum and count of each group, in the order in which groups first occur.
fn grouped(values: &[f64], groups: &[usize]) -> Vec<(f64, f64)> {
    let mut places = std::collections::HashMap::new();
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for (value, group) in values.iter().zip(groups) {
        let place = *places.entry(*group).or_insert_with(|| {
            sums.push((0.0, 0.0));
            sums.len() - 1
        });
        sums[place].0 += value;
        sums[place].1 += 1.0;
    }
    sums
}

/// The mean of `values` with its percentile bootstrap interval; `groups` names each value's group. Zero without values.
pub fn bootstrap(values: &[f64], groups: &[usize], seed: u64) -> Interval {
    if values.is_empty() {
        return Interval::default();
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let sums = grouped(values, groups);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut means: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let (mut sum, mut count) = (0.0, 0.0);
            for _ in 0..sums.len() {
                let (s, c) = sums[rng.random_range(0..sums.len())];
                sum += s;
                count += c;
            }
            sum / count
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[(share * (DRAWS - 1) as f64).round() as usize];
    Interval { mean, low: at(0.025), high: at(0.975) }
}

/// The two-sided p-value of "the differences are as likely with either sign", group by group: exact where few groups
/// differ, else over [`FLIPS`] random patterns, the one at hand counted among them.
pub fn permutation(differences: &[f64], groups: &[usize], seed: u64) -> f64 {
    let sums: Vec<f64> = grouped(differences, groups).into_iter().map(|(sum, _)| sum).filter(|s| *s != 0.0).collect();
    let observed = sums.iter().sum::<f64>().abs();
    // Sums of the same numbers in another order differ in their last bits.
    let reaches = |sum: f64| sum.abs() >= observed - 1e-9 * observed.max(1.0);
    if sums.len() <= EXACT {
        let patterns = 1u32 << sums.len();
        let signed = |pattern: u32| {
            let sign = |i: usize| if pattern >> i & 1 == 1 { -1.0 } else { 1.0 };
            sums.iter().enumerate().map(|(i, sum)| sign(i) * sum).sum::<f64>()
        };
        return (0..patterns).filter(|&pattern| reaches(signed(pattern))).count() as f64 / f64::from(patterns);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut hits = 1;
    for _ in 0..FLIPS {
        let sum: f64 = sums.iter().map(|sum| if rng.random::<bool>() { -sum } else { *sum }).sum();
        hits += usize::from(reaches(sum));
    }
    hits as f64 / (FLIPS + 1) as f64
}

/// Holm's adjusted p-values, in the order given: below 0.05 where the chance that any of them is a false alarm is.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let (mut adjusted, mut largest) = (vec![0.0; p.len()], 0f64);
    for (rank, &i) in order.iter().enumerate() {
        largest = largest.max((p.len() - rank) as f64 * p[i]).min(1.0);
        adjusted[i] = largest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(count: usize) -> Vec<usize> {
        (0..count).collect()
    }

    #[test]
    fn an_interval_repeats_itself_and_has_the_width_theory_gives() {
        let values: Vec<f64> = (0..200).map(|i| f64::from(i % 4 == 0)).collect();
        let first = bootstrap(&values, &each(200), 7);
        assert_eq!(first, bootstrap(&values, &each(200), 7));
        let smooth: Vec<f64> = (0..50).map(|i| f64::from(i).sqrt()).collect();
        assert_ne!(bootstrap(&smooth, &each(50), 7), bootstrap(&smooth, &each(50), 8));
        assert_eq!(first.mean, 0.25);
        // 1.96·sqrt(p(1-p)/n) = 0.060; 2000 draws place a 2.5 % quantile within about 0.15 of that.
        let half = 1.96 * (0.25f64 * 0.75 / 200.0).sqrt();
        assert!((first.mean - first.low - half).abs() < 0.2 * half, "{first:?}");
        assert!((first.high - first.mean - half).abs() < 0.2 * half, "{first:?}");
    }

    #[test]
    fn equal_values_have_no_width_and_no_values_none() {
        assert_eq!(bootstrap(&[0.5; 9], &each(9), 1), Interval { mean: 0.5, low: 0.5, high: 0.5 });
        assert_eq!(bootstrap(&[], &[], 1), Interval::default());
    }

    #[test]
    fn groups_that_agree_within_widen_the_interval() {
        let values: Vec<f64> = (0..100).map(|i| f64::from(i / 10 % 2 == 0)).collect();
        let tens: Vec<usize> = (0..100).map(|i| i / 10).collect();
        let (alone, together) = (bootstrap(&values, &each(100), 3), bootstrap(&values, &tens, 3));
        assert!(together.high - together.low > 2.0 * (alone.high - alone.low), "{alone:?} {together:?}");
    }

    #[test]
    fn permutation_tests_of_constructed_data() {
        // Five wins of five: patterns all + and all -, 2 of 32.
        assert_eq!(permutation(&[1.0; 5], &each(5), 1), 2.0 / 32.0);
        // Three wins, one loss: |sum| of at least 2 in 2·(4 + 1) of 16 patterns.
        assert_eq!(permutation(&[1.0, 1.0, 1.0, -1.0], &each(4), 1), 10.0 / 16.0);
        // Ties say nothing; no difference at all is no evidence.
        assert_eq!(permutation(&[1.0, 0.0, 0.0, 1.0], &each(4), 1), 0.5);
        assert_eq!(permutation(&[0.0; 4], &each(4), 1), 1.0);
        // 40 wins: 2^-39, so that no random pattern reaches it.
        assert_eq!(permutation(&[1.0; 40], &each(40), 1), 1.0 / 10_000.0);
        // 20 wins and 20 losses: every pattern reaches a sum of 0.
        let even: Vec<f64> = (0..40).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        assert_eq!(permutation(&even, &each(40), 1), 1.0);
        // 26 of 40: the two-sided sign test gives 0.0807.
        let some: Vec<f64> = (0..40).map(|i| if i < 26 { 1.0 } else { -1.0 }).collect();
        assert!((permutation(&some, &each(40), 1) - 0.0807).abs() < 0.01);
        // One group: either sign is as likely.
        assert_eq!(permutation(&[1.0; 40], &[0; 40], 1), 1.0);
    }

    #[test]
    fn holm_steps_down() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.5]);
        let expected = [0.04, 0.09, 0.09, 0.5];
        assert!(adjusted.iter().zip(expected).all(|(a, e): (&f64, f64)| (a - e).abs() < 1e-12), "{adjusted:?}");
        assert_eq!(holm(&[0.6, 0.7]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }
}
