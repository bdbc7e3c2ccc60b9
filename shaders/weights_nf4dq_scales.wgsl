// weights_nf4dq_scales: levels and a block's absmax, of the files that decode nf4dq     format: src/quant/nf4.rs

@group(0) @binding(2) var<storage, read> absmax: array<u32>;            // u8[N,K/64], four to a word
@group(0) @binding(3) var<storage, read> code: array<f32>;              // [256], values of absmax's codes
@group(0) @binding(4) var<storage, read> absmax2: array<f32>;           // [N*K/64/256]
@group(0) @binding(5) var<storage, read> offset: array<f32>;            // [1]

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
    let small = (absmax[i / 4u] >> (i % 4u * 8u)) & 255u;
    return fma(code[small], absmax2[i / 256u], offset[0]);
}
