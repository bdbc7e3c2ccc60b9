// weights_f32: W[N,K] in f32, appended to the kernels that read it     format: src/quant/mod.rs

@group(0) @binding(1) var<storage, read> w: array<f32>;                 // [N,K]

/// W[n,k].
fn weight(n: u32, k: u32) -> f32 {
    return w[n * p.K + k];
}
