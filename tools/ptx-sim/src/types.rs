//! PTX scalar types and which operands fit which instruction.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Type {
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    Pred,
}

/// Operands of equal width agree when their classes are equal or one of them is `Bits`, as the assembler has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Bits,
    Int,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    Pred,
}

impl Class {
    pub fn agrees(self, other: Class) -> bool {
        self == other || (self != Class::Pred && other != Class::Pred && (self == Class::Bits || other == Class::Bits))
    }
}

const NAMES: [(&str, Type); 20] = [
    ("b8", Type::B8),
    ("b16", Type::B16),
    ("b32", Type::B32),
    ("b64", Type::B64),
    ("u8", Type::U8),
    ("u16", Type::U16),
    ("u32", Type::U32),
    ("u64", Type::U64),
    ("s8", Type::S8),
    ("s16", Type::S16),
    ("s32", Type::S32),
    ("s64", Type::S64),
    ("f16", Type::F16),
    ("f16x2", Type::F16x2),
    ("bf16", Type::Bf16),
    ("bf16x2", Type::Bf16x2),
    ("tf32", Type::Tf32),
    ("f32", Type::F32),
    ("f64", Type::F64),
    ("pred", Type::Pred),
];

impl Type {
    pub fn parse(name: &str) -> Option<Type> {
        NAMES.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
    }

    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, t)| *t == self).map_or("?", |(n, _)| n)
    }

    /// Width in bytes; predicates have none.
    pub fn bytes(self) -> u32 {
        match self {
            Type::B8 | Type::U8 | Type::S8 => 1,
            Type::B16 | Type::U16 | Type::S16 | Type::F16 | Type::Bf16 => 2,
            Type::B32 | Type::U32 | Type::S32 | Type::F16x2 | Type::Bf16x2 | Type::Tf32 | Type::F32 => 4,
            Type::B64 | Type::U64 | Type::S64 | Type::F64 => 8,
            Type::Pred => 0,
        }
    }

    pub fn class(self) -> Class {
        match self {
            Type::B8 | Type::B16 | Type::B32 | Type::B64 => Class::Bits,
            Type::U8 | Type::U16 | Type::U32 | Type::U64 | Type::S8 | Type::S16 | Type::S32 | Type::S64 => Class::Int,
            Type::F16 => Class::F16,
            Type::F16x2 => Class::F16x2,
            Type::Bf16 => Class::Bf16,
            Type::Bf16x2 => Class::Bf16x2,
            Type::Tf32 => Class::Tf32,
            Type::F32 => Class::F32,
            Type::F64 => Class::F64,
            Type::Pred => Class::Pred,
        }
    }

    pub fn signed(self) -> bool {
        matches!(self, Type::S8 | Type::S16 | Type::S32 | Type::S64)
    }

    pub fn is_float(self) -> bool {
        !matches!(self.class(), Class::Bits | Class::Int | Class::Pred)
    }
}
