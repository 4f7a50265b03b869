//! How busy the machine is.

use std::time::{Duration, Instant};
use sysinfo::{Gpu, Gpus, Pid, ProcessRefreshKind, ProcessesToUpdate, System, get_current_pid};

/// What is known of the machine's load; `None` where this machine does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Bytes of main memory that this program takes.
    pub memory: Option<u64>,
    /// Load of all processors together, in percent.
    pub cpu: Option<f32>,
    /// Whether the training runs on a GPU.
    pub on_gpu: bool,
    /// The GPU's load, in percent.
    pub gpu: Option<f32>,
    /// Bytes of the GPU's memory that are taken, by whatever program.
    pub gpu_memory: Option<u64>,
}

/// Asks the operating system, every other second at most.
pub struct Meter {
    device: String,
    system: Option<System>,
    pid: Option<Pid>,
    gpus: Option<Gpus>,
    load: Load,
    measured: Option<Instant>,
}

impl Meter {
    const PAUSE: Duration = Duration::from_secs(2);

    /// A meter for a training on the device that is described.
    pub fn new(device: &str) -> Self {
        let on_gpu = !device.starts_with("CPU");
        Self {
            device: device.to_string(),
            system: System::new().ok(),
            pid: get_current_pid().ok(),
            gpus: if on_gpu { Gpus::new().ok() } else { None },
            load: Load { on_gpu, ..Load::default() },
            measured: None,
        }
    }

    /// The load.
    pub fn measure(&mut self) -> Load {
        if self.measured.is_none_or(|measured| measured.elapsed() >= Self::PAUSE) {
            self.ask();
            self.measured = Some(Instant::now());
        }
        self.load
    }

    fn ask(&mut self) {
        if let Some(system) = &mut self.system {
            system.refresh_cpu_usage();
            // The first load is one since nobody knows when.
            self.load.cpu = self.measured.map(|_| system.global_cpu_usage());
            self.load.memory = self.pid.and_then(|pid| {
                let what = ProcessRefreshKind::nothing().with_memory();
                system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), true, what);
                system.process(pid).map(|process| process.memory())
            });
        }
        if let Some(gpus) = &mut self.gpus {
            gpus.refresh(true);
            let gpu = the_one(gpus.iter(), &self.device);
            (self.load.gpu, self.load.gpu_memory) = (gpu.and_then(Gpu::usage), gpu.and_then(Gpu::used_memory));
        }
    }
}

/// The GPU whose model the description names, if it is the only one.
fn the_one<'a>(gpus: impl Iterator<Item = &'a Gpu>, device: &str) -> Option<&'a Gpu> {
    let mut named = gpus.filter(|gpu| gpu.model().is_some_and(|model| !model.is_empty() && device.contains(model)));
    named.next().filter(|_| named.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_load_of_this_machine_are_measured() {
        let mut meter = Meter::new("CPU, 2 threads");
        let first = meter.measure();
        assert!(
            first.memory.is_some_and(|memory| memory > 1 << 20) && first.cpu.is_none() && !first.on_gpu,
            "{first:?}"
        );
        assert_eq!(meter.measure(), first, "asked again at once");
        meter.measured = Some(Instant::now() - Meter::PAUSE);
        assert!(meter.measure().cpu.is_some_and(|cpu| (0.0..=100.5).contains(&cpu)));
        let load = Meter::new("A card that is not there").measure();
        assert!(load.on_gpu && load.gpu.is_none() && load.gpu_memory.is_none());
    }
}
