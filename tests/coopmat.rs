//! `qmatmul`'s rungs of cooperative matrices where no adapter has them: the same text with the matrices' functions
//! replaced by plain ones, against the oracle. That shows tiles, tails and layout right, and not what a card makes of
//! the functions themselves.

use handmill::device::{wgpu, Device};
use handmill::op::{always, File, Kernel, Source};
use handmill::ops::OPS;
use handmill::verify;

/// What stands in a kernel, and what takes its place.
const REPLACED: [(&str, &str); 8] = [
    ("enable wgpu_cooperative_matrix;", ""),
    ("    @builtin(subgroup_id)            subgroup: u32,\n", ""),
    ("id, subgroup);\n}", "id, begin(id));\n}\nfn begin(id: u32) -> u32 { LANE = id % 32u; return id / 32u; }"),
    ("coop_mat16x16<f32, C>()", "Sum()"),
    ("coopLoadT<coop_mat16x16<f16, A>>(&x_tile[", "(u32("),
    ("coopLoad<coop_mat16x16<f16, B>>(&w_tile[", "(u32("),
    ("coopMultiplyAdd(", "multiply_add("),
    ("coopStoreT(", "put("),
];

/// Operations of a case at most.
const LARGEST: u64 = 2_000_000;

#[test]
fn kernels_of_cooperative_matrices_are_right_but_for_the_matrices() {
    let device = match wgpu::Wgpu::open("wgpu") {
        Ok(device) => device,
        Err(error) if std::env::var_os("HANDMILL_REQUIRE_WGPU").is_some() => panic!("{error}"),
        Err(error) => return eprintln!("not tested: {error}"),
    };
    if !device.caps().f16 {
        return eprintln!("not tested: {} has no f16", device.description());
    }
    let mut formats = 0;
    for &spec in OPS.iter().filter(|spec| spec.name == "qmatmul") {
        let kernel = spec.kernels().find(|kernel| kernel.stem.ends_with("_coopmat")).expect("each format has one");
        let kernel = with_plain_functions(kernel);
        // The larger cases would add nothing but time.
        for case in spec.cases.iter().filter(|case| (spec.cost)(&spec.case_dims(case)).flops < LARGEST) {
            let outcome = verify::check(&device, spec, kernel, &spec.case_dims(case), 1).unwrap();
            assert_eq!(outcome.failure, None, "{} ({})", kernel.stem, case.why);
        }
        formats += 1;
    }
    assert_eq!(formats, 7);
}

fn with_plain_functions(kernel: &'static Kernel) -> &'static Kernel {
    let Source::Wgsl(files) = kernel.source else { panic!("{} is not in WGSL", kernel.stem) };
    let mut text: String = files.iter().map(|file| file.read().unwrap().into_owned()).collect();
    for (from, to) in REPLACED {
        assert!(text.contains(from), "{}: no {from}", kernel.stem);
        text = text.replace(from, to);
    }
    // The end of a load and of a store: both told the distance between rows, which is the tile's own.
    text = text.replace("], PITCH)", "))").replace("&y_tile[out], 16u)", "out)");
    text += include_str!("support/coopmat.wgsl");
    let files = Box::leak(Box::new([File { path: "", text: text.leak() }]));
    Box::leak(Box::new(Kernel { source: Source::Wgsl(files), supports: always, ..*kernel }))
}
