// weights_q4_rows: eight rows of W in q4, four columns an invocation; for qmatmul_t_broadcast
//
// A lane reads 32 columns of row n + lane with their scales, and every lane asks it for its own four. Scales:
// weights_q4_scales.

@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;       // u4[N,K], 32 to a vec4, the first lowest

fn read_rows(n: u32, k0: u32, lane: u32) -> Rows {
    let i = (n + lane) * p.K + k0;
    let c = codes[i / 32u];
    let s = scales_of(i);
    return Rows(
        decode(subgroupBroadcast(c, 0u), subgroupBroadcast(s, 0u), lane),
        decode(subgroupBroadcast(c, 1u), subgroupBroadcast(s, 1u), lane),
        decode(subgroupBroadcast(c, 2u), subgroupBroadcast(s, 2u), lane),
        decode(subgroupBroadcast(c, 3u), subgroupBroadcast(s, 3u), lane),
        decode(subgroupBroadcast(c, 4u), subgroupBroadcast(s, 4u), lane),
        decode(subgroupBroadcast(c, 5u), subgroupBroadcast(s, 5u), lane),
        decode(subgroupBroadcast(c, 6u), subgroupBroadcast(s, 6u), lane),
        decode(subgroupBroadcast(c, 7u), subgroupBroadcast(s, 7u), lane),
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

/// A lane's four of 32 columns.
fn decode(codes: vec4<u32>, scales: vec4<f32>, lane: u32) -> vec4<f32> {
    let word = select(select(codes.x, codes.y, lane >= 2u), select(codes.z, codes.w, lane >= 6u), lane >= 4u);
    let code = (vec4<u32>(word) >> (vec4<u32>(0u, 4u, 8u, 12u) + lane % 2u * 16u)) & vec4(15u);
    let scale = select(scales.xz, scales.yw, lane >= 4u);
    return fma(vec4<f32>(scale.x), vec4<f32>(code), vec4<f32>(scale.y));
}
