//! `bandtrain convert`: from one checkpoint format to another, and from dense to banded.

use super::parse;
use crate::bandwidths::Bandwidths;
use crate::checkpoint::{self, Checkpoint, Format};
use crate::data::same_file;
use crate::error::{Error, Result};
use crate::output::grouped;
use crate::say;
use std::path::PathBuf;

/// Converts a model between file formats
///
/// Reads llm.c models (fp32 and bf16), native safetensors, Hugging Face GPT-2 files or folders, and the folders of runs; which one it is given
/// it finds out by itself. Formats that know no band receive dense matrices with zeros outside it. A bandwidth bands the model
/// on the way, and says how much of its weights that cut.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  bandtrain convert --input model.safetensors --output model-hf --to hf\n  \
                        bandtrain convert --input gpt2-hf --output gpt2.safetensors --to safetensors -w 1536")]
pub struct ConvertArgs {
    /// Model to read
    #[arg(long, short, value_name = "PATH")]
    input: PathBuf,
    /// File, or for hf the folder, to write
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// llmc (fp32), llmc-bf16, safetensors (native) or hf (a folder for Hugging Face transformers)
    #[arg(long, value_name = "FORMAT")]
    to: String,
    /// New bandwidth of FC1, 0 is dense, or pattern, like random:0.438, strided:0.438 or learned:0.438 [default: as it is]
    #[arg(long, short = 'w', value_parser = parse::bandwidths, value_name = "N", allow_negative_numbers = true)]
    fc1_bandwidth: Option<Bandwidths>,
    /// New bandwidth or pattern of FC2, likewise [default: as it is]
    #[arg(long, short = '2', value_parser = parse::bandwidths, value_name = "N", allow_negative_numbers = true)]
    fc2_bandwidth: Option<Bandwidths>,
}

/// Runs the command.
///
/// # Errors
/// An unknown format; a model that cannot be read; an output that cannot be written.
pub fn run(args: ConvertArgs) -> Result<()> {
    let format = Format::from_name(&args.to)?;
    if same_file(&args.input, &args.output) {
        return Err(Error::file(&args.output, "is the input and would be overwritten; name another output"));
    }
    let (checkpoint, notes) = banded(checkpoint::load(&args.input)?, &args)?;
    checkpoint::save(&args.output, &checkpoint, format)?;
    let config = checkpoint.weights.config();
    let count = grouped(checkpoint.weights.table().count(config));
    say!("{}: {count} parameters as {format}", args.output.display())?;
    if format == Format::Hf && checkpoint.tokenizer().is_none() {
        let vocab = config.vocab_size;
        say!(
            "note: without a tokenizer, since none is known that fits the model's {vocab} tokens; put its files there"
        )?;
    }
    notes.iter().try_for_each(|note| say!("{note}"))
}

/// The model with the bandwidths asked for, and what that cut.
fn banded(checkpoint: Checkpoint, args: &ConvertArgs) -> Result<(Checkpoint, Vec<String>)> {
    let (fc1, fc2) = (args.fc1_bandwidth, args.fc2_bandwidth);
    if (fc1, fc2) == (None, None) {
        return Ok((checkpoint, Vec::new()));
    }
    let Checkpoint { weights, meta } = checkpoint;
    let config = weights.config();
    let (weights, cut) = weights.rebanded(fc1.unwrap_or(config.fc1_bandwidth), fc2.unwrap_or(config.fc2_bandwidth))?;
    let banded = [("FC1", fc1, cut[0]), ("FC2", fc2, cut[1])]
        .into_iter()
        .filter(|(_, asked, _)| asked.is_some_and(|asked| !asked.is_dense()));
    let notes =
        banded.map(|(layer, _, cut)| format!("banding {layer} cut {:.2} % of its weights' squared norm", 100.0 * cut));
    Ok((Checkpoint { weights, meta }, notes.collect()))
}
