// attention_f32_workgroup: y[m,h] = softmax(scale·q[m,h]·kᵀ)·v over span[m]     contract: src/ops/attention.rs
// grid   H, M             block 64 = one head of a row
// smem   512 B            features none
// reads  4MHD + 8MHCD B      writes 4MHD B       bound: memory
// idea   keys in blocks of 64, one an invocation; then columns, up to four an invocation, over the block's weights;
//        the largest score and the sums run on from block to block       source: Milakov & Gimelshein, arXiv 1805.02867

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<f32>;       // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<f32>;       // [C,KV*D]
@group(0) @binding(2) var<storage, read>       v: array<f32>;       // [C,KV*D]
@group(0) @binding(3) var<storage, read>       span: array<u32>;    // [M,2]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;       // [M,H*D]
@group(0) @binding(5) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
const LEAST: f32 = -3e38;                                           // below every score
var<workgroup> weights: array<f32, WIDTH>;
var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn attention_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y;
    let head = group.x / (p.H / p.KV);
    let row = (m * p.H + group.x) * p.D;
    let begin = span[2u * m];
    let end = span[2u * m + 1u];

    var largest = LEAST;
    var total = 0.0;                                                // of this invocation's keys
    var sum = vec4<f32>();                                          // columns lane, lane + 64, …
    for (var first = begin; first < end; first += WIDTH) {
        // score of key first + lane
        let c = first + lane;
        var score = LEAST;
        if c < end {
            let cached = (c * p.KV + head) * p.D;
            var dot = 0.0;
            for (var d = 0u; d < p.D; d++) {
                dot = fma(q[row + d], k[cached + d], dot);
            }
            score = p.scale * dot;
        }

        // tree: the block's largest score
        partial[lane] = score;
        workgroupBarrier();
        for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
            if lane < half {
                partial[lane] = max(partial[lane], partial[lane + half]);
            }
            workgroupBarrier();
        }

        // rescale what is summed so far
        let next = max(largest, partial[0]);
        let shrink = exact_exp(largest - next);
        largest = next;
        let weight = select(0.0, exact_exp(score - largest), c < end);
        total = fma(total, shrink, weight);
        sum *= shrink;
        weights[lane] = weight;
        workgroupBarrier();

        // sum += weight · v, key after key
        let keys = min(WIDTH, end - first);
        for (var j = 0u; j < keys; j++) {
            let w = weights[j];
            let cached = ((first + j) * p.KV + head) * p.D + lane;
            sum.x = fma(w, v[cached], sum.x);
            if p.D > WIDTH {
                sum.y = fma(w, v[cached + WIDTH], sum.y);
            }
            if p.D > 2u * WIDTH {
                sum.z = fma(w, v[cached + 2u * WIDTH], sum.z);
                sum.w = fma(w, v[cached + 3u * WIDTH], sum.w);
            }
        }
        workgroupBarrier();
    }

    // tree: the sum of all weights
    partial[lane] = total;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }

    total = select(partial[0], 1.0, begin >= end);
    for (var i = 0u; i < 4u; i++) {
        let d = lane + i * WIDTH;
        if d < p.D {
            y[row + d] = exact_divide(sum[i], total);
        }
    }
}
