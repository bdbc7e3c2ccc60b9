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
#[path = "models/wgpu.rs"]
mod wgpu;
#[path = "models/written.rs"]
mod written;

use handmill::device::{self, cpu::Cpu, ptx_sim::PtxSim, Device};
use std::sync::{Arc, OnceLock};

/// The device most tests run on.
pub fn device() -> Arc<dyn Device> {
    Arc::new(Cpu::new())
}

/// The PTX kernels, every access checked.
pub fn ptx_sim() -> Arc<dyn Device> {
    Arc::new(PtxSim::new())
}

/// The first adapter, opened once; none where there need not be one.
pub fn adapter() -> Option<Arc<dyn Device>> {
    static ADAPTER: OnceLock<Option<Arc<dyn Device>>> = OnceLock::new();
    let open = || match device::open("wgpu") {
        Ok(device) => Some(device),
        Err(reason) if std::env::var_os("HANDMILL_REQUIRE_WGPU").is_some() => panic!("{reason}"),
        Err(reason) => {
            eprintln!("not tested: {reason}");
            None
        }
    };
    ADAPTER.get_or_init(open).clone()
}

/// The devices that tiny models run on.
pub fn devices() -> Vec<Arc<dyn Device>> {
    [device(), ptx_sim()].into_iter().chain(adapter()).collect()
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
