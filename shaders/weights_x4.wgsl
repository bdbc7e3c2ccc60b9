// weights_x4: what shaders/weights_<format>_x4.wgsl share     format: src/quant/mod.rs
//
// They read four rows of W at a time, 32 columns of each: `read_chunk(n, c)` is W[n, 32c..32c+32] as it is stored, and
// `decode_eight(chunk, s)`, s below 4, eight columns of it. K is a multiple of 32.

/// Columns 8s..8s+8 of a chunk: of each column the four rows' values.
struct Eight {
    k0: vec4<f32>, k1: vec4<f32>, k2: vec4<f32>, k3: vec4<f32>,
    k4: vec4<f32>, k5: vec4<f32>, k6: vec4<f32>, k7: vec4<f32>,
}

/// acc + a · the first four columns + b · the last four, for each of the four rows.
fn add(acc: vec4<f32>, a: vec4<f32>, b: vec4<f32>, w: Eight) -> vec4<f32> {
    var sum = fma(vec4<f32>(a.x), w.k0, acc);
    sum = fma(vec4<f32>(a.y), w.k1, sum);
    sum = fma(vec4<f32>(a.z), w.k2, sum);
    sum = fma(vec4<f32>(a.w), w.k3, sum);
    sum = fma(vec4<f32>(b.x), w.k4, sum);
    sum = fma(vec4<f32>(b.y), w.k5, sum);
    sum = fma(vec4<f32>(b.z), w.k6, sum);
    return fma(vec4<f32>(b.w), w.k7, sum);
}
