// weights_nf4: W[N,K] in blocks of 64 codes of 16 levels, level·absmax     format: src/quant/nf4.rs
//
// K is a multiple of 64, so a word of codes lies in one row and one block.

@group(0) @binding(1) var<storage, read> codes: array<u32>;             // u4[N,K], a byte's first one high
@group(0) @binding(2) var<storage, read> absmax: array<f32>;            // [N,K/64]

/// The level of a code: four rounds of choosing one of two, as an array in registers would go to memory.
fn level(code: u32) -> f32 {
    let one = (code & 1u) == 1u;
    let two = (code & 2u) == 2u;
    let four = (code & 4u) == 4u;
    let low0 = select(select(-1.0, -0.6961928, one), select(-0.52507305, -0.3949175, one), two);
    let low1 = select(select(-0.28444138, -0.18477343, one), select(-0.091050036, 0.0, one), two);
    let high0 = select(select(0.0795803, 0.1609302, one), select(0.2461123, 0.33791524, one), two);
    let high1 = select(select(0.44070983, 0.562617, one), select(0.72295684, 1.0, one), two);
    return select(select(low0, low1, four), select(high0, high1, four), code >= 8u);
}

/// Absmax of block i, blocks counted through the matrix.
fn block_absmax(i: u32) -> f32 {
    return absmax[i];
}

/// W[n,k].
fn weight(n: u32, k: u32) -> f32 {
    let i = n * p.K + k;
    let code = (codes[i / 8u] >> ((i % 8u ^ 1u) * 4u)) & 15u;
    return level(code) * block_absmax(i / 64u);
}
