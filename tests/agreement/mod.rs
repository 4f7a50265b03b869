//! What every device backend is held to: each operation against the reference, and a training against itself.

use bandtrain::backend::Backend;
use bandtrain::backend::cpu::Cpu;
use bandtrain::config::{GptConfig, preset};
use bandtrain::model::{Activations, Model};
use bandtrain::optim::{Optimizer, Recipe};
use bandtrain::parity::{self, Row};
use bandtrain::shapes::Param;
use bandtrain::tolerance::{Tolerance, UNIT_F32, compare};
use bandtrain::weights::Weights;

/// The rows of the parity suite on this device; of the cases that have one of `only` in their name, if there are any.
///
/// # Panics
/// When one of them fails.
pub fn parity_rows<B: Backend>(mut device: B, only: &[&str]) -> Vec<Row> {
    let rows = parity::run(&mut device, &mut Cpu::new(), only).unwrap();
    let failed: Vec<String> = rows.iter().filter(|row| !row.passes()).map(ToString::to_string).collect();
    assert!(failed.is_empty(), "{} of {} rows disagree:\n{}", failed.len(), rows.len(), failed.join("\n"));
    rows
}

/// Losses, gradient norms and weights of a few steps of a small banded model, as bits: enough steps that a backend that replays
/// them does so.
pub fn trained_bits<B: Backend>(device: B) -> Vec<u32> {
    const STEPS: usize = 4;
    let config = GptConfig { num_layers: 2, fc2_bandwidth: 256.into(), ..preset("toy").unwrap().model };
    let mut model = Model::new(device, &Weights::init(&config, 3).unwrap()).unwrap();
    let mut acts = Activations::new(&mut model, 2, 100, true).unwrap();
    let mut optimizer = Optimizer::new(&mut model).unwrap();
    let tokens: Vec<u32> = (0..201 * STEPS as u32).map(|k| k * k % 65_521 * 7919 % 257).collect();
    let mut results = Vec::new();
    for batch in tokens.chunks(201) {
        for micro_step in 0..2 {
            model.upload_batch(&mut acts, &batch[..200], &batch[1..]).unwrap();
            optimizer.micro_step(&mut model, &mut acts, micro_step, 2).unwrap();
        }
        results.push(optimizer.update(&mut model, &Recipe::Stable.hyperparameters(), 1e-3).unwrap());
    }
    // Collected late: a step does not wait for the one before.
    let scalars: Vec<_> = results.into_iter().map(|result| result.collect(&mut model).unwrap()).collect();
    let weights = model.weights().unwrap();
    let scalars = scalars.into_iter().flat_map(|(loss, norm)| [loss, norm]);
    scalars.chain(weights.values().iter().copied()).map(f32::to_bits).collect()
}

/// Holds two runs' bits against each other; `what` names the runs.
///
/// # Panics
/// When they differ, saying where and by how much.
pub fn assert_same(first: &[u32], second: &[u32], what: &str) {
    assert_eq!(first.len(), second.len(), "{what}: one has more values");
    let different: Vec<usize> = (0..first.len()).filter(|&index| first[index] != second[index]).collect();
    let Some(&index) = different.first() else { return };
    let [a, b] = [first, second].map(|bits| f32::from_bits(bits[index]));
    panic!("{what}: {} of {} values differ, the first is value {index}: {a:e} and {b:e}", different.len(), first.len());
}

/// Holds the gradients of a model whose layers have other bandwidths and patterns each, some none, and an MLP of an odd width, to
/// the reference's, in fp32.
///
/// # Panics
/// When they differ by more than their tolerance.
pub fn check_uneven_layers<B: Backend>(device: B) {
    let fc1 = "64,0,strided:0.4,random:0.3:2".parse().unwrap();
    let fc2 = "random:0.6:1,8,190,strided:0.7".parse().unwrap();
    let toy = preset("toy").unwrap().model;
    let config = GptConfig { fc1_bandwidth: fc1, fc2_bandwidth: fc2, ..toy }.with_mlp_width(201);
    let weights = Weights::init(&config, 4).unwrap();
    let (actual, expected) = (gradients(device, &weights), gradients(Cpu::new(), &weights));
    let tolerance = Tolerance::of_gradient(UNIT_F32, &config, 50, 100).with_gelu();
    for tensor in weights.table().tensors() {
        let range = tensor.span.range();
        // The keys' biases shift all of a query's scores alike: their gradient is 0 but for rounding.
        let range = if tensor.param == Param::Qkvb { range.start..range.start + 128 } else { range };
        let worst = compare(&actual[range.clone()], &expected[range], tolerance);
        assert!(worst.ratio() <= 1.0, "{}: {worst}", tensor.name());
    }
}

fn gradients<B: Backend>(device: B, weights: &Weights) -> Vec<f32> {
    let mut model = Model::new(device, weights).unwrap();
    let mut acts = Activations::new(&mut model, 2, 50, true).unwrap();
    let mut optimizer = Optimizer::new(&mut model).unwrap();
    let tokens: Vec<u32> = (0..101).map(|k| k * k * 31 % 257).collect();
    model.upload_batch(&mut acts, &tokens[..100], &tokens[1..]).unwrap();
    optimizer.micro_step(&mut model, &mut acts, 0, 1).unwrap();
    optimizer.grads(&mut model).unwrap()
}
