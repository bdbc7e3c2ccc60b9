//! Adapters: which there are, hardware before software, and what is asked of one.

use super::Result;
use crate::device::{Error, Listed};
use crate::op::DeviceKind;
use std::sync::OnceLock;
use wgpu::{Adapter, Backends, DeviceType, ExperimentalFeatures, Features};
use wgpu::{CooperativeMatrixProperties, CooperativeScalarType};

/// How a device is opened. The defaults take all an adapter has; tests and measurements take less.
#[derive(Clone, Debug)]
pub struct Options {
    /// Accesses out of bounds do no harm. Without, shaders run as fast as they can and must be right.
    pub checked: bool,
    /// Kernels may use subgroups, where the adapter has them.
    pub subgroups: bool,
    /// Kernels may use f16, where the adapter has it.
    pub f16: bool,
    /// Time by the device's clock, where it has one.
    pub timestamps: bool,
    /// Bind at most this many bytes to one argument, where the adapter would allow more.
    pub max_binding: Option<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options { checked: true, subgroups: true, f16: true, timestamps: true, max_binding: None }
    }
}

/// What to do where there is no adapter.
const NONE: &str =
    "no adapter found: install a driver for Vulkan, Metal or DirectX 12, or Mesa's software one (Debian: \
                    apt-get install mesa-vulkan-drivers libvulkan1)";

/// The adapters of this machine, or one entry that says why there is none; `wgpu` alone means the first.
pub fn list() -> Vec<Listed> {
    let entry = |id: String, name: String, software: bool, reason: Option<String>| Listed {
        id,
        kind: DeviceKind::Wgpu,
        name,
        software,
        reason,
    };
    let adapters = adapters();
    if adapters.is_empty() {
        return vec![entry("wgpu".into(), String::new(), false, Some(NONE.into()))];
    }
    let one = |(i, adapter): (usize, &Adapter)| entry(format!("wgpu:{i}"), name(adapter), is_software(adapter), None);
    adapters.iter().enumerate().map(one).collect()
}

/// Hardware before software, large before small; found once.
fn adapters() -> &'static [Adapter] {
    static ADAPTERS: OnceLock<Vec<Adapter>> = OnceLock::new();
    ADAPTERS.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = Backends::VULKAN | Backends::METAL | Backends::DX12;
        descriptor.flags = wgpu::InstanceFlags::empty();
        let instance = wgpu::Instance::new(descriptor);
        let mut adapters = pollster::block_on(instance.enumerate_adapters(Backends::all()));
        adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
            DeviceType::DiscreteGpu => 0,
            DeviceType::IntegratedGpu => 1,
            DeviceType::VirtualGpu => 2,
            DeviceType::Other => 3,
            DeviceType::Cpu => 4,
        });
        adapters
    })
}

pub(super) fn is_software(adapter: &Adapter) -> bool {
    adapter.get_info().device_type == DeviceType::Cpu
}

/// `llvmpipe (LLVM 15.0.6, 256 bits), Vulkan, llvmpipe Mesa 22.3.6`
pub(super) fn name(adapter: &Adapter) -> String {
    let info = adapter.get_info();
    let driver = format!("{} {}", info.driver, info.driver_info);
    let mut name = format!("{}, {:?}", info.name, info.backend);
    if !driver.trim().is_empty() {
        name += ", ";
        name += driver.trim();
    }
    name
}

/// Products of 16 x 16 x 16, f16 in and f32 out.
fn has_coopmat(adapter: &Adapter) -> bool {
    let shapes = adapter.cooperative_matrix_properties();
    let suits = |p: &CooperativeMatrixProperties| {
        (p.m_size, p.n_size, p.k_size) == (16, 16, 16)
            && p.ab_type == CooperativeScalarType::F16
            && p.cr_type == CooperativeScalarType::F32
    };
    adapter.features().contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) && shapes.iter().any(suits)
}

/// Adapter number `index` and the device made of it, with every limit the adapter has and the features kernels use.
pub(super) fn open(index: usize, options: &Options) -> Result<(&'static Adapter, wgpu::Device, wgpu::Queue)> {
    let unavailable = |reason: String| Error::Unavailable { device: format!("wgpu:{index}"), reason };
    let adapters = adapters();
    let Some(adapter) = adapters.get(index) else {
        return Err(unavailable(match adapters.len() {
            0 => NONE.into(),
            n => format!("there is no such adapter; the last one is wgpu:{}", n - 1),
        }));
    };
    let coopmat = options.subgroups && options.f16 && has_coopmat(adapter);
    let wanted = [
        (Features::SUBGROUP, options.subgroups),
        (Features::SHADER_F16, options.f16),
        (Features::EXPERIMENTAL_COOPERATIVE_MATRIX, coopmat),
        (Features::TIMESTAMP_QUERY, options.timestamps),
    ];
    let features = wanted.iter().filter(|(_, wanted)| *wanted).fold(Features::empty(), |all, (one, _)| all | *one);
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("handmill"),
        required_features: adapter.features() & features,
        required_limits: adapter.limits(),
        // SAFETY: the one experimental feature asked for is cooperative matrices, whose kernels load and store within
        // workgroup memory by indices that their tiles bound.
        experimental_features: if coopmat { unsafe { ExperimentalFeatures::enabled() } } else { Default::default() },
        ..Default::default()
    };
    let (device, queue) =
        pollster::block_on(adapter.request_device(&descriptor)).map_err(|error| unavailable(error.to_string()))?;
    Ok((adapter, device, queue))
}
