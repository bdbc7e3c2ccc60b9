// weights_q8_x4: four rows of W in q8 at a time, 32 columns of each; weights_q8 and weights_x4 follow

@group(0) @binding(1) var<storage, read> codes_x4: array<vec4<u32>>;    // i8[N,K], 16 to a vec4, the first lowest

struct Chunk {
    a0: vec4<u32>, b0: vec4<u32>, c0: vec4<u32>, d0: vec4<u32>,
    a1: vec4<u32>, b1: vec4<u32>, c1: vec4<u32>, d1: vec4<u32>,
    scale: vec4<f32>, min: vec4<f32>,
}

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    let i = n * (p.K / 16u) + c * 2u;
    let j = i + 1u;
    let g = n * (p.K / p.G) + c * 32u / p.G;
    return Chunk(
        codes_x4[i.x], codes_x4[i.y], codes_x4[i.z], codes_x4[i.w],
        codes_x4[j.x], codes_x4[j.y], codes_x4[j.z], codes_x4[j.w],
        vec4<f32>(group_scale(g.x), group_scale(g.y), group_scale(g.z), group_scale(g.w)),
        vec4<f32>(group_min(g.x), group_min(g.y), group_min(g.z), group_min(g.w)),
    );
}

fn decode_eight(w: Chunk, s: u32) -> Eight {
    let first = s % 2u * 2u;
    var low = vec4<u32>(w.a0[first], w.b0[first], w.c0[first], w.d0[first]);
    var high = vec4<u32>(w.a0[first + 1u], w.b0[first + 1u], w.c0[first + 1u], w.d0[first + 1u]);
    if s >= 2u {
        low = vec4<u32>(w.a1[first], w.b1[first], w.c1[first], w.d1[first]);
        high = vec4<u32>(w.a1[first + 1u], w.b1[first + 1u], w.c1[first + 1u], w.d1[first + 1u]);
    }
    return Eight(
        decode(w, low << vec4(24u)), decode(w, low << vec4(16u)), decode(w, low << vec4(8u)), decode(w, low),
        decode(w, high << vec4(24u)), decode(w, high << vec4(16u)), decode(w, high << vec4(8u)), decode(w, high),
    );
}

/// The code in the highest byte.
fn decode(w: Chunk, word: vec4<u32>) -> vec4<f32> {
    return fma(w.scale, vec4<f32>(bitcast<vec4<i32>>(word) >> vec4(24u)), w.min);
}
