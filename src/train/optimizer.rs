//! AdamW over all parameters at once, and the learning rate of each step.

use std::str::FromStr;
use std::sync::Arc;

use super::parameters::Parameters;
use crate::device::{self, Buffer, Device};
use crate::error::Error;
use crate::ops::{self, adamw::Settings};

/// Parts the sum of squared gradients is left in: enough for all threads, few to add up.
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
    parts: Buffer,
}

impl Optimizer {
    /// With these settings.
    pub fn new(device: Arc<dyn Device>, settings: Settings) -> Result<Optimizer, Error> {
        Ok(Optimizer { settings, parts: device.alloc(4 * PARTS)?, device })
    }

    /// Changes the parameters by their gradients, step `step` counted from 1. Gives the norm of the gradients before
    /// clipping.
    pub fn step(&self, parameters: &Parameters, rate: f64, step: u64) -> Result<f64, Error> {
        let device = &*self.device;
        let Parameters { len, values, gradients, mean, square, .. } = parameters;
        let op = ops::find("squared_norm", "f32");
        device::run(device, op, &[gradients, &self.parts], &op.dims(&[*len, PARTS], &[]))?;
        let op = ops::find("adamw", "f32");
        let parts = if self.settings.max_norm > 0.0 { PARTS } else { 0 };
        let dims = op.dims(&[*len, parts], &self.settings.scalars(rate, step));
        device::run(device, op, &[gradients, &self.parts, values, mean, square], &dims)?;
        let mut host = [0f32; PARTS];
        device.read(&self.parts, 0, bytemuck::cast_slice_mut(&mut host))?;
        Ok(host.iter().map(|&part| f64::from(part)).sum::<f64>().sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
