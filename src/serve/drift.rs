//! Whether the questions of late are drawn as those of training were, by their embeddings.
//!
//! ```text
//! centroid_distance = 1 - cos(mean of reference, mean of recent)
//! mmd2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over pairs x ≠ x', y ≠ y', unbiased
//! k(a, b) = exp(-|a - b|² / (2·s²)), s² the median of |a - b|² over all pairs
//! p_value = share of random splits of all rows into two such sets whose mmd2 is as large, the one at hand counted
//! ```
//!
//! The kernel two-sample test of A. Gretton et al. 2012. A split costs one pass over the kernel matrix, so at most
//! [`MOST`] rows of each set are taken, evenly.

use rand::seq::SliceRandom;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Rows of a set that are compared at most: a kernel matrix of 1024².
pub const MOST: usize = 512;

/// How far two sets are apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Drift {
    /// 1 less the cosine of the sets' means: 0 for the same direction, 2 for the opposite one.
    pub centroid_distance: f64,
    /// Squared maximum mean discrepancy, unbiased: about 0, and then also below it, for equal distributions.
    pub mmd2: f64,
    /// How likely so large a one is where nothing has changed.
    pub p_value: f64,
}

/// Compares `recent` f32[N, d] with `reference` f32[M, d], unit rows both. Fewer than two rows of either, or rows that
/// are not finite, tell nothing: no distance and a p-value of 1.
pub fn drift(reference: &[f32], recent: &[f32], d: usize, seed: u64, permutations: usize) -> Drift {
    let none = Drift { p_value: 1.0, ..Drift::default() };
    if d == 0 {
        return none;
    }
    let (x, y) = (evenly(reference, d), evenly(recent, d));
    let (m, n) = (x.len() / d, y.len() / d);
    if m < 2 || n < 2 || x.iter().chain(&y).any(|value| !value.is_finite()) {
        return none;
    }
    let rows = [x, y].concat();
    let kernel = kernel(&rows, d);
    let mut order: Vec<usize> = (0..m + n).collect();
    let observed = mmd2(&kernel, &order, m);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let splits: Vec<Vec<usize>> = (0..permutations)
        .map(|_| {
            order.shuffle(&mut rng);
            order.clone()
        })
        .collect();
    // The same sum in another order differs in its last bits.
    let reaches = |order: &Vec<usize>| mmd2(&kernel, order, m) >= observed - 1e-12;
    let hits = splits.par_iter().filter(|order| reaches(order)).count();
    Drift {
        centroid_distance: centroid_distance(&rows, m, d),
        mmd2: observed,
        p_value: (hits + 1) as f64 / (permutations + 1) as f64,
    }
}

/// At most [`MOST`] rows, evenly over all.
fn evenly(rows: &[f32], d: usize) -> Vec<f32> {
    let count = rows.len() / d;
    let most = count.min(MOST);
    (0..most).flat_map(|i| rows[i * count / most * d..][..d].iter().copied()).collect()
}

fn centroid_distance(rows: &[f32], m: usize, d: usize) -> f64 {
    let mean = |rows: &[f32]| {
        let mut sum = vec![0f64; d];
        rows.chunks_exact(d).for_each(|row| sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x)));
        let count = (rows.len() / d) as f64;
        sum.iter_mut().for_each(|sum| *sum /= count);
        sum
    };
    let (a, b) = (mean(&rows[..m * d]), mean(&rows[m * d..]));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norm = (dot(&a, &a) * dot(&b, &b)).sqrt();
    // A mean of no length has no direction to differ in.
    if norm > 0.0 {
        (1.0 - dot(&a, &b) / norm).max(0.0)
    } else {
        0.0
    }
}

/// The kernel between all rows, f64[N, N].
fn kernel(rows: &[f32], d: usize) -> Vec<f64> {
    let count = rows.len() / d;
    let between = |i: usize, j: usize| -> f64 {
        let (a, b) = (&rows[i * d..][..d], &rows[j * d..][..d]);
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    let mut squares = vec![0.0; count * count];
    squares.par_chunks_mut(count).enumerate().for_each(|(i, row)| {
        row.iter_mut().enumerate().for_each(|(j, square)| *square = between(i, j));
    });
    let mut above: Vec<f64> = (0..count).flat_map(|i| squares[i * count + i + 1..(i + 1) * count].to_vec()).collect();
    let middle = above.len() / 2;
    let (_, median, _) = above.select_nth_unstable_by(middle, f64::total_cmp);
    // More than half of all pairs equal: any width tells equal rows from others.
    let width = if *median > 0.0 { *median } else { 1.0 };
    squares.par_iter_mut().for_each(|square| *square = (-*square / (2.0 * width)).exp());
    squares
}

/// The estimate where the first `m` of `order` are one set and the others the other.
fn mmd2(kernel: &[f64], order: &[usize], m: usize) -> f64 {
    let (count, n) = (order.len(), order.len() - m);
    let mut first = vec![false; count];
    order[..m].iter().for_each(|&row| first[row] = true);
    let (mut inside, mut outside, mut across) = (0.0, 0.0, 0.0);
    for i in 0..count {
        let row = &kernel[i * count..][..count];
        let (mut same, mut other) = (0.0, 0.0);
        for (j, value) in row.iter().enumerate() {
            match first[j] == first[i] {
                true => same += value,
                false => other += value,
            }
        }
        let same = same - row[i];
        if first[i] {
            inside += same
        } else {
            outside += same
        }
        across += other;
    }
    let (m, n) = (m as f64, n as f64);
    inside / (m * (m - 1.0)) + outside / (n * (n - 1.0)) - across / (m * n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::normal;

    const D: usize = 16;

    /// Unit rows about a direction: the smaller `spread`, the nearer to it.
    fn rows(count: usize, axis: usize, spread: f64, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let row = |_| {
            let mut row: Vec<f64> = (0..D).map(|_| spread * normal(&mut rng)).collect();
            row[axis] += 1.0;
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.into_iter().map(|x| (x / norm) as f32).collect::<Vec<_>>()
        };
        (0..count).flat_map(row).collect()
    }

    #[test]
    fn the_same_distribution_is_told_apart_as_seldom_as_the_p_value_says() {
        let mut small = 0;
        for seed in 0..40 {
            let found = drift(&rows(60, 0, 0.5, seed), &rows(40, 0, 0.5, 1000 + seed), D, seed, 99);
            small += usize::from(found.p_value <= 0.05);
            // Half the squared angle between the means: 15 components of variance 0.05·(1/60 + 1/40) over a length of
            // 0.45 make 0.075 ± 0.027.
            assert!(found.centroid_distance < 0.25, "{found:?}");
        }
        // Binomial with 40 draws at 0.05: 8 or more have a chance of 1e-3.
        assert!(small < 8, "{small} of 40");
    }

    #[test]
    fn other_distributions_are_told() {
        let reference = rows(60, 0, 0.5, 1);
        let found = drift(&reference, &rows(40, 3, 0.5, 2), D, 7, 199);
        assert_eq!(found.p_value, 1.0 / 200.0, "no split reaches it: {found:?}");
        assert!(found.mmd2 > 0.05 && found.centroid_distance > 0.3, "{found:?}");
        // Another spread about the same centre.
        let found = drift(&reference, &rows(60, 0, 0.1, 3), D, 7, 199);
        assert!(found.p_value < 0.02 && found.mmd2 > 0.0, "{found:?}");
        assert_eq!(found, drift(&reference, &rows(60, 0, 0.1, 3), D, 7, 199), "the same seed, the same p-value");
    }

    #[test]
    fn the_estimate_is_the_sum_it_stands_for() {
        let (x, y) = (rows(5, 0, 0.5, 4), rows(4, 1, 0.5, 5));
        let all = [x, y].concat();
        let kernel = kernel(&all, D);
        let k = |i: usize, j: usize| kernel[i * 9 + j];
        let mut expected = 0.0;
        for i in 0..9 {
            for j in (0..9).filter(|&j| j != i) {
                expected += match (i < 5, j < 5) {
                    (true, true) => k(i, j) / 20.0,
                    (false, false) => k(i, j) / 12.0,
                    _ => -k(i, j) / 20.0,
                };
            }
        }
        let order: Vec<usize> = (0..9).collect();
        assert!((mmd2(&kernel, &order, 5) - expected).abs() < 1e-12);
    }

    #[test]
    fn what_tells_nothing_says_so() {
        let none = Drift { p_value: 1.0, ..Drift::default() };
        let some = rows(4, 0, 0.5, 1);
        assert_eq!(drift(&some, &rows(1, 0, 0.5, 1), D, 1, 99), none);
        assert_eq!(drift(&some, &[f32::NAN; 2 * D], D, 1, 99), none);
        assert_eq!(drift(&[], &[], 0, 1, 99), none);
        let same = drift(&[1.0; 3], &[1.0; 3], 1, 1, 99);
        assert_eq!((same.mmd2, same.p_value), (0.0, 1.0), "rows that are all alike");
        assert!(drift(&rows(2000, 0, 0.5, 1), &rows(30, 0, 0.5, 2), D, 1, 9).p_value > 0.0, "only some are taken");
    }
}
