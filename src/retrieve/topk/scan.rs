//! One scan of the rows by a kernel: launches over slabs of them, on the host where they lie or on a device they are
//! copied to (`slabs`).

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::codes::QueryCodes;
use super::slabs::{upload, Passing, Slabs, Stream};
use super::{Codes, Corpus, Exact, Rows, MAX_NORM};
use crate::device::{self, Buffer, Device};
use crate::op::{DeviceKind, Dims, Kernel, OpSpec, Slice, Source};
use crate::ops::cosine_topk::select::Scored;
use crate::ops::cosine_topk::{self, CODE_PITCH, MAX_CODES, MAX_K, NO_ROW};
use crate::tensor::Dtype;
use crate::Error;

/// Most queries of a launch.
pub const MAX_QUERIES: usize = 1024;
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

/// Scans with one op and one activation type. The device and the corpus that it was made for are given again to each.
pub struct Pass {
    spec: &'static OpSpec,
    act: Dtype,
    /// Whether it scans codes.
    coded: bool,
    /// Elements of a row as kernels see it: on a device maybe more than the corpus has, zeros.
    width: usize,
    slabs: Slabs,
    /// For i8, the codes' largest residual.
    residual: f64,
    /// The largest `score_error` of a kernel that a launch may take.
    relative: f64,
    /// On a device with memory of its own, whose kernels ask for finite rows: a bit for each row that is, where some
    /// are not.
    finite: Option<Arc<Vec<u32>>>,
}

/// One scan: what it reads, and where it runs.
#[derive(Clone, Copy)]
struct Scan<'a> {
    pass: &'a Pass,
    device: &'a dyn Device,
    stored: Stored<'a>,
    /// Elements of a row as kernels see it.
    width: usize,
}

/// What a launch gave: lists that a host's kernel left, or where a device's will be, so many places.
enum Launched {
    Here(Vec<u32>, Vec<f32>),
    There([Buffer; 2], usize),
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

impl<'a> Stored<'a> {
    /// What a pass over codes, or over rows as they are, reads of a corpus.
    fn of(corpus: &Corpus<'a>, coded: bool) -> Stored<'a> {
        match corpus.rows {
            Rows::I8 { codes, .. } if coded => Stored::Codes(codes),
            _ => Stored::Exact(corpus.exact()),
        }
    }

    /// Elements of a row on a device: zeros bring it to a multiple of 16 bytes, so that every kernel takes it.
    fn padded(&self, d: usize) -> usize {
        match self {
            Stored::Exact(Exact::F32(_)) => d.next_multiple_of(4),
            Stored::Exact(Exact::F16(_)) => d.next_multiple_of(8),
            // Codes lie so already.
            Stored::Codes(_) => d,
        }
    }

    /// The arguments that hold these rows of `d` elements, brought to `width`.
    fn args(&self, d: usize, width: usize, rows: &Range<usize>) -> Vec<Cow<'a, [u8]>> {
        let elements = rows.start * d..rows.end * d;
        match self {
            Stored::Exact(Exact::F32(all)) => vec![widened(&all[elements], d, width)],
            Stored::Exact(Exact::F16(all)) => vec![widened(&all[elements], d, width)],
            Stored::Codes(codes) => {
                let pitch = d.next_multiple_of(CODE_PITCH);
                let of_rows = &codes.codes[rows.start * pitch..rows.end * pitch];
                let scales = &codes.scales[rows.clone()];
                vec![Cow::Borrowed(bytemuck::cast_slice(of_rows)), Cow::Borrowed(bytemuck::cast_slice(scales))]
            }
        }
    }

    /// Bytes of a row of `width` elements in all of them.
    fn row_bytes(&self, width: usize) -> usize {
        match self {
            Stored::Exact(Exact::F32(_)) => 4 * width,
            Stored::Exact(Exact::F16(_)) => 2 * width,
            Stored::Codes(_) => width.next_multiple_of(CODE_PITCH) + 4,
        }
    }
}

/// Rows of `d` elements with zeros after them, up to `width`; as they lie where that is as wide.
fn widened<T: bytemuck::NoUninit + Send + Sync>(rows: &[T], d: usize, width: usize) -> Cow<'_, [u8]> {
    let size = size_of::<T>();
    if width == d {
        return Cow::Borrowed(bytemuck::cast_slice(rows));
    }
    let mut wide = vec![0; rows.len() / d * width * size];
    let pairs = wide.par_chunks_exact_mut(width * size).zip(rows.par_chunks_exact(d)).with_min_len(256);
    pairs.for_each(|(wide, row)| wide[..d * size].copy_from_slice(bytemuck::cast_slice(row)));
    Cow::Owned(wide)
}

/// Slabs of `n` rows for a host.
fn for_host(n: usize) -> Slabs {
    let grown = |end: &usize| Some(end.saturating_mul(GROWTH)).filter(|_| *end < n);
    let ends: Vec<usize> = std::iter::successors(Some(FIRST), grown).map(|end| end.min(n)).collect();
    let starts = std::iter::once(0).chain(ends.iter().copied());
    Slabs::on_host(starts.zip(&ends).map(|(start, end)| start..*end))
}

impl Pass {
    /// The passes for a corpus, the fastest first, each with smaller errors than the one before. The first has as many of
    /// its rows on the device as fit in `limit` bytes there.
    pub fn of(device: &dyn Device, corpus: &Corpus<'_>, limit: usize) -> Result<Vec<Pass>, Error> {
        let exact = match corpus.exact() {
            Exact::F32(_) => &cosine_topk::COSINE_TOPK_F32,
            Exact::F16(_) => &cosine_topk::COSINE_TOPK_F16,
        };
        let mut wanted = Vec::new();
        if let (Rows::I8 { codes, .. }, true) = (corpus.rows, corpus.d <= MAX_CODES) {
            wanted.push((&cosine_topk::COSINE_TOPK_I8, Dtype::F32, codes.largest_residual() as f64, true));
        }
        for act in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            wanted.push((exact, act, 0.0, false));
        }
        let on_host = device.caps().kind == DeviceKind::Cpu;
        let finite = if on_host { None } else { finite_rows(corpus).map(Arc::new) };
        let mut passes: Vec<Pass> = Vec::new();
        let (passing, (d, n)) = (Passing::default(), (corpus.d, corpus.len()));
        for (spec, act, residual, coded) in wanted {
            let kind = device.caps().kind;
            let kernels = || spec.kernels().filter(|kernel| kernel.act == act && kind.runs(&kernel.source));
            if kernels().next().is_none() {
                continue;
            }
            let stored = Stored::of(corpus, coded);
            let width = if on_host { d } else { stored.padded(d) };
            let relative = kernels().fold(0.0f64, |most, kernel| most.max(cosine_topk::score_error(kernel, width)));
            let mut slabs = match on_host {
                true => for_host(n),
                false => Slabs::cut(device, n, stored.row_bytes(width), limit, passing.clone())?,
            };
            // What a later pass scans is scanned seldom: it passes through.
            if passes.is_empty() && !on_host {
                slabs.settle(device, limit, &|rows| stored.args(d, width, rows))?;
            }
            passes.push(Pass { spec, act, coded, width, slabs, residual, relative, finite: finite.clone() });
        }
        Ok(passes)
    }

    /// Candidates for the k best of each query, whose number is at most [`MAX_QUERIES`]. `least` is a score that the k-th
    /// best is known to reach. A wide scan takes many more candidates.
    #[allow(clippy::too_many_arguments)]
    pub fn scan(
        &self,
        device: &dyn Device,
        corpus: &Corpus<'_>,
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
        let scan = Scan { pass: self, device, stored: Stored::of(corpus, self.coded), width: self.width };
        let (query_args, errors) = scan.prepare(queries);
        // With codes or few bits many rows lie near the k-th; else next to none.
        let margin = match self.coded {
            _ if wide => MAX_K,
            true => 6 * k + 32,
            false if self.relative > 1e-3 => 3 * k + 32,
            false => k / 8 + 8,
        };
        let places = scan.places((k + margin).min(MAX_K), queries.len())?;
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
        let most = MAX_PLACES.min(device.caps().max_binding / 4);
        let group = (most / (places * DEVICE_SPLITS).max(self.width)).clamp(1, queries.len());
        let groups: Vec<Range<usize>> =
            (0..queries.len()).step_by(group).map(|first| first..queries.len().min(first + group)).collect();
        let parts = |some: &Range<usize>| query_args.iter().map(|bytes| part(bytes, some, queries.len())).collect();
        let parts: Vec<Vec<&[u8]>> = groups.iter().map(parts).collect();
        let uploads = |parts: &Vec<&[u8]>| parts.iter().map(|bytes| upload(device, bytes)).collect();
        let on_device: Vec<Vec<Buffer>> = match device.caps().kind {
            DeviceKind::Cpu => vec![Vec::new(); groups.len()],
            _ => parts.iter().map(uploads).collect::<device::Result<_>>()?,
        };
        let args = |rows: &Range<usize>| scan.stored.args(corpus.d, self.width, rows);
        let mut stream = self.slabs.stream(device, &args)?;
        for (i, rows) in self.slabs.ranges().enumerate() {
            let words = filter.map_or(&[][..], |words| &words[rows.start / 32..rows.end.div_ceil(32)]);
            for ((some, parts), on_device) in groups.iter().zip(&parts).zip(&on_device) {
                let floors_of = &floors[some.clone()];
                let launched = scan.launch(&mut stream, i, rows, places, (parts, on_device), words, floors_of)?;
                // While the device works, the next rows come.
                stream.bring_after(i)?;
                let lists = scan.collect(launched)?;
                let lists = lists.par_chunks_exact(lists.len() / some.len());
                let queries = found[some.clone()].par_iter_mut().zip(&mut floors[some.clone()]).zip(lists);
                queries.for_each(|((found, floor), lists)| found.join(lists, k, places, floor));
            }
        }
        Ok(found)
    }
}

impl Scan<'_> {
    /// As many places as wanted, or as a kernel of the device takes: fewer prove less, and what is left unproven is for
    /// another pass.
    fn places(&self, wanted: usize, queries: usize) -> Result<usize, Error> {
        let n = self.pass.slabs.ranges().map(Range::len).max().unwrap_or(1);
        let dims = |places| self.pass.spec.dims(&[queries, n, self.width, places, 1, 0, 0], &[]);
        let takes = |places: &usize| self.choose(&dims(*places)).is_some();
        let fewer = std::iter::successors(Some(wanted), |places| Some(places / 2).filter(|places| *places > 0));
        fewer.into_iter().find(takes).ok_or_else(|| self.unsupported(&dims(wanted)))
    }

    /// The kernel for a launch. Where none of the pass's type takes it, such as few queries, one of f32 sums has smaller
    /// errors yet.
    fn choose(&self, dims: &Dims) -> Option<&'static Kernel> {
        let of = |act| self.pass.spec.choose(dims, act, self.device.caps());
        of(self.pass.act).or_else(|| of(Dtype::F32))
    }

    fn unsupported(&self, dims: &Dims) -> Error {
        let device = self.device.id().to_string();
        device::Error::Unsupported { op: self.pass.spec.id(), dims: dims.to_string(), device }.into()
    }

    /// The arguments before the rows for these queries, and the error of each query's scores.
    fn prepare(&self, queries: &[&[f32]]) -> (Vec<Vec<u8>>, Vec<f64>) {
        let Pass { relative, residual, .. } = *self.pass;
        // What may be lost where factors or products are below f32's normal range, and so may be taken for zero.
        let tiny = |norm: f64| 8.0 * self.width as f64 * f32::MIN_POSITIVE as f64 * (1.0 + norm);
        let norm = |q: &[f32]| q.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt();
        if let Stored::Exact(_) = self.stored {
            let errors = queries.iter().map(|q| relative * norm(q) * MAX_NORM + tiny(norm(q))).collect();
            let d = queries.first().map_or(1, |query| query.len());
            return (vec![widened(&queries.concat(), d, self.width).into_owned()], errors);
        }
        let codes: Vec<QueryCodes> = queries.iter().map(|query| QueryCodes::of(query)).collect();
        // Decoded rows are a little longer than rows, by no more than what they leave out.
        let error = |q: &QueryCodes| {
            let longest = MAX_NORM + residual;
            residual * q.norm + q.residual as f64 * MAX_NORM + relative * q.norm * longest + tiny(q.norm)
        };
        let scales: Vec<f32> = codes.iter().map(|q| q.scale).collect();
        let all: Vec<i8> = codes.iter().flat_map(|q| q.codes.iter().copied()).collect();
        let args = vec![bytemuck::cast_slice(&all).to_vec(), bytemuck::cast_slice(&scales).to_vec()];
        (args, codes.iter().map(error).collect())
    }

    /// Launches over the rows of slab `i` for some queries, whose arguments are given as bytes and, for a device, as
    /// buffers; a floor each query.
    #[allow(clippy::too_many_arguments)]
    fn launch(
        &self,
        stream: &mut Stream<'_>,
        i: usize,
        rows: &Range<usize>,
        places: usize,
        (parts, on_device): (&[&[u8]], &[Buffer]),
        filter: &[u32],
        floors: &[f32],
    ) -> Result<Launched, Error> {
        let most = match self.device.caps().kind {
            DeviceKind::Cpu => 2 * rayon::current_num_threads(),
            _ => DEVICE_SPLITS,
        };
        let splits = rows.len().div_ceil(SPLIT_ROWS.max(places)).clamp(1, most);
        let values =
            [floors.len(), rows.len(), self.width, places, splits, rows.start, usize::from(!filter.is_empty())];
        let dims = self.pass.spec.dims(&values, &[]);
        let Some(kernel) = self.choose(&dims) else {
            return Err(self.unsupported(&dims));
        };
        let inputs = [bytemuck::cast_slice::<u32, u8>(filter), bytemuck::cast_slice(floors)];
        match kernel.source {
            Source::Rust(body) => {
                let of_rows = self.stored.args(self.width, self.width, rows);
                let of_rows: Vec<&[u8]> = of_rows.iter().map(|bytes| &**bytes).collect();
                let args = [parts, &of_rows, &inputs].concat();
                Ok(self.launch_on_host(kernel, body, &dims, &args))
            }
            _ => self.launch_on_device(&stream.buffers(i)?, kernel, &dims, on_device, &inputs),
        }
    }

    /// The lists of a launch, query after query, for each a number of lists: waits for a device.
    fn collect(&self, launched: Launched) -> Result<Vec<Scored>, Error> {
        let (ids, scores) = match launched {
            Launched::Here(ids, scores) => (ids, scores),
            Launched::There(found, count) => {
                let (mut ids, mut scores) = (vec![0u32; count], vec![0f32; count]);
                self.device.read(&found[0], 0, bytemuck::cast_slice_mut(&mut ids))?;
                self.device.read(&found[1], 0, bytemuck::cast_slice_mut(&mut scores))?;
                (ids, scores)
            }
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
    ) -> Launched {
        let places = dims["Q"] * dims["S"] * dims["K"];
        let (mut ids, mut scores) = (vec![0u32; places], vec![0f32; places]);
        let mut slices: Vec<Slice<'_>> = inputs.iter().map(|bytes| Slice::In(bytes)).collect();
        slices.push(Slice::Out(bytemuck::cast_slice_mut(&mut ids)));
        slices.push(Slice::Out(bytemuck::cast_slice_mut(&mut scores)));
        for (arg, slice) in self.pass.spec.args.iter().zip(&slices) {
            let bytes: &[u8] = slice.as_slice();
            assert_eq!(bytes.len(), arg.bytes(dims, kernel.act), "{} of {} ({dims})", arg.name, kernel.stem);
        }
        body(dims, &mut slices);
        Launched::Here(ids, scores)
    }

    /// Queues a kernel on a slab's buffers, and the joining of the splits' lists.
    fn launch_on_device(
        &self,
        rows: &[Buffer],
        kernel: &'static Kernel,
        dims: &Dims,
        queries: &[Buffer],
        inputs: &[&[u8]],
    ) -> Result<Launched, Error> {
        let after = inputs.iter().map(|bytes| upload(self.device, bytes)).collect::<device::Result<Vec<_>>>()?;
        let lists = |count: usize| -> device::Result<[Buffer; 2]> {
            Ok([self.device.alloc(4 * count)?, self.device.alloc(4 * count)?])
        };
        let (asked, splits, places) = (dims["Q"], dims["S"], dims["K"]);
        let mut count = asked * splits * places;
        let mut found = lists(count)?;
        let args: Vec<&Buffer> = queries.iter().chain(rows).chain(&after).chain(&found).collect();
        self.device.launch(self.pass.spec, kernel, &args, dims)?;
        let merge = cosine_topk::TOPK_MERGE.dims(&[asked, splits, places], &[]);
        let can_merge = cosine_topk::TOPK_MERGE.choose(&merge, Dtype::F32, self.device.caps()).is_some();
        // The most places leave no margin in one list.
        if splits > 1 && places < MAX_K && can_merge {
            count = asked * places;
            let joined = lists(count)?;
            let args = [&found[0], &found[1], &joined[0], &joined[1]];
            device::run(self.device, &cosine_topk::TOPK_MERGE, &args, &merge)?;
            found = joined;
        }
        Ok(Launched::There(found, count))
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
