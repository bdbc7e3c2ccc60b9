// weights_q8_rows: eight rows of W in q8, four columns an invocation; for qmatmul_t_broadcast
//
// A lane reads its own codes, and the scales of row n + lane, for which every lane asks it. Scales: weights_q8_scales.

@group(0) @binding(1) var<storage, read> codes: array<u32>;             // i8[N,K], four to a word, the first lowest

fn read_rows(n: u32, k0: u32, lane: u32) -> Rows {
    let s = scales_of((n + lane) * p.K + k0);
    let step = p.K / 4u;
    let i = n * step + k0 / 4u + lane;
    return Rows(
        decode(codes[i], subgroupBroadcast(s, 0u), lane),
        decode(codes[i + step], subgroupBroadcast(s, 1u), lane),
        decode(codes[i + 2u * step], subgroupBroadcast(s, 2u), lane),
        decode(codes[i + 3u * step], subgroupBroadcast(s, 3u), lane),
        decode(codes[i + 4u * step], subgroupBroadcast(s, 4u), lane),
        decode(codes[i + 5u * step], subgroupBroadcast(s, 5u), lane),
        decode(codes[i + 6u * step], subgroupBroadcast(s, 6u), lane),
        decode(codes[i + 7u * step], subgroupBroadcast(s, 7u), lane),
    );
}

/// Scales and mins of columns k0..k0+16 and from k0 + 16 on, of row n + lane: both scales, then both mins.
fn scales_of(i: u32) -> vec4<f32> {
    let g = i / p.G;
    let s = vec4<f32>(group_scale(g), 0.0, group_min(g), 0.0);
    if p.G == 16u {
        return s + vec4<f32>(0.0, group_scale(g + 1u), 0.0, group_min(g + 1u));
    }
    return s.xxzz;
}

/// Four columns.
fn decode(word: u32, scales: vec4<f32>, lane: u32) -> vec4<f32> {
    let code = bitcast<vec4<i32>>(vec4<u32>(word) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4(24u);
    let scale = select(scales.xz, scales.yw, lane >= 4u);
    return fma(vec4<f32>(scale.x), vec4<f32>(code), vec4<f32>(scale.y));
}
