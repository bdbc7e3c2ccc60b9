//! Devices × ops × kernels × cases: every kernel of the table against its oracle, one test each.
//!
//! The devices are those that need no hardware; `HANDMILL_TEST_DEVICE=cuda` runs the same tests on that device instead.

use handmill::device::{self, cpu::Cpu, wgpu, Device, Listed};
use handmill::op::{Case, DeviceKind, Kernel, OpSpec, Simd};
use handmill::tensor::Dtype;
use handmill::{ops::OPS, verify};
use libtest_mimic::{Arguments, Failed, Trial};
use std::sync::Arc;

#[path = "support/dirty.rs"]
mod dirty;
use dirty::{Dirty, WORDS};

const SEED: u64 = 1;

/// A device under a name of its own.
type Named = (String, Arc<dyn Device>);

fn main() {
    let named = |id: &str| (id.to_string(), device::open(id).unwrap_or_else(|error| panic!("{error}")));
    let only = std::env::var("HANDMILL_TEST_DEVICE");
    let mut devices: Vec<Named> = match &only {
        Ok(id) => vec![named(id)],
        Err(_) => vec![named("cpu"), named("ptx-sim")],
    };
    let mut trials = Vec::new();
    match adapters() {
        _ if only.is_ok() => {}
        Ok(adapters) => {
            for adapter in adapters {
                let (named, trial) = on_adapter(&adapter);
                devices.extend(named);
                trials.push(trial);
            }
        }
        Err(reason) if std::env::var_os("HANDMILL_REQUIRE_WGPU").is_some() => {
            trials.push(Trial::test("wgpu::adapter", move || Err(reason.into())));
        }
        Err(reason) => eprintln!("the kernels in WGSL are not tested: {reason}"),
    }
    for (label, device) in &devices {
        for spec in OPS {
            for kernel in spec.kernels().filter(|k| device.caps().kind.runs(&k.source)) {
                for (i, case) in spec.cases.iter().enumerate() {
                    if !(kernel.supports)(&spec.case_dims(case), device.caps()) {
                        continue;
                    }
                    let device = device.clone();
                    let name = format!("{label}::{}::{i}", kernel.stem);
                    trials.push(Trial::test(name, move || check(&*device, spec, kernel, case)));
                }
            }
        }
    }
    trials.extend(OPS.iter().map(|spec| Trial::test(format!("table::{}", spec.id()), || table(spec))));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// The adapters of this machine, or what to do where there is none.
fn adapters() -> Result<Vec<Listed>, String> {
    let adapters = wgpu::list();
    match adapters.iter().find_map(|adapter| adapter.reason.clone()) {
        Some(reason) => Err(reason),
        None => Ok(adapters),
    }
}

/// An adapter as three devices: all it has, with every launch finding NaN in workgroup memory; without subgroups, f16
/// and a clock, and with small bindings, as the least of phones; and unchecked, as for speed. And a test that the first
/// of them is what it says.
fn on_adapter(adapter: &Listed) -> (Vec<Named>, Trial) {
    let index = adapter.id.rsplit(':').next().and_then(|index| index.parse().ok()).expect("wgpu:N");
    let open = |options: &wgpu::Options| wgpu::Wgpu::with(index, options).expect("an adapter that is listed opens");
    let defaults = wgpu::Options::default();
    let least = wgpu::Options {
        subgroups: false,
        f16: false,
        timestamps: false,
        max_binding: Some(4 << 20),
        ..defaults.clone()
    };
    let dirty = Arc::new(Dirty::new(open(&defaults)));
    let devices: Vec<Named> = vec![
        (adapter.id.clone(), dirty.clone()),
        (format!("{}:least", adapter.id), Arc::new(open(&least))),
        (format!("{}:unchecked", adapter.id), Arc::new(open(&wgpu::Options { checked: false, ..defaults }))),
    ];
    let software = adapter.software;
    let trial = Trial::test(format!("{}::dirty", adapter.id), move || match dirty.found() {
        // A driver may clear the memory; a software one that did would leave the rule unchecked.
        found if software && found < WORDS => Err(format!("{found} of {WORDS} words are soiled").into()),
        _ => Ok(()),
    });
    (devices, trial)
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
    for simd in [Simd::Portable, Simd::Avx2, Simd::Avx512, Simd::Amx] {
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
            if simd == Simd::Amx && !spec.cases.iter().any(used) {
                faults.push(format!("no case for {}", kernel.stem));
            }
        }
    }
    // The least adapter that WebGPU allows runs every op that is there in WGSL.
    let mut caps = Cpu::new().caps().clone();
    (caps.kind, caps.shared_bytes) = (DeviceKind::Wgpu, 16 << 10);
    let in_wgsl = spec.kernels().any(|k| DeviceKind::Wgpu.runs(&k.source));
    for case in spec.cases.iter().filter(|_| in_wgsl) {
        let dims = spec.case_dims(case);
        if spec.choose(&dims, Dtype::F32, &caps).is_none() {
            faults.push(format!("no kernel for {dims} on an adapter without features"));
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
