//! `lora_expand`: `y[M,N] += scale · S[M,R] · B[N,R]ᵀ`, an adapter's second half     Hu et al. 2021, arXiv 2106.09685
//!
//! Each row names its own adapter, as in `lora_shrink` with `IDS` = 1: Bᵀ `[T,N]` holds the matrices of L adapters, one
//! below the other, each with its true rank; those of adapter l are rows `rows[l,0]..rows[l,1]`, at most R of them,
//! `rows[l,1]` ≤ T. Row m uses adapter `adapter[m]` and its `scale`; it stays as it was where that is −1 or no index
//! below L, or the adapter has no rows. y is columns Y0..Y0+N of a matrix `[M,LDY]`. Where one adapter serves every
//! row, `qmatmul` adds the same term without a pass over y.

use super::skinny::{self, Rows};
use super::vector::{for_simd, Body, Vector, LANES};
use crate::op::*;
use crate::tensor::{Dtype, HostTensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Out of the low rank of each token's adapter, added to what the base gave.
pub static LORA_EXPAND: OpSpec = OpSpec {
    name: "lora_expand",
    format: "f32",
    formula: "y[m,n] += scale[adapter[m]] · Σ_r S[m,r] · Bᵀ[rows[adapter[m],0] + r, n]; unchanged without an adapter",
    dims: &["M", "N", "R", "T", "L", "LDY", "Y0"],
    scalars: &[],
    args: &[
        input("s", ArgType::Is(Dtype::F32), &["M", "R"], Fill::Normal),
        input("lora_bt", ArgType::Is(Dtype::F32), &["T", "N"], Fill::Normal),
        input("adapter", ArgType::Is(Dtype::I32), &["M"], Fill::With(adapters)),
        input("rows", ArgType::Is(Dtype::U32), &["L", "2"], Fill::With(true_ranks)),
        input("scale", ArgType::Is(Dtype::F32), &["L"], Fill::Normal),
        inout("y", ArgType::Is(Dtype::F32), &["M", "LDY"], Fill::Normal),
    ],
    oracle,
    // Counted as if every token had an adapter of rank R, another one each as long as there are others.
    cost: |d| {
        let (m, n, r) = (d["M"], d["N"], d["R"]);
        let met = d["T"].min(m * r);
        Cost { flops: (2 * m * n * (r + 1)) as u64, bytes: (4 * (2 * m * n + met * n + m * r)) as u64 }
    },
    tolerance: Tolerance {
        roundings: |d| (d["R"] as f64).sqrt() + 3.0,
        nmse: 1e-11,
        why: "R products are summed; their roundings, independent of each other, grow with sqrt(R); the scale and the \
              sum with y add one each",
    },
    // M, N, R, T, L, LDY, Y0
    cases: &[
        case(&[1, 1, 1, 1, 1, 1, 0], "the smallest"),
        case(&[7, 33, 3, 7, 3, 40, 7], "three adapters, one of rank 1, part of a wider y, tails"),
        case(&[33, 257, 9, 23, 3, 257, 0], "ranks of their own, rows without an adapter"),
        case(&[65, 65, 8, 1, 1, 65, 0], "one adapter of rank 1 in a batch made for 8"),
        case(&[5, 130, 65, 65, 1, 131, 1], "a rank beyond a vector, columns that no vector load may begin at"),
        case(&[16, 1536, 16, 128, 8, 1536, 0], "SmolLM2-135M's gate projection, eight adapters of rank 16"),
    ],
    kernels: &[CPU, PTX, WGSL],
};

const CPU: &[Kernel] = &[
    rust("lora_expand_f32_naive", naive, always),
    rust("lora_expand_f32_rows", |d, args| rows(d, args, Simd::Portable), always),
    rust("lora_expand_f32_rows_avx2", |d, args| rows(d, args, Simd::Avx2), has_avx2),
    rust("lora_expand_f32_rows_avx512", |d, args| rows(d, args, Simd::Avx512), has_avx512),
];

const PTX: &[Kernel] = &[ptx!("lora_expand_f32_columns", |d| columns_of_a_row(d, 128), always)];

const WGSL: &[Kernel] = &[wgsl!("lora_expand_f32_columns", |d| columns_of_a_row(d, 64), always)];

/// A column a thread.
fn columns_of_a_row(d: &Dims, threads: u32) -> Launch {
    Launch { grid: [(d["N"] as u32).div_ceil(threads), d["M"] as u32, 1], block: [threads, 1, 1], shared_bytes: 0 }
}

/// Indices of adapters, −1 and one past the last among them.
fn adapters(d: &Dims, rng: &mut ChaCha8Rng) -> HostTensor {
    let ids: Vec<i32> = (0..d["M"]).map(|_| rng.random_range(-1..=d["L"] as i32)).collect();
    HostTensor::from_slice(Dtype::I32, &[d["M"]], &ids)
}

/// T rows, cut where L adapters take at most R each and all but the last as many as they can.
fn true_ranks(d: &Dims, _: &mut ChaCha8Rng) -> HostTensor {
    let ends = |l: usize| [l * d["R"], (l + 1) * d["R"]].map(|row| row.min(d["T"]) as u32);
    HostTensor::from_u32(&[d["L"], 2], &(0..d["L"]).flat_map(ends).collect::<Vec<_>>())
}

/// The adapter of row m and its rows of Bᵀ, if it has any.
fn of_row(d: &Dims, m: usize, adapter: &[i32], rows: &[u32]) -> Option<(usize, std::ops::Range<usize>)> {
    let l = usize::try_from(adapter[m]).ok().filter(|l| *l < d["L"])?;
    let range = rows[2 * l] as usize..rows[2 * l + 1] as usize;
    (!range.is_empty()).then_some((l, range))
}

/// The definition in f64.
fn oracle(d: &Dims, args: &[HostTensor]) -> Vec<Expected> {
    let (m, n, r, ldy, y0) = (d["M"], d["N"], d["R"], d["LDY"], d["Y0"]);
    let [s, b, scale, y] = [0, 1, 4, 5].map(|i| args[i].to_f64());
    let (adapter, rows) = (args[2].as_slice::<i32>(), args[3].u32());
    let mut expected = Expected { value: vec![f64::NAN; m * ldy], magnitude: vec![0.0; m * ldy] };
    for i in 0..m {
        let Some((l, of_row)) = of_row(d, i, adapter, rows) else { continue };
        for j in 0..n {
            let at = i * ldy + y0 + j;
            let (mut sum, mut size) = (y[at], y[at].abs());
            for (k, row) in of_row.clone().enumerate() {
                let term = scale[l] * s[i * r + k] * b[row * n + j];
                sum += term;
                size += term.abs();
            }
            expected.value[at] = sum;
            expected.magnitude[at] = size;
        }
    }
    vec![expected]
}

/// CPU, plain: the definition.
fn naive(d: &Dims, args: &mut [Slice<'_>]) {
    let (n, r, ldy, y0) = (d["N"], d["R"], d["LDY"], d["Y0"]);
    let [s, b, adapter, rows, scale, y] = args else { unreachable!("six arguments") };
    let (s, b, adapter, rows, scale) = (s.f32(), b.f32(), adapter.as_slice::<i32>(), rows.u32(), scale.f32());
    for (m, y) in y.f32_mut().chunks_mut(ldy).enumerate() {
        let Some((l, of_row)) = of_row(d, m, adapter, rows) else { continue };
        for (j, y) in y[y0..y0 + n].iter_mut().enumerate() {
            let sum: f32 = of_row.clone().enumerate().map(|(k, row)| s[m * r + k] * b[row * n + j]).sum();
            *y += scale[l] * sum;
        }
    }
}

/// CPU: rows in parallel, vectors along N.
fn rows(d: &Dims, args: &mut [Slice<'_>], simd: Simd) {
    let (n, r, ldy, y0) = (d["N"], d["R"], d["LDY"], d["Y0"]);
    let [s, b, adapter, rows, scale, y] = args else { unreachable!("six arguments") };
    let (s, b, adapter, rows, scale) = (s.f32(), b.f32(), adapter.as_slice::<i32>(), rows.u32(), scale.f32());
    let m = adapter.len();
    assert!(y0 + n <= ldy && y.f32().len() == m * ldy);
    let y = Rows(y.f32_mut().as_mut_ptr());
    skinny::in_parts(m, n * r, &|m| {
        if let Some((l, of_row)) = of_row(d, m, adapter, rows) {
            let (s, b) = (&s[m * r..][..of_row.len()], &b[of_row.start * n..of_row.end * n]);
            // SAFETY: columns Y0..Y0+N of row m lie in y, as just seen, and are this part's alone.
            let y = unsafe { std::slice::from_raw_parts_mut(y.at(m * ldy + y0), n) };
            for_simd(simd, Expand { s, b, scale: scale[l], y });
        }
    });
}

/// y[n] += scale · Σ_r s[r] · b[r,n]: one row.
struct Expand<'a> {
    s: &'a [f32],
    b: &'a [f32],
    scale: f32,
    y: &'a mut [f32],
}

impl Body for Expand<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Expand { s, b, scale, y } = self;
        let n = y.len();
        let (fours, done) = (n / (4 * LANES) * (4 * LANES), n / LANES * LANES);
        for at in (0..fours).step_by(4 * LANES) {
            columns::<V, 4>(s, &b[at..], n, scale, &mut y[at..]);
        }
        for at in (fours..done).step_by(LANES) {
            columns::<V, 1>(s, &b[at..], n, scale, &mut y[at..]);
        }
        for at in done..n {
            let sum: f32 = s.iter().zip(b[at..].iter().step_by(n)).map(|(s, b)| s * b).sum();
            y[at] += scale * sum;
        }
    }
}

/// T vectors of columns of a row; rows of b are `n` apart.
#[inline(always)]
fn columns<V: Vector, const T: usize>(s: &[f32], b: &[f32], n: usize, scale: f32, y: &mut [f32]) {
    let mut sums = [V::splat(0.0); T];
    for (r, s) in s.iter().enumerate() {
        for (t, sum) in sums.iter_mut().enumerate() {
            *sum = V::splat(*s).mul_add(V::load(&b[r * n + t * LANES..]), *sum);
        }
    }
    for (t, sum) in sums.into_iter().enumerate() {
        let y = &mut y[t * LANES..];
        V::splat(scale).mul_add(sum, V::load(y)).store(y);
    }
}
