// weights_bf16: W[N,K] in bf16, appended to the kernels that read it     format: src/quant/mod.rs

@group(0) @binding(1) var<storage, read> w: array<u32>;                 // [N,K], two to a word, or of two rows

/// W[n,k]: the upper half of an f32.
fn weight(n: u32, k: u32) -> f32 {
    let i = n * p.K + k;
    let pair = w[i / 2u];
    return bitcast<f32>(select(pair << 16u, pair & 0xffff0000u, i % 2u == 1u));
}

/// W[n,k..k+4]; beyond the row its last column again.
fn weight4(n: u32, k: u32) -> vec4<f32> {
    let last = p.K - 1u;
    return vec4<f32>(
        weight(n, k), weight(n, min(k + 1u, last)), weight(n, min(k + 2u, last)), weight(n, min(k + 3u, last)),
    );
}
