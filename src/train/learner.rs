//! Learned blocks in a training: which gradients they are judged by, and how a model comes to have others.

use crate::backend::Backend;
use crate::blocks::{BlockPattern, Blocks};
use crate::checkpoint::Moments;
use crate::error::{Error, Result};
use crate::learn::{LearnRule, block_norms, exchanged};
use crate::model::Model;
use crate::optim::Optimizer;
use crate::report::ExchangeRecord;
use crate::shapes::{Param, ParamTable, learned_tensors};
use crate::weights::Weights;
use crate::whole::WholeGradients;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Exchanges a model's learned blocks as a rule says.
pub struct Learner<B: Backend> {
    rule: LearnRule,
    whole: WholeGradients<B>,
}

impl<B: Backend> Learner<B> {
    /// A learner for a model; `None` when it learns no blocks.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(model: &mut Model<B>, rule: LearnRule) -> Result<Option<Self>> {
        Ok(WholeGradients::new(model)?.map(|whole| Self { rule, whole }))
    }

    /// Whether blocks are exchanged after this step: its micro-steps have to leave [`Learner::gradients`].
    pub fn is_due(&self, step: u64) -> bool {
        self.rule.is_due(step)
    }

    /// Whether blocks may be exchanged after a later step than this.
    pub fn goes_on_after(&self, step: u64) -> bool {
        self.rule.goes_on_after(step)
    }

    /// Where a step's micro-steps leave the gradients that blocks are judged by.
    pub fn gradients(&mut self) -> &mut WholeGradients<B> {
        &mut self.whole
    }

    /// Exchanges blocks after `step`. Those that stay keep weights and moments to the bit, those that are grown begin with zeros.
    ///
    /// # Errors
    /// The device failed, or has not enough memory.
    pub fn exchange(&self, model: &mut Model<B>, optimizer: &mut Optimizer<B>, step: u64) -> Result<ExchangeRecord> {
        let fraction = self.rule.fraction_after(step);
        let (config, weights) = (*model.config(), model.weights()?);
        let tensors = learned_tensors(&config);
        let gradients = tensors.iter().map(|&(param, layer, _)| self.whole.of(model, param, layer));
        let gradients = gradients.collect::<Result<Vec<_>>>()?;
        let judge = |(&(param, layer, _), gradient): (&(Param, usize, _), Option<Vec<f32>>)| {
            let (band, layout) = weights.table().band(param, layer)?;
            let norms = |matrix: &[f32]| block_norms(matrix, layout, band.narrow(), band.wide());
            Some(exchanged(band.blocks()?, fraction, &norms(&weights.dense(param, layer)), &norms(&gradient?)))
        };
        let judged: Option<Vec<Blocks>> = tensors.par_iter().zip(gradients).map(judge).collect();
        let judged = judged.ok_or_else(|| Error::Internal("a learned layer has no blocks".to_string()))?;
        let table = ParamTable::with_blocks(&config, |param, layer| {
            let index = tensors.iter().position(|tensor| (tensor.0, tensor.1) == (param, layer))?;
            Some(judged[index].clone())
        })?;
        let record = record(step, fraction, weights.table(), &table, &tensors);
        if record.count() > 0 {
            give(model, optimizer, &weights, table)?;
        }
        Ok(record)
    }
}

/// What an exchange changed.
fn record(
    step: u64,
    learn_fraction: f64,
    before: &ParamTable,
    after: &ParamTable,
    tensors: &[(Param, usize, BlockPattern)],
) -> ExchangeRecord {
    let (mut exchanged, mut learned) = (BTreeMap::new(), 0);
    for &(param, layer, _) in tensors {
        let [before, after] = [before, after].map(|table| table.band(param, layer).and_then(|(band, _)| band.blocks()));
        if let (Some(before), Some(after)) = (before, after) {
            learned += after.count();
            exchanged.insert(param.name_in(layer), after.count_beside(before));
        }
    }
    ExchangeRecord { step, learn_fraction, exchanged, learned }
}

/// Gives a model and its optimizer the layout of another table.
fn give<B: Backend>(
    model: &mut Model<B>,
    optimizer: &mut Optimizer<B>,
    weights: &Weights,
    table: ParamTable,
) -> Result<()> {
    let config = *model.config();
    let Moments { first, second } = optimizer.moments(model)?;
    model.set_weights(&weights.laid_out(&config, table.clone())?)?;
    let moments = Moments { first: first.laid_out(&config, table.clone())?, second: second.laid_out(&config, table)? };
    optimizer.follow(model, &moments)
}
