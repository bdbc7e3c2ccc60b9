// soil: workgroup memory full of NaN, and y[N] = 0

struct Params { N: u32 }

@group(0) @binding(0) var<storage, read_write> y: array<u32>;       // [N]
@group(0) @binding(1) var<uniform>             p: Params;

var<workgroup> words: array<u32, 4096>;

@compute @workgroup_size(64)
fn soil(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var i = lane; i < 4096u; i += 64u) {
        words[i] = 0xffffffffu;
    }
    workgroupBarrier();
    // What is never read may never be written: every word counts.
    var all = 0xffffffffu;
    for (var i = lane; i < 4096u; i += 64u) {
        all &= words[4095u - i];
    }
    y[min(group.x, p.N - 1u)] = all + 1u;
}
