//! What the parser hands to the decoder: names resolved, opcodes still as text.

use crate::types::Type;

/// A module-scope or kernel-scope variable, by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Symbol {
    /// Byte offset of a kernel parameter in the parameter block.
    Param(u32),
    /// Byte offset in static shared memory.
    Shared(u32),
    /// Where dynamic shared memory starts.
    DynamicShared,
    /// Byte offset in the module's `.const` bank.
    Const(u32),
    /// Byte offset in the module's `.global` variables.
    Global(u32),
}

/// Special registers, constant over a warp's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    LaneId,
    WarpId,
    NWarpId,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    DynamicSharedSize,
    TotalSharedSize,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Base {
    Reg(u32),
    Symbol(Symbol),
    Absolute,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// Index into [`RawEntry::regs`].
    Reg(u32),
    /// `!p`
    NotReg(u32),
    Special(Special),
    Int(i64),
    Single(u32),
    Double(f64),
    /// The address of a variable plus a constant.
    AddressOf(Symbol, i64),
    /// `[base + offset]`
    Memory(Base, i64),
    /// `{a, b, ..}`
    Vector(Vec<Operand>),
    /// `p|q`
    Pair(Box<Operand>, Box<Operand>),
    /// A name not declared before its use: must be a label. (name, scope)
    Name(String, usize),
    /// Instruction index of a label.
    Label(u32),
    /// `_`
    Sink,
}

#[derive(Clone, Debug)]
pub(crate) struct RawInst {
    pub line: u32,
    /// Predicate register and whether it is negated.
    pub guard: Option<(u32, bool)>,
    pub opcode: String,
    pub mods: Vec<String>,
    pub args: Vec<Operand>,
}

#[derive(Clone, Debug)]
pub(crate) struct RegDecl {
    pub name: String,
    pub ty: Type,
}

/// A kernel parameter, in launch order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamDecl {
    /// Its name.
    pub name: String,
    /// Size in bytes.
    pub size: u32,
    /// Alignment in bytes.
    pub align: u32,
    /// Declared with `.ptr`.
    pub is_pointer: bool,
    /// Byte offset in the parameter block.
    pub offset: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct RawEntry {
    pub name: String,
    pub line: u32,
    /// Line of the closing brace.
    pub last_line: u32,
    pub params: Vec<ParamDecl>,
    pub reqntid: Option<[u32; 3]>,
    pub maxntid: Option<[u32; 3]>,
    pub regs: Vec<RegDecl>,
    pub shared: u32,
    pub dynamic_shared: bool,
    pub body: Vec<RawInst>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct RawModule {
    /// `sm_` number of `.target`.
    pub arch: u32,
    pub target: String,
    pub entries: Vec<RawEntry>,
    pub constants: Vec<u8>,
    pub globals: Vec<u8>,
}
