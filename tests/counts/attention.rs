//! What the executor counts of attention: no bank conflicts, and tiles of keys that many queries share.

use handmill::device::{ptx_sim::PtxSim, Device};
use handmill::op::Source;
use handmill::{ops::OPS, verify};
use ptx_sim::{Counts, Launch, Memory, Module, Options, Param};

const SEED: u64 = 1;

/// The counts of each case that `stem` supports.
fn counts(stem: &str) -> Vec<(String, Counts)> {
    let device = PtxSim::new();
    let mut rows = OPS.iter().flat_map(|spec| spec.kernels().map(move |kernel| (*spec, kernel)));
    let (spec, kernel, file) = rows
        .find_map(|(spec, kernel)| match kernel.source {
            Source::Ptx(file) if kernel.stem == stem => Some((spec, kernel, file)),
            _ => None,
        })
        .expect("a kernel of the table");
    let module = Module::parse(&file.read().unwrap(), file.path).unwrap();

    let mut all = Vec::new();
    for dims in spec.cases.iter().map(|case| spec.case_dims(case)).filter(|d| (kernel.supports)(d, device.caps())) {
        let mut memory = Memory::new();
        let tensors = verify::fill(spec, &dims, kernel.act, SEED);
        let mut params: Vec<Param> =
            tensors.iter().map(|t| Param::Buffer(memory.alloc_from(t.bytes.as_slice()).unwrap())).collect();
        params.push(Param::Bytes(dims.params().to_vec()));
        let work = (kernel.launch)(&dims);
        let launch = Launch { grid: work.grid, block: work.block, dynamic_shared: work.shared_bytes, params };
        let options = Options { count: true, ..Options::default() };
        all.push((dims.to_string(), ptx_sim::launch(&module, stem, &mut memory, &launch, &options).unwrap().counts));
    }
    all
}

#[test]
fn attention_has_no_bank_conflicts() {
    for stem in [
        "attention_f32_naive",
        "attention_f32_tiled",
        "attention_f32_decode",
        "attention_stats_f32_tiled",
        "attention_backward_f32_naive",
        "attention_backward_f32_tiled",
    ] {
        for (dims, counts) in counts(stem) {
            let lines: Vec<_> = counts.lines.iter().filter(|line| line.conflicts > 0).collect();
            assert!(lines.is_empty(), "{stem} ({dims}): {lines:?}");
            assert!(counts.shared.requests > 0, "{stem} ({dims}) uses shared memory");
        }
    }
}

#[test]
fn attention_tiles_are_read_once_for_all_queries_of_a_block() {
    let (dims, counts) = counts("attention_f32_tiled").pop().expect("a case");
    assert_eq!(dims, "M=128 H=9 KV=3 D=64 C=257 scale=0.125");
    // 128 rows of three heads are six blocks of 64 queries for each key head; none sees more than the 257 keys.
    let most = 6 * 257 * 3 * 64 * 4;
    let keys_and_values = &counts.buffers[1..3];
    for buffer in keys_and_values {
        assert!(buffer.read <= most, "{} bytes read, at most {most}", buffer.read);
    }
}
