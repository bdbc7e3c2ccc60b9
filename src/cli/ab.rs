//! `handmill ab`: how the arms of an alias do, from a server that runs or from what one recorded.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::Args;
use handmill::serve::capture;
use handmill::serve::tally::Tally;
use serde_json::{json, Value};

use super::{print_json, read_text, Usage};

/// How long a server may take to answer.
const TIME: Duration = Duration::from_secs(10);
/// Bytes of its answer at most.
const MOST: u64 = 16 << 20;

/// Show how the arms of an alias do: answers, errors, seconds and ratings, with their 95 % intervals
///
/// With --json: aliases: [{alias, shadow, arms: [{model, weight, champion, rolled_back, requests, errors, seconds,
/// seconds_ratio, feedback, feedback_difference, shadow_requests, shadow_errors, shadow_seconds}]}], where each of the
/// figures is {value, low, high} or null, those of one arm with their n. Seconds are geometric means. From a file, which
/// knows nothing of weights and rollbacks, the first arm met is taken for the champion unless --champion names another.
#[derive(Args)]
pub struct Ab {
    #[command(flatten)]
    from: From,
    /// A file with the server's token
    #[arg(long, value_name = "FILE", requires = "url")]
    token_file: Option<PathBuf>,
    /// The arm that others are compared with
    #[arg(long, value_name = "MODEL", requires = "capture")]
    champion: Option<String>,
    /// Print JSON for scripts instead of text for people
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct From {
    /// A server, such as http://127.0.0.1:8080
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// What a server recorded with --capture
    #[arg(long, value_name = "FILE")]
    capture: Option<PathBuf>,
}

impl Ab {
    pub fn run(&self) -> Result<()> {
        let aliases = match (&self.from.url, &self.from.capture) {
            (Some(url), _) => self.ask(url)?,
            (_, Some(path)) => self.count(path)?,
            _ => unreachable!("clap asks for one of the two"),
        };
        if self.json {
            return print_json(&json!({ "aliases": aliases }));
        }
        let aliases = aliases.as_array().cloned().unwrap_or_default();
        if aliases.is_empty() {
            writeln!(io::stdout(), "no alias has answered: see handmill serve --alias")?;
        }
        for alias in &aliases {
            show(alias)?;
        }
        Ok(())
    }

    /// The aliases of a server.
    fn ask(&self, url: &str) -> Result<Value> {
        let Some(rest) = url.strip_prefix("http://") else {
            return Err(
                Usage(format!("--url {url} does not begin with http://: a proxy in front can speak https")).into()
            );
        };
        let host = rest.trim_end_matches('/');
        if host.contains(['/', '\r', '\n', ' ']) {
            return Err(Usage(format!("--url {url} is more than http://HOST:PORT")).into());
        }
        let port = if host.rsplit(']').next().unwrap_or_default().contains(':') { "" } else { ":80" };
        let token = self.token_file.as_deref().map(read_text).transpose()?;
        let token = token.as_deref().and_then(|text| text.lines().map(str::trim).find(|line| !line.is_empty()));
        let token = token.map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
        let say = || format!("cannot ask {url}");
        let address = format!("{host}{port}").to_socket_addrs().with_context(say)?.next().with_context(say)?;
        let mut stream = TcpStream::connect_timeout(&address, TIME).with_context(say)?;
        stream.set_read_timeout(Some(TIME)).with_context(say)?;
        let request = format!("GET /v1/status HTTP/1.0\r\nHost: {host}\r\n{token}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).with_context(say)?;
        let mut answer = Vec::new();
        stream.take(MOST).read_to_end(&mut answer).with_context(say)?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").with_context(say)?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if status == "401" {
            bail!("{url} needs a token: give --token-file");
        }
        let mut object: Value = serde_json::from_str(body).with_context(|| format!("{url} is no handmill server"))?;
        match (status, object.get_mut("aliases")) {
            ("200", Some(aliases)) => Ok(aliases.take()),
            _ => bail!("{url} is no handmill server: it answered {status}"),
        }
    }

    /// The aliases of a log.
    fn count(&self, path: &Path) -> Result<Value> {
        if !path.is_file() {
            let what = if path.exists() { "is no file: name the log" } else { "there is no such file" };
            bail!("{}: {what}", path.display());
        }
        let mut arms: BTreeMap<String, Vec<(String, Tally)>> = BTreeMap::new();
        let mut answered: BTreeMap<String, (String, String, Option<bool>)> = BTreeMap::new();
        capture::read(path, &mut |line| {
            let text = |key: &str| line.get(key).and_then(Value::as_str).map(str::to_string);
            let Some(id) = text("id") else { return };
            if let Some(rating) = line.get("feedback").and_then(|feedback| feedback.get("rating")?.as_i64()) {
                if let Some((alias, arm, rated)) = answered.get_mut(&id) {
                    tally(&mut arms, alias, arm).rating(rated.replace(rating > 0), rating > 0);
                }
                return;
            }
            let (Some(alias), Some(arm)) = (text("model"), text("arm")) else { return };
            let shadow = line.get("shadow").and_then(Value::as_bool).unwrap_or(false);
            let (failed, seconds) = (line.get("error").is_some(), line.get("seconds").and_then(Value::as_f64));
            let tally = tally(&mut arms, &alias, &arm);
            // Where no passage is relevant no model answers: no seconds, and nothing to compare.
            match (shadow, failed || seconds.is_some()) {
                (true, true) => tally.shadow(failed, seconds.unwrap_or(0.0)),
                (false, true) => tally.answer(failed, seconds.unwrap_or(0.0)),
                _ => {}
            }
            if !shadow {
                answered.insert(id, (alias, arm, None));
            }
        })?;
        if let Some(champion) = &self.champion {
            let known = || arms.values().flatten().map(|(model, _)| model.as_str());
            if !known().any(|model| model == champion) {
                let known = known().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ");
                return Err(Usage(format!("--champion {champion}: the arms recorded are {known}")).into());
            }
        }
        let alias = |(name, mut arms): (String, Vec<(String, Tally)>)| {
            if let Some(at) = arms.iter().position(|(model, _)| Some(model) == self.champion.as_ref()) {
                arms.swap(0, at);
            }
            let champion = arms[0].1.clone();
            let arm = |(i, (model, tally)): (usize, &(String, Tally))| {
                let mut object = tally.status((i > 0).then_some(&champion));
                object["model"] = json!(model);
                object["weight"] = Value::Null;
                object["champion"] = json!(i == 0);
                object["rolled_back"] = Value::Null;
                object
            };
            json!({"alias": name, "shadow": null, "arms": arms.iter().enumerate().map(arm).collect::<Vec<_>>()})
        };
        Ok(Value::Array(arms.into_iter().map(alias).collect()))
    }
}

fn tally<'a>(arms: &'a mut BTreeMap<String, Vec<(String, Tally)>>, alias: &str, arm: &str) -> &'a mut Tally {
    let list = arms.entry(alias.to_string()).or_default();
    let at = list.iter().position(|(model, _)| model == arm).unwrap_or_else(|| {
        list.push((arm.to_string(), Tally::default()));
        list.len() - 1
    });
    &mut list[at].1
}

/// A table of an alias' arms.
fn show(alias: &Value) -> Result<()> {
    let mut out = io::stdout();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let arms = alias["arms"].as_array().cloned().unwrap_or_default();
    let wide = arms.iter().map(|arm| text(&arm["model"]).chars().count()).max().unwrap_or(0).max(3);
    writeln!(out, "{}", text(&alias["alias"]))?;
    writeln!(
        out,
        "  {:wide$}  {:>6}  {:>8}  {:>22}  {:>24}  {:>22}",
        "arm", "weight", "answers", "errors (95 %)", "seconds (95 %)", "good ratings (95 %)"
    )?;
    for arm in &arms {
        let weight = arm["weight"].as_f64().map_or("-".into(), |weight| format!("{weight}"));
        writeln!(
            out,
            "  {:wide$}  {weight:>6}  {:>8}  {:>22}  {:>24}  {:>22}",
            text(&arm["model"]),
            arm["requests"].as_u64().unwrap_or(0), // a Value would not keep the column's width
            figure(&arm["errors"], 100.0, 1, " %"),
            figure(&arm["seconds"], 1.0, 3, " s"),
            figure(&arm["feedback"], 100.0, 1, " %"),
        )?;
        if !arm["seconds_ratio"].is_null() {
            writeln!(
                out,
                "  {:wide$}  seconds, as a multiple of the champion's: {}",
                "",
                figure(&arm["seconds_ratio"], 1.0, 2, "")
            )?;
        }
        if !arm["feedback_difference"].is_null() {
            let points = figure(&arm["feedback_difference"], 100.0, 1, " points");
            writeln!(out, "  {:wide$}  good ratings, less the champion's: {points}", "")?;
        }
        if arm["shadow_requests"].as_u64().unwrap_or(0) > 0 {
            let (errors, seconds) =
                (figure(&arm["shadow_errors"], 100.0, 1, " %"), figure(&arm["shadow_seconds"], 1.0, 3, " s"));
            writeln!(
                out,
                "  {:wide$}  as a shadow: {} answers, errors {errors}, {seconds}",
                "", arm["shadow_requests"]
            )?;
        }
        if let Some(rollback) = arm.get("rolled_back").filter(|rollback| !rollback.is_null()) {
            writeln!(out, "  {:wide$}  rolled back: {}", "", text(&rollback["reason"]))?;
        }
    }
    Ok(())
}

/// An estimate with its interval.
fn figure(value: &Value, scale: f64, digits: usize, unit: &str) -> String {
    let number = |key: &str| value.get(key).and_then(Value::as_f64).map(|x| x * scale);
    match (number("value"), number("low"), number("high")) {
        (Some(x), Some(low), Some(high)) => format!("{x:.digits$}{unit} ({low:.digits$} to {high:.digits$})"),
        _ => "-".into(),
    }
}
