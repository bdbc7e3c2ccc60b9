//! Faults put into a kernel on purpose: tests run the mutants to see whether findings or wrong results betray them.

use std::fmt;

/// What kind of mistake a mutant makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// A barrier or fence is gone.
    Barrier,
    /// A wait for, or the end of, a group of copies is gone.
    Wait,
    /// A guarded access of memory is everyone's, another guarded statement is the others', a guarded branch is never
    /// taken.
    Guard,
    /// A comparison is off by one.
    Comparison,
    /// A step, a factor of an address or a shift has another size.
    Stride,
    /// The constant in an address is gone, or that of a parameter is another word's.
    Offset,
    /// A conversion rounds another way.
    Rounding,
    /// A mask of lanes, a distance between lanes or a remainder is halved.
    Lanes,
    /// Another operation: a sum for a difference, the larger for the smaller, a product without its addend.
    Arithmetic,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Barrier => "barrier",
            Class::Wait => "wait",
            Class::Guard => "guard",
            Class::Comparison => "comparison",
            Class::Stride => "stride",
            Class::Offset => "offset",
            Class::Rounding => "rounding",
            Class::Lanes => "lanes",
            Class::Arithmetic => "arithmetic",
        })
    }
}

/// One changed source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// Line changed, from 1.
    pub line: u32,
    /// The kind of mistake.
    pub class: Class,
    /// What was done, in words.
    pub change: String,
    /// The whole changed text, with as many lines as before.
    pub source: String,
}

/// Statements that order others, by how their opcodes start.
const ORDERING: [(&str, Class); 14] = [
    ("bar.sync", Class::Barrier),
    ("bar.warp.sync", Class::Barrier),
    ("barrier.", Class::Barrier),
    ("membar", Class::Barrier),
    ("cp.async.wait", Class::Wait),
    ("cp.async.commit", Class::Wait),
    ("cp.async.bulk", Class::Wait),
    ("fence.", Class::Barrier),
    ("mbarrier.arrive", Class::Barrier),
    ("mbarrier.expect_tx", Class::Wait),
    ("mbarrier.try_wait", Class::Wait),
    ("wgmma.fence", Class::Barrier),
    ("wgmma.commit", Class::Wait),
    ("wgmma.wait", Class::Wait),
];

/// Comparisons off by one.
const COMPARED: [(&str, &str); 4] =
    [("setp.lt", "setp.le"), ("setp.le", "setp.lt"), ("setp.ge", "setp.gt"), ("setp.gt", "setp.ge")];

/// Roundings of conversions, and others in their place.
const ROUNDED: [(&str, &str); 4] =
    [("cvt.rn.", "cvt.rz."), ("cvt.rni.", "cvt.rzi."), ("cvt.rmi.", "cvt.rpi."), ("cvt.rzi.", "cvt.rni.")];

/// Operations, and others in their place.
const COMPUTED: [(&str, &str); 9] = [
    ("add.f32", "sub.f32"),
    ("sub.f32", "add.f32"),
    ("mul.f32", "add.f32"),
    ("sub.u32", "add.u32"),
    ("sub.s32", "add.s32"),
    ("max.f32", "min.f32"),
    ("min.f32", "max.f32"),
    ("max.u32", "min.u32"),
    ("min.u32", "max.u32"),
];

/// All mutants of a source, from its first line to its last.
pub fn mutants(source: &str) -> Vec<Mutant> {
    let mut out = Vec::new();
    for (i, line) in source.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for statement in code.split_inclusive(';').filter(|s| s.ends_with(';')) {
            let text = statement.trim();
            for (class, change, new) in changes(text) {
                let changed = code.replacen(text, &new, 1);
                let lines: Vec<&str> =
                    source.lines().enumerate().map(|(j, l)| if i == j { changed.as_str() } else { l }).collect();
                out.push(Mutant { line: i as u32 + 1, class, change, source: lines.join("\n") + "\n" });
            }
        }
    }
    out
}

/// The mistakes that one statement invites: class, words, and the statement in its place.
fn changes(text: &str) -> Vec<(Class, String, String)> {
    let mut out = Vec::new();
    let mut put = |class: Class, new: String| {
        if new != text {
            let words = if new == ";" { format!("without `{text}`") } else { format!("`{text}` made `{new}`") };
            out.push((class, words, new));
        }
    };
    let (guard, bare) = match text.strip_prefix('@') {
        Some(rest) => rest.split_once(char::is_whitespace).map_or(("", text), |(guard, bare)| (guard, bare.trim())),
        None => ("", text),
    };
    let (opcode, operands) = bare.split_once(char::is_whitespace).unwrap_or((bare.trim_end_matches(';'), ""));
    if let Some((_, class)) = ORDERING.iter().find(|(start, _)| opcode.starts_with(start)) {
        put(*class, ";".to_string());
    }
    if !guard.is_empty() {
        let memory = ["ld", "st", "atom", "red", "cp"].iter().any(|start| opcode.starts_with(start));
        let other = guard.strip_prefix('!').map_or(format!("!{guard}"), str::to_string);
        let new = match opcode {
            "bra" => ";".to_string(),
            _ if memory => bare.to_string(),
            _ => format!("@{other} {bare}"),
        };
        put(Class::Guard, new);
    }
    if let Some((from, to)) = COMPARED.iter().find(|(from, _)| opcode.starts_with(from)) {
        put(Class::Comparison, text.replacen(from, to, 1));
    }
    if let Some((from, to)) = ROUNDED.iter().find(|(from, _)| opcode.starts_with(from)) {
        // To 16-bit floats and between floats and integers; f32 from a small integer is exact whichever way.
        if !opcode.contains("f32.u32") && !opcode.contains("f32.s32") {
            put(Class::Rounding, text.replacen(from, to, 1));
        }
    }
    // Of two addresses the first that has an offset loses it. `[dims + 8]` is one word of many: the next is as easy a
    // slip.
    for (start, end) in brackets(text) {
        let Some((base, offset)) = text[start..end].split_once(" + ").filter(|parts| parts.1.trim() != "0") else {
            continue;
        };
        let new = if base.starts_with('%') { base.to_string() } else { format!("{base} + 4 + {offset}") };
        put(Class::Offset, format!("{}{new}{}", &text[..start], &text[end..]));
        break;
    }
    if let Some((from, to)) = COMPUTED.iter().find(|(from, _)| opcode == *from) {
        put(Class::Arithmetic, text.replacen(from, to, 1));
    }
    let parts: Vec<&str> = operands.trim_end_matches(';').split(',').map(str::trim).collect();
    let constant = |part: &str| part.starts_with(|c: char| c.is_ascii_digit()) && !part.starts_with("0f");
    let with = |at: usize, new: &str| {
        let mut parts: Vec<String> = parts.iter().map(|part| part.to_string()).collect();
        parts[at] = new.to_string();
        let head = &text[..text.len() - operands.len()];
        format!("{head}{};", parts.join(", "))
    };
    let integer = [".u32", ".s32", ".u64", ".s64", ".b32", ".b64"].iter().any(|ty| opcode.ends_with(ty));
    let kind = opcode.split('.').next().unwrap_or("");
    match (kind, parts.len()) {
        ("add", 3) if integer && constant(parts[2]) => {
            let new = if parts[2] == "1" { "2".to_string() } else { format!("{} + 1", parts[2]) };
            put(Class::Stride, with(2, &new));
        }
        ("mad" | "mul", 3 | 4) if integer && constant(parts[2]) => {
            put(Class::Stride, with(2, &format!("{} + 1", parts[2])));
        }
        ("fma", 4) if opcode == "fma.rn.f32" => {
            let product = format!("mul.f32 {};", parts[..3].join(", "));
            put(Class::Arithmetic, if guard.is_empty() { product } else { format!("@{guard} {product}") });
        }
        ("shl" | "shr", 3) if constant(parts[2]) => put(Class::Stride, with(2, &format!("{} + 1", parts[2]))),
        ("and", 3) => {
            if let Some(mask) = parts[2].parse::<u32>().ok().filter(|m| *m > 1 && (m + 1).is_power_of_two()) {
                put(Class::Lanes, with(2, &(mask >> 1).to_string()));
            }
        }
        ("shfl", 5) => match parts[2].parse::<u32>() {
            Ok(1) => put(Class::Lanes, with(2, "2")),
            Ok(distance) if distance > 1 => put(Class::Lanes, with(2, &(distance / 2).to_string())),
            _ => {}
        },
        _ => {}
    }
    out
}

/// Where the addresses of a statement begin and end, within their brackets.
fn brackets(text: &str) -> Vec<(usize, usize)> {
    let starts = text.match_indices('[').map(|(i, _)| i + 1);
    starts.filter_map(|start| text[start..].find(']').map(|length| (start, start + length))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(statement: &str) -> Vec<(Class, String)> {
        mutants(statement).into_iter().map(|mutant| (mutant.class, mutant.source.trim().to_string())).collect()
    }

    #[test]
    fn each_class_makes_its_mistake() {
        let one = |statement: &str, class: Class, new: &str| {
            assert_eq!(of(statement), [(class, new.to_string())], "{statement}");
        };
        one("bar.sync 0;", Class::Barrier, ";");
        one("cp.async.wait_group 1;", Class::Wait, ";");
        one("@%p st.global.f32 [%a], %v;", Class::Guard, "st.global.f32 [%a], %v;");
        one("@%p bra end;", Class::Guard, ";");
        one("@%p mov.f32 %a, %b;", Class::Guard, "@!%p mov.f32 %a, %b;");
        one("@!%p ret;", Class::Guard, "@%p ret;");
        one("setp.ge.u32 %p, %a, %b;", Class::Comparison, "setp.gt.u32 %p, %a, %b;");
        one("add.u64 %a, %a, 32*4;", Class::Stride, "add.u64 %a, %a, 32*4 + 1;");
        one("add.u32 %a, %a, 1;", Class::Stride, "add.u32 %a, %a, 2;");
        one("mad.wide.u32 %a, %i, 4, %x;", Class::Stride, "mad.wide.u32 %a, %i, 4 + 1, %x;");
        one("shl.b32 %a, %i, 4;", Class::Stride, "shl.b32 %a, %i, 4 + 1;");
        one("ld.global.f32 %v, [%a + 16];", Class::Offset, "ld.global.f32 %v, [%a];");
        one("ld.param.u32 %K, [dims + 4];", Class::Offset, "ld.param.u32 %K, [dims + 4 + 4];");
        one(
            "cp.async.cg.shared.global [%s + 16], [%g], 16;",
            Class::Offset,
            "cp.async.cg.shared.global [%s], [%g], 16;",
        );
        one("cvt.rn.bf16x2.f32 %a, %b, %c;", Class::Rounding, "cvt.rz.bf16x2.f32 %a, %b, %c;");
        one("and.b32 %lane, %thread, 31;", Class::Lanes, "and.b32 %lane, %thread, 15;");
        one("shfl.sync.bfly.b32 %a, %b, 16, 31, -1;", Class::Lanes, "shfl.sync.bfly.b32 %a, %b, 8, 31, -1;");
        one("max.f32 %a, %b, %c;", Class::Arithmetic, "min.f32 %a, %b, %c;");
        one("fma.rn.f32 %a, %b, %c, %d;", Class::Arithmetic, "mul.f32 %a, %b, %c;");
        for plain in ["xor.b32 %a, %b, %c;", "div.rn.f32 %a, %b, %c;", "cvt.rn.f32.u32 %a, %b;", "ret;", "x: // a;"] {
            assert_eq!(of(plain), [], "{plain}");
        }
    }
}
