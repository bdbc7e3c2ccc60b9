// qmatmul_workgroup: how qmatmul kernels for few rows add up without subgroups     contract: src/ops/qmatmul/mod.rs

var<workgroup> partial: array<vec4<f32>, 64>;

/// Sixteen columns of y from `first` on, four for each team of 16 invocations: a tree adds what a team has summed.
fn columns_by_tree(first: u32, id: u32) {
    let lane = id % 16u;
    let n = first + id / 16u * 4u;
    let rows = min(vec4(n) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.N - 1u));
    for (var m = 0u; m < p.M; m++) {
        partial[id] = dot_rows(m, rows, lane, 16u);
        workgroupBarrier();
        for (var half = 8u; half > 0u; half /= 2u) {
            if lane < half {
                partial[id] += partial[id + half];
            }
            workgroupBarrier();
        }
        if lane < 4u && n + lane < p.N {
            y[m * p.LDY + p.Y0 + n + lane] = partial[id - lane][lane] + bias_and_lora(m, n + lane);
        }
        workgroupBarrier();
    }
}
