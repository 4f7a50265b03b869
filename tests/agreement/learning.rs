//! What every device backend is held to where blocks are learned.

use super::agreement::assert_same;
use bandtrain::backend::Backend;
use bandtrain::config::{GptConfig, preset};
use bandtrain::learn::LearnRule;
use bandtrain::model::{Activations, Model};
use bandtrain::optim::{Hyperparameters, Optimizer, Recipe};
use bandtrain::shapes::Param;
use bandtrain::tolerance::{Tolerance, UNIT_F32, compare};
use bandtrain::train::Learner;
use bandtrain::weights::Weights;

/// Trains a model that exchanges blocks after every step, blocks at the edges smaller than others, and holds what an exchange does to
/// what it should: it is judged by the gradients of the same model with every connection; blocks that stay keep weights and
/// moments to the bit, and those that come begin with zeros; and a training that starts from there goes on as this one does.
///
/// # Panics
/// When something differs.
pub fn check_learning<B: Backend>(device: B, twin: B, successor: B) {
    let mut twin = Some(twin);
    let (fc1, fc2) = ("learned:0.5:3".parse().unwrap(), "learned:0.4:band".parse().unwrap());
    let toy = preset("toy").unwrap().model;
    let config = GptConfig { num_layers: 2, fc1_bandwidth: fc1, fc2_bandwidth: fc2, ..toy }.with_mlp_width(701);
    let start = Weights::init(&config, 4).unwrap();
    let mut model = Model::new(device, &start).unwrap();
    let mut acts = Activations::new(&mut model, 2, 50, true).unwrap();
    let mut optimizer = Optimizer::new(&mut model).unwrap();
    let rule = LearnRule { every: 1, fraction: 0.9, until: 5 };
    let mut learner = Learner::new(&mut model, rule).unwrap().expect("the model learns blocks");
    let mut changed = 0;
    for step in 1..=4 {
        micro_steps(&mut model, &mut optimizer, &mut acts, Some(&mut learner));
        if step == 1 {
            check_whole_gradients(&mut model, &mut learner, &start, twin.take().expect("there is one"));
        }
        let hyper = Hyperparameters { weight_decay: 0.1, ..Recipe::Stable.hyperparameters() };
        optimizer.update(&mut model, &hyper, 1e-2).unwrap().collect(&mut model).unwrap();
        let before = (model.weights().unwrap(), optimizer.moments(&mut model).unwrap());
        changed += learner.exchange(&mut model, &mut optimizer, step).unwrap().count();
        let after = (model.weights().unwrap(), optimizer.moments(&mut model).unwrap());
        for (before, after) in
            [(&before.0, &after.0), (&before.1.first, &after.1.first), (&before.1.second, &after.1.second)]
        {
            check_exchange(before, after);
        }
    }
    assert!(changed > 0, "no block was exchanged");

    let (weights, moments) = (model.weights().unwrap(), optimizer.moments(&mut model).unwrap());
    let mut next = Model::new(successor, &weights).unwrap();
    let mut next_acts = Activations::new(&mut next, 2, 50, true).unwrap();
    let mut next_optimizer = Optimizer::new(&mut next).unwrap();
    next_optimizer.restore(&mut next, &moments, optimizer.step()).unwrap();
    let step = |model: &mut Model<B>, optimizer: &mut Optimizer<B>, acts: &mut Activations<B>| {
        micro_steps(model, optimizer, acts, None);
        let result = optimizer.update(model, &Recipe::Stable.hyperparameters(), 1e-2).unwrap();
        let (loss, norm) = result.collect(model).unwrap();
        let weights = model.weights().unwrap();
        [loss, norm].iter().chain(weights.values()).map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    let bits = [step(&mut model, &mut optimizer, &mut acts), step(&mut next, &mut next_optimizer, &mut next_acts)];
    assert_same(&bits[0], &bits[1], "going on after exchanges and starting from them");
}

/// Two batches' gradients.
fn micro_steps<B: Backend>(
    model: &mut Model<B>,
    optimizer: &mut Optimizer<B>,
    acts: &mut Activations<B>,
    mut learner: Option<&mut Learner<B>>,
) {
    let tokens: Vec<u32> = (0..202).map(|k| k * k * 31 % 257).collect();
    for (micro_step, batch) in tokens.chunks(101).enumerate() {
        model.upload_batch(acts, &batch[..100], &batch[1..]).unwrap();
        let whole = learner.as_deref_mut().map(Learner::gradients);
        optimizer.micro_step_with(whole, model, acts, micro_step, 2).unwrap();
    }
}

/// Holds whole gradients to those of a model with every connection, zeros where the other has none.
fn check_whole_gradients<B: Backend>(model: &mut Model<B>, learner: &mut Learner<B>, weights: &Weights, twin: B) {
    let (dense, _) = weights.rebanded(0.into(), 0.into()).unwrap();
    let mut twin = Model::new(twin, &dense).unwrap();
    let mut acts = Activations::new(&mut twin, 2, 50, true).unwrap();
    let mut optimizer = Optimizer::new(&mut twin).unwrap();
    micro_steps(&mut twin, &mut optimizer, &mut acts, None);
    let expected = optimizer.grads(&mut twin).unwrap();
    let tolerance = Tolerance::of_gradient(UNIT_F32, weights.config(), 50, 200).with_gelu();
    for tensor in dense.table().tensors().iter().filter(|tensor| matches!(tensor.param, Param::Fcw | Param::Fcprojw)) {
        let whole = learner.gradients().of(model, tensor.param, tensor.layer).unwrap().expect("it is learned");
        let worst = compare(&whole, &expected[tensor.span.range()], tolerance);
        assert!(worst.ratio() <= 1.0, "{}: {worst}", tensor.name());
    }
}

/// Holds values after an exchange to those before: the same bits where a connection stays, zero where it came or is not there.
fn check_exchange(before: &Weights, after: &Weights) {
    for tensor in after.table().tensors() {
        let (param, layer) = (tensor.param, tensor.layer);
        let (old, new) = (before.dense(param, layer), after.dense(param, layer));
        let (Some((band, _)), Some((former, _))) =
            (after.table().band(param, layer), before.table().band(param, layer))
        else {
            assert!(old == new, "{}", tensor.name());
            continue;
        };
        assert_eq!(band.blocks().unwrap().count(), former.blocks().unwrap().count());
        for (k, (old, new)) in old.iter().zip(&new).enumerate() {
            let (j, i) = if param == Param::Fcw {
                (k / band.narrow(), k % band.narrow())
            } else {
                (k % band.wide(), k / band.wide())
            };
            let expected = if band.contains(j, i) && former.contains(j, i) { *old } else { 0.0 };
            assert_eq!(new.to_bits(), expected.to_bits(), "{} at {j}, {i}", tensor.name());
        }
    }
}
