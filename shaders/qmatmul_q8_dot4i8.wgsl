// qmatmul_q8_dot4i8: y[M,N] = x[M,K] · deq(W[N,K])ᵀ + bias[N] + s·S·Bᵀ        contract: src/ops/qmatmul/mod.rs
// grid   ceil(N/16)        block 64 = 4 teams of 16, a team four rows of W
// smem   4608 B            features none
// reads  4MK + M·(NK + scales) B      writes 4MN B       bound: memory, while M is small
// idea   four products and sums of bytes are one instruction where an adapter has it, so codes meet x as bytes:
//        16 columns of x become integers X of 24 bits in units of their largest / BIG, split as 2¹⁶ a + 2⁸ b + c,
//        three bytes from −128 to 127, and Σ code·X = 2¹⁶ Σ code·a + 2⁸ Σ code·b + Σ code·c, all sums exact
// error  x is off by half a unit, at most u times the largest of its 16 columns, in place of u times itself

struct Params { M: u32, N: u32, K: u32, LDY: u32, Y0: u32, BIAS: u32, R: u32, G: u32, WIDE: u32, AFFINE: u32, s: f32 }

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;           // [M,K]
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;       // i8[N,K], sixteen at a time
@group(0) @binding(4) var<storage, read> bias: array<f32>;              // [BIAS*N]
@group(0) @binding(5) var<storage, read> lora_s: array<f32>;            // [M,R]
@group(0) @binding(6) var<storage, read> lora_b: array<f32>;            // [N,R]
@group(0) @binding(7) var<storage, read_write> y: array<f32>;           // [M,LDY]
@group(0) @binding(8) var<uniform> p: Params;

const COLUMNS = 1024u;                                                  // of x in workgroup memory
const BIG = 127.0 * 65536.0;                                            // the largest X: its first byte is 127
const TINY = 1e-25;                                                     // columns below it share its unit

var<workgroup> first: array<vec4<u32>, 64>;                             // a of 16 columns
var<workgroup> second: array<vec4<u32>, 64>;                            // b
var<workgroup> third: array<vec4<u32>, 64>;                             // c
var<workgroup> unit: array<f32, 64>;                                    // what X = 1 stands for
var<workgroup> total: array<f32, 64>;                                   // Σ x, for the mins
var<workgroup> partial: array<vec4<f32>, 64>;

@compute @workgroup_size(64)
fn qmatmul_q8_dot4i8(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) id: u32) {
    let lane = id % 16u;
    let n = group.x * 16u + id / 16u * 4u;
    let rows = min(vec4(n) + vec4<u32>(0u, 1u, 2u, 3u), vec4(p.N - 1u));
    for (var m = 0u; m < p.M; m++) {
        var sum = vec4<f32>();
        for (var k0 = 0u; k0 < p.K; k0 += COLUMNS) {
            if k0 + id * 16u < p.K {
                split((m * p.K + k0) / 4u + id * 4u, id);
            }
            workgroupBarrier();
            for (var chunk = lane; chunk < 64u && k0 + chunk * 16u < p.K; chunk += 16u) {
                let k = k0 + chunk * 16u;
                sum += vec4(dot16(rows.x, k, chunk), dot16(rows.y, k, chunk),
                    dot16(rows.z, k, chunk), dot16(rows.w, k, chunk));
            }
            workgroupBarrier();
        }

        // y = the sums of a team's lanes, in a tree
        partial[id] = sum;
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

/// Sixteen columns of x, from its vector `at` on, as chunk `chunk` of the bytes.
fn split(at: u32, chunk: u32) {
    let v = array(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
    // As integers the sizes of floats keep their order, and NaN is above all: it comes out again as the unit.
    let size = max(max(bits(v[0]), bits(v[1])), max(bits(v[2]), bits(v[3])));
    let largest = max(max(size.x, size.y), max(size.z, size.w));
    let scale = select(bitcast<f32>(largest), TINY, largest < bitcast<u32>(TINY));
    let inverse = BIG / scale;
    let i0 = vec4<i32>(round(v[0] * inverse));
    let i1 = vec4<i32>(round(v[1] * inverse));
    let i2 = vec4<i32>(round(v[2] * inverse));
    let i3 = vec4<i32>(round(v[3] * inverse));
    // Packing takes the low byte, a signed one; adding 128 before the shift carries what that sign took.
    third[chunk] = vec4(pack4xI8(i0), pack4xI8(i1), pack4xI8(i2), pack4xI8(i3));
    let j0 = (i0 + 128) >> vec4(8u);
    let j1 = (i1 + 128) >> vec4(8u);
    let j2 = (i2 + 128) >> vec4(8u);
    let j3 = (i3 + 128) >> vec4(8u);
    second[chunk] = vec4(pack4xI8(j0), pack4xI8(j1), pack4xI8(j2), pack4xI8(j3));
    first[chunk] = vec4(pack4xI8((j0 + 128) >> vec4(8u)), pack4xI8((j1 + 128) >> vec4(8u)),
        pack4xI8((j2 + 128) >> vec4(8u)), pack4xI8((j3 + 128) >> vec4(8u)));
    unit[chunk] = scale / BIG;
    let sums = (v[0] + v[1]) + (v[2] + v[3]);
    total[chunk] = (sums.x + sums.y) + (sums.z + sums.w);
}

/// |v| as integers.
fn bits(v: vec4<f32>) -> vec4<u32> {
    return bitcast<vec4<u32>>(abs(v));
}

/// W[n,k..k+16] · x, whose bytes are chunk `chunk`: one group, as G is a multiple of 16.
fn dot16(n: u32, k: u32, chunk: u32) -> f32 {
    let i = n * p.K + k;
    let w = codes[i / 16u];
    // At most 2^18 each: the lower two together fit 27 bits.
    let high = dot4(w, first[chunk]);
    let low = dot4(w, second[chunk]) * 256 + dot4(w, third[chunk]);
    let product = fma(f32(high), 65536.0, f32(low)) * unit[chunk];
    return fma(group_scale(i / p.G), product, group_min(i / p.G) * total[chunk]);
}

/// Σ of sixteen products of bytes.
fn dot4(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return (dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y)) + (dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w));
}
