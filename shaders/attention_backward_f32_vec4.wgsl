// attention_backward_f32_vec4: dq, dk and dv of attention over spans     contract: src/ops/attention_backward.rs
// grid   H, M+C           block 64 = one head of a row, or of a key
// smem   3072 B           features none
// reads  28MHCD B, most of it from cache      writes 4MHD + 8CKVD B       bound: loads of four elements
// idea   as attention_backward_f32_workgroup, four columns at a time, where D is a multiple of four and at most 256; of
//        a block's 64 pairs an invocation adds up those of its slice, for its vector of columns, so that all are busy
//        whatever D is; a tree joins the slices     source: Dao, arXiv 2307.08691

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<vec4<f32>>;     // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<vec4<f32>>;     // [C,KV*D]
@group(0) @binding(2) var<storage, read>       v: array<vec4<f32>>;     // [C,KV*D]
@group(0) @binding(3) var<storage, read>       span: array<u32>;        // [M,2]
@group(0) @binding(4) var<storage, read>       dy: array<vec4<f32>>;    // [M,H*D]
@group(0) @binding(5) var<storage, read>       stats: array<f32>;       // [M*H,2]
@group(0) @binding(6) var<storage, read_write> dq: array<vec4<f32>>;    // [M,H*D]
@group(0) @binding(7) var<storage, read_write> dk: array<vec4<f32>>;    // [C,KV*D]
@group(0) @binding(8) var<storage, read_write> dv: array<vec4<f32>>;    // [C,KV*D]
@group(0) @binding(9) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                                 // a power of two
/// p and scale·ds of the pairs of a block; rows first and end of those that see the key; sums of the slices.
var<workgroup> weights: array<vec2<f32>, WIDTH>;
var<workgroup> seen: array<vec2<u32>, WIDTH>;
var<workgroup> key_sums: array<vec4<f32>, WIDTH>;
var<workgroup> value_sums: array<vec4<f32>, WIDTH>;

@compute @workgroup_size(WIDTH)
fn attention_backward_f32_vec4(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if group.y < p.M {
        query(group.y, group.x, lane);
    } else if group.x < p.KV {
        key(group.y - p.M, group.x, lane);
    }
}

/// Invocations side by side on the vectors of a row: as many as there are, up to a power of two.
fn columns() -> u32 {
    return 1u << (firstLeadingBit(p.D / 4u - 1u) + 1u);
}

/// p and scale·ds of query row and head i, [M,H] in order, and the key whose vectors begin at `cached`.
fn pair(i: u32, cached: u32) -> vec2<f32> {
    let vectors = p.D / 4u;
    let row = i * vectors;
    var scores = vec4<f32>();
    var slopes = vec4<f32>();
    for (var d = 0u; d < vectors; d++) {
        scores = fma(q[row + d], k[cached + d], scores);
        slopes = fma(dy[row + d], v[cached + d], slopes);
    }
    let score = (scores.x + scores.y) + (scores.z + scores.w);
    let slope = (slopes.x + slopes.y) + (slopes.z + slopes.w);
    let weight = exact_exp(fma(p.scale, score, -stats[2u * i]));
    return vec2<f32>(weight, p.scale * weight * (slope - stats[2u * i + 1u]));
}

/// dq[m,h] = Σ_c scale·ds_c·k_c.
fn query(m: u32, h: u32, lane: u32) {
    let i = m * p.H + h;
    let head = h / (p.H / p.KV);
    let vectors = p.D / 4u;
    let begin = span[2u * m];
    let end = span[2u * m + 1u];
    let width = columns();
    let column = min(lane % width, vectors - 1u);
    var sum = vec4<f32>();
    for (var first = begin; first < end; first += WIDTH) {
        weights[lane] = vec2<f32>();
        if first + lane < end {
            weights[lane] = pair(i, ((first + lane) * p.KV + head) * vectors);
        }
        workgroupBarrier();
        let keys = min(WIDTH, end - first);
        for (var j = lane / width; j < keys; j += WIDTH / width) {
            sum = fma(vec4(weights[j].y), k[((first + j) * p.KV + head) * vectors + column], sum);
        }
        workgroupBarrier();
    }

    // tree: the slices
    key_sums[lane] = sum;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half >= width; half /= 2u) {
        if lane < half {
            key_sums[lane] += key_sums[lane + half];
        }
        workgroupBarrier();
    }
    if lane < vectors {
        dq[i * vectors + lane] = key_sums[lane];
    }
}

/// dk[c] = Σ scale·ds·q and dv[c] = Σ p·dy over the rows and heads that see key c of key head `head`.
fn key(c: u32, head: u32, lane: u32) {
    let heads = p.H / p.KV;
    let vectors = p.D / 4u;
    let cached = (c * p.KV + head) * vectors;

    // tree: the first and the end of the rows that see it
    var rows = vec2<u32>(p.M, 0u);
    for (var m = lane; m < p.M; m += WIDTH) {
        if span[2u * m] <= c && c < span[2u * m + 1u] {
            rows = vec2<u32>(min(rows.x, m), m + 1u);
        }
    }
    seen[lane] = rows;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            let other = seen[lane + half];
            seen[lane] = vec2<u32>(min(seen[lane].x, other.x), max(seen[lane].y, other.y));
        }
        workgroupBarrier();
    }
    let all = workgroupUniformLoad(&seen[0]);
    let begin = all.x * heads;
    let end = all.y * heads;

    let width = columns();
    let column = min(lane % width, vectors - 1u);
    var key_sum = vec4<f32>();
    var value_sum = vec4<f32>();
    for (var first = begin; first < end; first += WIDTH) {
        // weights[lane]: 0 where the row does not see the key
        let row = (first + lane) / heads;
        weights[lane] = vec2<f32>();
        if first + lane < end && span[2u * row] <= c && c < span[2u * row + 1u] {
            weights[lane] = pair(row * p.H + head * heads + (first + lane) % heads, cached);
        }
        workgroupBarrier();
        let pairs = min(WIDTH, end - first);
        for (var j = lane / width; j < pairs; j += WIDTH / width) {
            let i = (first + j) / heads * p.H + head * heads + (first + j) % heads;
            let w = weights[j];
            value_sum = fma(vec4(w.x), dy[i * vectors + column], value_sum);
            key_sum = fma(vec4(w.y), q[i * vectors + column], key_sum);
        }
        workgroupBarrier();
    }

    // tree: the slices
    key_sums[lane] = key_sum;
    value_sums[lane] = value_sum;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half >= width; half /= 2u) {
        if lane < half {
            key_sums[lane] += key_sums[lane + half];
            value_sums[lane] += value_sums[lane + half];
        }
        workgroupBarrier();
    }
    if lane < vectors {
        dk[cached + lane] = key_sums[lane];
        dv[cached + lane] = value_sums[lane];
    }
}
