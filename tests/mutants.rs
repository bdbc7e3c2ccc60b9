//! Faults put into the real kernels, to see that the checks would catch them: a mutant must end in a refusal, a finding
//! or a result that the oracle does not pass. Those that survive stand in `tests/mutants.txt` below the reason: they
//! are equivalent, computing the same, or no small case can tell them.
//!
//! A sample that depends on the kernels' text alone is run; `HANDMILL_MUTANTS=all` runs every one,
//! `HANDMILL_MUTANTS=stem` all of the kernels whose names contain it.

use handmill::device::{ptx_sim::PtxSim, Buffer, Device, Error, Result};
use handmill::op::{Caps, Dims, File, Kernel, OpSpec, Source};
use handmill::ops::OPS;
use handmill::verify;
use ptx_sim::{mutants, Class, Mutant, Options};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Instant;

/// Mutants of one kernel that a sample has at most.
const A_KERNEL: usize = 14;
/// Instructions that one warp may run: a mutant that never ends is caught by this.
const STEPS: u64 = 1 << 19;
/// Cases beyond this many operations are left out, but for each kernel's smallest two.
const FLOPS: u64 = 20_000_000;
/// Small shapes beside an op's cases, where those that tell a mistake are large: each op's id, and its dims.
const SHAPES: &[(&str, &[&[usize]])] = &[
    ("adamw_f32", &[&[2, 1], &[3, 1], &[4, 1], &[1025, 1]]),
    ("add_f32", &[&[1, 2], &[1, 4]]),
    ("attention_f32", &[&[65, 1, 1, 4, 70], &[33, 2, 1, 128, 40], &[2, 1, 1, 129, 9]]),
    ("cast_bf16", &[&[1, 2], &[1, 4]]),
    ("cosine_topk_f16", &[&[57, 173, 64, 173, 1, 0, 0], &[9, 9, 64, 3, 4, 0, 0]]),
    (
        "cosine_topk_f32",
        &[
            &[57, 173, 64, 173, 1, 0, 0],
            &[9, 9, 64, 3, 4, 0, 0],
            &[64, 205, 4, 205, 1, 0, 0],
            &[64, 205, 4, 9, 1, 0, 0],
        ],
    ),
    ("cosine_topk_i8", &[&[57, 173, 128, 173, 1, 0, 0], &[9, 9, 64, 3, 4, 0, 0], &[3, 9, 1030, 3, 1, 0, 0]]),
    ("gelu_f32", &[&[1, 2], &[1, 4]]),
    // Ranks by twos; tiles that end with M.
    ("lora_backward_a_f32", &[&[32, 36, 6, 0]]),
    ("lora_backward_f32", &[&[40, 36, 6, 36, 0, 0], &[32, 36, 32, 36, 0, 0]]),
    ("lora_shrink_f32", &[&[40, 36, 6, 6, 0, 0], &[32, 64, 32, 32, 0, 0]]),
    ("qmatmul_bf16", &[&[2, 65, 40, 65, 0, 1, 40], &[8, 3, 1032, 3, 0, 0, 0], &[48, 9, 40, 9, 0, 0, 0]]),
    ("qmatmul_f16", &[&[2, 65, 40, 65, 0, 1, 40], &[8, 3, 1032, 3, 0, 0, 0], &[48, 9, 40, 9, 0, 0, 0]]),
    ("qmatmul_f32", &[&[2, 65, 40, 65, 0, 1, 40]]),
    // A rank beside three and four tiles of 128 columns: S lies where one tile or two beyond the last would come.
    (
        "qmatmul_nf4",
        &[
            &[17, 200, 128, 200, 0, 0, 17],
            &[2, 3, 64, 3, 0, 0, 40],
            &[17, 1, 4160, 1, 0, 0, 0],
            &[9, 9, 320, 9, 0, 0, 1],
            &[9, 9, 512, 9, 0, 0, 1],
            &[1, 2048, 64, 2048, 0, 0, 0],
        ],
    ),
    (
        "qmatmul_nf4dq",
        &[
            &[17, 200, 128, 200, 0, 0, 17],
            &[2, 3, 64, 3, 0, 0, 40],
            &[17, 1, 4160, 1, 0, 0, 0],
            &[9, 9, 320, 9, 0, 0, 1],
            &[9, 9, 512, 9, 0, 0, 1],
            &[1, 1, 8256, 1, 0, 0, 0],
        ],
    ),
    (
        "qmatmul_q4",
        &[
            &[64, 200, 64, 200, 0, 0, 33, 32, 0],
            &[17, 1, 4160, 1, 0, 0, 0, 32, 0],
            &[9, 9, 320, 9, 0, 0, 1, 32, 0],
            &[9, 9, 512, 9, 0, 0, 1, 32, 0],
            &[1, 2048, 64, 2048, 0, 0, 0, 32, 0],
        ],
    ),
    (
        "qmatmul_q8",
        &[
            &[64, 200, 64, 200, 0, 0, 33, 32, 0, 1],
            &[17, 1, 4160, 1, 0, 0, 0, 32, 0, 0],
            &[9, 9, 320, 9, 0, 0, 1, 32, 0, 1],
            &[9, 9, 512, 9, 0, 0, 1, 32, 0, 1],
        ],
    ),
    ("qmatmul_t_bf16", &[&[48, 9, 40, 16, 0, 0, 0]]),
    ("qmatmul_t_f16", &[&[48, 9, 40, 16, 0, 0, 0]]),
    ("squared_norm_f32", &[&[64, 4]]),
    ("swiglu_f32", &[&[1, 2], &[1, 4]]),
    ("swiglu_backward_f32", &[&[1, 2], &[1, 4]]),
];
/// Share that must be caught of the mutants that are not equivalent.
const CAUGHT: f64 = 95.0;

/// The executor with a limit of steps.
struct Limited(PtxSim);

impl Device for Limited {
    fn id(&self) -> &str {
        self.0.id()
    }
    fn description(&self) -> String {
        self.0.description()
    }
    fn caps(&self) -> &Caps {
        self.0.caps()
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.0.alloc(bytes)
    }
    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        self.0.write(target, offset, source)
    }
    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        self.0.read(source, offset, target)
    }
    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        self.0.copy(from, from_offset, to, to_offset, bytes)
    }
    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        let options = Options { checked: true, impatient: true, step_limit: STEPS, threads: 1, ..Options::default() };
        match self.0.run(spec, kernel, args, dims, &options)? {
            Some(ran) if !ran.report.findings.is_empty() => {
                let reason = ran.report.findings[0].to_string();
                Err(Error::Invalid { what: kernel.stem.into(), reason })
            }
            _ => Ok(()),
        }
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.0.time(work)
    }
}

/// A kernel to put faults into, and the cases to look for them with, the cheapest first.
struct Victim {
    spec: &'static OpSpec,
    kernel: &'static Kernel,
    file: File,
    cases: Vec<Dims>,
}

fn victims() -> Vec<Victim> {
    let sim = PtxSim::new();
    let rows = OPS.iter().flat_map(|&spec| spec.kernels().map(move |kernel| (spec, kernel)));
    let victim = |(spec, kernel): (&'static OpSpec, &'static Kernel)| {
        let Source::Ptx(file) = kernel.source else { return None };
        let mut cases: Vec<Dims> = spec.cases.iter().map(|case| spec.case_dims(case)).collect();
        cases.retain(|dims| (kernel.supports)(dims, sim.caps()));
        let work = |dims: &Dims| (spec.cost)(dims).flops.max((spec.cost)(dims).bytes / 4);
        cases.sort_by_key(work);
        let cheap = cases.iter().filter(|dims| work(dims) <= FLOPS).count();
        cases.truncate(cheap.max(2));
        let shapes = SHAPES.iter().filter(|(id, _)| *id == spec.id()).flat_map(|(_, shapes)| *shapes);
        cases.extend(shapes.map(|dims| spec.dims(dims, spec.cases[1].scalars)));
        cases.retain(|dims| (kernel.supports)(dims, sim.caps()));
        cases.sort_by_key(work);
        Some(Victim { spec, kernel, file, cases })
    };
    rows.filter_map(victim).collect()
}

/// Whether the kernel with another text passes every case.
fn survives(victim: &Victim, text: &str) -> bool {
    let &Kernel { stem, act, launch, supports, .. } = victim.kernel;
    // A mutant is as long-lived as the table's kernels: the devices keep what they compile by name.
    let text: &'static str = Box::leak(text.to_string().into_boxed_str());
    let source = Source::Ptx(File { path: victim.file.path, text });
    let kernel: &'static Kernel = Box::leak(Box::new(Kernel { stem, source, act, launch, supports }));
    let device = Limited(PtxSim::new());
    victim.cases.iter().all(|dims| {
        let outcome = verify::check(&device, victim.spec, kernel, dims, 1);
        outcome.is_ok_and(|outcome| outcome.failure.is_none())
    })
}

/// FNV-1a: a number for a text, the same everywhere.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The mutants of a text. Of those that differ in numbers only, as unrolled statements do, the first stands for all.
fn distinct(text: &str) -> Vec<Mutant> {
    let mut seen = BTreeSet::new();
    let mut all = mutants(text);
    all.retain(|mutant| seen.insert(mutant.change.replace(|c: char| c.is_ascii_digit(), "")));
    all
}

/// The same mutants as long as a kernel stays the same: those whose numbers are smallest.
fn sample(stem: &str, mut all: Vec<Mutant>) -> Vec<Mutant> {
    all.sort_by_cached_key(|mutant| hash(&format!("{stem} {} {}", mutant.line, mutant.change)));
    all.truncate(A_KERNEL);
    all
}

/// `stem: change`, the key of a survivor.
fn key(victim: &Victim, mutant: &Mutant) -> String {
    format!("{}: {}", victim.kernel.stem, mutant.change)
}

/// The survivors that are explained, and whether they are equivalent: lines `stem: change`, each below the line
/// `# equivalent: ..` or `# not told: ..` that says why.
fn explained() -> BTreeMap<String, bool> {
    let (mut equivalent, mut all) = (false, BTreeMap::new());
    for line in include_str!("mutants.txt").lines().filter(|line| !line.is_empty()) {
        match line.strip_prefix("# ") {
            Some(reason) => equivalent = reason.starts_with("equivalent: "),
            None => {
                all.insert(line.to_string(), equivalent);
            }
        }
    }
    all
}

#[test]
fn faults_in_the_kernels_are_caught() {
    // The mutants are the text to run, whatever folder kernels are read from otherwise.
    std::env::remove_var("HANDMILL_SOURCES");
    let wanted = std::env::var("HANDMILL_MUTANTS").ok();
    let all = wanted.as_deref() == Some("all");
    let victims = victims();
    let mut jobs = Vec::new();
    for victim in &victims {
        let mutants = distinct(victim.file.text);
        match &wanted {
            Some(word) if all || victim.kernel.stem.contains(word.as_str()) => {
                jobs.extend(mutants.into_iter().map(|mutant| (victim, mutant)));
            }
            Some(_) => {}
            None => jobs.extend(sample(victim.kernel.stem, mutants).into_iter().map(|mutant| (victim, mutant))),
        }
    }
    assert!(!jobs.is_empty(), "no kernel is named so");
    for victim in &victims {
        assert!(survives(victim, victim.file.text), "{} itself does not pass", victim.kernel.stem);
    }

    let (next, survivors, start) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Instant::now());
    let slowest = Mutex::new((0.0, String::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some((victim, mutant)) = jobs.get(i) else { break };
                let began = Instant::now();
                if survives(victim, &mutant.source) {
                    survivors.lock().unwrap().push(i);
                }
                let seconds = began.elapsed().as_secs_f64();
                let mut slowest = slowest.lock().unwrap();
                if seconds > slowest.0 {
                    *slowest = (seconds, key(victim, mutant));
                }
            });
        }
    });

    let mut survivors = survivors.into_inner().unwrap();
    survivors.sort();
    let mut classes: BTreeMap<Class, (usize, usize)> = BTreeMap::new();
    for (i, (_, mutant)) in jobs.iter().enumerate() {
        let entry = classes.entry(mutant.class).or_default();
        entry.0 += 1;
        entry.1 += usize::from(survivors.binary_search(&i).is_err());
    }
    for (class, (made, caught)) in &classes {
        println!("{class:<12} {caught:>5} of {made:>5} caught");
    }
    let slowest = slowest.into_inner().unwrap();
    println!("{:.1} s, the slowest {:.1} s: {}", start.elapsed().as_secs_f64(), slowest.0, slowest.1);

    let explained = explained();
    let found: BTreeSet<String> = survivors.iter().map(|&i| key(jobs[i].0, &jobs[i].1)).collect();
    let ran: BTreeSet<String> = jobs.iter().map(|(victim, mutant)| key(victim, mutant)).collect();
    let unexplained: Vec<&String> = found.iter().filter(|key| !explained.contains_key(*key)).collect();
    let caught: Vec<&String> = explained.keys().filter(|key| ran.contains(*key) && !found.contains(*key)).collect();
    let equivalent = survivors.iter().filter(|&&i| explained.get(&key(jobs[i].0, &jobs[i].1)) == Some(&true)).count();
    let share = |all: usize| 100.0 * (jobs.len() - survivors.len()) as f64 / all as f64;
    let told = share(jobs.len() - equivalent);
    println!(
        "{:.1} % of {} mutants caught; {told:.1} % without {equivalent} equivalent",
        share(jobs.len()),
        jobs.len()
    );
    let list = |keys: &[&String]| keys.iter().map(|key| format!("{key}\n")).collect::<String>();
    assert!(unexplained.is_empty(), "mutants that no check catches and nothing explains:\n{}", list(&unexplained));
    assert!(caught.is_empty(), "tests/mutants.txt explains mutants that are caught; remove:\n{}", list(&caught));
    if wanted.is_none() {
        assert!(told >= CAUGHT, "{told:.1} % of the mutants are caught, at least {CAUGHT} % must be");
        let keys = |victim: &Victim| -> Vec<String> {
            distinct(victim.file.text).iter().map(|mutant| key(victim, mutant)).collect()
        };
        let exist: BTreeSet<String> = victims.iter().flat_map(keys).collect();
        let gone: Vec<&String> = explained.keys().filter(|key| !exist.contains(*key)).collect();
        assert!(gone.is_empty(), "tests/mutants.txt explains mutants that there are not:\n{}", list(&gone));
    }
}
