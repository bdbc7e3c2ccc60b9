// qmatmul_gemv: four rows of W times one of x, a chunk of 32 columns at a time, appended to subgroup and workgroup
//
//     for c in first, first + step, .. < K/32:  sum[i] += W[n_i, 32c..32c+32] · x[m, 32c..32c+32]
//
// Neighbours read neighbouring 16 bytes of each row, and four rows share what is read of x. A row of W comes from
// memory once and from cache for every further m.

fn dot_rows(m: u32, n: vec4<u32>, first: u32, step: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var c = first; c < p.K / 32u; c += step) {
        let w = read_chunk(n, c);
        let at = m * (p.K / 4u) + c * 8u;
        sum = add(sum, x[at], x[at + 1u], decode_eight(w, 0u));
        sum = add(sum, x[at + 2u], x[at + 3u], decode_eight(w, 1u));
        sum = add(sum, x[at + 4u], x[at + 5u], decode_eight(w, 2u));
        sum = add(sum, x[at + 6u], x[at + 7u], decode_eight(w, 3u));
    }
    return sum;
}
