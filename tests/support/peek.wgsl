// peek: y[N] = how many words of a group's memory, which it has not written, are those of soil

struct Params { N: u32 }

@group(0) @binding(0) var<storage, read_write> y: array<u32>;       // [N]
@group(0) @binding(1) var<uniform>             p: Params;

var<workgroup> words: array<u32, 4096>;

@compute @workgroup_size(64)
fn peek(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if lane == 0u {
        var count = 0u;
        for (var i = 0u; i < 4096u; i++) {
            count += select(0u, 1u, words[i] == 0xffffffffu);
        }
        y[group.x] = count;
    }
}
