//! Times of kernels on the device, by timestamps: while it runs every dispatch has a compute pass of its own.

use super::device::Gpu;
use super::recorder;
use crate::backend::{OpTime, Part};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Dispatches that can be timed between two submissions: a pair of timestamps each.
const MAX_DISPATCHES: u32 = wgpu::QUERY_SET_MAX_QUERIES / 2;
/// Bytes of the timestamps of one dispatch.
const PAIR_BYTES: u64 = 16;

/// An operation, the part of the model it runs for, and one of its kernels.
type Name = (&'static str, Part, String);

/// What has been timed so far.
pub(super) struct Profile {
    timestamps: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    staging: wgpu::Buffer,
    /// Dispatches that are recorded and not submitted.
    recorded: Vec<Name>,
    /// Dispatches, and seconds of all of them.
    times: BTreeMap<Name, (usize, f64)>,
}

impl Profile {
    /// `None` when the device has no timestamps.
    pub(super) fn new(gpu: &Gpu) -> Result<Option<Self>> {
        if !gpu.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Ok(None);
        }
        let timestamps = gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("timestamps"),
            ty: wgpu::QueryType::Timestamp,
            count: 2 * MAX_DISPATCHES,
        });
        let buffer = |usage| super::create_buffer(gpu, "timestamps", u64::from(MAX_DISPATCHES) * PAIR_BYTES, usage);
        let resolved = buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC)?;
        let staging = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)?;
        Ok(Some(Self { timestamps, resolved, staging, recorded: Vec::new(), times: BTreeMap::new() }))
    }

    /// Whether what is recorded has to be submitted before another dispatch is.
    pub(super) fn is_full(&self) -> bool {
        self.recorded.len() == MAX_DISPATCHES as usize
    }

    /// Begins the pass of a dispatch.
    pub(super) fn pass(&mut self, encoder: &mut wgpu::CommandEncoder, name: Name) -> wgpu::ComputePass<'static> {
        let first = 2 * self.recorded.len() as u32;
        self.recorded.push(name);
        let timestamp_writes = Some(wgpu::ComputePassTimestampWrites {
            query_set: &self.timestamps,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        });
        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes }).forget_lifetime()
    }

    /// Records the copy of the timestamps to memory that the host can read.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        let count = self.recorded.len() as u32;
        if count > 0 {
            encoder.resolve_query_set(&self.timestamps, 0..2 * count, &self.resolved, 0);
            encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.staging, 0, u64::from(count) * PAIR_BYTES);
        }
    }

    /// Waits for what was submitted last, and adds its times up.
    pub(super) fn collect(&mut self, gpu: &Gpu) -> Result<()> {
        if self.recorded.is_empty() {
            return Ok(());
        }
        let range = ..self.recorded.len() as u64 * PAIR_BYTES;
        // Mapping is complete, or a fault is reported, when the wait is over.
        self.staging.map_async(wgpu::MapMode::Read, range, |_| {});
        recorder::wait(gpu, None)?;
        let failed = |what: String| Error::Device(format!("{}'s timestamps could not be read: {what}", gpu.info.name));
        let bytes = self.staging.get_mapped_range(range).map_err(|error| failed(error.to_string()))?;
        let period = f64::from(gpu.queue.get_timestamp_period()) * 1e-9;
        for (name, pair) in self.recorded.drain(..).zip(bytes.chunks_exact(PAIR_BYTES as usize)) {
            let [begin, end]: [u64; 2] = bytemuck::pod_read_unaligned(pair);
            let (count, seconds) = self.times.entry(name).or_default();
            *count += 1;
            *seconds += end.saturating_sub(begin) as f64 * period;
        }
        drop(bytes);
        self.staging.unmap();
        Ok(())
    }

    /// All times.
    pub(super) fn finish(self) -> Vec<OpTime> {
        let time = |((op, part, kernel), (count, seconds))| OpTime { op, part, kernel, count, seconds };
        self.times.into_iter().map(time).collect()
    }
}
