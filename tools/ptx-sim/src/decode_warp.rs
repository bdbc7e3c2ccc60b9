//! Decoding of what a warp or a block does together: matrices, shuffles, votes, barriers.

use crate::ast::{Operand, RawInst};
use crate::decode::{Decoder, Mods};
use crate::error::At;
use crate::inst::{BarrierKind, Factor, Mma, Op, Redux, Shuffle, Vote, NONE};
use crate::types::Type;

impl Decoder<'_> {
    pub(crate) fn matrix(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        match raw.opcode.as_str() {
            "ldmatrix" | "stmatrix" => {
                let store = raw.opcode == "stmatrix";
                if store && self.raw.arch < 90 {
                    return self.fail("needs target sm_90 or later");
                }
                self.words(mods, &["sync", "aligned", "m8n8"])?;
                let n = match mods.one_of(&["x1", "x2", "x4"]) {
                    Some("x1") => 1,
                    Some("x2") => 2,
                    Some(_) => 4,
                    None => return self.fail("`.x1`, `.x2` or `.x4` is needed"),
                };
                let trans = mods.take("trans");
                if !(mods.take("shared") || mods.take("shared::cta")) {
                    return self.fail("only `.shared` is supported");
                }
                if self.one_type(mods)? != Type::B16 {
                    return self.fail("only `.b16` is supported");
                }
                self.count(raw, 2)?;
                let (address, data) = if store { (0, 1) } else { (1, 0) };
                let (base, base64, offset) = self.address(&raw.args[address], false)?;
                self.registers(&raw.args[data], 0, n, Type::B32, store)?;
                self.inst.r[8] = base;
                self.inst.imm = offset;
                self.shared_grain = self.shared_grain.min(16);
                let n = n as u8;
                self.inst.op =
                    if store { Op::StMatrix { n, trans, base64 } } else { Op::LdMatrix { n, trans, base64 } };
            }
            "movmatrix" => {
                self.words(mods, &["sync", "aligned", "m8n8", "trans"])?;
                if self.one_type(mods)? != Type::B16 {
                    return self.fail("only `.b16` is supported");
                }
                self.count(raw, 2)?;
                self.inst.r[1] = self.source(&raw.args[1], Type::B32, false)?;
                self.inst.r[0] = self.target(&raw.args[0], Type::B32, false)?;
                self.inst.op = Op::MovMatrix;
            }
            "mma" => self.mma(raw, mods)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(crate) fn words(&self, mods: &mut Mods, names: &[&str]) -> Result<(), At> {
        match names.iter().find(|n| !mods.take(n)) {
            Some(n) => self.fail(format!("`.{n}` is missing")),
            None => Ok(()),
        }
    }

    /// `{..}` of `n` registers into `r[first..]`.
    pub(crate) fn registers(&mut self, arg: &Operand, first: usize, n: usize, ty: Type, read: bool) -> Result<(), At> {
        let single = [arg.clone()];
        let items: &[Operand] = match arg {
            Operand::Vector(v) => v,
            _ => &single,
        };
        if items.len() != n {
            return self.fail(format!("{n} registers are needed, not {}", items.len()));
        }
        for (i, item) in items.iter().enumerate() {
            self.inst.r[first + i] = if read { self.source(item, ty, false)? } else { self.target(item, ty, false)? };
        }
        Ok(())
    }

    fn mma(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        self.words(mods, &["sync", "aligned", "row", "col"])?;
        let shapes = ["m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"];
        let Some(shape) = mods.one_of(&shapes) else {
            return self.fail("the shape must be m16n8k4, k8, k16 or k32");
        };
        let k: u8 = shape["m16n8k".len()..].parse().unwrap_or(0);
        let saturate = mods.take("satfinite");
        let types = mods.types();
        let [d, a, b, c] = types[..] else { return self.fail("four types are needed: D, A, B, C") };
        let (factor, part) = match (a, b, k) {
            (Type::F16, Type::F16, 8 | 16) => (Factor::F16, Type::F16x2),
            (Type::Bf16, Type::Bf16, 8 | 16) => (Factor::Bf16, Type::Bf16x2),
            (Type::Tf32, Type::Tf32, 4 | 8) => (Factor::Tf32, Type::Tf32),
            (Type::S8 | Type::U8, Type::S8 | Type::U8, 16 | 32) => (Factor::Int8(a.signed(), b.signed()), Type::U32),
            _ => return self.fail("these multiplicand types do not go with this shape here"),
        };
        let sums_fit = match factor {
            Factor::F16 => d == c && matches!(d, Type::F16 | Type::F32),
            Factor::Int8(..) => d == Type::S32 && c == Type::S32,
            _ => d == Type::F32 && c == Type::F32,
        };
        if !sums_fit || (saturate && !matches!(factor, Factor::Int8(..))) {
            return self.fail("these accumulator types or `.satfinite` do not go with the multiplicands");
        }
        let mma = Mma { factor, k, half_sum: d == Type::F16, saturate };
        let (sums, na, nb) = mma.registers();
        let sum_type = if mma.half_sum { Type::F16x2 } else { d };
        self.count(raw, 4)?;
        self.registers(&raw.args[1], sums, na, part, true)?;
        self.registers(&raw.args[2], sums + na, nb, part, true)?;
        self.registers(&raw.args[3], sums + na + nb, sums, sum_type, true)?;
        self.registers(&raw.args[0], 0, sums, sum_type, false)?;
        self.inst.op = Op::Mma(mma);
        Ok(())
    }

    pub(crate) fn warp_wide(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        match raw.opcode.as_str() {
            "shfl" => {
                self.words(mods, &["sync", "b32"])?;
                let mode = match mods.one_of(&["up", "down", "bfly", "idx"]) {
                    Some("up") => Shuffle::Up,
                    Some("down") => Shuffle::Down,
                    Some("bfly") => Shuffle::Butterfly,
                    Some(_) => Shuffle::Index,
                    None => return self.fail("the mode is missing: .up, .down, .bfly or .idx"),
                };
                self.count(raw, 5)?;
                self.inst.r[2] = self.source(&raw.args[1], Type::B32, false)?;
                for i in 3..6 {
                    self.inst.r[i] = self.source(&raw.args[i - 1], Type::U32, false)?;
                }
                self.value_and_pred(&raw.args[0], Type::B32)?;
                self.inst.op = Op::Shfl(mode);
            }
            "vote" => {
                self.words(mods, &["sync"])?;
                let vote = match mods.one_of(&["ballot", "all", "any", "uni"]) {
                    Some("ballot") => Vote::Ballot,
                    Some("all") => Vote::All,
                    Some("any") => Vote::Any,
                    Some(_) => Vote::Uniform,
                    None => return self.fail("the mode is missing: .ballot, .all, .any or .uni"),
                };
                let want = if vote == Vote::Ballot { Type::B32 } else { Type::Pred };
                if self.one_type(mods)? != want {
                    return self.fail(format!("the type must be .{}", want.name()));
                }
                self.count(raw, 3)?;
                let (p, negate) = self.pred_source(&raw.args[1])?;
                self.inst.r[1] = p;
                self.inst.r[2] = self.source(&raw.args[2], Type::U32, false)?;
                self.inst.r[0] = match vote {
                    Vote::Ballot => self.target(&raw.args[0], Type::B32, false)?,
                    _ => self.pred_target(&raw.args[0])?,
                };
                self.inst.op = Op::Vote { vote, negate };
            }
            "match" => {
                self.words(mods, &["sync"])?;
                let all = match mods.one_of(&["any", "all"]) {
                    Some(m) => m == "all",
                    None => return self.fail("`.any` or `.all` is needed"),
                };
                let ty = self.one_type(mods)?;
                if !matches!(ty, Type::B32 | Type::B64) {
                    return self.fail("the type must be .b32 or .b64");
                }
                self.count(raw, 3)?;
                self.inst.r[2] = self.source(&raw.args[1], ty, false)?;
                self.inst.r[3] = self.source(&raw.args[2], Type::U32, false)?;
                self.value_and_pred(&raw.args[0], Type::B32)?;
                if self.inst.r[1] != NONE && !all {
                    return self.fail("only `.all` has a predicate result");
                }
                self.inst.op = Op::Match { all, wide: ty == Type::B64 };
            }
            "redux" => {
                self.words(mods, &["sync"])?;
                let ty = self.one_type(mods)?;
                let s = ty.signed();
                let op = match (mods.one_of(&["add", "min", "max", "and", "or", "xor"]), ty) {
                    (Some("add"), Type::U32 | Type::S32) => Redux::Add(s),
                    (Some("min"), Type::U32 | Type::S32) => Redux::Min(s),
                    (Some("max"), Type::U32 | Type::S32) => Redux::Max(s),
                    (Some("and"), Type::B32) => Redux::And,
                    (Some("or"), Type::B32) => Redux::Or,
                    (Some("xor"), Type::B32) => Redux::Xor,
                    _ => return self.fail("this operation and type are not supported"),
                };
                self.count(raw, 3)?;
                self.inst.r[1] = self.source(&raw.args[1], ty, false)?;
                self.inst.r[2] = self.source(&raw.args[2], Type::U32, false)?;
                self.inst.r[0] = self.target(&raw.args[0], ty, false)?;
                self.inst.op = Op::Redux(op);
            }
            "activemask" => {
                self.words(mods, &["b32"])?;
                self.count(raw, 1)?;
                self.inst.r[0] = self.target(&raw.args[0], Type::B32, false)?;
                self.inst.op = Op::ActiveMask;
            }
            "elect" => {
                self.words(mods, &["sync"])?;
                if self.raw.arch < 90 {
                    return self.fail("needs target sm_90 or later");
                }
                self.count(raw, 2)?;
                self.inst.r[2] = self.source(&raw.args[1], Type::U32, false)?;
                self.value_and_pred(&raw.args[0], Type::B32)?;
                self.inst.op = Op::Elect;
            }
            "bar" | "barrier" => self.barrier(raw, mods)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `d` or `d|p` into `r[0]` and `r[1]`; `_` for either.
    fn value_and_pred(&mut self, arg: &Operand, ty: Type) -> Result<(), At> {
        let value = match arg {
            Operand::Pair(d, p) => {
                self.inst.r[1] = self.pred_target(p)?;
                d
            }
            other => other,
        };
        if *value != Operand::Sink {
            self.inst.r[0] = self.target(value, ty, false)?;
        }
        Ok(())
    }

    fn barrier(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        if raw.opcode == "bar" && mods.take("warp") {
            self.words(mods, &["sync"])?;
            self.count(raw, 1)?;
            self.inst.r[2] = self.source(&raw.args[0], Type::U32, false)?;
            self.inst.op = Op::BarWarp;
            return Ok(());
        }
        mods.take("cta");
        let aligned = mods.take("aligned") || raw.opcode == "bar";
        let reduces = match mods.one_of(&["sync", "arrive", "red"]) {
            Some("sync") => None,
            Some("arrive") => {
                self.count(raw, 2)?;
                self.inst.r[1] = self.source(&raw.args[0], Type::U32, false)?;
                self.inst.r[2] = self.source(&raw.args[1], Type::U32, false)?;
                self.inst.op = Op::Bar { kind: BarrierKind::Arrive, aligned, negate: false };
                return Ok(());
            }
            Some(_) => mods.one_of(&["popc", "and", "or"]),
            None => return self.fail("`.sync`, `.arrive` or `.red` is needed"),
        };
        let Some(op) = reduces else {
            if raw.args.is_empty() || raw.args.len() > 2 {
                return self.fail("takes a barrier and perhaps a thread count");
            }
            self.inst.r[1] = self.source(&raw.args[0], Type::U32, false)?;
            if let Some(count) = raw.args.get(1) {
                self.inst.r[2] = self.source(count, Type::U32, false)?;
            }
            self.inst.op = Op::Bar { kind: BarrierKind::Sync, aligned, negate: false };
            return Ok(());
        };
        let ty = self.one_type(mods)?;
        let (kind, want) = match op {
            "popc" => (BarrierKind::Popc, Type::U32),
            "and" => (BarrierKind::And, Type::Pred),
            _ => (BarrierKind::Or, Type::Pred),
        };
        let n = raw.args.len();
        if ty != want || !(3..=4).contains(&n) {
            return self.fail(format!("takes .{}, a result, a barrier, perhaps a count, and a predicate", want.name()));
        }
        self.inst.r[1] = self.source(&raw.args[1], Type::U32, false)?;
        if n == 4 {
            self.inst.r[2] = self.source(&raw.args[2], Type::U32, false)?;
        }
        let (p, negate) = self.pred_source(&raw.args[n - 1])?;
        self.inst.r[3] = p;
        self.inst.r[0] = match kind {
            BarrierKind::Popc => self.target(&raw.args[0], Type::U32, false)?,
            _ => self.pred_target(&raw.args[0])?,
        };
        self.inst.op = Op::Bar { kind, aligned, negate };
        Ok(())
    }
}
