// attention_f32_decode: y[m,h] = softmax(scale·q[m,h]·kᵀ)·v over span[m]     contract: src/ops/attention.rs
// grid   H, M             block 64 = one head of a row
// smem   1536 B           features none
// reads  4MHD + 8MHCD B      writes 4MHD B       bound: memory
// idea   keys in blocks of 64, one an invocation; then vectors of columns, the invocations that are left over sharing
//        the block's keys; the largest score and the sums run on from block to block
//        source: Milakov & Gimelshein, arXiv 1805.02867

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<vec4<f32>>;     // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<vec4<f32>>;     // [C,KV*D]
@group(0) @binding(2) var<storage, read>       v: array<vec4<f32>>;     // [C,KV*D]
@group(0) @binding(3) var<storage, read>       span: array<u32>;        // [M,2]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;     // [M,H*D]
@group(0) @binding(5) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                                 // a power of two
const LEAST: f32 = -3e38;                                               // below every score
var<workgroup> weights: array<f32, WIDTH>;
var<workgroup> partial: array<f32, WIDTH>;
var<workgroup> sums: array<vec4<f32>, WIDTH>;

@compute @workgroup_size(WIDTH)
fn attention_f32_decode(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y;
    let head = group.x / (p.H / p.KV);
    let width = p.D / 4u;                                               // of a head, in vectors, at most WIDTH
    let row = (m * p.H + group.x) * width;
    let begin = span[2u * m];
    let end = span[2u * m + 1u];
    let sharers = WIDTH / width;                                        // of a column, each with every such key
    let column = lane % width;
    let share = lane / width;

    var largest = LEAST;
    var total = 0.0;                                                    // of this invocation's keys
    var sum = vec4<f32>();
    for (var first = begin; first < end; first += WIDTH) {
        // score of key first + lane
        let c = first + lane;
        var score = LEAST;
        if c < end {
            let cached = (c * p.KV + head) * width;
            var products = vec4<f32>();
            for (var d = 0u; d < width; d++) {
                products = fma(q[row + d], k[cached + d], products);
            }
            score = p.scale * ((products.x + products.y) + (products.z + products.w));
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

        // sum += weight · v over the keys of its share
        if share < sharers {
            let keys = min(WIDTH, end - first);
            for (var j = share; j < keys; j += sharers) {
                sum = fma(vec4(weights[j]), v[((first + j) * p.KV + head) * width + column], sum);
            }
        }
        workgroupBarrier();
    }

    // tree: the sum of all weights
    partial[lane] = total;
    sums[lane] = sum;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }

    // y = the shares of a column together, divided; 0 for an empty span
    if lane < width {
        for (var i = 1u; i < sharers; i++) {
            sum += sums[i * width + lane];
        }
        y[row + lane] = exact_divide4(sum, vec4(select(partial[0], 1.0, begin >= end)));
    }
}
