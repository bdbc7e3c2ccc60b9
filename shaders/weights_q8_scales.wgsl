// weights_q8_scales: scale and min of a group, of the files that decode q8     format: src/quant/mod.rs

@group(0) @binding(2) var<storage, read> scales: array<u32>;            // f16|f32[N,K/G]
@group(0) @binding(3) var<storage, read> mins: array<u32>;              // f16|f32[N,K/G], empty unless AFFINE

/// Scale of group i, groups counted through the matrix.
fn group_scale(i: u32) -> f32 {
    return half_or_wide(scales[i >> (1u - p.WIDE)], i);
}

/// Value of code 0 in group i; 0 where there are no mins.
fn group_min(i: u32) -> f32 {
    if p.AFFINE == 0u {
        return 0.0;
    }
    return half_or_wide(mins[i >> (1u - p.WIDE)], i);
}

/// The number of group i in its word: an f32, or an f16 in one half.
fn half_or_wide(word: u32, i: u32) -> f32 {
    let half = unpack2x16float(word >> (i % 2u * 16u)).x;
    return select(half, bitcast<f32>(word), p.WIDE == 1u);
}
