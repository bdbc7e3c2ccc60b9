// qmatmul_t_naive: one element of dx, appended to the kernels of that name     contract: src/ops/qmatmul_t/mod.rs

/// dx[m,k]: over the rows of W, then over those of A, then what it held before where that counts.
fn element(m: u32, k: u32) {
    let at = m * p.K + k;
    var sum = 0.0;
    for (var n = 0u; n < p.N; n++) {
        sum = fma(dy[m * p.LDY + p.Y0 + n], weight(n, k), sum);
    }
    for (var r = 0u; r < p.R; r++) {
        sum = fma(ds[m * p.R + r], lora_a[r * p.K + k], sum);
    }
    if p.ACC == 1u {
        sum += dx[at];
    }
    dx[at] = sum;
}
