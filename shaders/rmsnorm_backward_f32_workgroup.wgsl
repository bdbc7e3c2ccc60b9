// rmsnorm_backward_f32_workgroup: dx = r·gain·dy − r³·x·mean dy·gain·x (+ dx)     contract: src/ops/rmsnorm_backward.rs
// grid   M                block 64 = one row
// smem   512 B            features none
// reads  4(2 + ACC)MK + 4K B (x and dy a second time from cache)      writes 4MK B       bound: memory
// idea   invocations stride over K; one tree in workgroup memory sums squares and products: the same bits every time

struct Params { M: u32, K: u32, ACC: u32, eps: f32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read>       gain: array<f32>;    // [K]
@group(0) @binding(2) var<storage, read>       dy: array<f32>;      // [M,K]
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;      // [M,K]
@group(0) @binding(4) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
var<workgroup> partial: array<vec2<f32>, WIDTH>;

@compute @workgroup_size(WIDTH)
fn rmsnorm_backward_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x * p.K;

    // partial[lane] = (Σ x², Σ dy·gain·x) over k = lane, lane + WIDTH, … < K
    var sum = vec2<f32>();
    for (var k = lane; k < p.K; k += WIDTH) {
        let v = x[row + k];
        sum = fma(vec2<f32>(v, dy[row + k] * gain[k]), vec2(v), sum);
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

    // dx = r·(gain·dy) + back·x, back = −r³·mean
    let count = f32(p.K);
    let r = exact_rsqrt(exact_divide(partial[0].x, count) + p.eps);
    let back = -(r * r * r) * exact_divide(partial[0].y, count);
    for (var k = lane; k < p.K; k += WIDTH) {
        var gradient = fma(back, x[row + k], r * (dy[row + k] * gain[k]));
        if p.ACC == 1u {
            gradient += dx[row + k];
        }
        dx[row + k] = gradient;
    }
}
