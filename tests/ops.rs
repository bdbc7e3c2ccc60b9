//! Devices × ops × kernels × cases: every kernel of the table against its oracle, one test each.
//!
//! The devices are those that need no hardware; `HANDMILL_TEST_DEVICE=cuda` runs the same tests on that device instead.

use handmill::device::{self, cpu::Cpu, wgpu, Device};
use handmill::op::{Case, DeviceKind, Kernel, OpSpec, Simd};
use handmill::tensor::Dtype;
use handmill::{ops::OPS, verify};
use libtest_mimic::{Arguments, Failed, Trial};
use std::sync::Arc;

const SEED: u64 = 1;

fn main() {
    let ids = match std::env::var("HANDMILL_TEST_DEVICE") {
        Ok(id) => vec![id],
        Err(_) => {
            let adapters =
                wgpu::list().into_iter().filter(|adapter| adapter.reason.is_none()).map(|adapter| adapter.id);
            ["cpu".to_string(), "ptx-sim".to_string()].into_iter().chain(adapters).collect()
        }
    };
    let open = |id: &String| device::open(id).unwrap_or_else(|error| panic!("{error}"));
    let devices: Vec<Arc<dyn Device>> = ids.iter().map(open).collect();
    let mut trials = Vec::new();
    for device in &devices {
        for spec in OPS {
            for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source)) {
                for (i, case) in spec.cases.iter().enumerate() {
                    if !(kernel.supports)(&spec.case_dims(case), device.caps()) {
                        continue;
                    }
                    let device = device.clone();
                    let name = format!("{}::{}::{i}", device.id(), kernel.stem);
                    trials.push(Trial::test(name, move || check(&*device, spec, kernel, case)));
                }
            }
        }
    }
    trials.extend(OPS.iter().map(|spec| Trial::test(format!("table::{}", spec.id()), || table(spec))));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn check(device: &dyn Device, spec: &'static OpSpec, kernel: &'static Kernel, case: &Case) -> Result<(), Failed> {
    let dims = spec.case_dims(case);
    let outcome = verify::check(device, spec, kernel, &dims, SEED)?;
    match outcome.failure {
        None => Ok(()),
        Some(reason) => Err(format!("{} on {} ({dims}: {}): {reason}", kernel.stem, device.id(), case.why).into()),
    }
}

/// What must hold of an entry of the table itself.
fn table(spec: &'static OpSpec) -> Result<(), Failed> {
    let mut faults = Vec::new();
    if spec.dims.len() + spec.scalars.len() > 16 {
        faults.push("more than 16 params".to_string());
    }
    for kernel in spec.kernels() {
        if !kernel.stem.starts_with(&format!("{}_", spec.id())) {
            faults.push(format!("{} does not begin with {}_", kernel.stem, spec.id()));
        }
    }
    // What each CPU rung supports, seen from processors of every width.
    for simd in [Simd::Portable, Simd::Avx2, Simd::Avx512] {
        let mut caps = Cpu::new().caps().clone();
        caps.simd = simd;
        for case in spec.cases {
            let dims = spec.case_dims(case);
            if spec.choose(&dims, Dtype::F32, &caps).is_none() {
                faults.push(format!("no kernel for {dims} on a CPU with {simd:?}"));
            }
        }
        for kernel in spec.kernels().filter(|k| DeviceKind::Cpu.runs(&k.source)) {
            let used = |case: &Case| (kernel.supports)(&spec.case_dims(case), &caps);
            if simd == Simd::Avx512 && !spec.cases.iter().any(used) {
                faults.push(format!("no case for {}", kernel.stem));
            }
        }
    }
    if spec.cases.len() < 4 {
        faults.push("fewer than four cases".to_string());
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("; ").into())
    }
}
