//! `handmill doctor`: what this machine offers, measured.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use handmill::device::{self, Device, Listed};
use handmill::op::{DeviceKind, Simd};
use handmill::ops::OPS;
use handmill::tensor::Dtype;
use rayon::prelude::*;
use serde_json::json;

use super::{print_json, Common};

/// How long a measurement takes, in seconds.
const LONG_ENOUGH: f64 = 0.3;
/// Bytes of a buffer that is copied: far more than caches hold.
const COPY_BYTES: usize = 128 << 20;
/// M, N and K of the product that is timed.
const MATMUL: usize = 1024;

/// Show the devices, how fast they copy and multiply, and which one is used
///
/// Copy bandwidth counts bytes read and bytes written. The matmul peak is that of the fastest f32 kernel for
/// 1024 x 1024 x 1024. Both are the best of a third of a second. Software that stands in for a GPU is not timed.
/// With --json: devices, each with id, kind, name, software, available, reason, simd, sm, shared_bytes,
/// copy_gb_per_s, matmul_gflop_per_s; auto and auto_reason.
#[derive(Args)]
pub struct Doctor {
    #[command(flatten)]
    common: Common,
}

/// A device as it is shown.
struct Found {
    listed: Listed,
    device: Option<Arc<dyn Device>>,
    copy: Option<f64>,
    matmul: Option<f64>,
}

impl Doctor {
    pub fn run(&self) -> Result<()> {
        let (auto, why) = device::auto();
        let wanted = self.common.device.as_str();
        let mut listed = device::list();
        if wanted != "auto" {
            let id = device::open(wanted)?.id().to_string();
            listed.retain(|entry| entry.id == id);
        }
        let mut devices = Vec::new();
        for mut listed in listed {
            let device = match listed.reason {
                Some(_) => None,
                None => device::open(&listed.id).map_err(|error| listed.reason = Some(error.to_string())).ok(),
            };
            let mut found = Found { listed, device, copy: None, matmul: None };
            if let (Some(device), false) = (&found.device, found.listed.software) {
                let spinner = super::spinner(format!("measuring {}", found.listed.id));
                found.copy = Some(copy_bandwidth(&**device)?);
                found.matmul = matmul_peak(&**device)?;
                spinner.finish_and_clear();
            }
            devices.push(found);
        }
        match self.common.json {
            true => print_json(&json!({
                "version": env!("CARGO_PKG_VERSION"),
                "devices": devices.iter().map(Found::json).collect::<Vec<_>>(),
                "auto": auto,
                "auto_reason": why,
            })),
            false => print(&devices, &auto, &why),
        }
    }
}

impl Found {
    fn name(&self) -> String {
        self.device.as_ref().map_or(self.listed.name.clone(), |device| device.description())
    }

    fn json(&self) -> serde_json::Value {
        let caps = self.device.as_ref().map(|device| device.caps());
        json!({
            "id": self.listed.id,
            "name": self.name(),
            "kind": self.listed.kind.name(),
            "software": self.listed.software,
            "available": self.device.is_some(),
            "reason": self.listed.reason,
            "simd": caps.filter(|caps| caps.kind == DeviceKind::Cpu).map(|caps| simd(caps.simd)),
            "sm": caps.filter(|caps| caps.sm > 0).map(|caps| caps.sm),
            "shared_bytes": caps.filter(|caps| caps.shared_bytes > 0).map(|caps| caps.shared_bytes),
            "copy_gb_per_s": self.copy,
            "matmul_gflop_per_s": self.matmul,
        })
    }
}

fn print(devices: &[Found], auto: &str, why: &str) -> Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{:<8} {:<8} {:>10} {:>15}  description", "device", "kind", "copy GB/s", "matmul GFLOP/s")?;
    for found in devices {
        let number = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.1}"));
        let text = match &found.listed.reason {
            None => found.name(),
            Some(reason) => format!("not available: {reason}"),
        };
        let (id, kind) = (&found.listed.id, found.listed.kind.name());
        let (copy, matmul) = (number(found.copy), number(found.matmul));
        writeln!(out, "{id:<8} {kind:<8} {copy:>10} {matmul:>15}  {text}")?;
    }
    Ok(writeln!(out, "\n--device auto takes {auto}: {why}")?)
}

fn simd(simd: Simd) -> &'static str {
    match simd {
        Simd::Portable => "portable",
        Simd::Avx2 => "avx2",
        Simd::Avx512 => "avx512",
        Simd::Amx => "amx",
    }
}

/// The least time of one `work`, after one to warm up.
fn best(work: &mut dyn FnMut() -> Result<f64>) -> Result<f64> {
    work()?;
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < LONG_ENOUGH {
        best = best.min(work()?);
    }
    Ok(best)
}

/// Bytes read and written in a second, in 10^9: by the device's own copy, or on the CPU by all threads, as kernels do.
fn copy_bandwidth(device: &dyn Device) -> Result<f64> {
    let seconds = if device.caps().kind == DeviceKind::Cpu {
        let (from, mut to) = (vec![1u8; COPY_BYTES], vec![0u8; COPY_BYTES]);
        let piece = COPY_BYTES.div_ceil(rayon::current_num_threads());
        best(&mut || {
            let start = Instant::now();
            to.par_chunks_mut(piece).zip(from.par_chunks(piece)).for_each(|(to, from)| to.copy_from_slice(from));
            Ok(start.elapsed().as_secs_f64())
        })?
    } else {
        let (from, to) = (device.alloc(COPY_BYTES)?, device.alloc(COPY_BYTES)?);
        best(&mut || Ok(device.time(&mut || device.copy(&from, 0, &to, 0, COPY_BYTES))?))?
    };
    Ok(2.0 * COPY_BYTES as f64 / seconds / 1e9)
}

/// Floating-point operations in a second, in 10^9, of the fastest f32 product; none where no kernel runs.
fn matmul_peak(device: &dyn Device) -> Result<Option<f64>> {
    let Some(op) = OPS.iter().find(|op| op.name == "qmatmul" && op.format == "f32") else { return Ok(None) };
    // Every dim is the edge of the cube but those that say where and what to add: no offset, no bias, no adapter.
    let dims: Vec<usize> =
        op.dims.iter().map(|dim| if ["M", "N", "K", "LDY"].contains(dim) { MATMUL } else { 0 }).collect();
    let dims = op.dims(&dims, &vec![0.0; op.scalars.len()]);
    let Some(kernel) = op.choose(&dims, Dtype::F32, device.caps()) else { return Ok(None) };
    let tensors = handmill::verify::fill(op, &dims, kernel.act, 1);
    let buffers = tensors.iter().map(|tensor| {
        let buffer = device.alloc(tensor.bytes.len())?;
        device.write(&buffer, 0, tensor.bytes.as_slice())?;
        Ok(buffer)
    });
    let buffers = buffers.collect::<Result<Vec<_>>>()?;
    let args: Vec<_> = buffers.iter().collect();
    let seconds = best(&mut || Ok(device.time(&mut || device.launch(op, kernel, &args, &dims))?))?;
    Ok(Some((op.cost)(&dims).flops as f64 / seconds / 1e9))
}
