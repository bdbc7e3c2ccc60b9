//! AdamW over all parameters at once, and the learning rate of each step.

use std::str::FromStr;
use std::sync::Arc;

use super::parameters::Parameters;
use crate::device::{self, Buffer, Device};
use crate::error::Error;
use crate::ops::{self, adamw::Settings};

/// Parts the sum of squared gradients of a piece is left in: enough for all threads, few to add up, and as many floats as
/// keep views aligned on every device.
const PARTS: usize = 64;

/// How the learning rate changes after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Not at all.
    Constant,
    /// Down to zero in a straight line.
    Linear,
    /// Down to zero in half a wave.
    Cosine,
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(word: &str) -> Result<Schedule, String> {
        match word {
            "constant" => Ok(Schedule::Constant),
            "linear" => Ok(Schedule::Linear),
            "cosine" => Ok(Schedule::Cosine),
            _ => Err(format!("{word} is no schedule; constant, linear and cosine are")),
        }
    }
}

impl Schedule {
    /// The word of flags and files.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Constant => "constant",
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
        }
    }

    /// The learning rate of step `step` of `steps`, counted from 0: it rises in `warmup` even parts to `peak`, which
    /// the last step of the warm-up has, then falls so that a step after the last would have none.
    pub fn rate(self, peak: f64, step: usize, steps: usize, warmup: usize) -> f64 {
        if step < warmup {
            return peak * (step + 1) as f64 / warmup as f64;
        }
        let done = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Constant => peak,
            Schedule::Linear => peak * (1.0 - done).max(0.0),
            Schedule::Cosine => peak * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()),
        }
    }
}

/// AdamW on a device.
pub struct Optimizer {
    /// Betas, epsilon, decay, and the largest norm of the gradients; 0 for none.
    pub settings: Settings,
    device: Arc<dyn Device>,
    /// Floats of a launch: as many as an argument can bind.
    piece: usize,
    /// Those of each piece.
    parts: Buffer,
}

impl Optimizer {
    /// With these settings, for buffers of `len` floats.
    pub fn new(device: Arc<dyn Device>, settings: Settings, len: usize) -> Result<Optimizer, Error> {
        let piece = device.caps().max_binding / 4;
        Optimizer::in_pieces(device, settings, len, piece)
    }

    /// With at most `piece` floats a launch, rounded to where a view may begin.
    fn in_pieces(device: Arc<dyn Device>, settings: Settings, len: usize, piece: usize) -> Result<Optimizer, Error> {
        let piece = (piece / PARTS * PARTS).max(PARTS);
        let parts = device.alloc(4 * PARTS * len.div_ceil(piece))?;
        Ok(Optimizer { settings, parts, device, piece })
    }

    /// Changes the parameters by their gradients, step `step` counted from 1. Gives the norm of the gradients before
    /// clipping.
    pub fn step(&self, parameters: &Parameters, rate: f64, step: u64) -> Result<f64, Error> {
        let Parameters { len, values, gradients, mean, square, .. } = parameters;
        self.change(*len, [gradients, values, mean, square], rate, step)
    }

    /// The same for buffers of `len` floats: gradients, values, means and mean squares.
    fn change(&self, len: usize, buffers: [&Buffer; 4], rate: f64, step: u64) -> Result<f64, Error> {
        let device = &*self.device;
        let pieces: Vec<_> = (0..len).step_by(self.piece).map(|at| (at, self.piece.min(len - at))).collect();
        let of = |buffer: &Buffer, (at, count): (usize, usize)| buffer.view(4 * at, 4 * count);
        let op = ops::find("squared_norm", "f32");
        for (i, &piece) in pieces.iter().enumerate() {
            let parts = of(&self.parts, (PARTS * i, PARTS));
            device::run(device, op, &[&of(buffers[0], piece), &parts], &op.dims(&[piece.1, PARTS], &[]))?;
        }
        // Every piece is clipped by the norm of all.
        let count = PARTS * pieces.len();
        let op = ops::find("adamw", "f32");
        let parts = if self.settings.max_norm > 0.0 { count } else { 0 };
        for &piece in &pieces {
            let [g, p, m, v] = buffers.map(|buffer| of(buffer, piece));
            let dims = op.dims(&[piece.1, parts], &self.settings.scalars(rate, step));
            device::run(device, op, &[&g, &self.parts, &p, &m, &v], &dims)?;
        }
        let mut host = vec![0f32; count];
        device.read(&self.parts, 0, bytemuck::cast_slice_mut(&mut host))?;
        Ok(host.iter().map(|&part| f64::from(part)).sum::<f64>().sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn rates_rise_and_fall_as_said() {
        let rates = |schedule: Schedule| (0..6).map(|step| schedule.rate(2.0, step, 6, 2)).collect::<Vec<f64>>();
        assert_eq!(rates(Schedule::Constant), [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(rates(Schedule::Linear), [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]);
        let cosine = rates(Schedule::Cosine);
        assert_eq!(cosine[..3], [1.0, 2.0, 2.0]);
        assert!((cosine[4] - 1.0).abs() < 1e-12 && cosine[5] < 0.3 && cosine[5] > 0.0);
        assert_eq!(Schedule::Linear.rate(1.0, 0, 1, 0), 1.0);
    }

    #[test]
    fn a_step_in_pieces_is_a_step() {
        let device: Arc<dyn Device> = Arc::new(Cpu::new());
        let settings = Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.01, max_norm: 1.0 };
        let len = 1000;
        let step = |piece: usize| {
            let buffers = [3.0, 1.0, 0.5, 0.25].map(|size: f32| {
                let values: Vec<f32> = (0..len).map(|i| size * (i % 17) as f32).collect();
                let buffer = device.alloc(4 * len).unwrap();
                device.write(&buffer, 0, bytemuck::cast_slice(&values)).unwrap();
                buffer
            });
            let optimizer = Optimizer::in_pieces(device.clone(), settings, len, piece).unwrap();
            let norm = optimizer.change(len, buffers.each_ref(), 1e-2, 3).unwrap();
            let mut values = vec![0f32; len];
            device.read(&buffers[1], 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
            (norm, values)
        };
        let (norm, values) = step(usize::MAX);
        for piece in [1, 100, 999, 1000] {
            // The squares are added up in another order: some sqrt(1000) roundings of each sum.
            let (other, others) = step(piece);
            assert!((norm - other).abs() < 2e-6 * norm, "pieces of {piece}: {other}, whole {norm}");
            for (a, b) in values.iter().zip(&others) {
                assert!((a - b).abs() <= 2e-6 * a.abs().max(1e-2), "pieces of {piece}: {b}, whole {a}");
            }
        }
    }
}
