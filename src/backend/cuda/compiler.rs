//! Kernels: CUDA C++ in `kernels/`, compiled by NVRTC when first needed, kept on disk, loaded into the driver.
//!
//! A *unit* is one file at one set of definitions. Compiling starts when a kernel of a unit is first recorded, on a thread of
//! its own, and is waited for when the recorded work is submitted: the units of a first step compile side by side.

use super::driver::fault;
use super::libraries::{self, Library};
use crate::cache::{self, Cache};
use crate::error::{Error, Result};
use cudarc::driver::{result as driver_result, sys as driver_sys};
use cudarc::nvrtc::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::sync::mpsc::{Receiver, channel};

/// Every kernel file, by stem.
const SOURCES: [(&str, &str); 17] = [
    ("adamw", include_str!("../../../kernels/adamw.cu")),
    ("attention", include_str!("../../../kernels/attention.cu")),
    ("attention_hopper", include_str!("../../../kernels/attention_hopper.cu")),
    ("band", include_str!("../../../kernels/band.cu")),
    ("band_hopper", include_str!("../../../kernels/band_hopper.cu")),
    ("common", include_str!("../../../kernels/common.cuh")),
    ("embed", include_str!("../../../kernels/embed.cu")),
    ("gelu", include_str!("../../../kernels/gelu.cu")),
    ("hopper", include_str!("../../../kernels/hopper.cuh")),
    ("layernorm", include_str!("../../../kernels/layernorm.cu")),
    ("linear", include_str!("../../../kernels/linear.cu")),
    ("loss", include_str!("../../../kernels/loss.cu")),
    ("matrix", include_str!("../../../kernels/matrix.cuh")),
    ("panels", include_str!("../../../kernels/panels.cuh")),
    ("reduce", include_str!("../../../kernels/reduce.cu")),
    ("ring", include_str!("../../../kernels/ring.cuh")),
    ("stages", include_str!("../../../kernels/stages.cuh")),
];

/// The files whose text stands before that of another, in this order.
fn headers(stem: &str) -> &'static [&'static str] {
    match stem {
        "attention" => &["common", "matrix"],
        "attention_hopper" => &["common", "matrix", "hopper"],
        "band" => &["common", "matrix", "panels", "stages"],
        "band_hopper" => &["common", "matrix", "hopper", "panels", "ring"],
        _ => &["common"],
    }
}

/// The architecture to compile for instead of the card's own: 89 compiles for compute_89 and lets the driver translate.
const ARCHITECTURE_VARIABLE: &str = "BANDTRAIN_CUDA_ARCH";

/// The one architecture with `wgmma`.
const HOPPER: u32 = 90;

/// Shared memory that a block has without asking.
const PLAIN_SHARED_MEMORY: u32 = 48 << 10;

/// What a definition stands for in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    /// A number.
    Int(i64),
    /// A word, the name of a type.
    Word(&'static str),
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Value::Int(value as i64)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Int(i64::from(value))
    }
}

impl From<&'static str> for Value {
    fn from(value: &'static str) -> Self {
        Value::Word(value)
    }
}

/// A kernel file at one set of definitions.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit {
    stem: &'static str,
    definitions: Vec<(&'static str, Value)>,
}

impl Unit {
    /// `kernels/STEM.cu` with `definitions`.
    pub(super) fn new(stem: &'static str, definitions: &[(&'static str, Value)]) -> Self {
        Self { stem, definitions: definitions.to_vec() }
    }

    /// The same with more definitions.
    pub(super) fn with(mut self, definitions: &[(&'static str, Value)]) -> Self {
        self.definitions.extend_from_slice(definitions);
        self
    }

    /// Stem and definitions.
    pub fn name(&self) -> String {
        let definitions = self.definitions.iter().map(|(name, value)| match value {
            Value::Int(value) => format!(" {name}={value}"),
            Value::Word(word) => format!(" {name}={word}"),
        });
        format!("{}{}", self.stem, definitions.collect::<String>())
    }

    /// The whole text that is compiled.
    fn source(&self) -> String {
        let text = |stem| SOURCES.iter().find(|(name, _)| *name == stem).map_or("", |(_, text)| text);
        let headers: String = headers(self.stem).iter().map(|&stem| format!("{}\n", text(stem))).collect();
        format!("{headers}#line 1 \"{}.cu\"\n{}", self.stem, text(self.stem))
    }

    fn options(&self, target: &Target) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={}", target.name()),
            "--std=c++17".to_string(),
            "--device-as-default-execution-space".to_string(),
            "--ptxas-options=-v".to_string(),
        ];
        options.extend(self.definitions.iter().map(|(name, value)| match value {
            Value::Int(value) => format!("-D{name}={value}"),
            Value::Word(word) => format!("-D{name}={word}"),
        }));
        options
    }
}

/// What to compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Target {
    /// 89 is sm_89.
    pub architecture: u32,
    /// Machine code for that architecture; else intermediate code that the driver translates for the card it has.
    pub native: bool,
}

impl Target {
    /// For a card: its own architecture, what the user asks for, or the newest before it that this NVRTC knows.
    pub(super) fn of_card(architecture: u32) -> Result<Self> {
        let known = architectures()?;
        let asked = match std::env::var(ARCHITECTURE_VARIABLE) {
            Err(_) => architecture,
            Ok(text) => match text.parse() {
                Ok(asked) if known.contains(&asked) && (80..=architecture).contains(&asked) => asked,
                _ => {
                    let fitting: Vec<String> =
                        known.iter().filter(|a| (80..=architecture).contains(*a)).map(u32::to_string).collect();
                    return Err(Error::usage(format!(
                        "{ARCHITECTURE_VARIABLE} is '{text}', but this card and NVRTC can be given {}",
                        fitting.join(", ")
                    )));
                }
            },
        };
        let target = known.into_iter().filter(|&known| known <= asked).max().ok_or_else(|| {
            Error::Device(format!(
                "the installed NVRTC compiles for no architecture up to this card's sm_{architecture}; install a newer one"
            ))
        })?;
        Ok(Self { architecture: target, native: target == architecture })
    }

    /// Whether kernels may multiply by warpgroups (`wgmma`): machine code for Hopper.
    pub(super) fn has_warpgroup_products(self) -> bool {
        self.native && self.architecture == HOPPER
    }

    fn name(self) -> String {
        // What only Hopper has is compiled for under this name.
        let suffix = if self.has_warpgroup_products() { "a" } else { "" };
        format!("{}_{}{suffix}", if self.native { "sm" } else { "compute" }, self.architecture)
    }
}

/// What the compiler says a kernel takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelReport {
    /// The kernel.
    pub entry: String,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of shared memory that a block has besides what it is launched with.
    pub shared_memory: usize,
    /// Bytes of a thread's stack, of spill stores and of spill loads.
    pub spills: [usize; 3],
    /// The compiler makes each of its products by warpgroups wait for the one before.
    pub serialized: bool,
}

/// NVRTC's version, loading it if need be.
///
/// # Errors
/// It is not found.
#[allow(unsafe_code)]
pub fn nvrtc_version() -> Result<(i32, i32)> {
    libraries::ensure(Library::Nvrtc)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are to live integers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(nvrtc_fault)?;
    Ok((major, minor))
}

/// The architectures this NVRTC knows.
#[allow(unsafe_code)]
fn architectures() -> Result<Vec<u32>> {
    libraries::ensure(Library::Nvrtc)?;
    let mut count = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(nvrtc_fault)?;
    let mut known = vec![0; count as usize];
    // SAFETY: room for as many integers as NVRTC has just counted.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(nvrtc_fault)?;
    Ok(known.into_iter().map(|architecture: i32| architecture as u32).collect())
}

fn nvrtc_fault(error: result::NvrtcError) -> Error {
    Error::Device(format!("NVRTC failed: {:?}; install another version of it", error.0))
}

/// Compiles a unit; returns the code and the compiler's report on each kernel.
///
/// # Errors
/// NVRTC is missing, or refuses the source: a fault of ours, with the compiler's first words.
#[allow(unsafe_code)]
pub fn compile(unit: &Unit, target: Target) -> Result<(Vec<u8>, Vec<KernelReport>)> {
    libraries::ensure(Library::Nvrtc)?;
    let text = |text: String| CString::new(text).map_err(|_| Error::Internal("a kernel's source holds a NUL".into()));
    let (source, name) = (text(unit.source())?, text(format!("{}.cu", unit.stem))?);
    let program = result::create_program(&source, Some(&name)).map_err(nvrtc_fault)?;
    // SAFETY: the program lives until it is destroyed below, after its last use.
    let (compiled, log) = unsafe { (result::compile_program(program, &unit.options(&target)), program_log(program)) };
    let code = match compiled {
        // SAFETY: as above.
        Ok(()) => unsafe { program_code(program, target.native) },
        Err(_) => {
            let first: Vec<&str> = log.lines().filter(|line| line.contains("error")).take(3).collect();
            Err(Error::Internal(format!("NVRTC refuses {} for {}: {}", unit.name(), target.name(), first.join(" "))))
        }
    };
    // SAFETY: the program is not used again.
    unsafe { result::destroy_program(program) }.map_err(nvrtc_fault)?;
    Ok((code?, reports(&log)))
}

/// # Safety
/// The program has not been destroyed.
#[allow(unsafe_code)]
unsafe fn program_log(program: sys::nvrtcProgram) -> String {
    // SAFETY: the caller's promise.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    log.iter().map(|&byte: &c_char| byte as u8 as char).take_while(|&byte| byte != '\0').collect()
}

/// # Safety
/// The program has been compiled and not been destroyed.
#[allow(unsafe_code)]
unsafe fn program_code(program: sys::nvrtcProgram, native: bool) -> Result<Vec<u8>> {
    let mut size = 0;
    // SAFETY: the caller's promise; the buffer is as large as NVRTC says.
    unsafe {
        if !native {
            let text = result::get_ptx(program).map_err(nvrtc_fault)?;
            return Ok(text.into_iter().map(|byte: c_char| byte as u8).collect());
        }
        sys::nvrtcGetCUBINSize(program, &mut size).result().map_err(nvrtc_fault)?;
        let mut code = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result().map_err(nvrtc_fault)?;
        Ok(code)
    }
}

/// Reads ptxas' words: "Compiling entry function 'NAME'", "N bytes stack frame, ...", "Used N registers, ... N bytes smem".
fn reports(log: &str) -> Vec<KernelReport> {
    let before = |line: &str, words: &str| -> usize {
        let number = line.split(words).next().and_then(|text| text.split([' ', ',']).rfind(|part| !part.is_empty()));
        line.contains(words).then(|| number.and_then(|number| number.parse().ok())).flatten().unwrap_or(0)
    };
    // Said before the kernel's own lines: "... wgmma.mma_async instructions are serialized due to ... in the function 'NAME'".
    let serialized = |entry: &str| {
        let suffix = format!("'{entry}'");
        log.lines().any(|line| line.contains("are serialized") && line.trim_end().ends_with(&suffix))
    };
    let mut reports: Vec<KernelReport> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let entry = rest.split('\'').next().unwrap_or_default().to_string();
            let serialized = serialized(&entry);
            reports.push(KernelReport { entry, registers: 0, shared_memory: 0, spills: [0; 3], serialized });
        }
        let Some(report) = reports.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            report.spills =
                ["bytes stack frame", "bytes spill stores", "bytes spill loads"].map(|what| before(line, what));
        }
        if line.contains("Used ") && line.contains(" registers") {
            report.registers = before(line, "registers");
            report.shared_memory = before(line, "bytes smem");
        }
    }
    reports
}

/// The code of a unit, from the disk or compiled (and then kept).
fn code_of(unit: &Unit, target: Target, version: (i32, i32)) -> Result<Vec<u8>> {
    let name = format!("{}-{}.kernel", unit.stem, cache_key(unit, target, version));
    let cache = Cache::of_user();
    if let Some(code) = cache.read(&name) {
        return Ok(code);
    }
    let (code, _) = compile(unit, target)?;
    cache.write(&name, &code);
    Ok(code)
}

fn cache_key(unit: &Unit, target: Target, version: (i32, i32)) -> String {
    let options = unit.options(&target).join(" ");
    cache::key(&[unit.source().as_bytes(), options.as_bytes(), format!("NVRTC {version:?}").as_bytes()])
}

/// A kernel that has been asked for: its place in [`Kernels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct KernelId(usize);

/// Code on its way, or a module of the driver's.
enum Module {
    Compiling(Receiver<Result<Vec<u8>>>),
    Loaded(driver_sys::CUmodule),
}

struct Entry {
    unit: usize,
    name: &'static str,
    shared: u32,
    function: Option<driver_sys::CUfunction>,
}

/// Every kernel asked for so far.
pub(super) struct Kernels {
    target: Target,
    version: (i32, i32),
    units: HashMap<Unit, usize>,
    modules: Vec<Module>,
    ids: HashMap<(usize, &'static str), KernelId>,
    entries: Vec<Entry>,
}

impl Kernels {
    pub(super) fn new(architecture: u32) -> Result<Self> {
        let (target, version) = (Target::of_card(architecture)?, nvrtc_version()?);
        let (units, ids) = (HashMap::new(), HashMap::new());
        Ok(Self { target, version, units, modules: Vec::new(), ids, entries: Vec::new() })
    }

    pub(super) fn target(&self) -> Target {
        self.target
    }

    /// The kernel `entry` of a unit, whose compilation starts if it is new. `shared` is the dynamic shared memory that it is going to be
    /// launched with.
    pub(super) fn get(&mut self, unit: &Unit, entry: &'static str, shared: usize) -> KernelId {
        let unit = match self.units.get(unit) {
            Some(&unit) => unit,
            None => self.start(unit),
        };
        let entries = &mut self.entries;
        let id = *self.ids.entry((unit, entry)).or_insert_with(|| {
            entries.push(Entry { unit, name: entry, shared: shared as u32, function: None });
            KernelId(entries.len() - 1)
        });
        // One that was found with less is found again.
        let known = &mut entries[id.0];
        if shared as u32 > known.shared {
            (known.shared, known.function) = (shared as u32, None);
        }
        id
    }

    fn start(&mut self, unit: &Unit) -> usize {
        let (sender, receiver) = channel();
        let (job, target, version) = (unit.clone(), self.target, self.version);
        // The receiver is gone when the backend is: then no one wants the code.
        std::thread::spawn(move || drop(sender.send(code_of(&job, target, version))));
        self.modules.push(Module::Compiling(receiver));
        self.units.insert(unit.clone(), self.modules.len() - 1);
        self.modules.len() - 1
    }

    /// The kernel's name.
    pub(super) fn name(&self, id: KernelId) -> &'static str {
        self.entries[id.0].name
    }

    /// The driver's handle of a kernel; waits for its code.
    ///
    /// # Errors
    /// It does not compile or load.
    #[allow(unsafe_code)]
    pub(super) fn function(&mut self, id: KernelId) -> Result<driver_sys::CUfunction> {
        let Entry { unit, name, shared, function } = self.entries[id.0];
        if let Some(function) = function {
            return Ok(function);
        }
        let module = self.module(unit)?;
        let text = CString::new(name).map_err(|_| Error::Internal("a kernel's name holds a NUL".into()))?;
        // SAFETY: the module stays loaded as long as the program runs.
        let function =
            unsafe { driver_result::module::get_function(module, text) }.map_err(fault("finding a kernel"))?;
        if shared > PLAIN_SHARED_MEMORY {
            use driver_sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
            // SAFETY: the function was just found.
            let set = unsafe { driver_result::function::set_function_attribute(function, MOST, shared as i32) };
            set.map_err(fault("giving a kernel its shared memory"))?;
        }
        self.entries[id.0].function = Some(function);
        Ok(function)
    }

    #[allow(unsafe_code)]
    fn module(&mut self, unit: usize) -> Result<driver_sys::CUmodule> {
        let code = match &self.modules[unit] {
            Module::Loaded(module) => return Ok(*module),
            Module::Compiling(code) => {
                let lost = || Error::Internal("a thread that compiled a kernel has ended without a result".to_string());
                code.recv().map_err(|_| lost())??
            }
        };
        // SAFETY: the code is an image that NVRTC made, whole by its checksum; text is closed by a NUL.
        let module = unsafe { driver_result::module::load_data(code.as_ptr().cast()) };
        let module = module.map_err(fault("loading a kernel (is the driver older than NVRTC?)"))?;
        self.modules[unit] = Module::Loaded(module);
        Ok(module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_words_are_understood() {
        let log = "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
                   insufficient register resources for the wgmma pipeline in the function 'gelu'\n\
                   ptxas info    : Compiling entry function 'band_outer' for 'sm_89'\n\
                   ptxas info    : Function properties for band_outer\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes \
                   spill loads\nptxas info    : Used 128 registers, used 1 barriers, 2048 bytes smem, 424 bytes cmem[0]\n\
                   ptxas info    : Compiling entry function 'gelu' for 'sm_89'\n    0 bytes stack frame, 0 bytes spill \
                   stores, 0 bytes spill loads\nptxas info    : Used 12 registers, used 0 barriers";
        let report = |entry: &str, registers, shared_memory, spills| KernelReport {
            entry: entry.to_string(),
            registers,
            shared_memory,
            spills,
            serialized: entry == "gelu",
        };
        assert_eq!(reports(log), [report("band_outer", 128, 2048, [8, 4, 12]), report("gelu", 12, 0, [0; 3])]);
    }
}
