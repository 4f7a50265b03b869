//! `bandtrain data`: corpora by name.

use super::tokenize::{byte_bar, print_summary};
use crate::data::hub::Hub;
use crate::data::tinystories::download;
use crate::data::{Tokenizer, toy};
use crate::error::Result;
use crate::say;
use std::path::PathBuf;
use std::time::Instant;

/// Fetches a corpus and turns it into token files
///
/// tinystories: downloads the real TinyStories (about 2 GB of text) from the Hugging Face hub (HF_ENDPOINT names another),
/// checks it, and tokenizes it with GPT-2's BPE; asked for again, it goes on with a download that was cut. toy: writes the
/// built-in toy corpus, for the byte tokenizer.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bandtrain data tinystories --output data/tinystories")]
pub struct DataArgs {
    /// Which corpus
    #[arg(value_enum)]
    corpus: Corpus,
    /// Folder to write to; made if it is missing
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Tokenizer of the toy corpus
    #[arg(long, value_enum, default_value = "bytes", value_name = "NAME")]
    tokenizer: Tokenizer,
    /// No progress, no summary
    #[arg(long)]
    quiet: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Corpus {
    Tinystories,
    Toy,
}

/// Runs the command.
///
/// # Errors
/// A hub that cannot be reached or sends something wrong; outputs that cannot be written.
pub fn run(args: DataArgs) -> Result<()> {
    let start = Instant::now();
    match args.corpus {
        Corpus::Toy => {
            let summary = toy::write_toy(&args.output, args.tokenizer)?;
            if args.quiet { Ok(()) } else { print_summary(&summary, start) }
        }
        Corpus::Tinystories => {
            let bar = byte_bar(args.quiet);
            let sources = download(&args.output, &Hub::default(), &mut |what, done, total| {
                bar.set_message(what.to_string());
                bar.set_length(total);
                bar.set_position(done);
                Ok(())
            })?;
            bar.finish_and_clear();
            for source in sources.iter().filter(|_| !args.quiet) {
                let checked = if source.sha256_stated { "as the hub states" } else { "the hub states none" };
                say!("{}: sha256 {} ({checked})", source.name, source.sha256)?;
                print_summary(&source.summary, start)?;
            }
            Ok(())
        }
    }
}
