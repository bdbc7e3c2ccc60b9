// weights_nf4: W[N,K] in blocks of 64 codes of 16 levels, level·absmax; nf4dq too     format: src/quant/nf4.rs
//
// K is a multiple of 64, so a word of codes lies in one row and one block.

@group(0) @binding(1) var<storage, read> codes: array<u32>;             // u4[N,K], a byte's first one high

/// W[n,k].
fn weight(n: u32, k: u32) -> f32 {
    let i = n * p.K + k;
    let code = (codes[i / 8u] >> ((i % 8u ^ 1u) * 4u)) & 15u;
    return level(code) * block_absmax(i / 64u);
}

/// W[n,k..k+4], k a multiple of 4.
fn weight4(n: u32, k: u32) -> vec4<f32> {
    let i = n * p.K + k;
    let code = (vec4<u32>(codes[i / 8u]) >> (vec4<u32>(4u, 0u, 12u, 8u) + i % 8u * 4u)) & vec4(15u);
    return block_absmax(i / 64u) * vec4<f32>(level(code.x), level(code.y), level(code.z), level(code.w));
}
