//! The card: opening it, its facts, its one stream, its memory, and its errors as sentences.

use super::libraries::{self, Library};
use crate::error::{Error, Result};
use crate::output;
use cudarc::driver::{DriverError, result, sys};
use std::ffi::c_void;
use std::sync::{Arc, Mutex};
use sys::CUdevice_attribute as Attribute;

/// The oldest driver with all that is called here: CUDA 12.0.
const OLDEST_DRIVER: i32 = 12_000;
/// The oldest architecture that the kernels compile for: they copy asynchronously and multiply bf16 (Ampere).
const OLDEST_ARCHITECTURE: u32 = 80;

/// What is known of a card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Its architecture: 89 is sm_89.
    pub architecture: u32,
    /// Bytes of its memory.
    pub memory: usize,
    /// Its multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_memory: usize,
    /// The CUDA version its driver speaks: (13, 0).
    pub driver: (u32, u32),
}

/// The first card, open.
pub(super) struct Driver {
    pub(super) card: Card,
    stream: sys::CUstream,
}

/// Memory that no one holds any more, to be freed when nothing recorded can need it.
#[derive(Clone, Default)]
pub(super) struct Graveyard(Arc<Mutex<Graves>>);

#[derive(Default)]
struct Graves {
    dead: Vec<sys::CUdeviceptr>,
    /// The backend is gone: nothing is recorded any more.
    closed: bool,
}

impl Graveyard {
    fn graves(&self) -> std::sync::MutexGuard<'_, Graves> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes memory whose last holder is gone.
    pub(super) fn bury(&self, memory: sys::CUdeviceptr) {
        let mut graves = self.graves();
        if graves.closed { free(memory) } else { graves.dead.push(memory) }
    }

    /// Frees what has come so far: all recorded work has been submitted.
    pub(super) fn clear(&self) {
        self.graves().dead.drain(..).for_each(free);
    }

    /// Frees everything, also what comes later.
    pub(super) fn close(&self) {
        self.clear();
        self.graves().closed = true;
    }
}

/// Gives device memory back. The driver waits for submitted work that still uses it.
#[allow(unsafe_code)]
fn free(memory: sys::CUdeviceptr) {
    // SAFETY: it came from `Driver::alloc`, and its last holder is gone.
    let _ = unsafe { result::free_sync(memory) };
}

/// What the copy engine is told of a matrix in device memory (`CUtensorMap`).
#[repr(C, align(64))]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TensorMap([u64; 16]);

/// A failure of the driver as an error.
pub(super) fn fault(doing: &str) -> impl FnOnce(DriverError) -> Error + '_ {
    move |error| {
        let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
        let name = error.error_name().ok().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let advice = "run 'bandtrain parity --backend cuda' to see whether the card computes correctly";
        Error::Device(format!("the CUDA driver failed while {doing}: {text} ({name}); {advice}"))
    }
}

/// The first card without opening it.
///
/// # Errors
/// There is no driver, it is too old, or there is no card.
pub fn card() -> Result<Card> {
    find().map(|(card, _)| card)
}

#[allow(unsafe_code)]
fn find() -> Result<(Card, sys::CUdevice)> {
    libraries::ensure(Library::Driver)?;
    let no_card = || {
        Error::Device(
            "the cuda backend finds no NVIDIA card (is it visible to this user or container, and CUDA_VISIBLE_DEVICES \
             unset?); use --backend wgpu or cpu"
                .to_string(),
        )
    };
    result::init().map_err(|_| no_card())?;
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(fault("asking for its version"))?;
    if version < OLDEST_DRIVER {
        return Err(Error::Device(format!(
            "NVIDIA's driver speaks CUDA {}.{}, and the cuda backend needs 12.0 or newer; update the driver, or use \
             --backend wgpu or cpu",
            version / 1000,
            version % 1000 / 10
        )));
    }
    if result::device::get_count().map_err(fault("counting cards"))? == 0 {
        return Err(no_card());
    }
    let device = result::device::get(0).map_err(fault("opening the card"))?;
    let attribute = |which| {
        // SAFETY: `device` is a device of the driver.
        let value = unsafe { result::device::get_attribute(device, which) };
        value.map(|value| value as u32).map_err(fault("asking for the card's attributes"))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let card = Card {
        name: result::device::get_name(device).map_err(fault("asking for the card's name"))?,
        architecture: 10 * major + minor,
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.map_err(fault("asking for the card's memory"))?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        driver: (version as u32 / 1000, version as u32 % 1000 / 10),
    };
    if card.architecture < OLDEST_ARCHITECTURE {
        return Err(Error::Device(format!(
            "{} has the architecture sm_{}, and the cuda backend needs sm_{OLDEST_ARCHITECTURE} (Ampere) or newer; use \
             --backend wgpu",
            card.name, card.architecture
        )));
    }
    Ok((card, device))
}

#[allow(unsafe_code)]
impl Driver {
    /// Opens the first card.
    ///
    /// # Errors
    /// As [`card`]; the card refuses.
    pub(super) fn open() -> Result<Self> {
        let (card, device) = find()?;
        let doing = "opening the card";
        // SAFETY: `device` is the driver's; its primary context is shared and stays as long as the program runs.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(fault(doing))?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(fault(doing))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(fault(doing))?;
        Ok(Self { card, stream })
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Bytes of memory that are free.
    pub(super) fn free_bytes(&self) -> Option<usize> {
        result::mem_get_info().ok().map(|(free, _)| free)
    }

    /// Device memory of `bytes` zeros for `name`.
    ///
    /// # Errors
    /// There is not so much, with the advice to take less.
    pub(super) fn alloc(&self, name: &str, bytes: usize) -> Result<sys::CUdeviceptr> {
        let failed = |error: DriverError| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::out_of_memory(format!(
                "out of memory on {}: {name} needs {} and {} are free",
                self.card.name,
                output::bytes(bytes),
                output::bytes(self.free_bytes().unwrap_or(0))
            )),
            _ => fault("taking memory")(error),
        };
        // SAFETY: the size is not 0, and the memory is given to the caller.
        let memory = unsafe { result::malloc_sync(bytes.max(16)) }.map_err(failed)?;
        self.zero(memory, bytes)?;
        Ok(memory)
    }

    /// Sets `bytes` at `memory` to zero, in the stream's order.
    pub(super) fn zero(&self, memory: sys::CUdeviceptr, bytes: usize) -> Result<()> {
        // SAFETY: callers pass memory of at least this size.
        unsafe { result::memset_d8_async(memory, 0, bytes, self.stream) }.map_err(fault("clearing memory"))
    }

    pub(super) fn free(&self, memory: sys::CUdeviceptr) {
        free(memory);
    }

    /// Copies host memory to the device in the stream's order; returns when the host memory may change again.
    pub(super) fn copy_in<T>(&self, to: sys::CUdeviceptr, from: &[T]) -> Result<()> {
        // SAFETY: callers have checked that the device memory is large enough. From pageable memory the driver returns once
        // it has staged the source.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.map_err(fault("copying to the card"))
    }

    /// Waits for the stream and copies device memory to the host.
    pub(super) fn copy_out<T>(&self, to: &mut [T], from: sys::CUdeviceptr) -> Result<()> {
        self.sync()?;
        // SAFETY: callers have checked that the device memory is large enough.
        unsafe { result::memcpy_dtoh_sync(to, from) }.map_err(fault("copying from the card"))
    }

    /// Copies `bytes` from the device to pinned host memory in the stream's order, without waiting.
    pub(super) fn copy_out_later(&self, to: &mut [u32], from: sys::CUdeviceptr, bytes: usize) -> Result<()> {
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        // SAFETY: the host memory is pinned and kept until an event behind this copy has been passed.
        unsafe { result::memcpy_dtoh_async(&mut to[..bytes], from, self.stream) }
            .map_err(fault("copying from the card"))
    }

    /// A map of bf16 [rows, columns] at `address`, for copies of boxes of [rows, 64 columns] to tiles in shared memory whose
    /// rows of 128 bytes have their 16-byte chunks permuted; what lies outside the matrix is copied as zeros.
    pub(super) fn tensor_map(&self, address: u64, size: [usize; 2], box_size: [usize; 2]) -> Result<TensorMap> {
        use sys::{
            CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
            CUtensorMapSwizzle,
        };
        let mut map = TensorMap([0; 16]);
        let sizes = [size[1] as u64, size[0] as u64];
        let (pitch, boxes, steps) = ([2 * sizes[0]], [box_size[1] as u32, box_size[0] as u32], [1u32; 2]);
        // SAFETY: the map is as large and as aligned as the driver's; the arrays have as many numbers as two dimensions need.
        // Callers pass memory that holds the matrix.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                std::ptr::from_mut(&mut map).cast(),
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                pitch.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(fault("describing a matrix to the copy engine"))?;
        Ok(map)
    }

    /// Waits until all that was submitted is done.
    pub(super) fn sync(&self) -> Result<()> {
        // SAFETY: the stream is ours.
        unsafe { result::stream::synchronize(self.stream) }.map_err(fault("computing"))
    }
}

#[allow(unsafe_code)]
impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: nothing else uses the stream; pending work ends first.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// A point in the stream's work.
pub(super) struct Event(sys::CUevent);

#[allow(unsafe_code)]
impl Event {
    /// An event that is timed, or one that can only be waited for (cheaper).
    pub(super) fn new(timed: bool) -> Result<Self> {
        use sys::CUevent_flags::{CU_EVENT_DEFAULT, CU_EVENT_DISABLE_TIMING};
        let flags = if timed { CU_EVENT_DEFAULT } else { CU_EVENT_DISABLE_TIMING };
        result::event::create(flags).map(Self).map_err(fault("making an event"))
    }

    /// Marks the point that the stream has come to.
    pub(super) fn record(&self, driver: &Driver) -> Result<()> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.0, driver.stream) }.map_err(fault("recording an event"))
    }

    /// Waits until the stream is past it.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.0) }.map_err(fault("computing"))
    }

    /// Seconds from this event to a later one; both have been passed.
    pub(super) fn seconds_until(&self, later: &Event) -> Result<f64> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let mut milliseconds = 0.0f32;
        // SAFETY: every driver has the function under this name and with this type (cudarc's own binding is to a newer one
        // that drivers of CUDA 12 lack); the events live.
        unsafe {
            let elapsed = sys::culib()
                .get::<Elapsed>(b"cuEventElapsedTime\0")
                .map_err(|error| Error::Device(format!("the CUDA driver cannot time its work: {error}")))?;
            elapsed(&mut milliseconds, self.0, later.0).result().map_err(fault("timing"))?;
        }
        Ok(f64::from(milliseconds) / 1e3)
    }
}

#[allow(unsafe_code)]
impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is not used again.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Host memory that the card reads and writes by itself.
pub(super) struct Pinned {
    at: *mut c_void,
    bytes: usize,
}

#[allow(unsafe_code)]
impl Pinned {
    pub(super) fn new(bytes: usize) -> Result<Self> {
        // SAFETY: the memory is freed when this is dropped.
        let at = unsafe { result::malloc_host(bytes.max(16), 0) }.map_err(fault("taking host memory"))?;
        // SAFETY: it was just allocated with this size.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Self { at, bytes })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its first `len` words. The caller makes sure that the card is not at work on them.
    pub(super) fn words(&self, len: usize) -> &[u32] {
        assert!(4 * len <= self.bytes, "a part of pinned memory that does not exist");
        // SAFETY: aligned (the driver's allocations are by pages), large enough, initialized.
        unsafe { std::slice::from_raw_parts(self.at.cast::<u32>(), len) }
    }

    pub(super) fn words_mut(&mut self, len: usize) -> &mut [u32] {
        assert!(4 * len <= self.bytes, "a part of pinned memory that does not exist");
        // SAFETY: as in `words`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast::<u32>(), len) }
    }
}

#[allow(unsafe_code)]
impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it came from `malloc_host`.
        let _ = unsafe { result::free_host(self.at) };
    }
}
