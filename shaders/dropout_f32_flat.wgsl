// dropout_f32_flat: y[M,K] = x · keep / (1 − p) (+ y), keep by a hash     contract: src/ops/dropout.rs
// grid   min(ceil(M*K/256), 65535)     block 256
// smem   0 B              features none
// reads  4(1 + ACC)MK B      writes 4MK B       bound: memory
// idea   one element an invocation; u32 wrap around       source: Jarzynski & Olano 2020, JCGT 9(3)

struct Params { M: u32, K: u32, ROW0: u32, SEED: u32, STREAM: u32, DROP: u32, ACC: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read_write> y: array<f32>;       // [M,K]
@group(0) @binding(2) var<uniform>             p: Params;

/// The first word of pcg4d.
fn hash(column: u32, row: u32) -> u32 {
    var v = vec4<u32>(column, row, p.SEED, p.STREAM) * 1664525u + 1013904223u;
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    v ^= v >> vec4(16u);
    return v.x + v.y * v.w;
}

@compute @workgroup_size(256)
fn dropout_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    for (var i = id.x; i < p.M * p.K; i += groups.x * 256u) {
        let m = i / p.K;
        var sum = select(p.scale * x[i], 0.0, hash(i - m * p.K, p.ROW0 + m) < p.DROP);
        if p.ACC == 1u {
            sum += y[i];
        }
        y[i] = sum;
    }
}
