//! `bandtrain train`, and `bandtrain` without a command: the options' defaults, their checks, and the training.
//!
//! What the options leave open is filled in by the preset and the recipe, and the result is written beside the checkpoint
//! as a file that `--config` takes.

use super::device::{Task, with_backend};
use super::eval::check_seq_len;
use super::outputs::Outputs;
use super::resume::{self, Resumed};
use super::train_options::TrainOptions;
use crate::backend::Backend;
use crate::bandwidths::Bandwidths;
use crate::checkpoint::{self, Format, Keep, Series};
use crate::config::{BYTES_VOCAB, GptConfig, Preset, preset};
use crate::data::{Loader, Shuffle, Tokenizer, toy};
use crate::error::{Error, Result};
use crate::every::Every;
use crate::interrupt;
use crate::learn::LearnRule;
use crate::memory::{MemoryEstimate, stored_elements};
use crate::model::Model;
use crate::optim::{Hyperparameters, Recipe};
use crate::output::{grouped, loss};
use crate::report::{Reporter, Show};
use crate::shapes::{Param, ParamTable, learned_tensors};
use crate::train::spike::SpikeRule;
use crate::train::{Progress, TrainPlan, Trainer};
use crate::weights::Weights;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;

/// The experiment's data, used when it is there and nothing else is named.
const DEFAULT_TRAIN_DATA: &str = "data/tinystories/TinyStories_train.bin";
const DEFAULT_VAL_DATA: &str = "data/tinystories/TinyStories_val.bin";

/// A checked training: every option has its value.
struct TrainConfig {
    options: TrainOptions,
    plan: TrainPlan,
    outputs: Outputs,
    weights: Weights,
    name: String,
    tokenizer: Option<Tokenizer>,
    train: Loader,
    val: Option<Loader>,
    notes: Vec<String>,
    progress: Option<Progress>,
}

/// Runs the command.
///
/// # Errors
/// Options, files or sizes that do not fit; what the training meets.
pub fn run(options: TrainOptions) -> Result<()> {
    let options = options.with_file()?;
    if options.force && !options.resume {
        return Err(Error::usage("--force lets --resume go on with changed options; give it together with --resume"));
    }
    if options.dashboard && !std::io::stdout().is_terminal() {
        return Err(Error::usage(
            "--dashboard draws on a terminal, and standard output is none; leave it out, or write files with --run",
        ));
    }
    with_backend(&options.device(), options)
}

impl Task for TrainOptions {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        let show = match (self.quiet, self.dashboard) {
            (true, _) => Show::Nothing,
            (false, true) => Show::Dashboard,
            (false, false) => Show::Lines,
        };
        train(self, backend, show).map(|_| ())
    }
}

/// What a training was, for who compares several.
pub(super) struct Trained {
    /// Steps it did.
    pub steps: u64,
    /// Tokens of one step.
    pub step_tokens: u64,
    /// Bytes of device memory that it was estimated to take.
    pub memory_bytes: usize,
    /// The learned blocks in the end, by tensor.
    pub blocks: BTreeMap<String, String>,
}

/// Trains on `backend` as the options say.
///
/// # Errors
/// As [`run`].
pub(super) fn train<B: Backend>(options: TrainOptions, backend: B, show: Show) -> Result<Trained> {
    resolve(options, &backend)?.train(backend, show)
}

/// Names the data and the preset that options without a model mean, and returns the preset.
///
/// # Errors
/// [`Error::Usage`] for an unknown preset.
pub(super) fn name_preset(options: &mut TrainOptions) -> Result<Preset> {
    let source = name_source(options);
    let fallback = if matches!(source, Source::Toy) { "toy" } else { "tinystories-51m" };
    preset(options.preset.get_or_insert_with(|| fallback.to_string()))
}

/// Where the training data comes from.
enum Source {
    Files(String),
    Toy,
}

/// Names the data that options without any mean.
fn name_source(options: &mut TrainOptions) -> Source {
    match &options.train_data {
        Some(files) => Source::Files(files.clone()),
        None if Path::new(DEFAULT_TRAIN_DATA).exists() => {
            options.val_data.get_or_insert_with(|| DEFAULT_VAL_DATA.to_string());
            Source::Files(options.train_data.insert(DEFAULT_TRAIN_DATA.to_string()).clone())
        }
        None => Source::Toy,
    }
}

/// Fills in what the options leave open, opens everything they name, and makes sure that everything can be written.
fn resolve<B: Backend>(mut options: TrainOptions, backend: &B) -> Result<TrainConfig> {
    let source = name_source(&mut options);
    let mut notes = Vec::new();
    let start = start(&mut options)?;
    let (config, name) = (start.config, start.name.clone());
    let seed = *options.seed.get_or_insert(42);
    let outputs = Outputs::new(&mut options, &name)?;
    if Format::of_path(&outputs.checkpoint)? == Format::Llmc {
        checkpoint::check_llmc(&outputs.checkpoint, &config)?;
    }
    let mut plan = plan(&mut options, &start.defaults, &config, &outputs)?;
    let tokenizer = Tokenizer::for_vocab_size(config.vocab_size).ok();
    let shuffle = *options.shuffle.get_or_insert(Shuffle::Llmc);
    let (batch, tokens, vocab) = (plan.batch_size, plan.seq_len, config.vocab_size);
    // The options hold seeds below 2^32.
    let order = seed as u32;
    let (train, val) = match &source {
        Source::Files(files) => {
            let train = Loader::open(files, vocab, batch, tokens, shuffle, order)?;
            let val = match &options.val_data {
                Some(files) => Some(Loader::open(files, vocab, batch, tokens, Shuffle::None, order)?),
                None => None,
            };
            (train, val)
        }
        Source::Toy => {
            let tokenizer = tokenizer.ok_or_else(|| {
                Error::usage(format!("the built-in toy corpus has no tokenizer of {vocab} tokens; name data with -i"))
            })?;
            let (train, held_out) = toy::toy_tokens(tokenizer);
            let train = Loader::from_tokens(train, "the toy corpus", batch, tokens, shuffle, order)?;
            let val = match &options.val_data {
                Some(files) => Loader::open(files, vocab, batch, tokens, Shuffle::None, order)?,
                None => {
                    let name = "the toy corpus's held-out part";
                    Loader::from_tokens(held_out, name, batch, tokens, Shuffle::None, order)?
                }
            };
            (train, Some(val))
        }
    };
    if val.is_none() && plan.val_every > 0 {
        notes.push("no validation: name validation data with -j".to_string());
    }
    MemoryEstimate::check(backend, &config, plan.batch_size, plan.seq_len)?;
    plan.notes = resume::identity(&options, &config, &train, val.as_ref())?;
    let series = Series::new(&plan.checkpoint, plan.keep)?;
    let resumed = match options.resume {
        true => resume::find(&series, &plan.notes, &config, options.force, &mut notes)?,
        false => {
            outputs.check_fresh()?;
            resume::check_fresh(&series)?;
            None
        }
    };
    let (weights, progress) = match resumed {
        Some(Resumed { weights, progress, .. }) => (weights, Some(progress)),
        None => (start.weights(seed, options.rescale_init, &mut notes)?, None),
    };
    outputs.check_apart(&options, series.native())?;
    outputs.check_writable()?;
    Ok(TrainConfig { options, plan, outputs, weights, name, tokenizer, train, val, notes, progress })
}

/// What a training starts from: the model's name and sizes, the preset whose defaults apply, and the weights if they come
/// from a file.
struct Start {
    name: String,
    defaults: Preset,
    config: GptConfig,
    loaded: Option<Weights>,
}

impl Start {
    /// The initial weights, banded as asked.
    fn weights(self, seed: u64, rescale: bool, notes: &mut Vec<String>) -> Result<Weights> {
        let Some(weights) = self.loaded else {
            let mut weights = Weights::init(&self.config, seed)?;
            if rescale {
                weights.rescale_cut();
            }
            return Ok(weights);
        };
        if *weights.config() == self.config {
            return Ok(weights);
        }
        let (fc1, fc2) = (self.config.fc1_bandwidth, self.config.fc2_bandwidth);
        let (weights, cut) = weights.rebanded(fc1, fc2)?;
        for (layer, bandwidth, cut) in [("FC1", fc1, cut[0]), ("FC2", fc2, cut[1])] {
            if !bandwidth.is_dense() {
                notes.push(format!("banding {layer} cut {:.2} % of its weights' squared norm", 100.0 * cut));
            }
        }
        Ok(weights)
    }
}

/// The preset whose defaults suit a model that comes from a file.
///
/// # Errors
/// None: the preset exists.
pub(super) fn preset_like(model: &GptConfig) -> Result<Preset> {
    preset(if model.vocab_size == BYTES_VOCAB { "toy" } else { "tinystories-51m" })
}

/// Finds the model that the options name, and its bandwidths.
fn start(options: &mut TrainOptions) -> Result<Start> {
    let (name, defaults, model, loaded) = match &options.init {
        Some(path) => {
            let weights = checkpoint::load(path)?.weights;
            let model = *weights.config();
            let name = path.file_stem().map_or("model".into(), |stem| stem.to_string_lossy().into_owned());
            (name, preset_like(&model)?, model, Some(weights))
        }
        None => {
            let defaults = name_preset(options)?;
            (defaults.name.to_string(), defaults, defaults.model, None)
        }
    };
    let dense = options.dense == Some(true);
    let asked = |bandwidth: Option<Bandwidths>, own: Bandwidths| match dense {
        true => Bandwidths::DENSE,
        false => bandwidth.unwrap_or(own),
    };
    let config = GptConfig {
        fc1_bandwidth: asked(options.fc1_bandwidth, model.fc1_bandwidth),
        fc2_bandwidth: asked(options.fc2_bandwidth, model.fc2_bandwidth),
        ..model
    };
    let config = config.with_mlp_width(options.mlp_width.unwrap_or(config.mlp_width()));
    if loaded.is_some() && config.mlp_width() != model.mlp_width() {
        return Err(Error::usage(format!(
            "the model to start from (-e) has an MLP of width {}; leave out --mlp-width, or start from fresh weights",
            model.mlp_width()
        )));
    }
    if loaded.is_some() && options.rescale_init {
        return Err(Error::usage("--rescale-init is for fresh weights; leave it out, or leave out -e"));
    }
    options.mlp_width = config.mlp_width;
    options.fc1_bandwidth = Some(config.fc1_bandwidth);
    options.fc2_bandwidth = Some(config.fc2_bandwidth);
    Ok(Start { name, defaults, config, loaded })
}

/// The plan, with every option that it takes filled in.
fn plan(options: &mut TrainOptions, defaults: &Preset, config: &GptConfig, outputs: &Outputs) -> Result<TrainPlan> {
    let recipe = options.recipe.get_or_insert(Recipe::Stable).hyperparameters();
    // Off is the same as not given, for --resume too.
    options.skip_loss_zscore = options.skip_loss_zscore.filter(|&zscore| zscore > 0.0);
    options.skip_grad_zscore = options.skip_grad_zscore.filter(|&zscore| zscore > 0.0);
    let seq_len = *options.seq_len.get_or_insert(config.max_seq_len);
    check_seq_len(seq_len, config.max_seq_len)?;
    let steps = *options.steps.get_or_insert(defaults.steps);
    let plan = TrainPlan {
        steps,
        batch_size: *options.batch_size.get_or_insert(defaults.batch_size),
        seq_len,
        grad_accum: *options.grad_accum.get_or_insert(1),
        learning_rate: *options.learning_rate.get_or_insert(defaults.learning_rate),
        schedule: *options.schedule.get_or_insert(defaults.schedule),
        warmup: *options.warmup.get_or_insert(defaults.warmup),
        hyper: Hyperparameters {
            beta1: *options.beta1.get_or_insert(recipe.beta1),
            beta2: *options.beta2.get_or_insert(recipe.beta2),
            weight_decay: *options.weight_decay.get_or_insert(recipe.weight_decay),
            grad_clip: *options.grad_clip.get_or_insert(recipe.grad_clip),
        },
        val_every: *options.val_every.get_or_insert(defaults.val_every),
        val_batches: *options.val_batches.get_or_insert(20),
        sample_every: *options.sample_every.get_or_insert(defaults.sample_every),
        sample_tokens: *options.sample_tokens.get_or_insert(256),
        skip: SpikeRule {
            loss_zscore: options.skip_loss_zscore.unwrap_or(0.0),
            grad_zscore: options.skip_grad_zscore.unwrap_or(0.0),
        },
        learn: learn_rule(options, config, steps)?,
        checkpoint_every: *options.checkpoint_every.get_or_insert(Every::Steps(0)),
        keep: Keep { last: options.keep, milestone_every: options.milestone_every.unwrap_or(0) },
        checkpoint: outputs.checkpoint.clone(),
        seed: options.seed.unwrap_or(42),
        notes: Default::default(),
    };
    let tokens = plan.batch_size.checked_mul(plan.seq_len).and_then(|rows| rows.checked_mul(plan.grad_accum));
    if tokens.is_none_or(|tokens| tokens > 1 << 31) {
        return Err(Error::usage(format!(
            "a step of {} x {} x {} tokens is absurd; choose a smaller -b, -t or --grad-accum",
            plan.grad_accum, plan.batch_size, plan.seq_len
        )));
    }
    Ok(plan)
}

/// When learned blocks are exchanged, with the options for it filled in; `None` where no layer has any.
fn learn_rule(options: &mut TrainOptions, config: &GptConfig, steps: u64) -> Result<Option<LearnRule>> {
    if !(config.fc1_bandwidth.has_learned() || config.fc2_bandwidth.has_learned()) {
        return match options.learning() {
            None => Ok(None),
            Some(option) => Err(Error::usage(format!(
                "--{option} is for learned blocks, but no layer has any; give it some, as in -w learned:0.438, or leave \
                 --{option} out"
            ))),
        };
    }
    let rule = LearnRule::new(options.learn_every, options.learn_fraction, options.learn_until, steps);
    options.learn_every = Some(rule.every);
    options.learn_fraction = Some(rule.fraction);
    options.learn_until = Some(rule.until);
    Ok(Some(rule))
}

impl TrainConfig {
    fn train<B: Backend>(mut self, backend: B, show: Show) -> Result<Trained> {
        let plan = &self.plan;
        let why = self.options.device().chosen().1.map(|why| format!(" ({why})")).unwrap_or_default();
        let device = format!("{}, {}{why}", backend.description(), backend.arithmetic().name());
        let after = self.progress.as_ref().map(|progress| progress.step);
        let interrupt = interrupt::listen()?;
        let begin = self.outputs.record(&self.options, &device, after.unwrap_or(0))?;
        let mut reporter = Reporter::new(plan.steps, show, &device, &self.outputs.reports, after, begin)?;
        describe(&self.name, &self.weights, plan, &self.train, &device, &mut reporter)?;
        for note in &self.notes {
            reporter.note(&format!("note: {note}"))?;
        }
        let estimate = MemoryEstimate::new(&backend, self.weights.config(), plan.batch_size, plan.seq_len)?;
        let mut model = Model::new(backend, &self.weights)?;
        // From here on the weights live on the device.
        drop(self.weights);
        let config = *model.config();
        let mut train = |model| {
            let mut trainer = Trainer::new(plan, model, self.tokenizer, &mut reporter)?;
            if let Some(progress) = self.progress.take() {
                trainer.resume(&mut self.train, progress)?;
            }
            trainer.run(&mut self.train, self.val.as_mut(), interrupt)
        };
        let summary = train(&mut model)
            .map_err(|error| MemoryEstimate::advise(model.backend(), &config, plan.batch_size, plan.seq_len, error))?;
        if summary.skipped > 0 {
            reporter.note(&format!("skipped {} of {} updates as spikes", summary.skipped, plan.steps))?;
        }
        match summary.val_loss {
            Some((first, Some(last))) => {
                reporter.note(&format!("done: validation loss {} -> {}", loss(first), loss(last)))?;
            }
            Some((only, None)) => reporter.note(&format!("done: validation loss {}", loss(only)))?,
            None => {}
        }
        if show != Show::Brief {
            self.outputs.advice().iter().try_for_each(|line| reporter.note(line))?;
        }
        let step_tokens = (plan.batch_size * plan.seq_len * plan.grad_accum) as u64;
        let blocks = learned_blocks(&config, model.table());
        Ok(Trained { steps: plan.steps, step_tokens, memory_bytes: estimate.total(), blocks })
    }
}

/// The blocks of learned tensors, as text by the tensor's name.
pub(super) fn learned_blocks(config: &GptConfig, table: &ParamTable) -> BTreeMap<String, String> {
    let text = |(param, layer, _): (Param, usize, _)| {
        Some((param.name_in(layer), table.band(param, layer)?.0.blocks()?.to_text()))
    };
    learned_tensors(config).into_iter().filter_map(text).collect()
}

/// What is trained, on what, with what.
fn describe(
    name: &str,
    weights: &Weights,
    plan: &TrainPlan,
    train: &Loader,
    device: &str,
    reporter: &mut Reporter,
) -> Result<()> {
    let (config, table) = (weights.config(), weights.table());
    let GptConfig { channels, num_layers, num_heads, max_seq_len, vocab_size, .. } = config;
    let count = grouped(table.count(config));
    reporter.note(&format!(
        "model {name}: C={channels} L={num_layers} NH={num_heads} T={max_seq_len} V={vocab_size}, {count} parameters"
    ))?;
    for (layer, param) in [("FC1", Param::Fcw), ("FC2", Param::Fcprojw)] {
        reporter.note(&format!("  {layer} {}", describe_layer(weights, param)))?;
    }
    let TrainPlan { steps, batch_size, seq_len, grad_accum, learning_rate, schedule, warmup, hyper, .. } = plan;
    let tokens = grouped(train.num_tokens());
    reporter.note(&format!(
        "data: {tokens} tokens, {} batches of B={batch_size} x T={seq_len} an epoch",
        grouped(train.batches_per_epoch())
    ))?;
    reporter.note(&format!(
        "training: {steps} steps of {grad_accum} x {batch_size} x {seq_len} tokens, learning rate {learning_rate:e} \
         {} (warm-up {warmup}), beta {}/{}, decay {}, clip {}",
        format!("{schedule:?}").to_lowercase(),
        hyper.beta1,
        hyper.beta2,
        hyper.weight_decay,
        hyper.grad_clip
    ))?;
    if let Some(LearnRule { every, fraction, until }) = plan.learn {
        reporter.note(&format!(
            "learned blocks: exchanged every {every} steps before step {until}, at first {fraction:.4} of them"
        ))?;
    }
    reporter.note(&format!("device: {device}"))
}

fn describe_layer(weights: &Weights, param: Param) -> String {
    let (config, table) = (weights.config(), weights.table());
    let bandwidth = if param == Param::Fcw { config.fc1_bandwidth } else { config.fc2_bandwidth };
    let (_, dense) = stored_elements(config, table, param);
    match table.weights(config, param) {
        _ if bandwidth.is_dense() && config.mlp_width() != config.full_mlp_width() => {
            format!("dense, of width {} instead of {}", config.mlp_width(), config.full_mlp_width())
        }
        _ if bandwidth.is_dense() => "dense".to_string(),
        kept if kept == dense => format!("{} keeps every connection: the same as dense", bandwidth.title()),
        kept => format!("{}: {:.3} % of its connections", bandwidth.title(), 100.0 * kept as f64 / dense as f64),
    }
}
