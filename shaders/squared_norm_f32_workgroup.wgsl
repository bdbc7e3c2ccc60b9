// squared_norm_f32_workgroup: part[p] = Σ x[i]² over i in p·c..(p+1)·c, c = ceil(N/P)     contract: src/ops/adamw.rs
// grid   P                block 256 = one part
// smem   1024 B           features none
// reads  4N B             writes 4P B       bound: memory
// idea   invocations stride over the part, a tree in workgroup memory sums them: a fixed order, so the same bits

struct Params { N: u32, P: u32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [N]
@group(0) @binding(1) var<storage, read_write> part: array<f32>;    // [P]
@group(0) @binding(2) var<uniform>             p: Params;

const WIDTH: u32 = 256u;                                            // a power of two
var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn squared_norm_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // partial[lane] = Σ x² over i = lane, lane + WIDTH, … of the part
    let size = (p.N + p.P - 1u) / p.P;
    let end = min((group.x + 1u) * size, p.N);
    var sum = 0.0;
    for (var i = group.x * size + lane; i < end; i += WIDTH) {
        sum = fma(x[i], x[i], sum);
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
    if lane == 0u {
        part[group.x] = partial[0];
    }
}
