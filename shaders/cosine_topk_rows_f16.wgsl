// cosine_topk_rows_f16: rows [N,D] in f16, four numbers an element, appended to the kernels that read them

@group(0) @binding(0) var<storage, read> q: array<f32>;                 // [Q,D]
@group(0) @binding(1) var<storage, read> rows: array<u32>;              // [N,D], two to a word
@group(0) @binding(2) var<storage, read> mask: array<u32>;              // [N/32*FILTER]
@group(0) @binding(3) var<storage, read> floor: array<u32>;             // [Q], bits
@group(0) @binding(4) var<storage, read_write> ids: array<u32>;         // [Q,S,K]
@group(0) @binding(5) var<storage, read_write> scores: array<u32>;      // [Q,S,K], bits
@group(0) @binding(6) var<uniform> p: Params;

alias Element = vec4<f32>;
alias Sum = f32;

fn elements() -> u32 {
    return (p.D + 3u) / 4u;
}

/// Four places of a row that begins at `at`, and which of them are within it.
fn places(at: u32, e: u32) -> vec4<u32> {
    return vec4(at) + min(vec4(4u * e) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.D - 1u));
}

fn within(e: u32) -> vec4<bool> {
    return vec4(4u * e) + vec4<u32>(0u, 1u, 2u, 3u) < vec4(p.D);
}

/// Zero beyond the row.
fn query_element(query: u32, e: u32) -> vec4<f32> {
    let at = places(query * p.D, e);
    return select(vec4<f32>(), vec4<f32>(q[at.x], q[at.y], q[at.z], q[at.w]), within(e));
}

/// Zero beyond the row.
fn row_element(n: u32, e: u32) -> vec4<f32> {
    let at = places(n * p.D, e);
    return select(vec4<f32>(), vec4<f32>(number(at.x), number(at.y), number(at.z), number(at.w)), within(e));
}

/// The i-th number of all rows, which may lie in either half of a word.
fn number(i: u32) -> f32 {
    let pair = unpack2x16float(rows[i / 2u]);
    return select(pair.x, pair.y, i % 2u == 1u);
}

fn product(a: vec4<f32>, b: vec4<f32>) -> f32 {
    return dot(a, b);
}

fn score_of(sum: f32, query: u32, n: u32) -> f32 {
    return sum;
}
