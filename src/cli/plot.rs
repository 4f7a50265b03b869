//! `bandtrain plot`: pictures of what `--metrics` wrote.

use crate::error::Result;
use crate::plot::{self, Picture, Run};
use crate::say;
use std::path::PathBuf;

const AFTER_HELP: &str = "\
Examples:
  bandtrain -n 300 --metrics run.jsonl
  bandtrain plot run.jsonl --output run.svg
  bandtrain plot runs/dense runs/banded --output both.png";

/// Draws loss, gradient norm, learning rate and throughput of runs
///
/// Several runs share the charts. An axis is logarithmic where values span a factor of 5.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct PlotArgs {
    /// Folders that --run names, or metrics files (JSON lines, as --metrics writes them)
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Picture to write, .svg or .png
    #[arg(long, short = 'o', value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Runs that cannot be read; a picture that cannot be written.
pub fn run(args: PlotArgs) -> Result<()> {
    let picture = Picture::of_path(&args.output)?;
    let mut runs = args.runs.iter().map(|path| Run::read(path)).collect::<Result<Vec<_>>>()?;
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for (run, path) in runs.iter_mut().zip(&args.runs) {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name = path.display().to_string();
        }
    }
    plot::write(&runs, &args.output, picture)?;
    say!(
        "{} drawn to {}",
        if runs.len() == 1 { "1 run".into() } else { format!("{} runs", runs.len()) },
        args.output.display()
    )
}
