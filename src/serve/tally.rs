//! What was counted of an arm, with intervals, and the bounds beyond which it is rolled back.
//!
//! A bound is judged after every answer, so an interval of 95 % would sooner or later condemn a good arm. Judgement uses
//! 99.9 % (z = 3.29) and a least count; what is shown to people are intervals of 95 %. Shares have Wilson's interval,
//! their differences Newcombe's; seconds are lognormal: their logarithms have Student's, and Welch's for a ratio.

use serde_json::{json, Value};

/// Two-sided 95 % of a normal distribution.
pub const SHOWN: f64 = 1.96;
/// Two-sided 99.9 %.
pub const JUDGED: f64 = 3.29;

/// A mean with its spread, updated one value at a time (Welford).
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    /// Values.
    pub n: u64,
    mean: f64,
    squares: f64,
}

/// What was counted of an arm.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Answers given, good and failed.
    pub answers: u64,
    /// Those that failed by the server's fault.
    pub failed: u64,
    /// Natural logarithm of their seconds, of those that did not fail.
    pub seconds: Moments,
    /// Good ratings.
    pub up: u64,
    /// Bad ratings.
    pub down: u64,
    /// Answers that were only recorded.
    pub shadow_answers: u64,
    /// Those of them that failed.
    pub shadow_failed: u64,
    /// Natural logarithm of their seconds.
    pub shadow_seconds: Moments,
}

/// Beyond these an arm is rolled back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// Nothing is judged before so many answers, or ratings, of each arm compared; 5 at least.
    pub least: u64,
    /// Share of answers that fail.
    pub errors: f64,
    /// Geometric mean of the seconds of an answer, over the champion's.
    pub latency: f64,
    /// How far the share of good ratings may fall below the champion's.
    pub feedback: f64,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { least: 30, errors: 0.05, latency: 2.0, feedback: 0.1 }
    }
}

impl Moments {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.n += 1;
        let before = value - self.mean;
        self.mean += before / self.n as f64;
        self.squares += before * (value - self.mean);
    }

    /// Variance of the mean; none below two values.
    fn of_mean(&self) -> Option<f64> {
        (self.n > 1).then(|| self.squares / (self.n - 1) as f64 / self.n as f64)
    }

    /// The mean and its interval; none below three values.
    fn interval(&self, z: f64) -> Option<[f64; 3]> {
        let half = student(z, self.n.saturating_sub(1) as f64)? * self.of_mean()?.sqrt();
        Some([self.mean, self.mean - half, self.mean + half])
    }
}

/// Student's quantile for the normal one `z`: Abramowitz and Stegun 26.7.5. At 95 % it is 3 % short for 2 degrees of
/// freedom and exact to 1 % from 3 on, at 99.9 % 5 % short for 4. None below 2.
fn student(z: f64, freedom: f64) -> Option<f64> {
    let terms = [
        (z.powi(3) + z) / 4.0,
        (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
        (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
    ];
    (freedom >= 2.0).then(|| (1..).zip(terms).map(|(power, term)| term / freedom.powi(power)).sum::<f64>() + z)
}

/// Wilson's interval of a share: low, high.
pub fn wilson(hits: u64, n: u64, z: f64) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, p) = (n as f64, hits as f64 / n as f64);
    let scale = 1.0 / (1.0 + z * z / n);
    let middle = scale * (p + z * z / (2.0 * n));
    let half = scale * z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    // Of none and of all one end is the share itself, which rounding would miss.
    let low = if hits == 0 { 0.0 } else { (middle - half).max(0.0) };
    (low, if p == 1.0 { 1.0 } else { (middle + half).min(1.0) })
}

/// Newcombe's interval of the difference of two shares, the first less the second: low, high.
pub fn newcombe(first: (u64, u64), second: (u64, u64), z: f64) -> (f64, f64) {
    let share = |(hits, n): (u64, u64)| if n == 0 { 0.5 } else { hits as f64 / n as f64 };
    let (p, q) = (share(first), share(second));
    let ((low1, high1), (low2, high2)) = (wilson(first.0, first.1, z), wilson(second.0, second.1, z));
    let difference = p - q;
    (difference - (p - low1).hypot(high2 - q), difference + (high1 - p).hypot(q - low2))
}

impl Tally {
    /// Counts an answer.
    pub fn answer(&mut self, failed: bool, seconds: f64) {
        self.answers += 1;
        match failed {
            true => self.failed += 1,
            false => self.seconds.add(seconds.max(1e-6).ln()),
        }
    }

    /// Counts an answer that was only recorded.
    pub fn shadow(&mut self, failed: bool, seconds: f64) {
        self.shadow_answers += 1;
        match failed {
            true => self.shadow_failed += 1,
            false => self.shadow_seconds.add(seconds.max(1e-6).ln()),
        }
    }

    /// Counts an answer's rating; `before` is the one that the same answer had, which it takes the place of.
    pub fn rating(&mut self, before: Option<bool>, good: bool) {
        match before {
            Some(true) => self.up = self.up.saturating_sub(1),
            Some(false) => self.down = self.down.saturating_sub(1),
            None => {}
        }
        match good {
            true => self.up += 1,
            false => self.down += 1,
        }
    }

    /// Ratio of the seconds of this arm over another's: the estimate and its interval.
    fn ratio(&self, other: &Tally, z: f64) -> Option<[f64; 3]> {
        let (mine, others) = (self.seconds.of_mean()?, other.seconds.of_mean()?);
        let share = |variance: f64, n: u64| variance * variance / (n - 1) as f64;
        // Welch and Satterthwaite; of no spread at all as many as there are.
        let spread = share(mine, self.seconds.n) + share(others, other.seconds.n);
        let freedom = match spread > 0.0 {
            true => (mine + others).powi(2) / spread,
            false => (self.seconds.n + other.seconds.n - 2) as f64,
        };
        let half = student(z, freedom)? * (mine + others).sqrt();
        let difference = self.seconds.mean - other.seconds.mean;
        Some([difference, difference - half, difference + half].map(f64::exp))
    }

    /// What holds of this arm, with intervals of 95 %; compared with its champion where it has one.
    pub fn status(&self, champion: Option<&Tally>) -> Value {
        let rate = |hits: u64, n: u64| match n {
            0 => json!(null),
            _ => {
                let (low, high) = wilson(hits, n, SHOWN);
                json!({"value": hits as f64 / n as f64, "low": low, "high": high, "n": n})
            }
        };
        let seconds = |moments: &Moments| match moments.interval(SHOWN) {
            None => json!(null),
            Some(ln) => json!({"value": ln[0].exp(), "low": ln[1].exp(), "high": ln[2].exp(), "n": moments.n}),
        };
        let ratio = champion.and_then(|champion| self.ratio(champion, SHOWN));
        let difference = champion.filter(|champion| self.up + self.down > 0 && champion.up + champion.down > 0);
        let difference = difference.map(|champion| {
            let (mine, other) = ((self.up, self.up + self.down), (champion.up, champion.up + champion.down));
            let (low, high) = newcombe(mine, other, SHOWN);
            let share = |(hits, n): (u64, u64)| hits as f64 / n as f64;
            json!({"value": share(mine) - share(other), "low": low, "high": high})
        });
        json!({
            "requests": self.answers,
            "errors": rate(self.failed, self.answers),
            "seconds": seconds(&self.seconds),
            "seconds_ratio": ratio.map(|r| json!({"value": r[0], "low": r[1], "high": r[2]})),
            "feedback": rate(self.up, self.up + self.down),
            "feedback_difference": difference,
            "shadow_requests": self.shadow_answers,
            "shadow_errors": rate(self.shadow_failed, self.shadow_answers),
            "shadow_seconds": seconds(&self.shadow_seconds),
        })
    }
}

impl Bounds {
    /// Whether an arm is to be rolled back: the bound it broke, and what was found.
    pub fn judge(&self, champion: &Tally, arm: &Tally) -> Option<(&'static str, String)> {
        let (failed, n) = (arm.failed + arm.shadow_failed, arm.answers + arm.shadow_answers);
        let others = champion.failed as f64 / champion.answers.max(1) as f64;
        let (low, _) = wilson(failed, n, JUDGED);
        // Where the champion fails as often, the arm is not what is wrong.
        if n >= self.least && low > self.errors.max(others) {
            let rate = percent(failed as f64 / n as f64);
            let bound = percent(self.errors);
            let what = format!("{failed} of {n} answers failed ({rate}; at least {}), {bound} may", percent(low));
            return Some(("errors", what));
        }
        if arm.seconds.n >= self.least && champion.seconds.n >= self.least {
            if let Some([ratio, low, _]) = arm.ratio(champion, JUDGED).filter(|ratio| ratio[1] > self.latency) {
                let what = format!(
                    "an answer takes {ratio:.2} times as long as the champion's (at least {low:.2}), {:.2} may be",
                    self.latency
                );
                return Some(("latency", what));
            }
        }
        let (mine, other) = ((arm.up, arm.up + arm.down), (champion.up, champion.up + champion.down));
        if mine.1 >= self.least && other.1 >= self.least {
            let (_, high) = newcombe(mine, other, JUDGED);
            if high < -self.feedback {
                let what = format!(
                    "{} of {} ratings are good, {} of {} of the champion's (at least {} points fewer), {} may be",
                    mine.0,
                    mine.1,
                    other.0,
                    other.1,
                    percent(-high),
                    percent(self.feedback)
                );
                return Some(("feedback", what));
            }
        }
        None
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_books() {
        // Newcombe (1998), table I of each paper: 15/148 by the score method; 56/70 less 48/80 by method 10.
        let (low, high) = wilson(15, 148, SHOWN);
        assert!((low - 0.0624).abs() < 1e-4 && (high - 0.1605).abs() < 1e-4, "{low} {high}");
        for n in 1..200 {
            assert!(wilson(0, n, SHOWN).0 == 0.0 && wilson(n, n, SHOWN).1 == 1.0, "the share itself is within");
        }
        let (low, high) = newcombe((56, 70), (48, 80), SHOWN);
        assert!((low - 0.0524).abs() < 1e-4 && (high - 0.3339).abs() < 1e-4, "{low} {high}");
        assert_eq!(wilson(0, 0, SHOWN), (0.0, 1.0));
        // Student's table: 97.5 % for 3, 10 and 30 degrees of freedom, 99.95 % for 10 and 30.
        for (z, freedom, table) in [
            (SHOWN, 3.0, 3.182),
            (SHOWN, 10.0, 2.228),
            (SHOWN, 30.0, 2.042),
            (JUDGED, 10.0, 4.587),
            (JUDGED, 30.0, 3.646),
        ] {
            let found = student(z, freedom).unwrap();
            assert!((found / table - 1.0).abs() < 0.01, "{freedom}: {found} is not {table}");
        }
        // Logarithms of 1, 2 and 4: mean ln 2, standard deviation ln 2, so ln 2 ± 4.30·ln 2/√3, 3 % short.
        let mut seconds = Moments::default();
        [1.0f64, 2.0, 4.0].iter().for_each(|x| seconds.add(x.ln()));
        let [middle, low, _] = seconds.interval(SHOWN).unwrap();
        let half = 4.303 * 2f64.ln() / 3f64.sqrt();
        assert!((middle - 2f64.ln()).abs() < 1e-12 && ((middle - low) / half - 0.97).abs() < 0.01, "{low}");
        // Welch: the logarithms' means differ by ln 2, variances ln²2 of 3 each, four degrees of freedom: 2.776.
        let (mut one, mut two) = (Tally::default(), Tally::default());
        [1.0, 2.0, 4.0].iter().for_each(|x| one.answer(false, *x));
        [2.0, 4.0, 8.0].iter().for_each(|x| two.answer(false, *x));
        let [ratio, low, high] = two.ratio(&one, SHOWN).unwrap();
        let half = 2.776 * 2f64.ln() * (2.0f64 / 3.0).sqrt();
        assert!((ratio - 2.0).abs() < 1e-12 && ((ratio / low).ln() / half - 1.0).abs() < 0.01, "{ratio} {low} {high}");
    }

    #[test]
    fn an_arm_is_judged_by_what_is_certain() {
        let bounds = Bounds::default();
        let tally = |answers: u64, failed: u64, seconds: f64, up: u64, down: u64| {
            let mut tally = Tally { up, down, ..Tally::default() };
            for i in 0..answers {
                tally.answer(i < failed, seconds * if i % 2 == 0 { 1.1 } else { 0.9 });
            }
            tally
        };
        let good = tally(200, 1, 0.2, 90, 10);
        let judge = |arm: &Tally| bounds.judge(&good, arm).map(|(bound, _)| bound);
        assert_eq!(judge(&tally(200, 3, 0.25, 85, 15)), None);
        assert_eq!(judge(&tally(29, 29, 0.2, 0, 0)), None, "too few");
        assert_eq!(judge(&tally(30, 30, 0.2, 0, 0)), Some("errors"));
        assert_eq!(judge(&tally(40, 3, 0.2, 0, 0)), None, "may be chance");
        assert_eq!(judge(&tally(60, 0, 0.6, 0, 0)), Some("latency"));
        assert_eq!(judge(&tally(60, 0, 0.2, 20, 40)), Some("feedback"));
        let ill = tally(200, 150, 0.2, 0, 0);
        assert_eq!(bounds.judge(&ill, &tally(200, 150, 0.2, 0, 0)), None, "both fail: it is not the arm");
    }
}
