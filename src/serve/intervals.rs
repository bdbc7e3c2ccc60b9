//! What two arms of live traffic are worth against each other: shares with Wilson's interval, their difference with
//! Newcombe's, and a difference of means with Welch's.
//!
//! Shares near 0 or 1 and small counts are the rule here, where the textbook p ± 1.96·sqrt(p(1-p)/n) has no width or
//! leaves the range.

/// The 97.5 % quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// A number with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// The interval's lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// A share of `n` by Wilson's score interval (E. B. Wilson 1927). Of nothing: 0 within 0 to 1.
pub fn share(hits: u64, n: u64) -> Estimate {
    if n == 0 {
        return Estimate { value: 0.0, low: 0.0, high: 1.0 };
    }
    let (n, p) = (n as f64, hits.min(n) as f64 / n as f64);
    let (z2, shrink) = (Z * Z, 1.0 + Z * Z / n);
    let middle = (p + z2 / (2.0 * n)) / shrink;
    let half = Z * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt() / shrink;
    Estimate { value: p, low: (middle - half).clamp(0.0, p), high: (middle + half).clamp(p, 1.0) }
}

/// The second share less the first, each (hits, n), by Newcombe's hybrid score interval (R. G. Newcombe 1998, method
/// 10). Where either is of nothing, the whole range.
pub fn difference(first: (u64, u64), second: (u64, u64)) -> Estimate {
    let (a, b) = (share(first.0, first.1), share(second.0, second.1));
    let value = b.value - a.value;
    if first.1 == 0 || second.1 == 0 {
        return Estimate { value: 0.0, low: -1.0, high: 1.0 };
    }
    let low = value - ((b.value - b.low).powi(2) + (a.high - a.value).powi(2)).sqrt();
    let high = value + ((b.high - b.value).powi(2) + (a.value - a.low).powi(2)).sqrt();
    Estimate { value, low: low.max(-1.0), high: high.min(1.0) }
}

/// Count, mean and sum of squared deviations, added to one by one (B. P. Welford 1962).
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Moments {
    /// How many.
    pub n: u64,
    /// Their mean.
    pub mean: f64,
    /// Sum of squared deviations from it.
    pub squares: f64,
}

impl Moments {
    /// Adds a number; one that is not finite is passed over.
    pub fn push(&mut self, x: f64) {
        if x.is_finite() {
            self.n += 1;
            let off = x - self.mean;
            self.mean += off / self.n as f64;
            self.squares += off * (x - self.mean);
        }
    }

    /// The variance of the mean; none below two numbers.
    fn error(&self) -> Option<f64> {
        (self.n > 1).then(|| self.squares / (self.n - 1) as f64 / self.n as f64)
    }
}

/// The second mean less the first, with Welch's interval: neither variances nor counts need be equal. None where either
/// has fewer than two numbers.
pub fn mean_difference(first: &Moments, second: &Moments) -> Option<Estimate> {
    let (a, b) = (first.error()?, second.error()?);
    let value = second.mean - first.mean;
    if a + b == 0.0 {
        return Some(Estimate { value, low: value, high: value });
    }
    // Welch and Satterthwaite's degrees of freedom.
    let freedom = (a + b).powi(2) / (a * a / (first.n - 1) as f64 + b * b / (second.n - 1) as f64);
    let half = quantile(freedom) * (a + b).sqrt();
    Some(Estimate { value, low: value - half, high: value + half })
}

/// The 97.5 % quantile of Student's t: exact for one and two degrees of freedom, else Cornish and Fisher's expansion
/// about the normal one, whose error is below 1 % from three degrees on and falls with their fifth power.
fn quantile(freedom: f64) -> f64 {
    if freedom < 1.5 {
        return 12.706_204_736;
    }
    if freedom < 2.5 {
        return 4.302_652_730;
    }
    let (z, v) = (Z, freedom);
    let terms = [
        (z.powi(3) + z) / 4.0,
        (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
        (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
        (79.0 * z.powi(9) + 776.0 * z.powi(7) + 1482.0 * z.powi(5) - 1920.0 * z.powi(3) - 945.0 * z) / 92160.0,
    ];
    terms.iter().zip(1..).fold(z, |sum, (term, power)| sum + term / v.powi(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64, off: f64) {
        assert!((found - expected).abs() < off, "{found}, not {expected}");
    }

    #[test]
    fn wilson_as_published() {
        // R. G. Newcombe 1998, two-sided intervals for the single proportion, method 3.
        for (hits, n, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let found = share(hits, n);
            near(found.low, low, 5e-5);
            near(found.high, high, 5e-5);
        }
        assert_eq!(share(20, 20).high, 1.0);
        assert_eq!(share(0, 0), Estimate { value: 0.0, low: 0.0, high: 1.0 });
        assert!(share(7, 5).value == 1.0, "more hits than there were are all");
    }

    #[test]
    fn newcombe_as_published() {
        // Newcombe 1998 (interval estimation for the difference), method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/20.
        for (second, first, low, high) in
            [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)]
        {
            let found = difference(first, second);
            near(found.low, low, 5e-5);
            near(found.high, high, 5e-5);
        }
        assert_eq!(difference((0, 0), (3, 4)), Estimate { value: 0.0, low: -1.0, high: 1.0 });
    }

    #[test]
    fn means_as_students_t_has_them() {
        // Tabled quantiles.
        for (freedom, expected) in [(1.0, 12.706), (2.0, 4.303), (3.0, 3.182), (5.0, 2.571), (10.0, 2.228), (60.0, 2.0)]
        {
            near(quantile(freedom), expected, 0.01 * expected);
        }
        near(quantile(1e9), Z, 1e-6);
        let moments = |values: &[f64]| {
            let mut moments = Moments::default();
            values.iter().for_each(|value| moments.push(*value));
            moments
        };
        let a = moments(&[1.0, 2.0, 3.0, 4.0, 5.0, f64::NAN]);
        assert_eq!((a.n, a.mean, a.squares), (5, 3.0, 10.0));
        let b = moments(&[3.0, 4.0, 5.0, 6.0, 7.0]);
        // Both variances 2.5, 8 degrees of freedom: 2 ± 2.306·sqrt(2.5/5 + 2.5/5).
        let found = mean_difference(&a, &b).unwrap();
        near(found.value, 2.0, 1e-12);
        near(found.high, 2.0 + 2.306, 2e-3);
        near(found.low, 2.0 - 2.306, 2e-3);
        assert!(mean_difference(&a, &moments(&[1.0])).is_none());
        assert_eq!(mean_difference(&moments(&[1.0; 3]), &moments(&[2.0; 3])).unwrap().low, 1.0);
    }
}
