//! The contract: what an op is, as plain data. Tests, `verify`, `bench` and the devices are loops over these structs.
//!
//! An op names its dims, types its arguments, states its result in f64 (the oracle), its least cost, how far a kernel
//! may be off and why, and lists its kernels, slowest first. The values a kernel receives are its buffers in the order of
//! `args`, then one params block of 64 bytes: the dims as u32, then the scalars as f32.

use crate::tensor::{Dtype, HostTensor};
use rand_chacha::ChaCha8Rng;
use std::borrow::Cow;

/// Bytes of the params block that ends every kernel's arguments.
pub const PARAMS_BYTES: usize = 64;
const PARAMS_WORDS: usize = PARAMS_BYTES / 4;

/// One op for one weight format.
pub struct OpSpec {
    /// The op, such as `qmatmul`: first word of its kernels' stems.
    pub name: &'static str,
    /// The weight format, `f32` where an op has no weights: second word of the stems.
    pub format: &'static str,
    /// The result in one line of mathematics.
    pub formula: &'static str,
    /// Names of the u32 words of the params block, in order.
    pub dims: &'static [&'static str],
    /// Names of the f32 words that follow the dims.
    pub scalars: &'static [&'static str],
    /// Buffers in launch order.
    pub args: &'static [Arg],
    /// The result in f64, and how large the terms were it was summed from; one entry for each `Out` or `InOut` argument.
    pub oracle: fn(&Dims, &[HostTensor]) -> Vec<Expected>,
    /// Least work and traffic.
    pub cost: fn(&Dims) -> Cost,
    /// How far a kernel may be from the oracle.
    pub tolerance: Tolerance,
    /// Shapes to check, awkward ones first, the last a real model's.
    pub cases: &'static [Case],
    /// Implementations, a list for each language, in each the slowest first: the last one that supports dims and device
    /// is taken.
    pub kernels: &'static [&'static [Kernel]],
}

/// One buffer of an op.
pub struct Arg {
    /// Name in kernels and messages.
    pub name: &'static str,
    /// Element type.
    pub dtype: ArgType,
    /// Sizes, outermost first: dims, integers, and products and quotients of them read from left to right, such as
    /// `K/2` or `BIAS*N`. Division rounds up.
    pub shape: &'static [&'static str],
    /// Read, written or both.
    pub role: Role,
    /// What tests and benches put in.
    pub fill: Fill,
}

/// Element type of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgType {
    /// Always this type.
    Is(Dtype),
    /// The kernel's activation type ([`Kernel::act`]).
    Act,
    /// f16, or f32 where the dim `WIDE` is 1.
    Scale,
}

/// How a kernel uses an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Role {
    In,
    Out,
    InOut,
}

/// Values for checks and measurements.
#[derive(Clone, Copy)]
pub enum Fill {
    /// Nothing: an output, poisoned before the launch.
    Poison,
    /// Standard normal.
    Normal,
    /// Uniform in [low, high).
    Uniform(f64, f64),
    /// Integers uniform over the whole type.
    Bits,
    /// Integers below a dim.
    Below(&'static str),
    /// Standard normal where the dim `ACC` is 1: what the launch adds to. Else poison: it must not be read.
    Sum,
    /// Standard normal in columns Y0 to Y0 + N of `[M,LDY]`, NaN beside them: what is there must not be used.
    Columns,
    /// What a function makes of the dims.
    With(fn(&Dims, &mut ChaCha8Rng) -> HostTensor),
}

/// Least floating-point work and memory traffic of one launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Floating-point operations; a fused multiply-add counts as two.
    pub flops: u64,
    /// Bytes that must move when every argument is touched once.
    pub bytes: u64,
}

/// What the oracle says of one output.
pub struct Expected {
    /// The exact result rounded once to f64; NaN marks an element that must stay as it was.
    pub value: Vec<f64>,
    /// Sum of the absolute values of the terms of each element: what a rounding error is relative to. Infinite where
    /// any value will do.
    pub magnitude: Vec<f64>,
}

impl Expected {
    /// For results made of few operations: the error is relative to the result itself.
    pub fn relative(value: Vec<f64>) -> Expected {
        let magnitude = value.iter().map(|v| v.abs()).collect();
        Expected { value, magnitude }
    }
}

/// Bound on |kernel − oracle| of one element: `roundings(dims)` · u · magnitude, u the unit roundoff of f32, and over the
/// tensor the normalised mean square error. Every kernel sums in f32. One with narrower activations rounds the factors of
/// each product once more, to their type: that adds two roundings of its unit.
pub struct Tolerance {
    /// How many roundings, each of relative size u, an element's terms may collect.
    pub roundings: fn(&Dims) -> f64,
    /// Largest Σ(got−expected)² / Σ expected² over a tensor for f32 activations; an element that cancels counts in the
    /// second sum with magnitude / roundings.
    pub nmse: f64,
    /// Where these numbers come from.
    pub why: &'static str,
}

/// Dims and scalars to check a kernel with.
pub struct Case {
    /// In the order of [`OpSpec::dims`].
    pub dims: &'static [u32],
    /// In the order of [`OpSpec::scalars`].
    pub scalars: &'static [f32],
    /// What this case is for.
    pub why: &'static str,
}

/// A case without scalars.
pub const fn case(dims: &'static [u32], why: &'static str) -> Case {
    Case { dims, scalars: &[], why }
}

/// A case with scalars.
pub const fn case_with(dims: &'static [u32], scalars: &'static [f32], why: &'static str) -> Case {
    Case { dims, scalars, why }
}

/// One implementation of an op.
pub struct Kernel {
    /// File stem, entry point, test and bench name: `<op>_<format>_<variant>`.
    pub stem: &'static str,
    /// The code.
    pub source: Source,
    /// Type of its activations.
    pub act: Dtype,
    /// Grid, block and shared memory; a Rust kernel divides its work itself and takes [`no_grid`].
    pub launch: fn(&Dims) -> Launch,
    /// True where it can run, and where it is meant to.
    pub supports: fn(&Dims, &Caps) -> bool,
}

/// A kernel's code, by the kind of device that runs it.
#[derive(Clone, Copy)]
pub enum Source {
    /// For the CPU device: the params and one slice an argument.
    Rust(fn(&Dims, &mut [Slice<'_>])),
    /// For wgpu: the kernel, then the parts it shares with others, to be joined in this order.
    Wgsl(&'static [File]),
    /// For CUDA and its executor on the CPU.
    Ptx(File),
}

/// A source file of this crate.
#[derive(Clone, Copy, Debug)]
pub struct File {
    /// From the crate's root, such as `kernels/rmsnorm_f32_warp.ptx`.
    pub path: &'static str,
    /// As it was when the crate was built.
    pub text: &'static str,
}

impl File {
    /// The text, read anew from below the folder that the environment variable `HANDMILL_SOURCES` names, if it is set:
    /// whoever writes a kernel need not build the crate for each change of it.
    pub fn read(&self) -> std::io::Result<Cow<'static, str>> {
        match std::env::var_os("HANDMILL_SOURCES") {
            None => Ok(Cow::Borrowed(self.text)),
            Some(root) => {
                let path = std::path::Path::new(&root).join(self.path);
                let named = |error| std::io::Error::other(format!("{} (HANDMILL_SOURCES): {error}", path.display()));
                Ok(Cow::Owned(std::fs::read_to_string(&path).map_err(named)?))
            }
        }
    }
}

/// An argument as a Rust kernel sees it: exactly the bytes of its shape.
pub enum Slice<'a> {
    /// Read only.
    In(&'a [u8]),
    /// Out or InOut.
    Out(&'a mut [u8]),
}

impl Slice<'_> {
    /// The elements. Panics when `T` does not fit the bytes, which the launch has checked against the contract.
    pub fn as_slice<T: bytemuck::AnyBitPattern>(&self) -> &[T] {
        match self {
            Slice::In(bytes) => bytemuck::cast_slice(bytes),
            Slice::Out(bytes) => bytemuck::cast_slice(bytes),
        }
    }

    /// The elements as f32.
    pub fn f32(&self) -> &[f32] {
        self.as_slice()
    }

    /// The elements as u32.
    pub fn u32(&self) -> &[u32] {
        self.as_slice()
    }

    /// The elements of an output as f32. Panics for an input: the table's roles decide.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        match self {
            Slice::Out(bytes) => bytemuck::cast_slice_mut(bytes),
            Slice::In(_) => panic!("a kernel writes an argument that its contract calls In"),
        }
    }
}

/// Work division of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks (workgroups).
    pub grid: [u32; 3],
    /// Threads (invocations) in a block.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// A file below the crate's root.
macro_rules! file {
    ($path:expr) => {
        $crate::op::File { path: $path, text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $path)) }
    };
}

/// A PTX kernel with f32 activations; its stem names its file and its entry.
macro_rules! ptx {
    ($stem:literal, $launch:expr, $supports:expr) => {
        $crate::op::Kernel {
            stem: $stem,
            source: $crate::op::Source::Ptx($crate::op::file!(concat!("kernels/", $stem, ".ptx"))),
            act: $crate::tensor::Dtype::F32,
            launch: $launch,
            supports: $supports,
        }
    };
}

/// A WGSL kernel with f32 activations: its stem names its file and its entry; files that it shares with others follow,
/// so that the lines in messages about the kernel are its file's.
macro_rules! wgsl {
    ($stem:literal $(+ $part:literal)*, $launch:expr, $supports:expr) => {
        $crate::op::shaders(
            $stem,
            &[$crate::op::shader!($stem), $($crate::op::shader!($part),)*],
            $launch,
            $supports,
        )
    };
}

/// `shaders/<words>.wgsl`.
macro_rules! shader {
    ($($word:literal)*) => { $crate::op::file!(concat!("shaders/", $($word,)* ".wgsl")) };
}
pub(crate) use {file, ptx, shader, wgsl};

/// For Rust kernels.
pub fn no_grid(_: &Dims) -> Launch {
    Launch { grid: [1, 1, 1], block: [1, 1, 1], shared_bytes: 0 }
}

/// For shaders that take `elements` elements as one run: 256 invocations a group, at most the groups that every device
/// runs in one dimension.
pub fn flat(elements: usize) -> Launch {
    Launch { grid: [elements.div_ceil(256).min(65535) as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
}

/// For kernels without conditions.
pub fn always(_: &Dims, _: &Caps) -> bool {
    true
}

/// The kinds of devices; which [`Source`] each runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DeviceKind {
    Cpu,
    Wgpu,
    Cuda,
    PtxSim,
}

impl DeviceKind {
    /// The word of `--device` and of reports.
    pub const fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Wgpu => "wgpu",
            DeviceKind::Cuda => "cuda",
            DeviceKind::PtxSim => "ptx-sim",
        }
    }

    /// True when this kind of device runs such a source.
    pub const fn runs(self, source: &Source) -> bool {
        matches!(
            (self, source),
            (DeviceKind::Cpu, Source::Rust(_))
                | (DeviceKind::Wgpu, Source::Wgsl(_))
                | (DeviceKind::Cuda | DeviceKind::PtxSim, Source::Ptx(_))
        )
    }
}

/// Widest vector instructions of a CPU that have rungs of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Simd {
    /// Whatever the compiler makes of plain loops.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with BF16, and AMX tiles of bf16 that the system lets this process use.
    Amx,
}

/// What a device can do: the facts `supports` looks at.
#[derive(Clone, Debug)]
pub struct Caps {
    /// Its kind.
    pub kind: DeviceKind,
    /// Vector instructions (CPU).
    pub simd: Simd,
    /// Compute capability as major·10 + minor (CUDA and its executor), else 0.
    pub sm: u32,
    /// A processor playing a graphics card (wgpu): its fast kernels are of another shape.
    pub software: bool,
    /// f16 arithmetic in shaders.
    pub f16: bool,
    /// Products of matrices of 16 x 16 by a subgroup, f16 in and f32 out (wgpu).
    pub coopmat: bool,
    /// Smallest and largest subgroup (wgpu), or (0, 0) without them.
    pub subgroup: (u32, u32),
    /// Workgroup or shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// Largest buffer one argument can bind; weights beyond it are split by rows.
    pub max_binding: usize,
    /// A view of a buffer begins at a multiple of this.
    pub view_alignment: usize,
    /// Only kernels whose rows do not depend on one another may run ([`row_invariant`]).
    pub batch_invariant: bool,
}

/// The params of one launch: dims by name, then scalars.
#[derive(Clone)]
pub struct Dims {
    names: &'static [&'static str],
    scalar_names: &'static [&'static str],
    dims: [usize; PARAMS_WORDS],
    scalars: [f32; PARAMS_WORDS],
}

impl Dims {
    /// A dim, if the op has it.
    pub fn get(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|n| *n == name).map(|i| self.dims[i])
    }

    /// A scalar. Panics when the op has none of this name.
    pub fn scalar(&self, name: &str) -> f32 {
        let i = self.scalar_names.iter().position(|n| *n == name);
        self.scalars[i.unwrap_or_else(|| panic!("no scalar {name} among {:?}", self.scalar_names))]
    }

    /// The same with one dim changed. Panics when the op has none of this name.
    pub fn with(mut self, name: &str, value: usize) -> Dims {
        let i = self.names.iter().position(|n| *n == name);
        self.dims[i.unwrap_or_else(|| panic!("no dim {name} among {:?}", self.names))] = value;
        self
    }

    /// The block every kernel gets after its buffers: little-endian u32 dims, f32 scalars, zeros.
    pub fn params(&self) -> [u8; PARAMS_BYTES] {
        let mut block = [0; PARAMS_BYTES];
        let dims = self.dims[..self.names.len()].iter().map(|&v| (v as u32).to_le_bytes());
        let scalars = self.scalars[..self.scalar_names.len()].iter().map(|v| v.to_le_bytes());
        for (word, value) in block.chunks_exact_mut(4).zip(dims.chain(scalars)) {
            word.copy_from_slice(&value);
        }
        block
    }
}

impl std::ops::Index<&str> for Dims {
    type Output = usize;

    /// A dim. Panics when the op has none of this name.
    fn index(&self, name: &str) -> &usize {
        let i = self.names.iter().position(|n| *n == name);
        &self.dims[i.unwrap_or_else(|| panic!("no dim {name} among {:?}", self.names))]
    }
}

impl std::fmt::Display for Dims {
    /// `M=7 K=33 eps=0.00001`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dims = self.names.iter().zip(&self.dims).map(|(n, v)| format!("{n}={v}"));
        let scalars = self.scalar_names.iter().zip(&self.scalars).map(|(n, v)| format!("{n}={v}"));
        f.write_str(&dims.chain(scalars).collect::<Vec<_>>().join(" "))
    }
}

impl OpSpec {
    /// `qmatmul_q4`: what its kernels' stems begin with.
    pub fn id(&self) -> String {
        format!("{}_{}", self.name, self.format)
    }

    /// Params for these values, in the order of `dims` and `scalars`. Panics when their number is another.
    pub fn dims(&self, dims: &[usize], scalars: &[f32]) -> Dims {
        assert_eq!(dims.len(), self.dims.len(), "{}: dims {:?}", self.id(), self.dims);
        assert_eq!(scalars.len(), self.scalars.len(), "{}: scalars {:?}", self.id(), self.scalars);
        let mut d = Dims { names: self.dims, scalar_names: self.scalars, dims: [0; 16], scalars: [0.0; 16] };
        d.dims[..dims.len()].copy_from_slice(dims);
        d.scalars[..scalars.len()].copy_from_slice(scalars);
        d
    }

    /// Params of a case.
    pub fn case_dims(&self, case: &Case) -> Dims {
        self.dims(&case.dims.iter().map(|&v| v as usize).collect::<Vec<_>>(), case.scalars)
    }

    /// Every kernel of every language.
    pub fn kernels(&self) -> impl DoubleEndedIterator<Item = &'static Kernel> {
        self.kernels.iter().flat_map(|language| language.iter())
    }

    /// The fastest kernel with activations of type `act` for these dims on a device, if any.
    pub fn choose(&self, dims: &Dims, act: Dtype, caps: &Caps) -> Option<&'static Kernel> {
        let mut kernels = self.kernels().rev().filter(|k| k.act == act && caps.kind.runs(&k.source));
        if caps.batch_invariant {
            // Chosen as for one row, whatever the number: an invariant kernel takes any.
            let one = if dims.get("M").is_some() { &dims.clone().with("M", 1) } else { dims };
            return kernels.find(|k| row_invariant(self, k) && (k.supports)(one, caps));
        }
        kernels.find(|k| (k.supports)(dims, caps))
    }
}

/// True for a kernel that gives a row of its result the same bits whatever the number of rows, the row's place and the
/// other rows are, and that takes any number of rows whatever its `supports` says of that: tests/invariant.rs proves it
/// for each. A row is a token: M counts them.
pub fn row_invariant(spec: &OpSpec, kernel: &Kernel) -> bool {
    let variants = match kernel.source {
        Source::Rust(_) => INVARIANT_RUST,
        Source::Ptx(_) => INVARIANT_PTX,
        Source::Wgsl(_) => INVARIANT_WGSL,
    };
    let variant = kernel.stem.get(spec.name.len() + spec.format.len() + 2..).unwrap_or_default();
    variants.iter().any(|(op, of_op)| *op == spec.name && of_op.contains(&variant))
}

/// An op and the variants of it that are invariant, in every format.
type Invariants = &'static [(&'static str, &'static [&'static str])];

const INVARIANT_RUST: Invariants = &[
    ("qmatmul", &["naive", "rows", "rows_avx2", "rows_avx512", "vnni", "amx_codes", "amx_rows"]),
    ("embedding", &["rows"]),
    ("rmsnorm", &["rows"]),
    ("rope", &["rows"]),
    ("attention", &["naive", "decode", "decode_avx2"]),
    ("swiglu", &["chunks", "chunks_avx2"]),
    ("add", &["chunks"]),
    ("lora_shrink", &["naive", "rows", "rows_avx2", "rows_avx512"]),
    ("lora_expand", &["naive", "rows", "rows_avx2", "rows_avx512"]),
];
const INVARIANT_PTX: Invariants = &[
    ("qmatmul", &["naive", "warp"]),
    ("embedding", &["warp"]),
    ("rmsnorm", &["warp"]),
    ("rope", &["warp"]),
    ("attention", &["naive", "decode"]),
    ("swiglu", &["vec4"]),
    ("add", &["vec4"]),
    ("lora_shrink", &["warp"]),
    ("lora_expand", &["columns"]),
];
const INVARIANT_WGSL: Invariants = &[
    ("qmatmul", &["naive", "workgroup", "subgroup"]),
    ("embedding", &["rows"]),
    ("rmsnorm", &["workgroup", "vec4"]),
    ("rope", &["flat", "vec4"]),
    ("attention", &["naive", "workgroup", "decode"]),
    ("swiglu", &["flat", "vec4"]),
    ("add", &["flat", "vec4"]),
    ("lora_shrink", &["workgroup"]),
    ("lora_expand", &["columns"]),
];

impl Arg {
    /// Element type for a kernel with activations of type `act`.
    pub fn dtype(&self, dims: &Dims, act: Dtype) -> Dtype {
        match self.dtype {
            ArgType::Is(dtype) => dtype,
            ArgType::Act => act,
            ArgType::Scale if dims["WIDE"] == 1 => Dtype::F32,
            ArgType::Scale => Dtype::F16,
        }
    }

    /// Sizes for these dims.
    pub fn shape(&self, dims: &Dims) -> Vec<usize> {
        self.shape.iter().map(|term| evaluate(term, dims)).collect()
    }

    /// Bytes for these dims.
    pub fn bytes(&self, dims: &Dims, act: Dtype) -> usize {
        self.shape(dims).iter().product::<usize>() * self.dtype(dims, act).size()
    }
}

/// The value of `A*B/2`, from left to right, division rounding up. Panics for a name that is no dim: a fault of the table.
fn evaluate(term: &str, dims: &Dims) -> usize {
    let mut value = 1;
    let mut divide = false;
    let mut rest = term;
    loop {
        let end = rest.find(['*', '/']).unwrap_or(rest.len());
        let factor = rest[..end].parse().unwrap_or_else(|_| dims[&rest[..end]]);
        value = if divide { usize::div_ceil(value, factor) } else { value * factor };
        if end == rest.len() {
            return value;
        }
        divide = rest.as_bytes()[end] == b'/';
        rest = &rest[end + 1..];
    }
}

/// An input of the contract.
pub const fn input(name: &'static str, dtype: ArgType, shape: &'static [&'static str], fill: Fill) -> Arg {
    Arg { name, dtype, shape, role: Role::In, fill }
}

/// An output of the contract.
pub const fn output(name: &'static str, dtype: ArgType, shape: &'static [&'static str]) -> Arg {
    Arg { name, dtype, shape, role: Role::Out, fill: Fill::Poison }
}

/// An argument that is read and written.
pub const fn inout(name: &'static str, dtype: ArgType, shape: &'static [&'static str], fill: Fill) -> Arg {
    Arg { name, dtype, shape, role: Role::InOut, fill }
}

/// A WGSL kernel with f32 activations: its own file first, then those it shares with others.
pub const fn shaders(
    stem: &'static str,
    files: &'static [File],
    launch: fn(&Dims) -> Launch,
    supports: fn(&Dims, &Caps) -> bool,
) -> Kernel {
    Kernel { stem, source: Source::Wgsl(files), act: Dtype::F32, launch, supports }
}

/// A Rust kernel with f32 activations.
pub const fn rust(stem: &'static str, body: fn(&Dims, &mut [Slice<'_>]), supports: fn(&Dims, &Caps) -> bool) -> Kernel {
    Kernel { stem, source: Source::Rust(body), act: Dtype::F32, launch: no_grid, supports }
}

/// For Rust kernels in AVX2.
pub fn has_avx2(_: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Avx2
}

/// For Rust kernels in AVX-512.
pub fn has_avx512(_: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Avx512
}

/// For kernels on AMX tiles.
pub fn has_amx(_: &Dims, caps: &Caps) -> bool {
    caps.simd >= Simd::Amx
}
