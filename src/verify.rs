//! One check, used by the tests and by `handmill verify`: a kernel on a device against its f64 oracle, outputs poisoned,
//! sentinel bytes round every buffer, inputs compared afterwards.

use crate::device::{Buffer, Device, Error};
use crate::op::{Arg, Dims, Expected, Fill, Kernel, OpSpec, Role};
use crate::tensor::{Dtype, HostTensor};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Fills outputs before a launch: NaN in every floating-point type, a value out of range in every integer one.
const POISON: u8 = 0xFF;
/// Lies before and after every buffer.
const SENTINEL: u8 = 0xA5;

/// How a check ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Worst |got − expected| / bound over all outputs: at most 1 passes.
    pub share: f64,
    /// Largest normalised mean square error of an output.
    pub nmse: f64,
    /// Where the share is worst.
    pub worst: Option<Worst>,
    /// Why it failed, in words; none when it passed.
    pub failure: Option<String>,
}

/// The worst element.
#[derive(Clone, Debug)]
pub struct Worst {
    /// Output's name.
    pub arg: &'static str,
    /// Index from the outermost dim in.
    pub index: Vec<usize>,
    /// The kernel's value.
    pub got: f64,
    /// The oracle's.
    pub expected: f64,
    /// What was allowed between them.
    pub bound: f64,
}

/// Inputs, and outputs' poison, for a kernel: the same for the same seed.
pub fn fill(spec: &OpSpec, dims: &Dims, act: Dtype, seed: u64) -> Vec<HostTensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    spec.args.iter().map(|arg| fill_one(arg, dims, act, &mut rng)).collect()
}

fn fill_one(arg: &Arg, dims: &Dims, act: Dtype, rng: &mut ChaCha8Rng) -> HostTensor {
    let (dtype, shape) = (arg.dtype(dims, act), arg.shape(dims));
    let count = shape.iter().product::<usize>();
    match arg.fill {
        Fill::Sum if dims["ACC"] == 1 => {
            HostTensor::from_f64(dtype, &shape, &(0..count).map(|_| normal(rng)).collect::<Vec<_>>())
        }
        Fill::Poison | Fill::Sum => {
            let mut tensor = HostTensor::zeros(dtype, &shape);
            tensor.bytes.as_mut_slice().fill(POISON);
            tensor
        }
        Fill::Normal => HostTensor::from_f64(dtype, &shape, &(0..count).map(|_| normal(rng)).collect::<Vec<_>>()),
        Fill::Columns => {
            let columns = dims["Y0"]..dims["Y0"] + dims["N"];
            let value = |i: usize| if columns.contains(&(i % dims["LDY"])) { normal(rng) } else { f64::NAN };
            HostTensor::from_f64(dtype, &shape, &(0..count).map(value).collect::<Vec<_>>())
        }
        Fill::Uniform(low, high) => {
            let values: Vec<f64> = (0..count).map(|_| low + (high - low) * rng.random::<f64>()).collect();
            HostTensor::from_f64(dtype, &shape, &values)
        }
        Fill::Bits => {
            let mut tensor = HostTensor::zeros(dtype, &shape);
            rng.fill_bytes(tensor.bytes.as_mut_slice());
            tensor
        }
        Fill::Below(dim) => {
            let below = dims[dim] as u32;
            HostTensor::from_u32(&shape, &(0..count).map(|_| rng.random_range(0..below)).collect::<Vec<_>>())
        }
        Fill::With(make) => {
            let tensor = make(dims, rng);
            assert_eq!((tensor.dtype, &tensor.shape), (dtype, &shape), "fill of {}", arg.name);
            tensor
        }
    }
}

/// A standard normal number (Box and Muller 1958).
pub fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// A tensor on a device between two runs of sentinel bytes.
struct Guarded {
    whole: Buffer,
    view: Buffer,
    margin: usize,
}

impl Guarded {
    fn new(device: &dyn Device, tensor: &HostTensor) -> Result<Guarded, Error> {
        let margin = device.caps().view_alignment.max(64);
        let bytes = tensor.bytes.len();
        let mut host = vec![SENTINEL; margin + bytes.next_multiple_of(4) + margin];
        host[margin..margin + bytes].copy_from_slice(tensor.bytes.as_slice());
        let whole = device.alloc(host.len())?;
        device.write(&whole, 0, &host)?;
        Ok(Guarded { view: whole.view(margin, bytes), whole, margin })
    }

    /// The tensor's bytes now, or the offset of the first sentinel that changed, relative to the tensor.
    fn read(&self, device: &dyn Device) -> Result<Result<Vec<u8>, isize>, Error> {
        let mut host = vec![0; self.whole.bytes()];
        device.read(&self.whole, 0, &mut host)?;
        let inside = self.margin..self.margin + self.view.bytes();
        let changed = (0..host.len()).find(|i| !inside.contains(i) && host[*i] != SENTINEL);
        Ok(match changed {
            Some(i) => Err(i as isize - self.margin as isize),
            None => Ok(host[inside].to_vec()),
        })
    }
}

/// Runs `kernel` once on inputs of `seed` and compares. An `Err` is a device that failed, not a wrong result.
pub fn check(
    device: &dyn Device,
    spec: &OpSpec,
    kernel: &'static Kernel,
    dims: &Dims,
    seed: u64,
) -> Result<Outcome, Error> {
    let tensors = fill(spec, dims, kernel.act, seed);
    let expected = (spec.oracle)(dims, &tensors);
    let guarded = tensors.iter().map(|t| Guarded::new(device, t)).collect::<Result<Vec<_>, _>>()?;
    device.launch(spec, kernel, &guarded.iter().map(|g| &g.view).collect::<Vec<_>>(), dims)?;
    device.sync()?;

    let mut outcome = Outcome { share: 0.0, nmse: 0.0, worst: None, failure: None };
    let mut expected = expected.into_iter();
    for ((arg, before), guard) in spec.args.iter().zip(&tensors).zip(&guarded) {
        let after = match guard.read(device)? {
            Ok(bytes) => bytes,
            Err(offset) => {
                outcome.fail(format!("{}: byte {offset} outside the buffer was written", arg.name));
                continue;
            }
        };
        if arg.role == Role::In {
            if after != before.bytes.as_slice() {
                outcome.fail(format!("{}: an input was changed", arg.name));
            }
            continue;
        }
        let mut got = before.clone();
        got.bytes.as_mut_slice().copy_from_slice(&after);
        let expected = expected.next().expect("the oracle gives one result for each output");
        compare(spec, dims, kernel, arg, before, &got, &expected, &mut outcome);
    }
    Ok(outcome)
}

impl Outcome {
    fn fail(&mut self, reason: String) {
        self.failure.get_or_insert(reason);
    }
}

/// Roundings of the two factors of a product, where they are narrower than f32.
fn narrow(kernel: &Kernel) -> f64 {
    if kernel.act == Dtype::F32 {
        0.0
    } else {
        2.0 * kernel.act.unit_roundoff()
    }
}

/// How far an element may be off, relative to its magnitude.
pub fn relative_bound(spec: &OpSpec, dims: &Dims, kernel: &Kernel) -> f64 {
    (spec.tolerance.roundings)(dims) * Dtype::F32.unit_roundoff() + narrow(kernel)
}

/// Holds one output against the oracle.
#[allow(clippy::too_many_arguments)]
fn compare(
    spec: &OpSpec,
    dims: &Dims,
    kernel: &Kernel,
    arg: &'static Arg,
    before: &HostTensor,
    got: &HostTensor,
    expected: &Expected,
    outcome: &mut Outcome,
) {
    let size = got.dtype.size();
    let (before_bytes, got_bytes) = (before.bytes.as_slice(), got.bytes.as_slice());
    let roundings = (spec.tolerance.roundings)(dims);
    let (narrow, relative) = (narrow(kernel), relative_bound(spec, dims, kernel));
    let got = got.to_f64();
    assert_eq!((got.len(), got.len()), (expected.value.len(), expected.magnitude.len()), "{}", spec.id());

    let (mut error_squares, mut squares) = (0.0, 0.0);
    for (i, &value) in expected.value.iter().enumerate() {
        if value.is_nan() {
            let range = i * size..(i + 1) * size;
            if before_bytes[range.clone()] != got_bytes[range] {
                outcome.fail(format!(
                    "{}{:?}: was written, must stay as it was",
                    arg.name,
                    unravel(i, &arg.shape(dims))
                ));
            }
            continue;
        }
        if expected.magnitude[i].is_infinite() {
            continue;
        }
        // A result below the normal range is rounded to a multiple of the smallest denormal.
        let bound = relative * expected.magnitude[i] + f32::from_bits(1) as f64;
        // Equal infinities have no difference.
        let error = if got[i] == value { 0.0 } else { (got[i] - value).abs() };
        // A sum that cancels counts as large as its terms usually make it, magnitude / sqrt(their number): with few
        // elements a single one near zero would else decide.
        let usual = expected.magnitude[i] / roundings.max(1.0);
        error_squares += error * error;
        if value.is_finite() {
            squares += value.abs().max(usual).powi(2);
        }
        let share = if (error / bound).is_nan() { f64::INFINITY } else { error / bound };
        if share > outcome.share || outcome.worst.is_none() {
            outcome.share = outcome.share.max(share);
            let index = unravel(i, &arg.shape(dims));
            outcome.worst = Some(Worst { arg: arg.name, index, got: got[i], expected: value, bound });
        }
    }
    let nmse = if error_squares == 0.0 { 0.0 } else { error_squares / squares };
    // NaN stands for itself here: it fails the comparison below.
    outcome.nmse = if nmse > outcome.nmse || nmse.is_nan() { nmse } else { outcome.nmse };
    let allowed = spec.tolerance.nmse + narrow * narrow;
    if outcome.share > 1.0 {
        let worst = outcome.worst.as_ref().expect("a share comes from an element");
        outcome.fail(format!(
            "{}{:?}: got {:e}, expected {:e}, {:.2} times the tolerance {:.3e}",
            worst.arg, worst.index, worst.got, worst.expected, outcome.share, worst.bound
        ));
    } else if nmse > allowed || nmse.is_nan() {
        outcome.fail(format!("{}: normalised mean square error {nmse:.2e}, allowed {allowed:.2e}", arg.name));
    }
}

/// Index of element `i` of a row-major tensor.
fn unravel(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (slot, size) in index.iter_mut().zip(shape).rev() {
        *slot = i % size;
        i /= size;
    }
    index
}
