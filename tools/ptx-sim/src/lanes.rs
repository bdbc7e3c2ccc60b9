//! Registers of a warp as 32-lane arrays, and scalar functions lifted to them.
//!
//! An arithmetic instruction is one closure over scalars; `lift*` turns it into a loop over the lanes, compiled twice:
//! for any machine and for AVX2 with FMA. Closures capture nothing, so a function pointer says it all.

use std::ptr::NonNull;

use crate::float;
use crate::inst::Inst;
use crate::types::Type;

/// One 32-bit register of a warp, lane by lane; a 64-bit register takes two in a row, seen as `[u64; 32]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Unit(pub [u32; 32]);

/// Runs an arithmetic instruction on the lanes of the mask.
///
/// # Safety The pointer covers every unit that the instruction names; the machine has the features that the function
/// was compiled for.
pub(crate) type Exec = unsafe fn(*mut Unit, &Inst, u32);

/// Lanes handled at a time: one AVX2 register of 32-bit values.
const CHUNK: usize = 8;

/// A scalar as it lies in a register.
pub(crate) trait Lane: Copy {
    type Cell: Copy + Default;
    const TYPE: Type;
    fn get(cell: Self::Cell) -> Self;
    fn put(self) -> Self::Cell;
}

macro_rules! lane {
    ($t:ty, $cell:ty, $ty:expr, $get:expr, $put:expr) => {
        impl Lane for $t {
            type Cell = $cell;
            const TYPE: Type = $ty;
            #[inline(always)]
            fn get(cell: $cell) -> Self {
                $get(cell)
            }
            #[inline(always)]
            fn put(self) -> $cell {
                $put(self)
            }
        }
    };
}

// Narrow values are truncated on reading, so the upper bits of a 16-bit register never matter.
lane!(u8, u32, Type::U8, |c| c as u8, |v| v as u32);
lane!(i8, u32, Type::S8, |c| c as i8, |v| v as i32 as u32);
lane!(u16, u32, Type::U16, |c| c as u16, |v| v as u32);
lane!(i16, u32, Type::S16, |c| c as i16, |v| v as i32 as u32);
lane!(u32, u32, Type::U32, |c| c, |v| v);
lane!(i32, u32, Type::S32, |c| c as i32, |v| v as u32);
lane!(u64, u64, Type::U64, |c| c, |v| v);
lane!(i64, u64, Type::S64, |c| c as i64, |v| v as u64);
lane!(f64, u64, Type::F64, f64::from_bits, |v: f64| v.to_bits());
// Every f32 result that is NaN becomes the canonical one; moves go through u32.
lane!(f32, u32, Type::F32, f32::from_bits, |v: f32| float::canonical(v));

/// An f16 value by its bits.
#[derive(Clone, Copy)]
pub(crate) struct F16(pub u16);
/// A bf16 value by its bits.
#[derive(Clone, Copy)]
pub(crate) struct Bf16(pub u16);
/// Two halves in 32 bits, the low one first.
#[derive(Clone, Copy)]
pub(crate) struct X2<H>(pub H, pub H);

lane!(F16, u32, Type::F16, |c| F16(c as u16), |v: F16| v.0 as u32);
lane!(Bf16, u32, Type::Bf16, |c| Bf16(c as u16), |v: Bf16| v.0 as u32);
lane!(X2<F16>, u32, Type::F16x2, |c| X2(F16(c as u16), F16((c >> 16) as u16)), |v: X2<F16>| v.0 .0 as u32
    | (v.1 .0 as u32) << 16);
lane!(X2<Bf16>, u32, Type::Bf16x2, |c| X2(Bf16(c as u16), Bf16((c >> 16) as u16)), |v: X2<Bf16>| v.0 .0 as u32
    | (v.1 .0 as u32) << 16);

/// An arithmetic instruction: its two compilations and the types of its operands.
#[derive(Clone)]
pub(crate) struct Form {
    pub plain: Exec,
    pub fast: Exec,
    pub dst: Type,
    pub src: Vec<Type>,
    /// Least `sm_` number.
    pub arch: u32,
}

impl Form {
    /// The form for this machine.
    pub fn exec(&self) -> Exec {
        if has_avx2() {
            self.fast
        } else {
            self.plain
        }
    }

    /// Replaces the operand types: bit types agree with every register of their width.
    pub fn typed(mut self, dst: Type, src: &[Type]) -> Form {
        self.dst = dst;
        self.src = src.to_vec();
        self
    }

    pub fn arch(mut self, arch: u32) -> Form {
        self.arch = arch;
        self
    }
}

/// Whether the AVX2 compilations may run here.
pub(crate) fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The value of a type without content.
///
/// # Safety
/// A value of `F` must have existed.
#[inline(always)]
unsafe fn conjure<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0, "instructions capture nothing") };
    // SAFETY: reading no bytes from a dangling, aligned pointer is allowed, and the caller has had a value.
    unsafe { NonNull::<F>::dangling().read() }
}

/// Lanes `CHUNK * c ..` of a register.
///
/// # Safety
/// `regs` covers `unit` and, for 64-bit cells, the next.
#[inline(always)]
unsafe fn load<T: Lane>(regs: *const Unit, unit: u16, c: usize) -> [T; CHUNK] {
    // SAFETY: the chunk lies within the register, as the caller promises; units are aligned beyond any cell.
    let cells = unsafe { *regs.add(unit as usize).cast::<[T::Cell; CHUNK]>().add(c) };
    cells.map(T::get)
}

/// Stores lanes `CHUNK * c ..` where the mask has a bit.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
unsafe fn store<T: Lane>(regs: *mut Unit, unit: u16, c: usize, mask: u32, value: [T; CHUNK]) {
    let value = value.map(T::put);
    // SAFETY: as in `load`.
    let cells = unsafe { &mut *regs.add(unit as usize).cast::<[T::Cell; CHUNK]>().add(c) };
    if mask == u32::MAX {
        *cells = value;
    } else {
        for j in 0..CHUNK {
            if mask >> (c * CHUNK + j) & 1 == 1 {
                cells[j] = value[j];
            }
        }
    }
}

macro_rules! lift {
    ($lift:ident, $run:ident, $fast:ident, $($t:ident $v:ident $i:literal),+) => {
        #[inline(always)]
        unsafe fn $run<$($t: Lane,)+ D: Lane, F: Fn($($t),+) -> D + Copy>(regs: *mut Unit, inst: &Inst, mask: u32) {
            // SAFETY: the function was made from a value of F; the caller promises the registers.
            unsafe {
                let f = conjure::<F>();
                for c in 0..32 / CHUNK {
                    $(let $v = load::<$t>(regs, inst.r[$i], c);)+
                    let mut out = [D::get(D::Cell::default()); CHUNK];
                    for j in 0..CHUNK {
                        out[j] = f($($v[j]),+);
                    }
                    store::<D>(regs, inst.r[0], c, mask, out);
                }
            }
        }

        #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi2"))]
        unsafe fn $fast<$($t: Lane,)+ D: Lane, F: Fn($($t),+) -> D + Copy>(regs: *mut Unit, inst: &Inst, mask: u32) {
            // SAFETY: passed on.
            unsafe { $run::<$($t,)+ D, F>(regs, inst, mask) }
        }

        /// The instruction that applies the function lane by lane.
        pub(crate) fn $lift<$($t: Lane,)+ D: Lane, F: Fn($($t),+) -> D + Copy>(_: F) -> Form {
            Form {
                plain: $run::<$($t,)+ D, F>,
                fast: $fast::<$($t,)+ D, F>,
                dst: D::TYPE,
                src: vec![$($t::TYPE),+],
                arch: 80,
            }
        }
    };
}

lift!(lift1, run1, run1_fast, A a 1);
lift!(lift2, run2, run2_fast, A a 1, B b 2);
lift!(lift3, run3, run3_fast, A a 1, B b 2, C v 3);
lift!(lift4, run4, run4_fast, A a 1, B b 2, C v 3, E e 4);
