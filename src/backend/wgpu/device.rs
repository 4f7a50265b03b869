//! Adapters: which there are, which one to take, and opening it with the limits and the error handling we need.

use super::tuning::Tuning;
use crate::error::{Error, Result};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use wgpu::{Backends, DeviceType, Limits};

/// What kind of device an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdapterKind {
    /// A graphics card of its own.
    Discrete,
    /// Graphics inside the processor, sharing its memory.
    Integrated,
    /// A graphics card seen through a virtual machine.
    Virtual,
    /// Something the driver does not name.
    Other,
    /// A program that runs shaders on the CPU.
    Software,
}

impl AdapterKind {
    fn of(device_type: DeviceType) -> Self {
        match device_type {
            DeviceType::DiscreteGpu => Self::Discrete,
            DeviceType::IntegratedGpu => Self::Integrated,
            DeviceType::VirtualGpu => Self::Virtual,
            DeviceType::Cpu => Self::Software,
            DeviceType::Other => Self::Other,
        }
    }

    /// The kind in one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Virtual => "virtual",
            Self::Other => "other",
            Self::Software => "software",
        }
    }
}

/// An adapter as the user may choose it.
#[derive(Debug, Clone)]
pub struct AdapterInfo {
    /// Its number, one of the two things `--adapter` takes.
    pub index: usize,
    /// Its name, the other one.
    pub name: String,
    /// Discrete, integrated, software, ...
    pub kind: AdapterKind,
    /// Vulkan, Metal or Dx12.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// The limits that matter here, by WebGPU's names, in bytes or counts.
    pub limits: Vec<(&'static str, u64)>,
    /// The features it has, by wgpu's names.
    pub features: Vec<String>,
    /// How many invocations a subgroup has, if kernels may know of it and it is always as many.
    pub subgroup: Option<usize>,
}

impl AdapterInfo {
    fn new(index: usize, adapter: &wgpu::Adapter) -> Self {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let sizes = [info.subgroup_min_size, info.subgroup_max_size];
        let certain = adapter.features().contains(wgpu::Features::SUBGROUP) && sizes[0] == sizes[1];
        Self {
            index,
            name: info.name,
            kind: AdapterKind::of(info.device_type),
            backend: format!("{:?}", info.backend),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
            limits: vec![
                ("maxBufferSize", limits.max_buffer_size),
                ("maxStorageBufferBindingSize", limits.max_storage_buffer_binding_size),
                ("maxStorageBuffersPerShaderStage", u64::from(limits.max_storage_buffers_per_shader_stage)),
                ("maxComputeInvocationsPerWorkgroup", u64::from(limits.max_compute_invocations_per_workgroup)),
                ("maxComputeWorkgroupStorageSize", u64::from(limits.max_compute_workgroup_storage_size)),
                ("maxComputeWorkgroupsPerDimension", u64::from(limits.max_compute_workgroups_per_dimension)),
            ],
            features: adapter.features().iter_names().map(|(name, _)| name.to_string()).collect(),
            subgroup: certain.then_some(sizes[0] as usize),
        }
    }

    /// The adapter in words.
    pub fn describe(&self) -> String {
        format!("{} ({}, {}, {})", self.name, self.kind.name(), self.backend, self.driver)
    }
}

/// How to open a device.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// An adapter's index or a part of its name; the best one when `None` (a software adapter only if there is no other).
    pub adapter: Option<String>,
    /// Stay within WebGPU's default limits, whatever the adapter offers (buffers as such may be as large as it allows).
    pub default_limits: bool,
    /// Tiles and the like that suit the adapter; those of its kind when `None`.
    pub tuning: Option<Tuning>,
    /// Changes to that, as [`Tuning::with`] takes them.
    pub tuning_changes: Option<String>,
    /// Give kernels no more than this many bytes of a buffer at once where they can do with less: for tests of the chunks
    /// that large models are worked through in.
    pub binding_bytes: Option<u64>,
    /// Compile shaders with bounds checks: slower, for tests.
    pub checked: bool,
    /// Act as if the adapter had only this much memory, in bytes.
    pub memory_bytes: Option<usize>,
    /// The folder that compiled pipelines are kept in; the user's cache folder when `None`.
    pub cache_folder: Option<PathBuf>,
}

/// The first fault the device reported since the last look: losses and errors arrive by callback.
#[derive(Clone, Default)]
pub(super) struct Faults(Arc<Mutex<Option<String>>>);

impl Faults {
    fn report(&self, what: String) {
        // A poisoned lock means that another thread panicked while it held a string: the string is still good.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(what);
    }

    /// Fails when a fault was reported; the fault stays, for the device is of no use after it.
    pub(super) fn check(&self) -> Result<()> {
        match &*self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            None => Ok(()),
            Some(what) => Err(Error::Device(what.clone())),
        }
    }
}

/// What is made use of where an adapter has it.
const USEFUL_FEATURES: wgpu::Features =
    wgpu::Features::TIMESTAMP_QUERY.union(wgpu::Features::PIPELINE_CACHE).union(wgpu::Features::SUBGROUP);

/// An open device.
pub(super) struct Gpu {
    pub(super) adapter: wgpu::Adapter,
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) info: AdapterInfo,
    pub(super) limits: Limits,
    /// As [`Options::memory_bytes`].
    pub(super) memory_bytes: Option<usize>,
    pub(super) faults: Faults,
}

/// Every adapter that Vulkan, Metal or DX12 offer on this machine, in the order of their indices.
pub fn adapters() -> Vec<AdapterInfo> {
    found().iter().enumerate().map(|(index, adapter)| AdapterInfo::new(index, adapter)).collect()
}

fn found() -> Vec<wgpu::Adapter> {
    if wgpu::Instance::enabled_backend_features().is_empty() {
        return Vec::new();
    }
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = Backends::VULKAN | Backends::METAL | Backends::DX12;
    // No validation layers, and adapters whose driver does not call itself conformant (lavapipe) are good enough.
    descriptor.flags = wgpu::InstanceFlags::ALLOW_UNDERLYING_NONCOMPLIANT_ADAPTER;
    let backends = descriptor.backends;
    pollster::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends))
}

/// The index of the adapter to take among `infos`.
fn choose(infos: &[AdapterInfo], wanted: Option<&str>) -> Result<usize> {
    let listing = || infos.iter().map(|a| format!("{}: {}", a.index, a.describe())).collect::<Vec<_>>().join("; ");
    let Some(wanted) = wanted else {
        return infos.iter().min_by_key(|info| info.kind).map(|info| info.index).ok_or_else(|| {
            Error::Device(
                "wgpu found no graphics adapter: install a driver for Vulkan (Linux: mesa-vulkan-drivers or NVIDIA's), \
                 Metal or DirectX 12, or use --backend cpu"
                    .to_string(),
            )
        });
    };
    let by_name = || infos.iter().find(|info| info.name.to_lowercase().contains(&wanted.to_lowercase()));
    let by_index = wanted.parse().ok().and_then(|index: usize| infos.get(index));
    by_index.or_else(by_name).map(|info| info.index).ok_or_else(|| match infos.is_empty() {
        true => {
            Error::Device(format!("there is no graphics adapter at all on this machine, so none called '{wanted}'"))
        }
        false => Error::Device(format!(
            "there is no graphics adapter '{wanted}'; choose an index or a name of {}",
            listing()
        )),
    })
}

/// Opens the adapter that `options` ask for.
///
/// # Errors
/// No such adapter, or one that lacks what WebGPU guarantees.
pub(super) fn open(options: &Options) -> Result<Gpu> {
    let adapters = found();
    let infos: Vec<_> = adapters.iter().enumerate().map(|(index, adapter)| AdapterInfo::new(index, adapter)).collect();
    let index = choose(&infos, options.adapter.as_deref())?;
    let (adapter, info) = (adapters[index].clone(), infos[index].clone());
    let limits = match options.default_limits {
        true => Limits { max_buffer_size: adapter.limits().max_buffer_size, ..Limits::default() },
        false => adapter.limits(),
    };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("bandtrain"),
        required_features: adapter.features() & USEFUL_FEATURES,
        required_limits: limits.clone(),
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
        .map_err(|error| Error::Device(format!("{} cannot be opened: {error}", info.describe())))?;
    if limits.max_compute_invocations_per_workgroup < 256 || limits.max_compute_workgroup_storage_size < 16 << 10 {
        return Err(Error::Device(format!(
            "{} is too small: it needs workgroups of 256 invocations and 16 KiB; use --backend cpu",
            info.describe()
        )));
    }
    let faults = watch(&device, &info);
    Ok(Gpu { adapter, device, queue, info, limits, memory_bytes: options.memory_bytes, faults })
}

/// Collects what goes wrong on the device later.
fn watch(device: &wgpu::Device, info: &AdapterInfo) -> Faults {
    let faults = Faults::default();
    let (lost, name) = (faults.clone(), info.name.clone());
    device.set_device_lost_callback(move |_, message| {
        lost.report(format!(
            "the device {name} was lost ({message}): the driver was reset or the card removed; start again, with a \
             smaller batch (-b) if it happens again"
        ));
    });
    let (errors, name) = (faults.clone(), info.name.clone());
    device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
        errors.report(match error {
            wgpu::Error::OutOfMemory { .. } => {
                format!("{name} ran out of memory for its commands; use a smaller batch (-b) or sequence (-t)")
            }
            other => format!("{name} refused a command: {other}"),
        });
    }));
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(index: usize, name: &str, kind: AdapterKind) -> AdapterInfo {
        let (backend, driver) = ("Vulkan".to_string(), String::new());
        AdapterInfo {
            index,
            name: name.to_string(),
            kind,
            backend,
            driver,
            limits: Vec::new(),
            features: Vec::new(),
            subgroup: None,
        }
    }

    #[test]
    fn the_best_adapter_is_taken_unless_one_is_named() {
        let infos = [
            info(0, "llvmpipe", AdapterKind::Software),
            info(1, "Laptop Graphics", AdapterKind::Integrated),
            info(2, "Big Card", AdapterKind::Discrete),
        ];
        assert_eq!(choose(&infos, None).unwrap(), 2);
        assert_eq!(choose(&infos[..2], None).unwrap(), 1);
        assert_eq!(choose(&infos[..1], None).unwrap(), 0);
        assert_eq!(choose(&infos, Some("laptop")).unwrap(), 1);
        assert_eq!(choose(&infos, Some("0")).unwrap(), 0);
        let message = choose(&infos, Some("voodoo")).unwrap_err().to_string();
        assert!(message.contains("2: Big Card (discrete"), "{message}");
    }

    #[test]
    fn a_machine_without_adapters_is_told_so_in_a_sentence() {
        assert!(choose(&[], None).unwrap_err().to_string().contains("found no graphics adapter"));
        assert!(choose(&[], Some("x")).unwrap_err().to_string().contains("no graphics adapter at all"));
    }
}
