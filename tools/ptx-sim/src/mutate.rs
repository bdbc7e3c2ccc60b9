//! Faults put into a kernel on purpose: tests run the mutants to see whether findings or wrong results betray them.

/// One changed source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// Line changed, from 1.
    pub line: u32,
    /// What was done, in words.
    pub change: String,
    /// The whole changed text, with as many lines as before.
    pub source: String,
}

/// A statement that matters when it is gone, by how its opcode starts.
const REMOVED: [&str; 6] = ["bar.sync", "bar.warp.sync", "barrier.", "cp.async.wait", "cp.async.commit", "membar"];

/// Comparisons off by one.
const COMPARED: [(&str, &str); 4] =
    [("setp.lt", "setp.le"), ("setp.le", "setp.lt"), ("setp.ge", "setp.gt"), ("setp.gt", "setp.ge")];

/// All mutants of a source: each barrier, wait and guard removed, each comparison moved by one, each `+ 1` forgotten.
pub fn mutants(source: &str) -> Vec<Mutant> {
    let mut out = Vec::new();
    for (i, line) in source.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        let mut put = |change: String, new: String| {
            let lines: Vec<&str> =
                source.lines().enumerate().map(|(j, l)| if i == j { new.as_str() } else { l }).collect();
            out.push(Mutant { line: i as u32 + 1, change, source: lines.join("\n") + "\n" });
        };
        for statement in code.split_inclusive(';').filter(|s| s.ends_with(';')) {
            let text = statement.trim();
            let opcode = text.split_whitespace().find(|w| !w.starts_with('@')).unwrap_or("");
            if REMOVED.iter().any(|r| opcode.starts_with(r)) {
                put(format!("without `{text}`"), code.replacen(text, ";", 1));
            }
            if let (Some(guard), false) =
                (text.strip_prefix('@').and_then(|t| t.split_whitespace().next()), opcode == "bra")
            {
                put(format!("`{text}` for all"), code.replacen(&format!("@{guard}"), "", 1));
            }
            if let Some((from, to)) = COMPARED.iter().find(|(from, _)| opcode.starts_with(from)) {
                put(format!("`{from}` made `{to}`"), code.replacen(from, to, 1));
            }
            if opcode.starts_with("add.") && text.ends_with(", 1;") {
                let without = text.replacen(", 1;", ", 0;", 1);
                put(format!("`{text}` adds nothing"), code.replacen(text, &without, 1));
            }
        }
    }
    out
}
