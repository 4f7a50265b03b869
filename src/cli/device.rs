//! Choosing the device a command runs on.

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Cuda};
use crate::backend::wgpu::{AdapterKind, Options, Wgpu, adapters};
use crate::backend::{Arithmetic, Backend};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The backends that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendName {
    /// An NVIDIA card if there is one, else another GPU, else the processor; says which and why.
    Auto,
    /// NVIDIA GPUs.
    Cuda,
    /// Any vendor's GPU through Vulkan, Metal or DirectX 12.
    Wgpu,
    /// The processor: the readable reference.
    Cpu,
}

/// The arithmetic that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// The backend's default.
    Auto,
    /// IEEE single precision.
    Fp32,
    /// Tensor cores on single-precision storage; CUDA only.
    Tf32,
    /// bfloat16 with single-precision master weights; CUDA only.
    Bf16,
    /// Half precision with single-precision master weights; wgpu only.
    F16,
}

/// The environment variable that changes the wgpu backend's tiles, for measuring others than the built-in ones.
const TUNING: &str = "BANDTRAIN_WGPU_TUNING";

/// The flags that choose a device, shared by all commands that compute.
#[derive(Debug, Clone, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub backend: BackendName,
    /// wgpu: the adapter, by its index or a part of its name ('bandtrain info' lists them)
    #[arg(long, value_name = "NAME|INDEX")]
    pub adapter: Option<String>,
    /// How to compute
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub precision: Precision,
}

/// Something to do on whichever backend was chosen.
pub trait Task {
    /// What it gives.
    type Output;

    /// Does it.
    ///
    /// # Errors
    /// Its own.
    fn run<B: Backend>(self, backend: B) -> Result<Self::Output>;
}

/// Runs `task` on the backend asked for. Whether there is one is found out before the task does anything.
///
/// # Errors
/// [`Error::Device`] when this build or machine has no such backend, [`Error::Usage`] for a precision or an adapter that
/// it does not know; the task's own errors.
pub fn with_backend<T: Task>(args: &DeviceArgs, task: T) -> Result<T::Output> {
    let (backend, _) = args.chosen();
    if args.adapter.is_some() && backend != BackendName::Wgpu {
        return Err(Error::usage("--adapter chooses among wgpu's adapters; leave it out or use --backend wgpu"));
    }
    match backend {
        BackendName::Wgpu => {
            fp32_only(args.precision, "wgpu")?;
            let tuning_changes = std::env::var_os(TUNING).map(|changes| changes.to_string_lossy().into_owned());
            task.run(Wgpu::new(&Options { adapter: args.adapter.clone(), tuning_changes, ..Options::default() })?)
        }
        BackendName::Cuda => task.run(Cuda::new(cuda::Options {
            arithmetic: cuda_arithmetic(args.precision)?,
            ..cuda::Options::default()
        })?),
        BackendName::Cpu | BackendName::Auto => {
            fp32_only(args.precision, "cpu")?;
            task.run(Cpu::new())
        }
    }
}

impl DeviceArgs {
    /// The backend that these flags mean, and why when they leave the choice open.
    pub fn chosen(&self) -> (BackendName, Option<&'static str>) {
        match (self.backend, &self.adapter) {
            // Naming an adapter is asking for wgpu.
            (BackendName::Auto, Some(_)) => (BackendName::Wgpu, None),
            (BackendName::Auto, None) if cuda::is_usable() => {
                (BackendName::Cuda, Some("auto: this machine has an NVIDIA card"))
            }
            // A program that runs shaders on the processor is slower than the processor itself.
            (BackendName::Auto, None) if adapters().iter().any(|adapter| adapter.kind != AdapterKind::Software) => {
                (BackendName::Wgpu, Some("auto: this machine has a GPU, and no NVIDIA card with CUDA"))
            }
            (BackendName::Auto, None) => (BackendName::Cpu, Some("auto: this machine has no GPU")),
            (name, _) => (name, None),
        }
    }
}

/// What the cuda backend computes in.
fn cuda_arithmetic(precision: Precision) -> Result<Arithmetic> {
    match precision {
        Precision::Auto | Precision::Bf16 => Ok(Arithmetic::Bf16),
        Precision::Tf32 => Ok(Arithmetic::Tf32),
        Precision::Fp32 => Ok(Arithmetic::Fp32),
        Precision::F16 => Err(Error::usage("the cuda backend computes in bf16, tf32 or fp32; choose one of these")),
    }
}

fn fp32_only(precision: Precision, backend: &str) -> Result<()> {
    match precision {
        Precision::Auto | Precision::Fp32 => Ok(()),
        _ => Err(Error::usage(format!(
            "the {backend} backend computes in fp32 only; leave out --precision or choose fp32"
        ))),
    }
}
