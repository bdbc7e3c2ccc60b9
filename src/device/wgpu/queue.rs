//! The queue: dispatches and copies gather in one command buffer, sent when someone waits or it is full.
//!
//! Params lie in one uniform buffer, a slot a launch, bound at a dynamic offset. wgpu writes it ahead of the command
//! buffer that is sent next, and after all that were sent before, so one buffer serves for ever.

use super::fault::{lock, Faults};
use super::memory::Memory;
use super::shader::Pipeline;
use super::{Error, Result};
use crate::op::PARAMS_BYTES;
use std::collections::{HashMap, HashSet};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Mutex;
use std::time::Duration;
use wgpu::{BufferUsages, PollType};

/// Params of a command buffer at most.
const SLOTS: usize = 256;
/// Launches after which a command buffer is sent: the device begins while the rest is still being queued.
const LAUNCHES: usize = 64;
/// Bytes written after which the writes are sent and waited for: until then wgpu keeps a copy of them.
const WRITTEN_BYTES: usize = 64 << 20;
/// Bind groups kept at most.
const GROUPS: usize = 8192;
/// Bytes read at once.
const STAGING_BYTES: usize = 16 << 20;
/// How long one wait may take before the device counts as hung.
const PATIENCE: Duration = Duration::from_secs(900);

/// One argument: the memory, where in it and how much.
pub(super) struct Binding<'a> {
    pub memory: &'a Memory,
    pub offset: usize,
    pub bytes: usize,
}

type GroupKey = ((usize, u32), Vec<(u64, usize, usize)>);

/// The queue of a device.
pub(super) struct Queue {
    id: String,
    device: wgpu::Device,
    queue: wgpu::Queue,
    params: wgpu::Buffer,
    /// Bytes from one slot to the next.
    stride: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    encoder: Option<wgpu::CommandEncoder>,
    /// The encoder's open pass.
    pass: Option<wgpu::ComputePass<'static>>,
    launches: usize,
    /// Bytes of writes since the last wait.
    written: usize,
    /// Memory that the command buffer touches.
    used: HashSet<u64>,
    /// Params of the command buffer, and where each lies in the uniform buffer.
    slots: Vec<u8>,
    slot_of: HashMap<[u8; PARAMS_BYTES], u32>,
    groups: HashMap<GroupKey, wgpu::BindGroup>,
    staging: Option<wgpu::Buffer>,
}

impl Queue {
    pub fn new(id: &str, device: &wgpu::Device, queue: wgpu::Queue) -> Queue {
        let stride = PARAMS_BYTES.next_multiple_of(device.limits().min_uniform_buffer_offset_alignment as usize);
        let params = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: (SLOTS * stride) as u64,
            usage: BufferUsages::UNIFORM | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Queue { id: id.into(), device: device.clone(), queue, params, stride, state: Mutex::default() }
    }

    /// Queues one launch.
    pub fn dispatch(
        &self,
        faults: &Faults,
        pipeline: &Pipeline,
        bindings: &[Binding<'_>],
        params: [u8; PARAMS_BYTES],
        grid: [u32; 3],
        dead: &[u64],
    ) -> Result<()> {
        let state = &mut *lock(&self.state);
        let full = state.launches >= LAUNCHES || state.slots.len() == SLOTS * self.stride;
        if full {
            self.flush_locked(state, faults)?;
        }
        let group = self.group(state, pipeline, bindings, dead);
        let slot = state.slot(params, self.stride);
        state.used.extend(bindings.iter().map(|binding| binding.memory.id));
        let pass = self.pass(state);
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &group, &[slot]);
        pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        state.launches += 1;
        Ok(())
    }

    fn group(&self, state: &mut State, pipeline: &Pipeline, bindings: &[Binding<'_>], dead: &[u64]) -> wgpu::BindGroup {
        if !dead.is_empty() {
            let dead: HashSet<_> = dead.iter().collect();
            state.groups.retain(|(_, bindings), _| bindings.iter().all(|(id, _, _)| !dead.contains(id)));
        }
        let key = (pipeline.layout.key, bindings.iter().map(|b| (b.memory.id, b.offset, b.bytes)).collect());
        if let Some(group) = state.groups.get(&key) {
            return group.clone();
        }
        let part = |buffer, offset: usize, bytes: usize| {
            wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer,
                offset: offset as u64,
                size: wgpu::BufferSize::new(bytes as u64),
            })
        };
        let mut resources: Vec<_> = bindings.iter().map(|b| part(&b.memory.buffer, b.offset, b.bytes)).collect();
        resources.push(part(&self.params, 0, PARAMS_BYTES));
        let entries = resources.into_iter().enumerate();
        let entries: Vec<_> =
            entries.map(|(i, resource)| wgpu::BindGroupEntry { binding: i as u32, resource }).collect();
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.layout.group,
            entries: &entries,
        });
        if state.groups.len() >= GROUPS {
            state.groups.clear();
        }
        state.groups.insert(key, group.clone());
        group
    }

    /// Copies bytes into memory after all that is queued; `offset` and the length are multiples of 4.
    pub fn write(&self, faults: &Faults, target: &Memory, offset: usize, source: &[u8]) -> Result<()> {
        let state = &mut *lock(&self.state);
        // wgpu writes ahead of the next command buffer: one that uses the memory must be sent before.
        if state.used.contains(&target.id) {
            self.flush_locked(state, faults)?;
        }
        for (i, part) in source.chunks(WRITTEN_BYTES).enumerate() {
            self.queue.write_buffer(&target.buffer, (offset + i * WRITTEN_BYTES) as u64, part);
            state.written += part.len();
            if state.written >= WRITTEN_BYTES {
                self.flush_locked(state, faults)?;
                self.wait(state, faults)?;
            }
        }
        faults.take(&self.id, "write")
    }

    /// The same without a wait: what is queued is sent first, so that the device works while wgpu takes its copy of the
    /// bytes, all of them. The device's queue is one, so they reach the memory after that work.
    pub fn write_ahead(&self, faults: &Faults, target: &Memory, offset: usize, source: &[u8]) -> Result<()> {
        let state = &mut *lock(&self.state);
        self.flush_locked(state, faults)?;
        self.queue.write_buffer(&target.buffer, offset as u64, source);
        // The next of the other writes waits for these too.
        state.written += source.len();
        faults.take(&self.id, "write")
    }

    /// Queues a copy; offsets and size are multiples of 4.
    pub fn copy(&self, from: &Memory, from_offset: usize, to: &Memory, to_offset: usize, bytes: usize) {
        let state = &mut *lock(&self.state);
        state.used.extend([from.id, to.id]);
        let encoder = self.encoder(state);
        encoder.copy_buffer_to_buffer(
            &from.buffer,
            from_offset as u64,
            &to.buffer,
            to_offset as u64,
            Some(bytes as u64),
        );
    }

    /// Waits for all that is queued and copies bytes out; `offset` and the length are multiples of 4.
    pub fn read(&self, faults: &Faults, source: &Memory, offset: usize, target: &mut [u8]) -> Result<()> {
        let state = &mut *lock(&self.state);
        for (i, target) in target.chunks_mut(STAGING_BYTES).enumerate() {
            let staging = self.staging(state, target.len());
            let (offset, bytes) = ((offset + i * STAGING_BYTES) as u64, Some(target.len() as u64));
            self.encoder(state).copy_buffer_to_buffer(&source.buffer, offset, &staging, 0, bytes);
            self.flush_locked(state, faults)?;
            let slice = staging.slice(..target.len() as u64);
            slice.map_async(wgpu::MapMode::Read, |_| {}); // a failure shows below
            self.wait(state, faults)?;
            match slice.get_mapped_range() {
                Ok(mapped) => target.copy_from_slice(&mapped),
                Err(error) => return Err(Error::Invalid { what: "read".into(), reason: error.to_string() }),
            }
            staging.unmap();
        }
        Ok(())
    }

    /// A buffer to read through, of `bytes` bytes at least.
    fn staging(&self, state: &mut State, bytes: usize) -> wgpu::Buffer {
        if let Some(staging) = state.staging.as_ref().filter(|staging| staging.size() >= bytes as u64) {
            return staging.clone();
        }
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("staging"),
            size: bytes.next_power_of_two().max(4096) as u64,
            usage: BufferUsages::MAP_READ | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        state.staging.insert(staging).clone()
    }

    /// Sends what is queued and waits for it.
    pub fn sync(&self, faults: &Faults) -> Result<()> {
        let state = &mut *lock(&self.state);
        self.flush_locked(state, faults)?;
        self.wait(state, faults)
    }

    /// Nanoseconds, by the device's clock, from before the first to after the last of what `work` queues.
    pub fn time(
        &self,
        faults: &Faults,
        stamps: &wgpu::QuerySet,
        target: &Memory,
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<f64> {
        self.sync(faults)?;
        self.stamp(stamps, 0);
        work()?;
        self.stamp(stamps, 1);
        {
            let state = &mut *lock(&self.state);
            let resolved = self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("stamps"),
                size: 16,
                usage: BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            let encoder = self.encoder(state);
            encoder.resolve_query_set(stamps, 0..2, &resolved, 0);
            encoder.copy_buffer_to_buffer(&resolved, 0, &target.buffer, 0, Some(16));
        }
        let mut ticks = [0u64; 2];
        self.read(faults, target, 0, bytemuck::cast_slice_mut(&mut ticks))?;
        Ok(ticks[1].wrapping_sub(ticks[0]) as f64 * self.queue.get_timestamp_period() as f64)
    }

    /// Queues the taking of a time, after what is queued so far and before what follows.
    fn stamp(&self, stamps: &wgpu::QuerySet, index: u32) {
        let state = &mut *lock(&self.state);
        let pass = self.encoder(state).begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("stamp"),
            timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                query_set: stamps,
                beginning_of_pass_write_index: (index == 0).then_some(0),
                end_of_pass_write_index: (index == 1).then_some(1),
            }),
        });
        drop(pass);
    }

    /// The encoder, outside a pass.
    fn encoder<'a>(&self, state: &'a mut State) -> &'a mut wgpu::CommandEncoder {
        state.pass = None;
        state.encoder.get_or_insert_with(|| self.device.create_command_encoder(&Default::default()))
    }

    /// The encoder's pass.
    fn pass<'a>(&self, state: &'a mut State) -> &'a mut wgpu::ComputePass<'static> {
        if state.pass.is_none() {
            let pass = self.encoder(state).begin_compute_pass(&Default::default()).forget_lifetime();
            state.pass = Some(pass);
        }
        state.pass.as_mut().expect("made above")
    }

    /// Sends what is queued.
    fn flush_locked(&self, state: &mut State, faults: &Faults) -> Result<()> {
        state.pass = None;
        let commands = state.encoder.take().map(wgpu::CommandEncoder::finish);
        if !state.slots.is_empty() {
            self.queue.write_buffer(&self.params, 0, &state.slots);
        }
        self.queue.submit(commands);
        state.launches = 0;
        state.used.clear();
        state.slots.clear();
        state.slot_of.clear();
        faults.take(&self.id, &self.id)
    }

    /// Waits for everything sent.
    fn wait(&self, state: &mut State, faults: &Faults) -> Result<()> {
        let poll = || self.device.poll(PollType::Wait { submission_index: None, timeout: Some(PATIENCE) });
        // wgpu panics where the device is lost meanwhile; the callback has told why.
        let done = catch_unwind(AssertUnwindSafe(poll));
        faults.take(&self.id, &self.id)?;
        state.written = 0;
        let reason = match done {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(wgpu::PollError::Timeout)) => {
                format!("no answer in {} s: the driver hangs, or the work is too much for it", PATIENCE.as_secs())
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the device was lost while it worked: its driver reset it; start again, with less work".into(),
        };
        Err(Error::Unavailable { device: self.id.clone(), reason })
    }
}

impl State {
    /// Offset of the slot that holds `params`.
    fn slot(&mut self, params: [u8; PARAMS_BYTES], stride: usize) -> u32 {
        let State { slots, slot_of, .. } = self;
        *slot_of.entry(params).or_insert_with(|| {
            let offset = slots.len();
            slots.resize(offset + stride, 0);
            slots[offset..offset + PARAMS_BYTES].copy_from_slice(&params);
            offset as u32
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::device::{wgpu::Wgpu, Device};

    #[test]
    fn a_lost_device_is_an_error_not_a_panic() {
        let device = match Wgpu::open("wgpu") {
            Ok(device) => device,
            Err(reason) if std::env::var_os("HANDMILL_REQUIRE_WGPU").is_some() => panic!("{reason}"),
            Err(reason) => return eprintln!("not tested: {reason}"),
        };
        let add = crate::ops::find("add", "f32");
        let [a, y] = [64, 64].map(|bytes| device.alloc(bytes).unwrap());
        let launch = || crate::device::run(&device, add, &[&a, &a, &y], &add.dims(&[1, 16], &[]));
        launch().unwrap();
        // As a driver's reset would, with work queued.
        device.queue.device.destroy();
        let errors = [
            device.sync().err(),
            launch().and_then(|()| device.sync()).err(),
            device.read(&y, 0, &mut [0; 64]).err(),
            device.write(&y, 0, &[0; 64]).err(),
            device.copy(&a, 0, &y, 0, 64).and_then(|()| device.sync()).err(),
            device.alloc(1 << 20).err(),
            device.time(&mut || launch()).err(),
        ];
        for (i, error) in errors.iter().enumerate() {
            let error = error.as_ref().unwrap_or_else(|| panic!("call {i} went well")).to_string();
            assert!(error.contains("the device was lost") && error.lines().count() == 1, "{error}");
        }
    }
}
