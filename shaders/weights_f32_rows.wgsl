// weights_f32_rows: eight rows of W in f32, four columns an invocation; for qmatmul_t_broadcast

@group(0) @binding(1) var<storage, read> w: array<vec4<f32>>;           // [N,K]

fn read_rows(n: u32, k0: u32, lane: u32) -> Rows {
    let step = p.K / 4u;
    let i = n * step + k0 / 4u + lane;
    return Rows(
        w[i], w[i + step], w[i + 2u * step], w[i + 3u * step],
        w[i + 4u * step], w[i + 5u * step], w[i + 6u * step], w[i + 7u * step],
    );
}
