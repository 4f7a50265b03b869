//! What a training takes on a device, from the same tables that allocate it.

use crate::backend::{Backend, HeadDims, Role, SequenceDims};
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::output;
use crate::shapes::{Act, Param, ParamTable};

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
    /// Weights, gradients and moments.
    pub parameters: Vec<MemoryRow>,
    /// What a batch takes.
    pub activations: Vec<MemoryRow>,
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
        let parameters = vec![
            row("parameters", Role::Parameters, 1, table.len()),
            row("gradients", Role::Gradients, 1, table.len()),
            row("moments", Role::Moments, 2, table.len()),
        ];
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
        let sequence = SequenceDims { batch, tokens, channels: config.channels, heads: config.num_heads };
        let head = HeadDims {
            rows: batch * tokens,
            channels: config.channels,
            vocab: config.vocab_size,
            padded_vocab: config.padded_vocab_size,
        };
        let scratch = backend.scratch_bytes(head, sequence);
        activations.push(MemoryRow { name: "scratch".to_string(), copies: 1, bytes: scratch });
        Ok(Self { parameters, activations })
    }

    /// Bytes of everything.
    pub fn total(&self) -> usize {
        self.parameters.iter().chain(&self.activations).map(|row| row.bytes).sum()
    }

    /// Refuses a training that the device's free memory cannot hold, before anything is allocated.
    ///
    /// # Errors
    /// [`Error::Device`] saying how much is needed, how much is free, and the largest B that fits; sizes that do not fit
    /// each other.
    pub fn check<B: Backend>(backend: &B, config: &GptConfig, batch: usize, tokens: usize) -> Result<()> {
        let Some(free) = backend.free_bytes() else { return Ok(()) };
        let needed = Self::new(backend, config, batch, tokens)?.total();
        if needed <= free {
            return Ok(());
        }
        let advice = match Self::largest_batch(backend, config, tokens, free)? {
            0 => format!("not even one sequence of {tokens} tokens fits, choose a smaller -t or a smaller model"),
            largest => format!("choose -b {largest} or less"),
        };
        Err(Error::Device(format!(
            "training in batches of {batch} x {tokens} tokens takes {} of memory, but {} are free on {}; {advice}",
            output::bytes(needed),
            output::bytes(free),
            backend.description()
        )))
    }

    /// The largest B whose training fits into `budget` bytes; 0 when none does.
    ///
    /// # Errors
    /// As [`MemoryEstimate::new`].
    pub fn largest_batch<B: Backend>(backend: &B, config: &GptConfig, tokens: usize, budget: usize) -> Result<usize> {
        let fits = |batch| Ok::<_, crate::Error>(Self::new(backend, config, batch, tokens)?.total() <= budget);
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

/// The share of a dense layer's elements that a banded tensor stores: (stored, dense) elements of all layers.
pub fn stored_elements(config: &GptConfig, table: &ParamTable, param: Param) -> (usize, usize) {
    let (rows, cols) = param.shape(config);
    (config.num_layers * table.span(param, 0).len, config.num_layers * rows * cols)
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
        for batch in [1, 2, 3, 16, 100] {
            let largest = |budget| MemoryEstimate::largest_batch(&Cpu::new(), &config, 128, budget).unwrap();
            assert_eq!(largest(total(batch)), batch);
            assert_eq!(largest(total(batch + 1) - 1), batch);
        }
        assert_eq!(MemoryEstimate::largest_batch(&Cpu::new(), &config, 128, 1000).unwrap(), 0);
    }
}
