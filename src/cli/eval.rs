//! `bandtrain eval`: the loss of a model on a text, or its score on HellaSwag.

use super::device::{DeviceArgs, Task, with_backend};
use super::parse;
use crate::backend::Backend;
use crate::checkpoint;
use crate::data::hellaswag::{self, ENDINGS, Question};
use crate::data::{Loader, Shuffle};
use crate::error::{Error, Result};
use crate::hellaswag::{Score, score};
use crate::model::{Activations, Model};
use crate::output::{self, grouped};
use crate::say;
use crate::train::mean_loss;
use crate::weights::Weights;
use clap::ArgGroup;
use clap::builder::NonEmptyStringValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};

/// Measures a model's loss and perplexity on token files, or its score on HellaSwag
///
/// HellaSwag asks which of four endings follows a text. The model's answer is the ending of the lowest mean loss, as in
/// llm.c; guessing scores 25 %. 'bandtrain tokenize --hellaswag' makes the file, and llm.c's own will do.
#[derive(clap::Args)]
#[command(
    group(ArgGroup::new("what").required(true).args(["val_data", "hellaswag"])),
    after_help = "Examples:\n  bandtrain eval -e model.safetensors -j data/tinystories/TinyStories_val.bin -m 20\n  \
                  bandtrain eval -e model.safetensors --hellaswag hellaswag_val.bin"
)]
pub struct EvalArgs {
    /// Model to evaluate
    #[arg(long, short = 'e', value_name = "FILE")]
    init: PathBuf,
    /// Token files (path or glob)
    #[arg(long, short = 'j', value_parser = NonEmptyStringValueParser::new(), value_name = "FILES")]
    val_data: Option<String>,
    /// HellaSwag's questions
    #[arg(long, value_name = "FILE")]
    hellaswag: Option<PathBuf>,
    /// Most batches, or of HellaSwag most questions; 0 is all (what fills no last batch is left out)
    #[arg(long, short = 'm', default_value = "0", value_parser = parse::count, value_name = "N", allow_negative_numbers = true)]
    val_batches: usize,
    /// Sequences per batch; of HellaSwag's, four make a question
    #[arg(long, short = 'b', default_value = "4", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    batch_size: usize,
    /// Tokens per sequence [default: the model's longest]
    #[arg(long, short = 't', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true,
          conflicts_with = "hellaswag")]
    seq_len: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// A model or data that cannot be read or do not fit each other.
pub fn run(args: EvalArgs) -> Result<()> {
    let weights = checkpoint::load(&args.init)?.weights;
    match (&args.val_data, &args.hellaswag) {
        (Some(files), _) => {
            let eval = Eval::new(weights, files, &args)?;
            with_backend(&args.device, eval)
        }
        (None, Some(path)) => {
            let eval = HellaSwag::new(weights, path, &args)?;
            with_backend(&args.device, eval)
        }
        (None, None) => Err(Error::Internal("the command line lacks what it requires".to_string())),
    }
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

/// The loss on token files.
struct Eval {
    weights: Weights,
    data: Loader,
    batch_size: usize,
    seq_len: usize,
    batches: usize,
    json: bool,
}

impl Eval {
    fn new(weights: Weights, files: &str, args: &EvalArgs) -> Result<Self> {
        let seq_len = args.seq_len.unwrap_or(weights.config().max_seq_len);
        check_seq_len(seq_len, weights.config().max_seq_len)?;
        let data = Loader::open(files, weights.config().vocab_size, args.batch_size, seq_len, Shuffle::None, 0)?;
        let batches = at_most(data.batches_per_epoch(), args.val_batches);
        Ok(Self { weights, data, batch_size: args.batch_size, seq_len, batches, json: args.json })
    }
}

impl Task for Eval {
    type Output = ();

    fn run<B: Backend>(mut self, backend: B) -> Result<()> {
        let mut model = Model::new(backend, &self.weights)?;
        let mut acts = Activations::new(&mut model, self.batch_size, self.seq_len, false)?;
        let (batches, bar) = (self.batches, bar(self.batches, "batches", self.json));
        let loss = mean_loss(&mut model, &mut acts, &mut self.data, batches, |done| {
            bar.set_position(done as u64);
            Ok(())
        })?;
        bar.finish_and_clear();
        let (tokens, perplexity) = (batches * acts.dims().rows(), f64::from(loss).exp());
        if self.json {
            let json =
                serde_json::json!({ "loss": loss, "perplexity": perplexity, "tokens": tokens, "batches": batches });
            return say!("{json}");
        }
        let digits = output::loss(loss);
        say!("loss {digits}, perplexity {perplexity:.4}, over {} tokens ({batches} batches)", grouped(tokens))
    }
}

/// The score on HellaSwag.
struct HellaSwag {
    weights: Weights,
    questions: Vec<Question>,
    at_once: usize,
    json: bool,
}

impl HellaSwag {
    fn new(weights: Weights, path: &Path, args: &EvalArgs) -> Result<Self> {
        if !args.batch_size.is_multiple_of(ENDINGS) {
            let wrong = args.batch_size;
            return Err(Error::usage(format!(
                "a batch of {wrong} sequences holds no whole number of HellaSwag's questions, four each; choose -b 4, 8, ..."
            )));
        }
        let mut questions = hellaswag::read(path, weights.config())?;
        questions.truncate(at_most(questions.len(), args.val_batches));
        let at_once = (args.batch_size / ENDINGS).min(questions.len());
        Ok(Self { weights, questions, at_once, json: args.json })
    }
}

impl Task for HellaSwag {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        let mut model = Model::new(backend, &self.weights)?;
        let bar = bar(self.questions.len(), "questions", self.json);
        let score = score(&mut model, &self.questions, self.at_once, |done| {
            bar.set_position(done as u64);
            Ok(())
        })?;
        bar.finish_and_clear();
        let Score { questions, correct, correct_by_sum } = score;
        let share = |correct: usize| correct as f64 / questions as f64;
        let (accuracy, by_sum) = (share(correct), share(correct_by_sum));
        if self.json {
            let json = serde_json::json!({
                "accuracy": accuracy, "accuracy_by_sum": by_sum, "correct": correct, "questions": questions,
            });
            return say!("{json}");
        }
        say!(
            "accuracy {accuracy:.4} ({correct} of {questions} questions, by mean loss), {by_sum:.4} by the sum of losses"
        )
    }
}

/// `most`, where 0 is all, of `all` there are.
fn at_most(all: usize, most: usize) -> usize {
    if most == 0 { all } else { most.min(all) }
}

/// A live line; none when the output is JSON.
fn bar(len: usize, what: &str, json: bool) -> ProgressBar {
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(len as u64) };
    let template = format!("{{bar:32}} {{pos}}/{{len}} {what}, ETA {{eta}}");
    bar.set_style(ProgressStyle::with_template(&template).expect("well formed"));
    bar
}
