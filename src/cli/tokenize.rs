//! `bandtrain tokenize`: text to token files.

use super::parse;
use crate::data::tokenize::{Summary, TokenizeOptions, ValidationSplit, tokenize};
use crate::data::{Tokenizer, hellaswag, text_files};
use crate::error::{Error, Result};
use crate::output::{bytes, grouped};
use crate::say;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::time::Instant;

/// Turns text into token files for training
///
/// Text files hold documents separated by lines '<|endoftext|>'; .json files an array, .jsonl files lines, of texts or of
/// objects with 'story' or 'text'. Each document becomes an end-of-text token and its own tokens, in llm.c's file format.
/// With --hellaswag, HellaSwag's own files (hellaswag_val.jsonl) become questions for 'bandtrain eval --hellaswag'.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bandtrain tokenize --input stories/*.txt --output train.bin --val-output val.bin")]
pub struct TokenizeArgs {
    /// Files, folders or globs of text
    #[arg(long, short, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<String>,
    /// Token file to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Token file for documents held out for validation
    #[arg(long, value_name = "FILE")]
    val_output: Option<PathBuf>,
    /// Share of the documents held out
    #[arg(long, default_value = "0.05", requires = "val_output", value_parser = parse::share, value_name = "F",
          allow_negative_numbers = true)]
    val_fraction: f64,
    /// Chooses which documents are held out
    #[arg(long, default_value = "42", value_parser = parse::seed, value_name = "N")]
    seed: u64,
    /// Cut the output into files of at most this many tokens (train.bin: train_000001.bin, ...)
    #[arg(long, value_parser = parse::positive, value_name = "N")]
    shard_tokens: Option<usize>,
    /// GPT-2's BPE, or a token for each byte
    #[arg(long, value_enum, default_value = "gpt2", value_name = "NAME")]
    tokenizer: Tokenizer,
    /// The input is HellaSwag's, the output its questions in llm.c's format
    #[arg(long, conflicts_with_all = ["val_output", "shard_tokens"])]
    hellaswag: bool,
    /// No progress, no summary
    #[arg(long)]
    quiet: bool,
}

/// Runs the command.
///
/// # Errors
/// Text that cannot be read, outputs that cannot be written.
pub fn run(args: TokenizeArgs) -> Result<()> {
    if args.hellaswag {
        let count = hellaswag::convert(&text_files(&args.input)?, &args.output, args.tokenizer)?;
        return if args.quiet { Ok(()) } else { say!("{}: {} questions", args.output.display(), grouped(count)) };
    }
    let (fraction, seed) = (args.val_fraction, args.seed);
    let options = TokenizeOptions {
        inputs: text_files(&args.input)?,
        output: args.output,
        validation: args.val_output.map(|output| ValidationSplit { output, fraction, seed }),
        shard_tokens: args.shard_tokens,
        tokenizer: args.tokenizer,
    };
    let (start, bar) = (Instant::now(), byte_bar(args.quiet));
    let summary = tokenize(&options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        Ok(())
    })?;
    bar.finish_and_clear();
    if args.quiet { Ok(()) } else { print_summary(&summary, start) }
}

/// A live line for work counted in bytes; none in a pipe or when `quiet`.
pub fn byte_bar(quiet: bool) -> ProgressBar {
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
    let template = "{msg} {bar:32} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is well formed"));
    bar
}

/// Says what was written, and how fast.
///
/// # Errors
/// Standard output cannot be written.
pub fn print_summary(summary: &Summary, start: Instant) -> Result<()> {
    for output in &summary.outputs {
        say!("{}: {} tokens", output.path.display(), grouped(output.tokens))?;
    }
    let seconds = start.elapsed().as_secs_f64().max(1e-9);
    let rate = summary.bytes as f64 / seconds / 1e6;
    let documents = grouped(summary.documents as usize);
    let read = bytes(usize::try_from(summary.bytes).map_err(|_| Error::Internal("a size overflows".into()))?);
    say!("{documents} documents, {read} of text in {seconds:.2} s ({rate:.1} MB/s)")
}
