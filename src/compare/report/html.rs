//! The page: the verdict, what speaks for it and what would change it, then every figure behind it.

use std::fmt::Write as _;

use super::super::outcome::{ArmOutcome, Outcome, Summary, METRICS};
use super::super::recommend::{duration, percent, LEVEL};
use super::super::stats::Interval;
use super::{escape, examples, svg};

const CSS: &str = include_str!("page.css");

/// A share in percent, without its sign.
fn share(value: f64) -> String {
    format!("{:.0}", 100.0 * value)
}

/// A number with its sign, a real minus.
fn signed(value: f64, digits: usize) -> String {
    format!("{}{:.digits$}", if value < 0.0 { "−" } else { "+" }, value.abs())
}

fn bytes(count: u64) -> String {
    match count as f64 {
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}

/// True for the metrics that are losses: less is better, and they are no shares.
fn is_loss(key: &str) -> bool {
    key.ends_with("_nll")
}

fn list(items: &[String]) -> String {
    let items: String = items.iter().map(|item| format!("<li>{}</li>", escape(item))).collect();
    format!("<ul>{items}</ul>")
}

/// The page of an outcome.
pub fn page(outcome: &Outcome) -> String {
    let r = &outcome.recommendation;
    let model = outcome.provenance.first().map_or("", |(_, value)| value.split(',').next().unwrap_or_default());
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">\
         <title>{0}: fine-tune, retrieve, or both?</title><style>{CSS}</style></head><body><main>\
         <header><p class=\"kicker\">Fine-tune, retrieve, or both? {1}, {2} held-out questions</p><h1>{0}</h1>\
         <p class=\"lead\">{3}</p></header>",
        escape(&r.headline),
        escape(model),
        outcome.questions.len(),
        escape(&r.sentence)
    );
    if !outcome.warnings.is_empty() {
        let _ = write!(html, "<aside class=\"warn\"><h3>Before you believe it</h3>{}</aside>", list(&outcome.warnings));
    }
    let _ = write!(
        html,
        "<div class=\"two\"><section><h2>Why</h2>{}</section><section><h2>What would change it</h2>{}</section></div>",
        list(&r.reasons),
        list(&r.would_change)
    );
    html += &arms(outcome);
    html += &kinds(outcome);
    html += &differences(outcome);
    html += &retrieval(outcome);
    html += &training(outcome);
    let places = examples::pick(outcome);
    if !places.is_empty() {
        let _ = write!(
            html,
            "<section><h2>Where the arms differ</h2><p class=\"note\">✓ right and in form, ~ the answer is there but not \
             as asked, ✗ wrong.</p>{}</section>",
            examples::cards(outcome, &places)
        );
    }
    html += &costs(outcome);
    html += "<section><h2>Where it comes from</h2><dl>";
    for (name, value) in &outcome.provenance {
        let _ = write!(html, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value));
    }
    html + "</dl></section></main></body></html>\n"
}

fn head(outcome: &Outcome, first: &str) -> String {
    let cell = |arm: &ArmOutcome| {
        format!("<th scope=\"col\" class=\"{}\"><span class=\"dot\"></span>{}</th>", arm.arm.key(), arm.arm.name())
    };
    let cells: String = outcome.arms.iter().map(cell).collect();
    format!("<thead><tr><th scope=\"col\">{first}</th>{cells}</tr></thead>")
}

/// A row of the table; `best` marks the arms that none is better than.
fn row(name: &str, about: &str, cells: Vec<(String, String)>, best: &[bool]) -> String {
    let mut html = format!("<tr><th scope=\"row\">{name}<small>{about}</small></th>");
    for (i, (value, small)) in cells.into_iter().enumerate() {
        let class = if best.get(i) == Some(&true) { " class=\"best\"" } else { "" };
        let _ = write!(html, "<td{class}>{value}<small>{small}</small></td>");
    }
    html + "</tr>"
}

fn arms(outcome: &Outcome) -> String {
    let mut html = format!(
        "<section><h2>Four arms, the same {} questions</h2><p class=\"note\">Percent, with the 95&nbsp;% interval of a \
         bootstrap below; the best in bold. Losses are nats a token: less is better.</p><div class=\"scroll\"><table>{}\
         <tbody>",
        outcome.questions.len(),
        head(outcome, "")
    );
    for metric in &METRICS {
        if metric.key == "strict" && !outcome.has_form() || metric.key == "reply_nll" && !outcome.has_form() {
            continue;
        }
        let found: Vec<Option<Interval>> = outcome.arms.iter().map(|arm| arm.all.get(metric.key)).collect();
        if found.iter().all(Option::is_none) {
            continue;
        }
        let loss = is_loss(metric.key);
        let means = || found.iter().flatten().map(|i| i.mean);
        let best = if loss { means().fold(f64::INFINITY, f64::min) } else { means().fold(0.0, f64::max) };
        let marks: Vec<bool> =
            found.iter().map(|i| i.is_some_and(|i| (i.mean - best).abs() < 1e-9 && best > 0.0)).collect();
        let cell = |interval: &Option<Interval>| match interval {
            None => ("–".to_string(), String::new()),
            Some(i) if loss => (format!("{:.2}", i.mean), format!("{:.2} to {:.2}", i.low, i.high)),
            Some(i) => (share(i.mean), format!("{} to {}", share(i.low), share(i.high))),
        };
        html += &row(metric.name, metric.about, found.iter().map(cell).collect(), &marks);
    }
    html + "</tbody></table></div></section>"
}

fn kinds(outcome: &Outcome) -> String {
    let form = outcome.has_form();
    let named = |kind: &str| match kind {
        "" => "of no kind".to_string(),
        kind => escape(kind),
    };
    let block = |title: String, of: &dyn Fn(&ArmOutcome) -> Option<Interval>| {
        let mut html = format!("<div><h3>{title}</h3>");
        for arm in &outcome.arms {
            let Some(interval) = of(arm) else { continue };
            let label = format!("{}: {}", arm.arm.name(), percent(interval.mean));
            let _ = write!(
                html,
                "<div class=\"row {}\"><span>{}</span>{}<span><b>{}</b>&nbsp;% <i>{} to {}</i></span></div>",
                arm.arm.key(),
                arm.arm.name(),
                svg::bar(interval, 1.0, arm.arm.key(), &label),
                share(interval.mean),
                share(interval.low),
                share(interval.high)
            );
        }
        html + "</div>"
    };
    let by = |s: &Summary, key: &str| s.get(key);
    let mut html = String::from("<section><h2>By kind of question</h2><p class=\"note\">");
    html += if form { "Right and in the form asked for" } else { "Exact match" };
    html += "; the line is the 95&nbsp;% interval.</p><div class=\"kinds\">";
    if outcome.kinds.len() > 1 {
        for (i, kind) in outcome.kinds.iter().enumerate() {
            let title = format!("{}, {} questions", named(kind), outcome.arms[0].kinds[i].n);
            html += &block(title, &|arm| by(&arm.kinds[i], "strict"));
        }
    } else {
        html += &block(format!("all {} questions", outcome.questions.len()), &|arm| by(&arm.all, "strict"));
    }
    html += &block("all: answer present, in any form".into(), &|arm| by(&arm.all, "answer_present"));
    if form {
        html += &block("all: the form alone".into(), &|arm| by(&arm.all, "form"));
    }
    html + "</div></section>"
}

fn differences(outcome: &Outcome) -> String {
    let mut html = String::from(
        "<section><h2>Differences</h2><p class=\"note\">Percentage points on the same questions, the second arm less the \
         first; p of a permutation test, Holm-corrected over all rows and columns. In bold what chance would hardly \
         explain (p &lt; 0.05).</p><div class=\"scroll\"><table><thead><tr><th scope=\"col\">arms</th>",
    );
    let tested: Vec<&super::super::outcome::Metric> =
        METRICS.iter().filter(|m| outcome.pairs.iter().any(|pair| pair.metric == m.key)).collect();
    for metric in &tested {
        let name = if metric.key == "strict" && !outcome.has_form() { "exact match" } else { metric.name };
        let _ = write!(html, "<th scope=\"col\">{name}</th>");
    }
    html += "</tr></thead><tbody>";
    for (i, a) in outcome.arms.iter().enumerate() {
        for b in &outcome.arms[i + 1..] {
            let mut cells = Vec::new();
            let mut believed = Vec::new();
            for metric in &tested {
                let Some(pair) = outcome.pair(a.arm, b.arm, metric.key) else {
                    cells.push(("–".into(), String::new()));
                    believed.push(false);
                    continue;
                };
                let d = pair.difference;
                let p = if pair.p_holm < 0.001 { "p &lt; 0.001".into() } else { format!("p = {:.3}", pair.p_holm) };
                let range = format!("{} to {}, {p}", signed(100.0 * d.low, 0), signed(100.0 * d.high, 0));
                cells.push((signed(100.0 * d.mean, 0), range));
                believed.push(pair.p_holm < LEVEL);
            }
            html += &row(&format!("{} → {}", a.arm.name(), b.arm.name()), "", cells, &believed);
        }
    }
    html + "</tbody></table></div></section>"
}

fn retrieval(outcome: &Outcome) -> String {
    let (hits, costs) = (outcome.hits, &outcome.costs);
    let mut html = String::from("<section><h2>Retrieval and prompts</h2>");
    if hits.n > 0 {
        let bar = |value: f64, name: &str| {
            let interval = Interval { mean: value, low: value, high: value };
            format!(
                "<div class=\"row rag\"><span>{name}</span>{}<span><b>{}</b>&nbsp;%</span></div>",
                svg::bar(interval, 1.0, "rag", &format!("{name}: {}", percent(value))),
                share(value)
            )
        };
        let _ = write!(
            html,
            "<p>The answer stands in the passages found, of {} in {} documents, for {} questions:</p>{}{}",
            costs.chunks,
            costs.documents,
            hits.n,
            bar(hits.at_1, "in the first"),
            bar(hits.at_k, &format!("in any of {}", hits.k))
        );
    }
    if !outcome.variants.is_empty() {
        let _ = write!(
            html,
            "<p>Base and RAG were asked with the prompt that did best on {} development questions (token F1 of the \
             answer part); the arms with an adapter as they were trained, without examples.</p><div class=\"scroll\">\
             <table><thead><tr><th scope=\"col\">prompt</th><th scope=\"col\">token F1</th><th scope=\"col\">answer \
             present</th><th scope=\"col\">right and in form</th></tr></thead><tbody>",
            outcome.dev
        );
        for v in &outcome.variants {
            let taken = if v.chosen { "taken" } else { "" };
            let name = v.style.name(v.arm);
            let cells =
                vec![(share(v.f1), String::new()), (share(v.present), String::new()), (share(v.strict), String::new())];
            html += &row(&name, taken, cells, &[v.chosen, false, false]);
        }
        html += "</tbody></table></div>";
    }
    html + "</section>"
}

fn training(outcome: &Outcome) -> String {
    let (f, costs) = (&outcome.forgetting, &outcome.costs);
    let text = match f.text.as_str() {
        "bundled" => "a bundled text that has nothing to do with the task".to_string(),
        path => escape(path),
    };
    let limit = match outcome.max_forgetting {
        None => String::new(),
        Some(limit) if outcome.kept() => format!(" {limit} are allowed."),
        Some(limit) => format!(" <strong>{limit} are allowed: the gate is closed.</strong>"),
    };
    format!(
        "<section><h2>Training and forgetting</h2><p class=\"note\">Loss of each of {} steps, {} tokens in all, and its \
         running mean.</p>{}<p>On {text}, {} tokens, the loss goes from {:.3} to {:.3} nats a token: {} ({} to {}).\
         {limit}</p></section>",
        costs.steps,
        costs.train_tokens,
        svg::curve(&outcome.losses),
        f.tokens,
        f.base_nll,
        f.lora_nll,
        signed(f.delta.mean, 3),
        signed(f.delta.low, 3),
        signed(f.delta.high, 3)
    )
}

fn costs(outcome: &Outcome) -> String {
    let costs = &outcome.costs;
    let each = |of: &dyn Fn(&ArmOutcome) -> String| outcome.arms.iter().map(|arm| (of(arm), String::new())).collect();
    let once = |retrieves: &str, adapted: &str, both: &str| {
        ["–", adapted, retrieves, both].into_iter().map(|text| (text.to_string(), String::new())).collect()
    };
    let (index, train) = (duration(costs.index_s), duration(costs.train_s));
    let disk = |extra: u64| bytes(costs.model_bytes + extra);
    let (search, adapter) = (costs.index_bytes + costs.embedder_bytes, costs.adapter_bytes);
    let mut html = format!(
        "<section><h2>What it costs</h2><p class=\"note\">The part of a prompt that all questions share is read once and \
         not in the time of each.</p><div class=\"scroll\"><table>{}<tbody>",
        head(outcome, "")
    );
    html += &row("once", "training, indexing", once(&index, &train, &duration(costs.index_s + costs.train_s)), &[]);
    html += &row("a question", "retrieval, prompt and reply", each(&|arm| duration(arm.seconds())), &[]);
    html += &row(
        "of it retrieval",
        "",
        each(&|arm| match arm.arm.retrieves() {
            true => duration(arm.retrieve_s),
            false => "–".into(),
        }),
        &[],
    );
    html += &row("prompt", "tokens", each(&|arm| format!("{:.0}", arm.prompt_tokens())), &[]);
    html += &row("reply", "tokens a second", each(&|arm| format!("{:.0}", arm.tokens_per_s())), &[]);
    html += &row("memory", "at its peak", each(&|arm| arm.peak_bytes.map_or("–".into(), bytes)), &[]);
    let sizes = [0, adapter, search, search + adapter].map(|extra| (disk(extra), String::new()));
    html += &row("on disk", "model, embedder, index, adapter", sizes.to_vec(), &[]);
    let peak = costs.train_peak_bytes.map_or(String::new(), |peak| format!(", {} of memory at its peak", bytes(peak)));
    let _ = write!(
        html,
        "</tbody></table></div><p class=\"note\">Training: {} numbers, {} steps in {train}{peak}; the adapter takes {}. \
         Index: {} passages of {} documents, {}.</p></section>",
        costs.parameters,
        costs.steps,
        bytes(adapter),
        costs.chunks,
        costs.documents,
        bytes(costs.index_bytes)
    );
    html
}
