// cosine_topk_naive: one query and split a group, one row an invocation, appended to the kernels of that name
//
//     for n0 in the split's rows, step ROWS:     score[n0 + lane] = q · row     then those that enter join the list

fn find(query: u32, split: u32, lane: u32) {
    let list = (query * p.S + split) * p.K;
    let end = split_start(split + 1u);
    begin_lists(query, lane);
    for (var n0 = split_start(split); n0 < end; n0 += ROWS) {
        let n = min(n0 + lane, p.N - 1u);
        var sum = Sum();
        for (var e = 0u; e < elements(); e++) {
            sum += product(row_element(n, e), query_element(query, e));
        }
        offer(0u, lane, n, n0 + lane < end && passes(n), score_of(sum, query, n));
        take_offered(list, n0, lane);
    }
    end_lists(list, 1u, lane);
}
