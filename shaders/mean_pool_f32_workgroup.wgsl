// mean_pool_f32_workgroup: y[S,K] = v / max(‖v‖, 1e-12), v = mean of span[s] of x     contract: src/ops/mean_pool.rs
// grid   S                block 64 = one sentence
// smem   256 B            features none
// reads  4MK + 8S B       writes 4SK B (y once more from cache)       bound: memory
// idea   an invocation has every 64th column, so y is its own scratch; a tree in workgroup memory sums the squares

struct Params { S: u32, M: u32, K: u32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read>       span: array<u32>;    // [S,2]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;       // [S,K]
@group(0) @binding(3) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn mean_pool_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let begin = span[2u * group.x];
    let end = span[2u * group.x + 1u];
    let row = group.x * p.K;

    // y = mean; partial[lane] = Σ y² over its columns
    let tokens = f32(max(end, begin + 1u) - begin);
    var squares = 0.0;
    for (var k = lane; k < p.K; k += WIDTH) {
        var sum = 0.0;
        for (var m = begin; m < end; m++) {
            sum += x[m * p.K + k];
        }
        let mean = exact_divide(sum, tokens);
        y[row + k] = mean;
        squares = fma(mean, mean, squares);
    }
    partial[lane] = squares;
    workgroupBarrier();

    // tree: partial[0] = Σ partial
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }

    // y = mean / norm
    let scale = exact_rsqrt(max(partial[0], 1e-24));
    for (var k = lane; k < p.K; k += WIDTH) {
        y[row + k] *= scale;
    }
}
