//! Decoding of what sm_90 and sm_90a added: mbarriers, bulk copies, proxy fences, warpgroup matrices.

use crate::ast::{Operand, RawInst};
use crate::decode::{Decoder, Mods};
use crate::error::At;
use crate::inst::{Mbarrier, MbarrierVerb, Op, Space, Wgmma, NONE};
use crate::types::Type;

impl Decoder<'_> {
    pub(crate) fn hopper(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        match raw.opcode.as_str() {
            "mbarrier" => self.mbarrier(raw, mods)?,
            "wgmma" => self.wgmma(raw, mods)?,
            "setmaxnreg" => {
                self.only_90a()?;
                self.words(mods, &["sync", "aligned"])?;
                if mods.one_of(&["inc", "dec"]).is_none() || self.one_type(mods)? != Type::U32 {
                    return self.fail("expected `setmaxnreg.inc` or `.dec`, `.sync.aligned.u32`");
                }
                self.count(raw, 1)?;
                let Operand::Int(n) = raw.args[0] else { return self.fail("the number of registers must be constant") };
                if !(24..=256).contains(&n) || n % 8 != 0 {
                    return self.fail("the number of registers must be a multiple of 8 from 24 to 256");
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn only_90a(&self) -> Result<(), At> {
        if self.raw.target == "sm_90a" {
            return Ok(());
        }
        self.fail("needs target sm_90a")
    }

    fn only_90(&self) -> Result<(), At> {
        if self.raw.arch >= 90 {
            return Ok(());
        }
        self.fail("needs target sm_90 or later")
    }

    /// `fence.proxy.async` and `fence.mbarrier_init`; false: another fence.
    pub(crate) fn proxy_fence(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<bool, At> {
        let shared = if mods.take("proxy") {
            self.words(mods, &["async"])?;
            !mods.take("global") && (mods.take("shared::cta") || mods.take("shared::cluster") || mods.is_empty())
        } else if mods.take("mbarrier_init") {
            self.words(mods, &["release", "cluster"])?;
            false
        } else {
            return Ok(false);
        };
        self.only_90()?;
        self.count(raw, 0)?;
        self.inst.op = Op::ProxyFence { shared };
        Ok(true)
    }

    fn mbarrier(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        let names = ["init", "inval", "arrive", "expect_tx", "try_wait", "test_wait"];
        let verb = match mods.one_of(&names) {
            Some("init") => MbarrierVerb::Init,
            Some("inval") => MbarrierVerb::Inval,
            Some("arrive") if mods.take("expect_tx") => MbarrierVerb::ArriveExpectTx,
            Some("arrive") => MbarrierVerb::Arrive,
            Some("expect_tx") => MbarrierVerb::ExpectTx,
            Some("try_wait") => MbarrierVerb::TryWait,
            Some(_) => MbarrierVerb::TestWait,
            None => return self.fail(format!("one of {} is needed", names.map(|n| format!("`.{n}`")).join(", "))),
        };
        let waits = matches!(verb, MbarrierVerb::TryWait | MbarrierVerb::TestWait);
        if waits && !mods.take("parity") {
            return self.fail("waits are supported by `.parity` only");
        }
        if !matches!(verb, MbarrierVerb::Init | MbarrierVerb::Inval | MbarrierVerb::Arrive) {
            self.only_90()?;
        }
        mods.one_of(&["relaxed", "release", "acquire"]);
        mods.take("cta");
        if !(mods.take("shared") || mods.take("shared::cta")) {
            return self.fail("only mbarriers in `.shared` memory of the block are supported");
        }
        self.words(mods, &["b64"])?;
        let arrives = matches!(verb, MbarrierVerb::Arrive | MbarrierVerb::ArriveExpectTx);
        let first = usize::from(waits || arrives);
        if arrives && raw.args.first() != Some(&Operand::Sink) {
            return self.fail("the state is not supported: write `_` and wait by parity");
        }
        let (least, most) = match verb {
            MbarrierVerb::Inval => (1, 1),
            MbarrierVerb::Init | MbarrierVerb::ExpectTx => (2, 2),
            MbarrierVerb::Arrive => (2, 3),
            MbarrierVerb::ArriveExpectTx | MbarrierVerb::TestWait => (3, 3),
            MbarrierVerb::TryWait => (3, 4),
        };
        if !(least..=most).contains(&raw.args.len()) {
            return self.fail(format!("takes {least} to {most} operands, not {}", raw.args.len()));
        }
        let (base, base64, offset) = self.located(&raw.args[first], Space::Shared)?;
        if let Some(operand) = raw.args.get(first + 1) {
            self.inst.r[1] = self.source(operand, Type::U32, false)?;
        }
        if let Some(hint) = raw.args.get(first + 2) {
            self.source(hint, Type::U32, false)?;
        }
        if waits {
            self.inst.r[0] = self.pred_target(&raw.args[0])?;
        }
        self.inst.r[8] = base;
        self.inst.imm = offset;
        self.grain(Space::Shared, 8);
        self.inst.op = Op::Mbarrier(Mbarrier { verb, base64 });
        Ok(())
    }

    /// `cp.async.bulk` from global memory, which completes on an mbarrier.
    pub(crate) fn bulk_copy(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        self.only_90()?;
        if mods.take("tensor") {
            return self.fail("copies by a tensor map are not supported: launches here pass pointers and dims only");
        }
        let to = mods.take("shared::cluster") || mods.take("shared::cta");
        if !to || !mods.take("global") || !mods.take("mbarrier::complete_tx::bytes") {
            return self.fail("only bulk copies from `.global` to shared memory, `.mbarrier::complete_tx::bytes`");
        }
        self.count(raw, 4)?;
        let (dst, dst64, dst_offset) = self.located(&raw.args[0], Space::Shared)?;
        let (src, base64, src_offset) = self.located(&raw.args[1], Space::Global)?;
        let (mbar, mbar64, mbar_offset) = self.located(&raw.args[3], Space::Shared)?;
        let (Ok(dst_offset), Ok(src_offset)) = (i32::try_from(dst_offset), i32::try_from(src_offset)) else {
            return self.fail("an offset does not fit 32 bits");
        };
        self.inst.r[1] = self.source(&raw.args[2], Type::U32, false)?;
        (self.inst.r[0], self.inst.r[2], self.inst.r[8]) = (dst, mbar, src);
        self.inst.imm = i64::from(dst_offset) << 32 | i64::from(src_offset as u32);
        self.inst.more = mbar_offset;
        self.grain(Space::Shared, 8);
        self.grain(Space::Global, 16);
        self.inst.op = Op::BulkCopy { base64, dst64, mbar64 };
        Ok(())
    }

    fn wgmma(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        self.only_90a()?;
        self.words(mods, &["sync", "aligned"])?;
        match mods.one_of(&["fence", "commit_group", "wait_group", "mma_async"]) {
            Some("fence") => {
                self.count(raw, 0)?;
                self.inst.op = Op::WgmmaFence;
            }
            Some("commit_group") => {
                self.count(raw, 0)?;
                self.inst.op = Op::WgmmaCommit;
            }
            Some("wait_group") => {
                self.count(raw, 1)?;
                let Operand::Int(groups @ 0..=7) = raw.args[0] else {
                    return self.fail("the number of groups must be a constant from 0 to 7");
                };
                self.inst.op = Op::WgmmaWait { groups: groups as u32 };
            }
            Some(_) => self.wgmma_product(raw, mods)?,
            None => return self.fail("`.mma_async`, `.fence`, `.commit_group` or `.wait_group` is needed"),
        }
        Ok(())
    }

    fn wgmma_product(&mut self, raw: &RawInst, mods: &mut Mods) -> Result<(), At> {
        let shape = mods.starting("m64n").unwrap_or_default();
        let n = shape.strip_prefix("m64n").and_then(|s| s.strip_suffix("k16")).and_then(|s| s.parse::<u16>().ok());
        let Some(n) = n.filter(|n| n % 8 == 0 && (8..=256).contains(n)) else {
            return self.fail("the shape must be m64n8k16 to m64n256k16");
        };
        let brain = match mods.types()[..] {
            [Type::F32, Type::Bf16, Type::Bf16] => true,
            [Type::F32, Type::F16, Type::F16] => false,
            _ => return self.fail("only `.f32.bf16.bf16` and `.f32.f16.f16` are supported"),
        };
        let in_registers = matches!(raw.args.get(1), Some(Operand::Vector(_)));
        self.count(raw, if in_registers { 7 } else { 8 })?;
        let Operand::Vector(sums) = &raw.args[0] else { return self.fail("accumulators in braces are needed") };
        if sums.len() != usize::from(n) / 2 {
            return self.fail(format!("{} accumulators are needed, not {}", n / 2, sums.len()));
        }
        if in_registers {
            self.registers(&raw.args[1], 4, 4, Type::B32, true)?;
        } else {
            self.inst.r[0] = self.source(&raw.args[1], Type::B64, false)?;
        }
        self.inst.r[1] = self.source(&raw.args[2], Type::B64, false)?;
        let (p, not) = self.pred_source(&raw.args[3])?;
        self.inst.r[2] = p;
        let constant = |i: usize| match raw.args[i] {
            Operand::Int(v @ (-1..=1)) => Some(v),
            _ => None,
        };
        let (Some(a @ (-1 | 1)), Some(b @ (-1 | 1))) = (constant(4), constant(5)) else {
            return self.fail("imm-scale-a and imm-scale-b must be 1 or -1");
        };
        if raw.args[6..].iter().any(|arg| *arg != Operand::Int(0)) {
            return self.fail("only K-major operands are supported: imm-trans must be 0");
        }
        let mut list = Vec::with_capacity(sums.len());
        for sum in sums {
            list.push(self.target(sum, Type::F32, false)?);
        }
        self.uses.updates = std::mem::take(&mut self.uses.writes);
        self.inst.imm = self.lists.len() as i64;
        self.lists.push(list);
        self.shared_grain = self.shared_grain.min(16);
        self.inst.op = Op::Wgmma(Wgmma { n, brain, negate: [a < 0, b < 0], not });
        debug_assert!(in_registers || self.inst.r[0] != NONE);
        Ok(())
    }
}
