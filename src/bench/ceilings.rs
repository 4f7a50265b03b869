//! What a device can do at most, measured.

use super::filled;
use super::turns::in_turns;
use super::work::{Stored, Work};
use crate::backend::{AdamWStep, Affine, Backend, LinearDims, Normed, OptimizerState, Role};
use crate::error::Result;
use crate::shapes::Span;
use serde::Serialize;

/// The rates that floors and shares of a device's abilities refer to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ceilings {
    /// Arithmetic of products, in 1e9 floating-point operations a second.
    pub gflop_per_s: f64,
    /// How that was measured.
    pub gflop_per_s_of: String,
    /// Memory read and written, in 1e9 bytes a second.
    pub gb_per_s: f64,
    /// How that was measured.
    pub gb_per_s_of: String,
}

/// Samples of each measurement.
const REPEATS: usize = 5;
/// A size is not measured where one run of it would take longer than this.
const MOST_SECONDS: f64 = 0.08;
/// Bytes of the largest buffer of activations: what every adapter allows a kernel at once.
const MOST_BINDING: usize = 128 << 20;
/// Bytes that the memory's rate is measured over, at most: several times any cache.
const MOST_MOVED: usize = 1 << 30;
/// Channels of the rows that are moved.
const CHANNELS: usize = 1024;

impl Ceilings {
    /// Measures them: the arithmetic by dense products of growing square matrices, the memory by an optimizer's update and
    /// by residual additions with LayerNorm, over as much memory as there is room and time for.
    ///
    /// # Errors
    /// The device fails or has not even room for small matrices.
    pub fn measure<B: Backend>(backend: &mut B) -> Result<Self> {
        let (flop_per_s, size) = fastest_product(backend)?;
        let (byte_per_s, mover, bytes) = fastest_mover(backend)?;
        Ok(Self {
            gflop_per_s: flop_per_s / 1e9,
            gflop_per_s_of: format!("dense product {size} x {size} x {size} with bias"),
            gb_per_s: byte_per_s / 1e9,
            gb_per_s_of: format!("{mover}, {:.0} MB a run", bytes / 1e6),
        })
    }

    /// The seconds below which no implementation of an operation gets: what its bytes take at the measured rate, or its
    /// FLOPs, whichever is longer.
    pub fn floor_seconds(&self, work: Work) -> f64 {
        (work.bytes / (self.gb_per_s * 1e9)).max(work.flops / (self.gflop_per_s * 1e9))
    }
}

/// The seconds of the fastest of [`REPEATS`] runs: a ceiling is what can be reached.
fn fastest<B: Backend>(backend: &mut B, mut run: impl FnMut(&mut B) -> Result<()>) -> Result<f64> {
    let samples = in_turns(backend, REPEATS, 1, 1, |backend, _, _| run(backend))?;
    Ok(samples.into_iter().flatten().fold(f64::INFINITY, f64::min))
}

/// Whether `bytes` are free three times over.
fn has_room<B: Backend>(backend: &B, bytes: usize) -> bool {
    backend.free_bytes().is_none_or(|free| bytes < free / 3)
}

/// The highest rate, in FLOP/s, of a square product, and its size.
fn fastest_product<B: Backend>(backend: &mut B) -> Result<(f64, usize)> {
    let mut fastest = (0.0, 0);
    let mut size = 256;
    loop {
        let seconds = product_seconds(backend, size)?;
        let rate = 2.0 * (size as f64).powi(3) / seconds;
        if rate > fastest.0 {
            fastest = (rate, size);
        }
        size *= 2;
        let bytes = |role| size * size * backend.element_bytes(role);
        let (matrix, weights) = (bytes(Role::Activations), bytes(Role::Parameters));
        if matrix > MOST_BINDING || 8.0 * seconds > MOST_SECONDS || !has_room(backend, 2 * matrix + weights) {
            return Ok(fastest);
        }
    }
}

fn product_seconds<B: Backend>(backend: &mut B, size: usize) -> Result<f64> {
    let (weight, bias) = (Span { offset: 0, len: size * size }, Span { offset: size * size, len: size });
    let params = filled(backend, Role::Parameters, "parameters", size * size + size)?;
    let inp = filled(backend, Role::Activations, "activations", size * size)?;
    let mut out = backend.alloc(Role::Activations, "activations", size * size)?;
    let dims = LinearDims { rows: size, inputs: size, outputs: size };
    fastest(backend, |backend| backend.linear_forward(&mut out, None, &inp, &params, Affine { weight, bias }, dims))
}

/// The highest rate, in byte/s, at which an operation without products moves memory, the operation, and its bytes.
fn fastest_mover<B: Backend>(backend: &mut B) -> Result<(f64, &'static str, f64)> {
    let stored = Stored::of(backend);
    let mut bytes = 4 << 20;
    loop {
        let (update, addition) = (update_seconds(backend, stored, bytes)?, addition_seconds(backend, stored, bytes)?);
        let slowest = update.1.max(addition.1);
        let next = 4 * bytes;
        if next > MOST_MOVED || 4.0 * slowest > MOST_SECONDS || !has_room(backend, next) {
            // Smaller ones may have been in a cache: the last ones count.
            let rate = |(work, seconds): (Work, f64)| work.bytes / seconds;
            return Ok(match rate(update) > rate(addition) {
                true => (rate(update), "optimizer's update", update.0.bytes),
                false => (rate(addition), "residual addition with LayerNorm", addition.0.bytes),
            });
        }
        bytes = next;
    }
}

/// AdamW of so many weights that it moves about `bytes`.
fn update_seconds<B: Backend>(backend: &mut B, stored: Stored, bytes: usize) -> Result<(Work, f64)> {
    let len = bytes / stored.adamw(1, false).bytes as usize;
    let mut params = filled(backend, Role::Parameters, "parameters", len)?;
    let grads = filled(backend, Role::Gradients, "gradients", len)?;
    let mut m = filled(backend, Role::Moments, "first moments", len)?;
    let mut v = backend.alloc(Role::Moments, "second moments", len)?;
    let mut norm = backend.alloc(Role::Statistics, "norm", 1)?;
    let plan = backend.adamw_plan(&[Span { offset: 0, len }], len)?;
    backend.grad_norm(&mut norm, &grads)?;
    let seconds = fastest(backend, |backend| {
        let state = OptimizerState { params: &mut params, m: &mut m, v: &mut v };
        backend.adamw_step(state, &grads, &norm, &plan, &ADAMW)
    })?;
    Ok((stored.adamw(len, false), seconds))
}

/// An update like any other.
pub(super) const ADAMW: AdamWStep = AdamWStep {
    step: 10,
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: crate::optim::EPS,
    weight_decay: 0.0,
    grad_clip: 1.0,
};

/// Residual additions with LayerNorm of so many rows that they move about `bytes`.
fn addition_seconds<B: Backend>(backend: &mut B, stored: Stored, bytes: usize) -> Result<(Work, f64)> {
    let row = 4 * CHANNELS * stored.activation;
    let rows = (bytes.min(4 * MOST_BINDING) / row).max(1);
    let (weight, bias) = (Span { offset: 0, len: CHANNELS }, Span { offset: CHANNELS, len: CHANNELS });
    let params = filled(backend, Role::Parameters, "parameters", 2 * CHANNELS)?;
    let x = filled(backend, Role::Activations, "activations", rows * CHANNELS)?;
    let branch = filled(backend, Role::Activations, "activations", rows * CHANNELS)?;
    let mut residual = backend.alloc(Role::Activations, "activations", rows * CHANNELS)?;
    let mut out = backend.alloc(Role::Activations, "activations", rows * CHANNELS)?;
    let mut mean = backend.alloc(Role::Statistics, "means", rows)?;
    let mut rstd = backend.alloc(Role::Statistics, "deviations", rows)?;
    let affine = Affine { weight, bias };
    let seconds = fastest(backend, |backend| {
        let normed = Normed { out: &mut out, mean: &mut mean, rstd: &mut rstd };
        backend.residual_layernorm_forward(&mut residual, normed, &x, &branch, &params, affine, rows)
    })?;
    Ok((stored.layernorm(rows, CHANNELS, 4), seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_is_what_takes_longer() {
        let text = String::new;
        let ceilings = Ceilings { gflop_per_s: 10.0, gflop_per_s_of: text(), gb_per_s: 2.0, gb_per_s_of: text() };
        assert_eq!(ceilings.floor_seconds(Work { flops: 1e10, bytes: 1e9 }), 1.0);
        assert_eq!(ceilings.floor_seconds(Work { flops: 1e9, bytes: 1e9 }), 0.5);
    }
}
