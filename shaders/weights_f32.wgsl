// weights_f32: W[N,K] in f32, appended to the kernels that read it     format: src/quant/mod.rs

@group(0) @binding(1) var<storage, read> w: array<f32>;                 // [N,K]

/// W[n,k].
fn weight(n: u32, k: u32) -> f32 {
    return w[n * p.K + k];
}

/// W[n,k..k+4]; beyond the row its last column again.
fn weight4(n: u32, k: u32) -> vec4<f32> {
    let last = p.K - 1u;
    return vec4<f32>(
        weight(n, k), weight(n, min(k + 1u, last)), weight(n, min(k + 2u, last)), weight(n, min(k + 3u, last)),
    );
}
