// weights_f32_x4: four rows of W in f32 at a time, 32 columns of each; weights_x4 follows

@group(0) @binding(1) var<storage, read> w_x4: array<vec4<f32>>;        // [N,K]

/// Where the four rows' columns begin.
struct Chunk { at: vec4<u32> }

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    return Chunk(n * (p.K / 4u) + c * 8u);
}

fn decode_eight(w: Chunk, s: u32) -> Eight {
    let at = w.at + s * 2u;
    let low = transpose(mat4x4<f32>(w_x4[at.x], w_x4[at.y], w_x4[at.z], w_x4[at.w]));
    let high = transpose(mat4x4<f32>(w_x4[at.x + 1u], w_x4[at.y + 1u], w_x4[at.z + 1u], w_x4[at.w + 1u]));
    return Eight(low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]);
}
