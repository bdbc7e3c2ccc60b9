//! The kernels in WGSL, slowest first:
//!
//! | variant | idea | for |
//! | --- | --- | --- |
//! | `naive` | one query and split a group, one row an invocation | reading |
//! | `tiled` | 32 queries by 64 rows in workgroup memory | batches |
//! | `workgroup` | the same tiles, 8 queries by 128 rows | Q ≤ 8 |
//!
//! A kernel's file holds its sizes and its entry. The algorithm follows, once for all formats, then the lists, then the
//! bindings and elements of the format.

use crate::op::*;

/// Most queries that `workgroup` takes.
const FEW_QUERIES: usize = 8;
/// Groups in one dimension that every device runs.
const GROUPS: usize = 65_535;

/// `shaders/<words>.wgsl`.
macro_rules! shader {
    ($($word:literal)*) => { crate::op::file!(concat!("shaders/", $($word,)* ".wgsl")) };
}

/// A format's rungs.
macro_rules! kernels {
    ($name:ident, $word:literal) => {
        pub const $name: &[Kernel] = &[
            rung(
                concat!("cosine_topk_", $word, "_naive"),
        &[shader!("cosine_topk_" $word "_naive"), NAIVE, LISTS, shader!("cosine_topk_rows_" $word)],
                a_query_a_group,
                groups_fit,
            ),
            rung(
                concat!("cosine_topk_", $word, "_tiled"),
        &[shader!("cosine_topk_" $word "_tiled"), TILED, LISTS, shader!("cosine_topk_rows_" $word)],
                tiles_32x64,
                many_queries,
            ),
            rung(
                concat!("cosine_topk_", $word, "_workgroup"),
        &[shader!("cosine_topk_" $word "_workgroup"), TILED, LISTS, shader!("cosine_topk_rows_" $word)],
                tiles_8x128,
                few_queries,
            ),
        ];
    };
}
const NAIVE: File = shader!("cosine_topk_naive");
const TILED: File = shader!("cosine_topk_tiled");
const LISTS: File = shader!("cosine_topk_lists");

kernels!(KERNELS_F32, "f32");
kernels!(KERNELS_F16, "f16");
kernels!(KERNELS_I8, "i8");
pub const MERGE: &[Kernel] = &[wgsl!("topk_merge_f32_ranks", a_place_an_invocation, places_fit)];

const fn rung(
    stem: &'static str,
    files: &'static [File],
    launch: fn(&Dims) -> Launch,
    supports: fn(&Dims, &Caps) -> bool,
) -> Kernel {
    Kernel { stem, source: Source::Wgsl(files), act: crate::tensor::Dtype::F32, launch, supports }
}

/// Workgroup memory of the lists: keys of what meets, three words a query, three a row, three more.
const fn lists_bytes(queries: usize, rows: usize) -> usize {
    4 * (queries * rows + 3 * queries + 3 * rows + 3)
}

/// Of the tiles: four elements of 16 bytes for each query and row.
const fn tiles_bytes(queries: usize, rows: usize) -> usize {
    64 * (queries + rows)
}

/// `naive`.
fn a_query_a_group(d: &Dims) -> Launch {
    Launch { grid: [d["Q"] as u32, d["S"] as u32, 1], block: [64, 1, 1], shared_bytes: lists_bytes(1, 64) as u32 }
}

fn groups_fit(d: &Dims, _: &Caps) -> bool {
    d["Q"] <= GROUPS && d["S"] <= GROUPS
}

/// `tiled`.
fn tiles_32x64(d: &Dims) -> Launch {
    let shared_bytes = (lists_bytes(32, 64) + tiles_bytes(32, 64)) as u32;
    Launch { grid: [d["Q"].div_ceil(32) as u32, d["S"] as u32, 1], block: [128, 1, 1], shared_bytes }
}

fn many_queries(d: &Dims, caps: &Caps) -> bool {
    d["Q"] > FEW_QUERIES && groups_fit(d, caps)
}

/// `workgroup`.
fn tiles_8x128(d: &Dims) -> Launch {
    let shared_bytes = (lists_bytes(8, 128) + tiles_bytes(8, 128)) as u32;
    Launch { grid: [d["Q"].div_ceil(8) as u32, d["S"] as u32, 1], block: [64, 1, 1], shared_bytes }
}

fn few_queries(d: &Dims, caps: &Caps) -> bool {
    d["Q"] <= FEW_QUERIES && groups_fit(d, caps)
}

/// `topk_merge_f32_ranks`.
fn a_place_an_invocation(d: &Dims) -> Launch {
    Launch { grid: [d["Q"] as u32, (d["S"] * d["K"]).div_ceil(128) as u32, 1], block: [128, 1, 1], shared_bytes: 0 }
}

fn places_fit(d: &Dims, _: &Caps) -> bool {
    d["Q"] <= GROUPS && (d["S"] * d["K"]).div_ceil(128) <= GROUPS
}
