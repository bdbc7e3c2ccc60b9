// qmatmul_naive: one output of the qmatmul kernels, as the formula says     contract: src/ops/qmatmul/mod.rs

/// y[m,Y0+n]; nothing where W has no row n.
fn one_output(m: u32, n: u32) {
    if n >= p.N {
        return;
    }
    var sum = 0.0;
    for (var k = 0u; k < p.K; k++) {
        sum = fma(x[m * p.K + k], weight(n, k), sum);
    }
    y[m * p.LDY + p.Y0 + n] = sum + bias_and_lora(m, n);
}
