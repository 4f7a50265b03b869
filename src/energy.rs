//! The energy that a GPU takes, from the counter that NVIDIA's cards keep (NVML's total energy consumption).

use nvml_wrapper::Nvml;

/// A card's energy counter, read from a beginning on.
pub struct EnergyMeter {
    counter: std::result::Result<Counter, String>,
}

/// Where the counter is and what it showed at the beginning.
struct Counter {
    nvml: Nvml,
    index: u32,
    start: u64,
}

impl EnergyMeter {
    /// Begins to count the energy of the device that is described (as [`crate::backend::Device::description`] does).
    pub fn start(device: &str) -> Self {
        Self { counter: Counter::start(device) }
    }

    /// Joules since the beginning, of the whole card: of other programs on it too.
    ///
    /// # Errors
    /// One clause on why the energy is not known.
    pub fn joules(&self) -> std::result::Result<f64, String> {
        let counter = self.counter.as_ref().map_err(String::clone)?;
        let now = counter.read()?;
        Ok(now.saturating_sub(counter.start) as f64 / 1e3)
    }
}

impl Counter {
    fn start(device: &str) -> std::result::Result<Self, String> {
        if device.starts_with("CPU") {
            return Err("a processor's energy is not measured".to_string());
        }
        let nvml = Nvml::init().map_err(|error| format!("only NVIDIA's driver (NVML) tells energy, and: {error}"))?;
        let count = nvml.device_count().map_err(|error| error.to_string())?;
        let is_named = |index: &u32| {
            let name = nvml.device_by_index(*index).and_then(|card| card.name());
            name.is_ok_and(|name| !name.is_empty() && device.contains(&name))
        };
        let named: Vec<u32> = (0..count).filter(is_named).collect();
        let used: Vec<u32> = named.iter().copied().filter(|&index| is_used(&nvml, index)).collect();
        let index = match (named.as_slice(), used.as_slice()) {
            ([only], _) | (_, [only]) => *only,
            ([], _) => return Err("NVIDIA's driver knows no card of this device's name".to_string()),
            (several, _) => {
                let count = several.len();
                return Err(format!(
                    "{count} cards have this device's name, and the driver does not say which is used"
                ));
            }
        };
        let counter = Self { nvml, index, start: 0 };
        let start = counter.read()?;
        Ok(Self { start, ..counter })
    }

    /// Millijoules since the driver was loaded.
    fn read(&self) -> std::result::Result<u64, String> {
        let energy = self.nvml.device_by_index(self.index).and_then(|card| card.total_energy_consumption());
        energy.map_err(|error| format!("the card does not tell its energy: {error}"))
    }
}

/// Whether the driver says that this program uses a card.
fn is_used(nvml: &Nvml, index: u32) -> bool {
    let processes = nvml.device_by_index(index).map(|card| {
        let compute = card.running_compute_processes().unwrap_or_default();
        let graphics = card.running_graphics_processes().unwrap_or_default();
        compute.into_iter().chain(graphics).map(|process| process.pid).collect::<Vec<_>>()
    });
    processes.is_ok_and(|pids| pids.contains(&std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tells_no_energy_says_so() {
        assert_eq!(EnergyMeter::start("CPU, 2 threads").joules(), Err("a processor's energy is not measured".into()));
        let words = EnergyMeter::start("A card that is not there").joules().unwrap_err();
        assert!(words.contains("NVML") || words.contains("NVIDIA's driver knows no card"), "{words}");
    }
}
