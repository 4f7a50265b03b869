//! Finding NVIDIA's libraries: the driver, NVRTC and cuBLASLt, from the system, a CUDA toolkit or Python wheels.
//!
//! cudarc asks the system's loader for a library by its name and panics when there is none. So each is looked for here
//! first, and one found elsewhere is loaded by its path: the loader then knows it by its name.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Folders with NVIDIA's libraries that are looked through before all others, separated as PATH is.
const FOLDERS_VARIABLE: &str = "BANDTRAIN_CUDA_LIBS";

/// A library of NVIDIA's that the backend needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// What talks to the card; comes with NVIDIA's driver.
    Driver,
    /// Compiles the kernels.
    Nvrtc,
    /// Dense products.
    CublasLt,
}

impl Library {
    /// All of them, in the order they are needed in.
    pub const ALL: [Library; 3] = [Library::Driver, Library::Nvrtc, Library::CublasLt];

    /// NVIDIA's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "CUDA driver",
            Library::Nvrtc => "NVRTC",
            Library::CublasLt => "cuBLASLt",
        }
    }

    /// File names it goes by, the newest first.
    fn files(self) -> &'static [&'static str] {
        match (self, cfg!(windows)) {
            (Library::Driver, false) => &["libcuda.so.1"],
            (Library::Nvrtc, false) => &["libnvrtc.so.13", "libnvrtc.so.12"],
            (Library::CublasLt, false) => &["libcublasLt.so.13", "libcublasLt.so.12"],
            (Library::Driver, true) => &["nvcuda.dll"],
            (Library::Nvrtc, true) => &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"],
            (Library::CublasLt, true) => &["cublasLt64_13.dll", "cublasLt64_12.dll"],
        }
    }

    /// Whether the system's loader finds it by name.
    #[allow(unsafe_code)]
    fn is_present(self) -> bool {
        // SAFETY: loading these libraries runs their initializers only.
        unsafe {
            match self {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
            }
        }
    }

    fn missing(self) -> Error {
        let wheel = match self {
            Library::Nvrtc => "nvidia-cuda-nvrtc",
            _ => "nvidia-cublas",
        };
        Error::Device(match self {
            Library::Driver => format!(
                "the cuda backend needs NVIDIA's driver, and this machine has no {}; install the driver of your card, or \
                 use --backend wgpu or cpu",
                self.files()[0]
            ),
            _ => format!(
                "the cuda backend needs NVIDIA's library {} ({}), and it was not found; 'pip install {wheel}' or a CUDA \
                 toolkit has it, {FOLDERS_VARIABLE} may name its folder; or use --backend wgpu or cpu",
                self.name(),
                self.files().join(" or ")
            ),
        })
    }
}

/// Makes sure that a library is there, and loads it.
///
/// # Errors
/// [`Error::Device`] saying how to get it.
pub fn ensure(library: Library) -> Result<()> {
    // One at a time: two threads would look through the same folders.
    static ENSURING: Mutex<()> = Mutex::new(());
    let _guard = ENSURING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if named_folders().iter().any(|folder| load_from(library, folder)) || library.is_present() {
        return Ok(());
    }
    let elsewhere = toolkit_folders().into_iter().chain(wheel_folders());
    if elsewhere.into_iter().any(|folder| load_from(library, &folder)) && library.is_present() {
        return Ok(());
    }
    Err(library.missing())
}

/// The file that a loaded library came from, where the system tells.
pub fn loaded_from(library: Library) -> Option<PathBuf> {
    // The driver's file carries its version: libcuda.so.580.95.05.
    let stem = library.files()[0].split(".so").next()?;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let paths = maps.lines().filter_map(|line| line.split_once('/').map(|(_, path)| PathBuf::from(format!("/{path}"))));
    let is_it = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&format!("{stem}.so")))
    };
    paths.into_iter().find(is_it)
}

/// Loads a library from a folder and keeps it; false when it is not there.
fn load_from(library: Library, folder: &Path) -> bool {
    library.files().iter().map(|file| folder.join(file)).filter(|path| path.exists()).any(|path| {
        if library == Library::Nvrtc {
            // NVRTC opens its second half by name, and not every wheel's knows that it lies beside it.
            let pattern = folder.join("libnvrtc-builtins.so.*").display().to_string();
            glob::glob(&pattern).into_iter().flatten().flatten().for_each(|path| _ = load(&path));
        }
        load(&path)
    })
}

/// Loads a library and keeps it.
#[allow(unsafe_code)]
fn load(path: &Path) -> bool {
    // SAFETY: the file has the name of a library of NVIDIA's; its initializers run, as if the loader had found it itself.
    match unsafe { libloading::Library::new(path) } {
        Ok(library) => {
            // It stays loaded as long as the program runs: cudarc keeps pointers into it.
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}

/// The folders that the user named.
fn named_folders() -> Vec<PathBuf> {
    std::env::var_os(FOLDERS_VARIABLE).map(|folders| std::env::split_paths(&folders).collect()).unwrap_or_default()
}

/// Where CUDA toolkits lie.
fn toolkit_folders() -> Vec<PathBuf> {
    let named = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let installed = glob::glob("/usr/local/cuda*").into_iter().flatten().flatten().chain([PathBuf::from("/opt/cuda")]);
    let roots = named.chain(installed);
    roots
        .flat_map(|root| ["lib64", "lib", "targets/x86_64-linux/lib", "bin", "bin/x64"].map(|part| root.join(part)))
        .collect()
}

/// Where Python wheels of the libraries lie: `nvidia/cu13/lib` and, for the older ones, a folder for each library.
fn wheel_folders() -> Vec<PathBuf> {
    // What an environment that is active and the interpreter on the PATH import from.
    const LIST: &str = "import site, sys; print(*sys.path, site.getusersitepackages(), sep='\\n')";
    let printed = ["python3", "python"].into_iter().find_map(|python| {
        let output = Command::new(python).args(["-c", LIST]).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    });
    let folders: Vec<PathBuf> =
        printed.unwrap_or_default().lines().filter(|l| !l.is_empty()).map(PathBuf::from).collect();
    let parts = ["cu13", "cuda_nvrtc", "cublas"].into_iter().flat_map(|part| ["lib", "bin"].map(|lib| (part, lib)));
    parts.flat_map(|(part, lib)| folders.iter().map(move |f| f.join("nvidia").join(part).join(lib))).collect()
}
