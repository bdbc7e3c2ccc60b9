// weights_q4: W[N,K] in groups of G 4-bit codes, scale·code + min     format: src/quant/mod.rs
//
// K is a multiple of G and G of 16, so a word of codes lies in one row and one group. Scales: weights_q4_scales.

@group(0) @binding(1) var<storage, read> codes: array<u32>;             // u4[N,K], eight to a word, the first lowest

/// W[n,k].
fn weight(n: u32, k: u32) -> f32 {
    let i = n * p.K + k;
    let code = (codes[i / 8u] >> (i % 8u * 4u)) & 15u;
    return fma(group_scale(i / p.G), f32(code), group_min(i / p.G));
}

/// W[n,k..k+4], k a multiple of 4.
fn weight4(n: u32, k: u32) -> vec4<f32> {
    let i = n * p.K + k;
    let code = vec4<u32>(codes[i / 8u]) >> (vec4<u32>(0u, 4u, 8u, 12u) + i % 8u * 4u);
    return fma(vec4<f32>(group_scale(i / p.G)), vec4<f32>(code & vec4(15u)), vec4<f32>(group_min(i / p.G)));
}
