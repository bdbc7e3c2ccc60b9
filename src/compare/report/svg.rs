//! Drawings: a bar with its interval, and the curve of losses. Colours are the page's, by class.

use std::fmt::Write as _;

use super::super::stats::Interval;

/// A bar from 0 to the mean and a line over the interval, of values from 0 to `most`; it stretches to its place.
pub fn bar(interval: Interval, most: f64, class: &str, label: &str) -> String {
    let x = |value: f64| (1000.0 * value / most.max(1e-9)).clamp(0.0, 1000.0);
    let (mean, low, high) = (x(interval.mean), x(interval.low), x(interval.high));
    format!(
        "<svg class=\"bar {class}\" viewBox=\"0 0 1000 16\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"{label}\"><rect class=\"track\" width=\"1000\" height=\"16\"/>\
         <rect class=\"mean\" width=\"{mean:.1}\" height=\"16\"/>\
         <path class=\"span\" d=\"M{low:.1} 8H{high:.1}M{low:.1} 4V12M{high:.1} 4V12\"/></svg>"
    )
}

/// Losses over steps: each step's and their running mean. Empty without two of them.
pub fn curve(losses: &[f64]) -> String {
    const WIDTH: f64 = 640.0;
    const HEIGHT: f64 = 200.0;
    const LEFT: f64 = 34.0;
    const BOTTOM: f64 = 24.0;
    const TOP: f64 = 8.0;
    const RIGHT: f64 = 8.0;
    if losses.len() < 2 {
        return String::new();
    }
    let high = losses.iter().copied().fold(0.0, f64::max).max(1e-9) * 1.05;
    let x = |i: usize| LEFT + (WIDTH - LEFT - RIGHT) * i as f64 / (losses.len() - 1) as f64;
    let y = |loss: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - loss / high);
    let path = |values: &mut dyn Iterator<Item = f64>| {
        let mut path = String::new();
        for (i, loss) in values.enumerate() {
            let _ = write!(path, "{}{:.1} {:.1}", if i == 0 { 'M' } else { 'L' }, x(i), y(loss));
        }
        path
    };
    let mut mean = losses[0];
    let mut smooth = losses.iter().map(|loss| {
        mean += 0.15 * (loss - mean);
        mean
    });
    let (raw, smooth) = (path(&mut losses.iter().copied()), path(&mut smooth));
    let mut svg = format!(
        "<svg class=\"curve\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"Training loss from {:.2} to \
         {:.2} over {} steps\">",
        losses[0],
        losses[losses.len() - 1],
        losses.len()
    );
    let unit = 10f64.powf((high / 4.0).log10().floor());
    let unit = [1.0, 2.0, 5.0, 10.0].map(|m| m * unit).into_iter().find(|u| high / u <= 5.0).unwrap_or(high);
    let digits = if unit < 0.1 {
        2
    } else if unit < 1.0 {
        1
    } else {
        0
    };
    let mut tick = 0.0;
    while tick <= high {
        let at = y(tick);
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">\
             {tick:.digits$}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0
        );
        tick += unit;
    }
    let _ = write!(
        svg,
        "<text x=\"{LEFT}\" y=\"{0}\">step 1</text><text x=\"{1}\" y=\"{0}\" text-anchor=\"end\">{2}</text>\
         <path class=\"raw\" d=\"{raw}\"/><path class=\"smooth\" d=\"{smooth}\"/></svg>",
        HEIGHT - 6.0,
        WIDTH - RIGHT,
        losses.len()
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_shows_mean_and_interval() {
        let bar = bar(Interval { mean: 0.5, low: 0.25, high: 1.5 }, 1.0, "base", "half");
        assert!(bar.contains("width=\"500.0\"") && bar.contains("M250.0 8H1000.0"), "{bar}");
    }

    #[test]
    fn a_curve_needs_two_points_and_stays_within_its_box() {
        assert!(curve(&[1.0]).is_empty());
        let svg = curve(&[3.0, 2.0, 0.0]);
        assert!(svg.contains("M34.0 ") && svg.contains("L632.0 176.0"), "{svg}");
        assert!(curve(&[0.0, 0.0]).ends_with("</svg>"), "a loss of zero is no division by it");
    }
}
