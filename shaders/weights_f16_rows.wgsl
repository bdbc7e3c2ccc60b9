// weights_f16_rows: eight rows of W in f16, four columns an invocation; for qmatmul_t_broadcast

@group(0) @binding(1) var<storage, read> w: array<vec2<u32>>;           // [N,K], four to a vec2

fn read_rows(n: u32, k0: u32, lane: u32) -> Rows {
    let step = p.K / 4u;
    let i = n * step + k0 / 4u + lane;
    return Rows(
        decode(w[i]), decode(w[i + step]), decode(w[i + 2u * step]), decode(w[i + 3u * step]),
        decode(w[i + 4u * step]), decode(w[i + 5u * step]), decode(w[i + 6u * step]), decode(w[i + 7u * step]),
    );
}

/// Four weights in f16.
fn decode(word: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}
