// lora_backward_f32_workgroup: dS = s·dy[M,N]·B[N,R], dB = s·dyᵀ·S[M,R] (+ dB)     contract: src/ops/lora_backward.rs
// grid   M+ceil(N/64), ceil(R/4)     block 64 = four ranks of a token, or of 64 columns of dy
// smem   1024 B           features none
// reads  8MN(R/4) + 4MNR/16 + 4MNR B, from cache for the most part      writes 4(M + N)R B       bound: memory
// idea   the first M groups make dS: invocations stride over N, a tree adds their sums; in the others each has a column
//        of dy, whose sums run over the tokens in order: the same bits every time

struct Params { M: u32, N: u32, R: u32, LDY: u32, Y0: u32, ACC: u32, s: f32 }

@group(0) @binding(0) var<storage, read>       dy: array<f32>;      // [M,LDY]
@group(0) @binding(1) var<storage, read>       lora_b: array<f32>;  // [N,R]
@group(0) @binding(2) var<storage, read>       lora_s: array<f32>;  // [M,R]
@group(0) @binding(3) var<storage, read_write> ds: array<f32>;      // [M,R]
@group(0) @binding(4) var<storage, read_write> db: array<f32>;      // [N,R]
@group(0) @binding(5) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
var<workgroup> partial: array<vec4<f32>, WIDTH>;

@compute @workgroup_size(WIDTH)
fn lora_backward_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let r = group.y * 4u;
    // Ranks r..r+4; one too many repeats the last.
    let ranks = min(vec4(r) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.R - 1u));
    if group.x < p.M {
        let m = group.x;
        // partial[lane] = Σ dy·B over n = lane, lane + WIDTH, … < N
        var sum = vec4<f32>();
        for (var n = lane; n < p.N; n += WIDTH) {
            let at = ranks + n * p.R;
            let b = vec4<f32>(lora_b[at.x], lora_b[at.y], lora_b[at.z], lora_b[at.w]);
            sum = fma(vec4(dy[m * p.LDY + p.Y0 + n]), b, sum);
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
        if lane < 4u && r + lane < p.R {
            ds[m * p.R + r + lane] = p.s * partial[0][lane];
        }
    } else {
        let n = (group.x - p.M) * WIDTH + lane;
        if n < p.N {
            // sum = Σ dy·S over the tokens
            var sum = vec4<f32>();
            for (var m = 0u; m < p.M; m++) {
                let at = ranks + m * p.R;
                let s = vec4<f32>(lora_s[at.x], lora_s[at.y], lora_s[at.z], lora_s[at.w]);
                sum = fma(vec4(dy[m * p.LDY + p.Y0 + n]), s, sum);
            }
            for (var i = 0u; i < 4u; i++) {
                if r + i < p.R {
                    let at = n * p.R + r + i;
                    var gradient = p.s * sum[i];
                    if p.ACC == 1u {
                        gradient += db[at];
                    }
                    db[at] = gradient;
                }
            }
        }
    }
}
