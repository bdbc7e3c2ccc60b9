// attention_f32_tiled: y[m,h] = softmax(scale·q[m,h]·kᵀ)·v over span[m]     contract: src/ops/attention.rs
// grid   ceil(M/32), H, ceil(D/64)     block 64 = 8 x 8, each 4 rows and 4 keys, then 4 rows and 8 columns
// smem   22544 B          features none
// reads  4MHD + 8MHCD/32 B      writes 4MHD B       bound: arithmetic
// idea   32 rows meet 32 keys in workgroup memory; scores and sums stay in named vectors over rows, as arrays in
//        registers would go to memory; the largest score and the sums run on from tile to tile
//        source: Dao et al., arXiv 2205.14135

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<vec4<f32>>;     // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<vec4<f32>>;     // [C,KV*D]
@group(0) @binding(2) var<storage, read>       v: array<vec4<f32>>;     // [C,KV*D]
@group(0) @binding(3) var<storage, read>       span: array<u32>;        // [M,2]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;     // [M,H*D]
@group(0) @binding(5) var<uniform>             p: Params;

const LEAST: f32 = -3e38;                                               // below every score
const TILE: u32 = 32u;                                                  // rows, and keys
const DEPTH: u32 = 16u;                                                 // vectors of q and k at once, and of v
const PITCH: u32 = 17u;                                                 // so that neighbours lie in other banks

var<workgroup> rows: array<vec4<f32>, 544>;                             // scale · q [TILE][PITCH]
var<workgroup> keys: array<vec4<f32>, 544>;                             // k, then v [TILE][PITCH]
var<workgroup> weights: array<vec4<f32>, 256>;                          // [TILE keys][8], a vector rows ty, ty + 8, …
var<workgroup> largest_of: array<vec4<f32>, 64>;                        // [8][8], the same
var<workgroup> lowest: atomic<u32>;                                     // the rows' spans lie in lowest..highest
var<workgroup> highest: atomic<u32>;
var<workgroup> bounds: vec2<u32>;                                       // the same, one value for all invocations

/// Weights of one key: 0 for the rows that do not see it.
fn weigh(score: vec4<f32>, largest: vec4<f32>, seen: vec4<bool>) -> vec4<f32> {
    return select(vec4<f32>(), exact_exp4(score - largest), seen);
}

/// q·k of four rows and a key.
fn dots(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>, key: vec4<f32>) -> vec4<f32> {
    return vec4(dot(a, key), dot(b, key), dot(c, key), dot(d, key));
}

@compute @workgroup_size(64)
fn attention_f32_tiled(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m0 = group.x * TILE;
    let head = group.y;
    let kv_head = head / (p.H / p.KV);
    let width = p.D / 4u;                                               // of a head, in vectors
    let depths = (width + DEPTH - 1u) / DEPTH;
    let ty = lane % 8u;                                                 // rows m0 + ty, + 8, + 16, + 24
    let tx = lane / 8u;                                                 // keys tx, + 8, …; vectors tx and tx + 8 of v

    // which keys any row sees, and which keys the four rows see
    if lane == 0u {
        atomicStore(&lowest, p.C);
        atomicStore(&highest, 0u);
    }
    workgroupBarrier();
    if lane < TILE && m0 + lane < p.M {
        let row_begin = span[2u * (m0 + lane)];
        let row_end = span[2u * (m0 + lane) + 1u];
        if row_begin < row_end {
            atomicMin(&lowest, row_begin);
            atomicMax(&highest, row_end);
        }
    }
    workgroupBarrier();
    if lane == 0u {
        bounds = vec2(atomicLoad(&lowest), atomicLoad(&highest));
    }
    let seen = workgroupUniformLoad(&bounds);
    let first = seen.x;
    let last = seen.y;
    let m = vec4<u32>(0u, 8u, 16u, 24u) + vec4(m0 + ty);
    let at = min(m, vec4(p.M - 1u)) * 2u;                               // rows beyond the last are copies of it
    let begin = vec4(span[at.x], span[at.y], span[at.z], span[at.w]);
    let end = vec4(span[at.x + 1u], span[at.y + 1u], span[at.z + 1u], span[at.w + 1u]);

    var largest = vec4(LEAST);
    var total = vec4<f32>();                                            // of this invocation's keys
    var a0 = vec4<f32>();                                               // sums of vector tx of row m.x, …
    var a1 = vec4<f32>();
    var a2 = vec4<f32>();
    var a3 = vec4<f32>();
    var b0 = vec4<f32>();                                               // … and of vector tx + 8
    var b1 = vec4<f32>();
    var b2 = vec4<f32>();
    var b3 = vec4<f32>();
    for (var c0 = first; c0 < last; c0 += TILE) {
        // s = scale · q·kᵀ, a vector over rows for each key, DEPTH vectors at a time
        var s0 = vec4<f32>();
        var s1 = vec4<f32>();
        var s2 = vec4<f32>();
        var s3 = vec4<f32>();
        for (var depth = 0u; depth < depths; depth++) {
            let count = min(DEPTH, width - depth * DEPTH);
            let column = depth * DEPTH + lane % DEPTH;
            workgroupBarrier();
            if column < width {
                if depths > 1u || c0 == first {
                    for (var i = lane / DEPTH; i < TILE; i += 4u) {
                        let row = min(m0 + i, p.M - 1u);
                        rows[i * PITCH + lane % DEPTH] = p.scale * q[(row * p.H + head) * width + column];
                    }
                }
                for (var i = lane / DEPTH; i < TILE; i += 4u) {
                    let c = min(c0 + i, last - 1u);
                    keys[i * PITCH + lane % DEPTH] = k[(c * p.KV + kv_head) * width + column];
                }
            }
            workgroupBarrier();
            for (var i = 0u; i < count; i++) {
                let q0 = rows[ty * PITCH + i];
                let q1 = rows[(ty + 8u) * PITCH + i];
                let q2 = rows[(ty + 16u) * PITCH + i];
                let q3 = rows[(ty + 24u) * PITCH + i];
                s0 += dots(q0, q1, q2, q3, keys[tx * PITCH + i]);
                s1 += dots(q0, q1, q2, q3, keys[(tx + 8u) * PITCH + i]);
                s2 += dots(q0, q1, q2, q3, keys[(tx + 16u) * PITCH + i]);
                s3 += dots(q0, q1, q2, q3, keys[(tx + 24u) * PITCH + i]);
            }
        }

        // the largest score so far of each row, over the keys it sees
        let c = vec4(c0 + tx);
        let seen0 = (begin <= c) & (c < end);
        let seen1 = (begin <= c + 8u) & (c + 8u < end);
        let seen2 = (begin <= c + 16u) & (c + 16u < end);
        let seen3 = (begin <= c + 24u) & (c + 24u < end);
        let least = vec4(LEAST);
        let pair0 = max(select(least, s0, seen0), select(least, s1, seen1));
        let pair1 = max(select(least, s2, seen2), select(least, s3, seen3));
        largest_of[tx * 8u + ty] = max(pair0, pair1);
        workgroupBarrier();
        var next = largest;
        for (var i = 0u; i < 8u; i++) {
            next = max(next, largest_of[i * 8u + ty]);
        }

        // weights, and what is summed so far rescaled
        let shrink = exact_exp4(largest - next);
        largest = next;
        s0 = weigh(s0, largest, seen0);
        s1 = weigh(s1, largest, seen1);
        s2 = weigh(s2, largest, seen2);
        s3 = weigh(s3, largest, seen3);
        total = fma(total, shrink, (s0 + s1) + (s2 + s3));
        weights[tx * 8u + ty] = s0;
        weights[(tx + 8u) * 8u + ty] = s1;
        weights[(tx + 16u) * 8u + ty] = s2;
        weights[(tx + 24u) * 8u + ty] = s3;
        a0 *= shrink.x;
        a1 *= shrink.y;
        a2 *= shrink.z;
        a3 *= shrink.w;
        b0 *= shrink.x;
        b1 *= shrink.y;
        b2 *= shrink.z;
        b3 *= shrink.w;

        // v takes the place of k
        let column = group.z * DEPTH + lane % DEPTH;
        if column < width {
            for (var i = lane / DEPTH; i < TILE; i += 4u) {
                let c = min(c0 + i, last - 1u);
                keys[i * PITCH + lane % DEPTH] = v[(c * p.KV + kv_head) * width + column];
            }
        }
        workgroupBarrier();

        // a, b += weights · v
        let count = min(TILE, last - c0);
        if width - group.z * DEPTH > 8u {
            for (var i = 0u; i < count; i++) {
                let w = weights[i * 8u + ty];
                let left = keys[i * PITCH + tx];
                let right = keys[i * PITCH + 8u + tx];
                a0 = fma(w.xxxx, left, a0);
                a1 = fma(w.yyyy, left, a1);
                a2 = fma(w.zzzz, left, a2);
                a3 = fma(w.wwww, left, a3);
                b0 = fma(w.xxxx, right, b0);
                b1 = fma(w.yyyy, right, b1);
                b2 = fma(w.zzzz, right, b2);
                b3 = fma(w.wwww, right, b3);
            }
        } else {
            for (var i = 0u; i < count; i++) {
                let w = weights[i * 8u + ty];
                let left = keys[i * PITCH + tx];
                a0 = fma(w.xxxx, left, a0);
                a1 = fma(w.yyyy, left, a1);
                a2 = fma(w.zzzz, left, a2);
                a3 = fma(w.wwww, left, a3);
            }
        }
    }

    // y = sums / total of all keys' weights; 0 for rows that see none
    workgroupBarrier();
    largest_of[tx * 8u + ty] = total;
    workgroupBarrier();
    total = vec4<f32>();
    for (var i = 0u; i < 8u; i++) {
        total += largest_of[i * 8u + ty];
    }
    total = select(total, vec4(1.0), begin >= end);
    let column = group.z * DEPTH + tx;
    store(m.x, head, column, a0, b0, total.x);
    store(m.y, head, column, a1, b1, total.y);
    store(m.z, head, column, a2, b2, total.z);
    store(m.w, head, column, a3, b3, total.w);
}

/// Two vectors of a row.
fn store(m: u32, head: u32, column: u32, a: vec4<f32>, b: vec4<f32>, total: f32) {
    let width = p.D / 4u;
    let to = (m * p.H + head) * width + column;
    if m < p.M && column < width {
        y[to] = exact_divide4(a, vec4(total));
    }
    if m < p.M && column + 8u < width {
        y[to + 8u] = exact_divide4(b, vec4(total));
    }
}
