// rmsnorm_f32_vec4: y[M,K] = x[M,K] · gain[K] / sqrt(mean x² + eps)     contract: src/ops/rmsnorm.rs
// grid   M                block 32 = one row
// smem   128 B            features none
// reads  4MK + 4K B (x a second time from cache)      writes 4MK B       bound: memory
// idea   four elements at a time, where K is a multiple of four; a tree in workgroup memory: the same bits every time

struct Params { M: u32, K: u32, eps: f32 }

@group(0) @binding(0) var<storage, read>       x: array<vec4<f32>>;        // [M,K]
@group(0) @binding(1) var<storage, read>       gain: array<vec4<f32>>;     // [K]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;        // [M,K]
@group(0) @binding(3) var<uniform>             p: Params;

const WIDTH: u32 = 32u;                                                    // a power of two
var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn rmsnorm_f32_vec4(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let vectors = p.K / 4u;
    let row = group.x * vectors;

    // partial[lane] = Σ x² over its vectors
    var sum = vec4<f32>();
    for (var k = lane; k < vectors; k += WIDTH) {
        let v = x[row + k];
        sum = fma(v, v, sum);
    }
    partial[lane] = (sum.x + sum.y) + (sum.z + sum.w);
    workgroupBarrier();

    // tree: partial[0] = Σ partial
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }

    // y = x · scale · gain
    let scale = exact_rsqrt(exact_divide(partial[0], f32(p.K)) + p.eps);
    for (var k = lane; k < vectors; k += WIDTH) {
        y[row + k] = x[row + k] * scale * gain[k];
    }
}
