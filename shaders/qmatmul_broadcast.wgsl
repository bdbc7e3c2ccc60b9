// qmatmul_broadcast: 16 rows of x against four columns an invocation, appended to the kernels of that name
//
//     for k0 in 0..K step 32:
//         w      = deq(W[n, k0..k0+32])      four n of the invocation's own, in registers
//         x_r    = x[m0+r, k0+4·lane..+4]    r in 0..16: eight invocations hold 32 columns of each row between them
//         acc_r += x_r of lane j · w         by subgroupBroadcast: no invocation reads what another has read
//
// For adapters that run on the CPU. There a load costs every invocation of a subgroup a turn of a scalar loop, from
// workgroup memory as from any other, and a broadcast is one instruction: in q4, 20 loads of 16 bytes and 8 of a scale
// or min feed 512 multiply-adds of vec4. Lanes from 8 on hold again what lanes 0..8 hold, so any subgroup of 8 or more
// will do.
//
// q4 on lavapipe (Mesa 22.3.6, 8 lanes, cores of 2.6 GHz; it makes two instructions of an fma): 22 GFLOP/s a core.
// Without the loads of x it would be 30, without those of scales and mins too 36. 8 or 32 rows, or eight columns an
// invocation, are slower.

/// Lane j of 8 holds columns 4j..4j+4: acc + Σ of 8 columns, from lane 2s on, times their weights.
fn add0(acc: vec4<f32>, x: vec4<f32>, w: Eight) -> vec4<f32> {
    return add(acc, subgroupBroadcast(x, 0u), subgroupBroadcast(x, 1u), w);
}
fn add1(acc: vec4<f32>, x: vec4<f32>, w: Eight) -> vec4<f32> {
    return add(acc, subgroupBroadcast(x, 2u), subgroupBroadcast(x, 3u), w);
}
fn add2(acc: vec4<f32>, x: vec4<f32>, w: Eight) -> vec4<f32> {
    return add(acc, subgroupBroadcast(x, 4u), subgroupBroadcast(x, 5u), w);
}
fn add3(acc: vec4<f32>, x: vec4<f32>, w: Eight) -> vec4<f32> {
    return add(acc, subgroupBroadcast(x, 6u), subgroupBroadcast(x, 7u), w);
}

/// y[m, n], n + 16, n + 32, n + 48, as far as they exist.
fn store(m: u32, n: u32, sum: vec4<f32>) {
    if m < p.M {
        let at = m * p.LDY + p.Y0 + n;
        if n < p.N { y[at] = sum.x + bias_and_lora(m, n); }
        if n + 16u < p.N { y[at + 16u] = sum.y + bias_and_lora(m, n + 16u); }
        if n + 32u < p.N { y[at + 32u] = sum.z + bias_and_lora(m, n + 32u); }
        if n + 48u < p.N { y[at + 48u] = sum.w + bias_and_lora(m, n + 48u); }
    }
}

/// Index of the vec4 that a lane reads first in row m; the last row again where there is no such row.
fn row(m: u32, lane: u32) -> u32 {
    return min(m, p.M - 1u) * (p.K / 4u) + lane;
}

/// y[m0..m0+16, n + 0, 16, 32, 48]; lane below 8.
fn broadcast_tile(n: u32, m0: u32, lane: u32) {
    let columns = min(vec4<u32>(n, n + 16u, n + 32u, n + 48u), vec4<u32>(p.N - 1u));
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
    for (var c = 0u; c < p.K / 32u; c++) {
        let chunk = read_chunk(columns, c);
        let at = c * 8u;
        let x0 = x[r0 + at]; let x1 = x[r1 + at]; let x2 = x[r2 + at]; let x3 = x[r3 + at];
        let x4 = x[r4 + at]; let x5 = x[r5 + at]; let x6 = x[r6 + at]; let x7 = x[r7 + at];
        let x8 = x[r8 + at]; let x9 = x[r9 + at]; let x10 = x[r10 + at]; let x11 = x[r11 + at];
        let x12 = x[r12 + at]; let x13 = x[r13 + at]; let x14 = x[r14 + at]; let x15 = x[r15 + at];
        let w0 = decode_eight(chunk, 0u);
        a0 = add0(a0, x0, w0); a1 = add0(a1, x1, w0); a2 = add0(a2, x2, w0); a3 = add0(a3, x3, w0);
        a4 = add0(a4, x4, w0); a5 = add0(a5, x5, w0); a6 = add0(a6, x6, w0); a7 = add0(a7, x7, w0);
        a8 = add0(a8, x8, w0); a9 = add0(a9, x9, w0); a10 = add0(a10, x10, w0); a11 = add0(a11, x11, w0);
        a12 = add0(a12, x12, w0); a13 = add0(a13, x13, w0); a14 = add0(a14, x14, w0); a15 = add0(a15, x15, w0);
        let w1 = decode_eight(chunk, 1u);
        a0 = add1(a0, x0, w1); a1 = add1(a1, x1, w1); a2 = add1(a2, x2, w1); a3 = add1(a3, x3, w1);
        a4 = add1(a4, x4, w1); a5 = add1(a5, x5, w1); a6 = add1(a6, x6, w1); a7 = add1(a7, x7, w1);
        a8 = add1(a8, x8, w1); a9 = add1(a9, x9, w1); a10 = add1(a10, x10, w1); a11 = add1(a11, x11, w1);
        a12 = add1(a12, x12, w1); a13 = add1(a13, x13, w1); a14 = add1(a14, x14, w1); a15 = add1(a15, x15, w1);
        let w2 = decode_eight(chunk, 2u);
        a0 = add2(a0, x0, w2); a1 = add2(a1, x1, w2); a2 = add2(a2, x2, w2); a3 = add2(a3, x3, w2);
        a4 = add2(a4, x4, w2); a5 = add2(a5, x5, w2); a6 = add2(a6, x6, w2); a7 = add2(a7, x7, w2);
        a8 = add2(a8, x8, w2); a9 = add2(a9, x9, w2); a10 = add2(a10, x10, w2); a11 = add2(a11, x11, w2);
        a12 = add2(a12, x12, w2); a13 = add2(a13, x13, w2); a14 = add2(a14, x14, w2); a15 = add2(a15, x15, w2);
        let w3 = decode_eight(chunk, 3u);
        a0 = add3(a0, x0, w3); a1 = add3(a1, x1, w3); a2 = add3(a2, x2, w3); a3 = add3(a3, x3, w3);
        a4 = add3(a4, x4, w3); a5 = add3(a5, x5, w3); a6 = add3(a6, x6, w3); a7 = add3(a7, x7, w3);
        a8 = add3(a8, x8, w3); a9 = add3(a9, x9, w3); a10 = add3(a10, x10, w3); a11 = add3(a11, x11, w3);
        a12 = add3(a12, x12, w3); a13 = add3(a13, x13, w3); a14 = add3(a14, x14, w3); a15 = add3(a15, x15, w3);
    }
    store(m0 + 0u, n, a0); store(m0 + 1u, n, a1); store(m0 + 2u, n, a2); store(m0 + 3u, n, a3);
    store(m0 + 4u, n, a4); store(m0 + 5u, n, a5); store(m0 + 6u, n, a6); store(m0 + 7u, n, a7);
    store(m0 + 8u, n, a8); store(m0 + 9u, n, a9); store(m0 + 10u, n, a10); store(m0 + 11u, n, a11);
    store(m0 + 12u, n, a12); store(m0 + 13u, n, a13); store(m0 + 14u, n, a14); store(m0 + 15u, n, a15);
}
