//! Compiled pipelines between runs, where the driver gives them out: a file in the folder of [`crate::cache`].

use super::device::{Faults, Gpu};
use super::pipelines;
use crate::cache::{self, Cache};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often new pipelines are written at most while a run goes on, so that a run that is killed leaves them too.
const INTERVAL: Duration = Duration::from_secs(10);

/// The driver's cache of pipelines and the file it came from and goes to. Dropping it writes what is new.
pub(super) struct KeptPipelines {
    raw: wgpu::PipelineCache,
    cache: Cache,
    name: String,
    /// What the file holds.
    kept: Option<Vec<u8>>,
    kept_at: Instant,
    /// Pipelines have been compiled since.
    grown: bool,
    faults: Faults,
}

impl KeptPipelines {
    /// The cache of this adapter, filled from the file if there is one; `None` where the driver has no such thing.
    pub(super) fn open(gpu: &Gpu, folder: Option<&PathBuf>) -> Option<Self> {
        if !gpu.device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let adapter = gpu.adapter.get_info();
        let device = wgpu::util::pipeline_cache_key(&adapter)?;
        // The kernels' text as well, so that the file does not grow by those of every version there was.
        let parts = [&device, &adapter.name, &adapter.driver, &adapter.driver_info, &pipelines::all_sources()];
        let name = format!("{}.pipelines", cache::key(&parts.map(|part| part.as_bytes())));
        let cache = folder.map_or_else(Cache::of_user, |folder| Cache::at(folder.clone()));
        let kept = cache.read(&name);
        // Another adapter's pipelines are an error to wgpu.
        let raw = create(gpu, kept.as_deref()).or_else(|| create(gpu, None))?;
        Some(Self { raw, cache, name, kept, kept_at: Instant::now(), grown: false, faults: gpu.faults.clone() })
    }

    /// Bytes that the file held.
    pub(super) fn bytes(&self) -> usize {
        self.kept.as_ref().map_or(0, Vec::len)
    }

    /// The cache for a pipeline to be compiled.
    pub(super) fn grow(&mut self) -> &wgpu::PipelineCache {
        self.grown = true;
        &self.raw
    }

    /// Writes what is new, if the last time was long enough ago.
    pub(super) fn keep_now_and_then(&mut self) {
        if self.grown && self.kept_at.elapsed() >= INTERVAL {
            self.keep();
        }
    }

    fn keep(&mut self) {
        // A device that was lost has no pipelines worth keeping.
        let grown = std::mem::take(&mut self.grown) && self.faults.check().is_ok();
        let data = if grown { self.raw.get_data() } else { None };
        if data.is_some() && data != self.kept {
            self.cache.write(&self.name, data.as_deref().unwrap_or_default());
            self.kept = data;
        }
        self.kept_at = Instant::now();
    }
}

/// A cache that begins with `data`, or empty if that is of no use; `None` if it is refused.
#[allow(unsafe_code)]
fn create(gpu: &Gpu, data: Option<&[u8]>) -> Option<wgpu::PipelineCache> {
    let memory = gpu.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let other = gpu.device.push_error_scope(wgpu::ErrorFilter::Validation);
    let descriptor = wgpu::PipelineCacheDescriptor { label: None, data, fallback: true };
    // SAFETY: the driver trusts these bytes. They are what `keep` got from it and wrote under a name that depends on
    // adapter, driver and version, and a checksum says that they are whole; whoever can write false ones with a true
    // checksum to the user's own folder can run programs as the user anyway. What another device or version wrote, wgpu
    // and the driver tell by their headers.
    let raw = unsafe { gpu.device.create_pipeline_cache(&descriptor) };
    let errors = [pollster::block_on(other.pop()), pollster::block_on(memory.pop())];
    errors.iter().all(Option::is_none).then_some(raw)
}

impl Drop for KeptPipelines {
    fn drop(&mut self) {
        self.keep();
    }
}
