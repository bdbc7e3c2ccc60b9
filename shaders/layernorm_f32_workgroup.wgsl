// layernorm_f32_workgroup: y[M,K] = (x − mean x) / sqrt(var x + eps) · gain + bias     contract: src/ops/layernorm.rs
// grid   M                block 64 = one row
// smem   256 B            features none
// reads  4MK + 8K B (x twice more from cache)      writes 4MK B       bound: memory
// idea   a pass each for mean, variance and result; trees in workgroup memory: a fixed order, so the same bits

struct Params { M: u32, K: u32, eps: f32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read>       gain: array<f32>;    // [K]
@group(0) @binding(2) var<storage, read>       bias: array<f32>;    // [K]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;       // [M,K]
@group(0) @binding(4) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
var<workgroup> partial: array<f32, WIDTH>;

/// Σ value over the invocations, for all of them.
fn sum_of_all(lane: u32, value: f32) -> f32 {
    workgroupBarrier();
    partial[lane] = value;
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
fn layernorm_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x * p.K;

    // mean = Σ x / K
    var sum = 0.0;
    for (var k = lane; k < p.K; k += WIDTH) {
        sum += x[row + k];
    }
    let mean = exact_divide(sum_of_all(lane, sum), f32(p.K));

    // scale = 1 / sqrt(Σ (x − mean)² / K + eps)
    sum = 0.0;
    for (var k = lane; k < p.K; k += WIDTH) {
        let off = x[row + k] - mean;
        sum = fma(off, off, sum);
    }
    let scale = exact_rsqrt(exact_divide(sum_of_all(lane, sum), f32(p.K)) + p.eps);

    // y = (x − mean) · scale · gain + bias
    for (var k = lane; k < p.K; k += WIDTH) {
        y[row + k] = fma((x[row + k] - mean) * scale, gain[k], bias[k]);
    }
}
