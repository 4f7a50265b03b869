//! What surrounds a step: recipes, learning-rate schedules, and the optimizer's buffers.

use crate::backend::{AdamWStep, Backend, Device, OptimizerState, Role, Write};
use crate::checkpoint::Moments;
use crate::error::Result;
use crate::model::{Activations, Model, renew};
use crate::shapes::Span;
use crate::weights::Weights;
use crate::whole::WholeGradients;
use serde::{Deserialize, Serialize};

/// Keeps AdamW's quotient finite.
pub const EPS: f64 = 1e-8;
/// Where the cosine ends, as a share of the peak (Brown et al. 2020, appendix B).
const COSINE_FLOOR: f64 = 0.1;
/// The share of all steps in which the warm-up-stable-decay schedule decays (Hägele et al. 2024).
const WSD_DECAY: f64 = 0.2;

/// Optimizer settings with a name; each can be overridden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recipe {
    /// beta 0.9/0.95, gradients clipped at norm 1: repeatable across programs and precisions.
    Stable,
    /// beta 0.9/0.999, no clipping: what the experiment ran.
    Experiment,
}

/// AdamW's settings that stay the same for a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyperparameters {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled decay of the matrices.
    pub weight_decay: f64,
    /// Global norm at which gradients are clipped; 0 is never.
    pub grad_clip: f64,
}

impl Recipe {
    /// The recipe's settings.
    pub fn hyperparameters(self) -> Hyperparameters {
        let (beta2, grad_clip) = match self {
            Recipe::Stable => (0.95, 1.0),
            Recipe::Experiment => (0.999, 0.0),
        };
        Hyperparameters { beta1: 0.9, beta2, weight_decay: 0.0, grad_clip }
    }
}

/// How the learning rate runs over a training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// The peak all along.
    Constant,
    /// Half a cosine from the peak to a tenth of it (Loshchilov & Hutter 2017).
    Cosine,
    /// The peak, then 1 - sqrt decay to zero over the last fifth (Hägele et al. 2024).
    Wsd,
}

impl Schedule {
    /// The learning rate of `step` (from 1) of `steps`, after a linear warm-up over the first `warmup` steps.
    pub fn learning_rate(self, peak: f64, step: u64, steps: u64, warmup: u64) -> f64 {
        if step <= warmup {
            return peak * step as f64 / warmup as f64;
        }
        let (done, rest) = ((step - 1 - warmup) as f64, steps.saturating_sub(warmup).max(1) as f64);
        let factor = match self {
            Schedule::Constant => 1.0,
            Schedule::Cosine => {
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * (done / rest).min(1.0)).cos());
                COSINE_FLOOR + (1.0 - COSINE_FLOOR) * cosine
            }
            Schedule::Wsd => {
                let decay_steps = (WSD_DECAY * steps as f64).min(rest);
                let into_decay = (done - (rest - decay_steps)).clamp(0.0, decay_steps);
                if decay_steps > 0.0 { 1.0 - (into_decay / decay_steps).sqrt() } else { 1.0 }
            }
        };
        peak * factor
    }
}

/// Gradients, moments and the step's scalars on the device.
pub struct Optimizer<B: Backend> {
    grads: B::Buffer,
    m: B::Buffer,
    v: B::Buffer,
    norm: B::Buffer,
    loss: B::Buffer,
    plan: B::Plan,
    /// What the plan was made for.
    decayed: Vec<Span>,
    step: u64,
}

/// Loss and gradient norm of a step, on their way from the device.
pub struct StepResult<B: Device> {
    loss: B::Pending,
    norm: B::Pending,
}

impl<B: Backend> StepResult<B> {
    /// Waits for the step; returns its mean loss before the update and the gradient norm before clipping.
    ///
    /// # Errors
    /// The device failed.
    pub fn collect(self, model: &mut Model<B>) -> Result<(f32, f32)> {
        let loss = model.backend().collect(self.loss)?[0];
        let norm = model.backend().collect(self.norm)?[0];
        Ok((loss, norm))
    }
}

impl<B: Backend> Optimizer<B> {
    /// Zero moments for a model.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(model: &mut Model<B>) -> Result<Self> {
        let (len, decayed) = (model.table().len(), model.table().decayed());
        let device = model.backend();
        Ok(Self {
            grads: device.alloc(Role::Gradients, "gradients", len)?,
            m: device.alloc(Role::Moments, "first moments", len)?,
            v: device.alloc(Role::Moments, "second moments", len)?,
            norm: device.alloc(Role::Statistics, "gradient norm", 1)?,
            loss: device.alloc(Role::Statistics, "loss", 1)?,
            plan: device.adamw_plan(&decayed, len)?,
            decayed,
            step: 0,
        })
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// One of `micro_steps` batches of a step: adds its share of the mean loss's gradient.
    ///
    /// # Errors
    /// The device failed.
    pub fn micro_step(
        &mut self,
        model: &mut Model<B>,
        acts: &mut Activations<B>,
        micro_step: usize,
        micro_steps: usize,
    ) -> Result<()> {
        self.micro_step_with(None, model, acts, micro_step, micro_steps)
    }

    /// The same with the whole gradients of learned layers, where they are wanted.
    ///
    /// # Errors
    /// The device failed.
    pub fn micro_step_with(
        &mut self,
        whole: Option<&mut WholeGradients<B>>,
        model: &mut Model<B>,
        acts: &mut Activations<B>,
        micro_step: usize,
        micro_steps: usize,
    ) -> Result<()> {
        let write = if micro_step == 0 { Write::Set } else { Write::Add };
        let scale = 1.0 / (micro_steps * acts.dims().rows()) as f32;
        model.forward_backward(acts, &mut self.grads, whole, &mut self.loss, scale, write)
    }

    /// Clips and applies the gradients: the step is done.
    ///
    /// # Errors
    /// The device failed.
    pub fn update(
        &mut self,
        model: &mut Model<B>,
        hyper: &Hyperparameters,
        learning_rate: f64,
    ) -> Result<StepResult<B>> {
        self.step += 1;
        model.backend().grad_norm(&mut self.norm, &self.grads)?;
        self.apply(model, hyper, learning_rate)?;
        self.request(model)
    }

    /// The first half of [`Optimizer::update`]: counts the step and asks for its loss and gradient norm. Whoever has seen them
    /// does the other half, [`Optimizer::apply`] or [`Optimizer::skip`].
    ///
    /// # Errors
    /// The device failed.
    pub fn measure(&mut self, model: &mut Model<B>) -> Result<StepResult<B>> {
        self.step += 1;
        model.backend().grad_norm(&mut self.norm, &self.grads)?;
        self.request(model)
    }

    /// Clips the measured gradients and applies them.
    ///
    /// # Errors
    /// The device failed.
    pub fn apply(&mut self, model: &mut Model<B>, hyper: &Hyperparameters, learning_rate: f64) -> Result<()> {
        let (device, params) = model.backend_and_params();
        let step = AdamWStep {
            step: self.step,
            learning_rate,
            beta1: hyper.beta1,
            beta2: hyper.beta2,
            eps: EPS,
            weight_decay: hyper.weight_decay,
            grad_clip: hyper.grad_clip,
        };
        let state = OptimizerState { params, m: &mut self.m, v: &mut self.v };
        device.adamw_step(state, &self.grads, &self.norm, &self.plan, &step)
    }

    /// Leaves the measured gradients out: weights and moments stay as they are.
    ///
    /// # Errors
    /// The device failed.
    pub fn skip(&mut self, model: &mut Model<B>) -> Result<()> {
        // A norm that is not finite would stay in its place for good.
        model.backend().upload(&mut self.norm, 0, &[0.0])
    }

    fn request(&mut self, model: &mut Model<B>) -> Result<StepResult<B>> {
        let (device, first) = (model.backend(), Span { offset: 0, len: 1 });
        Ok(StepResult { loss: device.request(&self.loss, first)?, norm: device.request(&self.norm, first)? })
    }

    /// The moments in host memory.
    ///
    /// # Errors
    /// The device failed.
    pub fn moments(&self, model: &mut Model<B>) -> Result<Moments> {
        let all = Span { offset: 0, len: model.table().len() };
        let mut host = |buffer| -> Result<Weights> {
            let mut values = Weights::zeros_in(model.config(), model.table().clone())?;
            values.values_mut().copy_from_slice(&model.backend().download(buffer, all)?);
            Ok(values)
        };
        Ok(Moments { first: host(&self.m)?, second: host(&self.v)? })
    }

    /// Goes on after `step` steps that left these moments.
    ///
    /// # Errors
    /// The device failed.
    pub fn restore(&mut self, model: &mut Model<B>, moments: &Moments, step: u64) -> Result<()> {
        let device = model.backend();
        device.upload(&mut self.m, 0, moments.first.values())?;
        device.upload(&mut self.v, 0, moments.second.values())?;
        self.step = step;
        Ok(())
    }

    /// Goes on with a model that has taken other weights ([`Model::set_weights`]), and with these moments, laid out as they are. The
    /// gradients are to be set anew.
    ///
    /// # Errors
    /// The device has not enough memory, or failed.
    pub fn follow(&mut self, model: &mut Model<B>, moments: &Moments) -> Result<()> {
        let (len, decayed) = (model.table().len(), model.table().decayed());
        if decayed != self.decayed {
            let device = model.backend();
            // Tensors have moved. What lies between them has to be zero in all three.
            renew(device, &mut self.grads, Role::Gradients, "gradients", len)?;
            renew(device, &mut self.m, Role::Moments, "first moments", len)?;
            renew(device, &mut self.v, Role::Moments, "second moments", len)?;
            self.plan = device.adamw_plan(&decayed, len)?;
            self.decayed = decayed;
        }
        self.restore(model, moments, self.step)
    }

    /// The gradients in host memory, laid out as the parameters, for tests.
    ///
    /// # Errors
    /// The device failed.
    pub fn grads(&self, model: &mut Model<B>) -> Result<Vec<f32>> {
        let all = Span { offset: 0, len: model.table().len() };
        model.backend().download(&self.grads, all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_climbs_linearly_to_the_peak() {
        for schedule in [Schedule::Constant, Schedule::Cosine, Schedule::Wsd] {
            assert_eq!(schedule.learning_rate(1.0, 1, 100, 10), 0.1);
            assert_eq!(schedule.learning_rate(1.0, 10, 100, 10), 1.0);
            assert_eq!(schedule.learning_rate(1.0, 11, 100, 10), 1.0);
        }
    }

    #[test]
    fn schedules_end_where_they_should() {
        assert_eq!(Schedule::Constant.learning_rate(3e-4, 100, 100, 0), 3e-4);
        let cosine = |step| Schedule::Cosine.learning_rate(1.0, step, 1000, 0);
        assert!((cosine(501) - 0.55).abs() < 1e-9 && (cosine(1001) - 0.1).abs() < 1e-9);
        let wsd = |step| Schedule::Wsd.learning_rate(1.0, step, 1000, 100);
        assert_eq!((wsd(500), wsd(801)), (1.0, 1.0));
        assert!((wsd(851) - 0.5).abs() < 1e-9 && wsd(1001) == 0.0 && wsd(1000) > 0.0);
    }

    #[test]
    fn degenerate_lengths_stay_finite() {
        for schedule in [Schedule::Constant, Schedule::Cosine, Schedule::Wsd] {
            for (step, steps, warmup) in [(1, 1, 0), (1, 1, 1), (5, 5, 9), (7, 0, 0), (1, 0, 5)] {
                let rate = schedule.learning_rate(1.0, step, steps, warmup);
                assert!((0.0..=1.0).contains(&rate), "{schedule:?} {step} {steps} {warmup}: {rate}");
            }
        }
    }
}
