//! The training loop: accumulate, update, validate, sample, write checkpoints, stop when asked to.

use crate::backend::{Backend, Role, Write};
use crate::checkpoint::{self, Checkpoint, Format, Meta, Moments};
use crate::data::{Loader, Position, StreamDecoder, Tokenizer};
use crate::error::{Error, Result};
use crate::generate::{Generator, Sampler, Sampling};
use crate::metrics::{Reporter, StepRecord, ValRecord};
use crate::model::{Activations, Model};
use crate::optim::{Hyperparameters, Optimizer, Schedule, StepResult};
use crate::shapes::{Span, Tensor};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Everything that decides a training beside the model and the data; checked by whoever fills it in.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainPlan {
    /// Optimizer steps.
    pub steps: u64,
    /// B of one micro-step.
    pub batch_size: usize,
    /// T.
    pub seq_len: usize,
    /// Micro-steps per step.
    pub grad_accum: usize,
    /// The learning rate's peak.
    pub learning_rate: f64,
    /// How it runs.
    pub schedule: Schedule,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// AdamW's settings.
    pub hyper: Hyperparameters,
    /// Steps between validations; 0 never validates.
    pub val_every: u64,
    /// Most batches of a validation; 0 takes all there are.
    pub val_batches: usize,
    /// Steps between samples; 0 never samples.
    pub sample_every: u64,
    /// Tokens of a sample.
    pub sample_tokens: usize,
    /// Steps between checkpoints; 0 writes one at the end only.
    pub checkpoint_every: u64,
    /// Where checkpoints go, by the name's ending native or llm.c's.
    pub checkpoint: PathBuf,
    /// Seed of the samples.
    pub seed: u64,
    /// Entries for the native checkpoint's metadata.
    pub notes: BTreeMap<String, String>,
}

/// How far a run had come when it was saved: what going on with it takes beside the weights.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Batches taken from the training data.
    pub batches: u64,
    /// AdamW's moments.
    pub moments: Moments,
}

/// The entry of a checkpoint's metadata that holds [`Progress::batches`].
pub const BATCHES_KEY: &str = "batches";

/// What came of a training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainSummary {
    /// Loss of the first and of the last validation, where there were any.
    pub val_loss: Option<(f32, f32)>,
}

/// A training under way.
pub struct Trainer<'a, B: Backend> {
    plan: &'a TrainPlan,
    model: &'a mut Model<B>,
    optimizer: Optimizer<B>,
    acts: Activations<B>,
    generator: Option<Generator<B>>,
    tokenizer: Option<Tokenizer>,
    reporter: &'a mut Reporter,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    /// The result that is still on its way from the device.
    pending: Option<Unfinished<B>>,
    /// The step after which the last checkpoint was written.
    saved: Option<u64>,
    /// When the last step was complete, or whatever came after it: a step's time runs from here.
    clock: Instant,
}

/// A step that is recorded and not yet collected.
struct Unfinished<B: Backend> {
    result: StepResult<B>,
    learning_rate: f64,
    /// Where its batches begin.
    position: Position,
}

impl<'a, B: Backend> Trainer<'a, B> {
    /// Allocates what the training needs. `tokenizer` turns samples into text; without one they are not taken.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(
        plan: &'a TrainPlan,
        model: &'a mut Model<B>,
        tokenizer: Option<Tokenizer>,
        reporter: &'a mut Reporter,
    ) -> Result<Self> {
        let rows = plan.batch_size * plan.seq_len;
        Ok(Self {
            plan,
            optimizer: Optimizer::new(model)?,
            acts: Activations::new(model, plan.batch_size, plan.seq_len, true)?,
            model,
            generator: None,
            tokenizer,
            reporter,
            inputs: vec![0; rows],
            targets: vec![0; rows],
            pending: None,
            saved: None,
            clock: Instant::now(),
        })
    }

    /// Goes on where a run that left the model's weights had come to.
    ///
    /// # Errors
    /// The device failed; a step beyond what data can be sought to.
    pub fn resume(&mut self, train: &mut Loader, progress: Progress) -> Result<()> {
        let Progress { step, batches, moments } = progress;
        self.optimizer.restore(self.model, &moments, step)?;
        self.saved = Some(step);
        if step >= self.plan.steps {
            self.reporter.note(&format!("note: all {} steps are done; ask for more with -n", self.plan.steps))?;
        }
        train.seek(Position { batches })
    }

    /// Runs the plan, or what is left of it after [`Trainer::resume`]. `interrupt` stops it after the step under way; the
    /// checkpoint is written then as well, and also when nobody reads standard output any more.
    ///
    /// # Errors
    /// [`Error::Interrupted`] saying where the checkpoint is; a loss or gradient that is not finite; data, device or
    /// files that fail; [`Error::StdoutClosed`].
    pub fn run(
        &mut self,
        train: &mut Loader,
        val: Option<&mut Loader>,
        interrupt: &AtomicBool,
    ) -> Result<TrainSummary> {
        let before = self.optimizer.step();
        let result = self.run_steps(train, val, interrupt);
        let done = self.optimizer.step();
        if matches!(result, Err(Error::StdoutClosed)) && done > before {
            // A log that broke off is no reason to lose the work; the note about the file has no reader either.
            self.save(done, train.position())?;
        }
        result
    }

    fn run_steps(
        &mut self,
        train: &mut Loader,
        mut val: Option<&mut Loader>,
        interrupt: &AtomicBool,
    ) -> Result<TrainSummary> {
        let plan = self.plan;
        let mut first_and_last = None;
        let mut validate = |trainer: &mut Self, step: u64| -> Result<()> {
            let due = step.is_multiple_of(plan.val_every.max(1)) || step == plan.steps;
            let Some(val) = val.as_deref_mut().filter(|_| plan.val_every > 0 && due) else { return Ok(()) };
            let val_loss = trainer.validate(val)?;
            trainer.reporter.validation(&ValRecord { step, val_loss })?;
            let (first, _) = first_and_last.unwrap_or((val_loss, val_loss));
            first_and_last = Some((first, val_loss));
            Ok(())
        };
        let done = self.optimizer.step();
        if done == 0 {
            validate(self, 0)?;
        }
        self.clock = Instant::now();
        for step in done + 1..=plan.steps {
            self.step(train, step)?;
            let last = step == plan.steps;
            let due = |every: u64| every > 0 && (step.is_multiple_of(every) || last);
            let stop = interrupt.load(Ordering::Relaxed);
            if !(due(plan.val_every) || due(plan.sample_every) || due(plan.checkpoint_every) || last || stop) {
                continue;
            }
            self.collect(train, step)?;
            validate(self, step)?;
            if due(plan.sample_every) {
                self.sample(step)?;
            }
            if due(plan.checkpoint_every) || last || stop {
                self.save(step, train.position())?;
            }
            if stop && !last {
                let path = plan.checkpoint.display();
                return Err(Error::Interrupted(format!("the checkpoint after step {step} is in {path}")));
            }
            self.clock = Instant::now();
        }
        self.reporter.finish();
        Ok(TrainSummary { val_loss: first_and_last })
    }

    /// Records one step. Its result is collected a step later, so that the device never waits for the host.
    fn step(&mut self, train: &mut Loader, step: u64) -> Result<()> {
        let plan = self.plan;
        let position = train.position();
        self.micro_steps(train)?;
        let learning_rate = plan.schedule.learning_rate(plan.learning_rate, step, plan.steps, plan.warmup);
        let result = self.optimizer.update(self.model, &plan.hyper, learning_rate)?;
        self.collect(train, step - 1)?;
        self.pending = Some(Unfinished { result, learning_rate, position });
        if B::SYNCHRONOUS { self.collect(train, step) } else { Ok(()) }
    }

    /// Records the gradients of the next step's batches.
    fn micro_steps(&mut self, train: &mut Loader) -> Result<()> {
        for micro_step in 0..self.plan.grad_accum {
            train.next_batch(&mut self.inputs, &mut self.targets)?;
            self.model.upload_batch(&mut self.acts, &self.inputs, &self.targets)?;
            self.optimizer.micro_step(self.model, &mut self.acts, micro_step, self.plan.grad_accum)?;
        }
        Ok(())
    }

    /// Waits for the result of `step`, if it is still out, and reports it.
    fn collect(&mut self, train: &mut Loader, step: u64) -> Result<()> {
        let Some(Unfinished { result, learning_rate: lr, position }) = self.pending.take() else { return Ok(()) };
        let (train_loss, grad_norm) = result.collect(self.model)?;
        if !(train_loss.is_finite() && grad_norm.is_finite()) {
            let cause = self.cause_of_divergence(train, position)?;
            let kept = match self.saved {
                Some(step) => {
                    format!("the last checkpoint, after step {step}, is in {}", self.plan.checkpoint.display())
                }
                None => "no checkpoint was written before".to_string(),
            };
            return Err(Error::usage(format!(
                "the training diverged: at step {step} the loss is {train_loss} and the gradient norm {grad_norm}; {cause}; \
                 {kept}; go on from an earlier one with a smaller --learning-rate, more --warmup or --grad-clip 1"
            )));
        }
        let seconds = self.clock.elapsed().as_secs_f64().max(1e-9);
        self.clock = Instant::now();
        let step_tokens = (self.plan.grad_accum * self.acts.dims().rows()) as u64;
        self.reporter.step(&StepRecord {
            step,
            train_loss,
            lr,
            grad_norm,
            tokens: step * step_tokens,
            tok_per_s: step_tokens as f64 / seconds,
            step_ms: seconds * 1e3,
        })
    }

    /// Which tensor's gradient is not finite, by running the step's batches once more: an update with such gradients is not
    /// made, so the weights are still those that led to them.
    fn cause_of_divergence(&mut self, train: &mut Loader, position: Position) -> Result<String> {
        train.seek(position)?;
        self.micro_steps(train)?;
        let grads = self.optimizer.grads(self.model)?;
        let table = self.model.table();
        let is_broken = |tensor: &&Tensor| grads[tensor.span.range()].iter().any(|gradient| !gradient.is_finite());
        Ok(match table.tensors().iter().find(is_broken) {
            None => "every gradient is finite, but the sum of their squares overflows".to_string(),
            Some(tensor) => format!("the first gradient that is not finite is that of {}", tensor.name()),
        })
    }

    fn validate(&mut self, val: &mut Loader) -> Result<f32> {
        let batches = match self.plan.val_batches {
            0 => val.batches_per_epoch(),
            most => most.min(val.batches_per_epoch()),
        };
        mean_loss(self.model, &mut self.acts, val, batches, |_| Ok(()))
    }

    /// Prints a text that the model makes up.
    fn sample(&mut self, step: u64) -> Result<()> {
        let Some(tokenizer) = self.tokenizer else { return Ok(()) };
        let generator = match &mut self.generator {
            Some(generator) => generator,
            none => none.insert(Generator::new(self.model)?),
        };
        let sampling = Sampling { temperature: 0.8, top_k: 0, top_p: 1.0, seed: self.plan.seed };
        let mut sampler = Sampler::new(sampling, step);
        let mut decoder = StreamDecoder::new(tokenizer);
        let mut text = String::new();
        let end = tokenizer.end_of_text();
        generator.generate(self.model, &[end], self.plan.sample_tokens, &mut sampler, |token| {
            if token == end {
                return Ok(false);
            }
            text.push_str(&decoder.push(token)?);
            Ok(true)
        })?;
        text.push_str(&decoder.finish());
        self.reporter.note(&format!("step {step}/{} | sample: {}", self.plan.steps, text.replace('\n', "\n    ")))
    }

    fn save(&mut self, step: u64, position: Position) -> Result<()> {
        let weights = self.model.weights()?;
        let mut extra = self.plan.notes.clone();
        extra.insert(BATCHES_KEY.to_string(), position.batches.to_string());
        let meta = Meta { tokenizer: self.tokenizer.map(|tokenizer| tokenizer.name().to_string()), step, extra };
        let path = &self.plan.checkpoint;
        let checkpoint = Checkpoint { weights, meta };
        match Format::of_path(path)? {
            Format::Safetensors => {
                checkpoint::save_with_moments(path, &checkpoint, &self.optimizer.moments(self.model)?)?;
            }
            format => checkpoint::save(path, &checkpoint, format)?,
        }
        self.saved = Some(step);
        self.reporter.note(&format!("step {step}/{} | checkpoint written to {}", self.plan.steps, path.display()))
    }
}

/// The mean loss over the first `batches` batches of `data`. `progress` is told the batches done and may stop the work.
///
/// # Errors
/// A model whose loss is not finite; data or device fail; whatever `progress` returns.
pub fn mean_loss<B: Backend>(
    model: &mut Model<B>,
    acts: &mut Activations<B>,
    data: &mut Loader,
    batches: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<f32> {
    let rows = acts.dims().rows();
    let (mut inputs, mut targets) = (vec![0; rows], vec![0; rows]);
    let mut total = model.backend().alloc(Role::Statistics, "loss", 1)?;
    data.reset();
    for batch in 0..batches {
        data.next_batch(&mut inputs, &mut targets)?;
        model.upload_batch(acts, &inputs, &targets)?;
        let write = if batch == 0 { Write::Set } else { Write::Add };
        model.evaluate(acts, &mut total, 1.0 / (rows * batches) as f32, write)?;
        progress(batch + 1)?;
    }
    let loss = model.backend().download(&total, Span { offset: 0, len: 1 })?[0];
    match loss.is_finite() {
        true => Ok(loss),
        false => {
            Err(Error::usage(format!("the model's loss is {loss}: it has diverged; go back to an earlier checkpoint")))
        }
    }
}
