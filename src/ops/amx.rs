//! Products of f32 matrices on AMX tiles (x86-64, Linux): a number is the exact sum of three bf16, and the products of
//! those parts are summed in f32.
//!
//! ```text
//! x = h + m + l                    each the nearest bf16 of what is left: 8 + 8 + 8 bits hold the 24 of an f32
//! x·w = xl·wh + xh·wh + xh·wl + xh·wm + xm·wm + xm·wh      left out: under 2^-26 of |x·w|
//! C[16,16] += A[16 rows, 32 columns] · B[32 rows, 16 columns]      one instruction on three tiles of 1 KiB
//! ```
//!
//! 1. Six products at 512 multiply-adds a cycle are 85 f32 ones a cycle, where AVX-512 has 32 (or 64 at best).
//! 2. Four tiles of C, two of A and two of B: each loaded tile meets two others. Neighbouring products share a part, so
//!    24 products load 14 tiles.
//! 3. A tile of A is 16 rows of 32 numbers; one of B is 16 pairs of rows, a pair's numbers side by side (Intel SDM,
//!    TDPBF16PS). Both are packed beforehand, their parts one after another.
//!
//! Infinities become NaN, as does what rounds to one (beyond 3.39e38); parts under 1.2e-38 are zero.

use std::arch::asm;
use std::arch::x86_64::*;

/// Rows of a tile; columns of C's tiles.
pub const ROWS: usize = 16;
/// Numbers that a tile's rows hold along the sum.
pub const DEPTH: usize = 32;
/// bf16 in a number.
pub const PARTS: usize = 3;

/// 16 rows of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Tile([u32; 256]);

/// The parts of 16 by 32 numbers, or of 32 by 16.
pub type Packed = [Tile; PARTS];

/// All zero.
pub const ZERO: Packed = [Tile([0; 256]); PARTS];

/// Four tiles of C: rows of A's first tile by columns of B's first and second, then those of A's second.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Block(pub [[f32; 256]; 4]);

/// All zero.
pub const ZERO_BLOCK: Block = Block([[0.0; 256]; 4]);

/// True when the processor has the tiles and the system lets this process use them; asks once.
pub fn available() -> bool {
    static ALLOWED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ALLOWED.get_or_init(|| {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        // Leaf 7: bit 22 of edx is AMX-BF16, bit 24 AMX-TILE.
        let leaf = if wide { __cpuid_count(7, 0).edx } else { 0 };
        let tiles = leaf >> 22 & 1 == 1 && leaf >> 24 & 1 == 1;
        // SAFETY: asks for the state of the tiles to be saved with this process's threads; nothing else changes. A
        // system that does not know the request refuses it.
        tiles && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
    })
}

/// Runs `work` with this thread's eight tiles set up as 16 rows of 64 bytes.
pub fn with_tiles(work: impl FnOnce()) {
    with_rows(ROWS, work)
}

/// Runs `work` with this thread's tiles 0 and 1 (C) and 4 and 5 (A) set up as `rows` ≤ 16 rows of 64 bytes, the others as
/// 16: a product takes as many cycles as A has rows.
pub fn with_rows(rows: usize, work: impl FnOnce()) {
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    /// Sets the tiles free however `work` ends.
    struct Release;
    impl Drop for Release {
        fn drop(&mut self) {
            // SAFETY: `available` was true.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
    assert!(available(), "AMX on a processor or system without it");
    let mut config = Config { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..8].fill(64);
    config.rows[..8].fill(ROWS as u8);
    assert!((1..=ROWS).contains(&rows), "{rows} rows of a tile");
    for tile in [0, 1, 4, 5] {
        config.rows[tile] = rows as u8;
    }
    // SAFETY: `available` was true, and the configuration is a valid one of palette 1.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
    let _release = Release;
    work();
}

/// C = A·B, or C += A·B with `add`: two tiles of rows of A and two of columns of B, `a[0].len()` deep.
///
/// # Safety
/// Called from within [`with_tiles`].
#[inline]
pub unsafe fn multiply(a: [&[Packed]; 2], b: [&[Packed]; 2], c: &mut Block, add: bool) {
    let depth = a[0].len();
    assert!(a[1].len() == depth && b[0].len() == depth && b[1].len() == depth);
    let first = if add && depth > 0 { 1usize } else { 0 };
    // SAFETY: every slice holds `depth` times three tiles, which is what the loop reads, and C four.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jz 2f",
            "tileloadd tmm0, [{c} + {row}*1]",
            "tileloadd tmm1, [{c} + {row}*1 + 1024]",
            "tileloadd tmm2, [{c} + {row}*1 + 2048]",
            "tileloadd tmm3, [{c} + {row}*1 + 3072]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "test {depth}, {depth}",
            "jz 5f",
            "4:",
            // l · h
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tileloadd tmm4, [{a0} + {row}*1 + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row}*1 + 2048]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // m · h
            "tileloadd tmm4, [{a0} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row}*1 + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // m · m
            "tileloadd tmm6, [{b0} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // h · m
            "tileloadd tmm4, [{a0} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // h · l
            "tileloadd tmm6, [{b0} + {row}*1 + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}*1 + 2048]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // h · h
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 3072",
            "add {a1}, 3072",
            "add {b0}, 3072",
            "add {b1}, 3072",
            "dec {depth}",
            "jnz 4b",
            "5:",
            "tilestored [{c} + {row}*1], tmm0",
            "tilestored [{c} + {row}*1 + 1024], tmm1",
            "tilestored [{c} + {row}*1 + 2048], tmm2",
            "tilestored [{c} + {row}*1 + 3072], tmm3",
            add = in(reg) first,
            depth = inout(reg) depth => _,
            a0 = inout(reg) a[0].as_ptr() => _,
            a1 = inout(reg) a[1].as_ptr() => _,
            b0 = inout(reg) b[0].as_ptr() => _,
            b1 = inout(reg) b[1].as_ptr() => _,
            c = in(reg) c as *mut Block,
            row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The parts of 32 numbers, each part 32 bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn split(first: __m512, second: __m512) -> [__m512i; PARTS] {
    let (mut a, mut b) = (first, second);
    let mut parts = [_mm512_setzero_si512(); PARTS];
    for part in &mut parts {
        // SAFETY: 32 bf16 as their bits.
        *part = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) };
        let widen = |half: __m256i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
        a = _mm512_sub_ps(a, widen(_mm512_castsi512_si256(*part)));
        b = _mm512_sub_ps(b, widen(_mm512_extracti64x4_epi64::<1>(*part)));
    }
    parts
}

/// 16 numbers from `from` on, those past `len` zero.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(from: &[f32]) -> __m512 {
    if from.len() >= 16 {
        // SAFETY: sixteen numbers.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    } else {
        // SAFETY: as many as there are.
        unsafe { _mm512_maskz_loadu_ps((1 << from.len()) - 1, from.as_ptr()) }
    }
}

/// Up to 16 rows, each from `x` every `ld` numbers and `width` long, as tiles of A: columns 0..32, 32..64 and so on.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn pack_a(x: &[f32], ld: usize, rows: usize, width: usize, out: &mut [Packed]) {
    for (tile, out) in out.iter_mut().enumerate() {
        let columns = DEPTH * tile..width.min(DEPTH * (tile + 1));
        for r in 0..ROWS {
            let parts = if r < rows && !columns.is_empty() { pairs(&x[r * ld..][columns.clone()]) } else { none() };
            for (out, part) in out.iter_mut().zip(parts) {
                // SAFETY: a row of a tile is 64 bytes.
                unsafe { _mm512_storeu_si512(out.0[16 * r..16 * r + 16].as_mut_ptr().cast(), part) };
            }
        }
    }
}

/// 32 columns of up to 16 rows, each from `x` every `ld` numbers, as one tile of A whose place i holds column `order[i]`;
/// other rows of the tile stay as they are, so that they have no effect must be seen to by those who read C.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn pack_a_ordered(x: &[f32], ld: usize, rows: usize, order: &[u16; DEPTH], out: &mut Packed) {
    assert!(rows <= ROWS);
    // SAFETY: 64 bytes.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    for r in 0..rows {
        for (out, part) in out.iter_mut().zip(pairs(&x[r * ld..][..DEPTH])) {
            let mixed = _mm512_permutexvar_epi16(order, part);
            // SAFETY: a row of a tile is 64 bytes.
            unsafe { _mm512_storeu_si512(out.0[16 * r..16 * r + 16].as_mut_ptr().cast(), mixed) };
        }
    }
}

/// Up to 16 rows as in [`pack_a`], as tiles of B, which so is their transpose.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub fn pack_b_transposed(x: &[f32], ld: usize, rows: usize, width: usize, out: &mut [Packed]) {
    pack_a(x, ld, rows, width, out);
    for tile in out.iter_mut().flatten() {
        transpose(&mut tile.0);
    }
}

/// Up to 32 rows, each from `w` every `ld` numbers and `width` ≤ 16 long, as one tile of B.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn pack_b(w: &[f32], ld: usize, rows: usize, width: usize, out: &mut Packed) {
    // bf16 number i of the first row, then of the second.
    let mut order = [0u16; 32];
    for (i, order) in order.iter_mut().enumerate() {
        *order = (i / 2 + i % 2 * 16) as u16;
    }
    // SAFETY: 32 numbers of 16 bits.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    for pair in 0..ROWS {
        let row = |r: usize| if r < rows { load(&w[r * ld..][..width]) } else { _mm512_setzero_ps() };
        let parts = split(row(2 * pair), row(2 * pair + 1));
        for (out, part) in out.iter_mut().zip(parts) {
            let mixed = _mm512_permutexvar_epi16(order, part);
            // SAFETY: a row of a tile is 64 bytes.
            unsafe { _mm512_storeu_si512(out.0[16 * pair..16 * pair + 16].as_mut_ptr().cast(), mixed) };
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn none() -> [__m512i; PARTS] {
    [_mm512_setzero_si512(); PARTS]
}

/// The parts of up to 32 numbers in a row.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn pairs(x: &[f32]) -> [__m512i; PARTS] {
    let (first, second) = x.split_at(x.len().min(16));
    split(load(first), load(second))
}

/// 16 by 16 words in place.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn transpose(words: &mut [u32; 256]) {
    // SAFETY: sixteen rows of sixteen words.
    let mut rows: [__m512i; 16] =
        std::array::from_fn(|r| unsafe { _mm512_loadu_si512(words[16 * r..].as_ptr().cast()) });
    transpose_rows(&mut rows);
    for (r, row) in rows.iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(words[16 * r..].as_mut_ptr().cast(), *row) };
    }
}

/// Words, pairs, quads, halves: four exchanges, each of neighbours twice as far apart.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn transpose_rows(rows: &mut [__m512i; 16]) {
    let r = *rows;
    let mut t = r;
    for i in (0..16).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // t[i] holds words 0, 1 of each lane of rows i, i+1; t[i+1] words 2, 3.
    let mut u = t;
    for i in (0..16).step_by(4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // u[4·q + w] holds word w of each lane of rows 4q..4q+4.
    for w in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(u[w], u[4 + w]); // lanes 0, 2 of quads 0 and 1
        let high = _mm512_shuffle_i32x4::<0xdd>(u[w], u[4 + w]); // lanes 1, 3
        let low2 = _mm512_shuffle_i32x4::<0x88>(u[8 + w], u[12 + w]);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(u[8 + w], u[12 + w]);
        rows[w] = _mm512_shuffle_i32x4::<0x88>(low, low2); // lane 0 of all quads
        rows[8 + w] = _mm512_shuffle_i32x4::<0xdd>(low, low2); // lane 2
        rows[4 + w] = _mm512_shuffle_i32x4::<0x88>(high, high2); // lane 1
        rows[12 + w] = _mm512_shuffle_i32x4::<0xdd>(high, high2); // lane 3
    }
}

/// Writes a tile of C into rows of y every `ld` numbers, or adds it: `rows` by `columns` of the tile, or with
/// `TRANSPOSED` of its transpose.
///
/// # Safety
/// y holds those rows and columns, and no one else touches them meanwhile.
#[target_feature(enable = "avx512f,avx512dq")]
pub unsafe fn store<const TRANSPOSED: bool>(
    tile: &[f32; 256],
    y: *mut f32,
    ld: usize,
    rows: usize,
    columns: usize,
    add: bool,
) {
    // SAFETY: sixteen rows of sixteen numbers.
    let mut lines: [__m512i; 16] =
        std::array::from_fn(|r| unsafe { _mm512_loadu_si512(tile[16 * r..].as_ptr().cast()) });
    if TRANSPOSED {
        transpose_rows(&mut lines);
    }
    let mask = if columns >= 16 { u16::MAX } else { (1 << columns) - 1 };
    for (r, line) in lines.iter().enumerate().take(rows) {
        let mut line = _mm512_castsi512_ps(*line);
        // SAFETY: the caller's promise, for the columns of the mask.
        unsafe {
            let to = y.add(r * ld);
            if add {
                line = _mm512_add_ps(line, _mm512_maskz_loadu_ps(mask, to));
            }
            _mm512_mask_storeu_ps(to, mask, line);
        }
    }
}

/// How deep the pair of tiles is that stays in a core's first cache while it meets all others: 18 KiB. With 36 KiB a
/// product of 256 rows takes a quarter longer.
const NEAR: usize = 3;
/// What the others may take, to stay in a core's second cache.
const FAR: usize = 1_200_000;

/// Tiles of one side, even in number, that fit [`FAR`] at this depth.
pub fn far_tiles(depth: usize) -> usize {
    (FAR / (depth.max(1) * size_of::<Packed>()) / 2 * 2).max(2)
}

/// How deep so many tiles of one side may be to fit [`FAR`].
pub fn far_depth(tiles: usize) -> usize {
    (FAR / (tiles.max(1) * size_of::<Packed>())).max(NEAR)
}

/// `count` in the fewest parts of at most `most`, as equal as can be: the size of a part.
pub fn even(count: usize, most: usize) -> usize {
    count.div_ceil(count.div_ceil(most).max(1)).max(1)
}

/// Products of two tiles of rows (`strip`, one tile's depth after the other's) with every pair of `others`, a block of C
/// a pair. With `LEFT` the strip is A's, else B's.
///
/// # Safety
/// Called from within [`with_tiles`].
pub unsafe fn sweep<const LEFT: bool>(strip: &[Packed], others: &[Packed], depth: usize, blocks: &mut [Block]) {
    assert!(strip.len() == 2 * depth && others.len() == 2 * depth * blocks.len());
    let step = even(depth, NEAR);
    for first in (0..depth).step_by(step) {
        let range = first..(first + step).min(depth);
        let near = [&strip[..depth][range.clone()], &strip[depth..][range.clone()]];
        for (block, far) in blocks.iter_mut().zip(others.chunks_exact(2 * depth)) {
            let far = [&far[..depth][range.clone()], &far[depth..][range.clone()]];
            let (a, b) = if LEFT { (near, far) } else { (far, near) };
            // SAFETY: the caller's promise.
            unsafe { multiply(a, b, block, first > 0) };
        }
    }
}

/// Memory of a launch or a task, to be used again: fresh pages cost more than what is written to them.
#[derive(Default)]
pub struct Scratch {
    /// Numbers.
    pub values: Vec<f32>,
    /// Tiles of A or B.
    pub tiles: Vec<Packed>,
    /// Tiles of C.
    pub blocks: Vec<Block>,
}

impl Scratch {
    /// At least so much of each.
    pub fn fit(&mut self, values: usize, tiles: usize, blocks: usize) {
        self.values.resize(self.values.len().max(values), 0.0);
        self.tiles.resize(self.tiles.len().max(tiles), ZERO);
        self.blocks.resize(self.blocks.len().max(blocks), ZERO_BLOCK);
    }
}
