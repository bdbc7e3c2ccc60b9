// weights_bf16_x4: four rows of W in bf16 at a time, 32 columns of each; weights_x4 follows

@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;           // bf16[N,K], eight to a vec4, the first lowest

/// Where the four rows' columns begin.
struct Chunk { at: vec4<u32> }

fn read_chunk(n: vec4<u32>, c: u32) -> Chunk {
    return Chunk(n * (p.K / 8u) + c * 4u);
}

fn decode_eight(chunk: Chunk, s: u32) -> Eight {
    let a = w[chunk.at.x + s];
    let b = w[chunk.at.y + s];
    let c = w[chunk.at.z + s];
    let d = w[chunk.at.w + s];
    let w01 = vec4<u32>(a.x, b.x, c.x, d.x);
    let w23 = vec4<u32>(a.y, b.y, c.y, d.y);
    let w45 = vec4<u32>(a.z, b.z, c.z, d.z);
    let w67 = vec4<u32>(a.w, b.w, c.w, d.w);
    return Eight(low(w01), high(w01), low(w23), high(w23), low(w45), high(w45), low(w67), high(w67));
}

fn low(word: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(word << vec4(16u));
}

fn high(word: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(word & vec4(0xffff0000u));
}
