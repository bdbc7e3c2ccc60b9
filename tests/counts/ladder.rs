//! The ladders of the README and of kernels/LADDERS.md, from naive to best, made of counts: what the assembler and the
//! executor say of each rung, and, where a card has been measured, how near it comes to the card's limits.

use super::{launched, Counted};
use handmill::bench::row::{Kind, Row};
use handmill::device::{ptx_sim::PtxSim, Device};
use handmill::op::{Arg, Dims, Kernel, OpSpec, Source};
use handmill::tensor::Dtype;
use std::cmp::Reverse;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The rungs of one op.
struct Ladder {
    op: &'static str,
    formats: &'static [&'static str],
    lead: &'static str,
    /// The dim that grows, and its sizes.
    rows: (&'static str, &'static [usize]),
    /// The other dims; those that are not named are 0.
    dims: &'static [(&'static str, usize)],
    /// What is streamed and what meets it: a word, and the arguments it stands for.
    operands: [(&'static str, &'static [&'static str]); 2],
}

/// Every argument that holds a weight, but for the two tables of nf4dq, which stay in the first-level cache.
const W: &[&str] = &["w", "codes", "scales", "mins", "absmax", "absmax2"];
const WEIGHTS: &[&str] = &["q4", "q8", "nf4", "nf4dq", "bf16", "f16", "f32"];
const DOWN: &[(&str, usize)] = &[("N", 576), ("K", 1536), ("LDY", 576), ("G", 32)];

const LADDERS: &[Ladder] = &[
    Ladder {
        op: "qmatmul",
        formats: WEIGHTS,
        lead: "N = 576, K = 1536: SmolLM2-135M's down projection; groups of 32, f16 scales.",
        rows: ("M", &[1, 16, 64, 256]),
        dims: DOWN,
        operands: [("W", W), ("x", &["x"])],
    },
    Ladder {
        op: "qmatmul_t",
        formats: WEIGHTS,
        lead: "The gradient through the same projection: sums over N = 576.",
        rows: ("M", &[1, 64]),
        dims: DOWN,
        operands: [("W", W), ("dy", &["dy"])],
    },
    Ladder {
        op: "lora_shrink",
        formats: &["f32"],
        lead: "K = 1536, one adapter of rank 8.",
        rows: ("M", &[1, 64, 256]),
        dims: &[("K", 1536), ("R", 8), ("T", 8)],
        operands: [("x", &["x"]), ("A", &["lora_a"])],
    },
    Ladder {
        op: "lora_expand",
        formats: &["f32"],
        lead: "N = 1536, eight adapters of rank 8 or less, rows of which some have none.",
        rows: ("M", &[1, 64]),
        dims: &[("N", 1536), ("R", 8), ("T", 64), ("L", 8), ("LDY", 1536)],
        operands: [("y", &["y"]), ("B", &["lora_bt"])],
    },
    Ladder {
        op: "lora_backward",
        formats: &["f32"],
        lead: "N = 576, rank 8: dS and dB of one dy.",
        rows: ("M", &[64, 256]),
        dims: &[("N", 576), ("LDY", 576), ("R", 8)],
        operands: [("dy", &["dy"]), ("B and S", &["lora_b", "lora_s"])],
    },
    Ladder {
        op: "lora_backward_a",
        formats: &["f32"],
        lead: "K = 1536, rank 8: dA.",
        rows: ("M", &[64, 256]),
        dims: &[("K", 1536), ("R", 8)],
        operands: [("x", &["x"]), ("dS", &["ds"])],
    },
    Ladder {
        op: "cosine_topk",
        formats: &["f32", "f16", "i8"],
        lead: "The ten best of 8192 rows of 384 columns, MiniLM's, in 16 splits.",
        rows: ("Q", &[1, 64]),
        dims: &[("N", 8192), ("D", 384), ("K", 10), ("S", 16)],
        operands: [("rows", &["rows", "scales"]), ("queries", &["q", "q_scales"])],
    },
];

const HEAD: &str = "# Ladders

Each op's rungs in PTX, slowest first, at sizes they are meant for. `HANDMILL_WRITE=1 cargo test --test counts` writes
this from what `tools/ptxas_check` and the executor say; these are counts, not times.

- registers, shared B: of a thread by ptxas (RESOURCES.md), of a block.
- read: sectors of 32 bytes over the bytes that the operand has: asked of the first-level cache; of the second, if each
  block has 128 KiB of the first to itself, empty when it begins; of memory, if no byte comes twice. Copies past the
  first-level cache (`cp.async.cg`, bulk) count as asked of both.
- L2, times the least: what all operands ask of the second-level cache, results among them, over the contract's least
  with the rung's type of activations.
- sectors a request: a request is a warp's. 4 sectors are what 32 lanes of 4 bytes need, 16 what they need of 16 bytes;
  lanes may ask for the same bytes.
- conflicts: waves through shared memory that were lost to a bank asked twice.
- instructions: of threads, for each multiply-add of the contract. Tensor cores do many with one.
- tensor work: multiply-adds of tensor cores, those for rows that are not there among them, over the contract's.
- of the roofline: the measured share of what the card's copy bandwidth and fastest product allow, at that many rows or
  the next number on record, on the largest shape; a dash where no card has been measured.
";

/// What a rung does otherwise than the one before: from the table in the documentation of its op's kernels, else the
/// first clause of the idea in its own header.
fn idea(root: &Path, spec: &OpSpec, kernel: &Kernel) -> String {
    let variant = variant(spec, kernel);
    let table = std::fs::read_to_string(root.join(format!("src/ops/{}/ptx.rs", spec.name))).unwrap_or_default();
    let start = format!("//! | `{variant}` | ");
    if let Some(line) = table.lines().find_map(|line| line.strip_prefix(&start)) {
        return line.split(" |").next().expect("its idea").to_string();
    }
    assert!(table.is_empty(), "src/ops/{}/ptx.rs says of no `{variant}` what its idea is: add a row there", spec.name);
    let text = source(kernel).expect("PTX").read().expect("the kernel's file");
    let text = text.lines().find_map(|line| line.strip_prefix("// idea   ")).expect("a kernel's header has its idea");
    let ends = [". ", ", so ", ": "].iter().filter_map(|end| text.find(end));
    text[..ends.min().unwrap_or(text.len())].to_string()
}

fn source(kernel: &Kernel) -> Option<handmill::op::File> {
    match kernel.source {
        Source::Ptx(file) => Some(file),
        _ => None,
    }
}

impl Ladder {
    fn spec(&self, format: &str) -> &'static OpSpec {
        handmill::ops::find(self.op, format)
    }

    fn dims(&self, spec: &OpSpec, rows: usize) -> Dims {
        let of = |name: &&str| {
            let given = self.dims.iter().find(|(dim, _)| dim == name).map_or(0, |(_, value)| *value);
            if *name == self.rows.0 {
                rows
            } else {
                given
            }
        };
        spec.dims(&spec.dims.iter().map(of).collect::<Vec<_>>(), &vec![1.0; spec.scalars.len()])
    }

    /// Rungs by size: `naive` once, at the smallest; `warp`, which reads W again for each 16 rows, up to 16; those for
    /// tensor cores from 16 on.
    fn rungs(&self, spec: &'static OpSpec) -> Vec<(&'static Kernel, usize)> {
        let device = PtxSim::new();
        let mut rungs = Vec::new();
        for (i, &rows) in self.rows.1.iter().enumerate() {
            let dims = self.dims(spec, rows);
            let shown = |kernel: &&Kernel| match variant(spec, kernel) {
                "naive" => i == 0,
                "warp" if self.op == "qmatmul" => rows <= 16,
                _ => rows >= 16 || kernel.act == Dtype::F32,
            };
            let ptx = spec.kernels().filter(|k| source(k).is_some() && (k.supports)(&dims, device.caps()));
            rungs.extend(ptx.filter(shown).map(|kernel| (kernel, rows)));
        }
        rungs
    }

    fn table(&self, root: &Path, spec: &'static OpSpec) -> String {
        let resources = std::fs::read_to_string(root.join("kernels/RESOURCES.md")).expect("kernels/RESOURCES.md");
        let ([(streamed, _), (other, _)], rows) = (&self.operands, self.rows.0);
        let mut text = format!(
            "| rung | {rows} | what changed | registers | shared B | {streamed} read: L1 / L2 / DRAM | \
             {other} read: L1 / L2 / DRAM | L2, times the least | sectors a request | conflicts | instructions | \
             tensor work | of the roofline |\n| --- |{}\n",
            " --- |".repeat(12)
        );
        let mut told = Vec::new();
        for (kernel, rows) in self.rungs(spec) {
            let idea = if told.contains(&kernel.stem) { "the same".into() } else { idea(root, spec, kernel) };
            told.push(kernel.stem);
            text += &self.row(root, spec, kernel, rows, &idea, &resources);
        }
        text
    }

    fn row(
        &self,
        root: &Path,
        spec: &'static OpSpec,
        kernel: &'static Kernel,
        rows: usize,
        idea: &str,
        resources: &str,
    ) -> String {
        let run = launched(spec, kernel, self.dims(spec, rows));
        let stem = kernel.stem;
        // | `stem` | threads | registers | ..
        let of_stem = |line: &&str| line.starts_with(&format!("| `{stem}` |"));
        let line = resources.lines().find(of_stem).unwrap_or_else(|| panic!("kernels/RESOURCES.md has no {stem}"));
        let registers = line.split('|').nth(3).expect("its registers").trim();
        let counts = &run.counts;
        let of_l2: u64 = counts.buffers.iter().map(|b| b.missed + b.sector_written).sum();
        let cost = (spec.cost)(&run.dims);
        // The contract's least is of f32 activations; some rungs take narrower ones.
        let narrow = |arg: &Arg| arg.bytes(&run.dims, Dtype::F32) - arg.bytes(&run.dims, kernel.act);
        let least = cost.bytes - spec.args.iter().map(narrow).sum::<usize>() as u64;
        let times = |moved: u64, bytes: u64| moved as f64 / bytes as f64;
        let tensor = match counts.mma_macs {
            0 => "-".to_string(),
            products => format!("{:.2}", times(products, cost.flops / 2)),
        };
        let [a, b] = self.operands.map(|(_, args)| read(&run, args));
        format!(
            "| `{stem}` | {rows} | {idea} | {registers} | {} | {a} | {b} | {:.2} | {:.1} | {} | {:.2} | {tensor} | {} |\n",
            run.shared,
            times(of_l2, least),
            times(counts.global.sectors, counts.global.requests),
            counts.shared.conflicts,
            times(counts.thread_instructions, cost.flops / 2),
            share(&root.join("benches/record"), stem, rows as u64),
        )
    }

    /// Which rungs there are in WGSL, those of both languages first.
    fn shaders(&self, spec: &'static OpSpec) -> String {
        let ptx: Vec<&str> = spec.kernels().filter(|k| source(k).is_some()).map(|k| variant(spec, k)).collect();
        let wgsl = spec.kernels().filter(|k| matches!(k.source, Source::Wgsl(_))).map(|k| variant(spec, k));
        let (both, alone): (Vec<&str>, Vec<&str>) = wgsl.partition(|variant| ptx.contains(variant));
        let quoted = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        match (both.is_empty(), alone.is_empty()) {
            (true, _) => format!("In WGSL: {}.", quoted(&alone)),
            (_, true) => format!("In WGSL too: {}.", quoted(&both)),
            _ => format!("In WGSL too: {}; there alone: {}.", quoted(&both), quoted(&alone)),
        }
    }
}

/// The stem's last word.
fn variant(spec: &OpSpec, kernel: &Kernel) -> &'static str {
    kernel.stem.strip_prefix(&format!("{}_", spec.id())).expect("a stem begins with its op and format")
}

/// Sectors read of these arguments over the bytes that they have: asked for, asked of the second cache, different.
fn read(run: &Counted, args: &[&str]) -> String {
    let (mut bytes, mut moved) = (0, [0; 3]);
    for name in args.iter().filter(|name| run.spec.args.iter().any(|arg| arg.name == **name)) {
        let (size, count) = run.arg(name);
        bytes += size;
        moved.iter_mut().zip([count.sector_read, count.missed, count.distinct_read]).for_each(|(a, b)| *a += b);
    }
    moved.map(|moved| format!("{:.2}", moved as f64 / bytes as f64)).join(" / ")
}

/// The rung's share of the roofline on each card that has a record, one folder of `records` each: at that many rows or
/// the next number on record, but none beyond eight times as many; on the largest shape, by the newest run.
fn share(records: &Path, stem: &str, rows: u64) -> String {
    let list = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        paths
    };
    let mut shares = String::new();
    for folder in list(records).iter().filter(|path| path.is_dir()) {
        let files = list(folder).into_iter().filter(|path| path.extension().is_some_and(|end| end == "jsonl"));
        let text: String = files.map(|path| std::fs::read_to_string(path).expect("a record") + "\n").collect();
        // Records of models and servers have lines of other kinds.
        let all = text.lines().filter_map(|line| serde_json::from_str::<Row>(line).ok());
        let of_rung = all.filter(|row| {
            let card = row.device.starts_with("cuda") && !row.software;
            card && row.kind == Kind::Kernel && row.kernel == stem && row.peer.is_none()
        });
        let near = of_rung.filter(|row| row.m.is_some_and(|m| (rows..=8 * rows).contains(&m)));
        let timed = near.filter(|row| row.roofline_fraction.is_some());
        let best = timed.max_by_key(|row| (Reverse(row.m), row.flops, row.unix_time));
        if let Some(fraction) = best.and_then(|row| row.roofline_fraction) {
            let card = folder.file_name().expect("a folder's name").to_string_lossy();
            let comma = if shares.is_empty() { "" } else { ", " };
            write!(shares, "{comma}{:.0} % ({card})", 100.0 * fraction).expect("text");
        }
    }
    if shares.is_empty() {
        "-".into()
    } else {
        shares
    }
}

#[test]
fn a_rung_shows_its_share_of_the_newest_largest_record_of_each_card() {
    let folder = tempfile::tempdir().expect("a folder");
    let row = |device: &str, kernel: &str, m, flops, fraction, time| {
        let (kernel, device) = (kernel.to_string(), device.to_string());
        let (flops, unix_time, roofline_fraction) = (Some(flops), Some(time), Some(fraction));
        Row {
            op: "qmatmul_q4".into(),
            kernel,
            device,
            m: Some(m),
            flops,
            unix_time,
            roofline_fraction,
            ..Row::default()
        }
    };
    let write = |card: &str, rows: &[Row]| {
        let text: String = rows.iter().map(|row| row.line() + "\n").collect();
        std::fs::create_dir_all(folder.path().join(card)).expect("a folder");
        std::fs::write(folder.path().join(card).join("2026-12-01.jsonl"), text + "{\"what\": \"a model\"}\n").unwrap();
    };
    let (stem, other) = ("qmatmul_q4_mma", "qmatmul_q4_warp");
    write("cpu", &[row("cpu", stem, 16, 9, 0.9, 9)]);
    write("a100", &[row("cuda:0", other, 16, 9, 0.9, 9), row("cuda:0", stem, 1, 9, 0.9, 9)]);
    assert_eq!(share(folder.path(), stem, 16), "-", "of another device, rung or size");
    assert_eq!(share(folder.path(), other, 1), "-", "too far from that size");
    assert_eq!(share(folder.path(), other, 2), "90 % (a100)", "the next size on record");

    let software = Row { software: true, ..row("cuda:0", stem, 16, 9, 0.9, 9) };
    let peer = Row { peer: Some("torch".into()), ..row("cuda:0", stem, 16, 9, 0.9, 9) };
    let none = Row { roofline_fraction: None, ..row("cuda:0", stem, 16, 9, 0.9, 9) };
    let rows = [row("cuda:0", stem, 16, 5, 0.614, 1), row("cuda:0", stem, 16, 5, 0.416, 2), software, peer, none];
    write("h100", &[&rows[..], &[row("cuda:0", stem, 16, 4, 0.2, 3)]].concat());
    assert_eq!(share(folder.path(), stem, 16), "42 % (h100)");
    write("l40s", &[row("cuda:1", stem, 16, 1, 0.7, 1)]);
    assert_eq!(share(folder.path(), stem, 16), "42 % (h100), 70 % (l40s)");
}

/// Begins and ends the ladder in the README.
const MARKS: [&str; 2] = ["<!-- ladder: written by tests/counts.rs -->\n", "<!-- /ladder -->"];

/// A file is what is counted; `HANDMILL_WRITE=1` makes it so.
fn keep(path: &Path, wanted: &str) {
    if std::env::var_os("HANDMILL_WRITE").is_some() {
        return std::fs::write(path, wanted).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    let has = std::fs::read_to_string(path).unwrap_or_default();
    let differ = has.lines().zip(wanted.lines()).find(|(has, wanted)| has != wanted);
    let what = format!("{} is stale; HANDMILL_WRITE=1 cargo test --test counts writes it", path.display());
    assert!(has == wanted, "{what}; the first line that differs: {differ:#?}");
}

#[test]
fn the_ladders_are_those_that_are_counted() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut all, mut of_readme) = (String::from(HEAD), None);
    for ladder in LADDERS {
        write!(all, "\n## {}\n\n{}\n", ladder.op, ladder.lead).expect("text");
        for format in ladder.formats {
            let spec = ladder.spec(format);
            let table = ladder.table(root, spec);
            let title = if ladder.formats.len() > 1 { format!("\n### {format}\n") } else { String::new() };
            write!(all, "{title}\n{table}\n{}\n", ladder.shaders(spec)).expect("text");
            of_readme.get_or_insert(table);
        }
    }
    keep(&root.join("kernels/LADDERS.md"), &all);

    let path = root.join("README.md");
    let readme = std::fs::read_to_string(&path).expect("README.md");
    let start = readme.find(MARKS[0]).expect("the ladder's mark") + MARKS[0].len();
    let end = start + readme[start..].find(MARKS[1]).expect("the ladder's end");
    let ladder = of_readme.expect("qmatmul's ladder in q4");
    keep(&path, &format!("{}{ladder}{}", &readme[..start], &readme[end..]));
}
