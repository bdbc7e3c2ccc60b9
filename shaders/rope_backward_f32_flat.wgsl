// rope_backward_f32_flat: dx = dy rotated back, head by head, by its position     contract: src/ops/rope_backward.rs
// grid   min(ceil(M*H*D/512), 65535)     block 256
// smem   0 B              features none
// reads  4MHD + 4M + 4MD B      writes 4MHD B       bound: memory
// idea   one pair of elements an invocation, i and i + D/2 of a head; a grid too short strides on

struct Params { M: u32, H: u32, D: u32, C: u32 }

@group(0) @binding(0) var<storage, read>       dy: array<f32>;       // [M,H*D]
@group(0) @binding(1) var<storage, read>       position: array<u32>; // [M]
@group(0) @binding(2) var<storage, read>       table: array<f32>;    // [C,D], cosines then sines
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;       // [M,H*D]
@group(0) @binding(4) var<uniform>             p: Params;

@compute @workgroup_size(256)
fn rope_backward_f32_flat(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(num_workgroups)       groups: vec3<u32>,
) {
    let half = p.D / 2u;
    for (var pair = id.x; pair < p.M * p.H * half; pair += groups.x * 256u) {
        let head = pair / half;                                      // of all rows' heads
        let i = pair - head * half;
        let turn = position[head / p.H] * p.D + i;
        let c = table[turn];
        let s = table[turn + half];
        let at = head * p.D + i;
        let a = dy[at];
        let b = dy[at + half];
        dx[at] = a * c + b * s;
        dx[at + half] = b * c - a * s;
    }
}
