//! Decoding of what makes or uses predicates: `setp`, `selp`, logic.

use crate::ast::{Operand, RawInst};
use crate::decode::{Decoder, Mods};
use crate::error::At;
use crate::inst::{Combine, Op, PredOp, EQUAL, GREATER, LESS, UNORDERED};
use crate::types::{Class, Type};

impl Decoder<'_> {
    pub(crate) fn predicates(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        let pred_type = raw.mods.last().is_some_and(|m| m == "pred");
        match raw.opcode.as_str() {
            "setp" => self.setp(raw, mods)?,
            "selp" => {
                let ty = self.one_type(mods)?;
                if ty.bytes() < 2 || matches!(ty.class(), Class::F16 | Class::F16x2 | Class::Bf16 | Class::Bf16x2) {
                    return self.fail("selects 16-, 32- and 64-bit values; halves as .b16");
                }
                self.count(raw, 4)?;
                self.inst.r[1] = self.source(&raw.args[1], ty, false)?;
                self.inst.r[2] = self.source(&raw.args[2], ty, false)?;
                let (p, negate) = self.pred_source(&raw.args[3])?;
                self.inst.r[3] = p;
                if negate {
                    self.inst.r.swap(1, 2);
                }
                self.inst.r[0] = self.target(&raw.args[0], ty, false)?;
                self.inst.op = Op::Selp { wide: ty.bytes() == 8 };
            }
            "mov" | "not" | "and" | "or" | "xor" if pred_type => {
                mods.take("pred");
                let op = match raw.opcode.as_str() {
                    "mov" => PredOp::Mov,
                    "not" => PredOp::Not,
                    "and" => PredOp::And,
                    "or" => PredOp::Or,
                    _ => PredOp::Xor,
                };
                let sources = if matches!(op, PredOp::Mov | PredOp::Not) { 1 } else { 2 };
                self.count(raw, 1 + sources)?;
                let mut negate = [false; 2];
                if let (PredOp::Mov, Operand::Int(v)) = (op, &raw.args[1]) {
                    negate[0] = *v != 0; // no source: false, perhaps negated
                } else {
                    for (i, n) in negate.iter_mut().enumerate().take(sources) {
                        (self.inst.r[i + 1], *n) = self.pred_source(&raw.args[i + 1])?;
                    }
                }
                self.inst.r[0] = self.pred_target(&raw.args[0])?;
                self.inst.op = Op::Pred { op, negate };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn setp(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        let ty = self.one_type(mods)?;
        let ftz = mods.take("ftz");
        if ftz && ty != Type::F32 {
            return self.fail("`.ftz` goes with .f32 here");
        }
        let names: [(&str, u8, bool); 18] = [
            ("eq", EQUAL, true),
            ("ne", LESS | GREATER, true),
            ("lt", LESS, true),
            ("le", LESS | EQUAL, true),
            ("gt", GREATER, true),
            ("ge", GREATER | EQUAL, true),
            ("lo", LESS, false),
            ("ls", LESS | EQUAL, false),
            ("hi", GREATER, false),
            ("hs", GREATER | EQUAL, false),
            ("equ", EQUAL | UNORDERED, false),
            ("neu", LESS | GREATER | UNORDERED, false),
            ("ltu", LESS | UNORDERED, false),
            ("leu", LESS | EQUAL | UNORDERED, false),
            ("gtu", GREATER | UNORDERED, false),
            ("geu", GREATER | EQUAL | UNORDERED, false),
            ("num", LESS | EQUAL | GREATER, false),
            ("nan", UNORDERED, false),
        ];
        let Some((name, truth, both)) = names.iter().find(|(n, ..)| mods.take(n)) else {
            return self.fail("no comparison among the modifiers");
        };
        let unsigned_name = matches!(*name, "lo" | "ls" | "hi" | "hs");
        let equality = matches!(*name, "eq" | "ne");
        let fits = match ty.class() {
            Class::Bits => equality,
            Class::Int => *both || (unsigned_name && !ty.signed()),
            _ => !unsigned_name,
        };
        if !fits || ty.bytes() < 2 {
            return self.fail(format!("`.{name}` does not compare `.{}`", ty.name()));
        }
        let combine = match mods.one_of(&["and", "or", "xor"]) {
            Some("and") => Combine::And,
            Some("or") => Combine::Or,
            Some(_) => Combine::Xor,
            None => Combine::None,
        };
        self.count(raw, if combine == Combine::None { 3 } else { 4 })?;
        self.inst.r[2] = self.source(&raw.args[1], ty, false)?;
        self.inst.r[3] = self.source(&raw.args[2], ty, false)?;
        let mut negate = false;
        if combine != Combine::None {
            (self.inst.r[4], negate) = self.pred_source(&raw.args[3])?;
        }
        if let Operand::Pair(p, q) = &raw.args[0] {
            self.inst.r[0] = self.pred_target(p)?;
            self.inst.r[1] = self.pred_target(q)?;
        } else {
            self.inst.r[0] = self.pred_target(&raw.args[0])?;
        }
        self.inst.op = Op::Setp { ty, truth: *truth, ftz, combine, negate };
        Ok(())
    }
}
