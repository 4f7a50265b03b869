//! NVIDIA's cards: kernels in CUDA C++ (`kernels/`), one file per stem, dense products by cuBLASLt.
//!
//! Nothing of CUDA is needed to build; libraries are found at run time and kernels compiled when first used. Operations record
//! work that is submitted when something is read, uploaded or waited for; a recording that comes again is replayed as a CUDA
//! graph, so the scalars that change from step to step live in device memory. Sums run in a fixed order and nothing is added
//! atomically: two runs on one card give the same bits.

mod adamw;
mod attention;
mod attention_hopper;
mod band;
mod band_hopper;
mod blas;
mod buffer;
mod compiler;
mod driver;
mod embed;
mod gelu;
mod layernorm;
mod libraries;
mod linear;
mod loss;
mod outer;
mod product;
mod reduce;
mod report;
mod tape;

pub use adamw::Plan;
pub use band::Table;
pub use buffer::{Buffer, Element};
pub use compiler::nvrtc_version;
pub use driver::{Card, card};
pub use embed::Tokens;
pub use libraries::{Library, ensure, loaded_from};
pub use report::{KernelUse, kernel_uses};

use super::{Arithmetic, Device, HeadDims, OpTime, Part, Role, SequenceDims, Write};
use crate::error::{Error, Result};
use crate::shapes::Span;
use blas::Blas;
use buffer::Memory;
use compiler::{Kernels, Unit};
use driver::{Driver, Event, Graveyard, Pinned, TensorMap};
use std::collections::HashMap;
use tape::{Tape, Work};

/// Whether a card and all libraries are here: what `--backend auto` asks.
pub fn is_usable() -> bool {
    card().is_ok() && Library::ALL.into_iter().all(|library| libraries::ensure(library).is_ok())
}

/// How to open the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What to compute in.
    pub arithmetic: Arithmetic,
    /// Bytes of logits that exist at one time, about: rows go through the head in chunks by it.
    pub logit_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { arithmetic: Arithmetic::Bf16, logit_bytes: 400 << 20 }
    }
}

/// An NVIDIA card as a device.
pub struct Cuda {
    arithmetic: Arithmetic,
    logit_bytes: usize,
    tape: Tape,
    kernels: Kernels,
    blas: Blas,
    scratch: HashMap<&'static str, Buffer>,
    pinned: Vec<Slot>,
    band_cuts: band::Cuts,
    constants: Buffer,
    constants_recorded: bool,
    graveyard: Graveyard,
    // After everything that holds device memory, and the last to be dropped.
    driver: Driver,
}

/// Host memory for copies, free once the card has passed the event.
struct Slot {
    pinned: Pinned,
    event: Event,
}

/// A read-back that was asked for.
pub struct Pending {
    slot: Slot,
    len: usize,
    element: Element,
}

/// Host slots that are kept for the next copies.
const KEPT_SLOTS: usize = 8;

/// An argument of a kernel: at most 8 bytes, of which the driver reads the lower ones.
struct Arg(u64);

macro_rules! arg_from {
    ($($type:ty: $value:ident => $bits:expr;)*) => {$(
        impl From<$type> for Arg {
            fn from($value: $type) -> Self {
                Arg($bits)
            }
        }
    )*};
}

arg_from! {
    u64: pointer => pointer;
    usize: count => count as u64;
    f32: number => u64::from(number.to_bits());
    bool: flag => u64::from(flag);
    Write: write => u64::from(write == Write::Add);
}

/// Arguments of a kernel, in order: pointers as `u64`, sizes (`int` or `long long` there), `f32`, flags.
macro_rules! args {
    ($($value:expr),* $(,)?) => { vec![$(crate::backend::cuda::Arg::from($value).0),*] };
}
use args;

impl Cuda {
    /// Opens the first card.
    ///
    /// # Errors
    /// A library, a driver or a card is missing or does not fit: a sentence that says what to do.
    pub fn new(options: Options) -> Result<Self> {
        let driver = Driver::open()?;
        let Options { arithmetic, logit_bytes } = options;
        let kernels = Kernels::new(driver.card.architecture)?;
        let band_cuts = band::Cuts::of(arithmetic);
        let graveyard = Graveyard::default();
        let buffer = |name, bytes: usize| -> Result<Buffer> {
            let memory = Memory::new(driver.alloc(name, bytes)?, graveyard.clone());
            Ok(Buffer::new(memory, Element::F32, bytes / 4, name))
        };
        let workspace = buffer("the workspace of products", blas::WORKSPACE_BYTES)?;
        let constants = buffer("the optimizer's constants", size_of::<super::AdamWConstants>())?;
        let blas = Blas::new(&driver, arithmetic, workspace.f32s(0)?)?;
        Ok(Self {
            arithmetic,
            logit_bytes,
            tape: Tape::new(),
            kernels,
            blas,
            scratch: HashMap::from([("workspace of products", workspace)]),
            pinned: Vec::new(),
            band_cuts,
            constants,
            constants_recorded: false,
            graveyard,
            driver,
        })
    }

    /// The card.
    pub fn card(&self) -> &Card {
        &self.driver.card
    }

    /// What activations are stored in.
    fn element(&self) -> Element {
        Element::of(self.arithmetic)
    }

    /// A unit of `kernels/STEM.cu` for this arithmetic; `aligned` says that rows start at 16-byte boundaries.
    fn unit(&self, stem: &'static str, aligned: bool) -> Unit {
        unit(stem, self.arithmetic, aligned)
    }

    /// Records the kernel `entry` of `unit` for the operation `op`.
    #[allow(clippy::too_many_arguments)]
    fn launch(
        &mut self,
        op: &'static str,
        unit: &Unit,
        entry: &'static str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        args: Vec<u64>,
    ) {
        self.launch_with_maps(op, unit, entry, grid, block, shared, Vec::new(), args);
    }

    /// The same for a kernel whose first arguments are maps for the copy engine.
    #[allow(clippy::too_many_arguments)]
    fn launch_with_maps(
        &mut self,
        op: &'static str,
        unit: &Unit,
        entry: &'static str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        maps: Vec<TensorMap>,
        args: Vec<u64>,
    ) {
        if grid.contains(&0) {
            return;
        }
        let kernel = self.kernels.get(unit, entry, shared);
        let grid = grid.map(|blocks| blocks as u32);
        self.tape.push(Work::Launch { kernel, op, grid, block: block as u32, shared: shared as u32, maps, args });
    }

    /// Gives all recorded work to the card.
    fn submit(&mut self) -> Result<()> {
        self.constants_recorded = false;
        self.tape.submit(&self.driver, &mut self.kernels, &mut self.blas)?;
        self.graveyard.clear();
        Ok(())
    }

    fn create(&mut self, element: Element, name: &str, len: usize) -> Result<Buffer> {
        let bytes = len.checked_mul(element.bytes()).filter(|&bytes| bytes < isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| Error::Device(format!("{name} needs more memory than any card has")))?;
        // What is free again but not yet freed would count as taken.
        self.submit()?;
        let memory = Memory::new(self.driver.alloc(name, bytes)?, self.graveyard.clone());
        Ok(Buffer::new(memory, element, len, name))
    }

    /// Memory for what lives during one operation only; operations run one after the other, so all share it by name.
    fn scratch(&mut self, name: &'static str, element: Element, len: usize) -> Result<u64> {
        let fits = |buffer: &&Buffer| buffer.element() == element && buffer.len() >= len;
        if let Some(buffer) = self.scratch.get(name).filter(fits) {
            return buffer.part(element, Span { offset: 0, len });
        }
        // The smaller one goes first.
        self.scratch.remove(name);
        let buffer = self.create(element, name, len)?;
        let at = buffer.part(element, Span { offset: 0, len });
        self.scratch.insert(name, buffer);
        at
    }

    /// The first `len` elements of an activation.
    fn activation(&self, buffer: &Buffer, len: usize) -> Result<u64> {
        buffer.part(self.element(), Span { offset: 0, len })
    }

    /// Parameters as operands of products: themselves, or their bf16 copy, which is made when it is first asked for.
    fn operand(&mut self, params: &Buffer, span: Span) -> Result<u64> {
        if self.element() == Element::F32 {
            return params.part(Element::F32, span);
        }
        let copy = match params.copy() {
            Some(copy) => copy,
            None => {
                let copy = self.create(Element::Bf16, "the bf16 copy of the parameters", params.len())?;
                params.set_copy(copy.clone());
                self.round_params(params, Span { offset: 0, len: params.len() })?;
                copy
            }
        };
        copy.part(Element::Bf16, span)
    }

    /// Host memory of at least `bytes` that the card is not at work on.
    fn slot(&mut self, bytes: usize) -> Result<Slot> {
        match self.pinned.iter().position(|slot| slot.pinned.bytes() >= bytes) {
            Some(index) => {
                let slot = self.pinned.remove(index);
                slot.event.wait()?;
                Ok(slot)
            }
            None => Ok(Slot { pinned: Pinned::new(bytes)?, event: Event::new(false)? }),
        }
    }

    /// Copies words to the device behind all recorded work, without waiting for it.
    fn copy_words(&mut self, to: u64, words: &[u32]) -> Result<()> {
        self.submit()?;
        self.copy_constants(to, words)
    }

    /// Copies words to the device behind all submitted work: what is recorded will find them.
    fn copy_constants(&mut self, to: u64, words: &[u32]) -> Result<()> {
        let mut slot = self.slot(4 * words.len())?;
        slot.pinned.words_mut(words.len()).copy_from_slice(words);
        self.driver.copy_in(to, slot.pinned.words(words.len()))?;
        slot.event.record(&self.driver)?;
        self.keep(slot);
        Ok(())
    }

    /// Keeps a slot for later; the one used longest ago comes first.
    fn keep(&mut self, slot: Slot) {
        if self.pinned.len() < KEPT_SLOTS {
            self.pinned.push(slot);
        }
    }
}

/// A unit of `kernels/STEM.cu`.
fn unit(stem: &'static str, arithmetic: Arithmetic, aligned: bool) -> Unit {
    let precision: usize = match arithmetic {
        Arithmetic::Fp32 => 32,
        Arithmetic::Tf32 => 19,
        Arithmetic::Bf16 => 16,
    };
    Unit::new(stem, &[("PRECISION", precision.into()), ("ALIGNED", aligned.into())])
}

/// What 32-bit words of a buffer mean as f32.
fn decode(words: &[u32], element: Element, len: usize) -> Vec<f32> {
    match element {
        Element::F32 => words[..len].iter().map(|&word| f32::from_bits(word)).collect(),
        Element::Bf16 => {
            let halves: &[half::bf16] = bytemuck::cast_slice(words);
            halves[..len].iter().map(|half| half.to_f32()).collect()
        }
    }
}

impl Device for Cuda {
    type Buffer = Buffer;
    type Tokens = Tokens;
    type Pending = Pending;

    fn description(&self) -> String {
        let Card { name, architecture, memory, driver, .. } = self.card();
        let target = self.kernels.target();
        let translated =
            if target.native { String::new() } else { format!(", kernels for compute_{}", target.architecture) };
        format!(
            "{name} (sm_{architecture}, {:.1} GiB, CUDA {}.{}{translated})",
            *memory as f64 / f64::from(1 << 30),
            driver.0,
            driver.1
        )
    }

    fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    fn free_bytes(&self) -> Option<usize> {
        self.driver.free_bytes()
    }

    fn element_bytes(&self, role: Role) -> usize {
        match role {
            // The master weights and their copy.
            Role::Parameters if self.element() == Element::Bf16 => 4 + 2,
            Role::Activations => self.element().bytes(),
            _ => 4,
        }
    }

    fn scratch_bytes(&self, dims: HeadDims, sequence: SequenceDims) -> usize {
        let logits = self.chunk_rows(dims, self.element()) * dims.padded_vocab * self.element().bytes();
        let delta = 4 * sequence.rows() * sequence.heads;
        let pieces = band::most_piece_bytes(self.arithmetic, self.card().multiprocessors);
        logits + delta + pieces + reduce::most_part_bytes(4 * dims.channels)
    }

    fn alloc(&mut self, role: Role, name: &str, len: usize) -> Result<Buffer> {
        let element = if role == Role::Activations { self.element() } else { Element::F32 };
        self.create(element, name, len)
    }

    fn alloc_tokens(&mut self, name: &str, len: usize) -> Result<Tokens> {
        Tokens::new(self, name, len)
    }

    fn upload(&mut self, buffer: &mut Buffer, offset: usize, values: &[f32]) -> Result<()> {
        let span = Span { offset, len: values.len() };
        let to = buffer.part(buffer.element(), span)?;
        self.submit()?;
        match buffer.element() {
            Element::F32 => self.driver.copy_in(to, values)?,
            Element::Bf16 => {
                let rounded: Vec<half::bf16> = values.iter().map(|&value| half::bf16::from_f32(value)).collect();
                self.driver.copy_in(to, &rounded)?;
            }
        }
        // The source may be gone or other before a copy that the driver has not staged.
        self.driver.sync()?;
        if buffer.copy().is_some() { self.round_params(buffer, span) } else { Ok(()) }
    }

    fn upload_tokens(&mut self, buffer: &mut Tokens, tokens: &[u32]) -> Result<()> {
        buffer.upload(self, tokens)
    }

    fn download(&mut self, buffer: &Buffer, span: Span) -> Result<Vec<f32>> {
        let from = buffer.part(buffer.element(), span)?;
        self.submit()?;
        match buffer.element() {
            Element::F32 => {
                let mut values = vec![0.0f32; span.len];
                self.driver.copy_out(&mut values, from)?;
                Ok(values)
            }
            Element::Bf16 => {
                let mut values = vec![half::bf16::ZERO; span.len];
                self.driver.copy_out(&mut values, from)?;
                Ok(values.into_iter().map(half::bf16::to_f32).collect())
            }
        }
    }

    fn request(&mut self, buffer: &Buffer, span: Span) -> Result<Pending> {
        let element = buffer.element();
        let from = buffer.part(element, span)?;
        self.submit()?;
        let words = (span.len * element.bytes()).div_ceil(4);
        let mut slot = self.slot(4 * words)?;
        self.driver.copy_out_later(slot.pinned.words_mut(words), from, span.len * element.bytes())?;
        slot.event.record(&self.driver)?;
        Ok(Pending { slot, len: span.len, element })
    }

    fn collect(&mut self, pending: Pending) -> Result<Vec<f32>> {
        let Pending { slot, len, element } = pending;
        slot.event.wait()?;
        let values = decode(slot.pinned.words((len * element.bytes()).div_ceil(4)), element, len);
        self.keep(slot);
        Ok(values)
    }

    fn sync(&mut self) -> Result<()> {
        self.submit()?;
        self.driver.sync()
    }

    fn profile_start(&mut self) -> Result<bool> {
        self.sync()?;
        self.tape.start_profile();
        Ok(true)
    }

    fn profile_part(&mut self, part: Part) {
        self.tape.set_part(part);
    }

    fn profile_finish(&mut self) -> Result<Vec<OpTime>> {
        self.sync()?;
        self.tape.finish_profile(&self.kernels, &self.blas)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What reads or writes memory ends before the memory goes.
        let _ = self.driver.sync();
        self.graveyard.close();
    }
}
