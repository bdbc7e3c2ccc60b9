// qmatmul_t_broadcast: 16 rows of dy against four columns of W an invocation, appended to the kernels of that name
//
//     for n0 in 0..N step 32:
//         y_r    = dy[m0+r, n0+4·lane..+4]          r in 0..16: eight invocations hold 32 columns of each row
//         w      = deq(W[n, k..k+4])                n in n0..n0+32, eight at a time, in registers
//         acc_r += y_r of lane j · w                by subgroupBroadcast: no invocation reads what another has read
//
// then the same over the R rows of A with dS in the place of dy. For adapters that run on the CPU, as
// shaders/qmatmul_broadcast.wgsl, which tells why; here W's rows lie as they are wanted, weights_<format>_rows reads
// them, and a workgroup is eight invocations, one subgroup wherever subgroups are that large.
//
// On lavapipe (Mesa 22.3.6, 8 lanes, two cores) 128 rows over SmolLM2-135M's shapes take a third to a thirteenth of the
// time of `tiled`, at 1 and 4 rows of q4 less than a tenth.

/// Eight rows of W, this invocation's four columns of each.
struct Rows {
    n0: vec4<f32>, n1: vec4<f32>, n2: vec4<f32>, n3: vec4<f32>,
    n4: vec4<f32>, n5: vec4<f32>, n6: vec4<f32>, n7: vec4<f32>,
}

/// acc + a · the first four rows + b · the last four.
fn add(acc: vec4<f32>, a: vec4<f32>, b: vec4<f32>, w: Rows) -> vec4<f32> {
    var sum = fma(vec4<f32>(a.x), w.n0, acc);
    sum = fma(vec4<f32>(a.y), w.n1, sum);
    sum = fma(vec4<f32>(a.z), w.n2, sum);
    sum = fma(vec4<f32>(a.w), w.n3, sum);
    sum = fma(vec4<f32>(b.x), w.n4, sum);
    sum = fma(vec4<f32>(b.y), w.n5, sum);
    sum = fma(vec4<f32>(b.z), w.n6, sum);
    return fma(vec4<f32>(b.w), w.n7, sum);
}

/// Lane j of 8 holds columns 4j..4j+4 of dy: acc + Σ of 8 of them, from lane 2s on, times their rows of W.
fn add0(acc: vec4<f32>, y: vec4<f32>, w: Rows) -> vec4<f32> {
    return add(acc, subgroupBroadcast(y, 0u), subgroupBroadcast(y, 1u), w);
}
fn add1(acc: vec4<f32>, y: vec4<f32>, w: Rows) -> vec4<f32> {
    return add(acc, subgroupBroadcast(y, 2u), subgroupBroadcast(y, 3u), w);
}
fn add2(acc: vec4<f32>, y: vec4<f32>, w: Rows) -> vec4<f32> {
    return add(acc, subgroupBroadcast(y, 4u), subgroupBroadcast(y, 5u), w);
}
fn add3(acc: vec4<f32>, y: vec4<f32>, w: Rows) -> vec4<f32> {
    return add(acc, subgroupBroadcast(y, 6u), subgroupBroadcast(y, 7u), w);
}

/// Lane j of 8 holds column j of dS: acc + Σ of 8 of them times their rows of A.
fn add_ranks(acc: vec4<f32>, s: f32, a: Rows) -> vec4<f32> {
    let low = vec4<f32>(
        subgroupBroadcast(s, 0u), subgroupBroadcast(s, 1u), subgroupBroadcast(s, 2u), subgroupBroadcast(s, 3u),
    );
    let high = vec4<f32>(
        subgroupBroadcast(s, 4u), subgroupBroadcast(s, 5u), subgroupBroadcast(s, 6u), subgroupBroadcast(s, 7u),
    );
    return add(acc, low, high, a);
}

/// A[r,k..k+4], its last row again where there is no such row; dS is zero there.
fn lora4(r: u32, k: u32) -> vec4<f32> {
    return lora_a[(min(r, p.R - 1u) * p.K + k) / 4u];
}

/// dS[m,r], 0 beyond the row; the last row again where there is no such row.
fn ds_of(m: u32, r: u32) -> f32 {
    return select(0.0, ds[min(m, p.M - 1u) * p.R + min(r, p.R - 1u)], r < p.R);
}

/// dx[m,k..k+4] = sum, added to what it held before where that counts.
fn store(m: u32, k: u32, sum: vec4<f32>) {
    if m < p.M {
        let at = (m * p.K + k) / 4u;
        if p.ACC == 1u {
            dx[at] += sum;
        } else {
            dx[at] = sum;
        }
    }
}

/// Index of the vec4 that a lane reads first in row m; the last row again where there is no such row.
fn row(m: u32, lane: u32) -> u32 {
    return (min(m, p.M - 1u) * p.LDY + p.Y0) / 4u + lane;
}

/// dx[m0..m0+16, k0+4·lane..+4]; lane below 8.
fn broadcast_tile(k0: u32, m0: u32, lane: u32) {
    let k = k0 + lane * 4u;
    let r0 = row(m0 + 0u, lane); let r1 = row(m0 + 1u, lane);
    let r2 = row(m0 + 2u, lane); let r3 = row(m0 + 3u, lane);
    let r4 = row(m0 + 4u, lane); let r5 = row(m0 + 5u, lane);
    let r6 = row(m0 + 6u, lane); let r7 = row(m0 + 7u, lane);
    let r8 = row(m0 + 8u, lane); let r9 = row(m0 + 9u, lane);
    let r10 = row(m0 + 10u, lane); let r11 = row(m0 + 11u, lane);
    let r12 = row(m0 + 12u, lane); let r13 = row(m0 + 13u, lane);
    let r14 = row(m0 + 14u, lane); let r15 = row(m0 + 15u, lane);
    var a0 = vec4<f32>(); var a1 = vec4<f32>(); var a2 = vec4<f32>(); var a3 = vec4<f32>();
    var a4 = vec4<f32>(); var a5 = vec4<f32>(); var a6 = vec4<f32>(); var a7 = vec4<f32>();
    var a8 = vec4<f32>(); var a9 = vec4<f32>(); var a10 = vec4<f32>(); var a11 = vec4<f32>();
    var a12 = vec4<f32>(); var a13 = vec4<f32>(); var a14 = vec4<f32>(); var a15 = vec4<f32>();
    for (var c = 0u; c < p.N / 32u; c++) {
        let at = c * 8u;
        let y0 = dy[r0 + at]; let y1 = dy[r1 + at]; let y2 = dy[r2 + at]; let y3 = dy[r3 + at];
        let y4 = dy[r4 + at]; let y5 = dy[r5 + at]; let y6 = dy[r6 + at]; let y7 = dy[r7 + at];
        let y8 = dy[r8 + at]; let y9 = dy[r9 + at]; let y10 = dy[r10 + at]; let y11 = dy[r11 + at];
        let y12 = dy[r12 + at]; let y13 = dy[r13 + at]; let y14 = dy[r14 + at]; let y15 = dy[r15 + at];
        let w0 = read_rows(c * 32u + 0u, k0, lane);
        a0 = add0(a0, y0, w0); a1 = add0(a1, y1, w0); a2 = add0(a2, y2, w0); a3 = add0(a3, y3, w0);
        a4 = add0(a4, y4, w0); a5 = add0(a5, y5, w0); a6 = add0(a6, y6, w0); a7 = add0(a7, y7, w0);
        a8 = add0(a8, y8, w0); a9 = add0(a9, y9, w0); a10 = add0(a10, y10, w0); a11 = add0(a11, y11, w0);
        a12 = add0(a12, y12, w0); a13 = add0(a13, y13, w0); a14 = add0(a14, y14, w0); a15 = add0(a15, y15, w0);
        let w1 = read_rows(c * 32u + 8u, k0, lane);
        a0 = add1(a0, y0, w1); a1 = add1(a1, y1, w1); a2 = add1(a2, y2, w1); a3 = add1(a3, y3, w1);
        a4 = add1(a4, y4, w1); a5 = add1(a5, y5, w1); a6 = add1(a6, y6, w1); a7 = add1(a7, y7, w1);
        a8 = add1(a8, y8, w1); a9 = add1(a9, y9, w1); a10 = add1(a10, y10, w1); a11 = add1(a11, y11, w1);
        a12 = add1(a12, y12, w1); a13 = add1(a13, y13, w1); a14 = add1(a14, y14, w1); a15 = add1(a15, y15, w1);
        let w2 = read_rows(c * 32u + 16u, k0, lane);
        a0 = add2(a0, y0, w2); a1 = add2(a1, y1, w2); a2 = add2(a2, y2, w2); a3 = add2(a3, y3, w2);
        a4 = add2(a4, y4, w2); a5 = add2(a5, y5, w2); a6 = add2(a6, y6, w2); a7 = add2(a7, y7, w2);
        a8 = add2(a8, y8, w2); a9 = add2(a9, y9, w2); a10 = add2(a10, y10, w2); a11 = add2(a11, y11, w2);
        a12 = add2(a12, y12, w2); a13 = add2(a13, y13, w2); a14 = add2(a14, y14, w2); a15 = add2(a15, y15, w2);
        let w3 = read_rows(c * 32u + 24u, k0, lane);
        a0 = add3(a0, y0, w3); a1 = add3(a1, y1, w3); a2 = add3(a2, y2, w3); a3 = add3(a3, y3, w3);
        a4 = add3(a4, y4, w3); a5 = add3(a5, y5, w3); a6 = add3(a6, y6, w3); a7 = add3(a7, y7, w3);
        a8 = add3(a8, y8, w3); a9 = add3(a9, y9, w3); a10 = add3(a10, y10, w3); a11 = add3(a11, y11, w3);
        a12 = add3(a12, y12, w3); a13 = add3(a13, y13, w3); a14 = add3(a14, y14, w3); a15 = add3(a15, y15, w3);
    }
    for (var r = 0u; r < p.R; r += 8u) {
        let w = Rows(
            lora4(r, k), lora4(r + 1u, k), lora4(r + 2u, k), lora4(r + 3u, k),
            lora4(r + 4u, k), lora4(r + 5u, k), lora4(r + 6u, k), lora4(r + 7u, k),
        );
        a0 = add_ranks(a0, ds_of(m0 + 0u, r + lane), w); a1 = add_ranks(a1, ds_of(m0 + 1u, r + lane), w);
        a2 = add_ranks(a2, ds_of(m0 + 2u, r + lane), w); a3 = add_ranks(a3, ds_of(m0 + 3u, r + lane), w);
        a4 = add_ranks(a4, ds_of(m0 + 4u, r + lane), w); a5 = add_ranks(a5, ds_of(m0 + 5u, r + lane), w);
        a6 = add_ranks(a6, ds_of(m0 + 6u, r + lane), w); a7 = add_ranks(a7, ds_of(m0 + 7u, r + lane), w);
        a8 = add_ranks(a8, ds_of(m0 + 8u, r + lane), w); a9 = add_ranks(a9, ds_of(m0 + 9u, r + lane), w);
        a10 = add_ranks(a10, ds_of(m0 + 10u, r + lane), w); a11 = add_ranks(a11, ds_of(m0 + 11u, r + lane), w);
        a12 = add_ranks(a12, ds_of(m0 + 12u, r + lane), w); a13 = add_ranks(a13, ds_of(m0 + 13u, r + lane), w);
        a14 = add_ranks(a14, ds_of(m0 + 14u, r + lane), w); a15 = add_ranks(a15, ds_of(m0 + 15u, r + lane), w);
    }
    store(m0 + 0u, k, a0); store(m0 + 1u, k, a1); store(m0 + 2u, k, a2); store(m0 + 3u, k, a3);
    store(m0 + 4u, k, a4); store(m0 + 5u, k, a5); store(m0 + 6u, k, a6); store(m0 + 7u, k, a7);
    store(m0 + 8u, k, a8); store(m0 + 9u, k, a9); store(m0 + 10u, k, a10); store(m0 + 11u, k, a11);
    store(m0 + 12u, k, a12); store(m0 + 13u, k, a13); store(m0 + 14u, k, a14); store(m0 + 15u, k, a15);
}
