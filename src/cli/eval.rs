//! `bandtrain eval`: the loss of a model on a text.

use super::device::{DeviceArgs, Task, with_backend};
use super::parse;
use crate::backend::Backend;
use crate::checkpoint;
use crate::data::{Loader, Shuffle};
use crate::error::{Error, Result};
use crate::model::{Activations, Model};
use crate::output::{self, grouped};
use crate::say;
use crate::train::mean_loss;
use crate::weights::Weights;
use clap::builder::NonEmptyStringValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

/// Measures a model's loss and perplexity on token files
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bandtrain eval -e model.safetensors -j data/tinystories/TinyStories_val.bin -m 20")]
pub struct EvalArgs {
    /// Model to evaluate
    #[arg(long, short = 'e', value_name = "FILE")]
    init: PathBuf,
    /// Token files (path or glob)
    #[arg(long, short = 'j', value_parser = NonEmptyStringValueParser::new(), value_name = "FILES")]
    val_data: String,
    /// Most batches, 0 is all
    #[arg(long, short = 'm', default_value = "0", value_parser = parse::count, value_name = "N", allow_negative_numbers = true)]
    val_batches: usize,
    /// Sequences per batch
    #[arg(long, short = 'b', default_value = "4", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    batch_size: usize,
    /// Tokens per sequence [default: the model's longest]
    #[arg(long, short = 't', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    seq_len: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Eval {
    weights: Weights,
    data: Loader,
    args: EvalArgs,
    seq_len: usize,
}

/// Runs the command.
///
/// # Errors
/// A model or data that cannot be read or do not fit each other.
pub fn run(args: EvalArgs) -> Result<()> {
    let weights = checkpoint::load(&args.init)?.weights;
    let seq_len = args.seq_len.unwrap_or(weights.config().max_seq_len);
    check_seq_len(seq_len, weights.config().max_seq_len)?;
    let vocab = weights.config().vocab_size;
    let data = Loader::open(&args.val_data, vocab, args.batch_size, seq_len, Shuffle::None, 0)?;
    with_backend(args.device, Eval { weights, data, args, seq_len })
}

/// Refuses sequences longer than the model's positions.
///
/// # Errors
/// [`Error::Usage`].
pub fn check_seq_len(seq_len: usize, longest: usize) -> Result<()> {
    if seq_len <= longest {
        return Ok(());
    }
    Err(Error::usage(format!(
        "a sequence of {seq_len} tokens is longer than the {longest} positions of this model; choose -t {longest} or less"
    )))
}

impl Task for Eval {
    type Output = ();

    fn run<B: Backend>(mut self, backend: B) -> Result<()> {
        let mut model = Model::new(backend, &self.weights)?;
        let mut acts = Activations::new(&mut model, self.args.batch_size, self.seq_len, false)?;
        let batches = match self.args.val_batches {
            0 => self.data.batches_per_epoch(),
            most => most.min(self.data.batches_per_epoch()),
        };
        let bar = if self.args.json { ProgressBar::hidden() } else { ProgressBar::new(batches as u64) };
        bar.set_style(ProgressStyle::with_template("{bar:32} {pos}/{len} batches, ETA {eta}").expect("well formed"));
        let loss = mean_loss(&mut model, &mut acts, &mut self.data, batches, |done| {
            bar.set_position(done as u64);
            Ok(())
        })?;
        bar.finish_and_clear();
        let (tokens, perplexity) = (batches * acts.dims().rows(), f64::from(loss).exp());
        if self.args.json {
            let json =
                serde_json::json!({ "loss": loss, "perplexity": perplexity, "tokens": tokens, "batches": batches });
            return say!("{json}");
        }
        let digits = output::loss(loss);
        say!("loss {digits}, perplexity {perplexity:.4}, over {} tokens ({batches} batches)", grouped(tokens))
    }
}
