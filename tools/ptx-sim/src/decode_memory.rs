//! Decoding of loads, stores, atomics, asynchronous copies and hints.

use crate::ast::{Base, Operand, RawInst, Symbol};
use crate::decode::{Decoder, Mods};
use crate::error::At;
use crate::inst::{Access, Atomic, Constant, Op, Space, NONE};
use crate::types::{Class, Type};

/// Cache operators and eviction hints: they change speed only.
const CACHE: [&str; 8] = ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"];
const SCOPES: [&str; 4] = ["cta", "cluster", "gpu", "sys"];

impl Decoder<'_> {
    pub(crate) fn memory(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        match raw.opcode.as_str() {
            "ld" if mods.take("param") => self.load_param(raw, mods)?,
            "ld" | "st" => self.load_store(raw, mods)?,
            "atom" => self.atomic(raw, mods, true)?,
            "red" => self.atomic(raw, mods, false)?,
            "cp" => self.copy(raw, mods)?,
            "membar" => {
                let Some(scope) = mods.one_of(&["cta", "gl", "sys"]) else { return self.fail("no scope") };
                self.count(raw, 0)?;
                self.inst.op = Op::Fence { device: scope != "cta" };
            }
            "fence" if self.proxy_fence(raw, mods)? => {}
            "fence" => {
                if mods.one_of(&["acq_rel", "sc"]).is_none() {
                    return self.fail("`.acq_rel` or `.sc` is needed");
                }
                let Some(scope) = mods.one_of(&SCOPES) else { return self.fail("no scope") };
                self.count(raw, 0)?;
                self.inst.op = Op::Fence { device: scope != "cta" };
            }
            "prefetch" => {
                mods.take("global");
                if mods.one_of(&["L1", "L2", "L2::evict_last", "L2::evict_normal"]).is_none() {
                    return self.fail("the cache level is missing");
                }
                self.count(raw, 1)?;
                self.address(&raw.args[0], true)?;
            }
            "createpolicy" => {
                mods.take("fractional");
                while mods.starting("L2::evict_").is_some() {}
                if self.one_type(mods)? != Type::B64 || raw.args.is_empty() || raw.args.len() > 2 {
                    return self.fail("expected `createpolicy.fractional.L2::evict_x.b64 policy{, fraction}`");
                }
                // The value is opaque; hints have no effect here.
                self.inst.r[1] = self.constant(Constant::Bits64(0))?;
                self.inst.r[0] = self.target(&raw.args[0], Type::B64, false)?;
                self.inst.op = Op::Pack { n: 1, part: 8 };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn vector_width(&self, mods: &mut Mods, ty: Type) -> Result<u8, At> {
        let n = match mods.one_of(&["v2", "v4"]) {
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        };
        if ty.bytes() * u32::from(n) > 16 || ty == Type::Pred {
            return self.fail("one access moves at most 16 bytes");
        }
        Ok(n)
    }

    /// One register or `{..}` of them, into `r[0..n]`; whether they are 64-bit.
    fn data(&mut self, arg: &Operand, ty: Type, n: u8, store: bool) -> Result<bool, At> {
        let single = [arg.clone()];
        let items: &[Operand] = match arg {
            Operand::Vector(v) => v,
            _ => &single,
        };
        if items.len() != usize::from(n) || (n > 1) != matches!(arg, Operand::Vector(_)) {
            return self.fail(format!("{n} data registers are needed"));
        }
        let mut wide = None;
        for (i, item) in items.iter().enumerate() {
            let register_wide = match item {
                Operand::Reg(r) => self.entry.regs[*r as usize].ty.bytes() == 8,
                _ => ty.bytes() == 8,
            };
            if *wide.get_or_insert(register_wide) != register_wide {
                return self.fail("32- and 64-bit data registers in one access");
            }
            self.inst.r[i] = match item {
                Operand::Sink if !store => NONE,
                _ if store => self.source(item, ty, true)?,
                _ => self.target(item, ty, true)?,
            };
        }
        Ok(wide.unwrap_or(false))
    }

    fn load_param(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        let ty = self.one_type(mods)?;
        let n = self.vector_width(mods, ty)?;
        self.count(raw, 2)?;
        let Operand::Memory(Base::Symbol(Symbol::Param(start)), offset) = raw.args[1] else {
            return self.fail("expected `[parameter + constant]`");
        };
        let from = i64::from(start).wrapping_add(offset);
        let bytes = i64::from(ty.bytes());
        let owner = self.entry.params.iter().find(|p| p.offset == start);
        let (size, name) = owner.map_or((0, ""), |p| (i64::from(p.size), p.name.as_str()));
        if offset < 0 || offset > size - bytes * i64::from(n) {
            return self.fail(format!("reads beyond the parameter `{name}` of {size} bytes"));
        }
        if from % (bytes * i64::from(n)) != 0 {
            return self.fail(format!("`[{name} + {offset}]` is not aligned to {}", bytes * i64::from(n)));
        }
        let wide = self.data(&raw.args[0], ty, n, false)?;
        let (bytes, signed) = (ty.bytes() as u8, ty.signed());
        let space = Space::Const;
        let access = Access { space, bytes, n, signed, wide, base64: true, strong: false, sync: false };
        self.inst.op = Op::LdParam(access);
        self.inst.imm = from;
        Ok(())
    }

    fn space(&self, mods: &mut Mods) -> Space {
        if mods.take("global") {
            Space::Global
        } else if mods.take("shared") || mods.take("shared::cta") {
            Space::Shared
        } else if mods.take("const") {
            Space::Const
        } else {
            Space::Generic
        }
    }

    /// Race tracking needs cells no larger than the smallest access.
    pub(crate) fn grain(&mut self, space: Space, bytes: u32) {
        if space != Space::Shared {
            self.global_grain = self.global_grain.min(bytes);
        }
        if space != Space::Global {
            self.shared_grain = self.shared_grain.min(bytes);
        }
    }

    fn load_store(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        let store = raw.opcode == "st";
        let ordering: &[&str] = if store {
            &["volatile", "relaxed", "release", "weak"]
        } else {
            &["volatile", "relaxed", "acquire", "weak"]
        };
        let order = ordering.iter().find(|o| mods.take(o)).copied();
        if matches!(order, Some("relaxed" | "acquire" | "release")) && mods.one_of(&SCOPES).is_none() {
            return self.fail("the scope is missing: .cta, .gpu or .sys");
        }
        let space = self.space(mods);
        while mods.one_of(&CACHE).is_some() {}
        let hinted = mods.take("L2::cache_hint");
        for level in ["L1::", "L2::"] {
            if let Some(hint) = mods.starting(level) {
                let known = [
                    "evict_normal",
                    "evict_unchanged",
                    "evict_first",
                    "evict_last",
                    "no_allocate",
                    "64B",
                    "128B",
                    "256B",
                ];
                if !known.contains(&&hint[4..]) {
                    return self.fail(format!("the modifier `.{hint}` is not supported here"));
                }
            }
        }
        let ty = self.one_type(mods)?;
        let n = self.vector_width(mods, ty)?;
        if matches!(ty, Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2 | Type::Tf32) {
            return self.fail("halves are moved as .b16 and .b32");
        }
        if store && space == Space::Const {
            return self.fail("constant memory is read-only");
        }
        self.count(raw, if hinted { 3 } else { 2 })?;
        if hinted {
            self.source(&raw.args[2], Type::B64, false)?;
        }
        let (target, data) = if store { (&raw.args[0], &raw.args[1]) } else { (&raw.args[1], &raw.args[0]) };
        let (base, base64, offset) = self.located(target, space)?;
        let wide = self.data(data, ty, n, store)?;
        self.inst.r[8] = base;
        self.inst.imm = offset;
        let access = Access {
            space,
            bytes: ty.bytes() as u8,
            n,
            signed: ty.signed(),
            wide,
            base64,
            strong: !matches!(order, None | Some("weak")),
            sync: matches!(order, Some("acquire" | "release")),
        };
        self.grain(space, access.total());
        self.inst.op = if store { Op::St(access) } else { Op::Ld(access) };
        Ok(())
    }

    /// An address that belongs to the space: symbols must be of it.
    pub(crate) fn located(&mut self, arg: &Operand, space: Space) -> Result<(u16, bool, i64), At> {
        if let Operand::Memory(Base::Symbol(s), _) = arg {
            let fits = match s {
                Symbol::Shared(_) | Symbol::DynamicShared => space == Space::Shared,
                Symbol::Const(_) => space == Space::Const,
                Symbol::Global(_) => matches!(space, Space::Global | Space::Generic),
                Symbol::Param(_) => false,
            };
            if !fits {
                return self.fail("the variable lies in another state space");
            }
        }
        self.address(arg, matches!(space, Space::Global | Space::Generic))
    }

    fn atomic(&mut self, raw: &RawInst, mods: &mut Mods, returns: bool) -> Result<(), At> {
        let order = mods.one_of(&["relaxed", "acq_rel", "acquire", "release"]);
        mods.one_of(&SCOPES);
        let space = self.space(mods);
        let names = [
            ("add", Atomic::Add),
            ("min", Atomic::Min),
            ("max", Atomic::Max),
            ("and", Atomic::And),
            ("or", Atomic::Or),
            ("xor", Atomic::Xor),
            ("exch", Atomic::Exch),
            ("cas", Atomic::Cas),
            ("inc", Atomic::Inc),
            ("dec", Atomic::Dec),
        ];
        let Some((_, op)) = names.iter().find(|(n, _)| mods.take(n)) else {
            return self.fail("no supported operation among the modifiers");
        };
        let noftz = mods.take("noftz");
        let ty = self.one_type(mods)?;
        let integer = matches!(ty.class(), Class::Int | Class::Bits);
        let fits = match op {
            Atomic::Add => {
                matches!(ty, Type::U32 | Type::S32 | Type::U64 | Type::F32 | Type::F64 | Type::F16 | Type::F16x2)
            }
            Atomic::Min | Atomic::Max => ty.class() == Class::Int && ty.bytes() >= 4,
            Atomic::Inc | Atomic::Dec => ty == Type::U32,
            Atomic::Cas => ty == Type::B16 || (ty.class() == Class::Bits && ty.bytes() >= 4),
            _ => ty.class() == Class::Bits && ty.bytes() >= 4,
        };
        if !fits || noftz != matches!(ty, Type::F16 | Type::F16x2) || (*op == Atomic::Cas && !returns) {
            return self.fail(format!("this operation on .{} is not supported", ty.name()));
        }
        if space == Space::Const {
            return self.fail("constant memory is read-only");
        }
        let sources = if *op == Atomic::Cas { 2 } else { 1 };
        let first = usize::from(returns);
        self.count(raw, first + 1 + sources)?;
        let (base, base64, offset) = self.located(&raw.args[first], space)?;
        for i in 0..sources {
            self.inst.r[1 + i] = self.source(&raw.args[first + 1 + i], ty, false)?;
        }
        if returns && raw.args[0] != Operand::Sink {
            self.inst.r[0] = self.target(&raw.args[0], ty, false)?;
        }
        self.inst.r[8] = base;
        self.inst.imm = offset;
        let access = Access {
            space,
            bytes: ty.bytes() as u8,
            n: 1,
            signed: integer && ty.signed(),
            wide: ty.bytes() == 8,
            base64,
            strong: true,
            sync: matches!(order, Some("acq_rel" | "acquire" | "release")),
        };
        self.grain(space, access.total());
        self.inst.op = Op::Atom { access, op: *op, ty };
        Ok(())
    }

    fn copy(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        if !mods.take("async") {
            return self.fail("only `cp.async` is supported");
        }
        if mods.take("bulk") {
            return self.bulk_copy(raw, mods);
        }
        if mods.take("commit_group") {
            self.count(raw, 0)?;
            self.inst.op = Op::CpCommit;
            return Ok(());
        }
        if mods.take("wait_all") {
            self.count(raw, 0)?;
            self.inst.op = Op::CpWait { groups: 0, all: true };
            return Ok(());
        }
        if mods.take("wait_group") {
            self.count(raw, 1)?;
            let Operand::Int(groups @ 0..=0xffff) = raw.args[0] else {
                return self.fail("the number of groups must be a constant from 0");
            };
            self.inst.op = Op::CpWait { groups: groups as u32, all: false };
            return Ok(());
        }
        let Some(level) = mods.one_of(&["ca", "cg"]) else { return self.fail("`.ca` or `.cg` is needed") };
        if !(mods.take("shared") || mods.take("shared::cta")) || !mods.take("global") {
            return self.fail("copies from `.global` to `.shared` only");
        }
        let hinted = mods.take("L2::cache_hint");
        mods.one_of(&["L2::64B", "L2::128B", "L2::256B"]);
        let n = raw.args.len() - usize::from(hinted && !raw.args.is_empty());
        if !(3..=4).contains(&n) {
            return self.fail("takes a destination, a source, a size and perhaps a source size");
        }
        let bytes = match raw.args[2] {
            Operand::Int(b @ (4 | 8 | 16)) if level == "ca" || b == 16 => b as u8,
            _ => return self.fail("the size must be 16, or with `.ca` 4 or 8"),
        };
        let (dst, dst64, dst_offset) = self.located(&raw.args[0], Space::Shared)?;
        let (src, base64, src_offset) = self.located(&raw.args[1], Space::Global)?;
        if n == 4 {
            self.inst.r[1] = self.source(&raw.args[3], Type::U32, false)?;
        }
        if hinted {
            self.source(&raw.args[n], Type::B64, false)?;
        }
        // Two constants share one word; the source of a variable's address keeps its window in a register of its own.
        let (src, src_offset) = if base64 && i32::try_from(src_offset).is_err() {
            (self.constant(Constant::Bits64(src_offset as u64))?, 0)
        } else {
            (src, src_offset)
        };
        let (Ok(dst_offset), Ok(src_offset)) = (i32::try_from(dst_offset), i32::try_from(src_offset)) else {
            return self.fail("an offset does not fit 32 bits");
        };
        self.inst.r[0] = dst;
        self.inst.r[8] = src;
        self.inst.imm = i64::from(dst_offset) << 32 | i64::from(src_offset as u32);
        self.grain(Space::Shared, u32::from(bytes));
        self.grain(Space::Global, if n == 4 { 1 } else { u32::from(bytes) });
        self.inst.op = Op::CpAsync { bytes, base64, dst64 };
        Ok(())
    }
}
