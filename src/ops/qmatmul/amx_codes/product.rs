//! The products of a group on the tiles.

use super::codes::Codes;
use crate::ops::amx::{Packed, Tile};
use std::arch::asm;

/// Products of 16 rows of x with a strip.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Pair(pub [[f32; 256]; 2]);

/// product = Σ over the tiles of x, over its parts: x · b, where b holds for each of them the tiles of the first 16 rows of
/// W and the next 16, part by part.
///
/// # Safety
/// Within [`amx::with_rows`]; b has 2 · `TILES` tiles for each of x.
#[inline(always)]
pub(super) unsafe fn multiply<C: Codes>(x: &[Packed], b: *const Tile, product: &mut Pair) {
    let c = product as *mut Pair;
    let (x, steps) = (x.as_ptr(), x.len());
    assert!(steps > 0);
    macro_rules! tiles {
        ($stride:literal, $($line:literal),* $(,)?) => {
            // SAFETY: reads the tiles that the caller promises, writes the pair; all eight tiles are free.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    $($line,)*
                    concat!("add {b}, ", $stride),
                    "add {x}, 3072",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {row}*1], tmm0",
                    "tilestored [{c} + {row}*1 + 1024], tmm1",
                    b = inout(reg) b => _,
                    x = inout(reg) x => _,
                    steps = inout(reg) steps => _,
                    c = in(reg) c,
                    row = in(reg) 64usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            }
        };
    }
    match C::TILES {
        1 => tiles!(
            "2048",
            "tileloadd tmm6, [{b} + {row}*1]",
            "tileloadd tmm4, [{x} + {row}*1 + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {row}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm5, tmm6",
            "tdpbf16ps tmm1, tmm5, tmm7",
            "tileloadd tmm4, [{x} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
        ),
        2 => tiles!(
            "4096",
            "tileloadd tmm4, [{x} + {row}*1 + 2048]",
            "tileloadd tmm2, [{b} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm2",
            "tileloadd tmm3, [{b} + {row}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm3",
            "tileloadd tmm6, [{b} + {row}*1 + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {row}*1 + 3072]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm5, tmm2",
            "tdpbf16ps tmm1, tmm5, tmm3",
            "tdpbf16ps tmm0, tmm5, tmm6",
            "tdpbf16ps tmm1, tmm5, tmm7",
            "tileloadd tmm4, [{x} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm2",
            "tdpbf16ps tmm1, tmm4, tmm3",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
        ),
        _ => tiles!(
            "6144",
            // l · h, m · h
            "tileloadd tmm4, [{x} + {row}*1 + 2048]",
            "tileloadd tmm2, [{b} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm2",
            "tileloadd tmm3, [{b} + {row}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm3",
            "tileloadd tmm5, [{x} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm5, tmm2",
            "tdpbf16ps tmm1, tmm5, tmm3",
            // m · m, h · m
            "tileloadd tmm6, [{b} + {row}*1 + 2048]",
            "tdpbf16ps tmm0, tmm5, tmm6",
            "tileloadd tmm7, [{b} + {row}*1 + 3072]",
            "tdpbf16ps tmm1, tmm5, tmm7",
            "tileloadd tmm4, [{x} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            // h · l, h · h
            "tileloadd tmm6, [{b} + {row}*1 + 4096]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {row}*1 + 5120]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm0, tmm4, tmm2",
            "tdpbf16ps tmm1, tmm4, tmm3",
        ),
    }
}
