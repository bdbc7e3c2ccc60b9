//! Decoded instructions: operands are unit numbers in the warp's register file, constants included.

use crate::ast::Special;
use crate::lanes::Exec;
use crate::types::Type;

/// No predicate, no second destination.
pub(crate) const NONE: u16 = u16::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Shared,
    Const,
    Generic,
}

/// A load's or store's shape. Data registers are `r[0..n]`, the address base is `r[8]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub space: Space,
    /// Bytes of one element: 1, 2, 4, 8.
    pub bytes: u8,
    /// Elements: 1, 2, 4.
    pub n: u8,
    pub signed: bool,
    /// The data registers are 64-bit.
    pub wide: bool,
    /// The base register is 64-bit.
    pub base64: bool,
    /// `.volatile`, `.relaxed`, `.acquire`, `.release`: ordered with atomics, no race.
    pub strong: bool,
    /// `.acquire` or `.release`.
    pub sync: bool,
}

impl Access {
    pub fn total(&self) -> u32 {
        u32::from(self.bytes) * u32::from(self.n)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomic {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Combine {
    None,
    And,
    Or,
    Xor,
}

/// Truth of a comparison for each way two values can stand to each other.
pub(crate) const LESS: u8 = 1;
pub(crate) const EQUAL: u8 = 2;
pub(crate) const GREATER: u8 = 4;
pub(crate) const UNORDERED: u8 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PredOp {
    Mov,
    Not,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    Ballot,
    All,
    Any,
    Uniform,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Redux {
    Add(bool),
    Min(bool),
    Max(bool),
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierKind {
    Sync,
    Arrive,
    Popc,
    And,
    Or,
}

/// Multiplicand format of an `mma`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Factor {
    F16,
    Bf16,
    Tf32,
    /// Whether A and B are signed.
    Int8(bool, bool),
}

/// What an `mbarrier` instruction does; `base64`: its address is 64-bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mbarrier {
    pub verb: MbarrierVerb,
    pub base64: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MbarrierVerb {
    Init,
    Inval,
    Arrive,
    ExpectTx,
    ArriveExpectTx,
    TryWait,
    TestWait,
}

/// `wgmma.mma_async m64n<n>k16` in bf16 or f16 with f32 sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wgmma {
    pub n: u16,
    pub brain: bool,
    /// A and B are taken times −1.
    pub negate: [bool; 2],
    /// `scale-d` is negated.
    pub not: bool,
}

/// `mma.sync m16n8k..`: D in `r[0..]`, then A, B, C, counted by `registers`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mma {
    pub factor: Factor,
    pub k: u8,
    /// D and C are f16, two in a register.
    pub half_sum: bool,
    pub saturate: bool,
}

impl Mma {
    /// 32-bit registers of (D and C, A, B).
    pub fn registers(&self) -> (usize, usize, usize) {
        let bytes = match self.factor {
            Factor::F16 | Factor::Bf16 => 2,
            Factor::Tf32 => 4,
            Factor::Int8(..) => 1,
        };
        let row = usize::from(self.k) * bytes; // bytes of a row of A
        (if self.half_sum { 2 } else { 4 }, 16 * row / 128, 8 * row / 128)
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Op {
    /// `r[0] = f(r[1], ..)`
    Alu(Exec),
    /// Predicates `r[0]`, `r[1]` (or NONE); operands `r[2]`, `r[3]`; predicate `r[4]` (or NONE).
    Setp {
        ty: Type,
        truth: u8,
        ftz: bool,
        combine: Combine,
        negate: bool,
    },
    /// `r[0] = r[3] ? r[1] : r[2]`
    Selp {
        wide: bool,
    },
    /// Predicates: `r[0] = r[1] op r[2]`, each source perhaps negated.
    Pred {
        op: PredOp,
        negate: [bool; 2],
    },
    /// `r[0] = {r[1], ..}`: `n` parts of `part` bytes.
    Pack {
        n: u8,
        part: u8,
    },
    /// `{r[0], ..} = r[8]`; NONE is a sink.
    Unpack {
        n: u8,
        part: u8,
    },
    /// Parameter bytes at `imm`.
    LdParam(Access),
    Ld(Access),
    St(Access),
    /// Old value to `r[0]` (or NONE), operands `r[1]`, `r[2]`.
    Atom {
        access: Access,
        op: Atomic,
        ty: Type,
    },
    /// Destination `r[0]`, source `r[8]`, source size in unit `r[1]` (or NONE); offsets in `imm` (high: destination).
    CpAsync {
        bytes: u8,
        base64: bool,
        dst64: bool,
    },
    CpCommit,
    CpWait {
        groups: u32,
        all: bool,
    },
    LdMatrix {
        n: u8,
        trans: bool,
        base64: bool,
    },
    StMatrix {
        n: u8,
        trans: bool,
        base64: bool,
    },
    MovMatrix,
    Mma(Mma),
    /// Barrier in unit `r[1]`, thread count in `r[2]` (or NONE), predicate `r[3]`, result `r[0]`.
    Bar {
        kind: BarrierKind,
        aligned: bool,
        negate: bool,
    },
    BarWarp,
    /// `r[0]|p r[1] = r[2]` from lane by `r[3]`, clamp `r[4]`, members `r[5]`.
    Shfl(Shuffle),
    /// `r[0]` = over predicate `r[1]` of members `r[2]`.
    Vote {
        vote: Vote,
        negate: bool,
    },
    /// `r[0]|p r[1]` = over `r[2]`, members `r[3]`.
    Match {
        all: bool,
        wide: bool,
    },
    Redux(Redux),
    ActiveMask,
    /// `r[0]|p r[1]`, members `r[2]`.
    Elect,
    Fence {
        device: bool,
    },
    /// `fence.proxy.async` (with `shared` memory among what it orders) or `fence.mbarrier_init`.
    ProxyFence {
        shared: bool,
    },
    /// An operation on the object at `r[8]` + `imm`; operand in `r[1]`, predicate in `r[0]`.
    Mbarrier(Mbarrier),
    /// Bulk copy: destination `r[0]`, source `r[8]`, size `r[1]`, mbarrier `r[2]`; offsets in `imm` (high: destination)
    /// and `more` (the mbarrier's).
    BulkCopy {
        base64: bool,
        dst64: bool,
        mbar64: bool,
    },
    /// Descriptors in `r[0]` (A, or NONE) and `r[1]` (B), `scale-d` in predicate `r[2]`, A's registers in `r[4..8]`; the
    /// accumulators are the program's list `imm`.
    Wgmma(Wgmma),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        groups: u32,
    },
    /// Done when decoded: hints.
    Nop,
    /// To instruction `imm`.
    Bra,
    Ret,
    Trap,
}

#[derive(Clone, Copy)]
pub(crate) struct Inst {
    pub op: Op,
    pub r: [u16; 14],
    pub imm: i64,
    pub more: i64,
    pub line: u32,
    /// Predicate, or NONE.
    pub guard: u16,
    pub negate: bool,
}

/// A value with one register for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Constant {
    Bits32(u32),
    Bits64(u64),
    Special(Special),
}

/// Registers that an instruction reads and writes, as tracked slots: units of declared registers, then predicates.
#[derive(Clone, Debug, Default)]
pub(crate) struct Uses {
    pub reads: Vec<u16>,
    pub writes: Vec<u16>,
    /// Written, and perhaps read: whether they hold a value is the instruction's to check.
    pub updates: Vec<u16>,
    /// The guard's slot, or NONE: read by all active lanes.
    pub guard: u16,
}

/// A kernel ready to run.
pub(crate) struct Program {
    pub code: Vec<Inst>,
    pub uses: Vec<Uses>,
    /// Mnemonic with modifiers, for the instruction mix.
    pub names: Vec<String>,
    /// All units, constants included.
    pub units: usize,
    pub preds: usize,
    /// Tracked slots: units of declared registers plus predicates.
    pub slots: usize,
    pub constants: Vec<(u16, Constant)>,
    /// Units of the accumulators of each `wgmma.mma_async`.
    pub lists: Vec<Vec<u16>>,
    /// (unit or predicate, name, type) of each declared register.
    pub registers: Vec<(u16, String, Type)>,
    pub static_shared: u32,
    /// Least bytes of any shared access: the grain of race tracking.
    pub shared_grain: u32,
    pub global_grain: u32,
    /// Parameters through which the kernel may write, by parameter index; all when unknown.
    pub written: u64,
    /// Largest number of 32-bit registers live at once.
    pub live: u32,
    pub last_line: u32,
}

impl Program {
    /// (unit or predicate, name, type) of a tracked slot.
    pub fn slot(&self, slot: u16) -> Option<(u16, &str, Type)> {
        let units = self.slots - self.preds;
        let (place, pred) = if usize::from(slot) < units { (slot, false) } else { (slot - units as u16, true) };
        let found = self.registers.iter().find(|(p, _, ty)| *p == place && (*ty == Type::Pred) == pred);
        found.map(|(p, name, ty)| (*p, name.as_str(), *ty))
    }

    pub fn slot_name(&self, slot: u16) -> String {
        self.slot(slot).map_or_else(|| format!("slot {slot}"), |(_, name, _)| name.to_string())
    }
}
