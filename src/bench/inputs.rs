//! Inputs whose results are known for every element, however large the case: rows, of activations and of weights, repeat
//! with a period, so the oracle computes one period in f64 and each output is held against its place in it.

use super::whole::{gcd, leave_nothing_out};
use crate::device::{Buffer, Device, Result};
use crate::op::{Arg, Dims, Expected, Kernel, OpSpec, Role};
use crate::tensor::{Dtype, HostTensor};
use crate::verify;

/// The oracle is asked for at most so many operations, some tenths of a second, and reads at most so many bytes.
const ORACLE_FLOPS: u64 = 240_000_000;
const ORACLE_BYTES: u64 = 160_000_000;
/// Periods are odd, so that a kernel which takes one tile for another is seen.
const PERIOD: usize = 7;
const LONG_PERIOD: usize = 251;
/// Weight formats whose arguments are cut anywhere between two rows of W, or, nf4dq's, where a nested block ends.
const FORMATS: [&str; 7] = ["f32", "f16", "bf16", "q4", "q8", "nf4", "nf4dq"];
/// Sizes that a case too large for the oracle is made smaller to.
const SMALLER: [(&str, usize); 6] = [("M", 65), ("Q", 3), ("C", 129), ("N", 515), ("K", 1536), ("V", 4099)];

/// What a case is measured on, and what its outputs must be.
pub struct Inputs {
    /// One period of each argument.
    small: Vec<HostTensor>,
    small_dims: Dims,
    dims: Dims,
    act: Dtype,
    /// None where even one period is too much for the oracle.
    expected: Option<Vec<Expected>>,
}

/// How far a kernel's results are off.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    /// |got − expected| of the element where it is the largest share of what is allowed.
    pub error: f64,
    /// What is allowed there.
    pub tolerance: f64,
    /// Which elements were looked at.
    pub how: String,
    /// What is wrong, in words.
    pub failure: Option<String>,
}

impl Inputs {
    /// For kernels of `spec` with activations of type `act`; the same every time.
    pub fn new(spec: &OpSpec, dims: &Dims, act: Dtype) -> Inputs {
        let mut small_dims = period(spec, dims);
        let cost = (spec.cost)(&small_dims);
        let affordable = cost.flops <= ORACLE_FLOPS && cost.bytes <= ORACLE_BYTES;
        if !affordable && spec.name == "qmatmul_t" && FORMATS.contains(&spec.format) {
            // Its sums run over the rows of W, so these have no period to check by; to be drawn fast they repeat too.
            small_dims = repeated_rows(spec, small_dims);
        }
        let mut small = verify::fill(spec, &small_dims, act, 1);
        leave_nothing_out(spec, &small_dims, &mut small);
        let expected = affordable.then(|| (spec.oracle)(&small_dims, &small));
        Inputs { small, small_dims, dims: dims.clone(), act, expected }
    }

    /// Argument number `i` at its full size.
    pub fn bytes(&self, spec: &OpSpec, i: usize) -> Vec<u8> {
        let (arg, small) = (&spec.args[i], &self.small[i]);
        let full = arg.shape(&self.dims);
        let mut out = Vec::with_capacity(arg.bytes(&self.dims, self.act));
        if full.iter().all(|&size| size > 0) {
            tile(small.bytes.as_slice(), &small.shape, &full, small.dtype.size(), &mut out);
        }
        out
    }

    /// One period of each argument, and its dims: what another program needs to have the same inputs.
    pub fn period(&self) -> (&[HostTensor], &Dims) {
        (&self.small, &self.small_dims)
    }

    /// What the outputs of one period must be, where the oracle could tell.
    pub fn expected(&self) -> Option<&[Expected]> {
        self.expected.as_deref()
    }

    /// Holds the outputs in `buffers`, of one launch, against the oracle; a case too large for it is checked in a
    /// smaller one. None where the kernel does not run that.
    pub fn error(
        &self,
        device: &dyn Device,
        spec: &OpSpec,
        kernel: &'static Kernel,
        buffers: &[Buffer],
    ) -> Result<Option<Error>> {
        let Some(expected) = &self.expected else {
            let dims = smaller(spec, &self.dims);
            if !(kernel.supports)(&dims, device.caps()) {
                return Ok(None);
            }
            let how = format!("every element of a smaller case: {}", super::shapes::label(&dims));
            let outcome = verify::check(device, spec, kernel, &dims, 1)?;
            let (error, tolerance) =
                outcome.worst.map_or((0.0, 0.0), |worst| ((worst.got - worst.expected).abs(), worst.bound));
            return Ok(Some(Error { error, tolerance, how, failure: outcome.failure }));
        };
        let whole = self.small_dims.to_string() == self.dims.to_string();
        let how = match whole {
            true => "every element".to_string(),
            false => format!("every element; inputs repeat: {}", super::shapes::label(&self.small_dims)),
        };
        let relative = verify::relative_bound(spec, &self.dims, kernel);
        let outputs = spec.args.iter().zip(buffers).filter(|(arg, _)| arg.role != Role::In);
        let mut worst = Error { error: 0.0, tolerance: 0.0, how, failure: None };
        let mut share = 0.0;
        for ((arg, buffer), expected) in outputs.zip(expected) {
            for got in self.extremes(device, arg, buffer)? {
                for (i, &value) in expected.value.iter().enumerate() {
                    if value.is_nan() || expected.magnitude[i].is_infinite() {
                        continue;
                    }
                    let error = if got[i] == value { 0.0 } else { (got[i] - value).abs() };
                    let bound = relative * expected.magnitude[i] + f64::from(f32::from_bits(1));
                    let here = if (error / bound).is_nan() { f64::INFINITY } else { error / bound };
                    if here > share || worst.tolerance == 0.0 {
                        share = here;
                        (worst.error, worst.tolerance) = (error, bound);
                        if here > 1.0 {
                            let what =
                                format!("{}: got {:e}, expected {value:e}, allowed {bound:.3e}", arg.name, got[i]);
                            worst.failure = Some(what);
                        }
                    }
                }
            }
        }
        Ok(Some(worst))
    }

    /// The least and the largest value that each element of a period has anywhere in an output: with both in bounds,
    /// all are. A NaN is both.
    fn extremes(&self, device: &dyn Device, arg: &Arg, buffer: &Buffer) -> Result<[Vec<f64>; 2]> {
        let (full, small) = (arg.shape(&self.dims), arg.shape(&self.small_dims));
        let (dtype, count) = (arg.dtype(&self.dims, self.act), small.iter().product());
        let [mut low, mut high] = [vec![f64::INFINITY; count], vec![f64::NEG_INFINITY; count]];
        let row_bytes = full[1..].iter().product::<usize>() * dtype.size();
        let small_row = small[1..].iter().product::<usize>();
        // Some rows at a time: the whole in f64 may be gigabytes.
        let rows = ((16 << 20) / row_bytes.max(1)).clamp(1, full[0].max(1));
        let mut first = 0;
        while first < full[0] {
            let some = rows.min(full[0] - first);
            let mut host = HostTensor::zeros(dtype, &[&[some], &full[1..]].concat());
            device.read(buffer, first * row_bytes, host.bytes.as_mut_slice())?;
            let values = host.to_f64();
            for (r, row) in values.chunks(row_bytes / dtype.size()).enumerate() {
                let at = (first + r) % small[0] * small_row;
                let place = &mut (&mut low[at..at + small_row], &mut high[at..at + small_row]);
                fold(row, &full[1..], &small[1..], place);
            }
            first += some;
        }
        Ok([low, high])
    }
}

/// Repeats a row-major tensor along every axis to a larger shape of as many axes.
fn tile(small: &[u8], small_shape: &[usize], full: &[usize], element: usize, out: &mut Vec<u8>) {
    let Some((&count, rest)) = full.split_first() else {
        return out.extend_from_slice(&small[..element]);
    };
    let small_rest = &small_shape[1..];
    let block = small_rest.iter().product::<usize>() * element;
    if rest == small_rest {
        // A run of whole blocks.
        let period = small_shape[0] * block;
        let mut left = count * block;
        while left > 0 {
            let some = left.min(period);
            out.extend_from_slice(&small[..some]);
            left -= some;
        }
        return;
    }
    for i in 0..count {
        let at = i % small_shape[0] * block;
        tile(&small[at..at + block], small_rest, rest, element, out);
    }
}

/// Takes a tensor's values into the least and the largest of their places in a smaller one.
fn fold(values: &[f64], full: &[usize], small: &[usize], place: &mut (&mut [f64], &mut [f64])) {
    let Some((&count, rest)) = full.split_first() else {
        let (low, high) = (&mut place.0[0], &mut place.1[0]);
        if values[0].is_nan() || low.is_nan() {
            (*low, *high) = (f64::NAN, f64::NAN);
        } else {
            (*low, *high) = (low.min(values[0]), high.max(values[0]));
        }
        return;
    };
    let (block, small_block) = (rest.iter().product::<usize>(), small[1..].iter().product::<usize>());
    for i in 0..count {
        let at = i % small[0] * small_block;
        let part = &mut (&mut place.0[at..at + small_block], &mut place.1[at..at + small_block]);
        fold(&values[i * block..(i + 1) * block], rest, &small[1..], part);
    }
}

/// The dims of one period: rows that do not meet each other, and rows of weights.
fn period(spec: &OpSpec, dims: &Dims) -> Dims {
    let less = |dims: Dims, name: &str, most: usize| match dims.get(name) {
        Some(size) if size > most => dims.with(name, most),
        _ => dims,
    };
    match spec.name {
        // Of a format that is not known here, rows may not be all that a period must end with.
        "qmatmul" if FORMATS.contains(&spec.format) => repeated_rows(spec, less(dims.clone(), "M", PERIOD)),
        "qmatmul" => less(dims.clone(), "M", PERIOD),
        // Not `rope`: rows at the same position would read the same row of its table.
        "qmatmul_t" | "lora_shrink" | "rmsnorm" | "layernorm" | "swiglu" | "gelu" | "add" | "cast"
        | "swiglu_backward" | "cross_entropy" => less(dims.clone(), "M", PERIOD),
        "cosine_topk" => less(dims.clone(), "Q", PERIOD / 2),
        "adamw" => less(dims.clone(), "N", 8 * LONG_PERIOD + 1),
        _ => dims.clone(),
    }
}

/// A period of W's rows, where y has no other columns.
fn repeated_rows(spec: &OpSpec, dims: Dims) -> Dims {
    // A nested scale of nf4dq counts 256 blocks of 64 through the whole matrix: a period ends where one does.
    let whole = if spec.format == "nf4dq" { 256 / gcd(256, (dims["K"] / 64).max(1)) } else { 1 };
    let rows = LONG_PERIOD.next_multiple_of(whole);
    match dims["LDY"] == dims["N"] && rows < dims["N"] {
        true => dims.with("N", rows).with("LDY", rows),
        false => dims,
    }
}

/// A case like this one that the oracle can do.
fn smaller(spec: &OpSpec, dims: &Dims) -> Dims {
    let mut less = dims.clone();
    for (name, most) in SMALLER {
        if less.get(name).is_some_and(|size| size > most) {
            less = less.with(name, most);
        }
    }
    // y is as wide as N, and N even keeps top-k off its grid of ties.
    match less.get("LDY").zip(less.get("N")) {
        Some((_, n)) => less.with("LDY", n),
        None if spec.name == "cosine_topk" => less.with("N", 514),
        None => less,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_repeat_along_every_axis_and_fold_back() {
        let small: Vec<u8> = vec![1, 2, 3, 4, 5, 6];
        let mut out = Vec::new();
        tile(&small, &[2, 3], &[3, 5], 1, &mut out);
        assert_eq!(out, [1, 2, 3, 1, 2, 4, 5, 6, 4, 5, 1, 2, 3, 1, 2]);
        let values: Vec<f64> = out.iter().map(|&v| f64::from(v)).collect();
        let (mut low, mut high) = (vec![f64::INFINITY; 6], vec![f64::NEG_INFINITY; 6]);
        fold(&values, &[3, 5], &[2, 3], &mut (&mut low, &mut high));
        assert_eq!(low, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(low, high);

        let mut wrong = values;
        wrong[10] = f64::NAN; // the third row is the first one again
        let (mut low, mut high) = (vec![f64::INFINITY; 6], vec![f64::NEG_INFINITY; 6]);
        fold(&wrong, &[3, 5], &[2, 3], &mut (&mut low, &mut high));
        assert!(low[0].is_nan() && high[0].is_nan() && low[1] == 2.0);
    }
}
