// weights_q8_x4: four rows of W in q8 at a time, 32 columns of each; weights_q8_scales and weights_x4 follow

@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;       // i8[N,K], 16 to a vec4, the first lowest

/// Columns 0..16 with their scale and min, and columns 16..32.
struct Chunk {
    a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>, scale: vec4<f32>, min: vec4<f32>,
    a2: vec4<u32>, b2: vec4<u32>, c2: vec4<u32>, d2: vec4<u32>, scale2: vec4<f32>, min2: vec4<f32>,
}

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    let i = n * (p.K / 16u) + c * 2u;
    let j = i + 1u;
    let g = n * (p.K / p.G) + c * 32u / p.G;
    let scale = vec4<f32>(group_scale(g.x), group_scale(g.y), group_scale(g.z), group_scale(g.w));
    let min = vec4<f32>(group_min(g.x), group_min(g.y), group_min(g.z), group_min(g.w));
    var w = Chunk(
        codes[i.x], codes[i.y], codes[i.z], codes[i.w], scale, min,
        codes[j.x], codes[j.y], codes[j.z], codes[j.w], scale, min,
    );
    if p.G == 16u {
        let h = g + 1u;
        w.scale2 = vec4<f32>(group_scale(h.x), group_scale(h.y), group_scale(h.z), group_scale(h.w));
        w.min2 = vec4<f32>(group_min(h.x), group_min(h.y), group_min(h.z), group_min(h.w));
    }
    return w;
}

fn decode_eight(w: Chunk, s: u32) -> Eight {
    if s < 2u {
        return decode_words(w.a, w.b, w.c, w.d, s * 2u, w.scale, w.min);
    }
    return decode_words(w.a2, w.b2, w.c2, w.d2, s * 2u - 4u, w.scale2, w.min2);
}

/// Words i and i + 1 of each row.
fn decode_words(
    a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>, i: u32, scale: vec4<f32>, min: vec4<f32>,
) -> Eight {
    let low = vec4<u32>(a[i], b[i], c[i], d[i]);
    let high = vec4<u32>(a[i + 1u], b[i + 1u], c[i + 1u], d[i + 1u]);
    return Eight(
        decode(low << vec4(24u), scale, min),
        decode(low << vec4(16u), scale, min),
        decode(low << vec4(8u), scale, min),
        decode(low, scale, min),
        decode(high << vec4(24u), scale, min),
        decode(high << vec4(16u), scale, min),
        decode(high << vec4(8u), scale, min),
        decode(high, scale, min),
    );
}

/// The code in the highest byte.
fn decode(word: vec4<u32>, scale: vec4<f32>, min: vec4<f32>) -> vec4<f32> {
    return fma(scale, vec4<f32>(bitcast<vec4<i32>>(word) >> vec4(24u)), min);
}
