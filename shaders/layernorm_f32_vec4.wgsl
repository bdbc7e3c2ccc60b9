// layernorm_f32_vec4: y[M,K] = (x − mean x) / sqrt(var x + eps) · gain + bias     contract: src/ops/layernorm.rs
// grid   M                block 32 = one row
// smem   128 B            features none
// reads  4MK + 8K B (x twice more from cache)      writes 4MK B       bound: memory
// idea   four elements at a time, where K is a multiple of four; trees in workgroup memory: the same bits every time

struct Params { M: u32, K: u32, eps: f32 }

@group(0) @binding(0) var<storage, read>       x: array<vec4<f32>>;        // [M,K]
@group(0) @binding(1) var<storage, read>       gain: array<vec4<f32>>;     // [K]
@group(0) @binding(2) var<storage, read>       bias: array<vec4<f32>>;     // [K]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;        // [M,K]
@group(0) @binding(4) var<uniform>             p: Params;

const WIDTH: u32 = 32u;                                                    // a power of two
var<workgroup> partial: array<f32, WIDTH>;

/// Σ of all numbers of all invocations, for all of them.
fn sum_of_all(lane: u32, value: vec4<f32>) -> f32 {
    workgroupBarrier();
    partial[lane] = (value.x + value.y) + (value.z + value.w);
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }
    return partial[0];
}

@compute @workgroup_size(WIDTH)
fn layernorm_f32_vec4(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let vectors = p.K / 4u;
    let row = group.x * vectors;

    // mean = Σ x / K
    var sum = vec4<f32>();
    for (var k = lane; k < vectors; k += WIDTH) {
        sum += x[row + k];
    }
    let mean = exact_divide(sum_of_all(lane, sum), f32(p.K));

    // scale = 1 / sqrt(Σ (x − mean)² / K + eps)
    sum = vec4<f32>();
    for (var k = lane; k < vectors; k += WIDTH) {
        let off = x[row + k] - mean;
        sum = fma(off, off, sum);
    }
    let scale = exact_rsqrt(exact_divide(sum_of_all(lane, sum), f32(p.K)) + p.eps);

    // y = (x − mean) · scale · gain + bias
    for (var k = lane; k < vectors; k += WIDTH) {
        y[row + k] = fma((x[row + k] - mean) * scale, gain[k], bias[k]);
    }
}
