// qmatmul_t_tiled: a tile of 64 x 64 elements of dx, 8 x 8 an invocation, appended to the kernels of that name
//
//     for n0 in 0..N step 16, then the same over the R rows of A with dS in the place of dy:
//         y_tile[n][m] = dy[m0+m, n0+n]              each invocation a block of 4 x 4, turned in registers
//         w_tile[n][k] = deq(W[n0+n, k0+k])          zero beyond N
//         for n in 0..16:  acc[m][k] += y_tile[n][m] · w_tile[n][k]
//
// W's rows lie as the tile wants them: 16 neighbours read 64 columns of a row and write them side by side. As in
// qmatmul_tiled, an invocation's elements are four quads, rows 4·my.. and 32 + 4·my.., columns 4·mx.. and 32 + 4·mx..,
// the quad q of a row of y_tile lies at q ^ 2·(n/4), where neighbours that write meet all banks, and accumulators are
// named.

const STEP: u32 = 16u;
/// [16 n][16 quads].
var<workgroup> y_tile: array<vec4<f32>, 256>;
var<workgroup> w_tile: array<vec4<f32>, 256>;

/// dy[m,n..n+4], n below N; 0 beyond the row.
fn dy4(m: u32, n: u32) -> vec4<f32> {
    let at = m * p.LDY + p.Y0;
    let last = p.N - 1u;
    let v = vec4<f32>(dy[at + n], dy[at + min(n + 1u, last)], dy[at + min(n + 2u, last)], dy[at + min(n + 3u, last)]);
    return select(vec4<f32>(), v, vec4(n) + vec4<u32>(0u, 1u, 2u, 3u) < vec4(p.N));
}

/// dS[m,r..r+4], r below R; 0 beyond the row.
fn ds4(m: u32, r: u32) -> vec4<f32> {
    let at = m * p.R;
    let last = p.R - 1u;
    let v = vec4<f32>(ds[at + r], ds[at + min(r + 1u, last)], ds[at + min(r + 2u, last)], ds[at + min(r + 3u, last)]);
    return select(vec4<f32>(), v, vec4(r) + vec4<u32>(0u, 1u, 2u, 3u) < vec4(p.R));
}

/// A[r,k..k+4]; beyond the row its last column again.
fn lora4(r: u32, k: u32) -> vec4<f32> {
    let at = r * p.K;
    let last = p.K - 1u;
    return vec4<f32>(
        lora_a[at + k], lora_a[at + min(k + 1u, last)], lora_a[at + min(k + 2u, last)], lora_a[at + min(k + 3u, last)],
    );
}

/// dx[m,k] = sum, added to what it held before where that counts.
fn store(at: u32, sum: f32) {
    if p.ACC == 1u {
        dx[at] += sum;
    } else {
        dx[at] = sum;
    }
}

/// dx[m, k..k+4], as far as they exist.
fn store4(m: u32, k: u32, sum: vec4<f32>) {
    if m < p.M {
        let at = m * p.K + k;
        if k < p.K { store(at, sum.x); }
        if k + 1u < p.K { store(at + 1u, sum.y); }
        if k + 2u < p.K { store(at + 2u, sum.z); }
        if k + 3u < p.K { store(at + 3u, sum.w); }
    }
}

/// dx[m0..m0+64, k0..k0+64]; id below 64.
fn tile(m0: u32, k0: u32, id: u32) {
    // The block of dy and the four quads of W that this invocation brings in, and its elements of dx.
    let quad = id / 4u;
    let n4 = id % 4u;
    let at = n4 * 64u + (quad ^ (n4 * 2u));
    let m = min(vec4(m0 + quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.M - 1u));
    let column = min(k0 + id % 16u * 4u, (p.K - 1u) / 4u * 4u);
    let my = id / 8u;
    let mx = id % 8u;
    var a0 = vec4<f32>(); var b0 = vec4<f32>(); var a1 = vec4<f32>(); var b1 = vec4<f32>();
    var a2 = vec4<f32>(); var b2 = vec4<f32>(); var a3 = vec4<f32>(); var b3 = vec4<f32>();
    var a4 = vec4<f32>(); var b4 = vec4<f32>(); var a5 = vec4<f32>(); var b5 = vec4<f32>();
    var a6 = vec4<f32>(); var b6 = vec4<f32>(); var a7 = vec4<f32>(); var b7 = vec4<f32>();
    // Steps over W's rows, then over A's.
    let steps = (p.N + STEP - 1u) / STEP;
    let end = steps + (p.R + STEP - 1u) / STEP;
    for (var j = 0u; j < end; j++) {
        var ys = mat4x4<f32>();
        var ws = mat4x4<f32>();
        if j < steps {
            let n = j * STEP + n4 * 4u;
            if n < p.N {
                ys = transpose(mat4x4<f32>(dy4(m.x, n), dy4(m.y, n), dy4(m.z, n), dy4(m.w, n)));
            }
            let row = j * STEP + id / 16u;
            if row < p.N { ws[0] = weight4(row, column); }
            if row + 4u < p.N { ws[1] = weight4(row + 4u, column); }
            if row + 8u < p.N { ws[2] = weight4(row + 8u, column); }
            if row + 12u < p.N { ws[3] = weight4(row + 12u, column); }
        } else {
            let r = (j - steps) * STEP + n4 * 4u;
            if r < p.R {
                ys = transpose(mat4x4<f32>(ds4(m.x, r), ds4(m.y, r), ds4(m.z, r), ds4(m.w, r)));
            }
            let row = (j - steps) * STEP + id / 16u;
            if row < p.R { ws[0] = lora4(row, column); }
            if row + 4u < p.R { ws[1] = lora4(row + 4u, column); }
            if row + 8u < p.R { ws[2] = lora4(row + 8u, column); }
            if row + 12u < p.R { ws[3] = lora4(row + 12u, column); }
        }
        workgroupBarrier();
        y_tile[at] = ys[0];
        y_tile[at + 16u] = ys[1];
        y_tile[at + 32u] = ys[2];
        y_tile[at + 48u] = ys[3];
        w_tile[id] = ws[0];
        w_tile[id + 64u] = ws[1];
        w_tile[id + 128u] = ws[2];
        w_tile[id + 192u] = ws[3];
        workgroupBarrier();
        for (var i = 0u; i < STEP; i++) {
            let turn = i / 4u * 2u;
            let ya = y_tile[i * 16u + (my ^ turn)];
            let yb = y_tile[i * 16u + 8u + (my ^ turn)];
            let wa = w_tile[i * 16u + mx];
            let wb = w_tile[i * 16u + 8u + mx];
            a0 = fma(vec4<f32>(ya.x), wa, a0); b0 = fma(vec4<f32>(ya.x), wb, b0);
            a1 = fma(vec4<f32>(ya.y), wa, a1); b1 = fma(vec4<f32>(ya.y), wb, b1);
            a2 = fma(vec4<f32>(ya.z), wa, a2); b2 = fma(vec4<f32>(ya.z), wb, b2);
            a3 = fma(vec4<f32>(ya.w), wa, a3); b3 = fma(vec4<f32>(ya.w), wb, b3);
            a4 = fma(vec4<f32>(yb.x), wa, a4); b4 = fma(vec4<f32>(yb.x), wb, b4);
            a5 = fma(vec4<f32>(yb.y), wa, a5); b5 = fma(vec4<f32>(yb.y), wb, b5);
            a6 = fma(vec4<f32>(yb.z), wa, a6); b6 = fma(vec4<f32>(yb.z), wb, b6);
            a7 = fma(vec4<f32>(yb.w), wa, a7); b7 = fma(vec4<f32>(yb.w), wb, b7);
        }
    }
    let row = m0 + my * 4u;
    let k = k0 + mx * 4u;
    store4(row, k, a0); store4(row, k + 32u, b0);
    store4(row + 1u, k, a1); store4(row + 1u, k + 32u, b1);
    store4(row + 2u, k, a2); store4(row + 2u, k + 32u, b2);
    store4(row + 3u, k, a3); store4(row + 3u, k + 32u, b3);
    store4(row + 32u, k, a4); store4(row + 32u, k + 32u, b4);
    store4(row + 33u, k, a5); store4(row + 33u, k + 32u, b5);
    store4(row + 34u, k, a6); store4(row + 34u, k + 32u, b6);
    store4(row + 35u, k, a7); store4(row + 35u, k + 32u, b7);
}
