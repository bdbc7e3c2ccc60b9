//! One scan of the rows by a kernel: launches over slabs of them, on the host where they lie or on a device they are
//! copied to.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::codes::QueryCodes;
use super::{Codes, Corpus, Exact, Rows, MAX_NORM};
use crate::device::{self, Buffer, Device};
use crate::op::{DeviceKind, Dims, Kernel, OpSpec, Slice, Source};
use crate::ops::cosine_topk::select::Scored;
use crate::ops::cosine_topk::{self, CODE_PITCH, MAX_CODES, MAX_K, NO_ROW};
use crate::tensor::Dtype;
use crate::Error;

/// Most queries of a launch.
pub const MAX_QUERIES: usize = 1024;
/// Most bytes of rows in a launch of a device with memory of its own.
const SLAB: usize = 256 << 20;
/// Most places of a launch's lists.
const MAX_PLACES: usize = 1 << 24;
/// Rows that a split has at least, so that filling its lists is a small part of its work.
const SPLIT_ROWS: usize = 1024;
/// Splits of a slab on a device: blocks for every processor of a large one.
const DEVICE_SPLITS: usize = 128;
/// Rows of the host's first launch. Each one after it takes so many times the rows before it, whose lists give it a floor:
/// what is put in lists is little, however many splits there are.
const FIRST: usize = 4096;
const GROWTH: usize = 8;

/// What a scan found for one query.
pub struct Candidates {
    /// Rows with the kernel's scores, by (score descending, row ascending).
    pub rows: Vec<Scored>,
    /// No other row that counts has more by the kernel; −∞ where there is none.
    pub outside: f32,
    /// How far the kernel's score of any row may be from the true one.
    pub error: f64,
}

/// The rows as a kernel takes them.
#[derive(Clone, Copy)]
enum Stored<'a> {
    Exact(Exact<'a>),
    Codes(&'a Codes<'a>),
}

/// Scans with one op and one activation type.
pub struct Pass<'a> {
    device: &'a dyn Device,
    spec: &'static OpSpec,
    act: Dtype,
    stored: Stored<'a>,
    d: usize,
    /// In order, all rows. A host has no buffers; a device has them as far as its memory goes.
    slabs: Vec<Slab>,
    /// For i8, the codes' largest residual.
    residual: f64,
    /// The largest `score_error` of a kernel that a launch may take.
    relative: f64,
    /// On a device with memory of its own, whose kernels ask for finite rows: a bit for each row that is, where some
    /// are not.
    finite: Option<Arc<Vec<u32>>>,
}

struct Slab {
    rows: Range<usize>,
    /// The rows' arguments on the device.
    resident: Option<Vec<Buffer>>,
}

/// A bit for each row of finite numbers; none where all are.
fn finite_rows(corpus: &Corpus<'_>) -> Option<Vec<u32>> {
    let d = corpus.d.max(1);
    let finite: Vec<bool> = match corpus.exact() {
        Exact::F32(rows) => rows.par_chunks(d).map(|row| row.iter().all(|v| v.is_finite())).collect(),
        Exact::F16(rows) => rows.par_chunks(d).map(|row| row.iter().all(|v| v.is_finite())).collect(),
    };
    let word = |rows: &[bool]| rows.iter().enumerate().fold(0, |word, (bit, &set)| word | u32::from(set) << bit);
    (!finite.iter().all(|&set| set)).then(|| finite.chunks(32).map(word).collect())
}

impl<'a> Pass<'a> {
    /// The passes for a corpus, the fastest first, each with smaller errors than the one before.
    pub fn of(device: &'a dyn Device, corpus: &Corpus<'a>) -> Result<Vec<Pass<'a>>, Error> {
        let exact = match corpus.exact() {
            Exact::F32(_) => &cosine_topk::COSINE_TOPK_F32,
            Exact::F16(_) => &cosine_topk::COSINE_TOPK_F16,
        };
        let mut wanted = Vec::new();
        if let (Rows::I8 { codes, .. }, true) = (corpus.rows, corpus.d <= MAX_CODES) {
            wanted.push((&cosine_topk::COSINE_TOPK_I8, Dtype::F32, Stored::Codes(codes)));
        }
        for act in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            wanted.push((exact, act, Stored::Exact(corpus.exact())));
        }
        let on_host = device.caps().kind == DeviceKind::Cpu;
        let finite = if on_host { None } else { finite_rows(corpus).map(Arc::new) };
        let mut passes: Vec<Pass<'a>> = Vec::new();
        for (spec, act, stored) in wanted {
            let kind = device.caps().kind;
            let kernels = || spec.kernels().filter(|kernel| kernel.act == act && kind.runs(&kernel.source));
            if kernels().next().is_none() {
                continue;
            }
            let relative = kernels().fold(0.0f64, |most, kernel| most.max(cosine_topk::score_error(kernel, corpus.d)));
            let residual = match stored {
                Stored::Codes(codes) => codes.largest_residual() as f64,
                Stored::Exact(_) => 0.0,
            };
            let mut pass = Pass {
                device,
                spec,
                act,
                stored,
                d: corpus.d,
                slabs: Vec::new(),
                residual,
                relative,
                finite: finite.clone(),
            };
            pass.slabs = pass.cut(corpus.len());
            // What a later pass scans is scanned seldom: it passes through.
            if passes.is_empty() {
                pass.settle_in()?;
            }
            passes.push(pass);
        }
        Ok(passes)
    }

    fn on_host(&self) -> bool {
        self.device.caps().kind == DeviceKind::Cpu
    }

    /// Bytes of a row.
    fn row_bytes(&self) -> usize {
        match self.stored {
            Stored::Exact(Exact::F32(_)) => 4 * self.d,
            Stored::Exact(Exact::F16(_)) => 2 * self.d,
            Stored::Codes(_) => self.d.next_multiple_of(CODE_PITCH),
        }
    }

    /// Slabs of whole words of a filter.
    fn cut(&self, n: usize) -> Vec<Slab> {
        let slab = |rows| Slab { rows, resident: None };
        if self.on_host() {
            let grown = |end: &usize| Some(end.saturating_mul(GROWTH)).filter(|_| *end < n);
            let ends: Vec<usize> = std::iter::successors(Some(FIRST), grown).map(|end| end.min(n)).collect();
            let starts = std::iter::once(0).chain(ends.iter().copied());
            return starts.zip(&ends).map(|(start, end)| slab(start..*end)).collect();
        }
        let most = SLAB.min(self.device.caps().max_binding) / self.row_bytes();
        let rows = (most / 32 * 32).max(32);
        (0..n).step_by(rows).map(|first| slab(first..n.min(first + rows))).collect()
    }

    /// Copies slabs to the device until its memory is full.
    fn settle_in(&mut self) -> Result<(), Error> {
        if self.on_host() {
            return Ok(());
        }
        for i in 0..self.slabs.len() {
            match self.upload(&self.slabs[i].rows) {
                Ok(buffers) => self.slabs[i].resident = Some(buffers),
                Err(device::Error::OutOfMemory { .. }) if i > 0 => {
                    // Room for what passes through.
                    self.slabs[i - 1].resident = None;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The arguments that hold these rows.
    fn row_args(&self, rows: &Range<usize>) -> Vec<&'a [u8]> {
        let elements = rows.start * self.d..rows.end * self.d;
        match self.stored {
            Stored::Exact(Exact::F32(all)) => vec![bytemuck::cast_slice(&all[elements])],
            Stored::Exact(Exact::F16(all)) => vec![bytemuck::cast_slice(&all[elements])],
            Stored::Codes(codes) => {
                let pitch = self.row_bytes();
                let of_rows = &codes.codes[rows.start * pitch..rows.end * pitch];
                vec![bytemuck::cast_slice(of_rows), bytemuck::cast_slice(&codes.scales[rows.clone()])]
            }
        }
    }

    fn upload(&self, rows: &Range<usize>) -> device::Result<Vec<Buffer>> {
        self.row_args(rows).into_iter().map(|bytes| upload(self.device, bytes)).collect()
    }

    /// Candidates for the k best of each query, whose number is at most [`MAX_QUERIES`]. `least` is a score that the k-th
    /// best is known to reach. A wide scan takes many more candidates.
    pub fn scan(
        &self,
        queries: &[&[f32]],
        k: usize,
        wide: bool,
        least: &[Option<f32>],
        filter: Option<&[u32]>,
    ) -> Result<Vec<Candidates>, Error> {
        let both: Vec<u32>;
        let filter = match (&self.finite, filter) {
            (Some(finite), Some(words)) => {
                both = words.iter().zip(finite.iter()).map(|(a, b)| a & b).collect();
                Some(&both[..])
            }
            (Some(finite), None) => Some(&finite[..]),
            (None, filter) => filter,
        };
        let (query_args, errors) = self.prepare(queries);
        // With codes or few bits many rows lie near the k-th; else next to none.
        let margin = match self.stored {
            _ if wide => MAX_K,
            Stored::Codes(_) => 6 * k + 32,
            Stored::Exact(_) if self.relative > 1e-3 => 3 * k + 32,
            Stored::Exact(_) => k / 8 + 8,
        };
        let places = self.places((k + margin).min(MAX_K), queries.len())?;
        let floor = |(least, error): (&Option<f32>, &f64)| {
            least.map_or(f32::NEG_INFINITY, |least| ((least as f64 - error) as f32).next_down())
        };
        let mut floors: Vec<f32> = least.iter().zip(&errors).map(floor).collect();
        // Below a floor lies what is less, not what equals it.
        let below = |floor: &f32| if *floor == f32::NEG_INFINITY { *floor } else { floor.next_down() };
        let start =
            |(floor, error): (&f32, &f64)| Candidates { rows: Vec::new(), outside: below(floor), error: *error };
        let mut found: Vec<Candidates> = floors.iter().zip(&errors).map(start).collect();
        // Of what a launch binds beside rows, lists and queries may be large.
        let most = MAX_PLACES.min(self.device.caps().max_binding / 4);
        let group = (most / (places * DEVICE_SPLITS).max(self.d)).clamp(1, queries.len());
        for slab in &self.slabs {
            for first in (0..queries.len()).step_by(group) {
                let some = first..queries.len().min(first + group);
                let query_args: Vec<&[u8]> = query_args.iter().map(|bytes| part(bytes, &some, queries.len())).collect();
                let words = filter.map(|words| &words[slab.rows.start / 32..slab.rows.end.div_ceil(32)]);
                let lists =
                    self.launch(slab, some.len(), places, &query_args, words.unwrap_or(&[]), &floors[some.clone()])?;
                let lists = lists.par_chunks_exact(lists.len() / some.len());
                let queries = found[some.clone()].par_iter_mut().zip(&mut floors[some]).zip(lists);
                queries.for_each(|((found, floor), lists)| found.join(lists, k, places, floor));
            }
        }
        Ok(found)
    }

    /// As many places as wanted, or as a kernel of the device takes: fewer prove less, and what is left unproven is for
    /// another pass.
    fn places(&self, wanted: usize, queries: usize) -> Result<usize, Error> {
        let n = self.slabs.iter().map(|slab| slab.rows.len()).max().unwrap_or(1);
        let dims = |places| self.spec.dims(&[queries, n, self.d, places, 1, 0, 0], &[]);
        let takes = |places: &usize| self.choose(&dims(*places)).is_some();
        let fewer = std::iter::successors(Some(wanted), |places| Some(places / 2).filter(|places| *places > 0));
        fewer.into_iter().find(takes).ok_or_else(|| self.unsupported(&dims(wanted)))
    }

    /// The kernel for a launch. Where none of the pass's type takes it, such as few queries, one of f32 sums has smaller
    /// errors yet.
    fn choose(&self, dims: &Dims) -> Option<&'static Kernel> {
        let of = |act| self.spec.choose(dims, act, self.device.caps());
        of(self.act).or_else(|| of(Dtype::F32))
    }

    fn unsupported(&self, dims: &Dims) -> Error {
        let device = self.device.id().to_string();
        device::Error::Unsupported { op: self.spec.id(), dims: dims.to_string(), device }.into()
    }

    /// The arguments before the rows for these queries, and the error of each query's scores.
    fn prepare(&self, queries: &[&[f32]]) -> (Vec<Vec<u8>>, Vec<f64>) {
        let relative = self.relative;
        // What may be lost where factors or products are below f32's normal range, and so may be taken for zero.
        let tiny = |norm: f64| 8.0 * self.d as f64 * f32::MIN_POSITIVE as f64 * (1.0 + norm);
        let norm = |q: &[f32]| q.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt();
        if let Stored::Exact(_) = self.stored {
            let errors = queries.iter().map(|q| relative * norm(q) * MAX_NORM + tiny(norm(q))).collect();
            return (vec![bytemuck::cast_slice(&queries.concat()).to_vec()], errors);
        }
        let codes: Vec<QueryCodes> = queries.iter().map(|query| QueryCodes::of(query)).collect();
        // Decoded rows are a little longer than rows, by no more than what they leave out.
        let error = |q: &QueryCodes| {
            let longest = MAX_NORM + self.residual;
            self.residual * q.norm + q.residual as f64 * MAX_NORM + relative * q.norm * longest + tiny(q.norm)
        };
        let scales: Vec<f32> = codes.iter().map(|q| q.scale).collect();
        let all: Vec<i8> = codes.iter().flat_map(|q| q.codes.iter().copied()).collect();
        let args = vec![bytemuck::cast_slice(&all).to_vec(), bytemuck::cast_slice(&scales).to_vec()];
        (args, codes.iter().map(error).collect())
    }

    /// The lists of one launch, query after query, for each a number of lists of `places`.
    fn launch(
        &self,
        slab: &Slab,
        queries: usize,
        places: usize,
        query_args: &[&[u8]],
        filter: &[u32],
        floors: &[f32],
    ) -> Result<Vec<Scored>, Error> {
        let n = slab.rows.len();
        let most = if self.on_host() { 2 * rayon::current_num_threads() } else { DEVICE_SPLITS };
        let splits = n.div_ceil(SPLIT_ROWS.max(places)).clamp(1, most);
        let values = [queries, n, self.d, places, splits, slab.rows.start, usize::from(!filter.is_empty())];
        let dims = self.spec.dims(&values, &[]);
        let Some(kernel) = self.choose(&dims) else {
            return Err(self.unsupported(&dims));
        };
        let inputs = [bytemuck::cast_slice::<u32, u8>(filter), bytemuck::cast_slice(floors)];
        let (ids, scores) = match kernel.source {
            Source::Rust(body) => {
                let args = [query_args, &self.row_args(&slab.rows), &inputs].concat();
                self.launch_on_host(kernel, body, &dims, &args)
            }
            _ => self.launch_on_device(slab, kernel, &dims, query_args, &inputs)?,
        };
        Ok(ids.into_iter().zip(scores).map(|(id, score)| Scored { score, id }).collect())
    }

    /// Runs a kernel of the CPU on rows where they lie: no buffer, no copy.
    fn launch_on_host(
        &self,
        kernel: &Kernel,
        body: fn(&Dims, &mut [Slice<'_>]),
        dims: &Dims,
        inputs: &[&[u8]],
    ) -> (Vec<u32>, Vec<f32>) {
        let places = dims["Q"] * dims["S"] * dims["K"];
        let (mut ids, mut scores) = (vec![0u32; places], vec![0f32; places]);
        let mut slices: Vec<Slice<'_>> = inputs.iter().map(|bytes| Slice::In(bytes)).collect();
        slices.push(Slice::Out(bytemuck::cast_slice_mut(&mut ids)));
        slices.push(Slice::Out(bytemuck::cast_slice_mut(&mut scores)));
        for (arg, slice) in self.spec.args.iter().zip(&slices) {
            let bytes: &[u8] = slice.as_slice();
            assert_eq!(bytes.len(), arg.bytes(dims, kernel.act), "{} of {} ({dims})", arg.name, kernel.stem);
        }
        body(dims, &mut slices);
        (ids, scores)
    }

    /// Runs a kernel on the slab's buffers, or on copies made for this launch, and joins the splits' lists there.
    fn launch_on_device(
        &self,
        slab: &Slab,
        kernel: &'static Kernel,
        dims: &Dims,
        query_args: &[&[u8]],
        inputs: &[&[u8]],
    ) -> Result<(Vec<u32>, Vec<f32>), Error> {
        let (queries, splits, places) = (dims["Q"], dims["S"], dims["K"]);
        let uploads = |all: &[&[u8]]| all.iter().map(|bytes| upload(self.device, bytes)).collect::<device::Result<_>>();
        let (before, after): (Vec<Buffer>, Vec<Buffer>) = (uploads(query_args)?, uploads(inputs)?);
        let rows = match &slab.resident {
            Some(buffers) => buffers.clone(),
            None => self.upload(&slab.rows)?,
        };
        let lists = |count: usize| -> device::Result<[Buffer; 2]> {
            Ok([self.device.alloc(4 * count)?, self.device.alloc(4 * count)?])
        };
        let mut found = lists(queries * splits * places)?;
        let args: Vec<&Buffer> = before.iter().chain(&rows).chain(&after).chain(&found).collect();
        self.device.launch(self.spec, kernel, &args, dims)?;
        let mut count = queries * splits * places;
        let merge = cosine_topk::TOPK_MERGE.dims(&[queries, splits, places], &[]);
        let can_merge = cosine_topk::TOPK_MERGE.choose(&merge, Dtype::F32, self.device.caps()).is_some();
        // The most places leave no margin in one list.
        if splits > 1 && places < MAX_K && can_merge {
            count = queries * places;
            let joined = lists(count)?;
            let args = [&found[0], &found[1], &joined[0], &joined[1]];
            device::run(self.device, &cosine_topk::TOPK_MERGE, &args, &merge)?;
            found = joined;
        }
        let (mut ids, mut scores) = (vec![0u32; count], vec![0f32; count]);
        self.device.read(&found[0], 0, bytemuck::cast_slice_mut(&mut ids))?;
        self.device.read(&found[1], 0, bytemuck::cast_slice_mut(&mut scores))?;
        Ok((ids, scores))
    }
}

impl Candidates {
    /// Takes in the lists of a launch over further rows, and raises the floor of the next. What is below the k-th by more
    /// than twice the error cannot be among the k, and more than so many places are not asked for.
    fn join(&mut self, lists: &[Scored], k: usize, places: usize, floor: &mut f32) {
        for list in lists.chunks_exact(places) {
            let filled = list.partition_point(|row| row.id != NO_ROW);
            self.rows.extend(&list[..filled]);
            if filled == places {
                self.outside = self.outside.max(list[places - 1].score);
            }
        }
        // Sorted runs, which a stable sort only merges.
        self.rows.sort_by(Scored::order);
        if let Some(row) = self.rows.get(k - 1) {
            let needed = ((row.score as f64 - 2.0 * self.error) as f32).next_down();
            if needed > *floor {
                *floor = needed;
                self.outside = self.outside.max(needed.next_down());
                self.rows.truncate(self.rows.partition_point(|row| row.score >= needed));
            }
        }
        // Lists of the most places may hold a margin together that each alone has not.
        let kept = if places == MAX_K { 2 * MAX_K } else { places };
        if let Some(last) = self.rows.get(kept - 1).map(|last| last.score) {
            *floor = floor.max(last);
            self.rows.truncate(kept);
            self.outside = self.outside.max(last);
        }
    }
}

/// The bytes of some of `count` equal parts.
fn part<'b>(bytes: &'b [u8], some: &Range<usize>, count: usize) -> &'b [u8] {
    let one = bytes.len() / count;
    &bytes[some.start * one..some.end * one]
}

/// A copy on the device.
fn upload(device: &dyn Device, bytes: &[u8]) -> device::Result<Buffer> {
    let buffer = device.alloc(bytes.len())?;
    device.write(&buffer, 0, bytes)?;
    Ok(buffer)
}
