// coopmat: cooperative matrices in plain WGSL, for the test that stands in for an adapter with them. A matrix to load is
// where it begins in its tile; a sum is spread over 32 invocations, of each eight consecutive elements of a row.

var<private> LANE: u32;

struct Sum { v: array<f32, 8> }

/// c + x_tile[a..] · w_tile[b..]ᵀ.
fn multiply_add(a: u32, b: u32, c: Sum) -> Sum {
    var sum = c;
    for (var i = 0u; i < 8u; i++) {
        let e = LANE * 8u + i;
        for (var k = 0u; k < 16u; k++) {
            sum.v[i] += f32(x_tile[a + e / 16u * PITCH + k]) * f32(w_tile[b + e % 16u * PITCH + k]);
        }
    }
    return sum;
}

fn put(sum: Sum, at: u32) {
    var of_lane = sum;
    for (var i = 0u; i < 8u; i++) {
        y_tile[at + LANE * 8u + i] = of_lane.v[i];
    }
}
