// weights_f32_x4: four rows of W in f32 at a time, 32 columns of each; weights_x4 follows

@group(0) @binding(1) var<storage, read> w: array<vec4<f32>>;           // [N,K]

/// Where the four rows' columns begin.
struct Chunk { at: vec4<u32> }

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    return Chunk(n * (p.K / 4u) + c * 8u);
}

fn decode_eight(chunk: Chunk, s: u32) -> Eight {
    let at = chunk.at + s * 2u;
    let low = transpose(mat4x4<f32>(w[at.x], w[at.y], w[at.z], w[at.w]));
    let high = transpose(mat4x4<f32>(w[at.x + 1u], w[at.y + 1u], w[at.z + 1u], w[at.w + 1u]));
    return Eight(low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]);
}
