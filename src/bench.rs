//! Timing a backend's operations and whole steps, by medians of repeated runs.

use crate::backend::{Affine, Backend, BiasGrad, Expansion, LinearDims, OpTime, Role, Write};
use crate::band::Band;
use crate::bandwidths::Bandwidths;
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::memory::MemoryEstimate;
use crate::model::{Activations, Model};
use crate::optim::{Optimizer, Recipe};
use crate::output;
use crate::shapes::Span;
use crate::weights::Weights;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::time::Instant;

/// One of the MLP's products, dense or banded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelTime {
    /// FC1 or FC2, and which of its products.
    pub product: &'static str,
    /// The band's bandwidth, 0 for dense.
    pub bandwidth: usize,
    /// Share of the dense layer's connections.
    pub density: f64,
    /// Median time of one run.
    pub milliseconds: f64,
    /// Useful arithmetic (exact band, no padding) per time.
    pub gflop_per_s: f64,
    /// Time over the dense product's time.
    pub of_dense: f64,
}

/// A whole training step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepTime {
    /// FC1's bandwidth, 0 for dense.
    pub fc1_bandwidth: Bandwidths,
    /// FC2's bandwidth, 0 for dense.
    pub fc2_bandwidth: Bandwidths,
    /// Median time of one step.
    pub milliseconds: f64,
    /// Tokens trained on per second.
    pub tok_per_s: f64,
    /// 6 x parameters x tokens over the time.
    pub gflop_per_s: f64,
    /// What each kernel of a step takes on the device, the longest first; `None` when the device does not tell.
    pub ops: Option<Vec<OpTime>>,
}

/// The products of FC1 and FC2 in the order they are measured.
const PRODUCTS: [&str; 6] = [
    "FC1 forward + GELU",
    "FC1 input gradient",
    "FC1 weight gradient",
    "FC2 forward",
    "FC2 input gradient x GELU'",
    "FC2 weight gradient",
];

/// Buffers of one MLP layer, enough for all its products.
struct Layer<B: Backend> {
    params: B::Buffer,
    grads: B::Buffer,
    narrow: B::Buffer,
    narrow_out: B::Buffer,
    wide: B::Buffer,
    wide_out: B::Buffer,
    pre: B::Buffer,
    weight: Span,
    wide_bias: Span,
    narrow_bias: Span,
}

impl<B: Backend> Layer<B> {
    /// `weight_len` weights and both biases, for M rows of N narrow and W wide elements.
    fn new(backend: &mut B, rows: usize, n: usize, w: usize, weight_len: usize) -> Result<Self> {
        let weight = Span { offset: 0, len: weight_len };
        let wide_bias = Span { offset: weight_len.next_multiple_of(64), len: w };
        let narrow_bias = Span { offset: (wide_bias.offset + w).next_multiple_of(64), len: n };
        let params = narrow_bias.offset + n;
        let mut filled = |role, name, len| {
            let mut rng = ChaCha8Rng::seed_from_u64(len as u64);
            let values: Vec<f32> = (0..len).map(|_| rng.random_range(-0.1..0.1)).collect();
            let mut buffer = backend.alloc(role, name, len)?;
            backend.upload(&mut buffer, 0, &values)?;
            Ok::<_, crate::Error>(buffer)
        };
        Ok(Self {
            params: filled(Role::Parameters, "parameters", params)?,
            grads: filled(Role::Gradients, "gradients", params)?,
            narrow: filled(Role::Activations, "narrow activations", rows * n)?,
            narrow_out: filled(Role::Activations, "narrow activations", rows * n)?,
            wide: filled(Role::Activations, "wide activations", rows * w)?,
            wide_out: filled(Role::Activations, "wide activations", rows * w)?,
            pre: filled(Role::Activations, "wide activations", rows * w)?,
            weight,
            wide_bias,
            narrow_bias,
        })
    }

    /// Records the dense product `index` of [`PRODUCTS`].
    fn dense(&mut self, backend: &mut B, index: usize, rows: usize, n: usize, w: usize) -> Result<()> {
        let fc1 = LinearDims { rows, inputs: n, outputs: w };
        let fc2 = LinearDims { rows, inputs: w, outputs: n };
        let affine1 = Affine { weight: self.weight, bias: self.wide_bias };
        let affine2 = Affine { weight: self.weight, bias: self.narrow_bias };
        let Self { params, grads, narrow, narrow_out, wide, wide_out, pre, weight, .. } = self;
        match index {
            0 => backend.linear_forward(wide_out, Some(pre), narrow, params, affine1, fc1),
            1 => backend.linear_backward_input(narrow_out, wide, params, *weight, None, fc1),
            2 => backend.linear_backward_weight(grads, affine1, wide, narrow, fc1, Write::Set),
            3 => backend.linear_forward(narrow_out, None, wide, params, affine2, fc2),
            4 => backend.linear_backward_input(wide_out, narrow, params, *weight, Some(pre), fc2),
            _ => backend.linear_backward_weight(grads, affine2, narrow, wide, fc2, Write::Set),
        }
    }

    /// Records the banded product `index` of [`PRODUCTS`].
    fn banded(&mut self, backend: &mut B, index: usize, table: &B::Table, rows: usize) -> Result<()> {
        let (bias1, bias2) = (self.wide_bias, self.narrow_bias);
        let Self { params, grads, narrow, narrow_out, wide, wide_out, pre, weight, .. } = self;
        let panels = *weight;
        match index {
            0 => {
                let expansion = Expansion::BiasGelu { bias: bias1, pre };
                backend.band_expand(wide_out, narrow, params, panels, table, rows, expansion)
            }
            1 => backend.band_contract(narrow_out, wide, params, panels, table, rows, None),
            2 => backend.band_outer(grads, panels, BiasGrad::Wide(bias1), wide, narrow, table, rows, Write::Set),
            3 => backend.band_contract(narrow_out, wide, params, panels, table, rows, Some(bias2)),
            4 => {
                let expansion = Expansion::GeluBackward { pre };
                backend.band_expand(wide_out, narrow, params, panels, table, rows, expansion)
            }
            _ => backend.band_outer(grads, panels, BiasGrad::Narrow(bias2), wide, narrow, table, rows, Write::Set),
        }
    }
}

/// Times each product of an MLP of C channels on M rows, dense and at each bandwidth, dense and banded runs in turn so
/// that both see the same state of the machine. `progress` is told the share done.
///
/// # Errors
/// Sizes that are no band or that the device's memory cannot hold; the device fails.
pub fn kernels<B: Backend>(
    backend: &mut B,
    channels: usize,
    rows: usize,
    bandwidths: &[usize],
    repeats: usize,
    mut progress: impl FnMut(f64),
) -> Result<Vec<KernelTime>> {
    let (n, w) = (channels, 4 * channels);
    check_kernels(backend, rows, n, w, 1 + bandwidths.len())?;
    let mut dense = Layer::new(backend, rows, n, w, n * w)?;
    let mut banded = Vec::new();
    for &bandwidth in bandwidths {
        let band = Band::new(n, w, bandwidth)?;
        let table = backend.band_table(&band)?;
        banded.push((Layer::new(backend, rows, n, w, band.packed_len())?, table, band));
    }
    let mut times = Vec::new();
    for (index, product) in PRODUCTS.into_iter().enumerate() {
        let mut samples = vec![Vec::with_capacity(repeats); 1 + banded.len()];
        let mut runs = vec![1; samples.len()];
        // The first round warms up, the second tells how long a run takes.
        for round in 0..repeats + 2 {
            let mut took = vec![timed(backend, runs[0], |backend| dense.dense(backend, index, rows, n, w))?];
            for ((layer, table, _), &runs) in banded.iter_mut().zip(&runs[1..]) {
                took.push(timed(backend, runs, |backend| layer.banded(backend, index, table, rows))?);
            }
            match round {
                0 => {}
                1 => runs = took.into_iter().map(runs_per_wait).collect(),
                _ => samples.iter_mut().zip(took).for_each(|(samples, took)| samples.push(took)),
            }
        }
        let medians: Vec<f64> = samples.into_iter().map(median).collect();
        let densities = std::iter::once((0, 1.0)).chain(banded.iter().map(|(_, _, b)| (b.bandwidth(), b.density())));
        for ((bandwidth, density), seconds) in densities.zip(&medians) {
            times.push(KernelTime {
                product,
                bandwidth,
                density,
                milliseconds: seconds * 1e3,
                gflop_per_s: 2.0 * (rows * n * w) as f64 * density / seconds / 1e9,
                of_dense: seconds / medians[0],
            });
        }
        progress((index + 1) as f64 / PRODUCTS.len() as f64);
    }
    Ok(times)
}

/// Refuses layers of M rows, N narrow and W wide elements that the device's free memory cannot hold.
fn check_kernels<B: Backend>(backend: &B, rows: usize, n: usize, w: usize, layers: usize) -> Result<()> {
    // In f64, which no size on a command line overflows. The host keeps a copy of a buffer while it is filled.
    let elements = |narrow: f64, wide: f64| 2.0 * narrow * wide + rows as f64 * (2.0 * narrow + 4.0 * wide);
    let needed = 4.0 * layers as f64 * elements(n as f64, w as f64);
    match backend.free_bytes() {
        Some(free) if needed > free as f64 => Err(Error::Device(format!(
            "timing {rows} rows of {n} channels takes {} of memory, but {} are free on {}; choose a smaller \
             --rows or --channels",
            // A size beyond 64 bits is shown as the largest.
            output::bytes(needed as usize),
            output::bytes(free),
            backend.description()
        ))),
        _ => Ok(()),
    }
}

/// Times whole training steps of `config` on random tokens.
///
/// # Errors
/// The device has not enough memory or fails.
pub fn step<B: Backend>(backend: B, config: &GptConfig, b: usize, t: usize, repeats: usize) -> Result<StepTime> {
    MemoryEstimate::check(&backend, config, b, t)?;
    let mut model = Model::new(backend, &Weights::init(config, 1)?)?;
    let time = time_steps(&mut model, config, b, t, repeats);
    time.map_err(|error| MemoryEstimate::advise(model.backend(), config, b, t, error))
}

fn time_steps<B: Backend>(
    model: &mut Model<B>,
    config: &GptConfig,
    b: usize,
    t: usize,
    repeats: usize,
) -> Result<StepTime> {
    let mut acts = Activations::new(model, b, t, true)?;
    let mut optimizer = Optimizer::new(model)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let tokens: Vec<u32> = (0..=b * t).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
    let mut one_step = |model: &mut Model<B>| -> Result<f64> {
        let start = Instant::now();
        model.upload_batch(&mut acts, &tokens[..b * t], &tokens[1..])?;
        optimizer.micro_step(model, &mut acts, 0, 1)?;
        optimizer.update(model, &Recipe::Stable.hyperparameters(), 1e-4)?.collect(model)?;
        Ok(start.elapsed().as_secs_f64())
    };
    // The first one warms up.
    one_step(model)?;
    let samples = (0..repeats).map(|_| one_step(model)).collect::<Result<Vec<_>>>()?;
    // Apart from the others: timing each kernel takes time itself.
    let ops = match model.backend().profile_start()? {
        false => None,
        true => {
            one_step(model)?;
            Some(model.backend().profile_finish()?)
        }
    };
    let seconds = median(samples);
    let flops = 6.0 * model.table().count(config) as f64 * (b * t) as f64;
    Ok(StepTime {
        fc1_bandwidth: config.fc1_bandwidth,
        fc2_bandwidth: config.fc2_bandwidth,
        milliseconds: seconds * 1e3,
        tok_per_s: (b * t) as f64 / seconds,
        gflop_per_s: flops / seconds / 1e9,
        ops: ops.map(longest_first),
    })
}

fn longest_first(mut ops: Vec<OpTime>) -> Vec<OpTime> {
    ops.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    ops
}

/// Seconds that each of `count` times the same recorded work takes until the device is idle.
fn timed<B: Backend>(backend: &mut B, count: usize, mut work: impl FnMut(&mut B) -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..count {
        work(backend)?;
    }
    backend.sync()?;
    Ok(start.elapsed().as_secs_f64() / count as f64)
}

/// How often work that takes `seconds` is run before the device is waited for: a wait can take as long as a small kernel,
/// and a training does not wait for each.
fn runs_per_wait(seconds: f64) -> usize {
    const LEAST_SECONDS: f64 = 0.01;
    ((LEAST_SECONDS / seconds.max(1e-9)) as usize).clamp(1, 100)
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples[samples.len() / 2]
}
