//! Whole training steps against float64 reference runs (tests/golden): logits, gradients, ten losses, final parameters.

use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::{Backend, Device, Role, Write};
use bandtrain::config::{GptConfig, padded_vocab};
use bandtrain::model::{Activations, Model};
use bandtrain::optim::{Hyperparameters, Optimizer};
use bandtrain::shapes::{Param, Tensor};
use bandtrain::tolerance::{self, Tolerance, UNIT_F32};
use bandtrain::weights::Weights;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// Largest relative error of a loss: the contract.
const LOSS_TOLERANCE: f64 = 2e-5;

/// A golden run, read straight from its files so that no reader of the crate stands between.
struct Golden {
    config: GptConfig,
    batch: usize,
    steps: usize,
    learning_rate: f64,
    hyper: Hyperparameters,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    weights: Weights,
    tokens: Vec<u32>,
    tensors: Vec<u8>,
}

impl Golden {
    fn load(name: &str) -> Self {
        let file = |suffix: &str| -> PathBuf {
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.{suffix}"))
        };
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file("json")).unwrap()).unwrap();
        let int = |key: &str| json[key].as_u64().unwrap() as usize;
        let float = |key: &str| json[key].as_f64().unwrap();
        let floats = |key: &str| json[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>();
        let config = GptConfig {
            channels: int("C"),
            num_layers: int("L"),
            num_heads: int("NH"),
            max_seq_len: int("T"),
            vocab_size: int("V"),
            padded_vocab_size: padded_vocab(int("V")),
            mlp_width: None,
            fc1_bandwidth: int("fc1_bandwidth").into(),
            fc2_bandwidth: int("fc2_bandwidth").into(),
        };
        assert_eq!(float("eps"), bandtrain::optim::EPS);
        let mut golden = Self {
            config,
            batch: int("B"),
            steps: int("steps"),
            learning_rate: float("lr"),
            hyper: Hyperparameters {
                beta1: float("beta1"),
                beta2: float("beta2"),
                weight_decay: float("weight_decay"),
                grad_clip: 0.0,
            },
            losses: floats("losses"),
            grad_norms: floats("grad_norms"),
            weights: Weights::zeros(&config).unwrap(),
            tokens: Vec::new(),
            tensors: std::fs::read(file("golden.safetensors")).unwrap(),
        };
        let model = std::fs::read(file("model.bin")).unwrap();
        let mut values = model[1024..].chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        for tensor in golden.weights.table().tensors().to_vec() {
            let (rows, cols) = tensor.param.shape(&config);
            let dense: Vec<f32> = values.by_ref().take(rows * cols).collect();
            golden.weights.set_dense(tensor.param, tensor.layer, &dense);
        }
        assert!(values.next().is_none(), "{name}.model.bin holds more than the model");
        let data = std::fs::read(file("train.bin")).unwrap();
        golden.tokens = data[1024..].chunks(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
        golden
    }

    /// A dense reference tensor of one layer, packed as the model's own when that one is banded.
    fn stored(&self, prefix: &str, tensor: Tensor) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = tensors.tensor(&format!("{prefix}.{}", tensor.param.name())).unwrap();
        let values: Vec<f32> = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let (rows, cols) = tensor.param.shape(&self.config);
        let dense = &values[tensor.layer * rows * cols..][..rows * cols];
        let mut weights = Weights::zeros(&self.config).unwrap();
        weights.set_dense(tensor.param, tensor.layer, dense);
        weights.stored(tensor.param, tensor.layer).to_vec()
    }

    fn logits(&self) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = tensors.tensor("logits").unwrap();
        view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// The losses of the first batch's rows, from the reference's logits.
    fn row_losses(&self) -> Vec<f32> {
        let logits = self.logits();
        let rows = logits.chunks(self.config.vocab_size).zip(self.batch(0).1);
        let loss = |(logits, &target): (&[f32], &u32)| {
            let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            (sum.ln() - f64::from(logits[target as usize])) as f32
        };
        rows.map(loss).collect()
    }

    fn rows(&self) -> usize {
        self.batch * self.config.max_seq_len
    }

    fn batch(&self, step: usize) -> (&[u32], &[u32]) {
        let tokens = &self.tokens[step * self.rows()..][..self.rows() + 1];
        (&tokens[..self.rows()], &tokens[1..])
    }

    /// The error a gradient element may have: relative to itself and to its tensor's root mean square.
    fn gradient_error(&self, unit: f64, expected: &[f32]) -> impl Fn(usize) -> f64 {
        let tolerance = Tolerance::of_gradient(unit, &self.config, self.config.max_seq_len, self.rows()).0;
        let rms = tolerance::root_mean_square(expected);
        let magnitudes: Vec<f64> = expected.iter().map(|&g| f64::from(g).abs()).collect();
        move |index| tolerance * (magnitudes[index] + rms)
    }
}

/// Holds a backend against a golden run: logits, gradients, losses, norms and parameters.
pub fn check<B: Backend>(backend: B, name: &str, unit: f64) {
    let golden = Golden::load(name);
    let (config, t) = (golden.config, golden.config.max_seq_len);
    let mut model = Model::new(backend, &golden.weights).unwrap();
    let mut acts = Activations::new(&mut model, golden.batch, t, true).unwrap();

    let logits = model.logits(&mut acts, golden.batch(0).0).unwrap();
    let worst = tolerance::compare(&logits, &golden.logits(), Tolerance::of_forward(unit, &config, t));
    assert!(worst.ratio() <= 1.0, "{name} logits, {worst}");

    let (inputs, targets) = golden.batch(0);
    model.upload_batch(&mut acts, inputs, targets).unwrap();
    let losses = model.losses(&mut acts).unwrap();
    let worst = tolerance::compare(&losses, &golden.row_losses(), Tolerance::of_forward(unit, &config, t));
    assert!(worst.ratio() <= 1.0, "{name} losses of rows, {worst}");

    let mut optimizer = Optimizer::new(&mut model).unwrap();
    for step in 0..golden.steps {
        let (inputs, targets) = golden.batch(step);
        model.upload_batch(&mut acts, inputs, targets).unwrap();
        optimizer.micro_step(&mut model, &mut acts, 0, 1).unwrap();
        if step == 0 {
            let grads = optimizer.grads(&mut model).unwrap();
            for tensor in golden.weights.table().tensors() {
                let expected = golden.stored("grad", *tensor);
                let worst =
                    tolerance::worst(&grads[tensor.span.range()], &expected, golden.gradient_error(unit, &expected));
                assert!(worst.ratio() <= 1.0, "{name} gradient of {:?} {}, {worst}", tensor.param, tensor.layer);
            }
        }
        let result = optimizer.update(&mut model, &golden.hyper, golden.learning_rate).unwrap();
        let (loss, norm) = result.collect(&mut model).unwrap();
        let error = (f64::from(loss) / golden.losses[step] - 1.0).abs();
        assert!(error <= LOSS_TOLERANCE, "{name} loss of step {step}: {loss}, not {}", golden.losses[step]);
        let error = (f64::from(norm) / golden.grad_norms[step] - 1.0).abs();
        assert!(error <= 1e-4, "{name} gradient norm of step {step}: {norm}, not {}", golden.grad_norms[step]);
        if step == 0 || step + 1 == golden.steps {
            check_parameters(&golden, &mut model, step + 1, name, unit);
        }
    }
    check_band(&model.weights().unwrap(), name);
}

/// Holds a backend of low precision against a golden run: the losses of all steps, and the band. Each layer rounds about ten
/// activations and weights on the way to the logits; a loss is a mean over all rows, whose errors are independent. The weights'
/// own errors are of a higher order: an update is a small part of a weight.
#[allow(dead_code)] // for the tests of backends that have such a precision
pub fn follow<B: Backend>(backend: B, name: &str) {
    let golden = Golden::load(name);
    let t = golden.config.max_seq_len;
    let mut model = Model::new(backend, &golden.weights).unwrap();
    let unit = model.backend().arithmetic().operand_unit();
    let tolerance = Tolerance::of_sums(unit, [10 * golden.config.num_layers]).0 / (golden.rows() as f64).sqrt();
    let mut acts = Activations::new(&mut model, golden.batch, t, true).unwrap();
    let mut optimizer = Optimizer::new(&mut model).unwrap();
    for step in 0..golden.steps {
        let (inputs, targets) = golden.batch(step);
        model.upload_batch(&mut acts, inputs, targets).unwrap();
        optimizer.micro_step(&mut model, &mut acts, 0, 1).unwrap();
        let result = optimizer.update(&mut model, &golden.hyper, golden.learning_rate).unwrap();
        let (loss, _) = result.collect(&mut model).unwrap();
        let error = (f64::from(loss) / golden.losses[step] - 1.0).abs();
        assert!(error <= tolerance, "{name} loss of step {step}: {loss}, not {} ({error:e})", golden.losses[step]);
    }
    check_band(&model.weights().unwrap(), name);
}

/// Parameters after `steps` updates.
fn check_parameters<B: Backend>(golden: &Golden, model: &mut Model<B>, steps: usize, name: &str, unit: f64) {
    let weights = model.weights().unwrap();
    for tensor in golden.weights.table().tensors() {
        let expected = golden.stored(&format!("step{steps}"), *tensor);
        let g1 = golden.stored("grad", *tensor);
        let dg = golden.gradient_error(unit, &g1);
        let allowed = |index: usize| {
            let carried = Tolerance::of_adamw(golden.learning_rate, steps, f64::from(g1[index]), dg(index));
            carried + 2.0 * unit * steps as f64 * f64::from(expected[index]).abs()
        };
        let worst = tolerance::worst(weights.stored(tensor.param, tensor.layer), &expected, allowed);
        assert!(worst.ratio() <= 1.0, "{name} {:?} {} after {steps} steps, {worst}", tensor.param, tensor.layer);
    }
}

/// Exact zeros outside the band, and in the padded rows of the embedding.
fn check_band(weights: &Weights, name: &str) {
    for tensor in weights.table().tensors() {
        let stored = weights.stored(tensor.param, tensor.layer);
        if let Some((band, _)) = weights.table().band(tensor.param, tensor.layer) {
            for panel in band.panels() {
                for slot in 0..panel.len() {
                    let value = stored[panel.offset + slot];
                    assert!(
                        band.slot(panel, slot).is_some() || value.to_bits() == 0,
                        "{name}: {value} outside the band"
                    );
                }
            }
        }
        if tensor.param == Param::Wte {
            let padding = &stored[weights.config().vocab_size * weights.config().channels..];
            assert!(padding.iter().all(|&value| value == 0.0), "{name}: padded rows moved");
        }
    }
}

macro_rules! golden {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            check(Cpu::new(), stringify!($name), UNIT_F32);
        }
    )*};
}

golden! { dense fc1_bw64 fc2_bw32 both_odd both_wide }

/// A batch in two micro-steps gives the gradient of the whole batch.
#[test]
fn accumulation_equals_one_batch() {
    let golden = Golden::load("both_wide");
    let t = golden.config.max_seq_len;
    let (inputs, targets) = golden.batch(0);
    let run = |micro_steps: usize| {
        let mut model = Model::new(Cpu::new(), &golden.weights).unwrap();
        let batch = golden.batch / micro_steps;
        let mut acts = Activations::new(&mut model, batch, t, true).unwrap();
        let mut optimizer = Optimizer::new(&mut model).unwrap();
        for k in 0..micro_steps {
            let part = k * batch * t..(k + 1) * batch * t;
            model.upload_batch(&mut acts, &inputs[part.clone()], &targets[part]).unwrap();
            optimizer.micro_step(&mut model, &mut acts, k, micro_steps).unwrap();
        }
        let grads = optimizer.grads(&mut model).unwrap();
        let result = optimizer.update(&mut model, &golden.hyper, 0.0).unwrap();
        (grads, result.collect(&mut model).unwrap())
    };
    let ((whole, (loss, _)), (parts, (parts_loss, _))) = (run(1), run(2));
    assert!((loss - parts_loss).abs() <= 1e-6 * loss);
    for tensor in golden.weights.table().tensors() {
        let (whole, parts) = (&whole[tensor.span.range()], &parts[tensor.span.range()]);
        let worst = tolerance::worst(parts, whole, golden.gradient_error(UNIT_F32, whole));
        assert!(worst.ratio() <= 1.0, "{:?} {}, {worst}", tensor.param, tensor.layer);
    }
}

/// Two runs give the same bits, and evaluation agrees with training's loss.
#[test]
fn runs_repeat_bit_for_bit() {
    let golden = Golden::load("both_odd");
    let t = golden.config.max_seq_len;
    let run = || {
        let mut model = Model::new(Cpu::new(), &golden.weights).unwrap();
        let mut acts = Activations::new(&mut model, golden.batch, t, true).unwrap();
        let mut optimizer = Optimizer::new(&mut model).unwrap();
        let mut losses = Vec::new();
        for step in 0..golden.steps {
            let (inputs, targets) = golden.batch(step);
            model.upload_batch(&mut acts, inputs, targets).unwrap();
            let mut total = model.backend().alloc(Role::Statistics, "loss", 1).unwrap();
            let scale = 1.0 / golden.rows() as f32;
            model.evaluate(&mut acts, &mut total, scale, Write::Set).unwrap();
            optimizer.micro_step(&mut model, &mut acts, 0, 1).unwrap();
            let result = optimizer.update(&mut model, &golden.hyper, golden.learning_rate).unwrap();
            let (loss, norm) = result.collect(&mut model).unwrap();
            assert_eq!(loss.to_bits(), total[0].to_bits());
            losses.push((loss.to_bits(), norm.to_bits()));
        }
        (losses, model.weights().unwrap().values().to_vec())
    };
    let ((losses, weights), (losses_again, weights_again)) = (run(), run());
    assert_eq!(losses, losses_again);
    assert!(weights.iter().zip(&weights_again).all(|(a, b)| a.to_bits() == b.to_bits()));
}
