// cosine_topk_lists: lists of the K best, in the place of the outputs, appended to the kernels of that name
//
//     offered[q][i] = key of the score of row n0 + i, or NOTHING where the row does not enter query q's list
//     for each query that is offered something:
//         rank the new by comparing all with all; the place of each in the list by bisection
//         move what stands behind the first of them, the last places first; then put the new in
//
// A key orders as its score does and −0 equals 0: integers are compared, so that infinities and denormal numbers are
// what they are on every device. The order in which rows come does not matter, since (key, id) is a total order.
//
// The kernel says how many there are: QUERIES and ROWS that meet at once, WIDTH invocations.

const NOTHING = 0u;                                                     // below the key of −∞
const NO_ROW = 0xFFFFFFFFu;

var<workgroup> offered: array<u32, QUERIES * ROWS>;
var<workgroup> asking: atomic<u32>;                                     // bit q: query q is offered something
var<workgroup> turn: u32;                                               // the same, for all to see
var<workgroup> filled: array<u32, QUERIES>;                             // places of each list that are
var<workgroup> last_key: array<u32, QUERIES>;                           // what a row must come before: the floor,
var<workgroup> last_id: array<u32, QUERIES>;                            // later the last of a full list
var<workgroup> fresh: u32;                                              // how many are new in a list
var<workgroup> fresh_key: array<u32, ROWS>;                             // in order
var<workgroup> fresh_id: array<u32, ROWS>;
var<workgroup> fresh_after: array<u32, ROWS>;                           // how many of the old stand before each

/// Of a score's bits: larger where the score is.
fn key_of(bits: u32) -> u32 {
    let number = select(bits, 0u, bits == 0x80000000u);
    return select(number | 0x80000000u, ~number, number >= 0x80000000u);
}

/// The score's bits again.
fn bits_of(key: u32) -> u32 {
    return select(~key, key & 0x7FFFFFFFu, key >= 0x80000000u);
}

/// The first row of a split; N after the last.
fn split_start(split: u32) -> u32 {
    return min(split * ((p.N + p.S - 1u) / p.S), p.N);
}

fn passes(n: u32) -> bool {
    if p.FILTER == 0u {
        return true;
    }
    return ((mask[n / 32u] >> (n % 32u)) & 1u) == 1u;
}

/// Empty lists of the queries from `query0` on.
fn begin_lists(query0: u32, lane: u32) {
    for (var j = lane; j < QUERIES; j += WIDTH) {
        filled[j] = 0u;
        last_key[j] = key_of(floor[min(query0 + j, p.Q - 1u)]);
        last_id[j] = NO_ROW;
    }
    if lane == 0u {
        atomicStore(&asking, 0u);
    }
    workgroupBarrier();
}

/// Row `n`, the i-th that meet, for query `j` of the lists; where it does not count, NOTHING is offered.
fn offer(j: u32, i: u32, n: u32, counts: bool, score: f32) {
    let key = key_of(bitcast<u32>(score));
    let last = last_key[j];
    let enters = counts && (key > last || (key == last && p.BASE + n < last_id[j]));
    offered[j * ROWS + i] = select(NOTHING, key, enters);
    if enters {
        atomicOr(&asking, 1u << j);
    }
}

/// All that was offered enters the lists, which are S·K places apart from `list` on; `n0` is the first row that met.
fn take_offered(list: u32, n0: u32, lane: u32) {
    workgroupBarrier();
    if lane == 0u {
        turn = atomicExchange(&asking, 0u);
    }
    var left = workgroupUniformLoad(&turn);
    while left != 0u {
        let j = countTrailingZeros(left);
        left &= left - 1u;
        take(j, list + j * p.S * p.K, n0, lane);
    }
}

/// How many of the first `held` places at `list` come before this row.
fn places_before(list: u32, held: u32, key: u32, id: u32) -> u32 {
    var low = 0u;
    var high = held;
    while low < high {
        let middle = (low + high) / 2u;
        let other = key_of(scores[list + middle]);
        if other > key || (other == key && ids[list + middle] < id) {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    return low;
}

/// What is offered to query `j` enters its list.
fn take(j: u32, list: u32, n0: u32, lane: u32) {
    let held = workgroupUniformLoad(&filled[j]);

    // fresh.. = the new in order
    for (var i = lane; i < ROWS; i += WIDTH) {
        let key = offered[j * ROWS + i];
        if key != NOTHING {
            var rank = 0u;
            for (var other = 0u; other < ROWS; other++) {
                let its = offered[j * ROWS + other];
                rank += select(0u, 1u, its > key || (its == key && other < i));
            }
            let id = p.BASE + n0 + i;
            fresh_key[rank] = key;
            fresh_id[rank] = id;
            fresh_after[rank] = places_before(list, held, key, id);
        }
    }
    if lane == 0u {
        var count = 0u;
        for (var i = 0u; i < ROWS; i++) {
            count += select(0u, 1u, offered[j * ROWS + i] != NOTHING);
        }
        fresh = count;
    }
    workgroupBarrier();
    let added = workgroupUniformLoad(&fresh);
    let first = workgroupUniformLoad(&fresh_after[0]);

    // the old from place `first` on move up by as many places as new ones come before them
    for (var top = held; top > first; top = max(top, WIDTH) - WIDTH) {
        var to = p.K;
        var score = 0u;
        var id = 0u;
        if first + lane < top {
            let i = top - 1u - lane;
            var low = 1u;
            var high = added;
            while low < high {
                let middle = (low + high) / 2u;
                if fresh_after[middle] <= i {
                    low = middle + 1u;
                } else {
                    high = middle;
                }
            }
            to = i + low;
            score = scores[list + i];
            id = ids[list + i];
        }
        storageBarrier();
        if to < p.K {
            scores[list + to] = score;
            ids[list + to] = id;
        }
    }

    for (var i = lane; i < added; i += WIDTH) {
        let to = fresh_after[i] + i;
        if to < p.K {
            scores[list + to] = bits_of(fresh_key[i]);
            ids[list + to] = fresh_id[i];
        }
    }
    storageBarrier();
    if lane == 0u {
        filled[j] = min(held + added, p.K);
        if held + added >= p.K {
            last_key[j] = key_of(scores[list + p.K - 1u]);
            last_id[j] = ids[list + p.K - 1u];
        }
    }
    workgroupBarrier();
}

/// Marks the places that nothing fills, of the lists of the first `queries` queries.
fn end_lists(list: u32, queries: u32, lane: u32) {
    for (var j = 0u; j < min(queries, QUERIES); j++) {
        for (var i = filled[j] + lane; i < p.K; i += WIDTH) {
            scores[list + j * p.S * p.K + i] = 0xFF800000u;
            ids[list + j * p.S * p.K + i] = NO_ROW;
        }
    }
}
