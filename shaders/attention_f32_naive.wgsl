// attention_f32_naive: y[m,h] = softmax(scale·q[m,h]·kᵀ)·v over span[m]     contract: src/ops/attention.rs
// grid   ceil(M*H/64)     block 64 = 64 heads of rows
// smem   0 B              features none
// reads  4MHD + 12MHCD B      writes 4MHD B (and C times from cache)       bound: loads of single elements
// idea   one head of a row an invocation: the largest score, then weights and sums, as the formula says

struct Params { M: u32, H: u32, KV: u32, D: u32, C: u32, scale: f32 }

@group(0) @binding(0) var<storage, read>       q: array<f32>;       // [M,H*D]
@group(0) @binding(1) var<storage, read>       k: array<f32>;       // [C,KV*D]
@group(0) @binding(2) var<storage, read>       v: array<f32>;       // [C,KV*D]
@group(0) @binding(3) var<storage, read>       span: array<u32>;    // [M,2]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;       // [M,H*D]
@group(0) @binding(5) var<uniform>             p: Params;

/// scale · q·k of the rows that begin there.
fn score(q0: u32, k0: u32) -> f32 {
    var sum = 0.0;
    for (var d = 0u; d < p.D; d++) {
        sum = fma(q[q0 + d], k[k0 + d], sum);
    }
    return p.scale * sum;
}

@compute @workgroup_size(64)
fn attention_f32_naive(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.M * p.H {
        return;
    }
    let m = id.x / p.H;
    let head = (id.x % p.H) / (p.H / p.KV);
    let begin = span[2u * m];
    let end = span[2u * m + 1u];
    let row = id.x * p.D;                                           // of q and of y

    var largest = -3e38;
    for (var c = begin; c < end; c++) {
        largest = max(largest, score(row, (c * p.KV + head) * p.D));
    }

    for (var d = 0u; d < p.D; d++) {
        y[row + d] = 0.0;
    }
    var total = 0.0;
    for (var c = begin; c < end; c++) {
        let cached = (c * p.KV + head) * p.D;
        let weight = exact_exp(score(row, cached) - largest);
        total += weight;
        for (var d = 0u; d < p.D; d++) {
            y[row + d] = fma(weight, v[cached + d], y[row + d]);
        }
    }
    if begin < end {
        for (var d = 0u; d < p.D; d++) {
            y[row + d] = exact_divide(y[row + d], total);
        }
    }
}
