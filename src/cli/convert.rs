//! `bandtrain convert`: from one checkpoint format to another.

use crate::checkpoint::{self, Format};
use crate::error::Result;
use crate::output::grouped;
use crate::say;
use std::path::PathBuf;

/// Converts a model between file formats
///
/// Reads llm.c models (fp32 and bf16), native safetensors and Hugging Face GPT-2 files or folders; which one it is given
/// it finds out by itself. Formats that know no band receive dense matrices with zeros outside it.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bandtrain convert --input model.safetensors --output model-hf --to hf")]
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
}

/// Runs the command.
///
/// # Errors
/// An unknown format; a model that cannot be read; an output that cannot be written.
pub fn run(args: ConvertArgs) -> Result<()> {
    let format = Format::from_name(&args.to)?;
    let checkpoint = checkpoint::load(&args.input)?;
    checkpoint::save(&args.output, &checkpoint, format)?;
    let config = checkpoint.weights.config();
    let count = grouped(checkpoint.weights.table().count(config));
    say!("{}: {count} parameters as {format}", args.output.display())
}
