// qmatmul_coopmat: a tile of 64 x 64 outputs by cooperative matrices of 16 x 16, appended to the kernels of that name
//
//     for k0 in 0..K step 16:
//         x_tile[m][k] = x[m0+m, k0+k]                  f16 as it comes, zero beyond K
//         w_tile[n][k] = f16(deq(W[n0+n, k0+k]))        one rounding
//         each subgroup: acc[2][2] += x_tile[32 rows] · w_tile[32 rows]ᵀ       products exact, sums in f32
//
// The only roundings at the size of f16 are those of the decoded weights, so an error is told in units of f16: the row
// says so by its activations. Rows of the tiles are 48 bytes apart, which spreads eight of them over all banks and
// keeps each at 16 bytes. Sums leave by way of workgroup memory, as y may begin and end anywhere.
//
// Validated, not run: no adapter with such matrices was at hand. tests/coopmat.rs runs it with plain functions instead.

const STEP: u32 = 16u;
const PITCH: u32 = 24u;
/// [64 rows][PITCH], 16 of them used.
var<workgroup> x_tile: array<f16, 1536>;
var<workgroup> w_tile: array<f16, 1536>;
/// [4 subgroups][16 m][16 n].
var<workgroup> y_tile: array<f32, 1024>;

/// x[m,k]; 0 beyond the row.
fn x1(m: u32, k: u32) -> f16 {
    return select(0.0h, x[m * p.K + min(k, p.K - 1u)], k < p.K);
}

/// Sums of one 16 x 16 block of each subgroup to y; row and column are where the subgroup's lies in the whole of y.
fn store(id: u32, subgroup: u32, row: u32, column: u32) {
    let lane = id % 32u;
    for (var i = lane; i < 256u; i += 32u) {
        let m = row + i / 16u;
        let n = column + i % 16u;
        if m < p.M && n < p.N {
            y[m * p.LDY + p.Y0 + n] = y_tile[subgroup * 256u + i] + bias_and_lora(m, n);
        }
    }
}

/// y[m0..m0+64, n0..n0+64]; id below 128, subgroup below 4.
fn tile(m0: u32, n0: u32, id: u32, subgroup: u32) {
    // Eight columns of one row of each tile are this invocation's to bring in.
    let row = id / 2u;
    let first = id % 2u * 8u;
    let at = row * PITCH + first;
    let m = min(m0 + row, p.M - 1u);
    let n = min(n0 + row, p.N - 1u);
    // Where the subgroup's 32 rows and 32 columns begin in the tile.
    let sm = subgroup / 2u * 32u;
    let sn = subgroup % 2u * 32u;

    var acc00 = coop_mat16x16<f32, C>();
    var acc01 = coop_mat16x16<f32, C>();
    var acc10 = coop_mat16x16<f32, C>();
    var acc11 = coop_mat16x16<f32, C>();
    for (var k0 = 0u; k0 < p.K; k0 += STEP) {
        let k = k0 + first;
        for (var i = 0u; i < 8u; i++) {
            x_tile[at + i] = x1(m, k + i);
        }
        for (var i = 0u; i < 8u; i += 4u) {
            let w4 = vec4<f16>(weight4(n, min(k + i, (p.K - 1u) / 4u * 4u)));
            w_tile[at + i] = w4.x;
            w_tile[at + i + 1u] = w4.y;
            w_tile[at + i + 2u] = w4.z;
            w_tile[at + i + 3u] = w4.w;
        }
        workgroupBarrier();
        let a0 = coopLoadT<coop_mat16x16<f16, A>>(&x_tile[sm * PITCH], PITCH);
        let a1 = coopLoadT<coop_mat16x16<f16, A>>(&x_tile[(sm + 16u) * PITCH], PITCH);
        let b0 = coopLoad<coop_mat16x16<f16, B>>(&w_tile[sn * PITCH], PITCH);
        let b1 = coopLoad<coop_mat16x16<f16, B>>(&w_tile[(sn + 16u) * PITCH], PITCH);
        acc00 = coopMultiplyAdd(a0, b0, acc00);
        acc01 = coopMultiplyAdd(a0, b1, acc01);
        acc10 = coopMultiplyAdd(a1, b0, acc10);
        acc11 = coopMultiplyAdd(a1, b1, acc11);
        workgroupBarrier();
    }

    let out = subgroup * 256u;
    coopStoreT(acc00, &y_tile[out], 16u);
    workgroupBarrier();
    store(id, subgroup, m0 + sm, n0 + sn);
    workgroupBarrier();
    coopStoreT(acc01, &y_tile[out], 16u);
    workgroupBarrier();
    store(id, subgroup, m0 + sm, n0 + sn + 16u);
    workgroupBarrier();
    coopStoreT(acc10, &y_tile[out], 16u);
    workgroupBarrier();
    store(id, subgroup, m0 + sm + 16u, n0 + sn);
    workgroupBarrier();
    coopStoreT(acc11, &y_tile[out], 16u);
    workgroupBarrier();
    store(id, subgroup, m0 + sm + 16u, n0 + sn + 16u);
}
