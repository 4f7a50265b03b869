//! The training loop: accumulate, update, validate, sample, write checkpoints, stop when asked to.

mod learner;
pub mod progress;
pub mod spike;

use crate::backend::{Backend, Role, Write};
use crate::checkpoint::{Checkpoint, Keep, Meta, Series};
use crate::data::{Loader, Position, StreamDecoder, Tokenizer};
use crate::error::{Error, Result};
use crate::every::Every;
use crate::generate::{Generator, Sampler, Sampling};
use crate::learn::LearnRule;
use crate::model::{Activations, Model};
use crate::optim::{Hyperparameters, Optimizer, Schedule, StepResult};
use crate::report::{Reporter, SampleRecord, StepRecord, ValRecord};
use crate::shapes::{Span, Tensor};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use learner::Learner;
pub use progress::{Progress, Report};
use spike::{SpikeRule, Spikes, Verdict};

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
    /// Which updates are left out.
    pub skip: SpikeRule,
    /// When learned blocks are exchanged; `None` leaves them as they are.
    pub learn: Option<LearnRule>,
    /// When checkpoints are written; 0 steps writes one at the end only.
    pub checkpoint_every: Every,
    /// Which older ones stay.
    pub keep: Keep,
    /// Where checkpoints go, by the name's ending native or llm.c's.
    pub checkpoint: PathBuf,
    /// Seed of the samples.
    pub seed: u64,
    /// Entries for the native checkpoint's metadata.
    pub notes: BTreeMap<String, String>,
}

/// What came of a training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainSummary {
    /// Loss of the first validation since the start, and of the last if there were more.
    pub val_loss: Option<(f32, Option<f32>)>,
    /// Updates left out, those before a resume included.
    pub skipped: u64,
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
    spikes: Spikes,
    /// What exchanges learned blocks, as long as some are to be.
    learner: Option<Learner<B>>,
    series: Series,
    /// The last checkpoint, with the step after which it was written, and when.
    saved: Option<(u64, PathBuf)>,
    saved_at: Instant,
    /// The report after the last step that was interrupted.
    unfinished: Option<Report>,
    /// As in [`TrainSummary`].
    val_loss: Option<(f32, Option<f32>)>,
    /// When the last step was complete, or whatever came after it: a step's time runs from here.
    clock: Instant,
}

/// A step that is recorded and not yet collected.
struct Unfinished<B: Backend> {
    result: StepResult<B>,
    learning_rate: f64,
    /// Where its batches begin.
    position: Position,
    /// Whether learned blocks are exchanged after it.
    learns: bool,
}

impl<'a, B: Backend> Trainer<'a, B> {
    /// Allocates what the training needs. `tokenizer` turns samples into text; without one they are not taken.
    ///
    /// # Errors
    /// The device has not enough memory; a checkpoint's name that ends in neither .safetensors nor .bin.
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
            learner: match plan.learn.filter(|rule| rule.goes_on_after(0)) {
                Some(rule) => Learner::new(model, rule)?,
                None => None,
            },
            model,
            generator: None,
            tokenizer,
            reporter,
            inputs: vec![0; rows],
            targets: vec![0; rows],
            pending: None,
            spikes: Spikes::default(),
            series: Series::new(&plan.checkpoint, plan.keep)?,
            saved: None,
            saved_at: Instant::now(),
            unfinished: None,
            val_loss: None,
            clock: Instant::now(),
        })
    }

    /// Goes on where a run that left the model's weights had come to.
    ///
    /// # Errors
    /// The device failed; a step beyond what data can be sought to.
    pub fn resume(&mut self, train: &mut Loader, progress: Progress) -> Result<()> {
        let Progress { file, step, batches, unfinished, spikes, moments } = progress;
        self.optimizer.restore(self.model, &moments, step)?;
        for error in self.series.resumed(&file, step) {
            self.reporter.note(&format!("note: {error}"))?;
        }
        self.saved = Some((step, file));
        (self.unfinished, self.spikes) = (unfinished, spikes);
        if step >= self.plan.steps {
            let force = match self.plan.schedule {
                Schedule::Constant => "",
                _ => " (and --force, since the learning rate's schedule depends on their number)",
            };
            self.reporter
                .note(&format!("note: all {} steps are done; ask for more with -n{force}", self.plan.steps))?;
        }
        train.seek(Position { batches })
    }

    /// Runs the plan, or what is left of it after [`Trainer::resume`]. `interrupt` stops it after the step under way, and a
    /// validation or a sample at once; the checkpoint is written then as well, and also when a file of the reporter's fails or
    /// nobody reads standard output any more.
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
        let result = self.run_steps(train, val, interrupt);
        let finished = self.reporter.finish();
        let result = result.and_then(|summary| finished.map(|()| summary));
        if matches!(result, Err(Error::StdoutClosed | Error::Io { .. })) {
            // A report that broke off is no reason to lose the work. What goes wrong here as well is not worth a second word.
            let _ = self.save_what_is_new(train);
        }
        result
    }

    fn run_steps(
        &mut self,
        train: &mut Loader,
        mut val: Option<&mut Loader>,
        interrupt: &AtomicBool,
    ) -> Result<TrainSummary> {
        let steps = self.plan.steps;
        let mut step = self.optimizer.step();
        match self.unfinished {
            Some(from) => {
                self.report(val.as_deref_mut(), step, from, interrupt)?;
                if self.unfinished.is_none() {
                    self.save(step, train.position())?;
                }
            }
            None if step == 0 => self.report(val.as_deref_mut(), 0, Report::Validation, interrupt)?,
            None => {}
        }
        (self.clock, self.saved_at) = (Instant::now(), Instant::now());
        while step < steps && !interrupt.load(Ordering::Relaxed) {
            step += 1;
            self.step(train, step)?;
            let save = self.is_checkpoint_due(step);
            if !(save || self.is_due(Report::Validation, step) || self.is_due(Report::Sample, step)) {
                continue;
            }
            self.collect(train, step)?;
            self.report(val.as_deref_mut(), step, Report::Validation, interrupt)?;
            if save {
                self.save(step, train.position())?;
            }
            self.clock = Instant::now();
        }
        self.collect(train, step)?;
        if step < steps || self.unfinished.is_some() {
            return Err(self.interrupted(train)?);
        }
        Ok(TrainSummary { val_loss: self.val_loss, skipped: self.spikes.skipped() })
    }

    fn is_checkpoint_due(&self, step: u64) -> bool {
        let every = self.plan.checkpoint_every.is_due(step, self.saved_at.elapsed());
        every || self.series.is_milestone(step) || step == self.plan.steps
    }

    fn is_due(&self, report: Report, step: u64) -> bool {
        let plan = self.plan;
        match report {
            Report::Validation => plan.val_every > 0 && (step.is_multiple_of(plan.val_every) || step == plan.steps),
            Report::Sample => {
                plan.sample_every > 0 && step > 0 && (step.is_multiple_of(plan.sample_every) || step == plan.steps)
            }
        }
    }

    /// Records one step. Its result is collected a step later, so that the device never waits for the host; where spikes are
    /// skipped, it decides over the update and is waited for.
    fn step(&mut self, train: &mut Loader, step: u64) -> Result<()> {
        let plan = self.plan;
        let learns = self.learner.as_ref().is_some_and(|learner| learner.is_due(step));
        if learns {
            // Whatever a report may end in, a checkpoint must not come between the update and the exchange that follows it.
            self.collect(train, step - 1)?;
        }
        let position = train.position();
        self.micro_steps(train, learns)?;
        let learning_rate = plan.schedule.learning_rate(plan.learning_rate, step, plan.steps, plan.warmup);
        let result = match plan.skip.is_on() {
            true => self.optimizer.measure(self.model)?,
            false => self.optimizer.update(self.model, &plan.hyper, learning_rate)?,
        };
        self.collect(train, step - 1)?;
        self.pending = Some(Unfinished { result, learning_rate, position, learns });
        if B::SYNCHRONOUS || plan.skip.is_on() || learns {
            self.collect(train, step)?;
        }
        // What nobody needs any more gives its memory back.
        self.learner = self.learner.take().filter(|learner| learner.goes_on_after(step));
        Ok(())
    }

    /// Records the gradients of the next step's batches, where blocks are learned by them the whole ones too.
    fn micro_steps(&mut self, train: &mut Loader, learns: bool) -> Result<()> {
        for micro_step in 0..self.plan.grad_accum {
            train.next_batch(&mut self.inputs, &mut self.targets)?;
            self.model.upload_batch(&mut self.acts, &self.inputs, &self.targets)?;
            let whole = self.learner.as_mut().filter(|_| learns).map(Learner::gradients);
            let most = self.plan.grad_accum;
            self.optimizer.micro_step_with(whole, self.model, &mut self.acts, micro_step, most)?;
        }
        Ok(())
    }

    /// Waits for the result of `step`, if it is still out, judges it and reports it.
    fn collect(&mut self, train: &mut Loader, step: u64) -> Result<()> {
        let Some(Unfinished { result, learning_rate: lr, position, learns }) = self.pending.take() else {
            return Ok(());
        };
        let (train_loss, grad_norm) = result.collect(self.model)?;
        let skipped = match self.spikes.judge(&self.plan.skip, train_loss, grad_norm) {
            Verdict::Update => None,
            Verdict::Skip(reason) => Some(reason),
            Verdict::Diverged => return Err(self.diverged(train, step, position, train_loss, grad_norm)?),
        };
        match (self.plan.skip.is_on(), &skipped) {
            (false, _) => {}
            (true, None) => self.optimizer.apply(self.model, &self.plan.hyper, lr)?,
            (true, Some(_)) => self.optimizer.skip(self.model)?,
        }
        // By gradients that are no good for an update no block is judged.
        let exchange = match &self.learner {
            Some(learner) if learns && skipped.is_none() => {
                Some(learner.exchange(self.model, &mut self.optimizer, step)?)
            }
            _ => None,
        };
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
            skipped,
        })?;
        exchange.map_or(Ok(()), |exchange| self.reporter.exchange(&exchange))
    }

    /// The error that ends a training whose loss or gradient is not finite.
    fn diverged(&mut self, train: &mut Loader, step: u64, position: Position, loss: f32, norm: f32) -> Result<Error> {
        let cause = self.cause_of_divergence(train, position)?;
        let kept = match &self.saved {
            Some((step, file)) => format!("the last checkpoint, after step {step}, is in {}", file.display()),
            None => "no checkpoint was written before".to_string(),
        };
        let before = match self.plan.skip.is_on() {
            true => format!(", and {} updates before it were skipped", spike::MOST_NOT_FINITE),
            false => String::new(),
        };
        Ok(Error::usage(format!(
            "the training diverged: at step {step} the loss is {loss} and the gradient norm {norm}{before}; {cause}; {kept}; \
             go on from an earlier one with a smaller --learning-rate, more --warmup or --grad-clip 1"
        )))
    }

    /// Which tensor's gradient is not finite, by running the step's batches once more: an update with such gradients is not
    /// made, so the weights are still those that led to them.
    fn cause_of_divergence(&mut self, train: &mut Loader, position: Position) -> Result<String> {
        train.seek(position)?;
        self.micro_steps(train, false)?;
        let grads = self.optimizer.grads(self.model)?;
        let table = self.model.table();
        let is_broken = |tensor: &&Tensor| grads[tensor.span.range()].iter().any(|gradient| !gradient.is_finite());
        Ok(match table.tensors().iter().find(is_broken) {
            None => "every gradient is finite, but the sum of their squares overflows".to_string(),
            Some(tensor) => format!("the first gradient that is not finite is that of {}", tensor.name()),
        })
    }

    /// Makes the reports that are due after `step`, beginning with `from`; an interrupted one is left for later.
    fn report(&mut self, val: Option<&mut Loader>, step: u64, from: Report, interrupt: &AtomicBool) -> Result<()> {
        self.unfinished = None;
        let val = val.filter(|_| from <= Report::Validation && self.is_due(Report::Validation, step));
        if let Some(val) = val {
            let Some(val_loss) = self.validate(val, interrupt)? else {
                self.unfinished = Some(Report::Validation);
                return Ok(());
            };
            self.reporter.validation(&ValRecord { step, val_loss })?;
            self.val_loss = Some(self.val_loss.map_or((val_loss, None), |(first, _)| (first, Some(val_loss))));
        }
        if self.is_due(Report::Sample, step) && !self.sample(step, interrupt)? {
            self.unfinished = Some(Report::Sample);
        }
        Ok(())
    }

    /// The loss on the validation data, `None` when it was interrupted.
    fn validate(&mut self, val: &mut Loader, interrupt: &AtomicBool) -> Result<Option<f32>> {
        let batches = match self.plan.val_batches {
            0 => val.batches_per_epoch(),
            most => most.min(val.batches_per_epoch()),
        };
        let go_on = |_| match interrupt.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted(String::new())),
            false => Ok(()),
        };
        match mean_loss(self.model, &mut self.acts, val, batches, go_on) {
            Err(Error::Interrupted(_)) => Ok(None),
            loss => loss.map(Some),
        }
    }

    /// Reports a text that the model makes up; false when it was interrupted.
    fn sample(&mut self, step: u64, interrupt: &AtomicBool) -> Result<bool> {
        let Some(tokenizer) = self.tokenizer else { return Ok(true) };
        let generator = match &mut self.generator {
            Some(generator) => generator,
            none => none.insert(Generator::new(self.model)?),
        };
        let sampling = Sampling { temperature: 0.8, top_k: 0, top_p: 1.0, seed: self.plan.seed };
        let mut sampler = Sampler::new(sampling, step);
        let mut decoder = StreamDecoder::new(tokenizer);
        let (mut text, mut stopped) = (String::new(), false);
        let end = tokenizer.end_of_text();
        generator.generate(self.model, &[end], self.plan.sample_tokens, &mut sampler, |token| {
            stopped = interrupt.load(Ordering::Relaxed);
            if stopped || token == end {
                return Ok(false);
            }
            text.push_str(&decoder.push(token)?);
            Ok(true)
        })?;
        if stopped {
            return Ok(false);
        }
        text.push_str(&decoder.finish());
        self.reporter.sample(&SampleRecord { step, sample: text })?;
        Ok(true)
    }

    /// Writes the checkpoint of an interrupted run and says where it is.
    fn interrupted(&mut self, train: &Loader) -> Result<Error> {
        self.save_what_is_new(train)?;
        Ok(Error::Interrupted(match &self.saved {
            Some((step, file)) => format!("the checkpoint after step {step} is in {}", file.display()),
            None => "no step was done yet, so nothing was written".to_string(),
        }))
    }

    /// Writes a checkpoint if steps were done since the last one.
    fn save_what_is_new(&mut self, train: &Loader) -> Result<()> {
        let (step, saved) = (self.optimizer.step(), self.saved.as_ref().map_or(0, |(step, _)| *step));
        if step > saved { self.save(step, train.position()) } else { Ok(()) }
    }

    fn save(&mut self, step: u64, position: Position) -> Result<()> {
        let spikes = self.plan.skip.is_on().then_some(&self.spikes);
        let mut extra = self.plan.notes.clone();
        extra.extend(progress::entries(position.batches, self.unfinished, spikes)?);
        let meta = Meta { tokenizer: self.tokenizer.map(|tokenizer| tokenizer.name().to_string()), step, extra };
        let checkpoint = Checkpoint { weights: self.model.weights()?, meta };
        let moments = self.optimizer.moments(self.model)?;
        let left_over = self.series.save(&checkpoint, &moments)?;
        let path = &self.plan.checkpoint;
        (self.saved, self.saved_at) = (Some((step, path.clone())), Instant::now());
        self.reporter.note(&format!("step {step}/{} | checkpoint written to {}", self.plan.steps, path.display()))?;
        left_over.iter().try_for_each(|error| self.reporter.note(&format!("note: {error}")))
    }
}

/// The mean loss over the first `batches` batches of `data`. `progress` is told the batches done and may stop the work; the
/// device is never more than two batches behind it.
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
    let first = Span { offset: 0, len: 1 };
    let mut last = None;
    data.reset();
    for batch in 0..batches {
        data.next_batch(&mut inputs, &mut targets)?;
        model.upload_batch(acts, &inputs, &targets)?;
        let write = if batch == 0 { Write::Set } else { Write::Add };
        model.evaluate(acts, &mut total, 1.0 / (rows * batches) as f32, write)?;
        let device = model.backend();
        if let Some(before) = last.replace(device.request(&total, first)?) {
            device.collect(before)?;
        }
        let told = progress(batch + 1);
        if told.is_err() {
            // A read-back that is under way is not dropped.
            device.sync()?;
        }
        told?;
    }
    let loss = model.backend().download(&total, first)?[0];
    match loss.is_finite() {
        true => Ok(loss),
        false => {
            Err(Error::usage(format!("the model's loss is {loss}: it has diverged; go back to an earlier checkpoint")))
        }
    }
}
