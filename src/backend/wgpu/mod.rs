//! Any vendor's GPU through wgpu: Vulkan, Metal or DirectX 12, kernels in WGSL (`shaders/`), one file per stem.
//!
//! Operations record dispatches into one encoder; a submission happens when something is read, uploaded or waited for, or
//! when much has been recorded. Kernels are templates, compiled when first used. The activations of a kernel are bound by
//! ranges, so that parameters larger than a binding work through it in chunks. Sums run in a fixed order and nothing is
//! added atomically: two runs on one adapter give the same bits.

mod adamw;
mod attention;
mod band;
mod buffer;
mod device;
mod embed;
mod gelu;
mod kept;
mod layernorm;
mod linear;
mod loss;
mod matrix;
mod memory;
mod pipelines;
mod profile;
mod recorder;
mod reduce;
mod tuning;

pub use band::Table;
pub use buffer::Buffer;
pub use device::{AdapterInfo, AdapterKind, Options, adapters};
pub use embed::Tokens;
pub use pipelines::{Element, Kernel, dump_shaders};
pub use recorder::Pending;
pub use tuning::{Tuning, WORKGROUP_SIZES};

use super::{Device, HeadDims, OpTime, Part, Role, SequenceDims, Write};
use crate::error::{Error, Result};
use crate::output;
use crate::shapes::{Span, TENSOR_ALIGN};
use buffer::{Bind, Graveyard};
use device::Gpu;
use kept::KeptPipelines;
use pipelines::Pipelines;
use recorder::{Recorder, Work};
use std::collections::{HashMap, HashSet};
use tuning::TUNINGS;

/// Bytes uploaded or downloaded at a time: wgpu stages as much beside the buffer.
const TRANSFER_BYTES: usize = 32 << 20;

/// The least that [`Options::binding_bytes`] can ask for.
const MIN_BINDING_BYTES: u64 = 1 << 10;

/// A GPU through wgpu as a device.
pub struct Wgpu {
    gpu: Gpu,
    pipelines: Pipelines,
    recorder: Recorder,
    graveyard: Graveyard,
    tuning: Tuning,
    binding_bytes: u64,
    next_id: u64,
    scratch: HashMap<&'static str, Buffer>,
    /// The operation that dispatches belong to, and the part of the model, for their times.
    op: &'static str,
    part: Part,
}

/// Every kernel instantiation that the presets' shapes, and shapes that fit no tile, can lead to on adapters with this much
/// workgroup memory, in bytes; those of [`WORKGROUP_SIZES`] are all there are.
pub fn instantiations(workgroup_bytes: usize) -> Vec<Kernel> {
    let mut all = vec![embed::kernels(), loss::kernels(), adamw::kernels(), reduce::kernels()];
    for tuning in TUNINGS.map(|tuning| tuning.within(workgroup_bytes)) {
        all.extend([
            layernorm::kernels(&tuning),
            linear::kernels(&tuning),
            band::kernels(&tuning),
            attention::kernels(&tuning),
        ]);
    }
    let mut seen = HashSet::new();
    all.into_iter().flatten().filter(|kernel| seen.insert(kernel.clone())).collect()
}

impl Wgpu {
    /// Opens the adapter that `options` ask for.
    ///
    /// # Errors
    /// There is no such adapter, or it cannot run the kernels: a sentence that says what to do.
    pub fn new(options: &Options) -> Result<Self> {
        let gpu = device::open(options)?;
        let graveyard = Graveyard::default();
        let workgroup_bytes = gpu.limits.max_compute_workgroup_storage_size as usize;
        let tuning = options.tuning.unwrap_or(Tuning::suiting(&gpu.info)).within(workgroup_bytes);
        let tuning = tuning.with_memory(memory::own_bytes(&gpu));
        let tuning = tuning.with(options.tuning_changes.as_deref().unwrap_or(""))?;
        let recorder = Recorder::new(&gpu, tuning.slow_flops, graveyard.clone());
        let kept = KeptPipelines::open(&gpu, options.cache_folder.as_ref());
        let pipelines = Pipelines::new(options.checked, kept)?;
        let binding_bytes = options.binding_bytes.unwrap_or(u64::MAX).max(MIN_BINDING_BYTES);
        let scratch = HashMap::new();
        let (op, part) = ("", Part::default());
        Ok(Self { gpu, pipelines, recorder, graveyard, tuning, binding_bytes, next_id: 0, scratch, op, part })
    }

    /// The adapter it runs on.
    pub fn adapter(&self) -> &AdapterInfo {
        &self.gpu.info
    }

    /// Bytes of compiled pipelines that earlier runs had kept; `None` where the driver gives none out.
    pub fn kept_pipeline_bytes(&mut self) -> Option<usize> {
        self.pipelines.kept().map(|kept| kept.bytes())
    }

    /// Elements that a binding may have.
    fn binding_len(&self) -> usize {
        let bytes = self.gpu.limits.max_storage_buffer_binding_size.min(u64::from(u32::MAX)).min(self.binding_bytes);
        bytes as usize / 4 / TENSOR_ALIGN * TENSOR_ALIGN
    }

    /// Records `groups` workgroups; `flops` is the work of one, roughly.
    fn dispatch(
        &mut self,
        kernel: &Kernel,
        binds: &[Bind<'_>],
        words: &[u32],
        groups: usize,
        flops: f64,
    ) -> Result<()> {
        let work = Work { op: self.op, part: self.part, kernel, binds, words, groups, flops };
        self.recorder.dispatch(&self.gpu, &mut self.pipelines, &work)
    }

    fn create(&mut self, name: &str, len: usize) -> Result<Buffer> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let size = (len.max(1).div_ceil(TENSOR_ALIGN) as u64).saturating_mul(4 * TENSOR_ALIGN as u64);
        let raw = create_buffer(&self.gpu, name, size, usage)?;
        self.next_id += 1;
        Ok(Buffer::new(raw, self.next_id, len, name, self.graveyard.clone()))
    }

    /// Memory for what lives during one operation only; operations run one after the other, so all share it by name.
    fn scratch(&mut self, name: &'static str, len: usize) -> Result<Buffer> {
        if let Some(buffer) = self.scratch.get(name).filter(|buffer| buffer.len() >= len) {
            return Ok(buffer.clone());
        }
        // The smaller one goes first, and with it the bind groups that hold it.
        if self.scratch.remove(name).is_some() {
            self.recorder.submit(&self.gpu)?;
        }
        let buffer = self.create(name, len)?;
        self.scratch.insert(name, buffer.clone());
        Ok(buffer)
    }

    /// Writes 32-bit words to a buffer, after all that is recorded.
    fn write_words(&mut self, buffer: &Buffer, offset: usize, words: &[u32]) -> Result<()> {
        buffer.check(Span { offset, len: words.len() })?;
        self.recorder.submit(&self.gpu)?;
        for (index, chunk) in words.chunks(TRANSFER_BYTES / 4).enumerate() {
            let at = (offset + index * TRANSFER_BYTES / 4) as u64 * 4;
            self.gpu.queue.write_buffer(buffer.raw(), at, bytemuck::cast_slice(chunk));
            if chunk.len() * 4 == TRANSFER_BYTES {
                // The staged copy is freed when it has been used.
                let index = self.gpu.queue.submit([]);
                recorder::wait(&self.gpu, Some(index))?;
            }
        }
        self.gpu.faults.check()
    }
}

/// A buffer of `size` bytes, or a sentence.
fn create_buffer(gpu: &Gpu, name: &str, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
    if size > gpu.limits.max_buffer_size {
        return Err(Error::Device(format!(
            "{name} needs {} in one buffer, but {} allows {}; use a smaller model or batch (-b)",
            output::bytes(size as usize),
            gpu.info.describe(),
            output::bytes(gpu.limits.max_buffer_size as usize)
        )));
    }
    if memory::exceeds(gpu, size) {
        return Err(out_of_memory(gpu, name, size));
    }
    let memory = gpu.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let other = gpu.device.push_error_scope(wgpu::ErrorFilter::Validation);
    let label = Some(name);
    let buffer = gpu.device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false });
    let (other, memory) = (pollster::block_on(other.pop()), pollster::block_on(memory.pop()));
    if memory.is_some() {
        return Err(out_of_memory(gpu, name, size));
    }
    match other {
        Some(error) => Err(Error::Device(format!("{} cannot make room for {name}: {error}", gpu.info.name))),
        None => gpu.faults.check().map(|()| buffer),
    }
}

fn out_of_memory(gpu: &Gpu, name: &str, size: u64) -> Error {
    let there = match (memory::free_bytes(gpu), memory::held_bytes(gpu)) {
        (Some(free), _) => format!(" and {} are free", output::bytes(free)),
        (None, Some(held)) => format!(" besides the {} that this run holds already", output::bytes(held)),
        (None, None) => String::new(),
    };
    let needed = output::bytes(size as usize);
    Error::out_of_memory(format!("out of memory on {}: {name} needs {needed}{there}", gpu.info.name))
}

impl Device for Wgpu {
    type Buffer = Buffer;
    type Tokens = Tokens;
    type Pending = Pending;

    fn description(&self) -> String {
        self.gpu.info.describe()
    }

    fn free_bytes(&self) -> Option<usize> {
        memory::free_bytes(&self.gpu)
    }

    fn max_buffer_bytes(&self) -> Option<usize> {
        usize::try_from(self.gpu.limits.max_buffer_size).ok()
    }

    fn element_bytes(&self, _role: Role) -> usize {
        size_of::<f32>()
    }

    fn scratch_bytes(&self, dims: HeadDims, sequence: SequenceDims) -> usize {
        let logits = loss::logits_len(dims, self.logits_limit());
        let delta = sequence.rows() * sequence.heads;
        let shares = self.tuning.most_shares() + reduce::most_parts(4 * dims.channels);
        (logits + delta + shares) * size_of::<f32>()
    }

    fn alloc(&mut self, _role: Role, name: &str, len: usize) -> Result<Buffer> {
        self.create(name, len)
    }

    fn alloc_tokens(&mut self, name: &str, len: usize) -> Result<Tokens> {
        Tokens::new(self, name, len)
    }

    fn upload(&mut self, buffer: &mut Buffer, offset: usize, values: &[f32]) -> Result<()> {
        self.write_words(buffer, offset, bytemuck::cast_slice(values))
    }

    fn upload_tokens(&mut self, buffer: &mut Tokens, tokens: &[u32]) -> Result<()> {
        buffer.upload(self, tokens)
    }

    fn download(&mut self, buffer: &Buffer, span: Span) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(span.len);
        for offset in span.range().step_by(TRANSFER_BYTES / 4) {
            let len = (TRANSFER_BYTES / 4).min(span.range().end - offset);
            let pending = self.request(buffer, Span { offset, len })?;
            values.extend(self.collect(pending)?);
        }
        Ok(values)
    }

    fn request(&mut self, buffer: &Buffer, span: Span) -> Result<Pending> {
        self.recorder.read_back(&self.gpu, buffer, span)
    }

    fn collect(&mut self, pending: Pending) -> Result<Vec<f32>> {
        let values = self.recorder.collect(&self.gpu, pending)?;
        if let Some(kept) = self.pipelines.kept() {
            kept.keep_now_and_then();
        }
        Ok(values)
    }

    fn sync(&mut self) -> Result<()> {
        self.recorder.submit(&self.gpu)?;
        recorder::wait(&self.gpu, None)
    }

    fn profile_start(&mut self) -> Result<bool> {
        self.recorder.profile_start(&self.gpu)
    }

    fn profile_part(&mut self, part: Part) {
        self.part = part;
    }

    fn profile_finish(&mut self) -> Result<Vec<OpTime>> {
        self.recorder.profile_finish(&self.gpu)
    }
}

/// As the last parameter of a kernel that either sets or adds.
fn add_word(write: Write) -> u32 {
    u32::from(write == Write::Add)
}

#[cfg(test)]
#[path = "../../../tests/skip/mod.rs"]
mod skip;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::AdamW;

    fn open() -> Option<Wgpu> {
        if adapters().is_empty() {
            skip::skip("wgpu", "this machine has no adapter for Vulkan, Metal or DirectX 12");
            return None;
        }
        Some(Wgpu::new(&Options::default()).unwrap())
    }

    /// Left to itself, wgpu panics at what nobody has asked about.
    #[test]
    fn an_error_that_nobody_waits_for_becomes_a_sentence() {
        let Some(mut device) = open() else { return };
        let usage = wgpu::BufferUsages::empty();
        let _ = device.gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 16,
            usage,
            mapped_at_creation: false,
        });
        let error = device.sync().unwrap_err();
        assert!(error.to_string().contains(" refused a command: ") && error.exit_code() == 2, "{error}");
    }

    #[test]
    fn a_lost_device_becomes_a_sentence_whatever_is_asked_of_it() {
        let Some(mut device) = open() else { return };
        let mut norm = device.alloc(Role::Statistics, "norm", 1).unwrap();
        let mut values = device.alloc(Role::Gradients, "values", 100).unwrap();
        device.grad_norm(&mut norm, &values).unwrap();
        let pending = device.request(&norm, norm.all()).unwrap();
        device.gpu.device.destroy();
        let errors = [
            device.collect(pending).err(),
            device.sync().err(),
            device.upload(&mut values, 0, &[1.0; 100]).err(),
            device.grad_norm(&mut norm, &values).and_then(|()| device.sync()).err(),
            device.download(&norm, norm.all()).err(),
            device.alloc(Role::Activations, "more", 100).err(),
        ];
        for error in errors.map(Option::unwrap) {
            assert!(error.to_string().starts_with("the device ") && error.exit_code() == 2, "{error}");
            assert!(error.to_string().contains(" was lost "), "{error}");
        }
    }
}
