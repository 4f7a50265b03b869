//! How much memory an adapter has left, which WebGPU does not tell: the system does, and Vulkan.

use super::device::{AdapterKind, Gpu};
use crate::backend::Device;
use crate::backend::cpu::Cpu;

/// Bytes free for buffers, where they can be found out.
pub(super) fn free_bytes(gpu: &Gpu) -> Option<usize> {
    let system = || Cpu::new().free_bytes();
    let heap_free = || vulkan_heap(gpu).map(|heap| heap.free);
    let free = match gpu.info.kind {
        AdapterKind::Software => system(),
        // Graphics inside the processor may take a part of the system's memory, and no more than is free.
        AdapterKind::Integrated => [system(), heap_free()].into_iter().flatten().min(),
        AdapterKind::Discrete | AdapterKind::Virtual | AdapterKind::Other => heap_free(),
    };
    let allowed = gpu.memory_bytes.map(|bytes| bytes.saturating_sub(held_bytes(gpu).unwrap_or(0)));
    [free, allowed].into_iter().flatten().min()
}

/// Bytes of a card's own memory, where they can be found out.
pub(super) fn own_bytes(gpu: &Gpu) -> Option<usize> {
    if gpu.info.kind != AdapterKind::Discrete {
        return None;
    }
    let size = vulkan_heap(gpu)?.size;
    Some(gpu.memory_bytes.map_or(size, |bytes| bytes.min(size)))
}

/// Bytes of the buffers that there are, where wgpu manages memory itself.
pub(super) fn held_bytes(gpu: &Gpu) -> Option<usize> {
    let report = gpu.device.generate_allocator_report()?;
    usize::try_from(report.total_allocated_bytes).ok()
}

/// Whether `size` more bytes are more than is allowed to this run.
pub(super) fn exceeds(gpu: &Gpu, size: u64) -> bool {
    let Some(allowed) = gpu.memory_bytes else { return false };
    held_bytes(gpu).unwrap_or(0) as u64 + size > allowed as u64
}

/// The largest part of the card's memory: its bytes, and those that the driver lets this process have, less what it has; without
/// `VK_EXT_memory_budget` all of them, less what it has.
struct Heap {
    size: usize,
    free: usize,
}

#[cfg(not(target_vendor = "apple"))]
#[allow(unsafe_code)]
fn vulkan_heap(gpu: &Gpu) -> Option<Heap> {
    use ash::vk::{self, MemoryHeapFlags};
    // SAFETY: the adapter is only asked, and nothing of it is destroyed or kept.
    let adapter = unsafe { gpu.adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let capabilities = adapter.physical_device_capabilities();
    let instance = adapter.shared_instance();
    // The function came with Vulkan 1.1.
    if instance.instance_api_version().min(capabilities.properties().api_version) < vk::API_VERSION_1_1 {
        return None;
    }
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceMemoryProperties2::default();
    let has_budget = capabilities.supports_extension(ash::ext::memory_budget::NAME);
    if has_budget {
        properties = properties.push_next(&mut budget);
    }
    // SAFETY: instance and device live as long as `adapter` is borrowed; the structures are the ones that the function fills.
    unsafe {
        let device = adapter.raw_physical_device();
        instance.raw_instance().get_physical_device_memory_properties2(device, &mut properties);
    }
    let heaps = properties.memory_properties.memory_heaps_as_slice();
    let largest = (0..heaps.len())
        .filter(|&heap| heaps[heap].flags.contains(MemoryHeapFlags::DEVICE_LOCAL))
        .max_by_key(|&heap| heaps[heap].size)?;
    let free = match has_budget {
        true => budget.heap_budget[largest].saturating_sub(budget.heap_usage[largest]),
        false => heaps[largest].size.saturating_sub(held_bytes(gpu).unwrap_or(0) as u64),
    };
    Some(Heap { size: usize::try_from(heaps[largest].size).ok()?, free: usize::try_from(free).ok()? })
}

/// There is no Vulkan.
#[cfg(target_vendor = "apple")]
fn vulkan_heap(_: &Gpu) -> Option<Heap> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::wgpu::{Options, adapters, device};

    #[test]
    fn every_vulkan_adapter_tells_its_memory() {
        for adapter in adapters().iter().filter(|adapter| adapter.backend == "Vulkan") {
            let options = Options { adapter: Some(adapter.index.to_string()), ..Options::default() };
            let gpu = device::open(&options).unwrap();
            let (free, heap) = (free_bytes(&gpu).unwrap(), vulkan_heap(&gpu).unwrap());
            assert!(free > 64 << 20 && heap.free > 64 << 20, "{}: {free} and {} bytes", adapter.describe(), heap.free);
            assert!(heap.size >= heap.free);
            assert_eq!(own_bytes(&gpu), (adapter.kind == AdapterKind::Discrete).then_some(heap.size));
            // Less what wgpu itself has taken.
            let allowed = free_bytes(&Gpu { memory_bytes: Some(5 << 20), ..gpu }).unwrap();
            assert!((1 << 20..=5 << 20).contains(&allowed), "{allowed} bytes");
        }
    }
}
