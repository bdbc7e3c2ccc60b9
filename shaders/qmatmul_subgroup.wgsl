// qmatmul_subgroup: how qmatmul kernels for few rows add up by subgroups     contract: src/ops/qmatmul/mod.rs

/// Sixteen columns of y from `first` on, four at a time for each subgroup of `size` invocations.
fn columns_by_subgroups(first: u32, subgroup: u32, subgroups: u32, size: u32, lane: u32) {
    // A subgroup may be wider than the workgroup.
    let width = min(size, 64u);
    for (var quad = subgroup; quad < 4u; quad += subgroups) {
        let n = first + quad * 4u;
        let rows = min(vec4(n) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.N - 1u));
        for (var m = 0u; m < p.M; m++) {
            let sum = subgroupAdd(dot_rows(m, rows, lane, width));
            if lane < 4u && n + lane < p.N {
                y[m * p.LDY + p.Y0 + n + lane] = sum[lane] + bias_and_lora(m, n + lane);
            }
        }
    }
}
