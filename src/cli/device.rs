//! Choosing the device a command runs on.

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The backends that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendName {
    /// The fastest there is on this machine; says which and why.
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

/// The flags that choose a device, shared by all commands that compute.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto", value_name = "NAME")]
    pub backend: BackendName,
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
/// [`Error::Device`] when this build or machine has no such backend or precision; the task's own errors.
pub fn with_backend<T: Task>(args: DeviceArgs, task: T) -> Result<T::Output> {
    match args.backend {
        BackendName::Auto | BackendName::Cpu => {}
        BackendName::Cuda => return Err(missing("cuda")),
        BackendName::Wgpu => return Err(missing("wgpu")),
    }
    match args.precision {
        Precision::Auto | Precision::Fp32 => task.run(Cpu::new()),
        _ => Err(Error::usage("the cpu backend computes in fp32 only; leave out --precision or choose fp32")),
    }
}

fn missing(name: &str) -> Error {
    Error::Device(format!("this version of bandtrain has no {name} backend; use --backend cpu"))
}
