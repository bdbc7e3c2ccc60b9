// weights_nf4_x4: four rows of W in nf4 or nf4dq at a time, 32 columns of each; scales and weights_x4 follow

@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;       // u4[N,K], a byte's first one high

struct Chunk { a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>, scale: vec4<f32> }

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    let i = n * (p.K / 32u) + c;
    let g = i / 2u;
    return Chunk(
        codes[i.x], codes[i.y], codes[i.z], codes[i.w],
        vec4<f32>(block_absmax(g.x), block_absmax(g.y), block_absmax(g.z), block_absmax(g.w)),
    );
}

fn decode_eight(w: Chunk, s: u32) -> Eight {
    let word = vec4<u32>(w.a[s], w.b[s], w.c[s], w.d[s]);
    return Eight(
        decode(w, word >> vec4(4u)), decode(w, word), decode(w, word >> vec4(12u)), decode(w, word >> vec4(8u)),
        decode(w, word >> vec4(20u)), decode(w, word >> vec4(16u)), decode(w, word >> vec4(28u)),
        decode(w, word >> vec4(24u)),
    );
}

fn decode(w: Chunk, word: vec4<u32>) -> vec4<f32> {
    let code = word & vec4(15u);
    return w.scale * vec4<f32>(level(code.x), level(code.y), level(code.z), level(code.w));
}
