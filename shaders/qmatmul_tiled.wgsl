// qmatmul_tiled: a tile of 64 x 64 outputs, 8 x 8 an invocation, appended to the kernels of that name
//
//     for k0 in 0..K step 16:
//         x_tile[k][m] = x[m0+m, k0+k]               each invocation a block of 4 x 4, turned in registers
//         w_tile[k][n] = deq(W[n0+n, k0+k])          zero beyond K
//         for k in 0..16:  acc[m][n] += x_tile[k][m] · w_tile[k][n]
//
// An invocation's outputs are four quads: rows 4·my.. and 32 + 4·my.., columns 4·mx.. and 32 + 4·mx.., so that eight
// neighbours read 128 consecutive bytes, and four loads of 16 bytes feed 64 fused multiply-adds. The quad q of a row
// of a tile lies at q ^ 2·(k/4): eight neighbours that write their blocks then meet all banks. The accumulators are
// named, as an array of them would go to memory.

const STEP: u32 = 16u;
/// [16 k][16 quads].
var<workgroup> x_tile: array<vec4<f32>, 256>;
var<workgroup> w_tile: array<vec4<f32>, 256>;

/// x[m,k..k+4]; 0 beyond the row.
fn x4(m: u32, k: u32) -> vec4<f32> {
    let at = m * p.K;
    let last = p.K - 1u;
    let v = vec4<f32>(x[at + k], x[at + min(k + 1u, last)], x[at + min(k + 2u, last)], x[at + min(k + 3u, last)]);
    return select(vec4<f32>(), v, vec4(k) + vec4<u32>(0u, 1u, 2u, 3u) < vec4(p.K));
}

/// y[m, n..n+4] = sum + bias + low rank, as far as they exist.
fn store(m: u32, n: u32, sum: vec4<f32>) {
    if m < p.M {
        let at = m * p.LDY + p.Y0 + n;
        if n < p.N { y[at] = sum.x + bias_and_lora(m, n); }
        if n + 1u < p.N { y[at + 1u] = sum.y + bias_and_lora(m, n + 1u); }
        if n + 2u < p.N { y[at + 2u] = sum.z + bias_and_lora(m, n + 2u); }
        if n + 3u < p.N { y[at + 3u] = sum.w + bias_and_lora(m, n + 3u); }
    }
}

/// y[m0..m0+64, n0..n0+64]; id below 64.
fn tile(m0: u32, n0: u32, id: u32) {
    // The block that this invocation brings in, and its outputs.
    let quad = id / 4u;
    let k4 = id % 4u;
    let at = k4 * 64u + (quad ^ (k4 * 2u));
    let my = id / 8u;
    let mx = id % 8u;
    var a0 = vec4<f32>(); var b0 = vec4<f32>(); var a1 = vec4<f32>(); var b1 = vec4<f32>();
    var a2 = vec4<f32>(); var b2 = vec4<f32>(); var a3 = vec4<f32>(); var b3 = vec4<f32>();
    var a4 = vec4<f32>(); var b4 = vec4<f32>(); var a5 = vec4<f32>(); var b5 = vec4<f32>();
    var a6 = vec4<f32>(); var b6 = vec4<f32>(); var a7 = vec4<f32>(); var b7 = vec4<f32>();
    for (var k0 = 0u; k0 < p.K; k0 += STEP) {
        let k = k0 + k4 * 4u;
        var xs = mat4x4<f32>();
        var ws = mat4x4<f32>();
        if k < p.K {
            let m = min(vec4(m0 + quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.M - 1u));
            let n = min(vec4(n0 + quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.N - 1u));
            xs = transpose(mat4x4<f32>(x4(m.x, k), x4(m.y, k), x4(m.z, k), x4(m.w, k)));
            ws = transpose(mat4x4<f32>(weight4(n.x, k), weight4(n.y, k), weight4(n.z, k), weight4(n.w, k)));
        }
        workgroupBarrier();
        x_tile[at] = xs[0];
        x_tile[at + 16u] = xs[1];
        x_tile[at + 32u] = xs[2];
        x_tile[at + 48u] = xs[3];
        w_tile[at] = ws[0];
        w_tile[at + 16u] = ws[1];
        w_tile[at + 32u] = ws[2];
        w_tile[at + 48u] = ws[3];
        workgroupBarrier();
        for (var i = 0u; i < STEP; i++) {
            let turn = i / 4u * 2u;
            let xa = x_tile[i * 16u + (my ^ turn)];
            let xb = x_tile[i * 16u + 8u + (my ^ turn)];
            let wa = w_tile[i * 16u + (mx ^ turn)];
            let wb = w_tile[i * 16u + 8u + (mx ^ turn)];
            a0 = fma(vec4<f32>(xa.x), wa, a0); b0 = fma(vec4<f32>(xa.x), wb, b0);
            a1 = fma(vec4<f32>(xa.y), wa, a1); b1 = fma(vec4<f32>(xa.y), wb, b1);
            a2 = fma(vec4<f32>(xa.z), wa, a2); b2 = fma(vec4<f32>(xa.z), wb, b2);
            a3 = fma(vec4<f32>(xa.w), wa, a3); b3 = fma(vec4<f32>(xa.w), wb, b3);
            a4 = fma(vec4<f32>(xb.x), wa, a4); b4 = fma(vec4<f32>(xb.x), wb, b4);
            a5 = fma(vec4<f32>(xb.y), wa, a5); b5 = fma(vec4<f32>(xb.y), wb, b5);
            a6 = fma(vec4<f32>(xb.z), wa, a6); b6 = fma(vec4<f32>(xb.z), wb, b6);
            a7 = fma(vec4<f32>(xb.w), wa, a7); b7 = fma(vec4<f32>(xb.w), wb, b7);
        }
    }
    let m = m0 + my * 4u;
    let n = n0 + mx * 4u;
    store(m, n, a0); store(m, n + 32u, b0);
    store(m + 1u, n, a1); store(m + 1u, n + 32u, b1);
    store(m + 2u, n, a2); store(m + 2u, n + 32u, b2);
    store(m + 3u, n, a3); store(m + 3u, n + 32u, b3);
    store(m + 32u, n, a4); store(m + 32u, n + 32u, b4);
    store(m + 33u, n, a5); store(m + 33u, n + 32u, b5);
    store(m + 34u, n, a6); store(m + 34u, n + 32u, b6);
    store(m + 35u, n, a7); store(m + 35u, n + 32u, b7);
}
