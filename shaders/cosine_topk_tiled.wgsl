// cosine_topk_tiled: QUERIES queries by ROWS rows at a time, appended to the kernels that compute so
//
//     for n0 in the split's rows, step ROWS:
//         for e0 in the elements of a row, step STEP:     an element is four numbers, or sixteen codes
//             tiles = the elements e0 .. e0 + STEP of these queries and rows
//             sum[row][query] += their products           4 x 4 an invocation
//         those that enter join the lists
//
// Element e of row r of a tile lies at [e][r ^ 2e]: eight neighbours that write four elements of two rows meet all
// banks, and so do eight that read one element of eight rows.

const STEP: u32 = 4u;
var<workgroup> q_tile: array<Element, STEP * QUERIES>;
var<workgroup> row_tile: array<Element, STEP * ROWS>;

/// The products of one row with four queries.
fn products(row: Element, a: Element, b: Element, c: Element, d: Element) -> vec4<Sum> {
    return vec4<Sum>(product(row, a), product(row, b), product(row, c), product(row, d));
}

/// One row, the i-th of the tile, is offered to four lists, as far as they exist.
fn offer4(j: u32, i: u32, n0: u32, end: u32, query0: u32, sum: vec4<Sum>) {
    let n = min(n0 + i, p.N - 1u);
    let counts = n0 + i < end && passes(n);
    for (var k = 0u; k < 4u; k++) {
        let query = query0 + j + k;
        offer(j + k, i, n, counts && query < p.Q, score_of(sum[k], min(query, p.Q - 1u), n));
    }
}

fn find(query0: u32, split: u32, lane: u32) {
    let list = (query0 * p.S + split) * p.K;
    let end = split_start(split + 1u);
    // This invocation's queries j .. j + 3, and rows i + ROWS / 4 · 0, 1, 2, 3.
    let j = lane / (ROWS / 4u) * 4u;
    let i = lane % (ROWS / 4u);
    begin_lists(query0, lane);
    for (var n0 = split_start(split); n0 < end; n0 += ROWS) {
        var a = vec4<Sum>();
        var b = vec4<Sum>();
        var c = vec4<Sum>();
        var d = vec4<Sum>();
        for (var e0 = 0u; e0 < elements(); e0 += STEP) {
            workgroupBarrier();
            for (var at = lane; at < STEP * QUERIES; at += WIDTH) {
                let e = at % STEP;
                q_tile[e * QUERIES + (at / STEP ^ (2u * e))] = query_element(min(query0 + at / STEP, p.Q - 1u), e0 + e);
            }
            for (var at = lane; at < STEP * ROWS; at += WIDTH) {
                let e = at % STEP;
                row_tile[e * ROWS + (at / STEP ^ (2u * e))] = row_element(min(n0 + at / STEP, p.N - 1u), e0 + e);
            }
            workgroupBarrier();
            for (var e = 0u; e < STEP; e++) {
                let qa = q_tile[e * QUERIES + (j ^ (2u * e))];
                let qb = q_tile[e * QUERIES + ((j + 1u) ^ (2u * e))];
                let qc = q_tile[e * QUERIES + ((j + 2u) ^ (2u * e))];
                let qd = q_tile[e * QUERIES + ((j + 3u) ^ (2u * e))];
                let row = e * ROWS + (i ^ (2u * e));
                a += products(row_tile[row], qa, qb, qc, qd);
                b += products(row_tile[row + ROWS / 4u], qa, qb, qc, qd);
                c += products(row_tile[row + ROWS / 2u], qa, qb, qc, qd);
                d += products(row_tile[row + ROWS / 4u * 3u], qa, qb, qc, qd);
            }
        }
        offer4(j, i, n0, end, query0, a);
        offer4(j, i + ROWS / 4u, n0, end, query0, b);
        offer4(j, i + ROWS / 2u, n0, end, query0, c);
        offer4(j, i + ROWS / 4u * 3u, n0, end, query0, d);
        take_offered(list, n0, lane);
    }
    end_lists(list, p.Q - query0, lane);
}
