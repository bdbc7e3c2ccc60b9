// weights_q4_x4: four rows of W in q4 at a time, 32 columns of each; weights_q4 and weights_x4 follow

@group(0) @binding(1) var<storage, read> codes_x4: array<vec4<u32>>;    // u4[N,K], 32 to a vec4, the first lowest

struct Chunk { a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>, scale: vec4<f32>, min: vec4<f32> }

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    let i = n * (p.K / 32u) + c;
    let g = n * (p.K / p.G) + c * 32u / p.G;
    return Chunk(
        codes_x4[i.x], codes_x4[i.y], codes_x4[i.z], codes_x4[i.w],
        vec4<f32>(group_scale(g.x), group_scale(g.y), group_scale(g.z), group_scale(g.w)),
        vec4<f32>(group_min(g.x), group_min(g.y), group_min(g.z), group_min(g.w)),
    );
}

fn decode_eight(w: Chunk, s: u32) -> Eight {
    let word = vec4<u32>(w.a[s], w.b[s], w.c[s], w.d[s]);
    return Eight(
        decode(w, word), decode(w, word >> vec4(4u)), decode(w, word >> vec4(8u)), decode(w, word >> vec4(12u)),
        decode(w, word >> vec4(16u)), decode(w, word >> vec4(20u)), decode(w, word >> vec4(24u)),
        decode(w, word >> vec4(28u)),
    );
}

fn decode(w: Chunk, code: vec4<u32>) -> vec4<f32> {
    return fma(w.scale, vec4<f32>(code & vec4(15u)), w.min);
}
