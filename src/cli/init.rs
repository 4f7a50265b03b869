//! `bandtrain init`: a fresh model in a file.

use super::parse;
use crate::bandwidths::Bandwidths;
use crate::checkpoint::{self, Checkpoint, Format, Meta};
use crate::config::{GptConfig, preset};
use crate::error::Result;
use crate::output::grouped;
use crate::say;
use crate::weights::Weights;
use std::path::PathBuf;

/// Writes a model with fresh random weights
///
/// The weights are GPT-2's: normal with deviation 0.02, the projections onto the residual stream divided by sqrt(2L).
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  bandtrain init --preset tinystories-51m --fc1-bandwidth 1024 --output start.safetensors"
)]
pub struct InitArgs {
    /// toy, tinystories-7m, tinystories-51m, gpt2, gpt2-medium, gpt2-large or gpt2-xl
    #[arg(long, value_name = "NAME")]
    preset: String,
    /// File to write: .safetensors (native, packed bands) or .bin (llm.c, dense)
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Same seed, same weights
    #[arg(long, default_value = "42", value_parser = parse::seed, value_name = "N", allow_negative_numbers = true)]
    seed: u64,
    /// Bandwidth of FC1, 0 is dense, or pattern, like random:0.438, strided:0.438 or learned:0.438 [default: the preset's]
    #[arg(long, short = 'w', value_parser = parse::bandwidths, value_name = "N", allow_negative_numbers = true)]
    fc1_bandwidth: Option<Bandwidths>,
    /// Bandwidth or pattern of FC2, likewise [default: the preset's]
    #[arg(long, short = '2', value_parser = parse::bandwidths, value_name = "N", allow_negative_numbers = true)]
    fc2_bandwidth: Option<Bandwidths>,
    /// Width of the MLP [default: 4C]
    #[arg(long, value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    mlp_width: Option<usize>,
    /// Multiply the weights of banded layers by sqrt(dense / kept connections)
    #[arg(long)]
    rescale_init: bool,
}

/// Runs the command.
///
/// # Errors
/// An unknown preset or ending of the file's name; a file that cannot be written.
pub fn run(args: InitArgs) -> Result<()> {
    let format = Format::of_path(&args.output)?;
    let model = preset(&args.preset)?.model;
    let config = GptConfig {
        fc1_bandwidth: args.fc1_bandwidth.unwrap_or(model.fc1_bandwidth),
        fc2_bandwidth: args.fc2_bandwidth.unwrap_or(model.fc2_bandwidth),
        ..model
    };
    let config = config.with_mlp_width(args.mlp_width.unwrap_or(config.mlp_width()));
    if format == Format::Llmc {
        checkpoint::check_llmc(&args.output, &config)?;
    }
    let mut weights = Weights::init(&config, args.seed)?;
    if args.rescale_init {
        weights.rescale_cut();
    }
    let count = grouped(weights.table().count(&config));
    let checkpoint = Checkpoint { weights, meta: Meta::of_config(&config) };
    checkpoint::save(&args.output, &checkpoint, format)?;
    say!("{}: {} with {count} parameters, seed {}", args.output.display(), args.preset, args.seed)
}
