// weights_nf4_rows: eight rows of W in nf4 or nf4dq, four columns an invocation; for qmatmul_t_broadcast
//
// A lane reads 32 columns of row n + lane with their absmax, and every lane asks it for its own four. Levels:
// weights_nf4_scales or weights_nf4dq_scales, which follows.

@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;       // u4[N,K], a byte's first one high

fn read_rows(n: u32, k0: u32, lane: u32) -> Rows {
    let i = (n + lane) * p.K + k0;
    let c = codes[i / 32u];
    let s = block_absmax(i / 64u);
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

/// A lane's four of 32 columns.
fn decode(codes: vec4<u32>, scale: f32, lane: u32) -> vec4<f32> {
    let word = select(select(codes.x, codes.y, lane >= 2u), select(codes.z, codes.w, lane >= 6u), lane >= 4u);
    let code = (vec4<u32>(word) >> (vec4<u32>(4u, 0u, 12u, 8u) + lane % 2u * 16u)) & vec4(15u);
    return scale * vec4<f32>(level(code.x), level(code.y), level(code.z), level(code.w));
}
