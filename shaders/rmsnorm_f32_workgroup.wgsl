// rmsnorm_f32_workgroup: y[M,K] = x[M,K] · gain[K] / sqrt(mean x² + eps)     contract: src/ops/rmsnorm.rs
// grid   M                block 64 = one row
// smem   256 B            features none
// reads  4MK + 4K B (x a second time from cache)      writes 4MK B       bound: memory
// idea   invocations stride over K, a tree in workgroup memory sums the squares: a fixed order, so the same bits

struct Params { M: u32, K: u32, eps: f32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read>       gain: array<f32>;    // [K]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;       // [M,K]
@group(0) @binding(3) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                              // a power of two
var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn rmsnorm_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x * p.K;

    // partial[lane] = Σ x² over k = lane, lane + WIDTH, … < K
    var sum = 0.0;
    for (var k = lane; k < p.K; k += WIDTH) {
        sum = fma(x[row + k], x[row + k], sum);
    }
    partial[lane] = sum;
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
    for (var k = lane; k < p.K; k += WIDTH) {
        y[row + k] = x[row + k] * scale * gain[k];
    }
}
