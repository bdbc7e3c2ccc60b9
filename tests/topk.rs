//! Exact search: hits against a plain reference, on every device that has kernels; their proof; files of vectors; the
//! command.

#[path = "topk/command.rs"]
mod command;
#[path = "topk/files.rs"]
mod files;
#[path = "topk/kernels.rs"]
mod kernels;

use std::sync::Arc;

use half::f16;
use handmill::device::{self, cpu::Cpu, wgpu, Device};
use handmill::op::Simd;
use handmill::ops::cosine_topk::{COSINE_TOPK_F32, TOPK_MERGE};
use handmill::retrieve::topk::{search, Codes, Corpus, Effort, Exact, Hit, Rows, Searcher};
use handmill::tensor::Dtype;
use handmill::verify::normal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The CPU at every width of vectors, and each other device that has kernels of the op.
fn devices() -> Vec<(String, Arc<dyn Device>)> {
    let mut all: Vec<(String, Arc<dyn Device>)> = Vec::new();
    for simd in [Simd::Portable, Simd::Avx2, Simd::Avx512] {
        all.push((format!("cpu {simd:?}"), Arc::new(Cpu::with_simd(simd))));
    }
    all.push(("cpu".into(), Arc::new(Cpu::new())));
    let mut others = vec!["ptx-sim".to_string()];
    others.extend(wgpu::list().into_iter().filter(|listed| listed.reason.is_none()).map(|listed| listed.id));
    for id in others {
        let device = device::open(&id).unwrap();
        let (scan, merge) = (COSINE_TOPK_F32.dims(&[1, 4096, 8, 10, 4, 0, 0], &[]), TOPK_MERGE.dims(&[1, 4, 10], &[]));
        let runs = COSINE_TOPK_F32.choose(&scan, Dtype::F32, device.caps()).is_some()
            && TOPK_MERGE.choose(&merge, Dtype::F32, device.caps()).is_some();
        if runs {
            all.push((id, device));
        }
    }
    all
}

/// Vectors of unit norm.
fn unit(rng: &mut ChaCha8Rng, count: usize, d: usize) -> Vec<f32> {
    let mut all = Vec::with_capacity(count * d);
    for _ in 0..count {
        let row: Vec<f64> = (0..d).map(|_| normal(rng)).collect();
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        all.extend(row.iter().map(|v| (v / norm) as f32));
    }
    all
}

/// The definition, in plain words: every score, sorted.
fn reference(rows: &[f32], d: usize, query: &[f32], k: usize, allowed: impl Fn(usize) -> bool) -> Vec<Hit> {
    let mut all = Vec::new();
    for (n, row) in rows.chunks(d).enumerate().filter(|(n, _)| allowed(*n)) {
        let mut sum = 0.0f64;
        for i in 0..d {
            sum += query[i] as f64 * row[i] as f64;
        }
        all.push(Hit { row: n as u32, score: sum as f32 });
    }
    all.sort_by(|a, b| b.score.partial_cmp(&a.score).unwrap().then(a.row.cmp(&b.row)));
    all.truncate(k);
    all
}

/// Bits of hits, so that every comparison is of all of them; −0 is 0.
fn bits(hits: &[Vec<Hit>]) -> Vec<Vec<(u32, u32)>> {
    hits.iter().map(|hits| hits.iter().map(|hit| (hit.row, (hit.score + 0.0).to_bits())).collect()).collect()
}

/// Sets of rows that are hard on a selection, with queries.
fn sets() -> Vec<(&'static str, usize, Vec<f32>, Vec<f32>)> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let d = 24;
    let direction = unit(&mut rng, 1, d);
    let queries = [direction.clone(), unit(&mut rng, 6, d)].concat();
    let random = unit(&mut rng, 3000, d);

    let equal = direction.repeat(2500);
    // Each row nearer to the first query than the one before.
    let mut ascending: Vec<Vec<f32>> = random.chunks(d).map(<[f32]>::to_vec).collect();
    let score = |row: &Vec<f32>| row.iter().zip(&direction).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    ascending.sort_by(|a, b| score(a).total_cmp(&score(b)));
    let mut descending = ascending.clone();
    descending.reverse();
    let mut copies = random.clone();
    for n in (0..3000).filter(|n| n % 3 != 0) {
        copies.copy_within((n / 40) * d..(n / 40 + 1) * d, n * d);
    }
    // All rows the same but for one unit in the last place of one element.
    let mut near = equal.clone();
    for (n, row) in near.chunks_mut(d).enumerate() {
        let i = n % d;
        row[i] = if n % 2 == 0 { row[i].next_up() } else { row[i].next_down() };
    }
    // Rows and a query of which most products are below the normal range of f32.
    let mut small: Vec<f32> = (0..2000 * d).map(|_| (normal(&mut rng) * 1e-38) as f32).collect();
    small.chunks_mut(d).step_by(97).for_each(|row| row[0] = 1.0);
    let mut small_queries: Vec<f32> = (0..7 * d).map(|_| (normal(&mut rng) * 1e-30) as f32).collect();
    small_queries[..d].fill(1e-40);
    vec![
        ("random", d, random, queries.clone()),
        ("all equal", d, equal, queries.clone()),
        ("ascending", d, ascending.concat(), queries.clone()),
        ("descending", d, descending.concat(), queries.clone()),
        ("copies", d, copies, queries.clone()),
        ("a unit in the last place apart", d, near, queries),
        ("denormal", d, small, small_queries),
    ]
}

#[test]
fn hits_are_the_reference_s() {
    let devices = devices();
    for (what, d, rows, queries) in sets() {
        let halves: Vec<f16> = rows.iter().map(|v| f16::from_f32(*v)).collect();
        let widened: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
        let codes = Codes::quantize(d, Exact::F32(&rows));
        let half_codes = Codes::quantize(d, Exact::F16(&halves));
        let formats = [
            ("f32", Rows::F32(&rows), &rows),
            ("f16", Rows::F16(&halves), &widened),
            ("i8", Rows::I8 { codes: &codes, exact: Exact::F32(&rows) }, &rows),
            ("i8 of f16", Rows::I8 { codes: &half_codes, exact: Exact::F16(&halves) }, &widened),
        ];
        for (format, stored, values) in formats {
            for k in [1, 10, 200] {
                let expected: Vec<Vec<Hit>> = queries.chunks(d).map(|q| reference(values, d, q, k, |_| true)).collect();
                for (name, device) in &devices {
                    let found = search(&**device, &Corpus { d, rows: stored }, &queries, k, None).unwrap();
                    assert_eq!(bits(&found), bits(&expected), "{what}, {format}, k {k}, on {name}");
                }
            }
        }
    }
}

#[test]
fn the_same_bits_for_any_batch_on_every_device() {
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    for (what, d, rows, few) in sets() {
        let rows = &rows[..320 * d];
        // The set's own queries are spread among others.
        let mut queries = unit(&mut rng, 64, d);
        few.chunks(d).enumerate().for_each(|(i, query)| queries[i * 9 * d..(i * 9 + 1) * d].copy_from_slice(query));
        let expected: Vec<Vec<Hit>> = queries.chunks(d).map(|query| reference(rows, d, query, 10, |_| true)).collect();
        let codes = Codes::quantize(d, Exact::F32(rows));
        for stored in [Rows::F32(rows), Rows::I8 { codes: &codes, exact: Exact::F32(rows) }] {
            for (name, device) in &devices() {
                let searcher = Searcher::new(&**device, Corpus { d, rows: stored }).unwrap();
                for batch in [1, 7, 64] {
                    let search = |some: &[f32]| searcher.search(some, 10, None).unwrap().0;
                    let found: Vec<Vec<Hit>> = queries.chunks(batch * d).flat_map(search).collect();
                    assert_eq!(bits(&found), bits(&expected), "{what}, batches of {batch}, on {name}");
                }
            }
        }
    }
}

#[test]
fn the_same_bits_for_any_batch_and_threads() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    // Enough rows that the first ones are scanned on their own, to give a floor.
    let (d, n) = (16, 40_000);
    let (mut rows, queries) = (unit(&mut rng, n, d), unit(&mut rng, 64, d));
    rows.copy_within(0..d * 100, d * 39_000);
    let codes = Codes::quantize(d, Exact::F32(&rows));
    let device = Cpu::new();
    let filter: Vec<u32> = (0..n.div_ceil(32)).map(|_| rng.random::<u32>() | rng.random::<u32>()).collect();
    let allowed = |row: usize| filter[row / 32] >> (row % 32) & 1 == 1;
    let expected: Vec<Vec<Hit>> = queries.chunks(d).map(|query| reference(&rows, d, query, 37, allowed)).collect();
    for stored in [Rows::F32(&rows), Rows::I8 { codes: &codes, exact: Exact::F32(&rows) }] {
        let corpus = Corpus { d, rows: stored };
        let searcher = Searcher::new(&device, corpus).unwrap();
        for batch in [1, 7, 64] {
            for threads in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let search = |some: &[f32]| searcher.search(some, 37, Some(&filter)).unwrap().0;
                let found: Vec<Vec<Hit>> = pool.install(|| queries.chunks(batch * d).flat_map(search).collect());
                assert_eq!(bits(&found), bits(&expected), "batches of {batch} on {threads} threads");
            }
        }
    }
}

#[test]
fn rows_that_pass_through_give_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(19);
    // An odd width: devices see 36, 40 and 48 elements.
    let (d, n, k) = (33, 1000, 12);
    let (mut rows, queries) = (unit(&mut rng, n, d), unit(&mut rng, 11, d));
    rows.copy_within(0..d * 40, d * 950);
    let halves: Vec<f16> = rows.iter().map(|v| f16::from_f32(*v)).collect();
    let widened: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
    let codes = Codes::quantize(d, Exact::F32(&rows));
    // Limits that a few rows fit in, then about half of them, then all; codes that all stay, rows that pass.
    let formats = [
        ("f32", Rows::F32(&rows), &rows, [15_000, 60_000, 150_000]),
        ("f16", Rows::F16(&halves), &widened, [8_000, 30_000, 100_000]),
        ("i8", Rows::I8 { codes: &codes, exact: Exact::F32(&rows) }, &rows, [30_000, 60_000, 100_000]),
    ];
    for (name, device) in devices().into_iter().filter(|(name, _)| !name.starts_with("cpu")) {
        for (format, stored, values, limits) in formats {
            let expected: Vec<Vec<Hit>> = queries.chunks(d).map(|q| reference(values, d, q, k, |_| true)).collect();
            for limit in limits {
                let corpus = Corpus { d, rows: stored };
                let searcher = Searcher::within(&*device, corpus, limit).unwrap();
                for batch in [1, 7, 11] {
                    let search = |some: &[f32]| searcher.search(some, k, None).unwrap().0;
                    let found: Vec<Vec<Hit>> = queries.chunks(batch * d).flat_map(search).collect();
                    assert_eq!(bits(&found), bits(&expected), "{format} in {limit} bytes, {batch} a batch, on {name}");
                }
            }
        }
        let refused = Searcher::within(&*device, Corpus { d, rows: Rows::F32(&rows) }, 5000);
        assert!(refused.err().unwrap().to_string().contains("5000 bytes of the device's memory are too few"), "{name}");
    }
}

#[test]
fn most_places_and_fewer_rows() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let d = 8;
    let rows = unit(&mut rng, 9000, d);
    let queries = unit(&mut rng, 2, d);
    let device = Cpu::new();
    for (n, k) in [(9000, 2048), (2048, 2048), (2049, 2047), (33, 2048), (1, 1), (1, 5), (0, 3)] {
        let rows = &rows[..n * d];
        let found = search(&device, &Corpus { d, rows: Rows::F32(rows) }, &queries, k, None).unwrap();
        let expected: Vec<Vec<Hit>> = queries.chunks(d).map(|query| reference(rows, d, query, k, |_| true)).collect();
        assert_eq!(bits(&found), bits(&expected), "{k} of {n}");
    }
    let nothing = vec![0; 9000usize.div_ceil(32)];
    let found = search(&device, &Corpus { d, rows: Rows::F32(&rows) }, &queries, 3, Some(&nothing)).unwrap();
    assert!(found.len() == 2 && found.iter().all(Vec::is_empty), "a filter that leaves nothing");
    let found = search(&device, &Corpus { d, rows: Rows::F32(&rows) }, &[], 3, None).unwrap();
    assert!(found.is_empty(), "no queries");
}

#[test]
fn codes_that_cannot_tell_are_widened_until_proven() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let d = 64;
    let search = |rows: &[f32], query: &[f32]| -> Effort {
        let codes = Codes::quantize(d, Exact::F32(rows));
        let corpus = Corpus { d, rows: Rows::I8 { codes: &codes, exact: Exact::F32(rows) } };
        let device = Cpu::new();
        let (found, effort) = Searcher::new(&device, corpus).unwrap().search(query, 10, None).unwrap();
        assert_eq!(bits(&found), bits(&[reference(rows, d, query, 10, |_| true)]));
        effort
    };
    let far = unit(&mut rng, 4000, d);
    let query = unit(&mut rng, 1, d);
    let near = |count: usize, apart: f64, rng: &mut ChaCha8Rng| -> Vec<f32> {
        (0..count)
            .flat_map(|_| query.iter().map(|v| (*v as f64 + apart * normal(rng)) as f32).collect::<Vec<_>>())
            .collect()
    };
    // Codes of random rows tell ten apart.
    assert_eq!((search(&far, &query).widened, search(&far, &query).exhausted), (0, 0));
    // 1000 rows are nearer to each other than codes can tell: more than the first scan takes, fewer than the second.
    let effort = search(&[&far[..], &near(1000, 1e-5, &mut rng)].concat(), &query);
    assert_eq!((effort.widened, effort.exhausted), (1, 0), "{effort:?}");
    // With 20,000 the codes never can; f32 sums can.
    let effort = search(&near(20_000, 1e-3, &mut rng), &query);
    assert_eq!((effort.widened, effort.exhausted), (1, 0), "{effort:?}");
    // When all are one only every row's score proves it.
    let equal = query.repeat(20_000);
    let effort = search(&equal, &query);
    assert_eq!((effort.widened, effort.exhausted), (1, 1), "{effort:?}");
}

#[test]
fn wrong_requests_are_refused() {
    let device = Cpu::new();
    let rows = [1.0f32, 0.0, 0.0, 1.0];
    let corpus = Corpus { d: 2, rows: Rows::F32(&rows) };
    let refused = |corpus: Corpus<'_>, queries: &[f32], k: usize, filter: Option<&[u32]>| {
        search(&device, &corpus, queries, k, filter).unwrap_err().to_string()
    };
    assert!(refused(corpus, &[1.0, 0.0], 0, None).contains("k is 0"));
    assert!(refused(corpus, &[1.0, 0.0], 2049, None).contains("1 to 2048"));
    assert!(refused(corpus, &[1.0, 0.0, 0.0], 1, None).contains("no queries of 2"));
    assert!(refused(corpus, &[1.0, 0.0, 0.0, f32::NAN], 1, None).contains("query 1: element 1 is NaN"));
    assert!(refused(corpus, &[1.0, 0.0], 1, Some(&[])).contains("too short"));
    assert!(refused(Corpus { d: 3, ..corpus }, &[1.0; 3], 1, None).contains("no rows of 3"));
    assert!(refused(Corpus { d: 0, ..corpus }, &[], 1, None).contains("no rows of 0"));
    let mut codes = Codes::quantize(2, Exact::F32(&rows));
    codes.residuals.to_mut()[1] = f32::NAN;
    let by_codes = Corpus { d: 2, rows: Rows::I8 { codes: &codes, exact: Exact::F32(&rows) } };
    assert!(refused(by_codes, &[1.0, 0.0], 1, None).contains("row 1"));
    codes.residuals.to_mut().pop();
    let by_codes = Corpus { d: 2, rows: Rows::I8 { codes: &codes, exact: Exact::F32(&rows) } };
    assert!(refused(by_codes, &[1.0, 0.0], 1, None).contains("residuals"));
}

#[test]
fn rows_that_are_not_numbers_are_never_found() {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let d = 33;
    let (mut rows, queries) = (unit(&mut rng, 300, d), unit(&mut rng, 20, d));
    for n in (0..300).step_by(7) {
        rows[n * d + n % d] = f32::NAN;
    }
    for (name, device) in devices() {
        let codes = Codes::quantize(d, Exact::F32(&rows));
        for stored in [Rows::F32(&rows), Rows::I8 { codes: &codes, exact: Exact::F32(&rows) }] {
            let found = search(&*device, &Corpus { d, rows: stored }, &queries, 300, None).unwrap();
            let expected: Vec<Vec<Hit>> =
                queries.chunks(d).map(|query| reference(&rows, d, query, 300, |n| n % 7 != 0)).collect();
            assert_eq!(bits(&found), bits(&expected), "on {name}");
        }
    }
}
