//! From a kernel's files to a pipeline, and from a compiler's complaint back to the file and line.

use super::fault::{lock, Faults};
use super::{Error, Result};
use crate::op::{File, Kernel, OpSpec, Role, Source};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use wgpu::{BindingType, BufferBindingType, ShaderStages};

/// A kernel ready to run.
#[derive(Clone)]
pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    /// Shared by kernels with as many arguments, read and written alike.
    pub layout: Arc<Layout>,
}

/// The bindings of a kernel: its arguments, then the params.
pub(super) struct Layout {
    /// Number of arguments, and a bit for each that is bound to be written.
    pub key: (usize, u32),
    pub group: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

/// Pipelines made so far.
pub(super) struct Shaders {
    device: wgpu::Device,
    checked: bool,
    pipelines: Mutex<HashMap<(&'static str, u32), Pipeline>>,
    layouts: Mutex<HashMap<(usize, u32), Arc<Layout>>>,
}

/// A bit for each argument that a kernel of `spec` writes.
pub(super) fn written(spec: &OpSpec) -> u32 {
    spec.args.iter().enumerate().filter(|(_, arg)| arg.role != Role::In).fold(0, |bits, (i, _)| bits | 1 << i)
}

impl Shaders {
    pub fn new(device: &wgpu::Device, checked: bool) -> Shaders {
        Shaders { device: device.clone(), checked, pipelines: Mutex::default(), layouts: Mutex::default() }
    }

    /// The pipeline of a kernel; `written` has the bits of [`written`], or more where one buffer is read and written:
    /// those arguments are then declared as written, too.
    pub fn pipeline(
        &self,
        id: &str,
        faults: &Faults,
        kernel: &'static Kernel,
        count: usize,
        written: u32,
    ) -> Result<Pipeline> {
        let mut pipelines = lock(&self.pipelines);
        if let Some(pipeline) = pipelines.get(&(kernel.stem, written)) {
            return Ok(pipeline.clone());
        }
        let invalid = |reason: String| Error::Invalid { what: kernel.stem.into(), reason };
        let Source::Wgsl(files) = kernel.source else { return Err(invalid("not a kernel in WGSL".into())) };
        let (mut text, lines) = join(files).map_err(|error| invalid(error.to_string()))?;
        for i in (0..count).filter(|i| written & (1 << i) != 0) {
            let binding = format!("@binding({i}) var<storage, ");
            text = text.replace(&format!("{binding}read>"), &format!("{binding}read_write>"));
        }

        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(kernel.stem),
            source: wgpu::ShaderSource::Wgsl(text.as_str().into()),
        };
        let mut checks = wgpu::ShaderRuntimeChecks::unchecked();
        checks.bounds_checks = self.checked;
        // SAFETY: every loop of these kernels counts up to a bound it reads once, so none runs for ever and no compiler
        // can be misled by one. Accesses are checked, or the person who opened the device has asked to trust them.
        let module = unsafe { self.device.create_shader_module_trusted(descriptor, checks) };
        if let Err(error) = faults.take(id, kernel.stem) {
            return Err(explain(&module, &lines).map_or(error, invalid));
        }

        let layout = self.layout(count, written);
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.stem),
            layout: Some(&layout.pipeline),
            module: &module,
            entry_point: Some(kernel.stem),
            compilation_options: wgpu::PipelineCompilationOptions {
                // Kernels write every word of workgroup memory before they read it: a rule, and what it saves is large.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        faults.take(id, kernel.stem)?;
        let pipeline = Pipeline { pipeline, layout };
        pipelines.insert((kernel.stem, written), pipeline.clone());
        Ok(pipeline)
    }

    fn layout(&self, count: usize, written: u32) -> Arc<Layout> {
        let key = (count, written);
        let make = || {
            let entry = |binding: usize, ty, dynamic| wgpu::BindGroupLayoutEntry {
                binding: binding as u32,
                visibility: ShaderStages::COMPUTE,
                ty: BindingType::Buffer { ty, has_dynamic_offset: dynamic, min_binding_size: None },
                count: None,
            };
            let storage = |i: usize| BufferBindingType::Storage { read_only: written & (1 << i) == 0 };
            let mut entries: Vec<_> = (0..count).map(|i| entry(i, storage(i), false)).collect();
            entries.push(entry(count, BufferBindingType::Uniform, true));
            let group = self
                .device
                .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
            let pipeline = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&group)],
                immediate_size: 0,
            });
            Arc::new(Layout { key, group, pipeline })
        };
        lock(&self.layouts).entry(key).or_insert_with(make).clone()
    }
}

/// The files' texts one after another, and how many lines each has.
fn join(files: &'static [File]) -> std::io::Result<(String, Vec<(&'static str, usize)>)> {
    let (mut text, mut lines) = (String::new(), Vec::new());
    for file in files {
        let part = file.read()?;
        text += &part;
        if !part.ends_with('\n') {
            text.push('\n');
        }
        lines.push((file.path, part.lines().count()));
    }
    Ok((text, lines))
}

/// The compiler's first error with the file and line it lies in.
fn explain(module: &wgpu::ShaderModule, lines: &[(&'static str, usize)]) -> Option<String> {
    let info = pollster::block_on(module.get_compilation_info());
    let error = info.messages.iter().find(|m| m.message_type == wgpu::CompilationMessageType::Error)?;
    // A report of several lines: what is wrong, `wgsl:line:column`, then that line with arrows under it. Its place is
    // right where `location` is only the first it names.
    let mut report = error.message.lines().map(str::trim);
    let what = report.next()?;
    let what = what.split_once("' parsing error: ").map_or(what, |(_, what)| what);
    let place = report.find_map(|line| line.split_once("wgsl:"));
    let place = place.and_then(|(_, place)| {
        let (line, column) = place.split_once(':')?;
        Some((line.parse().ok()?, column.parse().ok()?))
    });
    let location = error.location.map(|location| (location.line_number as usize, location.line_position as usize));
    let Some((mut line, column)) = place.or(location) else { return Some(what.to_string()) };
    for (path, count) in lines {
        if line <= *count {
            return Some(format!("{path}:{line}:{column}: {what}"));
        }
        line -= count;
    }
    Some(what.to_string())
}
