//! Whole training steps, as the trainer runs them.

use super::Ceilings;
use super::groups::{GroupTime, group_times};
use super::median;
use super::timed::{HOST_CLOCK, Timed};
use crate::backend::{Backend, Device, OpTime};
use crate::bandwidths::Bandwidths;
use crate::config::GptConfig;
use crate::error::Result;
use crate::memory::MemoryEstimate;
use crate::model::{Activations, Model};
use crate::optim::{Optimizer, Recipe};
use crate::shapes::{Param, ParamTable};
use crate::weights::Weights;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::time::Instant;

/// What steps to time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Steps {
    /// The model.
    pub config: GptConfig,
    /// B.
    pub batch: usize,
    /// T.
    pub tokens: usize,
    /// Steps that count.
    pub repeats: usize,
}

/// A whole training step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepTime {
    /// FC1's bandwidth, 0 for dense.
    pub fc1_bandwidth: Bandwidths,
    /// FC2's bandwidth, 0 for dense.
    pub fc2_bandwidth: Bandwidths,
    /// Weights that exist.
    pub parameters: usize,
    /// Median time of one step.
    pub milliseconds: f64,
    /// Tokens trained on per second.
    pub tok_per_s: f64,
    /// [`model_flops`] over the time.
    pub gflop_per_s: f64,
    /// That over the measured rate of products ([`Ceilings::gflop_per_s`]).
    pub mfu: f64,
    /// That over the rate that the user gave as the device's peak; `None` without one.
    pub mfu_of_peak: Option<f64>,
    /// Bytes of all buffers, by the shape tables.
    pub estimated_bytes: usize,
    /// By how much the device's free memory fell, whoever took it; `None` where the device does not tell or it rose.
    pub measured_bytes: Option<usize>,
    /// Who timed the groups and operations: the device itself, or the host, which waits for each operation then.
    pub timed_by: &'static str,
    /// What each group of operations takes, in one further step.
    pub groups: Vec<GroupTime>,
    /// The same of each kernel, the longest first.
    pub ops: Vec<OpTime>,
}

/// The FLOPs that a step of B sequences of T tokens needs, however it is computed: two for each weight of a product and token
/// in the forward pass and four in the backward pass (the exact band, the head without padding), and as many for each pair of
/// factors of causal attention. The scores that a backward pass computes once more are not counted, nor is what is no product.
///
/// # Errors
/// Sizes that do not fit each other.
pub fn model_flops(config: &GptConfig, batch: usize, tokens: usize) -> Result<f64> {
    let table = ParamTable::new(config)?;
    let products = [Param::Wte, Param::Qkvw, Param::Attprojw, Param::Fcw, Param::Fcprojw];
    let weights: f64 = products.into_iter().map(|param| table.weights(config, param) as f64).sum();
    let attention = (config.num_layers * config.channels) as f64 * (tokens + 1) as f64;
    Ok(6.0 * (weights + attention) * batch as f64 * tokens as f64)
}

/// Times whole training steps on random tokens. `peak_flop_per_s` is what the user says of the device.
///
/// # Errors
/// The device has not enough memory or fails.
pub fn step<B: Backend>(
    backend: B,
    steps: Steps,
    ceilings: &Ceilings,
    peak_flop_per_s: Option<f64>,
) -> Result<StepTime> {
    let Steps { config, batch, tokens, .. } = steps;
    let flops = model_flops(&config, batch, tokens)?;
    MemoryEstimate::check(&backend, &config, batch, tokens)?;
    let estimated_bytes = MemoryEstimate::new(&backend, &config, batch, tokens)?.total();
    let free_before = backend.free_bytes();
    let mut model = Model::new(Timed::new(backend, &config), &Weights::init(&config, 1)?)?;
    let run = match run_steps(&mut model, steps) {
        Ok(run) => run,
        Err(error) => return Err(MemoryEstimate::advise(model.backend(), &config, batch, tokens, error)),
    };
    let Run { seconds, free_after, ops } = run;
    let flop_per_s = flops / seconds;
    Ok(StepTime {
        fc1_bandwidth: config.fc1_bandwidth,
        fc2_bandwidth: config.fc2_bandwidth,
        parameters: model.table().count(&config),
        milliseconds: seconds * 1e3,
        tok_per_s: (batch * tokens) as f64 / seconds,
        gflop_per_s: flop_per_s / 1e9,
        mfu: flop_per_s / (ceilings.gflop_per_s * 1e9),
        mfu_of_peak: peak_flop_per_s.map(|peak| flop_per_s / peak),
        estimated_bytes,
        measured_bytes: free_before.zip(free_after).and_then(|(before, after)| before.checked_sub(after)),
        timed_by: if ops.iter().any(|op| op.kernel == HOST_CLOCK) { "host" } else { "device" },
        groups: group_times(&ops),
        ops: longest_first(ops),
    })
}

/// What was measured of steps.
struct Run {
    seconds: f64,
    /// While everything that a training needs is there.
    free_after: Option<usize>,
    ops: Vec<OpTime>,
}

fn run_steps<B: Backend>(model: &mut Model<Timed<B>>, steps: Steps) -> Result<Run> {
    let Steps { config, batch: b, tokens: t, repeats } = steps;
    let mut acts = Activations::new(model, b, t, true)?;
    let mut optimizer = Optimizer::new(model)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let tokens: Vec<u32> = (0..=b * t).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
    let mut record = |model: &mut Model<Timed<B>>| {
        model.upload_batch(&mut acts, &tokens[..b * t], &tokens[1..])?;
        optimizer.micro_step(model, &mut acts, 0, 1)?;
        optimizer.update(model, &Recipe::Stable.hyperparameters(), 1e-4)
    };
    // Some devices make a step that comes again ready for being replayed, and each is collected while the next is running.
    let warm_up = if B::SYNCHRONOUS { 1 } else { 4 };
    let mut samples = Vec::with_capacity(repeats);
    let (mut pending, mut clock) = (None, Instant::now());
    for step in 0..warm_up + repeats {
        let result = record(model)?;
        let before = if B::SYNCHRONOUS { Some(result) } else { pending.replace(result) };
        let Some(before) = before else { continue };
        before.collect(model)?;
        if step >= warm_up {
            samples.push(clock.elapsed().as_secs_f64());
        }
        clock = Instant::now();
    }
    if let Some(last) = pending {
        last.collect(model)?;
    }
    let free_after = model.backend().free_bytes();
    // Apart from the others: timing each kernel takes time itself.
    model.backend().profile_start()?;
    record(model)?.collect(model)?;
    let ops = model.backend().profile_finish()?;
    Ok(Run { seconds: median(samples), free_after, ops })
}

fn longest_first(mut ops: Vec<OpTime>) -> Vec<OpTime> {
    ops.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    ops
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::preset;

    #[test]
    fn the_experiments_step_takes_its_flops() {
        let dense = preset("tinystories-51m").unwrap().model;
        // 50257 x 512 of the head, 8 blocks of 12 x 512^2; 16 sequences of 512 x 513 / 2 pairs, 8 blocks of 512 channels.
        let weights = 6.0 * 8192.0 * (50257.0 * 512.0 + 8.0 * 12.0 * 512.0 * 512.0);
        let attention = 12.0 * 8.0 * 512.0 * 16.0 * (512.0 * 513.0 / 2.0);
        assert_eq!(model_flops(&dense, 16, 512).unwrap(), weights + attention);
        let banded = GptConfig { fc1_bandwidth: 1024.into(), ..dense };
        let saved = 6.0 * 8192.0 * 8.0 * (1_048_576.0 - 459_136.0);
        assert_eq!(model_flops(&banded, 16, 512).unwrap(), weights + attention - saved);
    }
}
