//! The public face: parse a module once, launch its entries many times.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use crate::ast::ParamDecl;
use crate::cache::Sectors;
use crate::check::{Finding, Findings, GlobalShadow, Kind};
use crate::counts::{BufferCount, Counts};
use crate::decode::{decode, dynamic_base};
use crate::error::{At, Error, Place};
use crate::exec::{Ctx, Machine};
use crate::inst::{Op, Program, NONE};
use crate::memory::{BufferId, Memory, View};
use crate::trace::{TraceStep, TraceWarp};

/// A parsed source; immutable, cheap to clone, shared between threads.
#[derive(Clone)]
pub struct Module {
    inner: Arc<Inner>,
}

struct Inner {
    source: String,
    entries: Vec<Entry>,
    programs: HashMap<String, Program>,
    constants: Bank,
    globals: Bank,
    arch: u32,
}

/// A kernel's declaration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Source line of `.entry`.
    pub line: u32,
    /// Parameters, in launch order.
    pub params: Vec<ParamDecl>,
    /// The block that `.reqntid` demands.
    pub reqntid: Option<[u32; 3]>,
    /// The largest block that `.maxntid` allows.
    pub maxntid: Option<[u32; 3]>,
    /// Bytes of static shared memory.
    pub static_shared: u32,
    /// Whether it names dynamic shared memory.
    pub dynamic_shared: bool,
    /// Registers declared.
    pub registers: u32,
    /// Most 32-bit registers live at once: an estimate of what the assembler allocates.
    pub live_registers: u32,
    /// `.target`.
    pub target: String,
}

/// One argument of a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Param {
    /// The address of a buffer.
    Buffer(BufferId),
    /// An address within a buffer: the buffer and bytes from its start.
    Offset(BufferId, u32),
    /// The address of a part of a buffer: bytes from its start, a multiple of 256, and how many. What lies beside them
    /// is out of bounds, as if the part were a buffer of its own.
    View(BufferId, usize, usize),
    /// Bytes, as many as the parameter has.
    Bytes(Vec<u8>),
}

/// Grid, block and arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
    /// In the order of the entry's parameters.
    pub params: Vec<Param>,
}

/// How to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Look for faults and report them as findings; slower.
    pub checked: bool,
    /// Count instructions, sectors, waves and bytes.
    pub count: bool,
    /// Record one warp.
    pub trace: Option<TraceWarp>,
    /// Instructions that one warp may run.
    pub step_limit: u64,
    /// Blocks at a time; 0 for as many as rayon has threads.
    pub threads: usize,
    /// Bytes of the first-level cache that [`BufferCount::missed`] supposes for each block. A multiprocessor's is shared
    /// with its other blocks and with shared memory, 192 or 256 KiB in all.
    pub l1_bytes: u32,
    /// Each `mbarrier.try_wait` times out once before it waits, as PTX lets it: who does not ask again goes on too early.
    pub impatient: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            checked: false,
            count: false,
            trace: None,
            step_limit: 1 << 30,
            threads: 0,
            l1_bytes: 128 << 10,
            impatient: false,
        }
    }
}

/// What a launch brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Empty when not checked, or when all is well.
    pub findings: Vec<Finding>,
    /// What it did.
    pub counts: Counts,
    /// Each parameter's address; 0 for those that are none.
    pub addresses: Vec<u64>,
    /// Bytes of each parameter's buffer, when counted; zeros for parameters that are none.
    pub params: Vec<BufferCount>,
    /// The traced warp's instructions.
    pub trace: Vec<TraceStep>,
}

impl Module {
    /// Parses and decodes all entries; `name` is the file in messages.
    pub fn parse(source: &str, name: &str) -> Result<Module, Error> {
        let located = |e: At| Error::Parse { file: name.to_string(), line: e.line, message: e.message };
        let raw = crate::parse::parse(source).map_err(located)?;
        let mut entries = Vec::new();
        let mut programs = HashMap::new();
        for e in &raw.entries {
            let program = decode(&raw, e).map_err(located)?;
            entries.push(Entry {
                name: e.name.clone(),
                line: e.line,
                params: e.params.clone(),
                reqntid: e.reqntid,
                maxntid: e.maxntid,
                static_shared: e.shared,
                dynamic_shared: e.dynamic_shared,
                registers: e.regs.len() as u32,
                live_registers: program.live,
                target: raw.target.clone(),
            });
            programs.insert(e.name.clone(), program);
        }
        let (constants, globals) = (Bank::new(&raw.constants), Bank::new(&raw.globals));
        Ok(Module {
            inner: Arc::new(Inner { source: source.into(), entries, programs, constants, globals, arch: raw.arch }),
        })
    }

    /// The kernels, in source order.
    pub fn entries(&self) -> &[Entry] {
        &self.inner.entries
    }

    /// The kernel of that name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.inner.entries.iter().find(|e| e.name == name)
    }
}

/// The module's own variables, aligned for every access.
pub(crate) struct Bank {
    pub words: Vec<u128>,
    pub len: usize,
}

impl Bank {
    fn new(bytes: &[u8]) -> Bank {
        let word = |c: &[u8]| {
            let mut w = [0; 16];
            w[..c.len()].copy_from_slice(c);
            u128::from_ne_bytes(w)
        };
        Bank { words: bytes.chunks(16).map(word).collect(), len: bytes.len() }
    }
}

/// Bytes of shared memory that one block may have on a compute capability (major·10 + minor).
pub fn shared_limit(arch: u32) -> u32 {
    match arch {
        80 | 87 => 163 * 1024,
        86 | 89 | 120 => 99 * 1024,
        _ => 227 * 1024,
    }
}

/// Static shared memory that the assembler accepts.
const STATIC_LIMIT: u32 = 48 * 1024;
/// Registers a thread can name, and registers of one multiprocessor.
const REGISTERS: u32 = 255;
const REGISTER_FILE: u32 = 65536;

/// Runs one entry over the grid.
///
/// Errors: an unknown entry, arguments or a block that do not fit, and faults: what has no result to go on with, such
/// as an access out of bounds when unchecked, a deadlock, or the step limit.
pub fn launch(
    module: &Module,
    entry: &str,
    memory: &mut Memory,
    launch: &Launch,
    options: &Options,
) -> Result<Report, Error> {
    let refuse = |message: String| Error::Launch { kernel: entry.to_string(), message };
    let (Some(decl), Some(program)) = (module.entry(entry), module.inner.programs.get(entry)) else {
        let names: Vec<&str> = module.entries().iter().map(|e| e.name.as_str()).collect();
        return Err(refuse(format!("no such entry; the module has {}", names.join(", "))));
    };
    let threads = launch.block.iter().map(|d| u64::from(*d)).product::<u64>();
    let blocks = launch.grid.iter().map(|d| u128::from(*d)).product::<u128>();
    if threads == 0 || blocks == 0 {
        return Err(refuse(format!("an empty grid {:?} or block {:?}", launch.grid, launch.block)));
    }
    if threads > 1024 || launch.block[2] > 64 {
        return Err(refuse(format!("a block of {:?}: at most 1024 threads, 64 along z", launch.block)));
    }
    if launch.grid[1] > 65535 || launch.grid[2] > 65535 || launch.grid[0] > 0x7fff_ffff || blocks > 0x3fff_ffff {
        return Err(refuse(format!(
            "a grid of {:?}: at most 2^31-1, 65535, 65535, and 2^30-1 blocks here",
            launch.grid
        )));
    }
    if let Some(want) = decl.reqntid.filter(|r| *r != launch.block) {
        return Err(refuse(format!("a block of {:?}, but `.reqntid` demands {want:?}", launch.block)));
    }
    if let Some(most) = decl.maxntid.filter(|m| m.iter().map(|d| u64::from(*d)).product::<u64>() < threads) {
        return Err(refuse(format!("a block of {:?} is larger than `.maxntid` {most:?}", launch.block)));
    }
    let shared = u64::from(dynamic_base(program.static_shared)) + u64::from(launch.dynamic_shared);
    let shared = if launch.dynamic_shared == 0 { u64::from(program.static_shared) } else { shared };
    if shared > u64::from(1u32 << 20) {
        return Err(refuse(format!("{shared} bytes of shared memory")));
    }
    let placed = place(decl, memory, launch).map_err(refuse)?;
    let params = param_block(decl, launch, &placed).map_err(refuse)?;

    let buffers = memory.buffers();
    let mut views = memory.views();
    for param in &launch.params {
        if let Param::View(id, start, bytes) = param {
            views.push(views[id.index()].part(*start, *bytes));
        }
    }
    let names: Vec<(usize, &str)> =
        placed.iter().zip(&decl.params).filter_map(|(at, p)| at.map(|(view, _)| (view, p.name.as_str()))).collect();
    let shadows: Vec<Option<GlobalShadow>> = if options.checked && blocks > 1 {
        let written = written_views(program, launch, &placed);
        let shadow = |(i, v): (usize, &View)| {
            let tracked = !v.data.is_null() && written.as_ref().is_none_or(|w| w.contains(&i));
            tracked.then(|| GlobalShadow::new(v.len, program.global_grain))
        };
        views.iter().enumerate().map(shadow).collect()
    } else {
        views.iter().map(|_| None).collect()
    };
    let ctx = Ctx {
        program,
        kernel: entry,
        source: &module.inner.source,
        views: &views,
        names: &names,
        shadows: &shadows,
        constants: &module.inner.constants,
        globals: &module.inner.globals,
        params: &params,
        grid: launch.grid,
        block: launch.block,
        shared: shared as u32,
        dynamic_shared: launch.dynamic_shared,
        count: options.count,
        l1_bytes: options.l1_bytes,
        impatient: options.impatient,
        trace: options.trace.clone(),
        step_limit: options.step_limit,
    };
    let mut report = run_grid(&ctx, blocks as u64, options)?;
    report.addresses = placed.iter().map(|at| at.map_or(0, |(_, address)| address)).collect();
    if options.count {
        let of = |at: &Option<(usize, u64)>| at.map_or(BufferCount::default(), |(view, _)| report.counts.buffers[view]);
        report.params = placed.iter().map(of).collect();
        report.counts.buffers.truncate(buffers);
    }
    if options.checked {
        let mut all = Findings::default();
        static_findings(module, decl, program, &ctx, threads as u32, &mut all);
        let reached = report.findings.iter().any(|f| f.kind == Kind::MissingReturn);
        report
            .findings
            .extend(all.into_list(entry).into_iter().filter(|f| !(reached && f.kind == Kind::MissingReturn)));
        report.findings.sort_by_key(|f| (f.place.line, f.kind));
    } else {
        // What an unchecked launch wrote is unknown in detail; its outputs count as written.
        match written_views(program, launch, &placed) {
            None => (0..buffers).for_each(|i| memory.mark_initialised(BufferId(i as u32), 0..usize::MAX)),
            Some(views) => {
                for (param, _) in
                    launch.params.iter().zip(&placed).filter(|(_, at)| at.is_some_and(|a| views.contains(&a.0)))
                {
                    match param {
                        Param::Buffer(id) | Param::Offset(id, _) => memory.mark_initialised(*id, 0..usize::MAX),
                        Param::View(id, start, bytes) => memory.mark_initialised(*id, *start..*start + *bytes),
                        Param::Bytes(_) => {}
                    }
                }
            }
        }
    }
    Ok(report)
}

/// A view of a buffer begins at a multiple of this, as allocations of a driver do.
const VIEW_ALIGNMENT: usize = 256;

/// Each parameter's view and address, where it is one. Views of parts follow those of the buffers.
fn place(decl: &Entry, memory: &Memory, launch: &Launch) -> Result<Vec<Option<(usize, u64)>>, String> {
    if launch.params.len() != decl.params.len() {
        return Err(format!("{} arguments for {} parameters", launch.params.len(), decl.params.len()));
    }
    let mut parts = memory.buffers();
    let mut placed = Vec::with_capacity(launch.params.len());
    for (p, arg) in decl.params.iter().zip(&launch.params) {
        let (id, at) = match arg {
            Param::Buffer(id) => (id, (id.index(), id.address())),
            Param::Offset(id, offset) => (id, (id.index(), id.address() + u64::from(*offset))),
            Param::View(id, start, bytes) => {
                if start % VIEW_ALIGNMENT != 0 || start.checked_add(*bytes).is_none_or(|end| end > memory.len_of(*id)) {
                    let (name, all) = (&p.name, memory.len_of(*id));
                    return Err(format!(
                        "`{name}` is bytes {start}+{bytes} of a buffer of {all}; a view lies inside, at a multiple of \
                         {VIEW_ALIGNMENT}"
                    ));
                }
                let part = BufferId(parts as u32);
                parts += 1;
                (id, (part.index(), part.address()))
            }
            Param::Bytes(_) => {
                placed.push(None);
                continue;
            }
        };
        if p.size != 8 || !memory.exists(*id) {
            return Err(format!("`{}` has {} bytes, or its buffer {} is gone", p.name, p.size, id.index()));
        }
        placed.push(Some(at));
    }
    Ok(placed)
}

/// The bytes that `ld.param` reads.
fn param_block(decl: &Entry, launch: &Launch, placed: &[Option<(usize, u64)>]) -> Result<Vec<u8>, String> {
    let mut block = vec![0; decl.params.last().map_or(0, |p| p.offset + p.size) as usize];
    for ((p, arg), at) in decl.params.iter().zip(&launch.params).zip(placed) {
        let address = at.map_or([0; 8], |(_, address)| address.to_le_bytes());
        let bytes = if let Param::Bytes(bytes) = arg { &bytes[..] } else { &address[..] };
        if bytes.len() != p.size as usize {
            return Err(format!("`{}` has {} bytes, its argument {}", p.name, p.size, bytes.len()));
        }
        block[p.offset as usize..(p.offset + p.size) as usize].copy_from_slice(bytes);
    }
    Ok(block)
}

/// Views that the kernel may write; none: any.
fn written_views(program: &Program, launch: &Launch, placed: &[Option<(usize, u64)>]) -> Option<Vec<usize>> {
    if program.written == u64::MAX {
        return None;
    }
    let mut views = Vec::new();
    for (i, at) in placed.iter().enumerate().filter(|(i, _)| program.written >> i.min(&63) & 1 == 1) {
        match (at, &launch.params[i]) {
            (Some((view, _)), _) => views.push(*view),
            (None, Param::Bytes(_)) if i < 64 => return None,
            (None, _) => {}
        }
    }
    Some(views)
}

/// Facts of the launch and the text rather than of a thread.
fn static_findings(module: &Module, decl: &Entry, program: &Program, ctx: &Ctx, threads: u32, findings: &mut Findings) {
    let place = Place { line: decl.line, ..Place::default() };
    let limit = shared_limit(module.inner.arch);
    if decl.static_shared > STATIC_LIMIT {
        let message =
            || format!("{} bytes of static shared memory; the assembler accepts {STATIC_LIMIT}", decl.static_shared);
        findings.add(Kind::Resources, place, message);
    } else if ctx.shared > limit {
        let message = || format!("{} bytes of shared memory; {} has {limit} for a block", ctx.shared, decl.target);
        findings.add(Kind::Resources, place, message);
    }
    let room = (REGISTER_FILE / threads.next_multiple_of(32)).min(REGISTERS);
    if program.live > room {
        let message =
            || format!("{} registers live at once; a block of {threads} threads has room for {room}", program.live);
        findings.add(Kind::Resources, place, message);
    }
    let ends = |op: &Op| matches!(op, Op::Ret | Op::Bra | Op::Trap);
    if !program.code.last().is_some_and(|i| ends(&i.op) && i.guard == NONE) {
        let place = Place { line: program.last_line, ..Place::default() };
        findings.add(Kind::MissingReturn, place, || "the last instruction does not end the kernel".into());
    }
}

/// All blocks, in order of their number, on as many threads as asked.
fn run_grid(ctx: &Ctx, blocks: u64, options: &Options) -> Result<Report, Error> {
    let workers = if options.threads == 0 { rayon::current_num_threads() } else { options.threads };
    let workers = (workers as u64).min(blocks).max(1);
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let error: Mutex<Option<(u64, Error)>> = Mutex::new(None);
    let work = |_: usize| {
        let mut machine = Machine::new(ctx, options.checked);
        let mut warps = machine.warps();
        while !failed.load(Ordering::Relaxed) {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= blocks {
                break;
            }
            let ran = if options.checked {
                machine.run_block::<true>(&mut warps, block)
            } else {
                machine.run_block::<false>(&mut warps, block)
            };
            if let Err(e) = ran {
                failed.store(true, Ordering::Relaxed);
                // A poisoned lock still holds a valid option.
                let mut first = error.lock().unwrap_or_else(|p| p.into_inner());
                if first.as_ref().is_none_or(|f| block < f.0) {
                    *first = Some((block, e));
                }
            }
        }
        (machine.findings, machine.counts, machine.trace, machine.caches.touched)
    };
    let results: Vec<_> = if workers == 1 {
        vec![work(0)]
    } else {
        (0..workers as usize).into_par_iter().with_max_len(1).map(work).collect()
    };
    if let Some((_, e)) = error.into_inner().unwrap_or_else(|p| p.into_inner()) {
        return Err(e);
    }
    let mut report = Report::default();
    let mut findings = Findings::default();
    let mut touched: Vec<[Sectors; 2]> = Vec::new();
    for (i, (found, counts, trace, sectors)) in results.into_iter().enumerate() {
        findings.merge(found);
        if i == 0 {
            (report.counts, touched) = (counts, sectors);
        } else {
            report.counts.merge(&counts);
            for (all, [loaded, stored]) in touched.iter_mut().zip(sectors) {
                all[0].merge(loaded);
                all[1].merge(stored);
            }
        }
        report.trace.extend(trace);
    }
    for (count, [loaded, stored]) in report.counts.buffers.iter_mut().zip(&touched) {
        (count.distinct_read, count.distinct_written) = (loaded.bytes(), stored.bytes());
    }
    report.findings = findings.into_list(ctx.kernel);
    Ok(report)
}
