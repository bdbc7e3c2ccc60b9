//! A kernel's body: register declarations, labels, statements and their operands.

use crate::ast::{Base, Operand, RawEntry, RawInst, RegDecl, Special};
use crate::error::{at, At};
use crate::lexer::Tok;
use crate::parse::{Named, Parser, MAX_DEPTH, MAX_REGS};
use crate::types::Type;

impl Parser<'_> {
    pub(crate) fn body(&mut self, entry: &mut RawEntry) -> Result<(), At> {
        let mut open = vec![self.scope];
        loop {
            let line = self.line();
            match self.peek() {
                Tok::Sign("{") => {
                    self.next();
                    if open.len() > MAX_DEPTH as usize {
                        return at(line, format!("scopes nested more than {MAX_DEPTH} deep"));
                    }
                    self.push_scope();
                    open.push(self.scope);
                }
                Tok::Sign("}") => {
                    self.next();
                    open.pop();
                    match open.last() {
                        Some(scope) => self.scope = *scope,
                        None => return Ok(()),
                    }
                }
                Tok::Dot("reg") => self.registers(entry)?,
                Tok::Dot(d @ ("shared" | "extern")) => {
                    self.next();
                    if d == "extern" && !self.dot("shared") {
                        return at(line, "only `.extern .shared` is supported in a kernel");
                    }
                    (entry.shared, entry.dynamic_shared) =
                        self.shared(entry.shared, entry.dynamic_shared, d == "extern")?;
                }
                Tok::Dot("pragma") => {
                    self.next();
                    self.pragma()?;
                }
                Tok::Dot("loc") => {
                    while self.line() == line {
                        self.next();
                    }
                }
                Tok::Dot(d) => return at(line, format!("the directive `.{d}` is not supported in a kernel")),
                Tok::End => return at(line, format!("the body of `{}` has no closing brace", entry.name)),
                Tok::Sign(";") => {
                    self.next();
                }
                _ => self.statement(entry)?,
            }
        }
    }

    fn registers(&mut self, entry: &mut RawEntry) -> Result<(), At> {
        self.next();
        let line = self.line();
        let ty = match self.next() {
            Tok::Dot(d) => Type::parse(d).filter(|t| *t != Type::Tf32),
            _ => None,
        };
        let Some(ty) = ty else { return at(line, "`.reg` needs one scalar type such as .b32") };
        loop {
            let line = self.line();
            let name = self.word("a register's name")?;
            if self.sign("<") {
                let count = self.constant("the number of registers", 1, MAX_REGS as i64)?;
                self.expect(">")?;
                for i in 0..count {
                    self.register(entry, format!("{name}{i}"), ty, line)?;
                }
            } else {
                self.register(entry, name.to_string(), ty, line)?;
            }
            if !self.sign(",") {
                break;
            }
        }
        self.expect(";")
    }

    fn register(&mut self, entry: &mut RawEntry, name: String, ty: Type, line: u32) -> Result<(), At> {
        if entry.regs.len() >= MAX_REGS {
            return at(line, format!("more than {MAX_REGS} registers"));
        }
        self.declare(&name, Named::Reg(entry.regs.len() as u32), line)?;
        entry.regs.push(RegDecl { name, ty });
        Ok(())
    }

    /// A label or an instruction.
    fn statement(&mut self, entry: &mut RawEntry) -> Result<(), At> {
        let line = self.line();
        let mut guard = None;
        if self.sign("@") {
            let negate = self.sign("!");
            let name = self.word("a predicate register")?;
            match self.find(name) {
                Some(Named::Reg(r)) if entry.regs[r as usize].ty == Type::Pred => guard = Some((r, negate)),
                _ => return at(line, format!("`{name}` is not a declared predicate register")),
            }
        }
        let line = self.line();
        let opcode = self.word("an instruction")?;
        if guard.is_none() && self.sign(":") {
            let index = entry.body.len() as u32;
            if self.scopes[self.scope].labels.insert(opcode.to_string(), index).is_some() {
                return at(line, format!("the label `{opcode}` is defined twice in this scope"));
            }
            return Ok(());
        }
        let mut mods = Vec::new();
        while let Tok::Dot(d) = self.peek() {
            mods.push(d.to_string());
            self.next();
        }
        let mut args = Vec::new();
        if !self.sign(";") {
            loop {
                args.push(self.operand()?);
                if self.sign(";") {
                    break;
                }
                self.expect(",")?;
            }
        }
        entry.body.push(RawInst { line, guard, opcode: opcode.to_string(), mods, args });
        Ok(())
    }

    fn operand(&mut self) -> Result<Operand, At> {
        let line = self.line();
        if self.sign("{") {
            let mut items = Vec::new();
            loop {
                items.push(self.simple()?);
                if self.sign("}") {
                    return Ok(Operand::Vector(items));
                }
                self.expect(",")?;
            }
        }
        if self.sign("[") {
            let (base, offset) = match self.simple()? {
                Operand::Reg(r) => (Base::Reg(r), 0),
                Operand::AddressOf(s, offset) => (Base::Symbol(s), offset),
                Operand::Int(v) => (Base::Absolute, v),
                Operand::Name(n, _) => return at(line, format!("`{n}` is not declared")),
                other => return at(line, format!("{other:?} is not an address")),
            };
            let offset = offset.wrapping_add(self.offset()?);
            self.expect("]")?;
            return Ok(Operand::Memory(base, offset));
        }
        let first = self.simple()?;
        if self.sign("|") {
            let second = self.simple()?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    /// `+ 4 + 8 ..` after a base.
    fn offset(&mut self) -> Result<i64, At> {
        let mut total = 0i64;
        loop {
            let line = self.line();
            if self.peek() == Tok::Sign("-") {
                return at(line, "the assembler refuses `-` here; write `+ -4` for a negative offset");
            }
            if !self.sign("+") {
                return Ok(total);
            }
            let Operand::Int(v) = self.expression(crate::constexpr::ABOVE_SUM)? else {
                return at(line, "an address offset must be an integer constant");
            };
            total = total.wrapping_add(v);
        }
    }

    /// A register, `!p`, special register, symbol with offset, label, sink or constant expression.
    fn simple(&mut self) -> Result<Operand, At> {
        let line = self.line();
        if self.peek() == Tok::Sign("!") {
            if let Tok::Word(name) = self.tokens[self.pos + 1].tok {
                if let Some(Named::Reg(r)) = self.find(name) {
                    self.pos += 2;
                    return Ok(Operand::NotReg(r));
                }
            }
        }
        let Tok::Word(name) = self.peek() else { return self.expression(0) };
        self.next();
        match self.find(name) {
            Some(Named::Reg(r)) => Ok(Operand::Reg(r)),
            Some(Named::Variable(s)) => Ok(Operand::AddressOf(s, self.offset()?)),
            None if name == "_" => Ok(Operand::Sink),
            None if name == "WARP_SZ" => Ok(Operand::Int(32)),
            None if name.starts_with('%') => self.special(name, line).map(Operand::Special),
            None => Ok(Operand::Name(name.to_string(), self.scope)),
        }
    }

    fn special(&mut self, name: &str, line: u32) -> Result<Special, At> {
        let axis = match self.peek() {
            Tok::Dot("x") => Some(0),
            Tok::Dot("y") => Some(1),
            Tok::Dot("z") => Some(2),
            _ => None,
        };
        let special = match (name, axis) {
            ("%tid", Some(a)) => Some(Special::Tid(a)),
            ("%ntid", Some(a)) => Some(Special::Ntid(a)),
            ("%ctaid", Some(a)) => Some(Special::Ctaid(a)),
            ("%nctaid", Some(a)) => Some(Special::Nctaid(a)),
            ("%laneid", None) => Some(Special::LaneId),
            ("%warpid", None) => Some(Special::WarpId),
            ("%nwarpid", None) => Some(Special::NWarpId),
            ("%lanemask_eq", None) => Some(Special::LaneMaskEq),
            ("%lanemask_lt", None) => Some(Special::LaneMaskLt),
            ("%lanemask_le", None) => Some(Special::LaneMaskLe),
            ("%lanemask_gt", None) => Some(Special::LaneMaskGt),
            ("%lanemask_ge", None) => Some(Special::LaneMaskGe),
            ("%dynamic_smem_size", None) => Some(Special::DynamicSharedSize),
            ("%total_smem_size", None) => Some(Special::TotalSharedSize),
            _ => None,
        };
        if axis.is_some() {
            self.next();
        }
        match special {
            Some(s) => Ok(s),
            None => at(line, format!("`{name}` is neither a declared register nor a supported special register")),
        }
    }

    /// Turns names into labels; what is neither stays a name, for the decoder to refuse.
    pub(crate) fn resolve_labels(&self, entry: &mut RawEntry) {
        for arg in entry.body.iter_mut().flat_map(|i| &mut i.args) {
            let Operand::Name(name, scope) = arg else { continue };
            let mut scope = Some(*scope);
            let mut found = None;
            while let (Some(s), None) = (scope, found) {
                found = self.scopes[s].labels.get(name.as_str()).copied();
                scope = self.scopes[s].parent;
            }
            if let Some(index) = found {
                *arg = Operand::Label(index);
            }
        }
    }
}
