// lora_shrink_f32_workgroup: S[M,R] = x[M,K] · A[R,K]ᵀ, rows of A by the adapter     contract: src/ops/lora_shrink.rs
// grid   M, ceil(R/4)     block 64 = four ranks of a token
// smem   1024 B           features none
// reads  4M(R/4)K + 4MRK B, both from cache for the most part      writes 4MR B       bound: memory
// idea   invocations stride over K with four sums each; a tree in workgroup memory adds them: the same bits every time

struct Params { M: u32, K: u32, R: u32, T: u32, L: u32, IDS: u32 }

@group(0) @binding(0) var<storage, read>       x: array<f32>;       // [M,K]
@group(0) @binding(1) var<storage, read>       lora_a: array<f32>;  // [T,K]
@group(0) @binding(2) var<storage, read>       adapter: array<i32>; // [IDS*M]
@group(0) @binding(3) var<storage, read>       rows: array<u32>;    // [IDS*L,2]
@group(0) @binding(4) var<storage, read_write> s: array<f32>;       // [M,R]
@group(0) @binding(5) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
var<workgroup> partial: array<vec4<f32>, WIDTH>;

@compute @workgroup_size(WIDTH)
fn lora_shrink_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.x;
    let r = group.y * 4u;

    // rows first..end of A are the token's
    var first = 0u;
    var end = p.R;
    if p.IDS == 1u {
        let l = bitcast<u32>(adapter[m]);
        end = 0u;
        if l < p.L {
            first = rows[2u * l];
            end = rows[2u * l + 1u];
        }
    }

    // partial[lane] = Σ x·A over k = lane, lane + WIDTH, … < K, of ranks r..r+4; a rank too many repeats the last
    var sum = vec4<f32>();
    if first + r < end {
        let at = min(vec4(first + r) + vec4<u32>(0u, 1u, 2u, 3u), vec4(end - 1u)) * p.K;
        for (var k = lane; k < p.K; k += WIDTH) {
            let a = vec4<f32>(lora_a[at.x + k], lora_a[at.y + k], lora_a[at.z + k], lora_a[at.w + k]);
            sum = fma(vec4(x[m * p.K + k]), a, sum);
        }
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

    // zero past the adapter's rank
    if lane < 4u && r + lane < p.R {
        s[m * p.R + r + lane] = select(0.0, partial[0][lane], first + r + lane < end);
    }
}
