// lora_backward_a_f32_columns: dA[R,K] = dSᵀ · x[M,K] (+ dA)     contract: src/ops/lora_backward.rs
// grid   ceil(K/64), ceil(R/4)     block 64 = four ranks of 64 columns
// smem   0 B              features none
// reads  4MK(R/4) + 4MKR/64 B      writes 4RK B       bound: memory
// idea   an invocation has a column of x, whose four sums run over the tokens in order: the same bits every time

struct Params { M: u32, K: u32, R: u32, ACC: u32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read>       ds: array<f32>;      // [M,R]
@group(0) @binding(2) var<storage, read_write> da: array<f32>;      // [R,K]
@group(0) @binding(3) var<uniform>             p: Params;

@compute @workgroup_size(64)
fn lora_backward_a_f32_columns(@builtin(global_invocation_id) id: vec3<u32>) {
    let k = id.x;
    if k >= p.K {
        return;
    }
    let r = id.y * 4u;
    // Ranks r..r+4; one too many repeats the last.
    let ranks = min(vec4(r) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.R - 1u));
    var sum = vec4<f32>();
    for (var m = 0u; m < p.M; m++) {
        let at = ranks + m * p.R;
        sum = fma(vec4(x[m * p.K + k]), vec4<f32>(ds[at.x], ds[at.y], ds[at.z], ds[at.w]), sum);
    }
    for (var i = 0u; i < 4u; i++) {
        if r + i < p.R {
            let at = (r + i) * p.K + k;
            var gradient = sum[i];
            if p.ACC == 1u {
                gradient += da[at];
            }
            da[at] = gradient;
        }
    }
}
