// qmatmul_tail: what follows the sum over K, appended to the qmatmul kernels     contract: src/ops/qmatmul/mod.rs

/// bias[n] + s · S[m,R] · B[n,R]ᵀ; neither where BIAS and R are 0.
fn bias_and_lora(m: u32, n: u32) -> f32 {
    var sum = 0.0;
    for (var r = 0u; r < p.R; r++) {
        sum = fma(lora_s[m * p.R + r], lora_b[n * p.R + r], sum);
    }
    sum *= p.s;
    if p.BIAS == 1u {
        sum += bias[n];
    }
    return sum;
}
