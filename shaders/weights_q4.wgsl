// weights_q4: W[N,K] in groups of G 4-bit codes, scale·code + min     format: src/quant/mod.rs
//
// K is a multiple of G and G of 16, so a word of codes lies in one row and one group.

@group(0) @binding(1) var<storage, read> codes: array<u32>;             // u4[N,K], eight to a word, the first lowest
@group(0) @binding(2) var<storage, read> scales: array<u32>;            // f16|f32[N,K/G]
@group(0) @binding(3) var<storage, read> mins: array<u32>;              // f16|f32[N,K/G]

/// Scale of group i, groups counted through the matrix.
fn group_scale(i: u32) -> f32 {
    if p.WIDE == 1u {
        return bitcast<f32>(scales[i]);
    }
    let pair = unpack2x16float(scales[i / 2u]);
    return select(pair.x, pair.y, i % 2u == 1u);
}

/// Value of code 0 in group i.
fn group_min(i: u32) -> f32 {
    if p.WIDE == 1u {
        return bitcast<f32>(mins[i]);
    }
    let pair = unpack2x16float(mins[i / 2u]);
    return select(pair.x, pair.y, i % 2u == 1u);
}

/// W[n,k].
fn weight(n: u32, k: u32) -> f32 {
    let i = n * p.K + k;
    let code = (codes[i / 8u] >> (i % 8u * 4u)) & 15u;
    return fma(group_scale(i / p.G), f32(code), group_min(i / p.G));
}
