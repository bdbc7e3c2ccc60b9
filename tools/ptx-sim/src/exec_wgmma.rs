//! `wgmma.mma_async`: each warp of the warpgroup computes its 16 rows of D[64,n] = A[64,16] * B[16,n] (+ D).
//!
//! Fragments of A and D are those of `mma.m16n8k16`, n / 8 times beside each other. The product is computed when it is
//! asked for; checked launches then keep its registers from everyone until the wait, and read its operands in shared
//! memory a second time there, so that whoever writes them in between is found.

use crate::check::{Kind, Touch};
use crate::exec::{fault, Fault, Machine};
use crate::float::{brain_to_f32, canonical, half_to_f32};
use crate::inst::{Inst, Uses, Wgmma, NONE};
use crate::lanes::has_avx2;
use crate::warp::Warp;

const K: usize = 16;
/// Columns of the widest B.
const MOST_N: usize = 256;

/// A warp's products under way.
#[derive(Default)]
pub(crate) struct MatrixQueue {
    products: Vec<Product>,
    /// Groups committed.
    committed: u32,
    /// Step of the last `wgmma.fence`.
    fence: u64,
    /// Step at which each slot was last written other than by a product.
    written: Vec<u64>,
    /// Slots of products under way, and those of them that products may write.
    busy: Vec<u16>,
    sums: Vec<u16>,
}

struct Product {
    group: u32,
    /// Registers of A, then of D.
    a: Vec<u16>,
    list: usize,
    /// Shared memory that it reads: 16-byte pieces.
    reads: Vec<u32>,
}

impl MatrixQueue {
    pub fn clear(&mut self) {
        *self = MatrixQueue::default();
    }

    pub fn fence(&mut self, step: u64) {
        self.fence = step;
    }

    pub fn commit(&mut self) {
        self.committed += 1;
    }

    fn note(&mut self, lists: &[Vec<u16>]) {
        self.busy = self.products.iter().flat_map(|p| p.a.iter()).copied().collect();
        self.sums = self.products.iter().flat_map(|p| lists[p.list].iter()).copied().collect();
        for slots in [&mut self.busy, &mut self.sums] {
            slots.sort_unstable();
            slots.dedup();
        }
    }
}

/// Where the 16-byte pieces of an operand of 8-row groups lie: `rows` by 16 elements, K-major.
struct Operand {
    start: u32,
    /// Bytes from one half of K to the next, and from eight rows to the next eight.
    leading: u32,
    stride: u32,
    swizzled: bool,
}

impl Operand {
    /// The piece of a row that has elements 8 half .. 8 half + 7.
    fn at(&self, row: u32, half: u32) -> u32 {
        if !self.swizzled {
            return self.start + row / 8 * self.stride + half * self.leading + row % 8 * 16;
        }
        let linear = self.start + row / 8 * self.stride + row % 8 * 128 + half * 16;
        linear ^ (linear >> 7 & 7) << 4
    }
}

impl Machine<'_> {
    /// In kernels with products: registers of those under way are nobody else's.
    pub(crate) fn check_matrix_registers(&mut self, w: &mut Warp, uses: &Uses) {
        if w.matrices.written.is_empty() {
            w.matrices.written = vec![0; self.ctx.program.slots];
        }
        if !uses.updates.is_empty() {
            return; // a product itself
        }
        for &slot in &uses.writes {
            w.matrices.written[slot as usize] = w.steps;
        }
        let queue = &w.matrices;
        if queue.products.is_empty() {
            return;
        }
        let held = |list: &[u16], slot: &u16| list.binary_search(slot).is_ok();
        let touched = uses.reads.iter().chain(&uses.writes).find(|slot| held(&queue.sums, slot));
        let changed = uses.writes.iter().find(|slot| held(&queue.busy, slot));
        if let Some(&slot) = touched.or(changed) {
            let name = self.ctx.program.slot_name(slot);
            let message = || format!("`{name}` belongs to a wgmma under way: `wgmma.wait_group` must come first");
            self.find(Kind::AsyncRegister, w, 0, message);
        }
    }

    fn operand<const CHECK: bool>(&mut self, w: &Warp, unit: u16, rows: u32) -> Result<Option<Operand>, Fault> {
        let bits = *w.u64s(unit);
        let descriptor = bits[0];
        let field = |low: u32| (descriptor >> low & 0x3fff) as u32 * 16;
        let operand =
            Operand { start: field(0), leading: field(16), stride: field(32), swizzled: descriptor >> 62 == 1 };
        let reserved = 0x3ff1_c000_c000_c000u64;
        let wrong = if bits.iter().any(|b| *b != descriptor) {
            "lanes give different descriptors".to_string()
        } else if descriptor & reserved != 0 {
            format!("{descriptor:#018x} has bits where none belong")
        } else if descriptor >> 62 > 1 {
            format!("swizzle mode {} is not supported here: 0 (none) or 1 (128 bytes)", descriptor >> 62)
        } else if descriptor >> 49 & 7 != 0 {
            "a base offset is not supported here: begin the pattern at a multiple of 1024".to_string()
        } else if operand.swizzled && operand.start >> 7 & 7 != 0 {
            format!("start {:#x} lies in a row of the 128-byte pattern other than the first", operand.start)
        } else if operand.swizzled && operand.start & 0x7f > 96 {
            format!("start {:#x}: 32 bytes of K cross the end of the 128-byte row", operand.start)
        } else if operand.swizzled && !operand.stride.is_multiple_of(1024) {
            format!("stride {} is no multiple of the pattern's 1024 bytes", operand.stride)
        } else {
            let last = (0..rows).map(|row| operand.at(row, 0).max(operand.at(row, 1))).max().unwrap_or(0);
            if last + 16 <= self.ctx.shared {
                return Ok(Some(operand));
            }
            format!("the operand ends at shared offset {:#x} of {:#x}", last + 16, self.ctx.shared)
        };
        if !CHECK {
            return fault(0, wrong);
        }
        self.find(Kind::Descriptor, w, 0, || wrong);
        Ok(None)
    }

    pub(crate) fn wgmma<const CHECK: bool>(
        &mut self,
        w: &mut Warp,
        inst: &Inst,
        wgmma: Wgmma,
        exec: u32,
    ) -> Result<(), Fault> {
        let threads: u32 = self.ctx.block.iter().product();
        if !threads.is_multiple_of(128) {
            return fault(0, format!("a block of {threads} threads has no whole warpgroups of 128"));
        }
        let n = usize::from(wgmma.n);
        if self.ctx.count {
            self.counts.mma += 1;
            self.counts.mma_macs += (16 * K * n) as u64;
        }
        let program = self.ctx.program;
        let list = inst.imm as usize;
        let adds = (w.preds[inst.r[2] as usize] & 1 == 1) != wgmma.not;
        if CHECK {
            self.check_operands(w, inst, &program.lists[list], adds);
        }
        let Some(b) = self.operand::<CHECK>(w, inst.r[1], n as u32)? else { return Ok(()) };
        let mut reads: Vec<u32> = (0..n as u32).flat_map(|row| [b.at(row, 0), b.at(row, 1)]).collect();
        let convert = |v: u16| if wgmma.brain { brain_to_f32(v) } else { half_to_f32(v) };
        let mut bm = [[0f32; MOST_N]; K];
        for (i, at) in reads.iter().enumerate() {
            for (e, v) in self.shared_bytes(*at, 16).chunks_exact(2).enumerate() {
                bm[8 * (i % 2) + e][i / 2] = convert(u16::from_le_bytes([v[0], v[1]]));
            }
        }
        let mut am = [[0f32; K]; 16];
        let mut a_registers = Vec::new();
        if inst.r[0] == NONE {
            for r in 0..4 {
                for (l, v) in w.u32s(inst.r[4 + r]).iter().enumerate() {
                    for e in 0..2 {
                        let half = convert((v >> (16 * e)) as u16);
                        am[l / 4 + 8 * (r % 2)][2 * (l % 4) + e + 8 * (r / 2)] = half;
                    }
                }
            }
            a_registers.extend_from_slice(&inst.r[4..8]);
        } else {
            let Some(a) = self.operand::<CHECK>(w, inst.r[0], 64)? else { return Ok(()) };
            for row in 0..16 {
                for half in 0..2 {
                    let at = a.at(16 * (w.number % 4) + row, half);
                    for (e, v) in self.shared_bytes(at, 16).chunks_exact(2).enumerate() {
                        am[row as usize][8 * half as usize + e] = convert(u16::from_le_bytes([v[0], v[1]]));
                    }
                    reads.push(at);
                }
            }
        }
        if CHECK {
            for at in &reads {
                self.touch_proxy(w, 0, *at, 16, "is read by a wgmma");
                self.touch_shared(w, Touch::Read, *at, 16, 0, false);
            }
        }
        let sign = if wgmma.negate[0] != wgmma.negate[1] { -1.0 } else { 1.0 };
        let mut sum = [[0f32; MOST_N]; 16];
        let place = |l: usize, i: usize| (l / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (l % 4) + i % 2);
        if adds {
            for (i, unit) in program.lists[list].iter().enumerate() {
                for (l, v) in w.u32s(*unit).iter().enumerate() {
                    let (row, column) = place(l, i);
                    sum[row][column] = f32::from_bits(*v);
                }
            }
        }
        am.iter_mut().flatten().for_each(|v| *v *= sign);
        if has_avx2() {
            // SAFETY: the machine has the features.
            unsafe { multiply_fast(&am, &bm, &mut sum, n) }
        } else {
            multiply(&am, &bm, &mut sum, n);
        }
        for (i, unit) in program.lists[list].iter().enumerate() {
            let out: [u32; 32] = std::array::from_fn(|l| {
                let (row, column) = place(l, i);
                canonical(sum[row][column])
            });
            w.set(*unit, exec, &out);
        }
        if CHECK {
            program.lists[list].iter().for_each(|slot| w.init[*slot as usize] |= exec);
            reads.sort_unstable();
            let group = w.matrices.committed;
            w.matrices.products.push(Product { group, a: a_registers, list, reads });
            w.matrices.note(&program.lists);
        }
        Ok(())
    }

    /// Accumulators and fragments of A hold values, written before the last `wgmma.fence`.
    fn check_operands(&mut self, w: &mut Warp, inst: &Inst, sums: &[u16], adds: bool) {
        let a = if inst.r[0] == NONE { &inst.r[4..8] } else { &[][..] };
        let fence = w.matrices.fence;
        let late = |slot: &&u16| w.matrices.written[**slot as usize] > fence || fence == 0;
        if let Some(&slot) = a.iter().chain(sums).find(late) {
            let name = self.ctx.program.slot_name(slot);
            let message = || format!("no `wgmma.fence` between a write of `{name}` and this wgmma");
            self.find(Kind::AsyncRegister, w, 0, message);
        }
        if adds {
            let missing = sums.iter().find(|slot| w.init[**slot as usize] != u32::MAX);
            if let Some(&slot) = missing {
                let name = self.ctx.program.slot_name(slot);
                self.find(Kind::UninitialisedRegister, w, 0, || format!("`{name}` was never written"));
            }
        }
    }

    /// Until at most `groups` of the groups are under way.
    pub(crate) fn wgmma_wait(&mut self, w: &mut Warp, groups: u32) {
        let over = |p: &Product, committed: u32| p.group + groups < committed;
        let committed = w.matrices.committed;
        let (done, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut w.matrices.products).into_iter().partition(|p| over(p, committed));
        w.matrices.products = left;
        w.matrices.note(&self.ctx.program.lists);
        let mut reads: Vec<u32> = done.into_iter().flat_map(|p| p.reads).collect();
        reads.sort_unstable();
        reads.dedup();
        for at in reads {
            self.touch_shared(w, Touch::Read, at, 16, 0, false);
        }
    }
}

#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi2"))]
unsafe fn multiply_fast(a: &[[f32; K]; 16], b: &[[f32; MOST_N]; K], sum: &mut [[f32; MOST_N]; 16], n: usize) {
    multiply(a, b, sum, n);
}

/// Products one by one for ascending k, rounding each sum.
#[inline(always)]
fn multiply(a: &[[f32; K]; 16], b: &[[f32; MOST_N]; K], sum: &mut [[f32; MOST_N]; 16], n: usize) {
    for (a, sum) in a.iter().zip(sum) {
        for (a, b) in a.iter().zip(b) {
            for (s, b) in sum.iter_mut().zip(b).take(n) {
                *s = a.mul_add(*b, *s);
            }
        }
    }
}
