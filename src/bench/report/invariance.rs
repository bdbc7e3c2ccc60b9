//! What batch invariance costs: each shape with the kernel that is taken for it, and with the one whose rows do not
//! depend on one another.

use std::fmt::Write as _;

use super::super::row::Row;
use super::html::escape;
use super::markdown::line;
use super::time;

/// A shape measured with and without.
struct Pair<'a> {
    row: &'a Row,
    free: &'a str,
    free_us: f64,
    median_us: f64,
    cost: f64,
}

/// Pairs in the order they came; software's times rank nothing and have none.
fn pairs<'a>(rows: &[&'a Row]) -> Vec<Pair<'a>> {
    let pair = |row: &&'a Row| {
        let free = row.free_kernel.as_deref()?;
        Some(Pair { row, free, free_us: row.free_us?, median_us: row.median_us?, cost: row.invariant_cost? })
    };
    rows.iter().filter(|row| !row.software).filter_map(pair).collect()
}

/// What holds for all of them, in a sentence.
fn sum_up(pairs: &[Pair<'_>]) -> String {
    let same = pairs.iter().filter(|pair| pair.free == pair.row.kernel).count();
    let dearest = pairs.iter().max_by(|a, b| a.cost.total_cmp(&b.cost)).expect("there are pairs");
    let one_of = match dearest.row.kernel == dearest.free {
        true => String::new(),
        false => format!(" At most it costs {:.2} times, {} on {}.", dearest.cost, dearest.row.op, dearest.row.case),
    };
    format!("Of {} shapes {same} take the same kernel either way.{one_of}", pairs.len())
}

/// A section of the Markdown; empty where nothing was measured so.
pub fn markdown(rows: &[&Row]) -> String {
    let pairs = pairs(rows);
    if pairs.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "\n### What batch invariance costs\n\n{}\n\n| op | case | any batch | | batch-invariant | | times |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n",
        line(&sum_up(&pairs))
    );
    for Pair { row, free, free_us, median_us, cost } in &pairs {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {cost:.2} |",
            line(&row.op),
            line(&row.case),
            line(free),
            time(*free_us),
            line(&row.kernel),
            time(*median_us)
        );
    }
    out
}

/// A section of the page; empty where nothing was measured so.
pub fn html(rows: &[&Row]) -> String {
    let pairs = pairs(rows);
    if pairs.is_empty() {
        return String::new();
    }
    let mut html = format!(
        "<section><h2>What batch invariance costs</h2><p class=\"note\">The kernel that is taken for a shape, and the \
         one whose rows have the same bits in every batch. {}</p><div class=\"scroll\"><table class=\"pairs\"><thead>\
         <tr><th scope=\"col\">op and case</th><th scope=\"col\">any batch</th><th scope=\"col\">batch-invariant</th>\
         <th scope=\"col\">times</th></tr></thead><tbody>",
        escape(&sum_up(&pairs))
    );
    for Pair { row, free, free_us, median_us, cost } in &pairs {
        let kernel = |stem: &str, us: f64| {
            let variant = stem.strip_prefix(&row.op).unwrap_or(stem).trim_start_matches('_');
            format!("<td>{} <code>{}</code></td>", time(us), escape(variant))
        };
        let with = match *free == row.kernel {
            true => "<td>the same</td>".to_string(),
            false => kernel(&row.kernel, *median_us),
        };
        let _ = write!(
            html,
            "<tr><th scope=\"row\"><code>{}</code><small>{}</small></th>{}{with}<td>{cost:.2}</td></tr>",
            escape(&row.op),
            escape(&row.case),
            kernel(free, *free_us)
        );
    }
    html + "</tbody></table></div></section>"
}
