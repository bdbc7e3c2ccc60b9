// attention_backward_f32_workgroup: dq, dk and dv of attention over spans     contract: src/ops/attention_backward.rs
// grid   H, M+C           block 64 = one head of a row, or of a key
// smem   1024 B           features none
// reads  28MHCD B, most of it from cache      writes 4MHD + 8CKVD B       bound: loads of single elements
// idea   the first M rows of groups make dq: 64 keys at a time, one an invocation, then columns, four an invocation,
//        over their ds; the others make dk and dv of a key, 64 query rows and heads at a time, of the rows between the
//        first and the last that see it. Every sum has one order, and nothing of size M·C is kept
//        source: Dao, arXiv 2307.08691

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<f32>;       // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<f32>;       // [C,KV*D]
@group(0) @binding(2) var<storage, read>       v: array<f32>;       // [C,KV*D]
@group(0) @binding(3) var<storage, read>       span: array<u32>;    // [M,2]
@group(0) @binding(4) var<storage, read>       dy: array<f32>;      // [M,H*D]
@group(0) @binding(5) var<storage, read>       stats: array<f32>;   // [M*H,2]
@group(0) @binding(6) var<storage, read_write> dq: array<f32>;      // [M,H*D]
@group(0) @binding(7) var<storage, read_write> dk: array<f32>;      // [C,KV*D]
@group(0) @binding(8) var<storage, read_write> dv: array<f32>;      // [C,KV*D]
@group(0) @binding(9) var<uniform>             p: Params;

const WIDTH: u32 = 64u;                                             // a power of two
/// p and scale·ds of the pairs of a block; rows first and end of those that see the key.
var<workgroup> weights: array<vec2<f32>, WIDTH>;
var<workgroup> seen: array<vec2<u32>, WIDTH>;

@compute @workgroup_size(WIDTH)
fn attention_backward_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if group.y < p.M {
        query(group.y, group.x, lane);
    } else if group.x < p.KV {
        key(group.y - p.M, group.x, lane);
    }
}

/// p and scale·ds of query row and head i, [M,H] in order, and the key whose numbers begin at `cached`.
fn pair(i: u32, cached: u32) -> vec2<f32> {
    let row = i * p.D;
    var dots = vec2<f32>();
    for (var d = 0u; d < p.D; d++) {
        dots = fma(vec2<f32>(q[row + d], dy[row + d]), vec2<f32>(k[cached + d], v[cached + d]), dots);
    }
    let weight = exact_exp(fma(p.scale, dots.x, -stats[2u * i]));
    return vec2<f32>(weight, p.scale * weight * (dots.y - stats[2u * i + 1u]));
}

/// dq[m,h] = Σ_c scale·ds_c·k_c.
fn query(m: u32, h: u32, lane: u32) {
    let i = m * p.H + h;
    let head = h / (p.H / p.KV);
    let begin = span[2u * m];
    let end = span[2u * m + 1u];
    // Columns lane + 0, 64, 128 and 192 of 256.
    for (var d0 = 0u; d0 < p.D; d0 += 4u * WIDTH) {
        let d = vec4(d0 + lane) + vec4<u32>(0u, WIDTH, 2u * WIDTH, 3u * WIDTH);
        let column = min(d, vec4(p.D - 1u));
        var sum = vec4<f32>();
        for (var first = begin; first < end; first += WIDTH) {
            weights[lane] = vec2<f32>();
            if first + lane < end {
                weights[lane] = pair(i, ((first + lane) * p.KV + head) * p.D);
            }
            workgroupBarrier();
            let keys = min(WIDTH, end - first);
            for (var j = 0u; j < keys; j++) {
                let at = ((first + j) * p.KV + head) * p.D + column;
                let w = weights[j].y;
                sum.x = fma(w, k[at.x], sum.x);
                if d0 + WIDTH < p.D {
                    sum.y = fma(w, k[at.y], sum.y);
                }
                if d0 + 2u * WIDTH < p.D {
                    sum.z = fma(w, k[at.z], sum.z);
                    sum.w = fma(w, k[at.w], sum.w);
                }
            }
            workgroupBarrier();
        }
        for (var n = 0u; n < 4u; n++) {
            if d[n] < p.D {
                dq[i * p.D + d[n]] = sum[n];
            }
        }
    }
}

/// dk[c] = Σ scale·ds·q and dv[c] = Σ p·dy over the rows and heads that see key c of key head `head`.
fn key(c: u32, head: u32, lane: u32) {
    let heads = p.H / p.KV;
    let cached = (c * p.KV + head) * p.D;

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

    // Columns lane and lane + 64 of 128.
    for (var d0 = 0u; d0 < p.D; d0 += 2u * WIDTH) {
        let d = vec2(d0 + lane) + vec2<u32>(0u, WIDTH);
        let column = min(d, vec2(p.D - 1u));
        var key_sum = vec2<f32>();
        var value_sum = vec2<f32>();
        for (var first = begin; first < end; first += WIDTH) {
            // weights[lane]: 0 where the row does not see the key
            let row = (first + lane) / heads;
            weights[lane] = vec2<f32>();
            if first + lane < end && span[2u * row] <= c && c < span[2u * row + 1u] {
                weights[lane] = pair(row * p.H + head * heads + (first + lane) % heads, cached);
            }
            workgroupBarrier();
            let pairs = min(WIDTH, end - first);
            for (var j = 0u; j < pairs; j++) {
                let i = (first + j) / heads * p.H + head * heads + (first + j) % heads;
                let at = i * p.D + column;
                let w = weights[j];
                value_sum.x = fma(w.x, dy[at.x], value_sum.x);
                key_sum.x = fma(w.y, q[at.x], key_sum.x);
                if d0 + WIDTH < p.D {
                    value_sum.y = fma(w.x, dy[at.y], value_sum.y);
                    key_sum.y = fma(w.y, q[at.y], key_sum.y);
                }
            }
            workgroupBarrier();
        }
        for (var n = 0u; n < 2u; n++) {
            if d[n] < p.D {
                dk[cached + d[n]] = key_sum[n];
                dv[cached + d[n]] = value_sum[n];
            }
        }
    }
}
