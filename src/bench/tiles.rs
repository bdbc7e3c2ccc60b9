//! What AMX tiles compute at most: products of tiles that are loaded already, on every thread at once.

use crate::tensor::Dtype;

/// Accumulators in turn: more than a product takes cycles over those between two.
const TILES: u64 = 6;

/// Computes `turns` times with every tile that sums, factors of type `act`; returns the operations of all threads. None
/// where the processor has no such products, or the system lets this process use none.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub fn products(act: Dtype, turns: u64) -> Option<u64> {
    use crate::ops::amx;
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    // A tile of A is 16 rows of 64 bytes, C 16 by 16. Leaf 7, bit 25 of edx: AMX-INT8.
    let depth = match act {
        Dtype::BF16 => 32,
        Dtype::I8 if __cpuid_count(7, 0).edx >> 25 & 1 == 1 => 64,
        _ => return None,
    };
    if !amx::available() || turns == 0 {
        return None;
    }
    let codes = act == Dtype::I8;
    let work = || {
        // SAFETY: within `with_tiles`, which has set up all eight; `products` are those the processor has, and nothing
        // but tiles is written.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
            if codes {
                asm!(
                    "2:",
                    "tdpbssd tmm0, tmm6, tmm7", "tdpbssd tmm1, tmm6, tmm7", "tdpbssd tmm2, tmm6, tmm7",
                    "tdpbssd tmm3, tmm6, tmm7", "tdpbssd tmm4, tmm6, tmm7", "tdpbssd tmm5, tmm6, tmm7",
                    "dec {turns}",
                    "jnz 2b",
                    turns = inout(reg) turns => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                    options(nostack, nomem),
                );
            } else {
                asm!(
                    "2:",
                    "tdpbf16ps tmm0, tmm6, tmm7", "tdpbf16ps tmm1, tmm6, tmm7", "tdpbf16ps tmm2, tmm6, tmm7",
                    "tdpbf16ps tmm3, tmm6, tmm7", "tdpbf16ps tmm4, tmm6, tmm7", "tdpbf16ps tmm5, tmm6, tmm7",
                    "dec {turns}",
                    "jnz 2b",
                    turns = inout(reg) turns => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                    options(nostack, nomem),
                );
            }
        }
    };
    let threads = rayon::broadcast(|_| amx::with_tiles(work)).len() as u64;
    Some(threads * turns * TILES * 2 * 16 * 16 * depth)
}

/// Other processors have no such tiles.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub fn products(_: Dtype, _: u64) -> Option<u64> {
    let _ = TILES;
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_half_as_long_as_bf16() {
        let [bf16, i8] = [Dtype::BF16, Dtype::I8].map(|act| products(act, 1));
        let threads = rayon::current_num_threads() as u64;
        assert!(bf16.is_none_or(|count| count == threads * TILES * 16_384), "{bf16:?}");
        assert!(i8.is_none_or(|count| count == threads * TILES * 32_768), "{i8:?}");
        assert_eq!(products(Dtype::F32, 1), None);
    }
}
