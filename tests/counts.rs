//! What the fast PTX rungs of `qmatmul` and `qmatmul_t` move, and how: counts by the executor, exact on any machine.
//! A kernel that reads a weight twice, wastes part of a sector or lets lanes wait for a shared-memory bank fails here.

#[path = "counts/attention.rs"]
mod attention;
#[path = "counts/ladder.rs"]
mod ladder;
#[path = "counts/lora.rs"]
mod lora;
#[path = "counts/nf4.rs"]
mod nf4;
#[path = "counts/qmatmul.rs"]
mod qmatmul;

use handmill::op::{Dims, Kernel, Launch, OpSpec, Source};
use handmill::verify;
use ptx_sim::{launch, BufferCount, Counts, Memory, Module, Options, Param};

/// N and K of SmolLM2-135M's down projection.
const N: usize = 576;
const K: usize = 1536;
const SEED: u64 = 1;

/// One launch and its counts.
struct Counted {
    spec: &'static OpSpec,
    kernel: &'static Kernel,
    dims: Dims,
    work: Launch,
    /// Shared memory of a block, static and dynamic, in bytes.
    shared: u32,
    counts: Counts,
}

/// Runs `<op>_<format>_<variant>` once on M rows; groups of 32 and f16 scales, as GGUF files have them.
fn count(op: &str, format: &str, variant: &str, m: usize) -> Counted {
    count_of(op, format, variant, [m, N, K], &[("G", 32)])
}

/// The same of M, N and K; of the format's own dims those that are not 0.
fn count_of(op: &str, format: &str, variant: &str, [m, n, k]: [usize; 3], own: &[(&str, usize)]) -> Counted {
    let spec = handmill::ops::find(op, format);
    let stem = format!("{op}_{format}_{variant}");
    // A stem names a kernel in each language that has it.
    let mut of_stem = spec.kernels().filter(|k| k.stem == stem);
    let kernel = of_stem.find(|k| matches!(k.source, Source::Ptx(_))).expect("a kernel of the table in PTX");
    // Both ops: M, N, K, LDY, Y0, then no bias, no low-rank term, nothing to add to.
    let mut values = vec![m, n, k, n, 0, 0, 0];
    let of_format = &spec.dims[values.len()..];
    values.extend(of_format.iter().map(|dim| own.iter().find(|(name, _)| name == dim).map_or(0, |(_, value)| *value)));
    let dims = spec.dims(&values, &vec![0.0; spec.scalars.len()]);

    launched(spec, kernel, dims)
}

/// Runs a PTX kernel once.
fn launched(spec: &'static OpSpec, kernel: &'static Kernel, dims: Dims) -> Counted {
    let Source::Ptx(file) = kernel.source else { panic!("{} is not in PTX", kernel.stem) };
    let module = Module::parse(&file.read().expect("the kernel's file"), file.path).expect("PTX");
    let mut memory = Memory::new();
    let mut params = Vec::new();
    for tensor in verify::fill(spec, &dims, kernel.act, SEED) {
        params.push(Param::Buffer(memory.alloc_from(tensor.bytes.as_slice()).expect("memory")));
    }
    params.push(Param::Bytes(dims.params().to_vec()));
    let work = (kernel.launch)(&dims);
    let shape = ptx_sim::Launch { grid: work.grid, block: work.block, dynamic_shared: work.shared_bytes, params };
    let options = Options { count: true, ..Options::default() };
    let counts = launch(&module, kernel.stem, &mut memory, &shape, &options).expect("a run").counts;
    let shared = work.shared_bytes + module.entry(kernel.stem).expect("the stem's entry").static_shared;
    Counted { spec, kernel, dims, work, shared, counts }
}

impl Counted {
    /// An argument's bytes and what was done to it.
    fn arg(&self, name: &str) -> (u64, BufferCount) {
        let i = self.spec.args.iter().position(|a| a.name == name).expect("an argument of the contract");
        (self.spec.args[i].bytes(&self.dims, self.kernel.act) as u64, self.counts.buffers[i])
    }

    /// The weights, or their codes: what the kernel is there to stream.
    fn streamed(&self) -> &'static str {
        self.spec.args[1].name
    }

    /// Arguments that hold W, but for the two tables of nf4dq, which stay in the first-level cache.
    fn parts_of_w(&self) -> impl Iterator<Item = &'static str> {
        let names = self.spec.args.iter().map(|a| a.name);
        names.skip(1).take_while(|name| *name != "bias").filter(|name| !["code", "offset"].contains(name))
    }

    fn what(&self) -> String {
        format!("{} ({})", self.kernel.stem, self.dims)
    }
}

#[test]
fn warp_streams_w_once_up_to_16_rows() {
    for format in ["f32", "f16", "bf16", "q4", "q8", "nf4", "nf4dq"] {
        for m in [1, 16] {
            let run = count("qmatmul", format, "warp", m);
            let what = run.what();

            // Each byte once, in whole sectors: a request of 32 lanes uses all 32 bytes of each sector it touches.
            let (bytes, moved) = run.arg(run.streamed());
            assert_eq!((moved.read, moved.sector_read), (bytes, bytes), "{what}: {}", run.streamed());

            // With scales. A block of nf4dq has one byte of absmax, so that a request for 8 blocks uses a quarter of
            // its sector, and absmax2 is looked up once a step; the first-level cache holds both until the row ends.
            let (mut least, mut sectors) = (0, 0);
            for name in run.parts_of_w() {
                let (bytes, moved) = run.arg(name);
                least += bytes;
                sectors += moved.sector_read;
            }
            let share = sectors as f64 / least as f64;
            let allowed = if format == "nf4dq" { 1.25 } else { 1.0 };
            assert!(share <= allowed, "{what}: {share:.3} of W's bytes moved");

            // x once for each block of 16 rows of W, y once.
            let (bytes, moved) = run.arg("x");
            assert_eq!(moved.sector_read, bytes * u64::from(run.work.grid[1]), "{what}: x");
            let (bytes, moved) = run.arg("y");
            assert_eq!(moved.written, bytes, "{what}: y");

            assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");
        }
    }
}

#[test]
fn mma_moves_each_tile_once_without_conflicts() {
    // The op, its activations, its result, the length of its sums.
    for (op, input, output, sum) in [("qmatmul", "x", "y", K), ("qmatmul_t", "dy", "dx", N)] {
        for format in ["q4", "q8", "nf4", "nf4dq", "bf16", "f16"] {
            for m in [16, 128] {
                let run = count(op, format, "mma", m);
                let what = run.what();
                let [rows, columns, _] = run.work.grid.map(u64::from);

                // W once for each tile of rows, activations once for each tile of columns, the result once: in whole
                // sectors.
                for (name, times) in [(run.streamed(), rows), (input, columns)] {
                    let (bytes, moved) = run.arg(name);
                    assert_eq!((moved.read, moved.sector_read), (times * bytes, times * bytes), "{what}: {name}");
                    assert_eq!(moved.distinct_read, bytes, "{what}: {name} of memory");
                }
                let (bytes, moved) = run.arg(output);
                assert_eq!((moved.written, moved.sector_written), (bytes, bytes), "{what}: {output}");

                // No tensor-core work for rows that are not there.
                let expected = m as u64 / 16 * (columns * 128 / 8) * (sum as u64 / 16);
                assert_eq!(run.counts.mma, expected, "{what}: mma instructions");
                assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");
            }
        }
    }
}

/// What src/ops/qmatmul/ptx.rs says of the way of 16-bit weights through shared memory.
#[test]
fn mma_of_16_bit_weights_takes_288_waves_a_tile() {
    for format in ["bf16", "f16"] {
        let waves = |k| count_of("qmatmul", format, "mma", [64, 128, k], &[]).counts.shared.waves;
        assert_eq!(waves(1024) - waves(512), 288 * 512 / 32, "{format}");
    }
}

#[test]
fn wgmma_moves_each_tile_once_without_conflicts() {
    // Rows of x, and how many are multiplied at once.
    for (variant, m, tile) in [("wgmma", 256, 128), ("wgmma64", 16, 16), ("wgmma64", 17, 32), ("wgmma64", 64, 64)] {
        for format in ["q4", "q8", "nf4", "nf4dq", "bf16", "f16"] {
            // 16-bit weights have no tiles of 64 rows.
            if variant == "wgmma64" && ["bf16", "f16"].contains(&format) {
                continue;
            }
            let run = count("qmatmul", format, variant, m);
            let what = run.what();
            let (rows, columns) = (m.div_ceil(tile) as u64, N.div_ceil(128) as u64);

            // A tile has 128 rows of W; beyond the last its own bytes come again.
            let (bytes, moved) = run.arg(run.streamed());
            let asked = rows * columns * 128 * bytes / N as u64;
            assert_eq!((moved.read, moved.sector_read), (asked, asked), "{what}: {}", run.streamed());
            assert_eq!(moved.distinct_read, bytes, "{what}: {} of memory", run.streamed());
            let (bytes, moved) = run.arg("x");
            assert_eq!((moved.read, moved.sector_read), (columns * bytes, columns * bytes), "{what}: x");
            let (bytes, moved) = run.arg("y");
            assert_eq!((moved.written, moved.sector_written), (bytes, bytes), "{what}: y");

            // Eight warps take 16 columns of 16 rows of W by a tile's rows of x at once, those that are not there too.
            let products = rows * columns * 8 * (K as u64 / 16);
            let macs = products * 16 * 16 * tile as u64;
            assert_eq!((run.counts.mma, run.counts.mma_macs), (products, macs), "{what}: products");
            assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");
        }
    }
}

#[test]
fn tiled_moves_each_tile_once_without_conflicts() {
    for format in ["f32", "f16", "bf16", "q4", "q8", "nf4", "nf4dq"] {
        for m in [16, 128] {
            let run = count("qmatmul_t", format, "tiled", m);
            let what = run.what();
            let [rows, columns, _] = run.work.grid.map(u64::from);
            for (name, times) in [(run.streamed(), rows), ("dy", columns)] {
                let (bytes, moved) = run.arg(name);
                assert_eq!((moved.read, moved.sector_read), (times * bytes, times * bytes), "{what}: {name}");
            }
            let (bytes, moved) = run.arg("dx");
            assert_eq!((moved.written, moved.sector_written), (bytes, bytes), "{what}: dx");
            assert_eq!(run.counts.shared.conflicts, 0, "{what}: waves lost to bank conflicts");

            // Half of a tile's warps have nothing to multiply where there are 32 rows or fewer. Of 64 multiply-adds'
            // 74 instructions the rest are loads from shared memory and the loop; bringing and decoding a tile takes
            // another fifth.
            let products = (m.next_multiple_of(32) * N * K) as f64;
            let a_product = run.counts.thread_instructions as f64 / products;
            let allowed = if m < 64 { 1.7 } else { 1.45 };
            assert!(a_product < allowed, "{what}: {a_product:.3} instructions a multiply-add");
        }
    }
}
