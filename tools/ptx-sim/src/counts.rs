//! Counts: instruction mix, global sectors, shared waves and bank conflicts, matrix operations, bytes per buffer.

/// What a launch did, over all blocks. Counted only on request, but for [`Counts::thread_instructions`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions times the lanes that ran them.
    pub thread_instructions: u64,
    /// Instructions, once for each warp.
    pub warp_instructions: u64,
    /// By source line, in the kernel's order.
    pub lines: Vec<LineCount>,
    /// Global loads and stores.
    pub global: Traffic,
    /// Shared loads, stores, `ldmatrix`, `stmatrix` and the shared side of `cp.async`.
    pub shared: SharedTraffic,
    /// `mma` and `wgmma` instructions, once for each warp.
    pub mma: u64,
    /// Multiply-adds in them.
    pub mma_macs: u64,
    /// By buffer, in order of allocation.
    pub buffers: Vec<BufferCount>,
}

/// One instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineCount {
    /// Source line.
    pub line: u32,
    /// Mnemonic with modifiers.
    pub name: String,
    /// Times a warp ran it.
    pub warps: u64,
    /// Times a thread ran it.
    pub threads: u64,
    /// 32-byte sectors, where it touches global memory.
    pub sectors: u64,
    /// Waves through the banks, where it touches shared memory.
    pub waves: u64,
    /// Waves beyond the least.
    pub conflicts: u64,
}

/// Global memory, by warp-wide requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Warp-wide accesses.
    pub requests: u64,
    /// Distinct 32-byte sectors in each, summed.
    pub sectors: u64,
    /// Bytes that threads asked for.
    pub bytes: u64,
}

/// Shared memory, 32 banks of 4 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedTraffic {
    /// Warp-wide accesses.
    pub requests: u64,
    /// Passes through the banks: 64-bit accesses go by half warps, 128-bit ones and matrices by quarters.
    pub waves: u64,
    /// Waves beyond one for each phase.
    pub conflicts: u64,
}

/// One buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BufferCount {
    /// Bytes that threads loaded.
    pub read: u64,
    /// Bytes that threads stored.
    pub written: u64,
    /// Bytes of the sectors loaded: 32 for each.
    pub sector_read: u64,
    /// Bytes of the sectors stored.
    pub sector_written: u64,
    /// Of the sectors loaded, the bytes of those that the block's first-level cache did not have, or was not asked for:
    /// what the second-level cache is asked for. It holds the lines used last ([`crate::Options::l1_bytes`]) and is
    /// empty when a block begins, in the order in which warps run here, each to its next barrier.
    pub missed: u64,
    /// Bytes of the different sectors loaded: what memory must be read for at least, however large the caches.
    pub distinct_read: u64,
    /// Bytes of the different sectors stored.
    pub distinct_written: u64,
}

impl Counts {
    /// (mnemonic, warp instructions, thread instructions), most threads first.
    pub fn mix(&self) -> Vec<(String, u64, u64)> {
        let mut mix: Vec<(String, u64, u64)> = Vec::new();
        for l in &self.lines {
            match mix.iter_mut().find(|m| m.0 == l.name) {
                Some(m) => {
                    m.1 += l.warps;
                    m.2 += l.threads;
                }
                None => mix.push((l.name.clone(), l.warps, l.threads)),
            }
        }
        mix.retain(|m| m.1 > 0);
        mix.sort_by(|a, b| b.2.cmp(&a.2).then_with(|| a.0.cmp(&b.0)));
        mix
    }

    pub(crate) fn merge(&mut self, other: &Counts) {
        self.thread_instructions += other.thread_instructions;
        self.warp_instructions += other.warp_instructions;
        self.mma += other.mma;
        self.mma_macs += other.mma_macs;
        self.global.requests += other.global.requests;
        self.global.sectors += other.global.sectors;
        self.global.bytes += other.global.bytes;
        self.shared.requests += other.shared.requests;
        self.shared.waves += other.shared.waves;
        self.shared.conflicts += other.shared.conflicts;
        for (a, b) in self.lines.iter_mut().zip(&other.lines) {
            a.warps += b.warps;
            a.threads += b.threads;
            a.sectors += b.sectors;
            a.waves += b.waves;
            a.conflicts += b.conflicts;
        }
        for (a, b) in self.buffers.iter_mut().zip(&other.buffers) {
            a.read += b.read;
            a.written += b.written;
            a.sector_read += b.sector_read;
            a.sector_written += b.sector_written;
            a.missed += b.missed;
        }
    }

    /// A warp's access of `bytes` at each lane's offset in one buffer (none: the module's own variables): its sectors.
    pub(crate) fn global_access(
        &mut self,
        pc: usize,
        buffer: Option<usize>,
        offsets: &[u32; 32],
        lanes: u32,
        bytes: u32,
        store: bool,
    ) -> ([u32; 64], usize) {
        let (seen, found) = sectors(offsets, lanes, bytes);
        let n = found as u64;
        let asked = u64::from(lanes.count_ones() * bytes);
        self.global.requests += 1;
        self.global.sectors += n;
        self.global.bytes += asked;
        self.lines[pc].sectors += n;
        if let Some(b) = buffer.and_then(|b| self.buffers.get_mut(b)) {
            let (total, by_sector) =
                if store { (&mut b.written, &mut b.sector_written) } else { (&mut b.read, &mut b.sector_read) };
            *total += asked;
            *by_sector += 32 * n;
        }
        (seen, found)
    }

    /// One thread's bulk copy out of a buffer; with those of the other lanes it is one request.
    pub(crate) fn bulk_access(&mut self, pc: usize, buffer: usize, offset: u32, bytes: u32, first: bool) {
        let sectors = u64::from((offset + bytes - 1) / 32 - offset / 32 + 1);
        self.global.requests += u64::from(first);
        self.global.sectors += sectors;
        self.global.bytes += u64::from(bytes);
        self.lines[pc].sectors += sectors;
        self.buffers[buffer].read += u64::from(bytes);
        self.buffers[buffer].sector_read += 32 * sectors;
        self.buffers[buffer].missed += 32 * sectors;
    }

    /// A warp's access of shared memory, `bytes` at each lane's offset.
    pub(crate) fn shared_access(&mut self, pc: usize, offsets: &[u32; 32], lanes: u32, bytes: u32) {
        let lanes_at_once = 32 / (bytes / 4).clamp(1, 4);
        let (mut total, mut least) = (0, 0);
        for phase in 0..32 / lanes_at_once {
            let group = lanes & (u32::MAX >> (32 - lanes_at_once)) << (phase * lanes_at_once);
            if group != 0 {
                total += waves(offsets, group, bytes);
                least += 1;
            }
        }
        self.shared.requests += 1;
        self.shared.waves += total;
        self.shared.conflicts += total - least;
        self.lines[pc].waves += total;
        self.lines[pc].conflicts += total - least;
    }
}

/// Distinct 32-byte sectors under the lanes' accesses.
fn sectors(offsets: &[u32; 32], lanes: u32, bytes: u32) -> ([u32; 64], usize) {
    let mut seen = [0u32; 64];
    let mut n = 0;
    for l in (0..32).filter(|l| lanes >> l & 1 == 1) {
        // Aligned accesses of at most 16 bytes lie in one sector.
        let (first, last) = (offsets[l] / 32, (offsets[l] + (bytes - 1)) / 32);
        for s in first..=last {
            if n == 0 || (seen[n - 1] != s && !seen[..n].contains(&s)) {
                seen[n] = s;
                n += 1;
            }
        }
    }
    (seen, n)
}

/// Passes that the lanes' words need: the most distinct words in one bank.
fn waves(offsets: &[u32; 32], lanes: u32, bytes: u32) -> u64 {
    let mut words = [[0u32; 32]; 32];
    let mut count = [0usize; 32];
    for l in (0..32).filter(|l| lanes >> l & 1 == 1) {
        for w in offsets[l] / 4..=(offsets[l] + (bytes - 1)) / 4 {
            let bank = (w % 32) as usize;
            let n = count[bank];
            if n < 32 && !words[bank][..n].contains(&w) {
                words[bank][n] = w;
                count[bank] += 1;
            }
        }
    }
    count.iter().copied().max().unwrap_or(1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(f: impl Fn(u32) -> u32) -> [u32; 32] {
        std::array::from_fn(|l| f(l as u32))
    }

    #[test]
    fn sectors_of_known_patterns() {
        assert_eq!(sectors(&offsets(|l| 4 * l), u32::MAX, 4).1, 4);
        assert_eq!(sectors(&offsets(|l| 16 * l), u32::MAX, 16).1, 16);
        assert_eq!(sectors(&offsets(|l| 128 * l), u32::MAX, 4).1, 32);
        assert_eq!(sectors(&offsets(|_| 64), u32::MAX, 4).1, 1);
        assert_eq!(sectors(&offsets(|l| 4 * l + 16), u32::MAX, 4).1, 5);
        assert_eq!(sectors(&offsets(|l| 128 * l), 0b101, 4).1, 2);
    }

    #[test]
    fn waves_of_known_patterns() {
        let of = |f: &dyn Fn(u32) -> u32, bytes| {
            let mut c = Counts { lines: vec![LineCount::default()], ..Counts::default() };
            c.shared_access(0, &offsets(f), u32::MAX, bytes);
            (c.shared.waves, c.shared.conflicts)
        };
        assert_eq!(of(&|l| 4 * l, 4), (1, 0));
        assert_eq!(of(&|_| 0, 4), (1, 0));
        assert_eq!(of(&|l| 8 * l, 4), (2, 1));
        assert_eq!(of(&|l| 128 * l, 4), (32, 31));
        assert_eq!(of(&|l| 132 * l, 4), (1, 0));
        assert_eq!(of(&|l| 2 * l, 2), (1, 0));
        assert_eq!(of(&|l| 8 * l, 8), (2, 0));
        assert_eq!(of(&|l| 16 * l, 16), (4, 0));
        assert_eq!(of(&|l| 128 * l, 16), (32, 28));
    }
}
