// cosine_topk_rows_i8: rows of codes, sixteen an element, and scales, appended to the kernels that read them

@group(0) @binding(0) var<storage, read> q: array<vec4<u32>>;           // i8[Q,D/16*16], sixteen at a time
@group(0) @binding(1) var<storage, read> q_scales: array<f32>;          // [Q]
@group(0) @binding(2) var<storage, read> rows: array<vec4<u32>>;        // i8[N,D/16*16], sixteen at a time
@group(0) @binding(3) var<storage, read> scales: array<f32>;            // [N]
@group(0) @binding(4) var<storage, read> mask: array<u32>;              // [N/32*FILTER]
@group(0) @binding(5) var<storage, read> floor: array<u32>;             // [Q], bits
@group(0) @binding(6) var<storage, read_write> ids: array<u32>;         // [Q,S,K]
@group(0) @binding(7) var<storage, read_write> scores: array<u32>;      // [Q,S,K], bits
@group(0) @binding(8) var<uniform> p: Params;

alias Element = vec4<u32>;
alias Sum = i32;

fn elements() -> u32 {
    return (p.D + 15u) / 16u;
}

/// Zero beyond the row.
fn query_element(query: u32, e: u32) -> vec4<u32> {
    let width = elements();
    return select(vec4<u32>(), q[query * width + min(e, width - 1u)], e < width);
}

/// Zero beyond the row.
fn row_element(n: u32, e: u32) -> vec4<u32> {
    let width = elements();
    return select(vec4<u32>(), rows[n * width + min(e, width - 1u)], e < width);
}

/// Sixteen products of codes; a row's sum fits 32 bits up to D = 133,152.
fn product(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return (dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y)) + (dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w));
}

fn score_of(sum: i32, query: u32, n: u32) -> f32 {
    return f32(sum) * (q_scales[query] * scales[n]);
}
