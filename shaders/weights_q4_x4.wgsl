// weights_q4_x4: four rows of W in q4 at a time, 32 columns of each; weights_q4_scales and weights_x4 follow

@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;       // u4[N,K], 32 to a vec4, the first lowest

/// Scale and min of columns 0..16, and of 16..32.
struct Chunk {
    a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>,
    scale: vec4<f32>, min: vec4<f32>, scale2: vec4<f32>, min2: vec4<f32>,
}

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    let i = n * (p.K / 32u) + c;
    let g = n * (p.K / p.G) + c * 32u / p.G;
    let scale = vec4<f32>(group_scale(g.x), group_scale(g.y), group_scale(g.z), group_scale(g.w));
    let min = vec4<f32>(group_min(g.x), group_min(g.y), group_min(g.z), group_min(g.w));
    var w = Chunk(codes[i.x], codes[i.y], codes[i.z], codes[i.w], scale, min, scale, min);
    if p.G == 16u {
        let h = g + 1u;
        w.scale2 = vec4<f32>(group_scale(h.x), group_scale(h.y), group_scale(h.z), group_scale(h.w));
        w.min2 = vec4<f32>(group_min(h.x), group_min(h.y), group_min(h.z), group_min(h.w));
    }
    return w;
}

fn decode_eight(w: Chunk, s: u32) -> Eight {
    let word = vec4<u32>(w.a[s], w.b[s], w.c[s], w.d[s]);
    let scale = select(w.scale2, w.scale, s < 2u);
    let min = select(w.min2, w.min, s < 2u);
    return Eight(
        decode(word, scale, min),
        decode(word >> vec4(4u), scale, min),
        decode(word >> vec4(8u), scale, min),
        decode(word >> vec4(12u), scale, min),
        decode(word >> vec4(16u), scale, min),
        decode(word >> vec4(20u), scale, min),
        decode(word >> vec4(24u), scale, min),
        decode(word >> vec4(28u), scale, min),
    );
}

/// The code in the lowest four bits.
fn decode(word: vec4<u32>, scale: vec4<f32>, min: vec4<f32>) -> vec4<f32> {
    return fma(scale, vec4<f32>(word & vec4(15u)), min);
}
