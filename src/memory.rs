//! What a training takes on a device, from the same tables that allocate it.

use crate::backend::{Backend, HeadDims, Role, SequenceDims};
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::output;
use crate::shapes::{Act, Param, ParamTable};
use crate::whole::Layout;

/// One line of the estimate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryRow {
    /// The buffer's name.
    pub name: String,
    /// How many there are.
    pub copies: usize,
    /// Bytes of all of them.
    pub bytes: usize,
}

/// Memory of a training step, buffer by buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Weights, gradients and moments; of learned layers also whole gradients.
    pub parameters: Vec<MemoryRow>,
    /// What a batch takes.
    pub activations: Vec<MemoryRow>,
    /// The largest single buffer.
    pub largest_buffer: MemoryRow,
}

/// What a device has to give, where it tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes free.
    pub free: Option<usize>,
    /// Bytes that a single buffer may have.
    pub max_buffer: Option<usize>,
}

impl Room {
    /// What a device has to give now.
    pub fn of<B: Backend>(backend: &B) -> Self {
        Self { free: backend.free_bytes(), max_buffer: backend.max_buffer_bytes() }
    }

    fn holds(self, estimate: &MemoryEstimate) -> bool {
        let within = |bytes: usize, limit: Option<usize>| limit.is_none_or(|limit| bytes <= limit);
        within(estimate.total(), self.free) && within(estimate.largest_buffer.bytes, self.max_buffer)
    }
}

impl MemoryEstimate {
    /// The memory of training `config` in batches of B sequences of T tokens on a backend.
    ///
    /// # Errors
    /// Sizes that do not fit each other.
    pub fn new<B: Backend>(backend: &B, config: &GptConfig, batch: usize, tokens: usize) -> Result<Self> {
        let table = ParamTable::new(config)?;
        let row = |name: &str, role, copies: usize, len: usize| MemoryRow {
            name: name.to_string(),
            copies,
            bytes: copies * len * backend.element_bytes(role),
        };
        let mut parameters = vec![
            row("parameters", Role::Parameters, 1, table.len()),
            row("gradients", Role::Gradients, 1, table.len()),
            row("moments", Role::Moments, 2, table.len()),
        ];
        let whole = Layout::new(config);
        if !whole.is_empty() {
            parameters.push(row("whole gradients", Role::Gradients, 1, whole.len()));
        }
        let mut activations: Vec<_> = Act::FORWARD
            .into_iter()
            .chain(Act::BACKWARD)
            .map(|act| {
                let activation = act.describe(config, batch, tokens);
                let role = if activation.statistic { Role::Statistics } else { Role::Activations };
                let copies = if activation.per_layer { config.num_layers } else { 1 };
                row(activation.name, role, copies, activation.len)
            })
            .collect();
        let one = |row: &MemoryRow| MemoryRow { copies: 1, bytes: row.bytes / row.copies, ..row.clone() };
        let buffers = parameters.iter().chain(&activations).map(one);
        let largest_buffer = buffers
            .max_by_key(|buffer| buffer.bytes)
            .ok_or_else(|| Error::Internal("a training has no buffers".to_string()))?;
        let sequence = SequenceDims { batch, tokens, channels: config.channels, heads: config.num_heads };
        let head = HeadDims {
            rows: batch * tokens,
            channels: config.channels,
            vocab: config.vocab_size,
            padded_vocab: config.padded_vocab_size,
        };
        let scratch = backend.scratch_bytes(head, sequence);
        activations.push(MemoryRow { name: "scratch".to_string(), copies: 1, bytes: scratch });
        Ok(Self { parameters, activations, largest_buffer })
    }

    /// Bytes of everything.
    pub fn total(&self) -> usize {
        self.parameters.iter().chain(&self.activations).map(|row| row.bytes).sum()
    }

    /// Refuses a training that the device's free memory or its largest buffer cannot hold, before anything is allocated.
    ///
    /// # Errors
    /// [`Error::Device`] saying how much is needed, how much there is, and the largest B that fits; sizes that do not fit
    /// each other.
    pub fn check<B: Backend>(backend: &B, config: &GptConfig, batch: usize, tokens: usize) -> Result<()> {
        let (estimate, room) = (Self::new(backend, config, batch, tokens)?, Room::of(backend));
        if room.holds(&estimate) {
            return Ok(());
        }
        let advice = advice(Self::largest_batch(backend, config, tokens, room)?, tokens);
        let MemoryRow { name, bytes: largest, .. } = &estimate.largest_buffer;
        let shortage = match (room.free, room.max_buffer) {
            (_, Some(most)) if *largest > most => {
                format!("{} of them for {name}, but a buffer may have {}", output::bytes(*largest), output::bytes(most))
            }
            (free, _) => format!("but {} are free", output::bytes(free.unwrap_or(0))),
        };
        Err(Error::Device(format!(
            "training in batches of {batch} x {tokens} tokens takes {} of memory, {shortage} on {}; {advice}",
            output::bytes(estimate.total()),
            backend.description()
        )))
    }

    /// What to say when a training ran out of memory although [`MemoryEstimate::check`] had let it pass (another program
    /// took some, or the device does not tell): the error with the largest B that fits as its advice. Of the training only
    /// the parameters are still on the device. Other errors stay as they are.
    pub fn advise<B: Backend>(backend: &mut B, config: &GptConfig, batch: usize, tokens: usize, error: Error) -> Error {
        // Waiting gives back the memory that nothing uses any more; if that fails too, the first error is the one to tell.
        if !matches!(error, Error::OutOfMemory { .. }) || backend.sync().is_err() {
            return error;
        }
        let largest = || {
            let held = Self::new(backend, config, batch, tokens)?.parameters[0].bytes;
            let room = Room::of(backend);
            let free = room.free.map(|free| free.saturating_add(held));
            Self::largest_batch(backend, config, tokens, Room { free, ..room })
        };
        match largest() {
            // It did not fit, whatever the figures say.
            Ok(largest) => error.with_memory_advice(advice(largest.min(batch - 1), tokens)),
            Err(_) => error,
        }
    }

    /// The largest B whose training a device with this room can hold; 0 when it cannot hold any.
    ///
    /// # Errors
    /// As [`MemoryEstimate::new`].
    pub fn largest_batch<B: Backend>(backend: &B, config: &GptConfig, tokens: usize, room: Room) -> Result<usize> {
        let fits = |batch| Ok::<_, crate::Error>(room.holds(&Self::new(backend, config, batch, tokens)?));
        let (mut fitting, mut step) = (0, 1);
        while step < 1 << 20 && fits(fitting + step)? {
            fitting += step;
            step *= 2;
        }
        while step > 0 {
            if fits(fitting + step)? {
                fitting += step;
            }
            step /= 2;
        }
        Ok(fitting)
    }
}

/// What to do when `largest` is the largest B that fits.
fn advice(largest: usize, tokens: usize) -> String {
    match largest {
        0 => format!("not even one sequence of {tokens} tokens fits, choose a smaller -t or a smaller model"),
        largest => format!("choose -b {largest} or less"),
    }
}

/// The share of a dense layer's elements that a banded tensor stores: (stored, dense) elements of all layers.
pub fn stored_elements(config: &GptConfig, table: &ParamTable, param: Param) -> (usize, usize) {
    let (rows, cols) = param.shape(config);
    let stored = (0..config.num_layers).map(|layer| table.span(param, layer).len).sum();
    (stored, config.num_layers * rows * cols)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::config::preset;

    #[test]
    fn the_largest_batch_fits_and_the_next_does_not() {
        let config = preset("toy").unwrap().model;
        let total = |batch| MemoryEstimate::new(&Cpu::new(), &config, batch, 128).unwrap().total();
        let largest = |free, max_buffer| {
            MemoryEstimate::largest_batch(&Cpu::new(), &config, 128, Room { free, max_buffer }).unwrap()
        };
        for batch in [1, 2, 3, 16, 100] {
            assert_eq!(largest(Some(total(batch)), None), batch);
            assert_eq!(largest(Some(total(batch + 1) - 1), None), batch);
        }
        assert_eq!(largest(Some(1000), None), 0);
        // One layer's input of GELU is the largest of a batch's buffers.
        let buffer = |batch: usize| 4 * batch * 128 * 4 * config.channels;
        assert_eq!(largest(None, Some(buffer(300))), 300);
        assert_eq!(largest(Some(total(20)), Some(buffer(300) - 1)), 20);
        assert_eq!(largest(Some(total(400)), Some(buffer(300) - 1)), 299);
    }
}
