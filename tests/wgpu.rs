//! The `wgpu` device itself: bytes in and out, order, views, sharing, errors in words.

use handmill::device::{wgpu, Buffer, Device, Error, Result};
use handmill::op::*;
use handmill::ops;
use handmill::tensor::Dtype;

/// The first adapter; none where there need not be one.
fn device() -> Option<wgpu::Wgpu> {
    match wgpu::Wgpu::open("wgpu") {
        Ok(device) => Some(device),
        Err(reason) if std::env::var_os("HANDMILL_REQUIRE_WGPU").is_some() => panic!("{reason}"),
        Err(reason) => {
            eprintln!("not tested: {reason}");
            None
        }
    }
}

fn bytes(device: &dyn Device, buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.bytes()];
    device.read(buffer, 0, &mut bytes).unwrap();
    bytes
}

fn filled(device: &dyn Device, bytes: &[u8]) -> Buffer {
    let buffer = device.alloc(bytes.len()).unwrap();
    device.write(&buffer, 0, bytes).unwrap();
    buffer
}

fn floats(device: &dyn Device, values: &[f32]) -> Buffer {
    filled(device, bytemuck::cast_slice(values))
}

fn add(device: &dyn Device, a: &Buffer, b: &Buffer, y: &Buffer, n: usize) -> Result<()> {
    let add = ops::find("add", "f32");
    handmill::device::run(device, add, &[a, b, y], &add.dims(&[1, n], &[]))
}

#[test]
fn adapters_are_listed_with_their_ids() {
    let Some(device) = device() else { return };
    let adapters = wgpu::list();
    assert_eq!((adapters[0].id.as_str(), device.id()), ("wgpu:0", "wgpu:0"));
    let says_so = device.description().ends_with("software: correctness only");
    assert_eq!(adapters[0].software, says_so, "{}", device.description());
    let unchecked = wgpu::Wgpu::open("wgpu:0:unchecked").unwrap();
    assert!(unchecked.description().ends_with(", unchecked") && !device.description().contains("unchecked"));
}

#[test]
fn what_is_not_there_is_told_in_words() {
    let error = |id: &str| wgpu::Wgpu::open(id).err().expect(id).to_string();
    assert!(error("wgpu:4096").contains("wgpu:4096: "), "{}", error("wgpu:4096"));
    assert!(error("wgpu:0:fast").contains("fast is neither"), "{}", error("wgpu:0:fast"));
    assert!(handmill::device::open("wgpu:4096").is_err());
    let Some(device) = device() else { return };
    match device.alloc(1 << 50) {
        Err(Error::OutOfMemory { bytes, .. }) => assert_eq!(bytes, 1 << 50),
        other => panic!("{:?}", other.err()),
    }
    assert!(matches!(device.alloc(usize::MAX), Err(Error::OutOfMemory { .. })));
    // And the device goes on.
    assert_eq!(bytes(&device, &filled(&device, &[1, 2, 3, 4])), [1, 2, 3, 4]);
}

#[test]
fn every_offset_and_length_is_written_and_read() {
    let Some(device) = device() else { return };
    for length in [1, 2, 3, 4, 5, 34, 257] {
        let mut host: Vec<u8> = (0..length).map(|i| i as u8).collect();
        let buffer = filled(&device, &host);
        for offset in [0, 1, 2, 3, 4, 7, 33] {
            for count in [0, 1, 2, 3, 4, 6, 9] {
                if offset + count > length {
                    let mut short = vec![0; count];
                    assert!(device.write(&buffer, offset, &short).is_err());
                    assert!(device.read(&buffer, offset, &mut short).is_err());
                    continue;
                }
                let patch: Vec<u8> = (0..count).map(|i| (100 + offset + i) as u8).collect();
                device.write(&buffer, offset, &patch).unwrap();
                host[offset..offset + count].copy_from_slice(&patch);
                assert_eq!(bytes(&device, &buffer), host, "{count} bytes at {offset} of {length}");
                let mut part = vec![0; count];
                device.read(&buffer, offset, &mut part).unwrap();
                assert_eq!(part, patch);
            }
        }
    }
    assert!(bytes(&device, &device.alloc(0).unwrap()).is_empty());
    assert!(device.write(&device.alloc(8).unwrap(), usize::MAX, &[0]).is_err());
}

#[test]
fn a_view_shares_the_bytes_and_keeps_its_neighbours() {
    let Some(device) = device() else { return };
    let whole = filled(&device, &[7; 1024]);
    let view = whole.view(256, 34);
    device.write(&view, 0, &[1; 34]).unwrap();
    let mut expected = vec![7; 1024];
    expected[256..290].fill(1);
    assert_eq!(bytes(&device, &whole), expected);
    assert_eq!(bytes(&device, &view), [1; 34]);
    let x = floats(&device, &[1.0; 8]);
    let error = add(&device, &x, &whole.view(128, 32), &view, 8).unwrap_err().to_string();
    assert!(error.contains("byte 128") && error.contains("256"), "{error}");
}

#[test]
fn writes_launches_and_copies_keep_their_order() {
    let Some(device) = device() else { return };
    let (one, mut x, mut y) = (floats(&device, &[1.0; 64]), floats(&device, &[0.0; 64]), floats(&device, &[0.0; 64]));
    // More launches than a command buffer takes, with writes and copies between them, and no wait.
    let mut expected = 0.0;
    for i in 0..700 {
        match i % 7 {
            3 => {
                device.write(&one, 0, bytemuck::cast_slice(&[(i % 5) as f32; 64])).unwrap();
                continue;
            }
            5 => {
                device.copy(&x, 0, &y, 0, 256).unwrap();
                std::mem::swap(&mut x, &mut y);
                continue;
            }
            _ => {}
        }
        add(&device, &x, &one, &y, 64).unwrap();
        std::mem::swap(&mut x, &mut y);
        let last = (0..=i).rev().find(|i| i % 7 == 3).map_or(1.0, |i| (i % 5) as f32);
        expected += last;
    }
    assert_eq!(bytes(&device, &x), bytemuck::cast_slice::<f32, u8>(&[expected; 64]));
}

#[test]
fn launches_with_more_params_than_slots_get_their_own() {
    let Some(device) = device() else { return };
    let add = ops::find("add", "f32");
    let (a, y) = (floats(&device, &[1.0; 600]), floats(&device, &[0.0; 600]));
    let zero = floats(&device, &[0.0; 600]);
    // The i-th adds to the first i elements: element e is written by all but e + 1 of them.
    for i in 1..600 {
        let dims = add.dims(&[1, i], &[]);
        handmill::device::run(&device, add, &[&a, &y, &zero], &dims).unwrap();
        device.copy(&zero, 0, &y, 0, 4 * i).unwrap();
    }
    let expected: Vec<f32> = (0..600).map(|e| (599 - e) as f32).collect();
    assert_eq!(bytes(&device, &y), bytemuck::cast_slice::<f32, u8>(&expected));
}

#[test]
fn memory_given_back_is_used_again_after_its_work() {
    let Some(device) = device() else { return };
    let one = floats(&device, &[1.0; 4096]);
    let mut x = floats(&device, &[0.0; 4096]);
    for _ in 0..50 {
        // The old x is dropped while launches that read it wait.
        let y = device.alloc(4 * 4096).unwrap();
        add(&device, &x, &one, &y, 4096).unwrap();
        x = y;
        let scratch = floats(&device, &[f32::NAN; 4096]);
        drop(scratch);
    }
    assert_eq!(bytes(&device, &x), bytemuck::cast_slice::<f32, u8>(&[50.0; 4096]));
}

#[test]
fn parts_of_one_buffer_are_read_and_written_in_one_launch() {
    let Some(device) = device() else { return };
    let whole = floats(&device, &[2.0; 192]);
    let part = |i: usize| whole.view(256 * i, 256);
    add(&device, &part(0), &part(1), &part(2), 64).unwrap();
    add(&device, &part(2), &part(2), &part(0), 64).unwrap();
    let mut expected = [2.0f32; 192];
    expected[128..].fill(4.0);
    expected[..64].fill(8.0);
    assert_eq!(bytes(&device, &whole), bytemuck::cast_slice::<f32, u8>(&expected));
    let error = add(&device, &part(0), &part(1), &part(1), 64).unwrap_err().to_string();
    assert!(error.contains("output y shares memory with b"), "{error}");
    // Copies within a buffer too, also where they overlap.
    device.copy(&whole, 0, &whole, 64, 256).unwrap();
    let mut shifted = expected;
    shifted.copy_within(0..64, 16);
    assert_eq!(bytes(&device, &whole), bytemuck::cast_slice::<f32, u8>(&shifted));
    assert!(device.copy(&whole, 2, &whole, 64, 8).is_err() && device.copy(&whole, 0, &whole, 764, 8).is_err());
}

#[test]
fn large_reads_come_whole() {
    let Some(device) = device() else { return };
    let words: Vec<u32> = (0..5 << 20).collect();
    let buffer = filled(&device, bytemuck::cast_slice(&words));
    assert!(bytes(&device, &buffer) == bytemuck::cast_slice::<u32, u8>(&words));
}

#[test]
fn time_is_what_the_work_takes() {
    let Some(device) = device() else { return };
    let n = 1 << 22;
    let (a, y) = (device.alloc(4 * n).unwrap(), device.alloc(4 * n).unwrap());
    add(&device, &a, &a, &y, n).unwrap();
    let times = |count: usize| {
        let mut work = || (0..count).try_for_each(|_| add(&device, &a, &a, &y, n));
        (0..3).map(|_| device.time(&mut work).unwrap()).fold(f64::INFINITY, f64::min)
    };
    let (few, many) = (times(1), times(8));
    // 48 MiB move in a launch: no device does it in 5 µs, and eight take longer than two would.
    assert!(few > 5e-6 && many > 2.0 * few && many < 60.0, "{few} {many}");
    let error = device.time(&mut || add(&device, &a, &a, &y, n + 1)).unwrap_err().to_string();
    assert!(error.contains("needs"), "{error}");
}

#[test]
fn a_binding_beyond_the_limit_is_refused() {
    if device().is_none() {
        return;
    }
    let options = wgpu::Options { max_binding: Some(4096), ..Default::default() };
    let device = wgpu::Wgpu::with(0, &options).unwrap();
    assert_eq!(device.caps().max_binding, 4096);
    let (a, y) = (floats(&device, &[1.0; 2048]), floats(&device, &[0.0; 2048]));
    // A larger buffer is bound in part.
    add(&device, &a, &a, &y, 1024).unwrap();
    assert_eq!(bytes(&device, &y)[..4096], *bytemuck::cast_slice::<f32, u8>(&[2.0; 1024]));
    let error = add(&device, &a, &a, &y, 1025).unwrap_err().to_string();
    assert!(error.contains("4100 bytes") && error.contains("4096"), "{error}");
}

/// y = a + b, wrong in one way each.
static WRONG: OpSpec = OpSpec {
    name: "wrong",
    format: "f32",
    formula: "",
    dims: &["N"],
    scalars: &[],
    args: &[
        input("a", ArgType::Act, &["N"], Fill::Normal),
        input("b", ArgType::Act, &["N"], Fill::Normal),
        output("y", ArgType::Act, &["N"]),
    ],
    oracle: |_, _| Vec::new(),
    cost: |_| Cost { flops: 0, bytes: 0 },
    tolerance: Tolerance { roundings: |_| 1.0, nmse: 0.0, why: "" },
    cases: &[],
    kernels: &[&[
        wrong("wrong_f32_syntax", &[HEAD, File { path: "shaders/second.wgsl", text: "\n\nfn f() { let = 1; }\n" }]),
        wrong(
            "wrong_f32_types",
            &[HEAD, File { path: "shaders/second.wgsl", text: "\nfn f() -> u32 { return 1.5; }" }],
        ),
        wrong("wrong_f32_entry", &[HEAD]),
        Kernel {
            launch: |_| Launch { grid: [1 << 20, 1, 1], block: [1, 1, 1], shared_bytes: 0 },
            ..wrong("wrong_f32_grid", &[HEAD])
        },
    ]],
};
const HEAD: File = File { path: "shaders/first.wgsl", text: "// a file\n// of three\n// lines\n" };

const fn wrong(stem: &'static str, files: &'static [File]) -> Kernel {
    let launch = |_: &Dims| Launch { grid: [1, 1, 1], block: [1, 1, 1], shared_bytes: 0 };
    Kernel { stem, source: Source::Wgsl(files), act: Dtype::F32, launch, supports: always }
}

#[test]
fn a_shader_that_is_wrong_is_named_with_its_file_and_line() {
    // The texts are in this file: nothing to read anew.
    let Some(device) = device().filter(|_| std::env::var_os("HANDMILL_SOURCES").is_none()) else { return };
    let x = floats(&device, &[1.0; 4]);
    let y = floats(&device, &[0.0; 4]);
    for (kernel, words) in WRONG.kernels[0].iter().zip([
        ["wrong_f32_syntax: ", "shaders/second.wgsl:3:14: "],
        ["wrong_f32_types: ", "shaders/second.wgsl:2:"],
        ["wrong_f32_entry: ", "entry point"],
        ["wrong_f32_grid ", "1048576 workgroups"],
    ]) {
        let launched = device.launch(&WRONG, kernel, &[&x, &x, &y], &WRONG.dims(&[4], &[]));
        let error = launched.expect_err(kernel.stem).to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.lines().count() == 1, "{error}");
    }
    // And the device goes on.
    add(&device, &x, &x, &y, 4).unwrap();
    assert_eq!(bytes(&device, &y), bytemuck::cast_slice::<f32, u8>(&[2.0; 4]));
}

#[test]
fn several_threads_share_a_device() {
    let Some(device) = device() else { return };
    std::thread::scope(|scope| {
        for t in 0..4 {
            let device = &device;
            scope.spawn(move || {
                let step = floats(device, &[t as f32; 256]);
                for round in 0..10 {
                    let mut x = floats(device, &[0.0; 256]);
                    for _ in 0..20 {
                        let y = device.alloc(1024).unwrap();
                        add(device, &x, &step, &y, 256).unwrap();
                        x = y;
                    }
                    let expected = [20.0 * t as f32; 256];
                    assert!(bytes(device, &x) == bytemuck::cast_slice::<f32, u8>(&expected), "{t}, round {round}");
                }
            });
        }
    });
}
