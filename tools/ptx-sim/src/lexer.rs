//! Source text to tokens, each with its line. Pure ASCII only: assemblers from 12.9 on refuse any other byte, comments
//! too.

use crate::error::{at, At};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tok<'a> {
    /// Name, register (`%r`, `%tid`) or label.
    Word(&'a str),
    /// `.name` without its dot; `L2::128B` counts as one.
    Dot(&'a str),
    /// Integer literal, two's complement in 64 bits.
    Int(i64),
    /// Decimal float, or `0d` with 16 hex digits.
    Double(f64),
    /// `0f` with 8 hex digits.
    Single(u32),
    /// Quoted text.
    Text(&'a str),
    /// Punctuation and operators.
    Sign(&'static str),
    End,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    pub tok: Tok<'a>,
    pub line: u32,
}

/// Longest first, so that `<<` is not read as `<`, `<`.
const SIGNS: [&str; 32] = [
    "<<", ">>", "==", "!=", "<=", ">=", "&&", "||", "{", "}", "(", ")", "[", "]", "<", ">", ",", ";", ":", "+", "-",
    "*", "/", "%", "&", "|", "^", "~", "!", "?", "=", "@",
];

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_' || c == b'$'
}

/// All tokens of `source`, closed by `Tok::End`.
pub(crate) fn lex(source: &str) -> Result<Vec<Token<'_>>, At> {
    let text = source.as_bytes();
    let mut tokens = Vec::with_capacity(text.len() / 4);
    let (mut i, mut line) = (0, 1);
    if let Some(p) = text.iter().position(|c| !c.is_ascii()) {
        let line = 1 + text[..p].iter().filter(|c| **c == b'\n').count() as u32;
        return at(line, "a byte that is not ASCII; assemblers from 12.9 on refuse it, in comments too");
    }
    while i < text.len() {
        let c = text[i];
        let rest = &source[i..];
        let start = i;
        if c == b'\n' {
            line += 1;
            i += 1;
        } else if c.is_ascii_whitespace() {
            i += 1;
        } else if rest.starts_with("//") {
            i += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            let Some(end) = rest.find("*/") else { return at(line, "a comment `/*` that never ends") };
            line += rest[..end].matches('\n').count() as u32;
            i += end + 2;
        } else if c == b'"' {
            let Some(end) = rest[1..].find('"') else { return at(line, "a string that never ends") };
            tokens.push(Token { tok: Tok::Text(&rest[1..1 + end]), line });
            line += rest[..end].matches('\n').count() as u32;
            i += end + 2;
        } else if c.is_ascii_alphabetic()
            || c == b'_'
            || c == b'$'
            || (c == b'%' && text.get(i + 1).is_some_and(|d| d.is_ascii_alphabetic() || *d == b'_' || *d == b'$'))
        {
            i += 1;
            while i < text.len() && is_word(text[i]) {
                i += 1;
            }
            tokens.push(Token { tok: Tok::Word(&source[start..i]), line });
        } else if c == b'.' && text.get(i + 1).is_some_and(|d| is_word(*d)) {
            i += 1;
            while i < text.len() && (is_word(text[i]) || source[i..].starts_with("::")) {
                i += if text[i] == b':' { 2 } else { 1 };
            }
            tokens.push(Token { tok: Tok::Dot(&source[start + 1..i]), line });
        } else if c.is_ascii_digit() {
            let (tok, length) = number(rest, line)?;
            tokens.push(Token { tok, line });
            i += length;
        } else if let Some(sign) = SIGNS.iter().find(|s| rest.starts_with(**s)) {
            tokens.push(Token { tok: Tok::Sign(sign), line });
            i += sign.len();
        } else {
            return at(line, format!("the character `{}` has no meaning here", c as char));
        }
    }
    tokens.push(Token { tok: Tok::End, line });
    Ok(tokens)
}

/// A literal at the start of `rest` and its length in bytes.
fn number(rest: &str, line: u32) -> Result<(Tok<'static>, usize), At> {
    let text = rest.as_bytes();
    let run = |from: usize, ok: fn(&u8) -> bool| from + text[from..].iter().take_while(|c| ok(c)).count();
    let bad = |n: usize| At { line, message: format!("`{}` is not a number", &rest[..n.max(1)]) };
    let lead = text.get(1).map_or(0, |c| c.to_ascii_lowercase());
    if text[0] == b'0' && (lead == b'f' || lead == b'd') {
        let end = run(2, u8::is_ascii_hexdigit);
        let want = if lead == b'f' { 10 } else { 18 };
        let bits = u64::from_str_radix(&rest[2..end], 16).map_err(|_| bad(end))?;
        if end != want {
            return at(line, format!("`{}` needs {} hex digits", &rest[..end], want - 2));
        }
        return Ok((if lead == b'f' { Tok::Single(bits as u32) } else { Tok::Double(f64::from_bits(bits)) }, end));
    }
    let (radix, from) = match lead {
        b'x' if text[0] == b'0' => (16, 2),
        b'b' if text[0] == b'0' => (2, 2),
        _ => (10, 0),
    };
    let mut end = run(from, if radix == 16 { u8::is_ascii_hexdigit } else { u8::is_ascii_digit });
    if radix == 10 {
        let fraction =
            text.get(end) == Some(&b'.') && text.get(end + 1).is_none_or(|c| c.is_ascii_digit() || !is_word(*c));
        if fraction {
            end = run(end + 1, u8::is_ascii_digit);
        }
        let mut exponent = false;
        if matches!(text.get(end), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(text.get(end + 1), Some(b'+' | b'-')));
            let after = run((end + 1 + sign).min(text.len()), u8::is_ascii_digit);
            exponent = after > end + 1 + sign;
            end = if exponent { after } else { end };
        }
        if fraction || exponent {
            return rest[..end].parse().map(|v| (Tok::Double(v), end)).map_err(|_| bad(end));
        }
    }
    let octal = radix == 10 && end > 1 && text[0] == b'0';
    let value =
        if octal { u64::from_str_radix(&rest[1..end], 8) } else { u64::from_str_radix(&rest[from..end], radix) };
    let value = value.map_err(|_| bad(end))? as i64;
    if text.get(end) == Some(&b'U') {
        end += 1;
    }
    if text.get(end).is_some_and(|c| is_word(*c)) {
        return Err(bad(run(0, |c| is_word(*c))));
    }
    Ok((Tok::Int(value), end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toks(s: &str) -> Vec<Tok<'_>> {
        lex(s).unwrap().into_iter().map(|t| t.tok).collect()
    }

    #[test]
    fn literals() {
        use Tok::*;
        assert_eq!(toks("0x1F 010 0b11 7U 12"), [Int(31), Int(8), Int(3), Int(7), Int(12), End]);
        assert_eq!(
            toks("0f3F800000 1.5 2e3 0d3FF0000000000000"),
            [Single(0x3f80_0000), Double(1.5), Double(2000.0), Double(1.0), End]
        );
        assert_eq!(toks("0xFFFFFFFFFFFFFFFF"), [Int(-1), End]);
        for bad in ["0f3F80", "08", "12ab", "0x"] {
            assert!(lex(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn words_dots_and_lines() {
        use Tok::*;
        assert_eq!(
            toks("ld.global.L2::128B.v4 %r1"),
            [Word("ld"), Dot("global"), Dot("L2::128B"), Dot("v4"), Word("%r1"), End]
        );
        let t = lex("a // x\n/* \n\n */ b").unwrap();
        assert_eq!((t[0].line, t[1].line), (1, 4));
        assert_eq!(lex("a\n// caf\u{e9}").unwrap_err().line, 2);
        assert_eq!(lex("a\n`").unwrap_err().line, 2);
    }
}
