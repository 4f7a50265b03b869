//! A model's weights in host memory: what checkpoints read and write and what backends upload.

use crate::bandwidths::Bandwidths;
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::output;
use crate::shapes::{Param, ParamTable, Tensor, learned_tensors};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;

/// Standard deviation of GPT-2's initial weights (Radford et al. 2019, section 2.3).
const INIT_STD: f32 = 0.02;

/// The weights of one model, flat, in the layout of its [`ParamTable`]: banded tensors packed, gaps zero.
#[derive(Debug, Clone)]
pub struct Weights {
    config: GptConfig,
    table: ParamTable,
    values: Vec<f32>,
}

impl Weights {
    /// All weights zero.
    ///
    /// # Errors
    /// Sizes that do not fit each other; [`Error::Device`] when the host has not enough memory.
    pub fn zeros(config: &GptConfig) -> Result<Self> {
        Self::zeros_in(config, ParamTable::new(config)?)
    }

    /// All weights zero, laid out by a table of the configuration's: its learned blocks may be others than those they start from.
    ///
    /// # Errors
    /// [`Error::Device`] when the host has not enough memory.
    pub fn zeros_in(config: &GptConfig, table: ParamTable) -> Result<Self> {
        let mut values = Vec::new();
        values.try_reserve_exact(table.len()).map_err(|_| {
            let needed = output::bytes(table.len() * size_of::<f32>());
            Error::Device(format!("out of memory: the model's weights take {needed}; choose a smaller model"))
        })?;
        values.resize(table.len(), 0.0);
        Ok(Self { config: *config, table, values })
    }

    /// GPT-2's initial weights: N(0, 0.02) for the matrices, divided by sqrt(2L) for the two projections onto the
    /// residual stream; LayerNorm weights one, biases zero; padded vocabulary rows and everything outside a band zero.
    /// Every tensor draws its dense values from a stream of its own, so that a banded model starts from exactly the
    /// values of the dense one with the same seed, masked.
    ///
    /// # Errors
    /// Sizes that do not fit each other.
    pub fn init(config: &GptConfig, seed: u64) -> Result<Self> {
        let mut weights = Self::zeros(config)?;
        let residual_std = INIT_STD / (2.0 * config.num_layers as f32).sqrt();
        for index in 0..weights.table.tensors().len() {
            let tensor = weights.table.tensors()[index];
            let (rows, cols) = tensor.param.shape(config);
            let dense = match tensor.param {
                Param::Ln1w | Param::Ln2w | Param::Lnfw => vec![1.0; cols],
                Param::Attprojw | Param::Fcprojw => normal(seed, index, rows * cols, residual_std),
                Param::Wte => {
                    let mut values = normal(seed, index, config.vocab_size * cols, INIT_STD);
                    values.resize(rows * cols, 0.0);
                    values
                }
                param if param.is_matrix() => normal(seed, index, rows * cols, INIT_STD),
                _ => continue,
            };
            weights.set_dense(tensor.param, tensor.layer, &dense);
        }
        Ok(weights)
    }

    /// The model's sizes.
    pub fn config(&self) -> &GptConfig {
        &self.config
    }

    /// Where each tensor lies.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// All values, flat.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, flat, to be overwritten with others of the same layout.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// The values as stored: packed when the tensor is banded.
    pub fn stored(&self, param: Param, layer: usize) -> &[f32] {
        &self.values[self.table.span(param, layer).range()]
    }

    /// The values as stored, to be overwritten.
    pub fn stored_mut(&mut self, param: Param, layer: usize) -> &mut [f32] {
        &mut self.values[self.table.span(param, layer).range()]
    }

    /// One tensor as its dense matrix, row by row.
    pub fn dense(&self, param: Param, layer: usize) -> Vec<f32> {
        let stored = self.stored(param, layer);
        match self.table.band(param, layer) {
            None => stored.to_vec(),
            Some((band, layout)) => {
                let mut dense = vec![0.0; band.narrow() * band.wide()];
                band.unpack(stored, layout, &mut dense);
                dense
            }
        }
    }

    /// Overwrites one tensor from its dense matrix; what lies outside the band is dropped.
    ///
    /// # Panics
    /// When `dense` does not have the tensor's size: a fault of the caller.
    pub fn set_dense(&mut self, param: Param, layer: usize, dense: &[f32]) {
        let range = self.table.span(param, layer).range();
        match self.table.band(param, layer) {
            None => self.values[range].copy_from_slice(dense),
            Some((band, layout)) => band.pack(dense, layout, &mut self.values[range]),
        }
    }

    /// The same weights in the layout of another table: connections that it lacks are dropped, connections that this one lacked
    /// are zero, and all others keep their bits.
    ///
    /// # Errors
    /// As [`Weights::zeros_in`].
    pub fn laid_out(&self, config: &GptConfig, table: ParamTable) -> Result<Self> {
        let mut weights = Self::zeros_in(config, table)?;
        for index in 0..self.table.tensors().len() {
            let Tensor { param, layer, .. } = self.table.tensors()[index];
            match self.table.band(param, layer) == weights.table.band(param, layer) {
                true => weights.stored_mut(param, layer).copy_from_slice(self.stored(param, layer)),
                false => weights.set_dense(param, layer, &self.dense(param, layer)),
            }
        }
        Ok(weights)
    }

    /// The same weights for other bandwidths (0 is dense): connections that the new band lacks are dropped, connections
    /// that the old one lacked start at zero; a layer that was and stays learned, of the same density and start, keeps its
    /// blocks. Returns them with the share of each matrix's squared norm that was cut, 0..=1, FC1 first.
    ///
    /// # Errors
    /// A list of bandwidths that is not as long as the model is deep; bandwidths of any size are allowed.
    pub fn rebanded(&self, fc1_bandwidth: Bandwidths, fc2_bandwidth: Bandwidths) -> Result<(Self, [f64; 2])> {
        let config = GptConfig { fc1_bandwidth, fc2_bandwidth, ..self.config };
        let learned = learned_tensors(&self.config);
        let kept: Vec<_> = learned_tensors(&config).into_iter().filter(|tensor| learned.contains(tensor)).collect();
        let blocks = |param, layer| {
            let stays = kept.iter().any(|tensor| (tensor.0, tensor.1) == (param, layer));
            if stays { self.table.band(param, layer)?.0.blocks().cloned() } else { None }
        };
        let weights = self.laid_out(&config, ParamTable::with_blocks(&config, blocks)?)?;
        let cut = [Param::Fcw, Param::Fcprojw].map(|param| {
            let (before, after) = (self.squared_norm(param), weights.squared_norm(param));
            if before == 0.0 { 0.0 } else { (1.0 - after / before).max(0.0) }
        });
        Ok((weights, cut))
    }

    /// Multiplies every banded tensor by sqrt(dense / kept), connections counted: each output of a cut layer then has, of
    /// fresh weights, the variance that the dense layer would give it on average.
    pub fn rescale_cut(&mut self) {
        for tensor in self.table.tensors().to_vec() {
            if let Some((band, _)) = self.table.band(tensor.param, tensor.layer) {
                let factor = (1.0 / band.density()).sqrt() as f32;
                self.stored_mut(tensor.param, tensor.layer).iter_mut().for_each(|value| *value *= factor);
            }
        }
    }

    /// Sum of squares over all layers' tensors of one kind.
    fn squared_norm(&self, param: Param) -> f64 {
        let square = |layer| self.stored(param, layer).iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        (0..self.config.num_layers).map(square).sum()
    }
}

/// `len` draws from N(0, std^2), a stream of the generator for each tensor and each block of 2^16 values.
fn normal(seed: u64, tensor: usize, len: usize, std: f32) -> Vec<f32> {
    const BLOCK: usize = 1 << 16;
    let mut values = vec![0.0; len];
    values.par_chunks_mut(BLOCK).enumerate().for_each(|(block, values)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(((tensor as u64) << 32) | block as u64);
        let normal = Normal::new(0.0, std).expect("the standard deviation is finite and positive");
        values.iter_mut().for_each(|value| *value = normal.sample(&mut rng));
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::preset;

    #[test]
    fn a_banded_start_is_the_dense_start_masked() {
        let banded = preset("toy").unwrap().model;
        let dense = GptConfig { fc1_bandwidth: Bandwidths::DENSE, ..banded };
        let (dense, banded) = (Weights::init(&dense, 7).unwrap(), Weights::init(&banded, 7).unwrap());
        let (all, kept) = (dense.dense(Param::Fcw, 2), banded.dense(Param::Fcw, 2));
        let (band, _) = banded.table().band(Param::Fcw, 2).unwrap();
        for (index, (all, kept)) in all.iter().zip(&kept).enumerate() {
            let expected = if band.contains(index / 128, index % 128) { *all } else { 0.0 };
            assert_eq!(*kept, expected);
        }
        assert_eq!(dense.dense(Param::Wte, 0), banded.dense(Param::Wte, 0));
        let (rebanded, cut) = dense.rebanded(256.into(), Bandwidths::DENSE).unwrap();
        assert_eq!(rebanded.values(), banded.values());
        assert!(cut[0] > 0.5 && cut[0] < 0.6 && cut[1] == 0.0, "{cut:?}");
    }

    #[test]
    fn rescaling_restores_the_squared_norm() {
        let config = GptConfig { fc2_bandwidth: "64,0,128,256".parse().unwrap(), ..preset("toy").unwrap().model };
        let dense =
            Weights::init(&GptConfig { fc1_bandwidth: 0.into(), fc2_bandwidth: 0.into(), ..config }, 3).unwrap();
        let plain = Weights::init(&config, 3).unwrap();
        let mut rescaled = plain.clone();
        rescaled.rescale_cut();
        for param in [Param::Fcw, Param::Fcprojw] {
            let ratio = rescaled.squared_norm(param) / dense.squared_norm(param);
            assert!((ratio - 1.0).abs() < 0.02, "{ratio}");
        }
        assert_eq!(plain.stored(Param::Fcprojw, 1), rescaled.stored(Param::Fcprojw, 1));
        assert_eq!(plain.stored(Param::Qkvw, 1), rescaled.stored(Param::Qkvw, 1));
    }

    #[test]
    fn initial_weights_have_the_right_spread() {
        let weights = Weights::init(&preset("toy").unwrap().model, 1).unwrap();
        let deviation = |values: &[f32]| (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        assert!((deviation(weights.stored(Param::Qkvw, 0)) - 0.02).abs() < 5e-4);
        assert!((deviation(weights.stored(Param::Attprojw, 3)) - 0.02 / 8f32.sqrt()).abs() < 5e-4);
        assert!(weights.stored(Param::Ln1w, 1).iter().all(|&v| v == 1.0));
        let wte = weights.stored(Param::Wte, 0);
        assert!(wte[257 * 128..].iter().all(|&v| v == 0.0));
    }
}
