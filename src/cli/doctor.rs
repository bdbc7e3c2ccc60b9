//! `handmill doctor`: what this machine offers, measured.

use std::io::{self, Write};
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use handmill::bench::roofline;
use handmill::device::{self, Device, Listed};
use handmill::op::{DeviceKind, Simd};
use serde_json::json;

use super::{print_json, Common};

/// Show the devices, how fast they copy and multiply, and which one is used
///
/// Copy bandwidth counts bytes read and bytes written, of more than the caches hold. The matmul peak is that of the
/// fastest f32 product, 1024 x 1024 x 1024 or, where that is too little work, 4096 x 4096 x 4096. Both are the best of a
/// third of a second. Software that stands in for a GPU is not timed.
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
                let (copy, matmul) = roofline::peaks(&**device)?;
                (found.copy, found.matmul) = (Some(copy), matmul);
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
