// cross_entropy_f32_workgroup: loss[M] of logits[M,V], their gradient in place     contract: src/ops/cross_entropy.rs
// grid   M                block 256 = one row
// smem   1024 B           features none
// reads  8MV + 4M B       writes 4MV + 4M B       bound: memory
// idea   one pass for the largest logit and the sum of exp under it, rescaled where a larger one comes; trees in
//        workgroup memory join them; a second pass writes over what the invocation itself has read
//        source: Milakov & Gimelshein, arXiv 1805.02867

struct Params { M: u32, V: u32, scale: f32 }

@group(0) @binding(0) var<storage, read_write> logits: array<f32>;  // [M,V]
@group(0) @binding(1) var<storage, read>       label: array<u32>;   // [M]
@group(0) @binding(2) var<storage, read_write> loss: array<f32>;    // [M]
@group(0) @binding(3) var<uniform>             p: Params;

const WIDTH: u32 = 256u;                                            // a power of two
var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn cross_entropy_f32_workgroup(
    @builtin(workgroup_id)           group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x * p.V;
    let answer = label[group.x];
    let counted = answer < p.V;
    let at_label = logits[row + min(answer, p.V - 1u)];              // before anyone writes

    // largest, and total = Σ exp(x − largest), over v = lane, lane + WIDTH, … < V
    var largest = -3e38;
    var total = 0.0;
    for (var v = lane; v < p.V; v += WIDTH) {
        let x = logits[row + v];
        let e = exact_exp(-abs(x - largest));
        total = select(total + e, fma(total, e, 1.0), x > largest);
        largest = max(largest, x);
    }

    // tree: the row's largest
    partial[lane] = largest;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] = max(partial[lane], partial[lane + half]);
        }
        workgroupBarrier();
    }
    let top = partial[0];
    workgroupBarrier();

    // tree: the row's total
    partial[lane] = total * exact_exp(largest - top);
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }

    if lane == 0u {
        loss[group.x] = select(0.0, (top - at_label) + exact_ln(partial[0]), counted);
    }
    let share = select(0.0, exact_divide(p.scale, partial[0]), counted);
    let hit = select(0.0, p.scale, counted);
    for (var v = lane; v < p.V; v += WIDTH) {
        logits[row + v] = fma(share, exact_exp(logits[row + v] - top), -select(0.0, hit, v == answer));
    }
}
