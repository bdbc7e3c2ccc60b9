//! Constant expressions: C precedence over 64-bit integers; floats stand alone or take a minus.

use crate::ast::Operand;
use crate::error::{at, At};
use crate::lexer::Tok;
use crate::parse::{show, Parser};
use crate::types::Type;

/// Binary operators by precedence, loosest first.
const LEVELS: [&[&str]; 10] = [
    &["||"],
    &["&&"],
    &["|"],
    &["^"],
    &["&"],
    &["==", "!="],
    &["<=", ">=", "<", ">"],
    &["<<", ">>"],
    &["+", "-"],
    &["*", "/", "%"],
];

/// The level that reads one term of a sum.
pub(crate) const ABOVE_SUM: usize = 9;

impl Parser<'_> {
    /// An expression of `level` and tighter: an integer or a float literal.
    pub(crate) fn expression(&mut self, level: usize) -> Result<Operand, At> {
        self.enter()?;
        let value = if level < LEVELS.len() { self.binary(level)? } else { self.unary()? };
        let mut result = Ok(value);
        if level == 0 && self.sign("?") {
            let line = self.line();
            let yes = self.expression(0)?;
            self.expect(":")?;
            let no = self.expression(0)?;
            result = match result {
                Ok(Operand::Int(0)) => Ok(no),
                Ok(Operand::Int(_)) => Ok(yes),
                _ => at(line, "a condition must be an integer"),
            };
        }
        self.leave();
        result
    }

    fn binary(&mut self, level: usize) -> Result<Operand, At> {
        // Vector items and `p|q` give `|` another meaning, but never after a constant.
        let mut left = if level + 1 < LEVELS.len() { self.binary(level + 1)? } else { self.unary()? };
        loop {
            let line = self.line();
            let Tok::Sign(op) = self.peek() else { return Ok(left) };
            if !LEVELS[level].contains(&op) {
                return Ok(left);
            }
            // `<n>` closes with `>`: a comparison must be followed by an operand.
            if op == ">" && matches!(self.peek_second(), Tok::Sign("," | ";")) {
                return Ok(left);
            }
            self.next();
            let right = if level + 1 < LEVELS.len() { self.binary(level + 1)? } else { self.unary()? };
            let (Operand::Int(a), Operand::Int(b)) = (&left, &right) else {
                return at(line, format!("`{op}` in a constant expression takes integers"));
            };
            left = Operand::Int(fold(op, *a, *b).ok_or(At { line, message: "division by zero".into() })?);
        }
    }

    fn unary(&mut self) -> Result<Operand, At> {
        let line = self.line();
        let tok = self.next();
        match tok {
            Tok::Int(v) => Ok(Operand::Int(v)),
            Tok::Single(v) => Ok(Operand::Single(v)),
            Tok::Double(v) => Ok(Operand::Double(v)),
            Tok::Sign(op @ ("-" | "+" | "~" | "!")) => {
                self.enter()?;
                let value = self.unary()?;
                self.leave();
                match (op, value) {
                    ("+", v) => Ok(v),
                    ("-", Operand::Int(v)) => Ok(Operand::Int(v.wrapping_neg())),
                    ("-", Operand::Double(v)) => Ok(Operand::Double(-v)),
                    ("~", Operand::Int(v)) => Ok(Operand::Int(!v)),
                    ("!", Operand::Int(v)) => Ok(Operand::Int(i64::from(v == 0))),
                    _ => at(line, format!("`{op}` cannot be applied to this constant")),
                }
            }
            Tok::Sign("(") => {
                if let Tok::Dot(d) = self.peek() {
                    if !matches!(Type::parse(d), Some(Type::U64 | Type::S64)) {
                        return at(line, format!("the cast `(.{d})` is not one of (.u64), (.s64)"));
                    }
                    self.next();
                    self.expect(")")?;
                    self.enter()?;
                    let value = self.unary();
                    self.leave();
                    return value;
                }
                let value = self.expression(0)?;
                self.expect(")")?;
                Ok(value)
            }
            t => at(line, format!("expected an operand, found {}", show(t))),
        }
    }
}

fn fold(op: &str, a: i64, b: i64) -> Option<i64> {
    Some(match op {
        "||" => i64::from(a != 0 || b != 0),
        "&&" => i64::from(a != 0 && b != 0),
        "|" => a | b,
        "^" => a ^ b,
        "&" => a & b,
        "==" => i64::from(a == b),
        "!=" => i64::from(a != b),
        "<=" => i64::from(a <= b),
        ">=" => i64::from(a >= b),
        "<" => i64::from(a < b),
        ">" => i64::from(a > b),
        "<<" => a.checked_shl(b as u32).unwrap_or(0),
        ">>" => a.checked_shr(b as u32).unwrap_or(if a < 0 { -1 } else { 0 }),
        "+" => a.wrapping_add(b),
        "-" => a.wrapping_sub(b),
        "*" => a.wrapping_mul(b),
        "/" => a.checked_div(b).or((b != 0).then_some(a))?,
        "%" => a.checked_rem(b).or((b != 0).then_some(0))?,
        _ => return None,
    })
}
