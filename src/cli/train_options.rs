//! The options of a training: from the command line and from a TOML file (`--config`), of which the command line wins.

use super::device::{BackendName, DeviceArgs, Precision};
use super::parse;
use crate::bandwidths::Bandwidths;
use crate::data::Shuffle;
use crate::error::{Error, Result};
use crate::every::Every;
use crate::optim::{Recipe, Schedule};
use crate::output::shortened;
use clap::builder::NonEmptyStringValueParser;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const AFTER_HELP: &str = "\
Examples:
  bandtrain train                                          the toy corpus, about a minute
  bandtrain train -i train.bin -j val.bin -w 1024 -n 3000  the experiment's model, FC1 banded
  bandtrain train -e model.safetensors -i train.bin -n 500 go on from saved weights

Long runs:
  bandtrain train -i train.bin -j val.bin -n 100000 --run runs/a -k 10m --keep 3 --resume
    puts everything into the folder runs/a, with a checkpoint every 10 minutes; the same command
    goes on after whatever stopped the run, with the same bits as if nothing had
  Ctrl-C (or SIGTERM)
    finishes the step, writes a checkpoint and says where it is; a second one stops at once
  bandtrain plot runs/a --output a.png
    draws loss, gradient norm, learning rate and throughput; so does 'tensorboard --logdir runs/a'
  bandtrain convert -i runs/a/model.safetensors -o a-hf --to hf
    exports the model; in Python, transformers.AutoModelForCausalLM.from_pretrained('a-hf') loads it";

/// Trains a model
///
/// Without data it takes data/tinystories/ if that exists, else the built-in toy corpus; without a model the preset that
/// suits the data. Everything not given comes from the preset and the recipe, and is written beside the checkpoint.
#[derive(Debug, Clone, Default, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(after_help = AFTER_HELP)]
pub struct TrainOptions {
    /// TOML file with options by their long names; the command line wins over it
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    #[serde(skip)]
    pub(super) config: Option<PathBuf>,
    /// Model to start from, any known format
    #[arg(long, short = 'e', value_name = "FILE", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) init: Option<PathBuf>,
    /// Sizes and defaults: toy, tinystories-7m, tinystories-51m, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    #[arg(long, value_name = "NAME", help_heading = "Model", conflicts_with = "init")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) preset: Option<String>,
    /// Bandwidth of FC1, 0 is dense; by block a ramp 1024..256 or a list 1024,512,0; or a pattern of weight blocks with its
    /// density, in lists too: random:0.438 (random:0.438:7 with seed 7), strided:0.438, or learned:0.438 (from the random ones, or
    /// from a diagonal band as learned:0.438:band) [default: the preset's or the model's; also -1]
    #[arg(long, short = 'w', short_alias = '1', value_parser = parse::bandwidths, value_name = "N", help_heading = "Model",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fc1_bandwidth: Option<Bandwidths>,
    /// Bandwidth or pattern of FC2, likewise [default: the preset's or the model's]
    #[arg(long, short = '2', value_parser = parse::bandwidths, value_name = "N", help_heading = "Model",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fc2_bandwidth: Option<Bandwidths>,
    /// Width of the MLP [default: 4C, or the model's]
    #[arg(long, value_parser = parse::positive, value_name = "N", help_heading = "Model", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mlp_width: Option<usize>,
    /// Multiply the fresh weights of banded layers by sqrt(dense / kept connections)
    #[arg(long, help_heading = "Model", conflicts_with = "init")]
    #[serde(skip_serializing_if = "is_false")]
    pub(super) rescale_init: bool,
    /// 1: FC1 and FC2 dense, whatever the bandwidths
    #[arg(long, short = 'd', value_parser = parse::switch, value_name = "0|1", help_heading = "Model", num_args = 0..=1,
          default_missing_value = "1")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dense: Option<bool>,

    /// Training token files (path or glob)
    #[arg(long, short = 'i', value_parser = NonEmptyStringValueParser::new(), value_name = "FILES",
          help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) train_data: Option<String>,
    /// Validation token files (path or glob)
    #[arg(long, short = 'j', value_parser = NonEmptyStringValueParser::new(), value_name = "FILES",
          help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) val_data: Option<String>,
    /// Order of batches: llmc (shuffled as llm.c does) or none (as they lie) [default: llmc]
    #[arg(long, value_enum, value_name = "ORDER", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) shuffle: Option<Shuffle>,

    /// Optimizer steps [default: the preset's]
    #[arg(long, short = 'n', value_parser = parse::positive_steps, value_name = "N", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) steps: Option<u64>,
    /// Sequences per batch [default: the preset's]
    #[arg(long, short = 'b', value_parser = parse::positive, value_name = "N", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) batch_size: Option<usize>,
    /// Tokens per sequence [default: the model's longest]
    #[arg(long, short = 't', value_parser = parse::positive, value_name = "N", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seq_len: Option<usize>,
    /// Batches whose gradients make up one step [default: 1]
    #[arg(long, value_parser = parse::positive, value_name = "N", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) grad_accum: Option<usize>,
    /// Learning rate at its peak [default: the preset's]
    #[arg(long, short = 'l', value_parser = parse::above_zero, value_name = "F", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) learning_rate: Option<f64>,
    /// How the learning rate runs [default: constant; toy: cosine]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) schedule: Option<Schedule>,
    /// Steps of linear warm-up [default: 0; toy: 20]
    #[arg(long, value_parser = parse::steps, value_name = "N", help_heading = "Training", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) warmup: Option<u64>,
    /// Optimizer settings by name [default: stable]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) recipe: Option<Recipe>,
    /// AdamW's first decay [default: the recipe's]
    #[arg(long, value_parser = parse::below_one, value_name = "F", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) beta1: Option<f64>,
    /// AdamW's second decay [default: the recipe's]
    #[arg(long, value_parser = parse::below_one, value_name = "F", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) beta2: Option<f64>,
    /// Decay of the matrices [default: the recipe's]
    #[arg(long, value_parser = parse::not_negative, value_name = "F", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) weight_decay: Option<f64>,
    /// Global gradient norm to clip at, 0 is off [default: the recipe's]
    #[arg(long, value_parser = parse::not_negative, value_name = "F", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) grad_clip: Option<f64>,
    /// Skip updates whose loss is this many standard deviations above the mean of the last 128, 0 is off [default: 0]
    #[arg(long, value_parser = parse::not_negative, value_name = "Z", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) skip_loss_zscore: Option<f64>,
    /// The same for the gradient norm. With either, updates that are not finite are skipped too [default: 0]
    #[arg(long, value_parser = parse::not_negative, value_name = "Z", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) skip_grad_zscore: Option<f64>,
    /// Steps between exchanges of learned blocks: those of least weight norm go, those of largest gradient norm come (RigL), 0 is
    /// never [default: 100]
    #[arg(long, value_parser = parse::steps, value_name = "N", help_heading = "Training", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) learn_every: Option<u64>,
    /// Share of learned blocks to exchange at first; it falls to 0 as half a cosine [default: 0.3]
    #[arg(long, value_parser = parse::below_one, value_name = "F", help_heading = "Training",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) learn_fraction: Option<f64>,
    /// Step from which learned blocks stay as they are [default: three quarters of the steps]
    #[arg(long, value_parser = parse::steps, value_name = "N", help_heading = "Training", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) learn_until: Option<u64>,
    /// Seed of weights, batch order and samples [default: 42]
    #[arg(long, value_parser = parse::seed, value_name = "N", help_heading = "Training", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seed: Option<u64>,

    /// Steps between validations, 0 is never [default: the preset's]
    #[arg(long, short = 'v', value_parser = parse::steps, value_name = "N", help_heading = "Reports",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) val_every: Option<u64>,
    /// Most batches of a validation, 0 is all [default: 20]
    #[arg(long, short = 'm', value_parser = parse::count, value_name = "N", help_heading = "Reports",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) val_batches: Option<usize>,
    /// Steps between samples, 0 is never [default: the preset's]
    #[arg(long, short = 's', value_parser = parse::steps, value_name = "N", help_heading = "Reports",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sample_every: Option<u64>,
    /// Tokens of a sample [default: 256]
    #[arg(long, short = 'g', value_parser = parse::positive, value_name = "N", help_heading = "Reports",
          allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sample_tokens: Option<usize>,
    /// Log file in llm.c's format: s:STEP trl:LOSS, s:STEP tel:LOSS
    #[arg(long, short = 'o', value_name = "FILE", help_heading = "Reports")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) log: Option<PathBuf>,
    /// JSON-lines file: one object for each step and each validation
    #[arg(long, value_name = "FILE", help_heading = "Reports")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metrics: Option<PathBuf>,
    /// Draw loss, throughput, memory, load and samples on the whole terminal while training
    #[arg(long, help_heading = "Reports")]
    #[serde(skip)]
    pub(super) dashboard: bool,
    /// Print nothing but errors
    #[arg(long, help_heading = "Reports", conflicts_with = "dashboard")]
    #[serde(skip_serializing_if = "is_false")]
    pub(super) quiet: bool,

    /// Folder for everything about the run: model.safetensors (the newest checkpoint), older ones, run.toml (every option),
    /// metrics.jsonl, samples.jsonl, TensorBoard's event files, starts.jsonl (time, version and device of each start)
    #[arg(long, value_name = "DIR", help_heading = "Run", conflicts_with_all = ["checkpoint", "metrics"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) run: Option<PathBuf>,
    /// Checkpoint to write, .safetensors (native) or .bin (llm.c) [default: runs/PRESET.safetensors]
    #[arg(long, short = 'c', value_name = "FILE", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) checkpoint: Option<PathBuf>,
    /// Go on from the newest whole checkpoint, bit for bit; where there is none, start fresh
    #[arg(long, help_heading = "Run")]
    #[serde(skip_serializing_if = "is_false")]
    pub(super) resume: bool,
    /// Resume even when a changed option makes it another run
    #[arg(long, help_heading = "Run")]
    #[serde(skip)]
    pub(super) force: bool,
    /// Time between checkpoints: steps (500) or minutes (10m; also s, h), 0 is at the end only [default: 0]
    #[arg(long, short = 'k', value_name = "N|TIME", help_heading = "Run", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) checkpoint_every: Option<Every>,
    /// Checkpoints to keep: the newest as -c says, older ones beside it as NAME-STEP; 0 keeps all [default: 1]
    #[arg(long, value_parser = parse::count, value_name = "N", help_heading = "Run", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) keep: Option<usize>,
    /// Steps between milestones: checkpoints that are never removed, NAME-milestone-STEP; 0 is none [default: 0]
    #[arg(long, value_parser = parse::steps, value_name = "N", help_heading = "Run", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) milestone_every: Option<u64>,
    /// Where to compute [default: auto]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backend: Option<BackendName>,
    /// wgpu: the adapter, by its index or a part of its name ('bandtrain info' lists them)
    #[arg(long, value_name = "NAME|INDEX", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) adapter: Option<String>,
    /// How to compute [default: auto]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) precision: Option<Precision>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Takes each named field from the other options where it is open here.
macro_rules! fill {
    ($options:ident, $others:ident: $($field:ident)*) => { $($options.$field = $options.$field.take().or($others.$field);)* };
}

impl TrainOptions {
    /// These options, with what they leave open taken from others.
    pub(super) fn or(mut self, others: TrainOptions) -> TrainOptions {
        // A model named here replaces the other's, whichever way that one is named.
        if self.init.is_none() && self.preset.is_none() {
            fill!(self, others: init preset);
        }
        // So does a recipe the other's settings, and a bandwidth asked for here the other's wish for a dense model.
        if self.recipe.is_none() {
            fill!(self, others: recipe beta1 beta2 weight_decay grad_clip);
        }
        if self.fc1_bandwidth.is_none() && self.fc2_bandwidth.is_none() {
            fill!(self, others: dense);
        }
        // A run's folder has places of its own for what these name.
        if self.run.is_none() {
            if self.checkpoint.is_none() && self.metrics.is_none() {
                fill!(self, others: run);
            }
            fill!(self, others: checkpoint metrics);
        }
        fill!(self, others: fc1_bandwidth fc2_bandwidth mlp_width train_data val_data shuffle steps batch_size seq_len grad_accum
            learning_rate schedule warmup seed val_every val_batches sample_every sample_tokens log
            checkpoint_every keep milestone_every skip_loss_zscore skip_grad_zscore learn_every learn_fraction learn_until
            backend adapter precision);
        self.quiet |= others.quiet;
        self.rescale_init |= others.rescale_init;
        self.resume |= others.resume;
        self
    }

    /// The first of the options about learned blocks that is given.
    pub(super) fn learning(&self) -> Option<&'static str> {
        let given = [
            ("learn-every", self.learn_every.is_some()),
            ("learn-fraction", self.learn_fraction.is_some()),
            ("learn-until", self.learn_until.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }

    /// The options that choose a device.
    pub(super) fn device(&self) -> DeviceArgs {
        DeviceArgs {
            backend: self.backend.unwrap_or(BackendName::Auto),
            adapter: self.adapter.clone(),
            precision: self.precision.unwrap_or(Precision::Auto),
        }
    }

    /// Adds the options of the file named by `--config`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] naming the line that is no option.
    pub(super) fn with_file(self) -> Result<TrainOptions> {
        let Some(path) = self.config.clone() else { return Ok(self) };
        let text = read_text(&path)?;
        let advice = "options go by their long names, as in steps = 300, and --help lists them";
        let file: TrainOptions = parse_toml(&path, &text, advice)?;
        file.check(&path)?;
        Ok(self.or(file))
    }

    /// Holds values from a file to what the command line accepts.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let command = <TrainOptions as clap::Args>::augment_args(clap::Command::new("file").no_binary_name(true));
        let table = toml::Value::try_from(self).map_err(|error| Error::file(path, error.to_string()))?;
        let values = table.as_table().into_iter().flatten().filter(|(_, value)| !value.is_bool());
        let args = values.map(|(key, value)| match value {
            toml::Value::String(text) => format!("--{key}={text}"),
            number => format!("--{key}={number}"),
        });
        command
            .try_get_matches_from(args)
            .map(|_| ())
            .map_err(|error| Error::file(path, shortened(&super::sentence(&error), MOST_CITED)))
    }
}

/// Characters of a complaint about a file of options, which cites keys and values: more than any sensible one has.
const MOST_CITED: usize = 300;

/// What a file of options says.
///
/// # Errors
/// [`Error::File`] naming the line that is none, with this advice.
pub(super) fn parse_toml<T: DeserializeOwned>(path: &Path, text: &str, advice: &str) -> Result<T> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        // The list of what a key might be is longer than a sentence.
        let what = error.message();
        let what =
            if what.starts_with("unknown field") { what.split(", expected").next().unwrap_or(what) } else { what };
        Error::file(path, format!("line {line}: {}; {advice}", shortened(what, MOST_CITED)))
    })
}

/// The text of a file of options.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] when it is too long or no text.
pub(super) fn read_text(path: &Path) -> Result<String> {
    const MOST_BYTES: u64 = 1 << 20;
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(Error::file(path, "is larger than any file of options; name a TOML file"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::file(path, format!("is not UTF-8 text (byte {at}); name a TOML file"))
    })
}
