// attention_f32_tiled: y[m,h] = softmax(scale·q[m,h]·kᵀ)·v over span[m]     contract: src/ops/attention.rs
// grid   ceil(M/32), H, ceil(D/64)     block 64 = 8 x 8, each 4 rows and 4 keys, then 4 rows and 8 columns
// smem   21512 B          features none
// reads  4MHD + 8MHCD/32 B      writes 4MHD B       bound: arithmetic
// idea   32 rows meet 32 keys in workgroup memory; scores and sums stay in named vectors over rows, as arrays in
//        registers would go to memory; the largest score and the sums run on from tile to tile
//        source: Dao et al., arXiv 2205.14135

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<f32>;       // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<f32>;       // [C,KV*D]
@group(0) @binding(2) var<storage, read>       v: array<f32>;       // [C,KV*D]
@group(0) @binding(3) var<storage, read>       span: array<u32>;    // [M,2]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;       // [M,H*D]
@group(0) @binding(5) var<uniform>             p: Params;

const LEAST: f32 = -3e38;                                           // below every score
const EIGHTHS: u32 = 8u;                                            // vectors of 4 in 32 rows or keys
const DEPTH: u32 = 64u;                                             // columns of q and k at once, and of v

var<workgroup> rows: array<vec4<f32>, 512>;                         // scale · qᵀ [DEPTH][32 rows]
var<workgroup> keys: array<vec4<f32>, 512>;                         // kᵀ [DEPTH][32 keys], then v [32 keys][DEPTH]
var<workgroup> weights: array<vec4<f32>, 256>;                      // [32 keys][32 rows]
var<workgroup> largest_of: array<vec4<f32>, 64>;                    // [8][32 rows]
var<workgroup> lowest: atomic<u32>;                                 // the tile's spans lie in lowest..highest
var<workgroup> highest: atomic<u32>;

fn exp4(x: vec4<f32>) -> vec4<f32> {
    return vec4(exact_exp(x.x), exact_exp(x.y), exact_exp(x.z), exact_exp(x.w));
}

/// Weights of one key: 0 for the rows that do not see it.
fn weigh(score: vec4<f32>, largest: vec4<f32>, seen: vec4<bool>) -> vec4<f32> {
    return select(vec4<f32>(), exp4(score - largest), seen);
}

@compute @workgroup_size(64)
fn attention_f32_tiled(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m0 = group.x * 32u;
    let head = group.y;
    let kv_head = head / (p.H / p.KV);
    let column0 = group.z * DEPTH;
    let depths = (p.D + DEPTH - 1u) / DEPTH;
    let ty = lane % 8u;                                             // rows m0 + 4·ty ..
    let tx = lane / 8u;                                             // keys 4·tx .., columns 4·tx .. and 32 + 4·tx ..

    // which keys any row sees, and which keys the four rows see
    if lane == 0u {
        atomicStore(&lowest, p.C);
        atomicStore(&highest, 0u);
    }
    workgroupBarrier();
    if lane < 32u && m0 + lane < p.M {
        let row_begin = span[2u * (m0 + lane)];
        let row_end = span[2u * (m0 + lane) + 1u];
        if row_begin < row_end {
            atomicMin(&lowest, row_begin);
            atomicMax(&highest, row_end);
        }
    }
    workgroupBarrier();
    let first = atomicLoad(&lowest);
    let last = atomicLoad(&highest);
    let m = vec4<u32>(0u, 1u, 2u, 3u) + vec4(m0 + 4u * ty);
    let at = min(m, vec4(p.M - 1u)) * 2u;                           // rows beyond the last are copies of it, not stored
    let begin = vec4(span[at.x], span[at.y], span[at.z], span[at.w]);
    let end = vec4(span[at.x + 1u], span[at.y + 1u], span[at.z + 1u], span[at.w + 1u]);

    var largest = vec4(LEAST);
    var total = vec4<f32>();                                        // of this invocation's keys
    var a0 = vec4<f32>();                                           // sums of column 4·tx, a vector over rows, …
    var a1 = vec4<f32>();
    var a2 = vec4<f32>();
    var a3 = vec4<f32>();
    var b0 = vec4<f32>();                                           // … and of column 32 + 4·tx
    var b1 = vec4<f32>();
    var b2 = vec4<f32>();
    var b3 = vec4<f32>();
    for (var c0 = first; c0 < last; c0 += 32u) {
        // s = scale · q·kᵀ, DEPTH columns at a time
        var s0 = vec4<f32>();
        var s1 = vec4<f32>();
        var s2 = vec4<f32>();
        var s3 = vec4<f32>();
        for (var depth = 0u; depth < depths; depth++) {
            let d = depth * DEPTH + lane;
            workgroupBarrier();
            if d < p.D {
                if depths > 1u || c0 == first {
                    for (var i = 0u; i < EIGHTHS; i++) {
                        let r = min(vec4<u32>(0u, 1u, 2u, 3u) + vec4(m0 + 4u * i), vec4(p.M - 1u));
                        let source = (r * p.H + vec4(head)) * p.D + vec4(d);
                        rows[lane * EIGHTHS + i] = p.scale * vec4(q[source.x], q[source.y], q[source.z], q[source.w]);
                    }
                }
                for (var i = 0u; i < EIGHTHS; i++) {
                    let c = min(vec4<u32>(0u, 1u, 2u, 3u) + vec4(c0 + 4u * i), vec4(last - 1u));
                    let source = (c * p.KV + vec4(kv_head)) * p.D + vec4(d);
                    keys[lane * EIGHTHS + i] = vec4(k[source.x], k[source.y], k[source.z], k[source.w]);
                }
            }
            workgroupBarrier();
            let count = min(DEPTH, p.D - depth * DEPTH);
            for (var i = 0u; i < count; i++) {
                let r = rows[i * EIGHTHS + ty];
                let c = keys[i * EIGHTHS + tx];
                s0 = fma(r, c.xxxx, s0);
                s1 = fma(r, c.yyyy, s1);
                s2 = fma(r, c.zzzz, s2);
                s3 = fma(r, c.wwww, s3);
            }
        }

        // the largest score so far of each row, over the keys it sees
        let c = vec4(c0 + 4u * tx);
        let seen0 = (begin <= c) & (c < end);
        let seen1 = (begin <= c + 1u) & (c + 1u < end);
        let seen2 = (begin <= c + 2u) & (c + 2u < end);
        let seen3 = (begin <= c + 3u) & (c + 3u < end);
        let least = vec4(LEAST);
        let pair0 = max(select(least, s0, seen0), select(least, s1, seen1));
        let pair1 = max(select(least, s2, seen2), select(least, s3, seen3));
        largest_of[tx * EIGHTHS + ty] = max(pair0, pair1);
        workgroupBarrier();
        var next = largest;
        for (var i = 0u; i < 8u; i++) {
            next = max(next, largest_of[i * EIGHTHS + ty]);
        }

        // weights, and what is summed so far rescaled
        let shrink = exp4(largest - next);
        largest = next;
        s0 = weigh(s0, largest, seen0);
        s1 = weigh(s1, largest, seen1);
        s2 = weigh(s2, largest, seen2);
        s3 = weigh(s3, largest, seen3);
        total = fma(total, shrink, (s0 + s1) + (s2 + s3));
        weights[(4u * tx) * EIGHTHS + ty] = s0;
        weights[(4u * tx + 1u) * EIGHTHS + ty] = s1;
        weights[(4u * tx + 2u) * EIGHTHS + ty] = s2;
        weights[(4u * tx + 3u) * EIGHTHS + ty] = s3;
        a0 *= shrink;
        a1 *= shrink;
        a2 *= shrink;
        a3 *= shrink;
        b0 *= shrink;
        b1 *= shrink;
        b2 *= shrink;
        b3 *= shrink;

        // v takes the place of k
        for (var i = 0u; i < 8u; i++) {
            let key = 4u * i + lane / 16u;
            let column = column0 + lane % 16u * 4u;
            let source = (min(c0 + key, last - 1u) * p.KV + kv_head) * p.D + column;
            var value = vec4<f32>();
            if column + 3u < p.D {
                value = vec4(v[source], v[source + 1u], v[source + 2u], v[source + 3u]);
            } else {
                if column < p.D {
                    value.x = v[source];
                }
                if column + 1u < p.D {
                    value.y = v[source + 1u];
                }
                if column + 2u < p.D {
                    value.z = v[source + 2u];
                }
            }
            keys[key * 16u + lane % 16u] = value;
        }
        workgroupBarrier();

        // a, b += weights · v
        let count = min(32u, last - c0);
        if p.D - column0 > 32u {
            for (var i = 0u; i < count; i++) {
                let w = weights[i * EIGHTHS + ty];
                let left = keys[i * 16u + tx];
                let right = keys[i * 16u + 8u + tx];
                a0 = fma(w, left.xxxx, a0);
                a1 = fma(w, left.yyyy, a1);
                a2 = fma(w, left.zzzz, a2);
                a3 = fma(w, left.wwww, a3);
                b0 = fma(w, right.xxxx, b0);
                b1 = fma(w, right.yyyy, b1);
                b2 = fma(w, right.zzzz, b2);
                b3 = fma(w, right.wwww, b3);
            }
        } else {
            for (var i = 0u; i < count; i++) {
                let w = weights[i * EIGHTHS + ty];
                let left = keys[i * 16u + tx];
                a0 = fma(w, left.xxxx, a0);
                a1 = fma(w, left.yyyy, a1);
                a2 = fma(w, left.zzzz, a2);
                a3 = fma(w, left.wwww, a3);
            }
        }
    }

    // y = sums / total of all keys' weights; 0 for rows that see none
    workgroupBarrier();
    largest_of[tx * EIGHTHS + ty] = total;
    workgroupBarrier();
    total = vec4<f32>();
    for (var i = 0u; i < 8u; i++) {
        total += largest_of[i * EIGHTHS + ty];
    }
    total = select(total, vec4(1.0), begin >= end);
    let column = column0 + 4u * tx;
    let to = (m * p.H + vec4(head)) * p.D + vec4(column);
    store(column, m, to, a0, total);
    store(column + 1u, m, to + 1u, a1, total);
    store(column + 2u, m, to + 2u, a2, total);
    store(column + 3u, m, to + 3u, a3, total);
    store(column + 32u, m, to + 32u, b0, total);
    store(column + 33u, m, to + 33u, b1, total);
    store(column + 34u, m, to + 34u, b2, total);
    store(column + 35u, m, to + 35u, b3, total);
}

/// One column of four rows.
fn store(column: u32, m: vec4<u32>, to: vec4<u32>, sum: vec4<f32>, total: vec4<f32>) {
    if column < p.D {
        if m.x < p.M {
            y[to.x] = exact_divide(sum.x, total.x);
        }
        if m.y < p.M {
            y[to.y] = exact_divide(sum.y, total.y);
        }
        if m.z < p.M {
            y[to.z] = exact_divide(sum.z, total.z);
        }
        if m.w < p.M {
            y[to.w] = exact_divide(sum.w, total.w);
        }
    }
}
