// rope_f32_vec4: y = x rotated, head by head, by its row's position     contract: src/ops/rope.rs
// grid   min(ceil(M*H*D/2048), 65535)     block 256
// smem   0 B              features none
// reads  4MHD + 4M + 4MD B      writes 4MHD B       bound: memory
// idea   four pairs of elements an invocation, where half a head is a multiple of four

struct Params { M: u32, H: u32, D: u32, C: u32 }

@group(0) @binding(0) var<storage, read>       x: array<vec4<f32>>;        // [M,H*D]
@group(0) @binding(1) var<storage, read>       position: array<u32>;       // [M]
@group(0) @binding(2) var<storage, read>       table: array<vec4<f32>>;    // [C,D], cosines then sines
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;        // [M,H*D]
@group(0) @binding(4) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn rope_f32_vec4(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    let half = p.D / 8u;                                                   // in vectors
    for (var pair = id.x; pair < p.M * p.H * half; pair += groups.x * 256u) {
        let head = pair / half;                                            // of all rows' heads
        let i = pair - head * half;
        let turn = position[head / p.H] * 2u * half + i;
        let c = table[turn];
        let s = table[turn + half];
        let at = head * 2u * half + i;
        let a = x[at];
        let b = x[at + half];
        y[at] = a * c - b * s;
        y[at + half] = b * c + a * s;
    }
}
