//! Tokens to kernels: directives, declarations, scopes, labels and operands. Opcodes are judged later, by the decoder.

use std::collections::HashMap;

use crate::ast::{Operand, ParamDecl, RawEntry, RawModule, Symbol};
use crate::error::{at, At};
use crate::lexer::{lex, Tok, Token};
use crate::types::Type;

/// More registers than any kernel declares; bounds what `%r<n>` may allocate.
pub(crate) const MAX_REGS: usize = 16 * 1024;
/// Bounds a variable's size: above what any target has of shared or constant memory.
const MAX_VARIABLE: u64 = 1 << 20;
/// Kernel parameters above this need a newer driver than the floor.
const MAX_PARAMS: u32 = 4352;
/// Nesting of parentheses and scopes.
pub(crate) const MAX_DEPTH: u32 = 64;

#[derive(Clone, Copy)]
pub(crate) enum Named {
    Reg(u32),
    Variable(Symbol),
}

pub(crate) struct Scope {
    pub(crate) parent: Option<usize>,
    pub(crate) names: HashMap<String, Named>,
    pub(crate) labels: HashMap<String, u32>,
}

pub(crate) struct Parser<'a> {
    pub(crate) tokens: Vec<Token<'a>>,
    pub(crate) pos: usize,
    depth: u32,
    pub(crate) scopes: Vec<Scope>,
    pub(crate) scope: usize,
    module: RawModule,
    module_shared: u32,
    module_dynamic: bool,
}

/// The module in `source`.
pub(crate) fn parse(source: &str) -> Result<RawModule, At> {
    let root = Scope { parent: None, names: HashMap::new(), labels: HashMap::new() };
    let mut p = Parser {
        tokens: lex(source)?,
        pos: 0,
        depth: 0,
        scopes: vec![root],
        scope: 0,
        module: RawModule::default(),
        module_shared: 0,
        module_dynamic: false,
    };
    p.module()?;
    Ok(p.module)
}

fn align_up(value: u32, align: u32) -> u32 {
    value.next_multiple_of(align.max(1))
}

impl<'a> Parser<'a> {
    pub(crate) fn line(&self) -> u32 {
        self.tokens[self.pos].line
    }

    pub(crate) fn peek(&self) -> Tok<'a> {
        self.tokens[self.pos].tok
    }

    pub(crate) fn peek_second(&self) -> Tok<'a> {
        self.tokens[(self.pos + 1).min(self.tokens.len() - 1)].tok
    }

    pub(crate) fn next(&mut self) -> Tok<'a> {
        let tok = self.peek();
        self.pos = (self.pos + 1).min(self.tokens.len() - 1);
        tok
    }

    pub(crate) fn sign(&mut self, s: &'static str) -> bool {
        let found = self.peek() == Tok::Sign(s);
        if found {
            self.next();
        }
        found
    }

    pub(crate) fn expect(&mut self, s: &'static str) -> Result<(), At> {
        let (line, found) = (self.line(), self.peek());
        if self.sign(s) {
            return Ok(());
        }
        at(line, format!("expected `{s}`, found {}", show(found)))
    }

    pub(crate) fn dot(&mut self, name: &str) -> bool {
        let found = self.peek() == Tok::Dot(name);
        if found {
            self.next();
        }
        found
    }

    pub(crate) fn word(&mut self, what: &str) -> Result<&'a str, At> {
        let line = self.line();
        match self.next() {
            Tok::Word(w) => Ok(w),
            t => at(line, format!("expected {what}, found {}", show(t))),
        }
    }

    pub(crate) fn enter(&mut self) -> Result<(), At> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return at(self.line(), format!("nested more than {MAX_DEPTH} deep"));
        }
        Ok(())
    }

    pub(crate) fn leave(&mut self) {
        self.depth -= 1;
    }

    /// A constant expression that must be an integer in `low..=high`.
    pub(crate) fn constant(&mut self, what: &str, low: i64, high: i64) -> Result<i64, At> {
        let line = self.line();
        match self.expression(0)? {
            Operand::Int(v) if (low..=high).contains(&v) => Ok(v),
            Operand::Int(v) => at(line, format!("{what} is {v}; it must lie in {low}..={high}")),
            _ => at(line, format!("{what} must be an integer")),
        }
    }

    fn module(&mut self) -> Result<(), At> {
        let mut version = false;
        let mut linkage = "";
        loop {
            let line = self.line();
            match self.next() {
                Tok::End => break,
                Tok::Dot("version") => {
                    let Tok::Double(_) = self.next() else { return at(line, "`.version` needs a number such as 7.8") };
                    version = true;
                }
                Tok::Dot("target") => self.target(line)?,
                Tok::Dot("address_size") => {
                    self.constant("`.address_size` (only 64 is supported; it)", 64, 64)?;
                }
                Tok::Dot("file") => {
                    while self.line() == line && self.peek() != Tok::End {
                        self.next();
                    }
                }
                Tok::Dot(l @ ("visible" | "extern" | "weak")) => {
                    linkage = l;
                    continue;
                }
                Tok::Dot("entry") => {
                    if !version || self.module.arch == 0 {
                        return at(line, "`.version` and `.target` must come before the first entry");
                    }
                    self.entry(line)?;
                }
                Tok::Dot(space @ ("shared" | "const" | "global")) => self.variable(space, linkage == "extern", line)?,
                Tok::Dot(d) => return at(line, format!("the directive `.{d}` is not supported at module scope")),
                t => return at(line, format!("expected a directive, found {}", show(t))),
            }
            linkage = "";
        }
        if self.module.entries.is_empty() {
            return at(self.line(), "no `.entry` in this module");
        }
        Ok(())
    }

    fn target(&mut self, line: u32) -> Result<(), At> {
        let target = self.word("a target such as sm_80")?;
        let number: String =
            target.strip_prefix("sm_").unwrap_or("").chars().take_while(char::is_ascii_digit).collect();
        self.module.arch = number.parse().ok().filter(|n| (30..=200).contains(n)).unwrap_or(0);
        if self.module.arch < 80 {
            return at(line, format!("target `{target}`: sm_80 or later is needed"));
        }
        self.module.target = target.to_string();
        while self.sign(",") {
            self.word("a target option")?;
        }
        Ok(())
    }

    pub(crate) fn declare(&mut self, name: &str, what: Named, line: u32) -> Result<(), At> {
        if self.scopes[self.scope].names.insert(name.to_string(), what).is_some() {
            return at(line, format!("`{name}` is declared twice in this scope"));
        }
        Ok(())
    }

    pub(crate) fn find(&self, name: &str) -> Option<Named> {
        let mut scope = Some(self.scope);
        while let Some(s) = scope {
            if let Some(found) = self.scopes[s].names.get(name) {
                return Some(*found);
            }
            scope = self.scopes[s].parent;
        }
        None
    }

    pub(crate) fn push_scope(&mut self) {
        self.scopes.push(Scope { parent: Some(self.scope), names: HashMap::new(), labels: HashMap::new() });
        self.scope = self.scopes.len() - 1;
    }

    /// `[dim][dim]..` as an element count; an empty dim (extern arrays) gives none.
    fn dims(&mut self) -> Result<(Option<u64>, bool), At> {
        let (mut count, mut array) = (Some(1u64), false);
        while self.sign("[") {
            array = true;
            if self.sign("]") {
                count = None;
                continue;
            }
            let n = self.constant("an array dimension", 0, MAX_VARIABLE as i64)? as u64;
            self.expect("]")?;
            count = count.map(|c| c.saturating_mul(n));
        }
        Ok((count, array))
    }

    /// `.align n`, `.ptr`, state spaces and the type, in any order: (type, align, pointer).
    fn attributes(&mut self) -> Result<(Type, Option<u32>, bool), At> {
        let (mut ty, mut align, mut pointer) = (None, None, false);
        loop {
            let line = self.line();
            let Tok::Dot(d) = self.peek() else { break };
            self.next();
            if let Some(t) = Type::parse(d) {
                ty = Some(t);
            } else if d == "align" {
                let n = self.constant("`.align`", 1, 1024)?;
                if !(n as u32).is_power_of_two() {
                    return at(line, format!("`.align {n}` is not a power of two"));
                }
                align = Some(n as u32);
            } else if d == "ptr" {
                pointer = true;
            } else if !(pointer && ["global", "shared", "const", "local"].contains(&d)) {
                return at(line, format!("`.{d}` is not supported in a declaration"));
            }
        }
        match ty {
            Some(t) if t != Type::Pred => Ok((t, align, pointer)),
            _ => at(self.line(), "a declaration without a type such as .b8 or .u64"),
        }
    }

    fn entry(&mut self, line: u32) -> Result<(), At> {
        let name = self.word("the entry's name")?.to_string();
        if self.module.entries.iter().any(|e| e.name == name) {
            return at(line, format!("entry `{name}` is defined twice"));
        }
        self.push_scope();
        let mut entry = RawEntry {
            name,
            line,
            last_line: line,
            params: Vec::new(),
            reqntid: None,
            maxntid: None,
            regs: Vec::new(),
            shared: self.module_shared,
            dynamic_shared: self.module_dynamic,
            body: Vec::new(),
        };
        if self.sign("(") && !self.sign(")") {
            loop {
                self.param(&mut entry)?;
                if self.sign(")") {
                    break;
                }
                self.expect(",")?;
            }
        }
        while let Tok::Dot(d) = self.peek() {
            let line = self.line();
            self.next();
            match d {
                "reqntid" => entry.reqntid = Some(self.triple()?),
                "maxntid" => entry.maxntid = Some(self.triple()?),
                "minnctapersm" | "maxnreg" => {
                    self.constant("the directive's value", 1, 65536)?;
                }
                "pragma" => self.pragma()?,
                _ => return at(line, format!("the directive `.{d}` is not supported before a kernel's body")),
            }
        }
        self.expect("{")?;
        let first_scope = self.scopes.len() - 1;
        self.body(&mut entry)?;
        entry.last_line = self.tokens[self.pos - 1].line;
        self.scope = 0;
        self.resolve_labels(&mut entry);
        self.scopes.truncate(first_scope);
        self.module.entries.push(entry);
        Ok(())
    }

    fn triple(&mut self) -> Result<[u32; 3], At> {
        let mut dims = [1; 3];
        for (i, d) in dims.iter_mut().enumerate() {
            if i > 0 && !self.sign(",") {
                break;
            }
            *d = self.constant("a block dimension", 1, 1024)? as u32;
        }
        Ok(dims)
    }

    pub(crate) fn pragma(&mut self) -> Result<(), At> {
        let line = self.line();
        let Tok::Text(_) = self.next() else { return at(line, "`.pragma` needs a string") };
        self.expect(";")
    }

    fn param(&mut self, entry: &mut RawEntry) -> Result<(), At> {
        let line = self.line();
        if !self.dot("param") {
            return at(line, format!("expected `.param`, found {}", show(self.peek())));
        }
        let (ty, align, is_pointer) = self.attributes()?;
        let name = self.word("the parameter's name")?;
        let (Some(count), array) = self.dims()? else { return at(line, "a parameter needs a size") };
        let size = count.saturating_mul(u64::from(ty.bytes()));
        // `.ptr .align` speaks of what is pointed to; the pointer itself is aligned to its size.
        let align = if is_pointer || !array { ty.bytes() } else { align.unwrap_or(ty.bytes()).max(ty.bytes()) };
        let end = entry.params.last().map_or(0, |p| p.offset + p.size);
        let offset = align_up(end, align);
        if size > u64::from(MAX_PARAMS) || offset + size as u32 > MAX_PARAMS {
            return at(line, format!("the parameters take more than {MAX_PARAMS} bytes"));
        }
        entry.params.push(ParamDecl { name: name.to_string(), size: size as u32, align, is_pointer, offset });
        self.declare(name, Named::Variable(Symbol::Param(offset)), line)
    }

    /// `.shared`, `.const` or `.global` at module scope.
    fn variable(&mut self, space: &str, external: bool, line: u32) -> Result<(), At> {
        if space == "shared" {
            let (bytes, dynamic) = (self.module_shared, self.module_dynamic);
            let (shared, dynamic) = self.shared(bytes, dynamic, external)?;
            (self.module_shared, self.module_dynamic) = (shared, dynamic);
            return Ok(());
        }
        let (ty, align, _) = self.attributes()?;
        let name = self.word("the variable's name")?;
        let (count, _) = self.dims()?;
        let bank_length = if space == "const" { self.module.constants.len() } else { self.module.globals.len() };
        let offset = bank_length.next_multiple_of(align.unwrap_or(ty.bytes()).max(ty.bytes()) as usize);
        let mut data = vec![0; offset - bank_length];
        let start = data.len();
        if self.sign("=") {
            self.initialiser(ty, &mut data)?;
        } else if space == "global" {
            return at(line, "a `.global` variable without an initialiser; pass a buffer instead");
        }
        let given = (data.len() - start) as u64 / u64::from(ty.bytes());
        let count = count.unwrap_or(given);
        let size = count.saturating_mul(u64::from(ty.bytes()));
        if external || given > count || offset as u64 + size > MAX_VARIABLE {
            return at(line, format!("`{name}`: extern, too many initial values, or larger than {MAX_VARIABLE} bytes"));
        }
        data.resize(start + size as usize, 0);
        self.expect(";")?;
        let symbol = if space == "const" { Symbol::Const(offset as u32) } else { Symbol::Global(offset as u32) };
        let bank = if space == "const" { &mut self.module.constants } else { &mut self.module.globals };
        bank.extend(data);
        self.declare(name, Named::Variable(symbol), line)
    }

    /// `{1, 2}` nested to any shape, or one value, appended little-endian.
    fn initialiser(&mut self, ty: Type, data: &mut Vec<u8>) -> Result<(), At> {
        if self.sign("{") {
            self.enter()?;
            loop {
                self.initialiser(ty, data)?;
                if self.sign("}") {
                    break;
                }
                self.expect(",")?;
            }
            self.leave();
            return Ok(());
        }
        let line = self.line();
        let bits = match (self.expression(0)?, ty) {
            (Operand::Int(v), t) if !t.is_float() => v as u64,
            (Operand::Single(v), Type::F32) => u64::from(v),
            (Operand::Double(v), Type::F32) => u64::from((v as f32).to_bits()),
            (Operand::Double(v), Type::F64) => v.to_bits(),
            (v, t) => return at(line, format!("{v:?} cannot initialise a .{}", t.name())),
        };
        data.extend(&bits.to_le_bytes()[..ty.bytes() as usize]);
        Ok(())
    }

    /// One `.shared` declaration: the bytes used so far and whether dynamic memory is named, before and after.
    pub(crate) fn shared(&mut self, used: u32, dynamic: bool, external: bool) -> Result<(u32, bool), At> {
        let line = self.line();
        let (ty, align, _) = self.attributes()?;
        let (mut used, mut dynamic) = (used, dynamic);
        loop {
            let name = self.word("the variable's name")?;
            let (count, _) = self.dims()?;
            if external {
                if count.is_some_and(|c| c != 0) {
                    return at(line, "`.extern .shared` takes an array of unknown size: `name[]`");
                }
                dynamic = true;
                self.declare(name, Named::Variable(Symbol::DynamicShared), line)?;
            } else {
                let Some(count) = count else { return at(line, format!("`{name}` needs a size")) };
                let size = count.saturating_mul(u64::from(ty.bytes()));
                let offset = align_up(used, align.unwrap_or(ty.bytes()).max(ty.bytes()));
                if size > MAX_VARIABLE || u64::from(offset) + size > MAX_VARIABLE {
                    return at(line, format!("`{name}`: more than {MAX_VARIABLE} bytes of shared memory"));
                }
                used = offset + size as u32;
                self.declare(name, Named::Variable(Symbol::Shared(offset)), line)?;
            }
            if !self.sign(",") {
                break;
            }
        }
        self.expect(";")?;
        Ok((used, dynamic))
    }
}

pub(crate) fn show(tok: Tok) -> String {
    match tok {
        Tok::Word(w) => format!("`{w}`"),
        Tok::Dot(d) => format!("`.{d}`"),
        Tok::Int(v) => format!("`{v}`"),
        Tok::Double(v) => format!("`{v}`"),
        Tok::Single(v) => format!("`0f{v:08X}`"),
        Tok::Text(t) => format!("\"{t}\""),
        Tok::Sign(s) => format!("`{s}`"),
        Tok::End => "the end of the file".to_string(),
    }
}
