//! The drawings: each measurement under its roofline, and bytes a second over size. Drawn with colours that stand for
//! words of the page's style, which follows light and dark.

use plotters::coord::combinators::LogCoord;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::super::row::{Kind, Row};

const WIDTH: u32 = 760;
const HEIGHT: u32 = 380;
/// Levels closer than this have no room for a line of text between them.
const NEAR: f64 = 1.8;
/// Each stands for a name in `bench.css`.
const INK: RGBColor = RGBColor(1, 1, 1);
const SOFT: RGBColor = RGBColor(2, 2, 2);
const GRID: RGBColor = RGBColor(3, 3, 3);
const NAMES: [(RGBColor, &str); 3] = [(INK, "ink"), (SOFT, "soft"), (GRID, "line")];

/// What the colours of points tell apart: words that an op's name begins with.
pub const FAMILIES: [(&str, &[&str]); 6] = [
    ("qmatmul", &["qmatmul_f", "qmatmul_b", "qmatmul_q", "qmatmul_n"]),
    ("qmatmul_t", &["qmatmul_t"]),
    ("lora", &["lora"]),
    ("attention", &["attention"]),
    ("cosine_topk", &["cosine_topk", "topk"]),
    ("others", &[""]),
];

/// The number of an op's family.
pub fn family(op: &str) -> usize {
    let of = |words: &[&str]| words.iter().any(|word| op.starts_with(word));
    // `qmatmul_t_q4` is the longer word's, and so comes first.
    if of(FAMILIES[1].1) {
        return 1;
    }
    FAMILIES.iter().position(|(_, words)| of(words)).unwrap_or(FAMILIES.len() - 1)
}

fn color(family: usize) -> RGBColor {
    RGBColor(10 + family as u8, 0, 10)
}

/// Operations a byte and operations a second of each kernel, and the device's limits. None without both.
pub fn roofline(rows: &[&Row]) -> Option<String> {
    let memory = memory(rows)?;
    let mut peaks: Vec<(f64, &str)> = rows
        .iter()
        .filter(|row| row.kind == Kind::Roofline)
        .filter_map(|row| Some((1e3 * row.tflop_per_s?, row.act.as_deref().unwrap_or("f32"))))
        .filter(|(peak, _)| *peak > 0.0)
        .collect();
    peaks.sort_by(|a, b| a.0.total_cmp(&b.0));
    let points: Vec<(f64, f64, usize)> = rows
        .iter()
        .filter(|row| row.kind == Kind::Kernel)
        .filter_map(|row| {
            let (flops, bytes, speed) = (row.flops? as f64, row.bytes? as f64, 1e3 * row.tflop_per_s?);
            (flops > 0.0 && bytes > 0.0 && speed > 0.0).then(|| (flops / bytes, speed, family(&row.op)))
        })
        .collect();
    let peak = peaks.iter().map(|(peak, _)| *peak).fold(0.0, f64::max);
    if points.is_empty() || peak <= 0.0 || memory <= 0.0 {
        return None;
    }
    // Right of the last knee there is room for the names of the levels, which the slope would cross.
    let xs = points.iter().map(|p| p.0).chain([20.0 * peak / memory]);
    let (left, right) = widened(xs);
    // Above the highest line there is room for its name.
    let (low, high) = widened(points.iter().map(|p| p.1).chain([NEAR * peak]));
    let mut svg = String::new();
    draw(&mut svg, (left, right), (low, high), "operations a byte", "GFLOP/s", &|chart| {
        let roof = |x: f64, peak: f64| (x, (x * memory).min(peak));
        for (i, (peak, act)) in peaks.iter().enumerate() {
            let knee = (peak / memory).clamp(left, right);
            let line = [roof(left.max(low / memory), *peak), roof(knee, *peak), roof(right, *peak)];
            chart.draw_series(LineSeries::new(line, INK.stroke_width(2)))?;
            // Above its line, or below where the next line or the drawing's edge is near.
            let above = peaks.get(i + 1).map_or(high, |next| next.0);
            let side = if above / peak < NEAR { VPos::Top } else { VPos::Bottom };
            let style = ("sans-serif", 12).into_font().color(&SOFT).pos(Pos::new(HPos::Right, side));
            let said = format!(" {act} {} GFLOP/s ", super::number(*peak));
            chart.draw_series([Text::new(said, (right, *peak), style)])?;
        }
        for &(x, y, family) in &points {
            chart.draw_series([Circle::new((x, y), 4, color(family).filled())])?;
        }
        Ok(())
    })?;
    let label =
        format!("{} kernels under the measured roofline of {memory:.0} GB/s and {peak:.0} GFLOP/s", points.len());
    Some(themed(&svg, &label))
}

/// Bytes a second of what moves them fastest, a copy, reading or an update; none where no copy was measured.
fn memory(rows: &[&Row]) -> Option<f64> {
    let limits = || rows.iter().filter(|row| row.kind == Kind::Roofline && row.gb_per_s.is_some());
    limits().find(|row| row.kernel == "copy")?;
    limits().filter_map(|row| row.gb_per_s).reduce(f64::max)
}

/// Bytes a second over the least bytes of each kernel that moves more than it computes, and memory's.
pub fn bandwidth(rows: &[&Row]) -> Option<String> {
    let memory = memory(rows)?;
    let points: Vec<(f64, f64, usize)> = rows
        .iter()
        .filter(|row| row.kind == Kind::Kernel && row.bound.as_deref() == Some("memory"))
        .filter_map(|row| Some((row.bytes? as f64 / 1e6, row.gb_per_s?, family(&row.op))))
        .filter(|(x, y, _)| *x > 0.0 && *y > 0.0)
        .collect();
    if points.is_empty() || memory <= 0.0 {
        return None;
    }
    let (left, right) = widened(points.iter().map(|p| p.0));
    let (low, high) = widened(points.iter().map(|p| p.1).chain([memory]));
    let mut svg = String::new();
    draw(&mut svg, (left, right), (low, high), "least megabytes of a launch", "GB/s", &|chart| {
        chart.draw_series(LineSeries::new([(left, memory), (right, memory)], INK.stroke_width(2)))?;
        for &(x, y, family) in &points {
            chart.draw_series([Circle::new((x, y), 4, color(family).filled())])?;
        }
        Ok(())
    })?;
    let label = format!(
        "bytes a second of {} kernels that wait for memory, beside the device's {memory:.0} GB/s",
        points.len()
    );
    Some(themed(&svg, &label))
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<LogCoord<f64>, LogCoord<f64>>>;
type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

/// Axes with powers of ten, and what `fill` puts between them. Drawing to a string fails only by a fault of ours: then
/// there is no drawing.
fn draw(
    svg: &mut String,
    (left, right): (f64, f64),
    (low, high): (f64, f64),
    x_name: &str,
    y_name: &str,
    fill: &dyn Fn(&mut Chart<'_, '_>) -> Drawn,
) -> Option<()> {
    let mut work = || -> Drawn {
        let area = SVGBackend::with_string(svg, (WIDTH, HEIGHT)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(20)
            .x_label_area_size(46)
            .y_label_area_size(64)
            .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())?;
        let text = |size: u32| ("sans-serif", size).into_font().color(&SOFT);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID.stroke_width(1))
            .axis_style(SOFT)
            .x_desc(x_name)
            .y_desc(y_name)
            .label_style(text(13))
            .axis_desc_style(text(13))
            .x_label_formatter(&tick)
            .y_label_formatter(&tick)
            .draw()?;
        fill(&mut chart)?;
        area.present()
    };
    match work() {
        Ok(()) => Some(()),
        Err(error) => {
            log::warn!("a drawing is left out: {error}");
            None
        }
    }
}

fn tick(value: &f64) -> String {
    match *value {
        v if v >= 0.999 => format!("{v:.0}"),
        v => format!("{v}"),
    }
}

/// Whole powers of ten round the values, at least one between them.
fn widened(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (mut low, mut high) = (f64::INFINITY, 0.0f64);
    for value in values {
        (low, high) = (low.min(value), high.max(value));
    }
    // What a file claims may be beyond any drawing.
    let power = |exponent: f64| 10f64.powf(exponent.clamp(-12.0, 15.0));
    let (low, high) = (low.log10().floor(), (1.02 * high).log10().ceil());
    (power(low), power(high.max(low + 1.0)))
}

/// The drawing with words of the page's style in the place of its colours.
fn themed(svg: &str, label: &str) -> String {
    let mut svg = svg.to_string();
    let families = (0..FAMILIES.len()).map(|i| (color(i), format!("f{i}")));
    let names = NAMES.iter().map(|(color, name)| (*color, name.to_string())).chain(families);
    for (RGBColor(r, g, b), name) in names {
        for what in ["fill", "stroke"] {
            let from = format!("{what}=\"#{r:02X}{g:02X}{b:02X}\"");
            svg = svg.replace(&from, &format!("style=\"{what}:var(--{name})\""));
        }
    }
    let size = format!("width=\"{WIDTH}\" height=\"{HEIGHT}\" ");
    let label = format!("class=\"chart\" role=\"img\" aria-label=\"{}\" ", super::html::escape(label));
    svg.replacen(&size, &label, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        let roof = Row { kind: Kind::Roofline, kernel: "copy".into(), gb_per_s: Some(100.0), ..Row::default() };
        let peak = Row { kernel: "x".into(), gb_per_s: None, tflop_per_s: Some(2.0), ..roof.clone() };
        let kernel = Row {
            op: "qmatmul_q4".into(),
            kernel: "qmatmul_q4_naive".into(),
            flops: Some(1000),
            bytes: Some(500),
            gb_per_s: Some(50.0),
            tflop_per_s: Some(0.1),
            bound: Some("memory".into()),
            ..Row::default()
        };
        vec![roof, peak, kernel]
    }

    #[test]
    fn drawings_take_their_colours_from_the_page() {
        let rows = rows();
        let rows: Vec<&Row> = rows.iter().collect();
        for svg in [roofline(&rows).unwrap(), bandwidth(&rows).unwrap()] {
            assert!(svg.starts_with("<svg class=\"chart\"") && svg.contains("style=\"fill:var(--f0)\""), "{svg}");
            assert!(svg.contains("style=\"stroke:var(--ink)\"") && svg.contains("GB/s") | svg.contains("GFLOP/s"));
            assert_eq!(svg.contains("f32 2000 GFLOP/s"), svg.contains("operations a byte"), "a level has its name");
            assert!(!svg.contains("#0") && !svg.contains("http://") | svg.contains("http://www.w3.org/2000/svg"));
        }
        assert!(roofline(&rows[1..]).is_none(), "without a copy there is no roof");
    }

    #[test]
    fn claims_beyond_any_drawing_do_no_harm() {
        let mut wild = rows();
        wild[2].flops = Some(u64::MAX);
        wild[2].bytes = Some(1);
        wild[2].gb_per_s = Some(1e300);
        wild[2].tflop_per_s = Some(1e-300);
        let wild: Vec<&Row> = wild.iter().collect();
        let _ = (roofline(&wild), bandwidth(&wild));
    }

    #[test]
    fn families_are_told_apart() {
        let names: Vec<_> =
            ["qmatmul_q4", "qmatmul_t_q4", "lora_shrink_f32", "topk_merge_f32", "add_f32"].map(family).into();
        assert_eq!(names, [0, 1, 2, 4, 5]);
    }
}
