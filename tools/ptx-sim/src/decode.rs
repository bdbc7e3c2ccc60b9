//! Parsed text to instructions that run: operands checked against the types that the assembler demands, modifiers all
//! known.

use std::collections::HashMap;

use crate::ast::{Base, Operand, RawEntry, RawInst, RawModule, Special, Symbol};
use crate::error::{at, At};
use crate::forms::Forms;
use crate::inst::{Constant, Inst, Op, Program, Uses, NONE};
use crate::types::{Class, Type};

/// Units are numbered in 16 bits.
const MAX_UNITS: usize = 60_000;
/// Upper half of the generic addresses of shared memory.
pub(crate) const SHARED_WINDOW: u64 = 0x7fff_fffe;
/// Upper half of the addresses of the module's `.global` variables.
pub(crate) const MODULE_WINDOW: u64 = 0x7fff_fffc;

/// Instructions outside the table of forms.
const OPCODES: [&str; 32] = [
    "bra",
    "ret",
    "exit",
    "trap",
    "nanosleep",
    "setp",
    "selp",
    "ld",
    "st",
    "atom",
    "red",
    "cp",
    "membar",
    "fence",
    "prefetch",
    "createpolicy",
    "ldmatrix",
    "stmatrix",
    "movmatrix",
    "mma",
    "shfl",
    "vote",
    "match",
    "redux",
    "activemask",
    "elect",
    "bar",
    "barrier",
    "cvta",
    "mbarrier",
    "wgmma",
    "setmaxnreg",
];

/// The modifiers of one instruction, taken one by one; what is left is unknown.
pub(crate) struct Mods {
    left: Vec<String>,
}

impl Mods {
    pub fn take(&mut self, name: &str) -> bool {
        let found = self.left.iter().position(|m| m == name);
        if let Some(i) = found {
            self.left.remove(i);
        }
        found.is_some()
    }

    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    pub fn one_of(&mut self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().find(|n| self.take(n)).copied()
    }

    pub fn starting(&mut self, prefix: &str) -> Option<String> {
        let i = self.left.iter().position(|m| m.starts_with(prefix))?;
        Some(self.left.remove(i))
    }

    /// All type modifiers, in order.
    pub fn types(&mut self) -> Vec<Type> {
        let types = self.left.iter().filter_map(|m| Type::parse(m)).collect();
        self.left.retain(|m| Type::parse(m).is_none());
        types
    }
}

pub(crate) struct Decoder<'a> {
    pub raw: &'a RawModule,
    pub entry: &'a RawEntry,
    /// Unit of each register, or its predicate number.
    place: Vec<u16>,
    units: usize,
    /// Units of declared registers; predicates are tracked behind them.
    tracked: usize,
    constants: HashMap<Constant, u16>,
    pub uses: Uses,
    pub inst: Inst,
    pub lists: Vec<Vec<u16>>,
    pub line: u32,
    /// Mnemonic with modifiers, for messages.
    pub text: String,
    pub shared_grain: u32,
    pub global_grain: u32,
}

/// The program of one entry.
pub(crate) fn decode(raw: &RawModule, entry: &RawEntry) -> Result<Program, At> {
    let mut place = Vec::with_capacity(entry.regs.len());
    let (mut units, mut preds) = (0usize, 0usize);
    for reg in &entry.regs {
        if reg.ty == Type::Pred {
            place.push(preds as u16);
            preds += 1;
        } else {
            place.push(units as u16);
            units += if reg.ty.bytes() == 8 { 2 } else { 1 };
        }
    }
    if units + preds > MAX_UNITS / 2 {
        return at(entry.line, format!("`{}` declares too many registers", entry.name));
    }
    let mut d = Decoder {
        raw,
        entry,
        place,
        units,
        tracked: units,
        constants: HashMap::new(),
        uses: Uses::default(),
        inst: blank(0),
        lists: Vec::new(),
        line: 0,
        text: String::new(),
        shared_grain: 16,
        global_grain: 16,
    };
    let mut program = Program {
        code: Vec::with_capacity(entry.body.len()),
        uses: Vec::with_capacity(entry.body.len()),
        names: Vec::with_capacity(entry.body.len()),
        units: 0,
        preds,
        slots: units + preds,
        constants: Vec::new(),
        lists: Vec::new(),
        registers: entry.regs.iter().zip(&d.place).map(|(r, p)| (*p, r.name.clone(), r.ty)).collect(),
        static_shared: entry.shared,
        shared_grain: 0,
        global_grain: 0,
        written: 0,
        live: 0,
        last_line: entry.last_line,
    };
    for raw_inst in &entry.body {
        d.instruction(raw_inst)?;
        program.code.push(d.inst);
        program.uses.push(std::mem::take(&mut d.uses));
        program.names.push(std::mem::take(&mut d.text));
    }
    program.units = d.units;
    program.lists = std::mem::take(&mut d.lists);
    program.shared_grain = d.shared_grain;
    program.global_grain = d.global_grain;
    program.constants = d.constants.iter().map(|(c, u)| (*u, *c)).collect();
    program.constants.sort_by_key(|(u, _)| *u);
    crate::flow::analyse(&mut program, &entry.params);
    Ok(program)
}

fn blank(line: u32) -> Inst {
    Inst { op: Op::Nop, r: [NONE; 14], imm: 0, more: 0, line, guard: NONE, negate: false }
}

impl Decoder<'_> {
    pub fn fail<T>(&self, why: impl std::fmt::Display) -> Result<T, At> {
        at(self.line, format!("`{}`: {why}", self.text))
    }

    fn instruction(&mut self, raw: &RawInst) -> Result<(), At> {
        self.line = raw.line;
        self.inst = blank(raw.line);
        self.uses = Uses { guard: NONE, ..Uses::default() };
        self.text =
            [&[raw.opcode.as_str()], &raw.mods.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat().join(".");
        if let Some((reg, negate)) = raw.guard {
            self.inst.guard = self.place[reg as usize];
            self.inst.negate = negate;
            self.uses.guard = self.tracked as u16 + self.inst.guard;
        }
        if !OPCODES.contains(&raw.opcode.as_str()) && !Forms::get().knows(&raw.opcode, "").0 {
            return self.fail(format!("the instruction `{}` is not supported", raw.opcode));
        }
        if let Some(Operand::Name(name, _)) = raw.args.iter().find(|a| matches!(a, Operand::Name(..))) {
            return self.fail(format!("`{name}` is not declared"));
        }
        let mut mods = Mods { left: raw.mods.clone() };
        let handled = self.control(raw, &mut mods)?
            || self.predicates(raw, &mut mods)?
            || self.moves(raw, &mut mods)?
            || self.memory(raw, &mut mods)?
            || self.matrix(raw, &mut mods)?
            || self.warp_wide(raw, &mut mods)?
            || self.hopper(raw, &mut mods)?;
        if !handled {
            return self.arithmetic(raw);
        }
        match mods.left.first() {
            Some(m) => self.fail(format!("the modifier `.{m}` is not supported here")),
            None => Ok(()),
        }
    }

    /// An instruction of the table of forms.
    fn arithmetic(&mut self, raw: &RawInst) -> Result<(), At> {
        let forms = Forms::get();
        let Some(form) = forms.find(&raw.opcode, &raw.mods) else {
            return match raw.mods.iter().find(|m| !forms.knows(&raw.opcode, m).1) {
                Some(m) => self.fail(format!("the modifier `.{m}` is not supported with `{}`", raw.opcode)),
                None => self.fail("this combination of modifiers is not supported or not PTX"),
            };
        };
        if form.arch > self.raw.arch {
            return self.fail(format!("needs target sm_{} or later", form.arch));
        }
        self.count(raw, 1 + form.src.len())?;
        let relaxed = raw.opcode == "cvt";
        for (i, (ty, arg)) in form.src.iter().zip(&raw.args[1..]).enumerate() {
            self.inst.r[i + 1] = match arg {
                Operand::Special(s) if relaxed || raw.opcode == "mov" => self.special(*s, *ty)?,
                _ => self.source(arg, *ty, relaxed)?,
            };
        }
        self.inst.r[0] = self.target(&raw.args[0], form.dst, relaxed)?;
        if relaxed {
            self.same_cells(raw, form.dst, form.src[0])?;
        }
        self.inst.op = Op::Alu(form.exec());
        Ok(())
    }

    /// `cvt` lets registers be wider than the type, but not across the 32-bit cell.
    fn same_cells(&self, raw: &RawInst, dst: Type, src: Type) -> Result<(), At> {
        for (arg, ty) in raw.args.iter().zip([dst, src]) {
            if let Operand::Reg(r) = arg {
                let declared = self.entry.regs[*r as usize].ty;
                if (declared.bytes() == 8) != (ty.bytes() == 8) {
                    return self.fail(format!("a 64-bit register for `.{}` is not supported", ty.name()));
                }
            }
        }
        Ok(())
    }

    fn control(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        match raw.opcode.as_str() {
            "bra" => {
                mods.take("uni");
                self.count(raw, 1)?;
                let Operand::Label(target) = raw.args[0] else { return self.fail("the operand must be a label") };
                self.inst.op = Op::Bra;
                self.inst.imm = i64::from(target);
            }
            "ret" | "exit" => {
                mods.take("uni");
                self.count(raw, 0)?;
                self.inst.op = Op::Ret;
            }
            "trap" => {
                self.count(raw, 0)?;
                self.inst.op = Op::Trap;
            }
            "nanosleep" => {
                mods.take("u32");
                self.count(raw, 1)?;
                self.source(&raw.args[0], Type::U32, false)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `mov` of vectors and addresses, `cvta` of shared addresses.
    fn moves(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        match raw.opcode.as_str() {
            "mov" if matches!(raw.args.get(1), Some(Operand::AddressOf(..))) => {
                let ty = self.one_type(mods)?;
                self.count(raw, 2)?;
                let Operand::AddressOf(symbol, offset) = raw.args[1] else { return Ok(false) };
                let address = self.address_of(symbol)?.wrapping_add(offset as u64);
                if ty.bytes() < 4 || (ty.bytes() == 4 && address > u64::from(u32::MAX)) {
                    return self.fail(format!("an address does not fit `.{}`", ty.name()));
                }
                self.inst.r[1] = self.immediate(&Operand::Int(address as i64), ty)?;
                self.inst.r[0] = self.target(&raw.args[0], ty, false)?;
                self.inst.op = self.form_op("mov", ty)?;
            }
            "mov" if raw.args.iter().any(|a| matches!(a, Operand::Vector(_))) => {
                let ty = self.one_type(mods)?;
                self.count(raw, 2)?;
                if ty.class() != Class::Bits {
                    return self.fail("packing and unpacking are written with .b16, .b32 or .b64");
                }
                let (items, packs) = match (&raw.args[0], &raw.args[1]) {
                    (Operand::Vector(v), _) => (v, false),
                    (_, Operand::Vector(v)) => (v, true),
                    _ => return Ok(false),
                };
                let part = ty.bytes() / items.len().max(1) as u32;
                if part * items.len() as u32 != ty.bytes() || ![1, 2, 4].contains(&part) || items.len() < 2 {
                    return self.fail(format!("{} parts do not make a `.{}`", items.len(), ty.name()));
                }
                let part_type = [Type::B8, Type::B16, Type::B32][part.trailing_zeros() as usize];
                let (n, part) = (items.len() as u8, part as u8);
                if packs {
                    for (i, item) in items.iter().enumerate() {
                        self.inst.r[1 + i] = self.source(item, part_type, false)?;
                    }
                    self.inst.r[0] = self.target(&raw.args[0], ty, false)?;
                    self.inst.op = Op::Pack { n, part };
                } else {
                    self.inst.r[8] = self.source(&raw.args[1], ty, false)?;
                    for (i, item) in items.iter().enumerate() {
                        let sink = *item == Operand::Sink;
                        self.inst.r[i] = if sink { NONE } else { self.target(item, part_type, false)? };
                    }
                    self.inst.op = Op::Unpack { n, part };
                }
            }
            "cvta" if mods.take("shared") || mods.take("shared::cta") => {
                let to = mods.take("to");
                let ty = self.one_type(mods)?;
                self.count(raw, 2)?;
                if ty.bytes() != 8 {
                    return self.fail("addresses are 64-bit: `.u64`");
                }
                self.inst.r[1] = self.source(&raw.args[1], ty, false)?;
                self.inst.r[2] = self.constant(Constant::Bits64(SHARED_WINDOW << 32))?;
                self.inst.r[0] = self.target(&raw.args[0], ty, false)?;
                self.inst.op = self.form_op(if to { "sub" } else { "add" }, ty)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn form_op(&self, opcode: &str, ty: Type) -> Result<Op, At> {
        match Forms::get().find(opcode, &[ty.name().to_string()]) {
            Some(form) => Ok(Op::Alu(form.exec())),
            None => self.fail(format!("`.{}` is not supported here", ty.name())),
        }
    }

    pub fn address_of(&self, symbol: Symbol) -> Result<u64, At> {
        match symbol {
            Symbol::Shared(offset) => Ok(u64::from(offset)),
            Symbol::DynamicShared => Ok(u64::from(dynamic_base(self.entry.shared))),
            Symbol::Const(offset) => Ok(u64::from(offset)),
            Symbol::Global(offset) => Ok(MODULE_WINDOW << 32 | u64::from(offset)),
            Symbol::Param(_) => self.fail("a parameter is read with `ld.param`"),
        }
    }

    pub fn count(&self, raw: &RawInst, n: usize) -> Result<(), At> {
        if raw.args.len() != n {
            return self.fail(format!("takes {n} operands, not {}", raw.args.len()));
        }
        Ok(())
    }

    pub fn one_type(&self, mods: &mut Mods) -> Result<Type, At> {
        match mods.types()[..] {
            [ty] => Ok(ty),
            _ => self.fail("one type is needed"),
        }
    }

    fn declared(&self, reg: u32, ty: Type, relaxed: bool) -> Result<u16, At> {
        let decl = &self.entry.regs[reg as usize];
        let width = if relaxed { decl.ty.bytes() >= ty.bytes() } else { decl.ty.bytes() == ty.bytes() };
        if !width || !ty.class().agrees(decl.ty.class()) {
            return self.fail(format!("`{}` is .{}, which does not fit .{}", decl.name, decl.ty.name(), ty.name()));
        }
        Ok(self.place[reg as usize])
    }

    /// A register to read, or a constant; `relaxed` lets the register be wider than the type.
    pub fn source(&mut self, arg: &Operand, ty: Type, relaxed: bool) -> Result<u16, At> {
        match arg {
            Operand::Reg(r) => {
                let unit = self.declared(*r, ty, relaxed)?;
                self.uses.reads.push(unit);
                Ok(unit)
            }
            Operand::Int(_) | Operand::Single(_) | Operand::Double(_) => self.immediate(arg, ty),
            Operand::Special(_) => self.fail("special registers are read with `mov` only"),
            _ => self.fail(format!("expected a .{} register or constant", ty.name())),
        }
    }

    fn immediate(&mut self, arg: &Operand, ty: Type) -> Result<u16, At> {
        let bits = match (arg, ty.class()) {
            (Operand::Int(v), Class::Int | Class::Bits) => *v as u64,
            (Operand::Single(v), Class::F32 | Class::Bits) if ty.bytes() == 4 => u64::from(*v),
            (Operand::Double(v), Class::F32) => u64::from((*v as f32).to_bits()),
            (Operand::Double(v), Class::F64) => v.to_bits(),
            _ => return self.fail(format!("this constant cannot be a .{}", ty.name())),
        };
        self.constant(if ty.bytes() == 8 { Constant::Bits64(bits) } else { Constant::Bits32(bits as u32) })
    }

    pub fn constant(&mut self, constant: Constant) -> Result<u16, At> {
        if let Some(unit) = self.constants.get(&constant) {
            return Ok(*unit);
        }
        let unit = self.units as u16;
        self.units += if matches!(constant, Constant::Bits64(_)) { 2 } else { 1 };
        if self.units > MAX_UNITS {
            return self.fail("too many registers and constants");
        }
        self.constants.insert(constant, unit);
        Ok(unit)
    }

    fn special(&mut self, special: Special, ty: Type) -> Result<u16, At> {
        if ty.bytes() != 4 || !matches!(ty.class(), Class::Int | Class::Bits) {
            return self.fail("special registers are 32-bit integers");
        }
        self.constant(Constant::Special(special))
    }

    /// A register to write; `_` writes nowhere that is read.
    pub fn target(&mut self, arg: &Operand, ty: Type, relaxed: bool) -> Result<u16, At> {
        match arg {
            Operand::Reg(r) => {
                let unit = self.declared(*r, ty, relaxed)?;
                self.uses.writes.push(unit);
                Ok(unit)
            }
            _ => self.fail(format!("the destination must be a .{} register", ty.name())),
        }
    }

    fn pred(&self, reg: u32) -> Result<u16, At> {
        let decl = &self.entry.regs[reg as usize];
        if decl.ty != Type::Pred {
            return self.fail(format!("`{}` is not a predicate", decl.name));
        }
        Ok(self.place[reg as usize])
    }

    /// A predicate to read, and whether it is negated.
    pub fn pred_source(&mut self, arg: &Operand) -> Result<(u16, bool), At> {
        let (reg, negate) = match arg {
            Operand::Reg(r) => (*r, false),
            Operand::NotReg(r) => (*r, true),
            _ => return self.fail("expected a predicate register"),
        };
        let p = self.pred(reg)?;
        self.uses.reads.push(self.tracked as u16 + p);
        Ok((p, negate))
    }

    /// A predicate to write; NONE for `_`.
    pub fn pred_target(&mut self, arg: &Operand) -> Result<u16, At> {
        match arg {
            Operand::Reg(r) => {
                let p = self.pred(*r)?;
                self.uses.writes.push(self.tracked as u16 + p);
                Ok(p)
            }
            Operand::Sink => Ok(NONE),
            _ => self.fail("expected a predicate register"),
        }
    }

    /// `[base + offset]`: unit of the base, whether it is 64-bit, and the constant part.
    pub fn address(&mut self, arg: &Operand, only64: bool) -> Result<(u16, bool, i64), At> {
        let Operand::Memory(base, offset) = arg else { return self.fail("expected an address in brackets") };
        match base {
            Base::Reg(r) => {
                let decl = &self.entry.regs[*r as usize];
                let wide = decl.ty.bytes() == 8;
                if !matches!(decl.ty.class(), Class::Int | Class::Bits) || decl.ty.bytes() < 4 || (only64 && !wide) {
                    let want = if only64 { "64-bit" } else { "32- or 64-bit" };
                    return self.fail(format!(
                        "the address `{}` is .{}, not a {want} integer",
                        decl.name,
                        decl.ty.name()
                    ));
                }
                let unit = self.place[*r as usize];
                self.uses.reads.push(unit);
                Ok((unit, wide, *offset))
            }
            Base::Symbol(s) => {
                let address = self.address_of(*s)?.wrapping_add(*offset as u64);
                Ok((self.constant(Constant::Bits64(0))?, true, address as i64))
            }
            Base::Absolute => Ok((self.constant(Constant::Bits64(0))?, true, *offset)),
        }
    }
}

/// Dynamic shared memory starts behind the static part, aligned for any access.
pub(crate) fn dynamic_base(static_shared: u32) -> u32 {
    static_shared.next_multiple_of(16)
}
