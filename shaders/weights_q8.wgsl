// weights_q8: W[N,K] in groups of G 8-bit codes, scale·code (+ min)     format: src/quant/mod.rs
//
// K is a multiple of G and G of 16, so a word of codes lies in one row and one group. Scales: weights_q8_scales.

@group(0) @binding(1) var<storage, read> codes: array<u32>;             // i8[N,K], four to a word, the first lowest

/// W[n,k].
fn weight(n: u32, k: u32) -> f32 {
    let i = n * p.K + k;
    let code = extractBits(bitcast<i32>(codes[i / 4u]), i % 4u * 8u, 8u);
    return fma(group_scale(i / p.G), f32(code), group_min(i / p.G));
}

/// W[n,k..k+4], k a multiple of 4.
fn weight4(n: u32, k: u32) -> vec4<f32> {
    let i = n * p.K + k;
    let code = bitcast<vec4<i32>>(vec4<u32>(codes[i / 4u]) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4(24u);
    return fma(vec4<f32>(group_scale(i / p.G)), vec4<f32>(code), vec4<f32>(group_min(i / p.G)));
}
