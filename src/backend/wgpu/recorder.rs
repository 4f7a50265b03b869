//! Recording: one encoder and one compute pass collect a step's dispatches and are submitted together.

use super::buffer::{Bind, Buffer, Graveyard};
use super::device::Gpu;
use super::pipelines::{Kernel, Pipelines};
use super::profile::Profile;
use crate::backend::{OpTime, Part};
use crate::error::{Error, Result};
use crate::shapes::{Span, TENSOR_ALIGN};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

/// Bytes of one dispatch's parameters: what a dynamic offset has to be a multiple of.
const PARAMETER_BYTES: usize = 256;
/// Dispatches recorded at most before they are submitted: few, so that the device begins while the rest of a step is
/// recorded, and enough for what a submission takes to be little beside them.
const MAX_DISPATCHES: usize = 64;
/// How long a dispatch, and a submission, may take on a slow adapter, in seconds.
const DISPATCH_SECONDS: f64 = 0.4;
const SUBMISSION_SECONDS: f64 = 4.0;
/// Read-back buffers kept for reuse, and the largest that is.
const POOLED: usize = 16;
const POOLED_BYTES: u64 = 4 << 10;

/// Work that is recorded and not submitted.
struct Recording {
    encoder: wgpu::CommandEncoder,
    pass: Option<wgpu::ComputePass<'static>>,
}

/// Workgroups of a kernel to be run.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    /// The operation it is a part of, and the part of the model that this runs for.
    pub(super) op: &'static str,
    pub(super) part: Part,
    pub(super) kernel: &'a Kernel,
    pub(super) binds: &'a [Bind<'a>],
    /// The kernel's parameters after the first three.
    pub(super) words: &'a [u32],
    pub(super) groups: usize,
    /// The work of one group, roughly.
    pub(super) flops: f64,
}

/// A bind group's key: its layout, and each buffer's id, offset and size.
type GroupKey = (usize, Vec<(u64, u64, u64)>);

/// Whether a read-back has been submitted, and how its mapping went.
#[derive(Default)]
enum ReadState {
    #[default]
    Recorded,
    Submitted(wgpu::SubmissionIndex, Receiver<std::result::Result<(), wgpu::BufferAsyncError>>),
}

/// A read-back on its way: see [`crate::backend::Device::request`].
pub struct Pending {
    staging: wgpu::Buffer,
    len: usize,
    state: Arc<Mutex<ReadState>>,
}

/// Records dispatches and copies, and submits them.
pub(super) struct Recorder {
    parameters: wgpu::Buffer,
    arena: Vec<u8>,
    flops: f64,
    slow_flops: f64,
    recording: Option<Recording>,
    groups: HashMap<GroupKey, wgpu::BindGroup>,
    graveyard: Graveyard,
    reads: Vec<(wgpu::Buffer, Arc<Mutex<ReadState>>)>,
    pool: Vec<wgpu::Buffer>,
    profile: Option<Profile>,
}

impl Recorder {
    pub(super) fn new(gpu: &Gpu, slow_flops: f64, graveyard: Graveyard) -> Self {
        let parameters = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("kernel parameters"),
            size: (MAX_DISPATCHES * PARAMETER_BYTES) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Self {
            parameters,
            arena: Vec::new(),
            flops: 0.0,
            slow_flops,
            recording: None,
            groups: HashMap::new(),
            graveyard,
            reads: Vec::new(),
            pool: Vec::new(),
            profile: None,
        }
    }

    /// Records a kernel's workgroups, in as many dispatches as the grid's size and the work ask for.
    pub(super) fn dispatch(&mut self, gpu: &Gpu, pipelines: &mut Pipelines, work: &Work<'_>) -> Result<()> {
        let Work { op, part, kernel, binds, words, groups, flops } = *work;
        if groups == 0 {
            return Ok(());
        }
        let writes: Vec<bool> = binds.iter().map(|bind| bind.writes).collect();
        let pipeline = pipelines.get(gpu, kernel, &writes)?;
        let key = group_key(gpu, pipeline.layout.id, binds)?;
        if !self.groups.contains_key(&key) {
            let group = bind_group(gpu, &pipeline.layout.bindings, &self.parameters, &key, binds);
            self.groups.insert(key.clone(), group);
        }
        let per_dimension = gpu.limits.max_compute_workgroups_per_dimension as usize;
        let budget = DISPATCH_SECONDS * self.slow_flops;
        let most = ((budget / flops.max(1.0)) as usize).clamp(1, per_dimension * per_dimension);
        for first in (0..groups).step_by(most) {
            let end = groups.min(first + most);
            let width = (end - first).min(per_dimension);
            self.make_room(gpu, (end - first) as f64 * flops)?;
            let offset = self.push_parameters(&[first as u32, end as u32, width as u32], words);
            if let Some(profile) = &mut self.profile {
                let recording = recording(&mut self.recording, gpu);
                // The last one ends before this one begins.
                recording.pass = None;
                recording.pass = Some(profile.pass(&mut recording.encoder, (op, part, kernel.name())));
            }
            let pass = pass(&mut self.recording, gpu);
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &self.groups[&key], &[offset]);
            pass.dispatch_workgroups(width as u32, (end - first).div_ceil(width) as u32, 1);
        }
        Ok(())
    }

    /// Submits what is recorded when one more dispatch of `flops` would be too much.
    fn make_room(&mut self, gpu: &Gpu, flops: f64) -> Result<()> {
        let full =
            self.arena.len() == MAX_DISPATCHES * PARAMETER_BYTES || self.profile.as_ref().is_some_and(Profile::is_full);
        if full || self.flops + flops > SUBMISSION_SECONDS * self.slow_flops {
            self.submit(gpu)?;
        }
        self.flops += flops;
        Ok(())
    }

    /// Appends a dispatch's parameters; returns their dynamic offset.
    fn push_parameters(&mut self, grid: &[u32; 3], words: &[u32]) -> u32 {
        let offset = self.arena.len();
        self.arena.extend_from_slice(bytemuck::cast_slice(grid));
        self.arena.extend_from_slice(bytemuck::cast_slice(words));
        self.arena.resize(offset + PARAMETER_BYTES, 0);
        offset as u32
    }

    /// Records the copy of `span` to memory that the host will read.
    pub(super) fn read_back(&mut self, gpu: &Gpu, buffer: &Buffer, span: Span) -> Result<Pending> {
        buffer.check(span)?;
        let bytes = (span.len.max(1) * 4) as u64;
        let staging = match self.pool.iter().position(|pooled| pooled.size() >= bytes) {
            Some(index) => self.pool.swap_remove(index),
            None => staging_buffer(gpu, bytes.max(64))?,
        };
        let recording = recording(&mut self.recording, gpu);
        recording.pass = None;
        recording.encoder.copy_buffer_to_buffer(buffer.raw(), span.offset as u64 * 4, &staging, 0, span.len as u64 * 4);
        let state = Arc::new(Mutex::new(ReadState::Recorded));
        self.reads.push((staging.clone(), state.clone()));
        Ok(Pending { staging, len: span.len, state })
    }

    /// Waits for a read-back; submits it first when it is only recorded.
    pub(super) fn collect(&mut self, gpu: &Gpu, pending: Pending) -> Result<Vec<f32>> {
        if matches!(*lock(&pending.state), ReadState::Recorded) {
            self.submit(gpu)?;
        }
        let state = std::mem::take(&mut *lock(&pending.state));
        let ReadState::Submitted(index, mapped) = state else {
            return Err(Error::Internal("a read-back was recorded on another device".to_string()));
        };
        wait(gpu, Some(index))?;
        let failed = |what: String| Error::Device(format!("{} could not be read: {what}", gpu.info.name));
        match mapped.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(gpu.faults.check().err().unwrap_or_else(|| failed(error.to_string()))),
            Err(_) => return Err(gpu.faults.check().err().unwrap_or_else(|| failed("the device is gone".to_string()))),
        }
        let bytes = pending.staging.get_mapped_range(..pending.len as u64 * 4).map_err(|e| failed(e.to_string()))?;
        let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        drop(bytes);
        pending.staging.unmap();
        if self.pool.len() < POOLED && pending.staging.size() <= POOLED_BYTES {
            self.pool.push(pending.staging);
        }
        Ok(values)
    }

    /// Submits what is recorded. Writes by the queue after this come after it.
    pub(super) fn submit(&mut self, gpu: &Gpu) -> Result<()> {
        if let Some(Recording { mut encoder, pass }) = self.recording.take() {
            drop(pass);
            if let Some(profile) = &self.profile {
                profile.resolve(&mut encoder);
            }
            if !self.arena.is_empty() {
                gpu.queue.write_buffer(&self.parameters, 0, &self.arena);
            }
            let index = gpu.queue.submit([encoder.finish()]);
            self.arena.clear();
            self.flops = 0.0;
            for (staging, state) in self.reads.drain(..) {
                let (sender, receiver) = channel();
                // The receiver is gone when its read-back was given up: then no one waits for the answer.
                staging.map_async(wgpu::MapMode::Read, .., move |result| drop(sender.send(result)));
                *lock(&state) = ReadState::Submitted(index.clone(), receiver);
            }
            if let Some(profile) = &mut self.profile {
                profile.collect(gpu)?;
            }
        }
        self.bury();
        gpu.faults.check()
    }

    /// Starts to time dispatches; false when the device has no timestamps.
    pub(super) fn profile_start(&mut self, gpu: &Gpu) -> Result<bool> {
        self.submit(gpu)?;
        self.profile = Profile::new(gpu)?;
        Ok(self.profile.is_some())
    }

    /// Waits for all dispatches and returns what they took.
    pub(super) fn profile_finish(&mut self, gpu: &Gpu) -> Result<Vec<OpTime>> {
        self.submit(gpu)?;
        Ok(self.profile.take().map_or_else(Vec::new, Profile::finish))
    }

    /// Forgets the bind groups of buffers that are gone, which keep the memory alive.
    fn bury(&mut self) {
        let dead: Vec<u64> = lock(&self.graveyard).drain(..).collect();
        if !dead.is_empty() {
            self.groups.retain(|(_, parts), _| !parts.iter().any(|(id, _, _)| dead.contains(id)));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Waits for a submission, or for all.
pub(super) fn wait(gpu: &Gpu, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
    let polled = gpu.device.poll(wgpu::PollType::Wait { submission_index, timeout: None });
    if polled.is_err() {
        // That the device was lost is told by a poll that finds its work done, as that of a lost device is.
        let _ = gpu.device.poll(wgpu::PollType::Poll);
    }
    gpu.faults.check()?;
    polled.map(|_| ()).map_err(|error| Error::Device(format!("waiting for {} failed: {error}", gpu.info.name)))
}

fn recording<'a>(slot: &'a mut Option<Recording>, gpu: &Gpu) -> &'a mut Recording {
    slot.get_or_insert_with(|| Recording {
        encoder: gpu.device.create_command_encoder(&Default::default()),
        pass: None,
    })
}

fn pass<'a>(slot: &'a mut Option<Recording>, gpu: &Gpu) -> &'a mut wgpu::ComputePass<'static> {
    let Recording { encoder, pass } = recording(slot, gpu);
    pass.get_or_insert_with(|| encoder.begin_compute_pass(&Default::default()).forget_lifetime())
}

fn staging_buffer(gpu: &Gpu, size: u64) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    super::create_buffer(gpu, "read-back", size, usage)
}

/// The key of a bind group; fails when a part is not where, or larger than what, a binding may be.
fn group_key(gpu: &Gpu, layout: usize, binds: &[Bind<'_>]) -> Result<GroupKey> {
    let parts = binds.iter().map(|Bind { buffer, span, .. }| {
        buffer.check(*span)?;
        if span.offset % TENSOR_ALIGN != 0 {
            return Err(Error::Internal(format!(
                "{span:?} of {} does not start at a binding's boundary",
                buffer.name()
            )));
        }
        // Whole vec4s: buffers are padded to as much.
        let bytes = (span.len.max(1).next_multiple_of(4) * 4) as u64;
        if bytes > gpu.limits.max_storage_buffer_binding_size {
            return Err(Error::Device(format!(
                "{} allows kernels {:.0} MiB at once, but {} needs {:.0} MiB; use a smaller model or batch (-b)",
                gpu.info.describe(),
                gpu.limits.max_storage_buffer_binding_size as f64 / f64::from(1 << 20),
                buffer.name(),
                bytes as f64 / f64::from(1 << 20),
            )));
        }
        Ok((buffer.id(), span.offset as u64 * 4, bytes))
    });
    Ok((layout, parts.collect::<Result<_>>()?))
}

fn bind_group(
    gpu: &Gpu,
    layout: &wgpu::BindGroupLayout,
    parameters: &wgpu::Buffer,
    key: &GroupKey,
    binds: &[Bind<'_>],
) -> wgpu::BindGroup {
    let entry = |binding, buffer, offset, size| wgpu::BindGroupEntry {
        binding,
        resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer,
            offset,
            size: std::num::NonZeroU64::new(size),
        }),
    };
    let mut entries = vec![entry(0, parameters, 0, PARAMETER_BYTES as u64)];
    let storage = (1..).zip(binds).zip(&key.1);
    entries
        .extend(storage.map(|((binding, bind), &(_, offset, size))| entry(binding, bind.buffer.raw(), offset, size)));
    gpu.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
}
