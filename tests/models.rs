//! Decoders and encoders against forward passes in f64 and against other people's software on real models.

#[path = "models/directories.rs"]
mod directories;
#[path = "models/real.rs"]
mod real;
#[path = "models/reference.rs"]
mod reference;
#[path = "models/tiny.rs"]
mod tiny;
#[path = "models/tiny_decoders.rs"]
mod tiny_decoders;
#[path = "models/written.rs"]
mod written;

use handmill::device::{cpu::Cpu, ptx_sim::PtxSim, Device};
use std::sync::Arc;

/// The device the tests run on.
pub fn device() -> Arc<dyn Device> {
    Arc::new(Cpu::new())
}

/// The PTX kernels, every access checked.
pub fn ptx_sim() -> Arc<dyn Device> {
    Arc::new(PtxSim::new())
}

/// Largest |got − expected| over the largest |expected|.
pub fn worst(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0.0f64, |max, v| max.max(v.abs()));
    got.iter().zip(expected).fold(0.0, |max: f64, (&got, expected)| {
        let error = (got as f64 - expected).abs() / scale;
        if error.is_nan() {
            f64::INFINITY
        } else {
            max.max(error)
        }
    })
}
