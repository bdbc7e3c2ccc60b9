//! Speed that can be checked: every kernel of the table on real models' shapes, with the device's own limits measured
//! in the same run and the error against the f64 oracle beside each time.
//!
//! ```text
//! for each shape, for each kernel that supports it here:
//!     make inputs whose results the oracle knows for every element          inputs.rs, whole.rs
//!     launch once, hold the outputs against it
//!     fill as many sets of buffers as outlast the last-level cache          measure.rs
//!     warm up, sample by the device's clock, median with p20 and p80
//!     say which share of the measured roofline that is                      roofline.rs
//! ```

pub mod compare;
pub mod inputs;
pub mod measure;
pub mod report;
pub mod roofline;
pub mod row;
pub mod shapes;
mod tiles;
mod whole;

use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::device::{Buffer, Device, Error, Result};
use crate::op::{Caps, Cost, DeviceKind, Kernel};
use crate::tensor::Dtype;
use inputs::Inputs;
use measure::{Arena, Timing};
use roofline::{Card, Roof};
use row::{Kind, Row};
use shapes::{Select, Shape};

/// What to measure and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which shapes.
    pub select: Select,
    /// Only this op, by its name or with its format.
    pub op: Option<String>,
    /// Only this kernel.
    pub kernel: Option<String>,
    /// Only the kernel that would be taken, for each type of activations.
    pub best_only: bool,
    /// Only the kernels that a batch-invariant device takes, each after the one that is taken without that.
    pub batch_invariant: bool,
    /// Operands stay in the cache.
    pub hot: bool,
    /// Seconds of samples for a row.
    pub seconds: f64,
    /// A launch that would take longer, in seconds, is not begun.
    pub longest: f64,
    /// The device's limits are measured first; without them no row has a share of the roofline.
    pub limits: bool,
    /// At most so many rows of kernels.
    pub most_rows: usize,
    /// Where each case's inputs with f32 activations are written for another program, if anywhere.
    pub save_inputs: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            select: Select::default(),
            op: None,
            kernel: None,
            best_only: false,
            batch_invariant: false,
            hot: false,
            seconds: 0.5,
            longest: 5.0,
            limits: true,
            most_rows: usize::MAX,
            save_inputs: None,
        }
    }
}

/// A kernel to be measured on a shape: one row.
pub struct Job {
    shape: usize,
    kernel: &'static Kernel,
    /// As a batch-invariant device takes it.
    invariant: bool,
}

/// Measurements on one device.
pub struct Bench<'a> {
    device: &'a dyn Device,
    options: &'a Options,
    adapter: String,
    driver: Option<String>,
    cache: Option<usize>,
    card: Option<&'static Card>,
    roof: Roof,
    arena: Arena<'a>,
    shapes: Vec<Shape>,
    jobs: Vec<Job>,
    /// Of the last job, for the next one.
    inputs: Option<(usize, Dtype, Inputs)>,
    /// The kernel that was taken for the shape of this number without batch invariance, and its median in microseconds.
    free: Option<(usize, &'static Kernel, Option<f64>)>,
}

impl<'a> Bench<'a> {
    /// Plans the rows. An error where nothing fits the options, or where the device has no times to tell.
    pub fn new(device: &'a dyn Device, options: &'a Options) -> Result<Bench<'a>> {
        let invalid = |reason: String| Error::Invalid { what: "bench".into(), reason };
        if device.caps().kind == DeviceKind::PtxSim {
            let reason = "ptx-sim counts and checks, it has no times: `handmill sim KERNEL` shows what it counts";
            return Err(invalid(reason.into()));
        }
        let shapes = options.select.shapes(device.caps().kind);
        let mut jobs = Vec::new();
        for (i, shape) in shapes.iter().enumerate() {
            let spec = shape.spec;
            if options.op.as_ref().is_some_and(|op| op != spec.name && *op != spec.id()) {
                continue;
            }
            if options.batch_invariant {
                jobs.extend(with_and_without(i, shape, device.caps()));
                continue;
            }
            let runs = |kernel: &&Kernel| {
                device.caps().kind.runs(&kernel.source) && (kernel.supports)(&shape.dims, device.caps())
            };
            for kernel in spec.kernels().filter(runs) {
                let chosen =
                    || spec.choose(&shape.dims, kernel.act, device.caps()).is_some_and(|k| k.stem == kernel.stem);
                let wanted = match &options.kernel {
                    Some(stem) => stem == kernel.stem,
                    None => !options.best_only || chosen(),
                };
                if wanted {
                    jobs.push(Job { shape: i, kernel, invariant: false });
                }
            }
        }
        jobs.truncate(options.most_rows);
        if jobs.is_empty() {
            let what = options.kernel.as_deref().or(options.op.as_deref()).unwrap_or("what was asked for");
            return Err(invalid(format!(
                "no kernel of {what} runs on {} with these shapes: look at `handmill verify --device {0}`, or give \
                 other --shapes, --m or --op",
                device.id()
            )));
        }
        let description = device.description();
        let adapter = match device.caps().kind {
            DeviceKind::Cuda | DeviceKind::Wgpu => description.split(", ").next().unwrap_or_default().to_string(),
            _ => description,
        };
        Ok(Bench {
            device,
            options,
            driver: roofline::driver(device),
            cache: roofline::cache_bytes(device),
            card: roofline::datasheet(&adapter).filter(|_| device.caps().kind == DeviceKind::Cuda),
            adapter,
            roof: Roof::default(),
            arena: Arena::new(device),
            shapes,
            jobs,
            inputs: None,
            free: None,
        })
    }

    /// How many rows of kernels are to come.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Never: a plan without rows is an error.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Measures everything; each row is told as soon as it is there. `told` may end the run by an error of its own.
    pub fn run<E: From<Error>>(
        &mut self,
        told: &mut dyn FnMut(&Row) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        for row in self.limits()? {
            told(&row)?;
        }
        for i in 0..self.jobs.len() {
            let mut row = self.measure(i)?;
            self.beside_the_free_one(i, &mut row);
            told(&row)?;
        }
        Ok(())
    }

    /// What all rows share.
    fn row(&self) -> Row {
        let cpu = self.device.caps().kind == DeviceKind::Cpu;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Row {
            device: self.device.id().to_string(),
            adapter: Some(self.adapter.clone()),
            driver: self.driver.clone(),
            software: self.device.caps().software,
            note: self.device.caps().software.then(|| "software: correctness only".to_string()),
            cache_bytes: self.cache.map(|bytes| bytes as u64),
            threads: cpu.then(|| rayon::current_num_threads() as u64),
            load: roofline::load(),
            version: Some(env!("CARGO_PKG_VERSION").to_string()),
            commit: std::env::var("HANDMILL_COMMIT").ok().filter(|commit| !commit.is_empty()),
            unix_time: now.ok().map(|elapsed| elapsed.as_secs()),
            ..Row::default()
        }
    }

    /// The device's limits, and what a launch costs. Software has none worth telling.
    fn limits(&mut self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        if !self.options.limits {
            return Ok(rows);
        }
        if !self.device.caps().software {
            let moved = [
                ("copy", Some(roofline::copy(self.device)?)),
                ("read", roofline::read(self.device)?),
                ("update", roofline::update(self.device)?),
            ];
            for (what, measured) in moved {
                let Some(moved) = measured else { continue };
                let speed = moved.speed();
                self.roof.bytes_per_s = Some(self.roof.bytes_per_s.map_or(speed, |before| before.max(speed)));
                let row = Row { kind: Kind::Roofline, op: "roofline".into(), kernel: what.into(), ..self.row() };
                rows.push(Row {
                    case: format!("{} MiB", moved.through >> 20),
                    cold: true,
                    gb_per_s: Some(speed / 1e9),
                    bytes: Some(moved.bytes as u64),
                    datasheet_fraction: self.card.map(|card| speed / 1e9 / card.gb_per_s),
                    ..timed(row, &moved.timing)
                });
            }
            for act in [Dtype::F32, Dtype::BF16] {
                let Some((stem, timing, flops)) = roofline::matmul(self.device, act, &roofline::FORMATS)? else {
                    continue;
                };
                self.roof.flops_per_s.push((act, flops / timing.least, stem));
                let row = Row { kind: Kind::Roofline, op: "roofline".into(), kernel: stem.into(), ..self.row() };
                let size = (flops / 2.0).cbrt().round();
                let datasheet = self.card.map(|card| {
                    let most = if act == Dtype::F32 { card.f32 } else { card.bf16 };
                    flops / timing.least / 1e12 / most
                });
                rows.push(Row {
                    case: format!("M=N=K={size} {}", act.name()),
                    tflop_per_s: Some(flops / timing.least / 1e12),
                    flops: Some(flops as u64),
                    act: Some(act.name().into()),
                    datasheet_fraction: datasheet,
                    ..timed(row, &timing)
                });
            }
            for factors in [Dtype::BF16, Dtype::I8] {
                let Some((timing, operations)) = roofline::tiles(self.device, factors)? else { continue };
                let speed = operations / timing.least;
                self.roof.flops_per_s.push((factors, speed, "tiles"));
                let row = Row { kind: Kind::Roofline, op: "roofline".into(), kernel: "tiles".into(), ..self.row() };
                rows.push(Row {
                    case: format!("registers {}", factors.name()),
                    tflop_per_s: Some(speed / 1e12),
                    flops: Some(operations as u64),
                    act: Some(factors.name().into()),
                    ..timed(row, &timing)
                });
            }
        }
        if let Some((stem, timing)) = roofline::launch(self.device, self.options.seconds)? {
            let row = Row { kind: Kind::Launch, op: "add_f32".into(), kernel: stem.into(), ..self.row() };
            rows.push(Row { case: "M=1 K=1".into(), ..timed(row, &timing) });
        }
        Ok(rows)
    }

    /// Tells of a batch-invariant kernel what it costs: the one without that property was measured just before, or is
    /// the same.
    fn beside_the_free_one(&mut self, i: usize, row: &mut Row) {
        let Job { shape, kernel, invariant } = self.jobs[i];
        let before = self.free.take().filter(|(of, free, _)| *of == shape && free.act == kernel.act);
        if !invariant {
            self.free = Some((shape, kernel, row.median_us));
            return;
        }
        let (stem, median) = before.map_or((kernel.stem, row.median_us), |(_, free, median)| (free.stem, median));
        (row.free_kernel, row.free_us) = (Some(stem.into()), median);
        row.invariant_cost = row.median_us.zip(median).map(|(with, without)| with / without);
    }

    /// One row.
    fn measure(&mut self, i: usize) -> Result<Row> {
        let Job { shape: number, kernel, invariant } = self.jobs[i];
        let act = kernel.act;
        if self.inputs.as_ref().is_none_or(|(of, dtype, _)| (*of, *dtype) != (number, act)) {
            let shape = &self.shapes[number];
            let made = Inputs::new(shape.spec, &shape.dims, act);
            if let (Some(folder), Dtype::F32) = (&self.options.save_inputs, act) {
                save(folder, shape, act, &made).map_err(|cause| Error::Invalid {
                    what: folder.display().to_string(),
                    reason: cause.to_string(),
                })?;
            }
            self.inputs = Some((number, act, made));
        }
        let (shape, device) = (&self.shapes[number], self.device);
        let (_, _, inputs) = self.inputs.as_ref().expect("made above");
        let (spec, dims, cost) = (shape.spec, &shape.dims, shape.cost());

        let mut row = Row {
            op: spec.id(),
            kernel: kernel.stem.into(),
            case: shape.label(),
            shape: Some(shape.of.clone()),
            m: shape.rows().map(|m| m as u64),
            act: Some(act.name().into()),
            bytes: Some(cost.bytes),
            flops: Some(cost.flops),
            ..self.row()
        };
        self.arena.reset();
        let set_bytes: usize = spec.args.iter().map(|arg| arg.bytes(dims, act).next_multiple_of(256)).sum();
        // Of an unknown cache a large one is assumed.
        let cache = self.cache.unwrap_or(128 << 20);
        let (count, cold) = match self.options.hot {
            true => (1, false),
            false => measure::sets(device.caps().kind, set_bytes, cache, roofline::room(device)),
        };
        let hosts: Vec<Vec<u8>> = (0..spec.args.len()).map(|arg| inputs.bytes(spec, arg)).collect();
        let fill = |arena: &mut Arena<'_>| {
            let upload = |host: &Vec<u8>| {
                let view = arena.take(host.len())?;
                device.write(&view, 0, host)?;
                Ok(view)
            };
            hosts.iter().map(upload).collect::<Result<Vec<Buffer>>>()
        };
        let mut sets = vec![fill(&mut self.arena)?];

        if let Some(seconds) = self.too_long(shape, kernel, invariant, &sets[0])? {
            let limit = self.options.longest;
            row.note =
                Some(format!("not run: a launch would take about {seconds:.0} s, beyond the limit of {limit} s"));
            return Ok(row);
        }
        // What the launches above wrote is poisoned again.
        for (host, view) in hosts.iter().zip(&sets[0]) {
            device.write(view, 0, host)?;
        }
        let args: Vec<&Buffer> = sets[0].iter().collect();
        device.launch(spec, kernel, &args, dims)?;
        device.sync()?;
        if let Some(found) = inputs.error(device, spec, kernel, &sets[0])? {
            row.error = found.error.is_finite().then_some(found.error);
            (row.tolerance, row.error_of) = (Some(found.tolerance), Some(found.how));
            if let Some(failure) = found.failure {
                row.note = Some(format!("WRONG: {failure}"));
            }
        }

        while sets.len() < count {
            sets.push(fill(&mut self.arena)?);
        }
        let mut turn = 0;
        let mut go = || {
            let args: Vec<&Buffer> = sets[turn % sets.len()].iter().collect();
            turn += 1;
            device.launch(spec, kernel, &args, dims)
        };
        let once = device.time(&mut go)?;
        let once = once.min(device.time(&mut go)?);
        let timing = measure::time(device, once, self.options.seconds, &mut go)?;
        row = timed(row, &timing);
        (row.cold, row.sets) = (cold, Some(count as u64));
        if !device.caps().software {
            row.gb_per_s = Some(cost.bytes as f64 / timing.median / 1e9);
            row.tflop_per_s = (cost.flops > 0).then(|| cost.flops as f64 / timing.median / 1e12);
            // The limit that was measured is memory's: of operands in a cache it says nothing.
            let factors = roofline::factors(spec, act);
            if let (true, Some((least, memory))) = (cold, self.roof.least(cost, factors)) {
                row.roofline_fraction = Some(least / timing.median);
                row.bound = Some(if memory { "memory" } else { "compute" }.into());
                row.datasheet_fraction = self.card.map(|card| Roof::least_by(card, cost, factors) / timing.median);
            }
        }
        Ok(row)
    }

    /// The seconds that a launch would take, where that is more than it may: found with ever more rows. A kernel that
    /// takes `any` number of rows is not asked.
    fn too_long(&self, shape: &Shape, kernel: &'static Kernel, any: bool, set: &[Buffer]) -> Result<Option<f64>> {
        /// From so long on a launch keeps the device busy, and more rows take proportionally longer.
        const BUSY: f64 = 0.02;
        let by = match shape.spec.name {
            "qmatmul" | "qmatmul_t" | "attention" | "lora_shrink" | "lora_backward" | "lora_backward_a" | "rmsnorm"
            | "layernorm" | "swiglu" | "gelu" | "add" | "cast" | "rope" | "rmsnorm_backward" | "swiglu_backward"
            | "rope_backward" | "cross_entropy" | "dropout" => "M",
            "cosine_topk" => "Q",
            _ => return Ok(None),
        };
        let (rows, args) = (shape.dims[by], set.iter().collect::<Vec<_>>());
        let mut some = 8;
        while some < rows {
            let dims = shape.dims.clone().with(by, some);
            if any || (kernel.supports)(&dims, self.device.caps()) {
                // The first launch may wait for a compiler and for memory's first touch.
                let mut took = f64::INFINITY;
                for _ in 0..2 {
                    let start = Instant::now();
                    self.device.launch(shape.spec, kernel, &args, &dims)?;
                    self.device.sync()?;
                    took = took.min(start.elapsed().as_secs_f64());
                }
                let work = |cost: Cost| (cost.flops + cost.bytes).max(1) as f64;
                let whole = took * work(shape.cost()) / work((shape.spec.cost)(&dims));
                if took > BUSY && whole > self.options.longest {
                    return Ok(Some(whole));
                }
            }
            some *= 8;
        }
        Ok(None)
    }
}

/// Of a shape and each type of activations the kernel that is taken and the one that a batch-invariant device takes, or
/// that one alone where both are the same. Nothing where no kernel is invariant.
fn with_and_without(shape: usize, of: &Shape, caps: &Caps) -> Vec<Job> {
    let restricted = Caps { batch_invariant: true, ..caps.clone() };
    let mut jobs = Vec::new();
    for act in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let Some(kernel) = of.spec.choose(&of.dims, act, &restricted) else { continue };
        let free = of.spec.choose(&of.dims, act, caps).filter(|free| free.stem != kernel.stem);
        jobs.extend(free.map(|kernel| Job { shape, kernel, invariant: false }));
        jobs.push(Job { shape, kernel, invariant: true });
    }
    jobs
}

/// A row with its times.
fn timed(row: Row, timing: &Timing) -> Row {
    Row {
        median_us: Some(1e6 * timing.median),
        p20_us: timing.p20.map(|t| 1e6 * t),
        p80_us: timing.p80.map(|t| 1e6 * t),
        n: timing.n as u64,
        launches: Some(timing.launches as u64),
        noisy: timing.noisy,
        ..row
    }
}

/// Writes one period of a case's inputs, and what the oracle says of its outputs in f64: a file of bytes each, and a
/// line in `inputs.jsonl` that names them. Other programs repeat them along every axis to the shape that is told. A
/// case whose outputs are not known is left out.
fn save(folder: &std::path::Path, shape: &Shape, act: Dtype, inputs: &Inputs) -> std::io::Result<()> {
    use std::io::Write;
    let Some(expected) = inputs.expected() else { return Ok(()) };
    std::fs::create_dir_all(folder)?;
    let (tensors, _) = inputs.period();
    let mut expected = expected.iter();
    let mut index = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("inputs.jsonl"))?;
    let stem: String = format!("{}-{}-{}", shape.spec.id(), act.name(), shape.label().replace([' ', '='], "_"));
    let mut args = Vec::new();
    for (arg, tensor) in shape.spec.args.iter().zip(tensors) {
        let file = format!("{stem}-{}.bin", arg.name);
        let output = arg.role != crate::op::Role::In;
        let known = if output { expected.next() } else { None };
        match known {
            Some(known) => std::fs::write(folder.join(&file), bytemuck::cast_slice(&known.value))?,
            None => std::fs::write(folder.join(&file), tensor.bytes.as_slice())?,
        }
        args.push(serde_json::json!({
            "name": arg.name,
            "dtype": if output { "f64" } else { tensor.dtype.name() },
            "period": tensor.shape,
            "shape": arg.shape(&shape.dims),
            "output": output,
            "file": file,
        }));
    }
    let line = serde_json::json!({
        "op": shape.spec.id(),
        "case": shape.label(),
        "shape": shape.of,
        "act": act.name(),
        "flops": shape.cost().flops,
        "bytes": shape.cost().bytes,
        "args": args,
    });
    writeln!(index, "{line}")
}
