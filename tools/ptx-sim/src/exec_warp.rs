//! What the lanes of a warp do together: shuffles, votes, matches, reductions, matrix loads.

use crate::check::{Kind, Touch};
use crate::exec::{Fault, Machine};
use crate::inst::{Inst, Op, Redux, Shuffle, Space, Vote, NONE};
use crate::memory::POISON;
use crate::warp::Warp;

impl Machine<'_> {
    /// Runs a warp-wide instruction. False: the warp waits at a barrier.
    pub(crate) fn warp_wide<const CHECK: bool>(&mut self, w: &mut Warp, inst: &Inst, exec: u32) -> Result<bool, Fault> {
        let whole = matches!(inst.op, Op::LdMatrix { .. } | Op::StMatrix { .. } | Op::MovMatrix | Op::Mma(_))
            || matches!(inst.op, Op::Wgmma(_) | Op::WgmmaFence | Op::WgmmaCommit | Op::WgmmaWait { .. });
        if CHECK && whole && exec != u32::MAX && exec == w.live {
            let message = || format!("needs all 32 lanes; {:#010x} have exited or do not exist", !exec);
            self.find(Kind::Divergence, w, exec.trailing_zeros(), message);
        }
        match inst.op {
            Op::Bar { .. } => return self.reach(w, inst, exec),
            Op::Wgmma(wgmma) => self.wgmma::<CHECK>(w, inst, wgmma, exec)?,
            Op::WgmmaFence => w.matrices.fence(w.steps),
            Op::WgmmaCommit => w.matrices.commit(),
            Op::WgmmaWait { groups } => self.wgmma_wait(w, groups),
            Op::BarWarp => {
                if let Some(shadow) = &mut self.shadow {
                    shadow.warp_sync(w.number as usize);
                }
            }
            Op::Shfl(mode) => self.shuffle::<CHECK>(w, inst, exec, mode),
            Op::Vote { vote, negate } => {
                let p = w.preds[inst.r[1] as usize] ^ if negate { u32::MAX } else { 0 };
                let ballot = p & exec;
                let spread = |v: bool| if v { u32::MAX } else { 0 };
                match vote {
                    Vote::Ballot => w.set(inst.r[0], exec, &[ballot; 32]),
                    Vote::All => w.set_pred(inst.r[0], exec, spread(ballot == exec)),
                    Vote::Any => w.set_pred(inst.r[0], exec, spread(ballot != 0)),
                    Vote::Uniform => w.set_pred(inst.r[0], exec, spread(ballot == 0 || ballot == exec)),
                }
            }
            Op::Match { all, wide } => {
                let v: [u64; 32] = if wide { *w.u64s(inst.r[2]) } else { w.u32s(inst.r[2]).map(u64::from) };
                let lanes = || (0..32usize).filter(|l| exec >> l & 1 == 1);
                let equal = |to: u64| lanes().filter(|l| v[*l] == to).fold(0u32, |m, l| m | 1 << l);
                let mut out = [0; 32];
                if all {
                    let same = equal(v[exec.trailing_zeros() as usize]) == exec;
                    out = [if same { exec } else { 0 }; 32];
                    w.set_pred(inst.r[1], exec, if same { u32::MAX } else { 0 });
                } else {
                    lanes().for_each(|l| out[l] = equal(v[l]));
                }
                if inst.r[0] != NONE {
                    w.set(inst.r[0], exec, &out);
                }
            }
            Op::Redux(op) => {
                let v = *w.u32s(inst.r[1]);
                let values = (0..32).filter(|l| exec >> l & 1 == 1).map(|l| v[l]);
                let out = values.reduce(|a, b| match op {
                    Redux::Add(_) => a.wrapping_add(b),
                    Redux::Min(true) => (a as i32).min(b as i32) as u32,
                    Redux::Max(true) => (a as i32).max(b as i32) as u32,
                    Redux::Min(false) => a.min(b),
                    Redux::Max(false) => a.max(b),
                    Redux::And => a & b,
                    Redux::Or => a | b,
                    Redux::Xor => a ^ b,
                });
                w.set(inst.r[0], exec, &[out.unwrap_or(0); 32]);
            }
            Op::Elect => {
                let leader = exec.trailing_zeros();
                if inst.r[0] != NONE {
                    w.set(inst.r[0], exec, &[leader; 32]);
                }
                w.set_pred(inst.r[1], exec, 1 << leader);
            }
            Op::LdMatrix { n, trans, base64 } => self.load_matrix::<CHECK>(w, inst, exec, n.into(), trans, base64)?,
            Op::StMatrix { n, trans, base64 } => self.store_matrix::<CHECK>(w, inst, exec, n.into(), trans, base64)?,
            Op::MovMatrix => {
                let mut rows = [[0u16; 8]; 8];
                let v = *w.u32s(inst.r[1]);
                spread_fragment(&v, |row, col, half| rows[row][col] = half);
                let out = fragment(|row, col| rows[col][row]);
                w.set(inst.r[0], exec, &out);
            }
            Op::Mma(mma) => {
                if self.ctx.count {
                    self.counts.mma += 1;
                    self.counts.mma_macs += 16 * 8 * u64::from(mma.k);
                }
                crate::mma::mma(w, inst, exec, mma);
            }
            _ => {}
        }
        Ok(true)
    }

    fn shuffle<const CHECK: bool>(&mut self, w: &mut Warp, inst: &Inst, exec: u32, mode: Shuffle) {
        let (value, by, clamp) = (*w.u32s(inst.r[2]), *w.u32s(inst.r[3]), *w.u32s(inst.r[4]));
        let (mut out, mut within) = ([0; 32], 0u32);
        for l in 0..32u32 {
            let (b, c) = (by[l as usize] & 31, clamp[l as usize] & 31);
            let segment = clamp[l as usize] >> 8 & 31;
            let most = (l & segment) | (c & !segment);
            let (j, inside) = match mode {
                Shuffle::Up => (l.wrapping_sub(b), l as i32 - b as i32 >= most as i32),
                Shuffle::Down => (l + b, l + b <= most),
                Shuffle::Butterfly => (l ^ b, l ^ b <= most),
                Shuffle::Index => {
                    let j = (l & segment) | (b & !segment);
                    (j, j <= most)
                }
            };
            let j = if inside { j & 31 } else { l };
            within |= u32::from(inside) << l;
            if CHECK && exec >> l & 1 == 1 && exec >> j & 1 == 0 {
                self.find(Kind::Divergence, w, l, || format!("reads lane {j}, which does not take part"));
            }
            out[l as usize] = value[j as usize];
        }
        if inst.r[0] != NONE {
            w.set(inst.r[0], exec, &out);
        }
        w.set_pred(inst.r[1], exec, within);
    }

    /// The rows of `n` 8x8 matrices of 16-bit values, each 16 bytes at the address that one lane holds.
    fn matrix_rows<const CHECK: bool>(
        &mut self,
        w: &Warp,
        inst: &Inst,
        exec: u32,
        n: usize,
        base64: bool,
        store: bool,
    ) -> Result<[Option<u32>; 32], Fault> {
        let address = self.lane_addresses(w, inst.r[8], base64, inst.imm);
        let wanted = exec & (u32::MAX >> (32 - 8 * n));
        let mut rows = [None; 32];
        if wanted == 0 {
            return Ok(rows);
        }
        let span = self.locate_copy::<CHECK>(w, Space::Shared, &address, 16, 16, wanted)?;
        self.count_span(w, &span, 16, store);
        for l in (0..32).filter(|l| span.good >> l & 1 == 1) {
            rows[l as usize] = Some(span.offsets[l as usize]);
            if CHECK {
                let how = if store { Touch::Write } else { Touch::Read };
                self.touch_shared(w, how, span.offsets[l as usize], 16, l, true);
            }
        }
        Ok(rows)
    }

    fn load_matrix<const CHECK: bool>(
        &mut self,
        w: &mut Warp,
        inst: &Inst,
        exec: u32,
        n: usize,
        trans: bool,
        base64: bool,
    ) -> Result<(), Fault> {
        let rows = self.matrix_rows::<CHECK>(w, inst, exec, n, base64, false)?;
        for m in 0..n {
            let mut matrix = [[u16::from_ne_bytes([POISON; 2]); 8]; 8];
            for (row, offset) in matrix.iter_mut().zip(&rows[8 * m..8 * m + 8]) {
                if let Some(offset) = offset {
                    for (v, b) in row.iter_mut().zip(self.shared_bytes(*offset, 16).chunks_exact(2)) {
                        *v = u16::from_le_bytes([b[0], b[1]]);
                    }
                }
            }
            let out = fragment(|row, col| if trans { matrix[col][row] } else { matrix[row][col] });
            w.set(inst.r[m], exec, &out);
        }
        Ok(())
    }

    fn store_matrix<const CHECK: bool>(
        &mut self,
        w: &mut Warp,
        inst: &Inst,
        exec: u32,
        n: usize,
        trans: bool,
        base64: bool,
    ) -> Result<(), Fault> {
        let rows = self.matrix_rows::<CHECK>(w, inst, exec, n, base64, true)?;
        for m in 0..n {
            let mut matrix = [[0u16; 8]; 8];
            spread_fragment(w.u32s(inst.r[m]), |row, col, half| {
                let (row, col) = if trans { (col, row) } else { (row, col) };
                matrix[row][col] = half;
            });
            for (row, offset) in matrix.iter().zip(&rows[8 * m..8 * m + 8]) {
                if let Some(offset) = offset {
                    for (v, b) in row.iter().zip(self.shared_bytes(*offset, 16).chunks_exact_mut(2)) {
                        b.copy_from_slice(&v.to_le_bytes());
                    }
                }
            }
        }
        Ok(())
    }
}

/// Lane l of an 8x8 fragment holds row l / 4, columns 2 (l mod 4) and the next.
fn fragment(at: impl Fn(usize, usize) -> u16) -> [u32; 32] {
    std::array::from_fn(|l| {
        let (row, col) = (l / 4, 2 * (l % 4));
        u32::from(at(row, col)) | u32::from(at(row, col + 1)) << 16
    })
}

/// The inverse of [`fragment`]: (row, column, value).
fn spread_fragment(v: &[u32; 32], mut put: impl FnMut(usize, usize, u16)) {
    for (l, v) in v.iter().enumerate() {
        let (row, col) = (l / 4, 2 * (l % 4));
        put(row, col, *v as u16);
        put(row, col + 1, (*v >> 16) as u16);
    }
}
