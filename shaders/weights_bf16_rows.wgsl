// weights_bf16_rows: eight rows of W in bf16, four columns an invocation; for qmatmul_t_broadcast

@group(0) @binding(1) var<storage, read> w: array<vec2<u32>>;           // [N,K], four to a vec2

fn read_rows(n: u32, k0: u32, lane: u32) -> Rows {
    let step = p.K / 4u;
    let i = n * step + k0 / 4u + lane;
    return Rows(
        decode(w[i]), decode(w[i + step]), decode(w[i + 2u * step]), decode(w[i + 3u * step]),
        decode(w[i + 4u * step]), decode(w[i + 5u * step]), decode(w[i + 6u * step]), decode(w[i + 7u * step]),
    );
}

/// Four weights in bf16: the upper halves of f32.
fn decode(word: vec2<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(word.x << 16u, word.x & 0xffff0000u, word.y << 16u, word.y & 0xffff0000u));
}
