// attention_stats_f32_workgroup: stats = (ln Σ_c exp(scale·q·k_c), dy·y)     contract: src/ops/attention_backward.rs
// grid   H, M             block 64 = one head of a row
// smem   512 B            features none
// reads  12MHD + 4MHCD B      writes 8MH B       bound: memory
// idea   every 64th key an invocation, with a largest score and a sum of its own, rescaled where a larger one comes;
//        trees in workgroup memory join them       source: Milakov & Gimelshein, arXiv 1805.02867

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<f32>;       // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<f32>;       // [C,KV*D]
@group(0) @binding(2) var<storage, read>       span: array<u32>;    // [M,2]
@group(0) @binding(3) var<storage, read>       y: array<f32>;       // [M,H*D]
@group(0) @binding(4) var<storage, read>       dy: array<f32>;      // [M,H*D]
@group(0) @binding(5) var<storage, read_write> stats: array<f32>;   // [M*H,2]
@group(0) @binding(6) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
var<workgroup> partial: array<vec2<f32>, WIDTH>;

@compute @workgroup_size(WIDTH)
fn attention_stats_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y;
    let head = group.x / (p.H / p.KV);
    let row = (m * p.H + group.x) * p.D;
    let begin = span[2u * m];
    let end = span[2u * m + 1u];

    // largest, and total = Σ exp(score − largest), over c = begin + lane, begin + lane + WIDTH, … < end
    var largest = -3e38;
    var total = 0.0;
    for (var c = begin + lane; c < end; c += WIDTH) {
        let cached = (c * p.KV + head) * p.D;
        var dot = 0.0;
        for (var d = 0u; d < p.D; d++) {
            dot = fma(q[row + d], k[cached + d], dot);
        }
        let score = p.scale * dot;
        let e = exact_exp(-abs(score - largest));
        total = select(total + e, fma(total, e, 1.0), score > largest);
        largest = max(largest, score);
    }

    // delta = Σ dy·y over d = lane, lane + WIDTH, … < D
    var delta = 0.0;
    for (var d = lane; d < p.D; d += WIDTH) {
        delta = fma(dy[row + d], y[row + d], delta);
    }

    // tree: the largest of all
    partial[lane].x = largest;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane].x = max(partial[lane].x, partial[lane + half].x);
        }
        workgroupBarrier();
    }
    let top = partial[0].x;
    workgroupBarrier();

    // tree: both sums
    partial[lane] = vec2<f32>(total * exact_exp(largest - top), delta);
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }
    if lane == 0u {
        let at = 2u * (m * p.H + group.x);
        stats[at] = select(0.0, top + exact_ln(max(partial[0].x, 1.0)), begin < end);
        stats[at + 1u] = partial[0].y;
    }
}
